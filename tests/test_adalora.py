"""AdaLoRA against PEFT's AdaLoraModel over whole schedules, and what DESIGN promises beyond it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import Tiny, batches, settings, train, training_of

import lora
from allocators import AdaLora


class WithLoss(nn.Module):
    """What PEFT's AdaLoraModel wants to wrap: a module whose output has a `loss`."""

    config = {"model_type": "custom"}

    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x, labels):
        loss = F.cross_entropy(self.model(x), labels)
        return SimpleNamespace(loss=loss, plain=loss.detach().clone())


def peft_model(model, allocator):
    """PEFT's AdaLoraModel on `model`, with the settings that make it the same network as the policy's."""
    peft, s, steps = pytest.importorskip("peft"), allocator.settings, allocator.steps
    capacity = round(s.adalora_init_ratio * s.rank)
    alpha = s.alpha * (1 + 1e-5 / capacity)  # PEFT divides alpha by the capacity + 1e-5
    config = peft.AdaLoraConfig(
        target_r=s.rank, init_r=capacity, tinit=allocator.t_init, tfinal=steps - allocator.end, total_step=steps,
        deltaT=s.adalora_delta_t, beta1=s.adalora_beta1, beta2=s.adalora_beta2, orth_reg_weight=s.adalora_orth,
        lora_alpha=alpha, target_modules=s.targets)
    return peft.AdaLoraModel(WithLoss(model), {"default": config}, "default")


CASES = [  # seed, blocks, targets, steps, flags
    (0, 3, ["query", "value"], 60, dict()),
    (1, 2, ["query", "key", "value", "up", "down"], 50, dict(adalora_delta_t=1, adalora_t_init=5, adalora_t_final=15)),
    (2, 5, ["up", "out"], 80, dict(rank=2, adalora_delta_t=7, adalora_t_init=3, adalora_t_final=20, adalora_orth=0.1)),
    (3, 1, ["query", "down"], 40, dict(rank=3, adalora_init_ratio=3.0, adalora_t_init=1, adalora_t_final=1,
                                       adalora_beta1=0.6, adalora_beta2=0.9, adalora_delta_t=4, alpha=32.0)),
    (4, 2, ["query"], 37, dict(rank=3, adalora_init_ratio=2.0, adalora_t_init=0, adalora_t_final=0))]


def converted(allocator, dtype):
    """Turn the policy, its model and the stacks, of which the model holds views, to `dtype`."""
    allocator.model.to(dtype)
    for stack in allocator.parameters():
        stack.data = stack.data.to(dtype)
        for part, view in zip(stack.parts, stack.data):
            part.data = view
    allocator.sensitivity, allocator.uncertainty = (
        [t.to(dtype) for t in ts] for ts in (allocator.sensitivity, allocator.uncertainty))


@pytest.mark.parametrize("seed,blocks,targets,steps,changes", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_run_is_pefts(seed, blocks, targets, steps, changes, dtype):
    """Same start, batches and AdamW: same losses, penalties, and the same triplets kept at every allocation."""
    s = settings(method="adalora", weight_decay=0.01, targets=targets, **changes)
    torch.manual_seed(seed)
    allocator = AdaLora(Tiny(blocks=blocks, seed=seed), s, steps)
    theirs = peft_model(Tiny(blocks=blocks, seed=seed).to(dtype), allocator)
    converted(allocator, dtype)
    pairs = [(name, layer, theirs.model.model.get_submodule(name)) for name, layer in allocator.layers.items()]
    for name, mine, layer in pairs:
        for a, b in ((layer.lora_A, mine.A), (layer.lora_B, mine.B)):
            assert a["default"].shape == b.shape and 0.01 < b.std() < 0.03
            a["default"].data.copy_(b.data)
        assert not layer.lora_E["default"].any() and not mine.g.any()
    trained = [p for name, p in theirs.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in allocator.parameters())
    other = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
    training = training_of(allocator)
    (optimizer,) = training.optimizers
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-12)
    ranking, allocations, pruned, returned = theirs.rankallocator, 0, 0, 0

    for step, (x, labels) in enumerate(batches(steps, seed=seed, dtype=dtype), start=1):
        out = theirs(x, labels)
        out.loss.backward()
        other.step()
        before = theirs.peft_config["default"].rank_pattern
        theirs.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        other.zero_grad()
        # as Training.step, which takes the loss in float32
        loss, penalty = F.cross_entropy(allocator.model(x), labels), allocator.penalty({"x": x}, labels, None)
        (loss + penalty).backward()
        lora.gather_gradients(training.params)
        optimizer.step()
        last = allocator.kept.clone()
        allocator.after_step(step)
        returned += int((allocator.kept > last).sum())
        optimizer.zero_grad()
        torch.testing.assert_close(loss, out.plain, **tolerance)
        torch.testing.assert_close(penalty, out.loss - out.plain, **tolerance)
        if step > allocator.t_init:
            assert allocator.triplets(step) == ranking.budget_schedule(step)[0]
        if pattern is not before:
            allocations += 1
            kept = {name: next(v for k, v in pattern.items() if f".{name}." in k) for name in allocator.names}
            assert kept == {name: row.tolist() for name, row in zip(allocator.names, allocator.kept)}, step
            assert allocator.ranks() == {name: sum(row) for name, row in kept.items()}
        for name, mine, layer in pairs:
            zero = layer.lora_E["default"].view(-1) == 0
            assert torch.equal(mine.g == 0, zero), (step, name)
            pruned += int(zero.sum())
    assert allocations == allocator.allocations >= 2 and pruned > 0 and (returned > 0 or seed == 3)
    assert allocator.current.sum() == s.rank * len(allocator.names)
    for name, mine, layer in pairs:
        torch.testing.assert_close(mine.delta().to(dtype), layer.get_delta_weight("default"), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("steps, changes", [(2, {}), (3, {}), (4, {}), (7, {}), (30, dict(adalora_init_ratio=1.0))])
def test_very_short_runs_and_those_without_pruning_allocate(steps, changes):
    allocator = AdaLora(Tiny(), settings(method="adalora", **changes), steps)
    train(training_of(allocator), batches(steps))
    assert allocator.allocations == 1 or changes and allocator.allocations and {*allocator.ranks().values()} == {4}
    assert allocator.current.sum() == 4 * len(allocator.names)
