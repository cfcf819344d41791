"""AdaLoRA against PEFT's AdaLoraModel over whole schedules, and what DESIGN promises beyond it."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import allocators
import lora
from tiny import Tiny, batches, optimizer_for, settings, train
from model import UserError


def flags(**changes):
    ours = dict(method="adalora", adalora_init_ratio=1.5, adalora_t_init=0, adalora_t_final=0, adalora_delta_t=10,
                adalora_beta1=0.85, adalora_beta2=0.85, adalora_orth=0.5, weight_decay=0.01)
    return settings(**{**ours, **changes})


class WithLoss(nn.Module):
    """What PEFT's AdaLoraModel wants to wrap: a module whose output has a `loss`."""

    config = {"model_type": "custom"}

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        loss = F.cross_entropy(self.model(x), labels)
        return SimpleNamespace(loss=loss, plain=loss.detach().clone())


def peft_model(model, s, steps, t_init, t_final):
    """PEFT's AdaLoraModel on `model`, with the settings that make it the same network as ours."""
    peft = pytest.importorskip("peft")
    capacity = round(s.adalora_init_ratio * s.rank)
    alpha = s.alpha / s.rank * (capacity + 1e-5)  # PEFT divides alpha by the capacity, DESIGN by the nominal rank
    config = peft.AdaLoraConfig(target_r=s.rank, init_r=capacity, tinit=t_init, tfinal=t_final,
                                deltaT=s.adalora_delta_t, beta1=s.adalora_beta1, beta2=s.adalora_beta2,
                                orth_reg_weight=s.adalora_orth, total_step=steps, lora_alpha=alpha,
                                target_modules=s.targets)
    return peft.AdaLoraModel(WithLoss(model), {"default": config}, "default")


def pefts_scores(ranking, name):
    """Triplet scores (R,) of matrix `name`, put together by PEFT's own _element_score and _combine_ipt."""
    keys = (next(key for key in ranking.exp_avg_ipt if f".{name}.lora_{part}." in key) for part in "EAB")
    of_lambda, of_q, of_p = map(ranking._element_score, keys)
    return ranking._combine_ipt(of_lambda, torch.stack([of_q.mean(1), of_p.mean(0)], 1))


CASES = [  # seed, blocks, targets, steps, flags
    (0, 3, ["query", "value"], 60, dict()),
    (1, 2, ["query", "key", "value", "up", "down"], 50, dict(adalora_delta_t=1, adalora_t_init=5, adalora_t_final=15)),
    (2, 5, ["up", "out"], 80, dict(rank=2, adalora_delta_t=7, adalora_t_init=3, adalora_t_final=20, adalora_orth=0.1)),
    (3, 1, ["query", "down"], 40, dict(rank=3, adalora_init_ratio=3.0, adalora_t_init=1, adalora_t_final=1,
                                       adalora_beta1=0.6, adalora_beta2=0.9, adalora_delta_t=4, alpha=32.0)),
]


