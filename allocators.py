"""Rank-allocation policies behind one interface: static shapes, AdaLoRA, La-LoRA, WeightLoRA(+) and LeLoRA.

A policy attaches the adapters and then decides, while training runs, how much rank each matrix gets. The training loop
drives every policy in the same way and does not know which one it is:

    allocator = METHODS[name](model, settings, steps)
    loss + allocator.penalty()  ->  backward  ->  allocator.after_backward(step)
    optimizer.step()            ->  allocator.after_step(step)      # True: parameters were rebuilt
"""

import hashlib
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora
from model import UserError, cache_folder


class Allocator:
    """Uniform LoRA, and what every policy starts from: one adapter of the nominal rank per target matrix.

    `model` is a frozen model from model.py, `settings` the run's settings (train.Settings), `steps` the number of
    optimizer steps of the whole run. With `settings.adapter` the adapters are those of a folder in PEFT's layout.
    `current` is the rank of every matrix in `names`, (n,) float64 on the device.
    """

    held_out = 0  # training rows the policy wants kept aside; the loop then sets `validation_loss` (a call, 0-d tensor)
    refuses = ()  # settings of init, dora, lora_plus_ratio, freeze_a that mean nothing with this policy
    dynamic = False  # True: a run that ends before `allocations` > 0 is an error, not a result
    validation_loss = None
    ok = torch.ones((), dtype=torch.bool)  # the loop sets it, on the device: False where a step's gradients were not
    # finite; they are then zeros and no weight moves, and a policy learns nothing from the step
    saved = ()  # names of the attributes, tensors, that a restart needs

    def __init__(self, model, settings, steps):
        self.model, self.settings, self.steps = model, settings, steps
        started = lora.load_adapter(model, settings.adapter) if settings.adapter else {}  # method lora only
        if settings.adapter and not started:
            raise UserError(f"--adapter {settings.adapter}: there is no matrix with an adapter in it to train")
        if started:
            settings.targets = sorted({name.split(".")[-1] for name in started}, key=lora.TARGETS.index)
            settings.dora = any(layer.magnitude is not None for layer in started.values())
        self.sites = lora.sites(model, settings.targets)  # (name, block index, kind)
        self.names = [name for name, _, _ in self.sites]
        self.blocks = 1 + max(block for _, block, _ in self.sites)
        self.allocations, self.init = 0, settings.init
        self.device = torch.device(settings.device)  # under --shard the weights are still on the CPU
        self.attach(self.capacities(), started)
        sizes = [model.get_submodule(name).weight.shape for name in self.names]
        cost = [n_out + n_in * (not settings.freeze_a) for n_out, n_in in sizes]
        self.cost = torch.tensor(cost, dtype=torch.float64, device=self.device)
        self.setup()

    def capacities(self):
        """Rank that each adapter is built with: {name: capacity}."""
        return {name: self.settings.rank for name in self.names}

    def attach(self, ranks, started=None):
        """Put adapters of these ranks, {name: rank}, on the model, unless `started` are there, as the settings say.

        PiSSA (Meng et al. 2024, Eqs. 2-4) starts at the r largest singular components of W, MiLoRA (Wang et al. 2024)
        at the r smallest; the frozen weight is W without them. LoRA-FA (Zhang et al. 2023) freezes A. LoRA+ (Hayou et
        al. 2024) gives B its own learning rate, and DoRA's lengths, as the authors' code does.
        """
        s = self.settings
        self.layers = started or lora.attach(self.model, ranks, s.alpha, s.dropout, s.rank, s.scaling, self.device,
                                             s.dora)
        for layer in self.layers.values():
            if self.init != "lora":
                part = slice(layer.rank) if self.init == "pissa" else slice(-layer.rank, None)
                _, A, B = singular_windows(layer.weight.data.to(self.device), layer.rank)
                layer.split_off(A[part], B[:, part])
            layer.A.requires_grad_(not s.freeze_a)
            for p in (layer.B, layer.magnitude) if s.dora else (layer.B,):
                p.lr_ratio = s.lora_plus_ratio
        capacity = [self.layers[name].rank if name in self.layers else 0 for name in self.names]
        self.current = torch.tensor(capacity, dtype=torch.float64, device=self.device)

    def setup(self):
        """Prepare the policy's own state; the adapters are attached."""

    def parameters(self):
        """Adapter parameters for the run's optimizer, in a fixed order."""
        factors = [p for layer in self.layers.values() for p in (layer.A, layer.B, layer.magnitude)]
        return [p for p in factors if p is not None and p.requires_grad]

    def penalty(self):
        """Extra loss term, a 0-d tensor or 0."""
        return 0

    def after_backward(self, step):
        """Gradients of step `step` (from 1) are there, unclipped; nothing has moved yet."""

    def after_step(self, step):
        """The optimizer has moved the weights; returns True when parameters were rebuilt and it must follow."""
        return False

    def ranks(self):
        """Current rank of every matrix: {name: int}."""
        return {name: int(rank) for name, rank in zip(self.names, self.current.tolist())}

    def budget(self):
        """Trainable parameters in force, a 0-d float64 tensor: sum over matrices of rank_i (in_i + out_i).

        A frozen A costs nothing: rank_i out_i. DoRA's lengths are counted: out_i for every adapter, whatever its rank.
        """
        lengths = sum(layer.out_features for layer in self.layers.values()) if self.settings.dora else 0
        return (self.current * self.cost).sum() + lengths

    def log(self):
        """The policy's own numbers for metrics.jsonl and ranks.jsonl: {name: number, tensor or {name: number}}."""
        return {}

    def warning(self):
        """One line about a failure of the policy itself, for the run's result, or None."""

    def state_dict(self):
        """What the policy needs to go on after a restart, besides adapters and gates: {name: tensor}."""
        return {"allocations": torch.tensor(self.allocations)} | {key: getattr(self, key) for key in self.saved}

    def load_state_dict(self, state):
        """Take the state of `state_dict` back."""
        self.allocations = int(state["allocations"])
        for key in self.saved:
            setattr(self, key, state[key].to(self.device))


