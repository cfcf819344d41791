"""credit against a float64 NumPy transcription: gradients of the gates, the dealing, and what is left afterwards."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ALL, Tiny, batches, settings, train, training_of

import allocators
import lora


def deal(credit, cost, cap, budget, power, floor):
    """The docstring of Credit in plain loops."""
    share, units = [max(c, 0) ** power / k for c, k in zip(credit, cost)], [floor] * len(credit)
    budget -= floor * sum(cost)
    while True:
        worth = [(s / (u + 1), -u) if u < most and k <= budget else (-1, 0)
                 for s, u, most, k in zip(share, units, cap, cost)]
        best = worth.index(max(worth))
        if worth[best] == (-1, 0):
            return units
        units[best], budget = units[best] + 1, budget - cost[best]


@pytest.mark.parametrize("changes", [
    dict(targets=ALL, credit_power=0.0, freeze_a=True), dict(rank=1, targets=ALL), dict(init="pissa", weight_decay=0.1),
    dict(targets=ALL, credit_budget="ranks"), dict(credit_share=1e-3), dict(targets=["up", "down"], credit_cap=1.5),
    dict(rank=4, credit_floor=0.6, credit_share=0.9),
    dict(credit_steps=0), dict(targets=ALL, credit_power=1.0), dict(targets=["value", "up"], dora=True)], ids=str)
def test_credit_and_ranks_are_the_formulas(changes):
    torch.manual_seed(0)
    s = settings(**{"method": "credit", "rank": 2, "credit_steps": 4, "credit_examples": 50, **changes})
    allocator, steps = allocators.Credit(Tiny(), s, 40), s.credit_steps or 10
    assert [allocator.examples(step) for step in (1, steps, steps + 1)] == [50, 50, 0]
    names, training = list(allocator.layers), training_of(allocator)
    costs = [layer.out_features + layer.in_features * (not s.freeze_a) for layer in allocator.layers.values()]
    cap = [min(*layer.weight.shape, int(s.credit_cap * s.rank)) for layer in allocator.layers.values()]
    credit = np.zeros(len(names))
    for step, (x, labels) in enumerate(batches(steps), start=1):
        merged, updates = Tiny().double(), {}
        for name, layer in allocator.layers.items():  # d loss / d g = <d loss / d W', dW' / dg> at W' = W + g s B A
            A, B, W = layer.A.detach().double(), layer.B.detach().double(), merged.get_submodule(name).weight
            updates[name] = layer.scale * B @ A
            W.data += updates[name]
            if s.dora:  # the lengths that are divided by are constants
                factor = (layer.magnitude.detach() / W.norm(dim=1))[:, None]
                W.data, updates[name] = factor * W, factor * updates[name]
            W.requires_grad_(True)
        F.cross_entropy(merged(x.double()), labels).backward()
        credit -= [(merged.get_submodule(name).weight.grad * updates[name]).sum().item() for name in names]
        train(training, [(x, labels)], first=step)
        np.testing.assert_allclose(allocator.credit, credit, rtol=1e-4, atol=1e-5 * abs(credit).max())
        assert (allocator.allocations == 1) == (step == steps) and (step == 1) == (not credit.any())
    costs = costs if s.credit_budget == "parameters" else [1] * len(names)
    rank = s.credit_share * s.rank
    budget = max(rank * sum(costs), min(costs))
    expected = deal(allocator.credit.tolist(), costs, cap, budget, s.credit_power, int(s.credit_floor * rank))
    assert list(allocator.ranks().values()) == expected
    spent = sum(k * units for k, units in zip(costs, expected))
    assert budget - min(costs) < spent <= budget and max(expected) <= s.credit_cap * s.rank
    assert set(lora.adapters(allocator.model)) == {name for name, units in zip(names, expected) if units}
    for name, layer in allocator.layers.items():  # plain LoRA, fresh, at one scale
        assert layer.g is None and layer.scale == s.alpha / s.rank and (layer.start is not None or not layer.B.any())
    train(training, batches(4, seed=1), first=steps + 1)
    allocator.check_ranks()
    assert all(layer.B.any() for layer in allocator.layers.values()) and not allocator.own
    assert len(set(expected)) > 1 or not s.credit_power
