"""WeightLoRA(+) and its random control: omega against StoIHT in NumPy, and what is left of the model afterwards."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import ALL, Tiny, batches, settings, train, training_of

import allocators
import lora


def build(method="weightlora", steps=60, seed=0, **changes):
    torch.manual_seed(seed)
    s = settings(method=method, seed=seed, **changes)
    return allocators.METHODS[method](Tiny(), s, steps)


def take(allocator, step, gradient):
    """A step in which omega has this gradient and A and B stand still; returns what after_step does."""
    allocator.own[0].grad = torch.tensor(np.array(gradient, np.float32))[:, None]
    return allocator.after_step(step)


SCORES = {"value": lambda w: w, "magnitude": abs, "moved": lambda w: abs(w - 1)}


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("threshold", ["every", "end"])
@pytest.mark.parametrize("n_kinds,keep,warmup,lr", [(2, 0, 12, 5.0), (6, 4, 20, 0.3), (3, 8, 7, 50.0), (1, 3, 5, 5.0)])
def test_omega_follows_stoiht_under_random_gradients(threshold, n_kinds, keep, warmup, lr, by):
    allocator = build(targets=ALL[:n_kinds], weightlora_keep=keep, weightlora_steps=warmup, weightlora_lr=lr,
                      weightlora_threshold=threshold, weightlora_rank_by=by)
    n, score, rest = 3 * n_kinds, SCORES[by], float(by == "moved")
    K = keep or n // 2
    omega, random, returned = np.ones(n), np.random.default_rng(n), False
    for step in range(1, warmup + 1):
        g = random.normal(0, 0.1, n).astype(np.float32) * (step > 1)
        allocator.rate = 1 - step / 40  # the schedule's, as in the authors' code
        assert take(allocator, step, g) is (step == warmup)
        before, omega = omega, omega - lr * (1 - step / 40) * g.astype(np.float64)
        best = sorted(range(n), key=lambda i: -score(omega[i]))[:K]  # a zero does not pass a negative one that is kept
        if threshold == "every" or step == warmup:  # H_K of Appendix B; those tied with the K-th stay (DESIGN 4.4)
            omega = np.where(score(omega) >= sorted(score(omega))[-K], omega, rest)
        returned |= bool((omega[before == rest] != rest).any()) and step > 2
        np.testing.assert_array_equal(allocator.omega.numpy(), omega)
        assert allocator.log()["omega"] == dict(zip(allocator.names, omega.tolist()))
        if step < warmup:
            for layer, w in zip(allocator.layers.values(), omega):
                assert layer.g.item() == np.float32(w)
    assert set(lora.adapters(allocator.model)) == set(allocator.layers) == {allocator.names[i] for i in best}
    near = lr >= 5 or by == "moved"  # a zeroed omega goes on receiving gradients
    assert returned == (threshold == "every" and K < n and near)


def test_ties_stay_in_the_warm_up_and_go_to_the_first_at_the_end():
    allocator = build(weightlora_steps=2, weightlora_keep=3, weightlora_threshold="end", weightlora_lr=4.0)
    take(allocator, 1, [0.0] * 6)
    take(allocator, 2, [0.125, 0.0, 0.125, 0.375, 0.0, 0.125])  # to -0.5 the fourth
    assert allocator.omega.tolist() == [0.5, 1, 0.5, 0, 1, 0.5]  # three are tied with the third
    assert list(allocator.layers) == [allocator.names[i] for i in (0, 1, 4)]


@pytest.mark.parametrize("method, rank", [("weightlora", 4), ("weightlora+", 8)])
@pytest.mark.parametrize("targets, keep", [(["query", "value"], 0), (ALL, 1), (ALL, 18), (["up", "down", "key"], 5)])
def test_survivors_train_as_standard_lora_and_nothing_is_left_of_the_others(method, rank, targets, keep):
    """The same bits as LoRA that begins afresh after the warm-up, on the model as it was."""
    allocator = build(method, targets=targets, weightlora_keep=keep, weightlora_steps=5, dropout=0.1, weight_decay=0.01)
    model, standard, names, s = allocator.model, Tiny(), allocator.names, allocator.settings
    weights = {name: model.get_submodule(name).weight for name in names}
    assert allocator.ranks() == dict.fromkeys(names, 4) and allocator.dynamic
    model.train()
    data = list(batches(30))
    training = train(training_of(allocator), data[:5])
    survivors = set(allocator.layers)
    assert survivors == set(lora.adapters(model)) and len(survivors) == (keep or len(names) // 2)
    assert allocator.ranks() == {name: rank * (name in survivors) for name in names}
    assert allocator.log()["selected"] == {name: int(name in survivors) for name in names}
    for name in names:
        module = model.get_submodule(name)
        assert module.weight is weights[name] and torch.equal(module.weight, standard.get_submodule(name).weight)
        if name in survivors:
            assert module.rank == rank and module.scale == 8 / 4 and module.g is None
            assert module.training and module.A.any() and not module.B.any()
        else:
            assert type(module) is nn.Linear and not module._forward_pre_hooks
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(rank * sum(weights[name].shape) for name in survivors)
    assert sum(p.numel() for p in trained) == allocator.budget().item() == size
    (optimizer,) = training.optimizers
    assert {id(p) for p in trained} == {id(q) for p in optimizer.param_groups[0]["params"] for q in p.parts}
    assert not optimizer.state and model.training and allocator.allocations == 1

    layers = lora.attach(standard, {name: rank for name in allocator.layers}, s.alpha, s.dropout, nominal=4)
    for name, layer in layers.items():
        layer.A.data.copy_(allocator.layers[name].A)
    standard.train()
    params = [p for layer in layers.values() for p in (layer.A, layer.B)]
    other = torch.optim.AdamW(params, lr=s.lr, fused=True, weight_decay=0.01)
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


@pytest.mark.parametrize("steps,expected", [(3, 2), (5, 4), (6, 5), (1000, 5), (1400, 7)])
def test_warm_up_is_half_a_percent_but_at_least_five_steps_of_enough_examples(steps, expected):
    allocator = build(steps=steps, weightlora_examples=40)
    assert [allocator.examples(step) for step in (1, expected, expected + 1)] == [40, 40, 0]


@pytest.mark.parametrize("keep", [0, 1, 18])
def test_random_control_draws_from_the_seed_alone(keep):
    chosen = set()
    for seed in range(6):
        allocator = build("random", targets=ALL, weightlora_keep=keep, seed=seed)
        assert len(lora.adapters(allocator.model)) == len(allocator.layers) == (keep or 9) and not allocator.dynamic
        assert allocator.ranks() == {name: 4 * (name in allocator.layers) for name in allocator.names}
        torch.rand(3)
        assert list(allocators.RandomLora(Tiny(), allocator.settings, 60).layers) == list(allocator.layers)
        chosen.add(tuple(allocator.layers))
    assert (len(chosen) > 1) == (keep < 18)