# ---------------------------------------------------------------------------------------------- static shapes


class Static(Allocator):
    """Fixed non-uniform shapes of the Adaptive LoRA paper, section 3.1; `settings.method` names the shape.

    Ranks are floored to integers and clamped to [r_min, r_max]; `settings.rank` is the paper's r_base.
    """

    def capacities(self):
        s = self.settings
        return {name: min(max(int(self.shape(i, kind, self.blocks, s.rank)), s.r_min), s.r_max)
                for name, i, kind in self.sites}

    def shape(self, i, kind, L, r_base):
        """Rank of the projection `kind` in block i of L, before it is floored and clamped."""
        if self.settings.method == "linear-decay":  # falls linearly with depth (section 3.1.1)
            return r_base - (r_base - self.settings.r_min) * i / (L - 1) if L > 1 else r_base
        if self.settings.method == "attention-heavy":  # half for feed-forward matrices (section 3.1.2)
            return r_base if kind in ("query", "key", "value", "out") else r_base / 2
        # empirical: middle blocks get the most rank, early ones the least (section 3.1.3)
        return r_base * 6 / 10 if 10 * i < 3 * L else r_base * 12 / 10 if 10 * i < 7 * L else r_base


class Direct(Allocator):
    """No adapters: `full` trains every weight, `bitfit` every bias (Zaken et al. 2022)."""

    refuses = ("init", "dora", "lora_plus_ratio", "freeze_a")

    def __init__(self, model, settings, steps):
        self.sites, self.layers, self.names, self.allocations = [], {}, [], 0
        head = model.head_kind == "classify"  # a classification head is trained by every method, and counted apart
        self.trained = [p for name, p in model.named_parameters() if not (head and name.startswith("head."))
                        and (settings.method == "full" or name.endswith("bias"))]
        if not self.trained:
            raise UserError(f"--method {settings.method}: a {model.family} model has no biases to train")
        self.device = self.trained[0].device
        self.size = torch.tensor(float(sum(p.numel() for p in self.trained)), dtype=torch.float64, device=self.device)
        self.current = torch.zeros(0, dtype=torch.float64, device=self.device)

    def parameters(self):
        return self.trained

    def budget(self):
        return self.size


# ---------------------------------------------------------------------------------------------- AdaLoRA


