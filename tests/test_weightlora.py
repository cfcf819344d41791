"""WeightLoRA(+) and its random control: omega against StoIHT in NumPy, and what is left of the model afterwards."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import Tiny, batches, settings, train, training_of

import allocators
import lora

ALL = ["query", "key", "value", "out", "up", "down"]


def build(method="weightlora", steps=60, blocks=3, seed=0, **changes):
    s = settings(**{"method": method, "weight_decay": 0.01, "seed": seed, **changes})
    torch.manual_seed(seed)
    return allocators.METHODS[method](Tiny(blocks=blocks, seed=seed), s, steps)


def take(allocator, step, gradient):
    """A step in which omega has this gradient and A and B stand still; returns what after_step does."""
    allocator.own[0].grad = torch.tensor(np.array(gradient, np.float32))[:, None]
    return allocator.after_step(step)


SCORES = {"value": lambda w: w, "magnitude": abs, "moved": lambda w: abs(w - 1)}


def hard_threshold(omega, keep, by="value"):
    """H_K of Appendix B in plain Python, towards 1 for "moved"; those tied with the K-th largest stay (DESIGN 4.4)."""
    kth = sorted((SCORES[by](w) for w in omega), reverse=True)[keep - 1]
    return np.array([w if SCORES[by](w) >= kth else float(by == "moved") for w in omega])


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("threshold", ["every", "end"])
@pytest.mark.parametrize("n_kinds,keep,warmup,lr", [(2, 0, 12, 5.0), (6, 4, 20, 0.3), (3, 1, 7, 50.0), (1, 3, 5, 5.0)])
def test_omega_follows_stoiht_under_random_gradients(threshold, n_kinds, keep, warmup, lr, by):
    allocator = build(targets=ALL[:n_kinds], weightlora_keep=keep, weightlora_steps=warmup, weightlora_lr=lr,
                      weightlora_threshold=threshold, weightlora_rank_by=by)
    n = 3 * n_kinds
    K = keep or n // 2
    omega, random, returned = np.ones(n), np.random.default_rng(n), False
    for step in range(1, warmup + 1):
        g = random.normal(0, 0.1, n).astype(np.float32) * (step > 1)
        allocator.rate = 1 - step / 40  # the schedule's, as in the authors' code
        assert take(allocator, step, g) is (step == warmup)
        zero, omega = omega == float(by == "moved"), omega - lr * (1 - step / 40) * g.astype(np.float64)
        if threshold == "every" or step == warmup:
            omega = hard_threshold(omega, K, by)
        returned |= bool((omega[zero] != float(by == "moved")).any()) and step > 2
        np.testing.assert_array_equal(allocator.omega.numpy(), omega)
        assert allocator.log()["omega"] == dict(zip(allocator.names, omega.tolist()))
        if step < warmup:
            for layer, w in zip(allocator.layers.values(), omega):
                assert layer.g.item() == np.float32(w)
    best = sorted(range(n), key=lambda i: -SCORES[by](omega[i]))[:K]
    kept = {allocator.names[i] for i in best}
    assert set(lora.adapters(allocator.model)) == set(allocator.layers) == kept
    near = lr >= 5 or by == "moved"  # a zeroed omega goes on receiving gradients
    assert returned == (threshold == "every" and K < n and near)


def test_ties_stay_in_the_warm_up_and_go_to_the_first_at_the_end():
    allocator = build(weightlora_steps=2, weightlora_keep=3, weightlora_threshold="end", weightlora_lr=4.0)
    take(allocator, 1, [0.0] * 6)
    take(allocator, 2, [0.125, 0.0, 0.125, 0.375, 0.0, 0.125])  # to -0.5 the fourth
    assert allocator.omega.tolist() == [0.5, 1, 0.5, 0, 1, 0.5]  # three are tied with the third
    assert list(allocator.layers) == [allocator.names[i] for i in (0, 1, 4)]


@pytest.mark.parametrize("method, rank", [("weightlora", 4), ("weightlora+", 8)])
@pytest.mark.parametrize("targets, keep",
                         [(["query", "value"], 0), (ALL, 1), (ALL, 18), (["up", "down", "key"], 5), (["out"], 0)])
def test_after_the_warm_up_nothing_is_left_of_the_others(method, rank, targets, keep):
    allocator = build(method, targets=targets, weightlora_keep=keep, weightlora_steps=6)
    model, plain, names = allocator.model, Tiny(), allocator.names
    weights = {name: model.get_submodule(name).weight for name in names}
    assert allocator.ranks() == dict.fromkeys(names, 4) and allocator.dynamic
    training = train(training_of(allocator), batches(10))
    survivors = set(allocator.layers)
    assert survivors == set(lora.adapters(model)) and len(survivors) == (keep or len(names) // 2)
    assert allocator.ranks() == {name: rank * (name in survivors) for name in names}
    assert allocator.log()["selected"] == {name: int(name in survivors) for name in names}
    for name in names:
        module = model.get_submodule(name)
        assert module.weight is weights[name] and torch.equal(module.weight, plain.get_submodule(name).weight)
        if name in survivors:
            assert module.rank == rank and module.scale == 8 / 4 and module.g is None
        else:
            assert type(module) is nn.Linear and not module._forward_pre_hooks
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(rank * sum(weights[name].shape) for name in survivors)
    assert sum(p.numel() for p in trained) == allocator.budget().item() == size
    (optimizer,) = training.optimizers
    assert {id(p) for p in trained} == {id(q) for p in optimizer.param_groups[0]["params"] for q in p.parts}
    assert set(optimizer.param_groups[0]["params"]) == set(optimizer.state) and allocator.allocations == 1


@pytest.mark.parametrize("method", ["weightlora", "weightlora+"])
def test_survivors_train_exactly_as_standard_lora_from_a_fresh_start(method):
    allocator = build(method, targets=["query", "value", "up"], weightlora_steps=5, dropout=0.1)
    s, data = allocator.settings, list(batches(30))
    allocator.model.train()
    training = train(training_of(allocator), data[:5])
    assert all(not layer.B.any() and layer.A.any() and layer.training for layer in allocator.layers.values())
    assert not training.optimizers[0].state and allocator.model.training

    standard = Tiny()
    rank = 8 if method == "weightlora+" else 4
    layers = lora.attach(standard, {name: rank for name in allocator.layers}, s.alpha, s.dropout, nominal=4)
    for name, layer in layers.items():
        layer.A.data.copy_(allocator.layers[name].A)
    standard.train()
    params = [p for layer in layers.values() for p in (layer.A, layer.B)]
    other = torch.optim.AdamW(params, lr=s.lr, weight_decay=0.01, fused=True)
    state = torch.get_rng_state()
    train(training, data[5:], first=6)
    torch.set_rng_state(state)
    for x, labels in data[5:]:
        (F.cross_entropy(standard(x), labels, reduction="sum") * (1 / len(labels))).backward()
        other.step()
        other.zero_grad()
    for name, layer in layers.items():
        assert torch.equal(layer.A, allocator.layers[name].A) and torch.equal(layer.B, allocator.layers[name].B)
        assert layer.B.any()


@pytest.mark.parametrize("steps,expected", [(3, 2), (5, 4), (6, 5), (60, 5), (1000, 5), (1400, 7), (10000, 50)])
def test_warm_up_is_half_a_percent_but_at_least_five_steps(steps, expected):
    assert build(steps=steps).warmup == expected


def test_warm_up_steps_see_enough_examples():
    allocator = build(weightlora_steps=5, weightlora_examples=40)
    assert [allocator.examples(step) for step in (1, 5, 6)] == [40, 40, 0]


@pytest.mark.parametrize("keep,K", [(0, 9), (1, 1), (18, 18), (5, 5)])
def test_random_control_draws_from_the_seed_alone(keep, K):
    chosen = set()
    for seed in range(6):
        allocator = build("random", targets=ALL, weightlora_keep=keep, seed=seed)
        assert len(allocator.layers) == K == len(lora.adapters(allocator.model)) and not allocator.dynamic
        assert allocator.ranks() == {name: 4 * (name in allocator.layers) for name in allocator.names}
        torch.rand(3)
        assert list(allocators.RandomLora(Tiny(), allocator.settings, 60).layers) == list(allocator.layers)
        chosen.add(tuple(allocator.layers))
    assert (len(chosen) > 1) == (K < 18)