@pytest.mark.parametrize("seed,blocks,targets,steps,changes", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_run_is_pefts(seed, blocks, targets, steps, changes, dtype):
    """Same start, batches and AdamW: same losses, penalties, scores, and the same triplets kept at every allocation."""
    s = flags(targets=targets, **changes)
    torch.manual_seed(seed)
    ours = Tiny(blocks=blocks, seed=seed)
    base = copy.deepcopy(ours)
    allocator = allocators.METHODS["adalora"](ours, s, steps)
    theirs = peft_model(base.to(dtype), s, steps, allocator.t_init, steps - allocator.end)
    ours.to(dtype)
    allocator.smooth, allocator.unsure = ([t.to(dtype) for t in ts] for ts in (allocator.smooth, allocator.unsure))
    pairs = {name: theirs.model.model.get_submodule(name) for name in allocator.names}
    for name, layer in pairs.items():
        mine = allocator.layers[name]
        for a, b in ((layer.lora_A, mine.A), (layer.lora_B, mine.B)):
            a["default"].data.copy_(b.data)
        assert not layer.lora_E["default"].any() and not mine.gate.any()
    trained = [p for name, p in theirs.named_parameters() if "lora_" in name]
    assert all(p.requires_grad for p in trained)
    other = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
    optimizer = optimizer_for(allocator, s)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-12)
    ranking, allocations, pruned = theirs.rankallocator, 0, 0

    for step, (x, labels) in enumerate(batches(steps, seed=seed, dtype=dtype), start=1):
        out = theirs(x, labels)
        out.loss.backward()
        other.step()
        before = theirs.peft_config["default"].rank_pattern
        theirs.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        other.zero_grad()

        loss, penalty = F.cross_entropy(ours(x), labels), allocator.penalty()
        (loss + penalty).backward()
        optimizer.step()
        allocator.after_step(step)
        optimizer.zero_grad()

        torch.testing.assert_close(loss, out.plain, **tolerance)
        torch.testing.assert_close(penalty, out.loss - out.plain, **tolerance)
        if pattern is not before:
            allocations += 1
            kept = {name: next(v for k, v in pattern.items() if f".{name}." in k) for name in allocator.names}
            assert kept == {name: row.tolist() for name, row in zip(allocator.names, allocator.kept)}, step
            assert allocator.ranks() == {name: sum(row) for name, row in kept.items()}
        if step < allocator.end:
            expected = torch.stack([pefts_scores(ranking, name) for name in allocator.names])
            error = (allocator.scores() - expected).abs() / expected.max()
            assert error.max() < (1e-9 if dtype == torch.float64 else 1e-5), step
        for name, layer in pairs.items():
            zero = layer.lora_E["default"].view(-1) == 0
            assert torch.equal(allocator.layers[name].gate == 0, zero), (step, name)
            pruned += int(zero.sum())
    assert allocations == allocator.allocations >= 2 and pruned > 0
    assert allocator.current.sum() == s.rank * len(allocator.names)
    for name, layer in pairs.items():
        mine = allocator.layers[name]
        torch.testing.assert_close(mine.delta().to(dtype), layer.get_delta_weight("default"), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("steps,rank,ratio,t_init,t_final",
                         [(100, 4, 1.5, 10, 30), (37, 3, 2.0, 0, 0), (500, 2, 1.5, 50, 1)])
def test_budget_falls_as_pefts_does(steps, rank, ratio, t_init, t_final):
    s = flags(rank=rank, adalora_init_ratio=ratio, adalora_t_init=t_init, adalora_t_final=t_final)
    allocator = allocators.METHODS["adalora"](Tiny(), s, steps)
    theirs = peft_model(Tiny(), s, steps, allocator.t_init, steps - allocator.end).rankallocator
    assert theirs.init_bgt == allocator.kept.numel() == len(allocator.names) * round(ratio * rank)
    for step in range(allocator.t_init + 1, steps + 1):
        assert allocator.triplets(step) == theirs.budget_schedule(step)[0], step
    assert allocator.triplets(allocator.end) == rank * len(allocator.names)


def run(s, steps, seed=0, **options):
    torch.manual_seed(seed)
    model = Tiny(seed=seed)
    allocator = allocators.METHODS["adalora"](model, s, steps)
    return model, allocator, lambda data, **more: train(model, allocator, s, data, **{**options, **more})


def test_start_is_the_pretrained_model_and_every_part_is_trained():
    x = torch.randn(5, 12)
    model, allocator, _ = run(flags(targets=["query", "up"]), 50)
    assert torch.equal(model(x), Tiny()(x))
    layer = allocator.layers["blocks.0.up"]
    assert layer.rank == 6 and layer.scale == 8 / 4 and 0.01 < layer.A.std() < 0.03 and 0.01 < layer.B.std() < 0.03
    assert {id(p) for p in allocator.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in allocator.parameters()) == 3 * (6 * (12 + 12 + 1) + 6 * (12 + 20 + 1))


def test_a_pruned_triplet_can_return_until_the_last_allocation_and_not_after():
    s = flags(adalora_delta_t=2, adalora_t_init=2, adalora_t_final=20, lr=3e-2)
    model, allocator, go = run(s, 60)
    history = []
    go(batches(60), watch=lambda step, loss: history.append(
        (allocator.kept.bool(), torch.stack([layer.gate.detach() for layer in allocator.layers.values()]) == 0)))
    returned = [(later & ~earlier).any() for (earlier, _), (later, _) in zip(history, history[1:])]
    assert any(returned[:39]) and not any(returned[39:])
    assert all(torch.equal(zero, ~kept) for kept, zero in history[39:])
    between = [step for step in range(2, 39) if step % 2 == 0]  # history[step] is step + 1: no allocation, lambda moves
    assert any((~history[step][0] & ~history[step][1]).any() for step in between)
    A, B = allocator.layers["blocks.0.query"].factors()
    assert len(A) == B.shape[1] == allocator.ranks()["blocks.0.query"]


def test_gate_changes_in_place():
    """The parameters that the optimizer and a compiled graph hold are the same tensors from start to end."""
    _, allocator, go = run(flags(), 40)
    before = [(p, p.data_ptr()) for p in allocator.parameters()]
    go(batches(40))
    assert allocator.allocations > 1
    for (p, address), now in zip(before, allocator.parameters()):
        assert p is now and p.data_ptr() == address


def test_an_allocation_that_a_skipped_step_missed_is_made_up_for():
    """train.py skips a step whose loss is not finite; if that was the last allocation's, the next step makes it."""
    _, allocator, go = run(flags(adalora_t_final=10), 40)
    optimizer = go(batches(29))
    go(batches(10, seed=1), first=31, optimizer=optimizer)
    assert allocator.end == 30 and allocator.last == 31
    assert allocator.current.sum() == 4 * len(allocator.names)


@pytest.mark.parametrize("stop", [3, 17, 24, 33])
def test_resumed_run_is_the_same_to_the_bit(stop):
    steps, s = 40, flags(adalora_delta_t=3, adalora_t_init=5, adalora_t_final=12)
    data = list(batches(steps))
    model, allocator, go = run(s, steps)
    go(data)
    half, first, go = run(s, steps)
    optimizer = go(data[:stop])
    saved = copy.deepcopy((first.state_dict(), half.state_dict(), optimizer.state_dict()))
    assert all(isinstance(value, torch.Tensor) for value in saved[0].values())

    again, second, go = run(s, steps, seed=0)
    torch.manual_seed(99)
    second.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    optimizer = optimizer_for(second, s)
    optimizer.load_state_dict(saved[2])
    go(data[stop:], first=stop + 1, optimizer=optimizer)
    assert second.allocations == allocator.allocations and second.ranks() == allocator.ranks()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(allocator.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("steps,changes", [(100, dict(adalora_t_init=50, adalora_t_final=50)), (1, {}),
                                           (20, dict(adalora_t_final=25)), (30, dict(adalora_t_init=-1)),
                                           (30, dict(adalora_init_ratio=0.5)), (30, dict(adalora_delta_t=0))])
def test_a_schedule_without_room_is_refused(steps, changes):
    with pytest.raises(UserError, match="--adalora") as caught:
        allocators.METHODS["adalora"](Tiny(), flags(**changes), steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_very_short_runs_still_allocate(steps):
    _, allocator, go = run(flags(), steps)
    go(batches(steps))
    assert allocator.allocations == 1 and allocator.current.sum() == 4 * len(allocator.names)


def test_no_triplets_to_prune_keeps_all():
    _, allocator, go = run(flags(adalora_init_ratio=1.0), 30)
    go(batches(30))
    assert allocator.allocations and set(allocator.ranks().values()) == {4}