class AdaLora(Allocator):
    """AdaLoRA (Zhang et al. 2023): W + s P diag(lambda) Q, and lambda of the least sensitive triplets is set to zero.

    A is Q, B is P and the gate is the trainable lambda. A pruned lambda goes on receiving gradients, so that its
    triplet may return at a later allocation; after the last one it is held at zero. Equation numbers are that paper's;
    where PEFT's AdaLoraModel differs (norms in `penalty` not squared, sensitivity taken after the optimizer's step),
    this is PEFT's way. t_init and t_final default to 10 % and 50 % of the run, about what the paper takes for GLUE.
    Raises UserError for a schedule that cannot work.
    """

    refuses = ("init", "lora_plus_ratio", "freeze_a")  # own start; lambda is what starts at 0; reads A's gradient
    dynamic, saved = True, ("kept",)

    def capacities(self):
        s = self.settings
        self.t_init = s.adalora_t_init or round(0.1 * self.steps)
        self.end = self.steps - (s.adalora_t_final or min(round(0.5 * self.steps), max(0, self.steps - 2)))
        if not 0 <= self.t_init < self.end <= self.steps or self.end < 2:
            raise UserError(f"--adalora-t-init {self.t_init} and --adalora-t-final {self.steps - self.end} leave "
                                 f"no time to allocate in a run of {self.steps} steps; lower them or train longer")
        if min(s.adalora_init_ratio, s.adalora_delta_t) < 1:
            raise UserError("--adalora-init-ratio and --adalora-delta-t must not be below 1")
        return dict.fromkeys(self.names, round(s.adalora_init_ratio * s.rank))

    def setup(self):
        layers = self.layers.values()
        for layer in layers:
            layer.gate = torch.nn.Parameter(torch.zeros_like(layer.gate))
            layer.A.data.normal_(std=0.02)
            layer.B.data.normal_(std=0.02)
        self.gates = [layer.gate for layer in layers]
        self.weights = self.gates + [layer.A for layer in layers] + [layer.B for layer in layers]
        self.smooth, self.unsure = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.kept = torch.ones_like(torch.stack(self.gates), requires_grad=False)  # (n, R): 1, or 0 where pruned
        self.last = 0  # step of the last allocation

    def parameters(self):
        factors = [p for layer in self.layers.values() for p in (layer.A, layer.B, layer.gate, layer.magnitude)]
        return [p for p in factors if p is not None]

    def penalty(self):
        """Orthogonality of P and Q (Eq. 4): the mean over all of them of ||Q Q^T - I||_F and ||P^T P - I||_F."""
        by_size = {}
        for layer in self.layers.values():
            by_size.setdefault(layer.in_features, []).append(layer.A)
            by_size.setdefault(layer.out_features, []).append(layer.B.T)
        stacks = map(torch.stack, by_size.values())  # (m, R, size) each: one product for all of a size
        gram = torch.cat([stack @ stack.mT for stack in stacks])  # (2 n, R, R)
        norms = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype))
        return self.settings.adalora_orth * norms.mean()

    @torch.no_grad()
    def after_step(self, step):
        allocate = self.last < self.end  # once more at the end
        if step < self.end:
            self.observe()
            allocate = step > self.t_init and step % self.settings.adalora_delta_t == 0
        if allocate:
            scores = self.scores()
            pruned = scores.numel() - self.triplets(step)
            self.kept.copy_(scores > scores.flatten().sort().values[pruned - 1] if pruned else self.kept)
            self.current = self.kept.sum(1).double()
            self.last, self.allocations = step, self.allocations + 1
        if allocate or step >= self.end:
            torch._foreach_mul_(self.gates, self.kept.unbind())  # Eq. 6
        return False

    def observe(self):
        """Smoothed sensitivity (Eqs. 8-9) and its uncertainty (Eq. 10) of every entry of lambda, Q and P."""
        sensitivity = torch._foreach_mul(self.weights, [w.grad for w in self.weights])
        torch._foreach_abs_(sensitivity)
        self.smoothen(self.smooth, sensitivity, 1 - self.settings.adalora_beta1)
        torch._foreach_sub_(sensitivity, self.smooth)
        torch._foreach_abs_(sensitivity)
        self.smoothen(self.unsure, sensitivity, 1 - self.settings.adalora_beta2)

    def smoothen(self, averages, values, weight):
        """Move the running averages by `weight` towards the values; not at all after a bad step."""
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, weight * self.ok.to(change[0].dtype))
        torch._foreach_add_(averages, change)

    def scores(self):
        """Importance of each triplet, (n, R): lambda's plus the means over its row of Q, column of P (Eqs. 7, 11)."""
        entries, n = torch._foreach_mul(self.smooth, self.unsure), len(self.gates)
        vectors = [q.mean(1) + p.mean(0) for q, p in zip(entries[n:2 * n], entries[2 * n:])]
        return torch.stack(entries[:n]) + torch.stack(vectors)

    def triplets(self, step):
        """How many triplets to keep at `step`: from n R down to n r along a cubic (Eq. 12)."""
        full, target = self.kept.numel(), len(self.gates) * self.settings.rank
        left = 1 - (min(step, self.end) - self.t_init) / (self.end - self.t_init)
        return int((full - target) * left ** 3 + target)

    def state_dict(self):
        averages = {f"average.{i}": t for i, t in enumerate(self.smooth + self.unsure)}
        return super().state_dict() | {"last": torch.tensor(self.last)} | averages

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.current, self.last = self.kept.sum(1).double(), int(state["last"])
        for i, average in enumerate(self.smooth + self.unsure):
            average.copy_(state[f"average.{i}"])


