"""La-LoRA against a float64 NumPy transcription of Eqs. 5-10, and what its gates promise."""

import numpy as np
import pytest
import torch
from tiny import Tiny, batches, components, settings, train, training_of

import allocators


class Oracle:
    """Algorithm 1 in plain loops over float64 arrays, from the paper's text; ranks rounded as DESIGN 4.3 says."""

    def __init__(self, weights, L, s):
        self.L, self.s = L, s
        self.ranks = [s.rank if s.lalora_budget == "full" else 1] * L
        self.D = float(sum(self.ranks))
        self.start = self.weights = weights  # per block: list of (W_dw (r, d), W_up (m, r))
        self.fisher = [[0.0] * len(block) for block in weights]
    def see_gradients(self, grads):
        """Mean with factor 0.9 of the squared gradients of every component, matrices of a block kept apart."""
        for i, block in enumerate(grads):
            for m, (g_dw, g_up) in enumerate(block):
                self.fisher[i][m] = 0.9 * self.fisher[i][m] + 0.1 * ((g_dw ** 2).sum(1) + (g_up ** 2).sum(0))
    def step(self, weights):
        frobenius, fidelity, increase, c = np.linalg.norm, self.s.lalora_fidelity, [], []
        for i in range(self.L):
            r_i, s_new, s_old, c_i = self.ranks[i], 0.0, 0.0, 0.0
            for m, ((dw, up), (dw_before, up_before)) in enumerate(zip(weights[i], self.weights[i])):
                n_dw, n_up = frobenius(dw[:r_i, :]), frobenius(up[:, :r_i])  # Eq. 3
                o_dw, o_up = frobenius(dw_before[:r_i, :]), frobenius(up_before[:, :r_i])
                s_new += (n_up + n_dw) / r_i  # Eq. 7
                s_old += (o_up + o_dw) / r_i
                if fidelity == "step":  # Eq. 10
                    pairs = (o_dw, n_dw), (o_up, n_up)
                elif fidelity == "truncation":  # section 3.3's text
                    pairs = (n_dw, frobenius(dw)), (n_up, frobenius(up))
                elif fidelity == "initial":  # section 5.2's text
                    dw_first, up_first = self.start[i][m]
                    pairs = (frobenius(dw_first[:r_i, :]), n_dw), (frobenius(up_first[:, :r_i]), n_up)
                else:
                    pairs = (1, 1), (1, 1)
                f_dw, f_up = (1.0 if a == 0 and b == 0 else a / b for a, b in pairs)
                if self.s.lalora_score == "norm":
                    c_i += f_dw * n_up + f_up * n_dw  # Eq. 9
                else:
                    c_i += self.fisher[i][m][:r_i].sum()
            increase.append((s_new - s_old) / s_old)  # Eq. 6
            c.append(c_i)
        if self.s.lalora_budget == "grow":
            self.D = self.D * (1 + self.s.lalora_gamma * sum(increase) / self.L)  # Eq. 5
            self.D = min(max(self.D, self.L), self.s.rank * self.L)
        if self.s.lalora_score == "fisher" or self.s.lalora_softmax == "relative":
            c = [c_i / (sum(c) / self.L) for c_i in c]
        self.weights = weights
        self.ranks = self.whole([np.exp(c_i) / sum(np.exp(c_j) for c_j in c) * self.D for c_i in c])  # Eq. 8
    def whole(self, shares):
        ranks = [1] * self.L
        for _ in range(round(self.D) - self.L):
            unmet = [share - rank if rank < self.s.rank else -np.inf for share, rank in zip(shares, ranks)]
            ranks[int(np.argmax(unmet))] += 1
        return ranks


def by_block(allocator, values):
    """Values (A, B) of the matrices, in model order, as float64 arrays per block."""
    blocks = [[] for _ in range(allocator.blocks)]
    for (_, block, _), pair in zip(allocator.sites, values):
        blocks[block].append(tuple(t.detach().double().numpy().copy() for t in pair))
    return blocks


def weights_of(allocator):
    return by_block(allocator, [(layer.A, layer.B) for layer in allocator.layers.values()])


@pytest.mark.parametrize("changes", [
    dict(), dict(lalora_fidelity="truncation"), dict(lalora_fidelity="off"), dict(lalora_budget="full"),
    dict(lalora_score="fisher", targets=["query", "up", "down", "out"]), dict(lalora_fidelity="initial"),
    dict(lalora_softmax="raw"), dict(lalora_gamma=3.0, weight_decay=0.3), dict(lalora_gamma=4.0, weight_decay=20.0),
    dict(rank=1), dict(targets=["query", "up", "down"])], ids=str)
def test_follows_the_papers_equations(changes):
    torch.manual_seed(0)
    s = settings(**{"method": "lalora", "lalora_gamma": 1.0, "rank": 6, "lr": 2e-2, "weight_decay": 0.1, **changes})
    allocator = allocators.LaLora(Tiny(blocks=4), s, 200)
    oracle = Oracle(weights_of(allocator), allocator.blocks, s)
    history, see = [list(oracle.ranks)], allocator.after_backward

    def after_backward(step):
        oracle.see_gradients(by_block(allocator, [allocator.gradients(name) for name in allocator.names]))
        see(step)

    allocator.after_backward = after_backward
    training, still = training_of(allocator), []

    def watch(step, loss):
        now = components(allocator, *training.optimizers)
        if still:  # components that were switched off in this step, and their moments
            masked, before = still.pop()
            assert all(torch.equal(old[masked], new[masked]) for old, new in zip(before, now))
        still.append((allocator.mask[allocator.block] == 0, now))
        oracle.step(weights_of(allocator))
        ranks = allocator.block_ranks.tolist()
        assert allocator.budget_rank.item() == pytest.approx(oracle.D, rel=1e-5), step
        assert ranks == oracle.ranks, step
        for (name, block, _), layer in zip(allocator.sites, allocator.layers.values()):
            assert layer.g.tolist() == [1.0] * ranks[block] + [0.0] * (s.rank - ranks[block])
            assert allocator.ranks()[name] == ranks[block]
        history.append(ranks)

    train(training, batches(200), watch=watch)
    assert len(history) == 201 and allocator.allocations == 200
    if s.weight_decay == 20:  # decay dominates: norms fall, and the budget to one per block
        assert max(map(sum, history)) > sum(history[-1]) == allocator.blocks
    elif s.rank > 1 and s.lalora_budget == "grow":  # the run exercised what it claims to
        moves = np.diff(np.array(history), axis=0)
        assert (moves > 0).any() and (moves < 0).any() and len({tuple(r) for r in history}) > 10
        assert any(len(set(ranks)) > 1 for ranks in history)