# ---------------------------------------------------------------------------------------------- La-LoRA


class LaLora(Allocator):
    """La-LoRA (Gu et al. 2025, Algorithm 1): a rank for every transformer block, from the norms of its adapters.

    All adapters of block i use the first r_i of their `rank` components; the others are gated off and stand still.
    Both steps that Eqs. 6 and 10 compare are truncated at the current r_i. Flags: `lalora_gamma` is gamma;
    `lalora_budget` "grow" is Eq. 5, "full" holds D = r L, where every block has rank r; `lalora_fidelity` is f: "step"
    as in Eq. 10, "truncation" as in the text of section 3.3 (truncated over full norm), "off" 1; `lalora_score` is c:
    "norm" as in Eq. 9, "fisher" as in section 5.7, see `after_backward`.
    """

    refuses = ("init",)  # components gated off would be missing from W, and the norms it reads be W's
    dynamic = True
    saved = ("block_ranks", "budget_rank", "energy", "fisher")

    def setup(self):
        L, r, full = self.blocks, self.settings.rank, self.settings.lalora_budget == "full"
        self.block = torch.tensor([block for _, block, _ in self.sites], device=self.device)  # (n,)
        self.member = F.one_hot(self.block, L).T.double()  # (L, n): sums over a block's matrices
        self.block_ranks = torch.full((L,), r if full else 1, device=self.device)
        self.budget_rank = torch.tensor(r * L if full else L, dtype=torch.float64, device=self.device)  # D, DCDPB
        self.mask = torch.zeros(L, r, device=self.device)
        for layer, (_, block, _) in zip(self.layers.values(), self.sites):
            layer.gate = self.mask[block]  # a view: one write changes every layer
            layer.mask_updates(self.mask[block])
        self.truncate()
        self.energy = self.energies()  # (2, n, r), of A and of B, summed over the first 1..r components
        self.fisher = torch.zeros_like(self.energy[0])

    def energies(self):
        """Squared Frobenius norm at every truncation: a lookup gives any norm of Eqs. 6-10."""
        return squared_norms([(layer.A.data, layer.B.data) for layer in self.layers.values()]).cumsum(2)

    def truncate(self):
        """Make `block_ranks` the ranks in use (Eq. 3)."""
        self.mask.copy_(torch.arange(self.mask.shape[1], device=self.device) < self.block_ranks[:, None])
        self.current = self.block_ranks[self.block].double()

    @torch.no_grad()
    def after_backward(self, step):
        """Empirical Fisher information: running mean of the squared gradients (inactive components have none)."""
        if self.settings.lalora_score == "fisher":
            grads = squared_norms([(layer.A.grad, layer.B.grad) for layer in self.layers.values()])
            self.fisher.lerp_(grads.sum(0).nan_to_num(posinf=0.0), 0.1 * self.ok.double())

    @torch.no_grad()
    def after_step(self, step):
        s, L, r = self.settings, *self.mask.shape
        energy, last = self.energies(), self.block_ranks[self.block][:, None] - 1  # (2, n, r), (n, 1)
        new, old = (e.gather(2, last.expand(2, -1, 1)).sqrt().squeeze(2) for e in (energy, self.energy))  # (2, n)
        if s.lalora_budget == "grow":
            s_new, s_old = self.member @ new.sum(0), self.member @ old.sum(0)  # Eq. 7; both at r_i: 1 / r_i cancels
            growth = ((s_new - s_old) / s_old).mean()  # Eq. 6
            self.budget_rank.mul_(1 + s.lalora_gamma * growth).clamp_(L, r * L)  # Eq. 5
        if s.lalora_score == "fisher":
            c = self.member @ self.fisher.cumsum(1).gather(1, last).squeeze(1)
            c = c / c.mean().clamp_min(1e-300)  # gradients have no natural scale: mean 1 over the blocks
        else:
            above, below = {"step": (old, new), "truncation": (new, energy[:, :, -1].sqrt()),
                            "off": (new, new)}[s.lalora_fidelity]
            f = torch.where(below > 0, above / below, 1)  # Eq. 10; 0 / 0 counts as 1
            c = self.member @ (f[0] * new[1] + f[1] * new[0])  # Eq. 9: A is W_dw, B is W_up
        ranks = whole_ranks(c.softmax(0) * self.budget_rank, self.budget_rank, r)  # Eq. 8
        self.block_ranks.copy_(torch.where(self.ok, ranks, self.block_ranks))
        self.energy = energy
        self.truncate()
        self.allocations += 1
        return False

    def log(self):
        return {"lalora_budget": self.budget_rank}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.truncate()


def whole_ranks(shares, total, r):
    """Integers in [1, r] that sum to round(total), nearest to `shares` (L,); needs L <= total <= r L.

    Every block gets 1, then the rest goes unit by unit to the largest unmet share: unit k of block i has priority
    share_i - (k - 1). One sort, no synchronisation.
    """
    unmet = shares[:, None] - torch.arange(1, r, device=shares.device)  # (L, r - 1): units 2 to r
    order = unmet.flatten().argsort(descending=True, stable=True)
    given = torch.arange(len(order), device=shares.device) < total.round() - len(shares)
    return 1 + torch.zeros_like(order).scatter_(0, order, given.long()).view_as(unmet).sum(1)


def squared_norms(factors):
    """Squared norms of the rows of every A and the columns of every B, (2, n, R) float64, from n pairs (A, B).

    Matrices of one shape are reduced together: on a CPU 3 times as fast as one by one, and 4 kernels instead of 4 n.
    """
    norms = []
    for dim, tensors in zip((-1, -2), zip(*factors)):
        shapes, rows = {}, [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            shapes.setdefault(tensor.shape, []).append(i)
        for alike in shapes.values():
            for i, row in zip(alike, torch.stack([tensors[i] for i in alike]).square_().sum(dim)):
                rows[i] = row
        norms.append(torch.stack(rows))
    return torch.stack(norms).double()

# ---------------------------------------------------------------------------------------------- WeightLoRA


class WeightLora(Allocator):
    """WeightLoRA and WeightLoRA+: W + omega_i s B A; a short warm-up finds the K matrices worth adapting (Eqs. 1-2).

    For T steps omega, one number per matrix, follows StoIHT (Appendix B): a plain gradient step, then only the K
    largest |omega| stay, those tied with the K-th included; `--weightlora-threshold end` does the second only after
    step T. Then the K survivors start afresh as standard LoRA of rank r, or 2r with `weightlora+` (section 2.2), and
    every other matrix is its plain frozen layer again. Ties that step T leaves go to the matrix that comes first in
    the model. Raises UserError for a K or T that cannot work.
    """

    dynamic, saved = True, ("omega",)

    def capacities(self):
        s = self.settings
        self.keep = matrices_to_keep(s, len(self.names))
        self.warmup = s.weightlora_steps or min(max(5, round(0.005 * self.steps)), self.steps - 1)
        if not 2 <= self.warmup < self.steps:  # after one step every gradient of omega was 0, since B = 0
            raise UserError(f"--weightlora-steps {self.warmup}: the warm-up takes at least 2 steps and has to end "
                                 f"before the run does, which has {self.steps}")
        self.init = "lora"  # of the warm-up: omega must not scale components of W
        self.final_rank = 2 * s.rank if s.method == "weightlora+" else s.rank
        small = [name for name in self.names if min(self.model.get_submodule(name).weight.shape) < self.final_rank]
        if small:
            raise UserError(f"--rank {s.rank}: {s.method} may give {small[0]} rank {self.final_rank}, more than "
                                 "it has; choose a lower rank")
        return super().capacities()

    def setup(self):
        self.omega = torch.ones(len(self.names), dtype=torch.float64, device=self.device)  # early steps are tiny
        self.gates = []
        for layer in self.layers.values():
            layer.gate = torch.nn.Parameter(torch.ones_like(layer.gate[:1]))
            self.gates.append(layer.gate)

    def after_backward(self, step):
        if self.gates:
            self.gradient = torch.cat([gate.grad for gate in self.gates]).double()
            for gate in self.gates:  # not the run's optimizer's, which therefore does not clear it
                gate.grad = None

    @torch.no_grad()
    def after_step(self, step):
        if not self.gates:
            return False
        s, last = self.settings, step >= self.warmup
        self.omega -= s.weightlora_lr * self.gradient
        if last or s.weightlora_threshold == "every":
            size = self.omega.abs()
            self.omega *= size >= size.topk(self.keep).values[-1]
        torch._foreach_copy_(self.gates, self.omega.split(1))
        if last:
            order = self.omega.abs().argsort(descending=True, stable=True)[:self.keep]
            self.rebuild([self.names[i] for i in sorted(order.tolist())])
        return last

    def rebuild(self, survivors):
        """Give the matrices named in `survivors` fresh adapters and all others their plain layers back."""
        for name in self.names:
            lora.detach(self.model, name)
        self.init = self.settings.init
        self.attach({name: self.final_rank for name in survivors})
        self.gates, self.gradient, self.allocations = [], None, 1

    def log(self):
        selected = {} if self.gates else {"selected": {name: int(name in self.layers) for name in self.names}}
        return {"omega": dict(zip(self.names, self.omega.tolist()))} | selected

    def state_dict(self):
        selected = torch.tensor([not self.gates and name in self.layers for name in self.names])
        return super().state_dict() | {"selected": selected}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.allocations:
            self.rebuild([name for name, selected in zip(self.names, state["selected"].tolist()) if selected])
        else:
            torch._foreach_copy_([gate.data for gate in self.gates], self.omega.split(1))


class RandomLora(Allocator):
    """Uniform LoRA on K matrices drawn at random from the seed: WeightLoRA's control (RLoRA, Appendix D).

    They are drawn before the first step, since a warm-up whose adapters are thrown away cannot change the draw.
    """

    def capacities(self):
        s, n = self.settings, len(self.names)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(s.seed))[:matrices_to_keep(s, n)].tolist()
        return {name: s.rank * (i in drawn) for i, name in enumerate(self.names)}


def matrices_to_keep(settings, n):
    """WeightLoRA's K, by default half of the n matrices (section 2); raises UserError if there are not so many."""
    keep = settings.weightlora_keep or max(1, n // 2)
    if not 1 <= keep <= n:
        raise UserError(f"--weightlora-keep {keep}: there are {n} target matrices; choose 1 to {n} (0 = half)")
    return keep


# ---------------------------------------------------------------------------------------------- LeLoRA

WINDOWS = ("first", "middle", "last")  # locations: the largest singular components, those from m/2 on, the smallest


class LeLora(Allocator):
    """LeLoRA (Zhou et al. 2026, section 3): a policy network samples which singular components of W each step trains.

    An adapter holds three windows of r_max components of W = U S V^T as A = sqrt(S) V^T and B = U sqrt(S), and the
    frozen weight is W without them: scale 1, no dropout, which would drop parts of W. An action is a dimension r and a
    location per matrix: r components of that window may move, all others stand still. `lelora_ablate` "rank" learns the
    dimension alone, in the first window; "location" the window alone, at r_max (section 4.2.4, Fig. 5a).
    """

    refuses = ("init", "dora", "lora_plus_ratio", "freeze_a")  # A and B are W's own components, alike and all trained
    dynamic, held_out = True, 32
    saved = ("choice", "features", "entropy", "lowest", "reward", "mean", "before")

    def capacities(self):
        self.dims, self.locations = candidates(self.settings)
        R = self.dims[-1]
        for name in self.names:
            m = min(self.model.get_submodule(name).weight.shape)
            if m // 2 + R > m - R:
                raise UserError(f"--lelora-dims (or --rank) {R}: the three windows of {name} overlap, as it has "
                                     f"{m} singular components; use at most {(m - m // 2) // 2}")
        return {name: 3 * R for name in self.names}

    def setup(self):
        s, n, R = self.settings, len(self.names), self.dims[-1]
        widest = max(min(layer.weight.shape) for layer in self.layers.values())
        self.spectra = torch.zeros(n, widest, device=self.device)
        self.where = torch.zeros(n, 3 * R, dtype=torch.long, device=self.device)  # the windows' columns in `spectra`
        self.active = torch.zeros(n, 3 * R, device=self.device)
        for i, layer in enumerate(self.layers.values()):
            W = layer.weight.data.to(self.device)  # it may wait on the CPU to be sharded
            S, A, B = singular_windows(W, R)
            layer.scale = 1.0
            layer.split_off(A, B)  # Eq. 1
            layer.mask_updates(self.active[i])
            self.spectra[i, :len(S)], self.where[i] = S, window_indices(len(S), R)
        self.masks = torch.zeros(len(self.dims), len(self.locations), 3 * R, device=self.device)
        for i, r in enumerate(self.dims):
            for j, location in enumerate(self.locations):
                start = {"first": 0, "middle": R, "last": 3 * R - r}[location]
                self.masks[i, j, start:start + r] = 1
        self.dimension = torch.tensor(self.dims, dtype=torch.float64, device=self.device)
        place = [(block, lora.TARGETS.index(kind)) for _, block, kind in self.sites]
        self.place = torch.tensor(place, device=self.device)  # (n, 2)
        self.policy = Policy(self.blocks, 1 + widest, len(self.dims), len(self.locations), s.seed).to(self.device)
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[s.lelora_policy_optimizer]
        self.optimizer = optimizer(self.policy.parameters(), lr=s.lelora_policy_lr)
        self.generator = torch.Generator(self.device).manual_seed(s.seed)
        self.reward, self.mean, self.before = (torch.zeros((), device=self.device) for _ in range(3))
        self.heads = [(i, head) for i, head in enumerate(("rank", "location")) if self.masks.shape[i] > 1]  # that learn
        self.lowest = torch.ones(2, device=self.device)
        self.act(0)

    def characteristics(self):
        """What the policy sees of each matrix, (n, 1 + widest m): Frobenius norm and singular values (section 3.2).

        A component in a window shows its current strength |B_k| |A_k|: at the start that is its singular value.
        """
        strength = squared_norms([(layer.A.data, layer.B.data) for layer in self.layers.values()]).prod(0).sqrt()
        spectra = self.spectra.scatter(1, self.where, strength.float())
        numbers = torch.cat([spectra.square().sum(1, keepdim=True).sqrt(), spectra], 1)
        if self.settings.lelora_inputs == "standardised":
            numbers = (numbers - numbers.mean(0)) / (numbers.std(0, correction=0) + 1e-6)
        return numbers

    def act(self, step):
        """Sample every matrix's action from p(a | xi; Omega), for the steps after `step`."""
        self.features = self.characteristics()
        self.log_p = self.policy(self.place, self.features)  # kept with its graph for the reward
        heads = [log_p.detach().exp() for log_p in self.log_p]  # (n, dims), (n, locations)
        self.entropy = torch.stack([torch.special.entr(p).sum(1).mean() / math.log(max(2, p.shape[1])) for p in heads])
        if step <= self.steps / 10:
            self.lowest = torch.minimum(self.lowest, self.entropy)
        draws = [p / torch.empty_like(p).exponential_(generator=self.generator) for p in heads]
        self.choice = torch.stack([draw.argmax(1) for draw in draws], 1)  # (n, 2); torch.multinomial would synchronise
        self.activate()

    def activate(self):
        """Let the components of `choice` move, and only those."""
        self.active.copy_(self.masks[self.choice[:, 0], self.choice[:, 1]])
        self.current = self.dimension[self.choice[:, 0]]

    def after_backward(self, step):
        for p in self.parameters():  # clipping the gradient's norm shall not count what does not move
            p.grad.mul_(p.active)

    def after_step(self, step):
        if step % self.settings.lelora_every:
            return False
        after, first = self.validation_loss().float(), self.allocations == 0
        change = 0 if first else after - self.before  # the last action's "after" is this one's "before"
        reward = after + self.settings.lelora_reward_alpha * change  # Eqs. 2-4, to be minimised
        self.reward = torch.where(reward.isfinite() & self.ok, reward, self.mean)  # else no lesson
        self.mean = self.reward if first else self.mean
        log_p = sum(head.gather(1, choice[:, None]) for head, choice in zip(self.log_p, self.choice.T))  # (n, 1)
        ((self.reward - self.mean) * log_p.mean()).backward()  # Eq. 9
        self.optimizer.step()  # Eq. 10
        self.optimizer.zero_grad()
        self.before = torch.where(after.isfinite(), after, self.before)
        self.mean = self.mean.lerp(self.reward, 0.1)  # running mean of some 10 rewards
        self.allocations += 1
        self.act(step)
        return False

    def log(self):
        windows = [WINDOWS.index(self.locations[i]) for i in self.choice[:, 1].tolist()]
        entropies = {f"entropy_{head}": self.entropy[i] for i, head in self.heads}  # 1 = uniform
        return {"reward": self.reward, **entropies, "location": dict(zip(self.names, windows))}

    def warning(self):
        fallen = [head for i, head in self.heads if self.lowest[i] < 0.01]
        if fallen:
            return (f"LeLoRA's policy collapsed: the entropy of {' and '.join(fallen)} fell below 1 % of its maximum "
                    "before a tenth of training, so matrices stay as they happened to be; lower --lelora-policy-lr")

    def state_dict(self):
        moments = {f"moments.{i}.{key}": value for i, p in enumerate(self.policy.parameters())
                   for key, value in self.optimizer.state[p].items()}
        network = {f"policy.{key}": value for key, value in self.policy.state_dict().items()}
        return super().state_dict() | network | moments | {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
        self.policy.load_state_dict({key: state[f"policy.{key}"] for key in self.policy.state_dict()})
        for i, p in enumerate(self.policy.parameters()):
            self.optimizer.state[p] = {key: state[f"moments.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                                       if f"moments.{i}.{key}" in state}
        self.log_p = self.policy(self.place, self.features)
        self.activate()


class Policy(nn.Module):
    """LeLoRA's policy network: (block, kind) and numbers of n matrices -> log-probabilities of dimension and location.

    Two embeddings of 200, hidden layers of 1024, 256 and 64, all Kaiming-uniform from `seed` (Appendix B).
    """

    def __init__(self, blocks, numbers, dims, locations, seed):
        super().__init__()
        self.block, self.kind = nn.Embedding(blocks, 200), nn.Embedding(len(lora.TARGETS), 200)
        self.hidden = nn.ModuleList([nn.Linear(400 + numbers, 1024), nn.Linear(1024, 256), nn.Linear(256, 64)])
        self.heads = nn.ModuleList([nn.Linear(64, dims), nn.Linear(64, locations)])
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, nonlinearity="relu", generator=generator) if p.dim() > 1 else nn.init.zeros_(p)

    def forward(self, place, numbers):  # (n, 2), (n, F) -> (n, dims), (n, locations)
        h = torch.cat([self.block(place[:, 0]), self.kind(place[:, 1]), numbers], 1)
        for layer in self.hidden:
            h = layer(h).relu()
        return [head(h).log_softmax(1) for head in self.heads]


def candidates(s):
    """Candidate dimensions, ascending, and locations (section 3.1); unset dimensions are 0, powers of 2 and `rank`."""
    try:
        dims = sorted({int(r) for r in s.lelora_dims or [0, s.rank, *(2 ** k for k in range(1, s.rank.bit_length()))]})
    except ValueError:
        dims = []
    if not dims or dims[0] < 0 or dims[-1] == 0:
        raise UserError(f"--lelora-dims {s.lelora_dims}: expected numbers from 0 up, one above 0, such as 0,2,4,8")
    named = s.lelora_locations or WINDOWS
    if set(named) - set(WINDOWS):
        raise UserError(f"--lelora-locations {','.join(named)}: choose from {','.join(WINDOWS)}")
    locations = [w for w in WINDOWS if w in named]
    return dims[-1:] if s.lelora_ablate == "location" else dims, ["first"] if s.lelora_ablate == "rank" else locations


def window_indices(m, R):
    """Indices of the first, the middle and the last R of m singular components, (3 R,); large windows overlap."""
    return torch.cat([torch.arange(R) + start for start in (0, min(m // 2, m - R), m - R)])


def singular_windows(weight, R):
    """S (m,), A = sqrt(S) V^T (3 R, in) and B = U sqrt(S) (out, 3 R) of W = U S V^T in the three windows, float32.

    Kept on disk by W's content, in $RANKS_CACHE or ~/.cache/adaptive-lora, and read from there the next time.
    """
    key = hashlib.sha256(weight.contiguous().cpu().view(torch.uint8).numpy())
    key.update(f"{tuple(weight.shape)} {weight.dtype} {R}".encode())
    folder = cache_folder() / "svd"
    file = folder / f"{key.hexdigest()}.safetensors"
    try:
        stored = load_file(file, device=str(weight.device))
    except (FileNotFoundError, SafetensorError):  # not there, or damaged
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        at = window_indices(len(S), R).to(S.device)
        A, B = S[at].sqrt()[:, None] * Vh[at], U[:, at] * S[at].sqrt()
        stored = {"S": S, "A": A, "B": B.contiguous()}
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{file.stem}.{os.getpid()}.part"
        save_file(stored, beside)
        beside.rename(file)
    return stored["S"], stored["A"], stored["B"]


METHODS = {
    "lora": Allocator,
    "linear-decay": Static,
    "attention-heavy": Static,
    "empirical": Static,
    "lalora": LaLora,
    "adalora": AdaLora,
    "weightlora": WeightLora,
    "weightlora+": WeightLora,
    "random": RandomLora,
    "lelora": LeLora,
    "full": Direct,
    "bitfit": Direct,
}
