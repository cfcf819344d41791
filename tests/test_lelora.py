"""LeLoRA: the decomposition, what may move, the policy's gradient and what the policy finds."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ALL, Tiny, batches, components, settings, train, training_of

import allocators
from extras import singular

DIM = 32  # three windows of 8 need 32 singular components
FLAGS = dict(method="lelora", rank=8, alpha=3.0, dropout=0.3, lelora_start="kaiming")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path))
    return tmp_path / "svd"


def fresh(blocks=2, dim=DIM):
    """The model before LeLoRA is on it."""
    return Tiny(blocks=blocks, dim=dim, hidden=dim + 16)


def build(steps=100, blocks=2, dim=DIM, loss=None, dtype=torch.float32, **changes):
    """LeLoRA on a tiny model; its validation loss is `loss(allocator)`, or that of a fixed batch."""
    model = fresh(blocks, dim).to(dtype)
    allocator = allocators.LeLora(model, settings(**FLAGS | changes), steps)
    x, labels = next(batches(1, size=32, dim=dim, seed=99))

    def real(_):
        with torch.no_grad():
            return F.cross_entropy(model(x), labels)

    allocator.validation_loss = lambda: (loss or real)(allocator)
    return allocator


def drive(allocator, steps):
    """Steps in which nothing moves but the policy."""
    for step in range(1, steps + 1):
        allocator.after_step(step)


def windows(m, R):
    return [*range(R), *range(m // 2, m // 2 + R), *range(m - R, m)]


@pytest.mark.parametrize("dim", [8, 31, 32])
def test_decomposed_model_computes_the_original(dim):
    original, x = fresh(3, dim), torch.randn(20, dim)
    R = (dim - dim // 2) // 2  # as large as it can be
    allocator = build(blocks=3, dim=dim, targets=ALL, lelora_dims=["0", str(R)])
    model = allocator.model
    assert (model(x) - original(x)).norm() < 1e-5 * original(x).norm()
    model.train()  # no dropout on W's own components
    assert torch.equal(model(x), model.eval()(x))
    for name, layer in allocator.layers.items():
        W = original.get_submodule(name).weight
        U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
        assert layer.rank == 3 * R and not torch.allclose(layer.weight, W, atol=1e-3)
        np.testing.assert_allclose(layer.weight + layer.delta(), W, atol=1e-6)
        for k, i in enumerate(windows(len(S), R)):
            component = np.outer(layer.B[:, k].detach(), layer.A[k].detach())
            np.testing.assert_allclose(component, S[i] * np.outer(U[:, i], Vh[i]), atol=1e-3)  # near ones mix
            assert layer.A[k].norm().item() == pytest.approx(math.sqrt(S[i]), rel=1e-3, abs=1e-4)


def test_singular_values_are_computed_once_and_kept(cache, monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: calls.append(1) or eigh(*a, **k))
    first, x = build(), torch.randn(8, DIM)
    assert len(calls) == 4 == len(list(cache.iterdir()))
    assert torch.equal(first.model(x), build().model(x))
    narrow = build(lelora_dims=[2, 4])  # other windows, cut from the same file
    assert len(calls) == 4 and torch.allclose(narrow.model(x), first.model(x), atol=1e-5)
    build(dtype=torch.bfloat16)  # other weights
    assert len(calls) == 8
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-40])  # damaged files are made anew
    assert torch.equal(first.model(x), build().model(x)) and len(calls) == 12 and not list(cache.glob("*.part"))


@pytest.mark.parametrize("orders, shape", [(5, (768, 768)), (3, (300, 500)), (3, (500, 300))])
def test_the_smallest_components_of_a_large_matrix_are_float64s(orders, shape, cache):
    """Values over `orders` of magnitude: the last window's part of W is right to float32's rounding of W."""
    generator, m = torch.Generator().manual_seed(0), min(shape)
    U, V = (torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0] for n in shape)
    W = (U * torch.logspace(0, -orders, m, dtype=torch.float64) @ V.T).float()
    _, A, B = singular.windows(W, 8)
    u, s, v = np.linalg.svd(W.double().numpy())
    expected = torch.from_numpy((u[:, m - 8:m] * s[-8:]) @ v[m - 8:m])
    assert (B[:, -8:] @ A[-8:] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("W", [torch.zeros(6, 9), torch.ones(9, 6), torch.eye(6), -torch.eye(8)[:, :6]])
def test_components_of_a_matrix_that_has_few(W, cache):
    S, A, B = singular.components(W.double())
    torch.testing.assert_close(S, torch.linalg.svdvals(W.double()), atol=1e-7, rtol=1e-12)
    torch.testing.assert_close(B @ A, W.double(), atol=1e-12, rtol=0)


def test_only_the_sampled_components_move_and_count_for_clipping():
    allocator = build(steps=60, lr=1e-2, weight_decay=0.2, targets=["query", "value", "up"], clip=0.1)
    frozen = [layer.weight.clone() for layer in allocator.layers.values()]
    training, seen, still = training_of(allocator), set(), 0
    for step, (x, labels) in enumerate(batches(60, dim=DIM), start=1):
        choice = [(allocator.dims[i], allocator.locations[j]) for i, j in allocator.choice.tolist()]
        assert list(allocator.ranks().values()) == [r for r, _ in choice]
        F.cross_entropy(allocator.model(x), labels).backward()
        gradients = [(layer.A.grad, layer.B.grad.T) for layer in allocator.layers.values()]
        for layer in allocator.layers.values():
            layer.A.grad = layer.B.grad = None
        before, square = components(allocator, *training.optimizers), 0
        _, norm = training.step(step, [({"x": x}, labels, 1 / len(labels))])
        after = components(allocator, *training.optimizers)
        for i, (r, location) in enumerate(choice):
            start = {"first": 0, "middle": 8, "last": 24 - r}[location]  # "last" are the r smallest
            moving = list(range(start, start + r))
            fixed = [k for k in range(24) if k not in moving]
            assert all(torch.equal(old[i, fixed], new[i, fixed]) for old, new in zip(before, after))
            assert all((old[i, moving] != new[i, moving]).all() for old, new in zip(before, after))
            still += int((after[2][i, fixed] != 0).sum() + (after[3][i, fixed] != 0).sum())
            square += sum(gradient[moving].square().sum() for gradient in gradients[i])
            seen.add((r, location))
        assert norm.item() == pytest.approx(square.sqrt().item(), rel=1e-4)
    assert seen == set(itertools.product([0, 2, 4, 8], allocators.WINDOWS))
    assert still > 1000  # components that stood still though they had momentum
    assert all(torch.equal(old, layer.weight) for old, layer in zip(frozen, allocator.layers.values()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["lelora", "lora"])
def test_without_gradients_the_update_stays_zero(method, optimizer):
    """Weight decay would take W's own components away: LeLoRA's and, for `lora`, PiSSA's."""
    s = settings(**{**FLAGS, "method": method, "optimizer": optimizer, "weight_decay": 0.1, "lr": 0.1,
                    "init": "pissa" if method == "lora" else "lora"})
    allocator = allocators.METHODS[method](fresh(), s, 100)
    allocator.validation_loss = lambda: torch.ones(())
    training, (x, labels) = training_of(allocator), next(batches(1, dim=DIM))
    before = [p.clone() for p in allocator.parameters()]
    for step in range(1, 31):
        training.step(step, [({"x": x}, labels, 0.0)])
    assert all(torch.equal(p, q) and q.any() for p, q in zip(allocator.parameters(), before))
    assert all(layer.factors()[0].shape[0] == 0 for layer in allocator.layers.values())


@pytest.mark.parametrize("changes, dims, locations", [
    (dict(rank=1), [0, 1], ["first", "middle", "last"]), (dict(lelora_ablate="rank"), [0, 2, 4, 8], ["first"]),
    (dict(lelora_dims=["4", "0", "4"], lelora_locations=["last", "first", "last"]), [0, 4], ["first", "last"]),
    (dict(lelora_ablate="location"), [8], ["first", "middle", "last"])], ids=str)
def test_candidate_sets(changes, dims, locations):
    allocator = build(**changes)
    assert (allocator.dims, allocator.locations) == (dims, locations)
    log = allocator.log()
    assert {allocators.WINDOWS[i] for i in log["location"].values()} <= set(locations)
    assert ("entropy_rank" in log, "entropy_location" in log) == (len(dims) > 1, len(locations) > 1)
    assert allocator.warning() is None


def test_policy_sees_norms_and_current_singular_values():
    allocator, original = build(lelora_inputs="raw", targets=["query", "up"], steps=30, lr=1e-2), fresh()
    assert allocator.features.shape == (4, 1 + DIM)
    for name, row in zip(allocator.names, allocator.features):
        W = original.get_submodule(name).weight
        np.testing.assert_allclose(row[0], torch.linalg.norm(W), rtol=1e-5)
        np.testing.assert_allclose(row[1:], torch.linalg.svdvals(W), atol=1e-5)
    start = allocator.features.clone()
    train(training_of(allocator), batches(30, dim=DIM))
    changed = (allocator.features != start).any(0)[1:]
    fixed = [i for i in range(DIM) if i not in windows(DIM, 8)]
    assert not changed[fixed].any() and changed[windows(DIM, 8)].sum() > 20
    layer = allocator.layers["blocks.1.up"]
    strength = (layer.A.norm(dim=1) * layer.B.norm(dim=0)).detach()
    np.testing.assert_allclose(allocator.features[3, 1:9], strength[:8], rtol=1e-5)
    allocator.settings.lelora_inputs = "standardised"
    numbers = allocator.characteristics()
    np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(numbers.std(0, correction=0), 1, atol=1e-2)


def test_network_is_the_papers():
    policy, other = (allocators.Policy(12, 769, 4, 3, seed=seed, start="kaiming") for seed in (0, 1))
    shapes = [tuple(p.shape) for p in policy.parameters() if p.dim() == 2]
    assert shapes == [(12, 200), (7, 200), (1024, 1169), (256, 1024), (64, 256), (4, 64), (3, 64)]
    for p in policy.parameters():
        bound = math.sqrt(6 / p.shape[1]) if p.dim() == 2 else 0
        assert p.abs().max() <= bound and (p.dim() == 1 or p.abs().max() > 0.9 * bound)
    assert not torch.equal(other.hidden[0].weight, policy.hidden[0].weight)


@pytest.mark.parametrize("changes", [dict(), dict(lelora_start="uniform"), dict(lelora_ablate="random")], ids=str)
def test_actions_are_drawn_with_the_policys_probabilities(changes):
    """The entropy that is logged is theirs; a constant loss, or none, leaves all equally likely that are so."""
    allocator = build(loss=lambda _: torch.ones(()), **changes)
    if "lelora_ablate" in changes:
        allocator.validation_loss = None  # the control takes no validation pass
    heads = [head.exp().detach() for head in allocator.policy(allocator.place, allocator.features)]
    if changes:
        heads = [torch.full_like(head, 1 / head.shape[1]) for head in heads]
    counts = [torch.zeros_like(head) for head in heads]
    for _ in range(2000):
        (allocator.after_step if changes else allocator.act)(1)
        for i, count in enumerate(counts):
            count.scatter_add_(1, allocator.choice[:, i:i + 1], torch.ones(4, 1))
    for name, count, head in zip(("entropy_rank", "entropy_location"), counts, heads):
        entropy = torch.distributions.Categorical(head).entropy().mean() / math.log(head.shape[1])
        assert allocator.log()[name].item() == pytest.approx(entropy.item(), rel=1e-5)
        assert ((count / 2000 - head).abs() < 5 * (head * (1 - head) / 2000).sqrt() + 1e-3).all()


def test_a_falling_loss_teaches_nothing_with_the_baseline_that_follows_it():
    def moved(baseline, noise):
        random = np.random.default_rng(0)
        losses = iter(10 - np.arange(40) / 64 + noise * random.normal(size=40))
        allocator = build(loss=lambda _: torch.tensor(next(losses)), lelora_baseline=baseline, lelora_start="uniform")
        drive(allocator, 40)
        heads = torch.cat([head.weight.flatten() for head in allocator.policy.heads])
        return heads.norm().item(), allocator.variance.item() ** 0.5
    assert moved("mean", 0)[0] > 1e-4 and moved("trend", 0)[0] < 1e-6
    step, spread = moved("trend", 0.1)
    larger, wider = moved("trend", 0.2)
    assert step > 1e-3 and larger == pytest.approx(step, rel=0.2)  # in units of its deviation
    assert wider == pytest.approx(2 * spread, rel=0.2)


def test_reinforce_gradient_is_unbiased():
    """Its mean over all actions, by their probability, is the gradient of the expected reward, over n (Eqs. 8, 9)."""
    allocator = build(blocks=1, lelora_dims=[0, 4], lelora_locations=["first", "last"], lelora_reward_alpha=0.0,
                      lelora_policy_lr=1.0)
    policy, features = allocator.policy.double(), allocator.features.double()
    allocator.features, allocator.characteristics = features, lambda: features
    parameters = list(policy.parameters())
    flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])
    start = {name: t.clone() for name, t in policy.state_dict().items()}
    rewards = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(1))  # of (dimension, location) twice
    rank, location = (head.exp() for head in policy(allocator.place, features))
    p = torch.einsum("a,b,c,d->abcd", rank[0], location[0], rank[1], location[1])
    exact = flat(torch.autograd.grad((p * rewards).sum() / 2, parameters, materialize_grads=True, allow_unused=True))
    estimate = torch.zeros_like(exact)
    for action in itertools.product(range(2), repeat=4):
        policy.load_state_dict(start)
        allocator.allocations, allocator.baseline = 1, torch.tensor(0.7)  # a baseline that is not the mean
        allocator.restored()
        allocator.choice, allocator.validation_loss = torch.tensor(action).view(2, 2), lambda: rewards[action]
        allocator.after_step(1)  # a plain gradient step of size 1
        single = flat(start[name] - q for name, q in policy.named_parameters())
        estimate += p[action].detach() * single
    assert exact.norm() > 0.01
    np.testing.assert_allclose(estimate, exact, atol=1e-6 * exact.abs().max().item() + 1e-7)
    assert (single - exact).norm() > 0.1 * exact.norm()  # one action alone is not


@pytest.mark.parametrize("every", [1, 4])
def test_one_validation_forward_per_action_and_the_papers_reward(every):
    """What is not finite is no reward: it teaches nothing, and the next one is compared with the last finite loss."""
    losses, rewards, changed, moved = iter([2.0, 1.9, math.nan, 1.2, 1.0]), [], [], []
    allocator = build(loss=lambda _: torch.tensor(next(losses)), lelora_every=every)
    training = training_of(allocator)
    for step, rows in enumerate(batches(5 * every, dim=DIM), start=1):
        choice, before = allocator.choice.clone(), allocator.policy.hidden[0].weight.clone()
        train(training, [rows], first=step)
        changed += [step] if not torch.equal(choice, allocator.choice) else []
        if step % every == 0:
            rewards.append(allocator.reward.item())
            moved.append(not torch.equal(before, allocator.policy.hidden[0].weight))
    assert changed == list(range(every, 5 * every + 1, every)) and allocator.allocations == 5 and not list(losses)
    assert moved == [False, True, False, True, True]
    after = [(1.9, 2.0), (1.2, 1.9), (1.0, 1.2)]
    first, second, third = (now + 0.8 * (now - before) for now, before in after)  # Eqs. 2-4
    mean = 0.9 * 2.0 + 0.1 * first
    np.testing.assert_allclose(rewards, [2.0, first, mean, second, third], rtol=1e-5)
    for reward in (mean, second, third):
        mean = 0.9 * mean + 0.1 * reward
    assert allocator.baseline.item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("changes", [dict(), dict(lelora_every=3), dict(lelora_reward_alpha=0.0)], ids=str)
def test_policy_finds_a_planted_action(changes):
    planted = torch.tensor([[3, 0], [0, 1], [2, 2], [1, 0]])  # best (dimension, location) of each matrix
    allocator = build(loss=lambda a: (a.choice != planted).float().mean(), steps=2400,
                      **{"lelora_policy_lr": 0.1, "lelora_reward_alpha": 0.5, "seed": 1, **changes})
    drive(allocator, 500 * allocator.settings.lelora_every)
    heads = [head.exp() for head in allocator.policy(allocator.place, allocator.features)]
    for i, head in enumerate(heads):
        assert torch.equal(head.argmax(1), planted[:, i])
        assert head.gather(1, planted[:, i:i + 1]).min() > 0.8


@pytest.mark.parametrize("steps, changes, collapses, warns", [
    (600, dict(lelora_policy_optimizer="adam", lelora_policy_lr=1e-2), True, True), (600, dict(), False, False),
    (60, dict(lelora_policy_optimizer="adam"), True, False)], ids=str)  # the last: later than a tenth, it is allowed
def test_a_policy_that_collapses_in_the_first_tenth_is_named(steps, changes, collapses, warns):
    allocator = build(loss=lambda a: torch.tensor(10.0 - 0.05 * a.allocations), steps=steps, **changes)
    drive(allocator, 60)  # whatever is done, the loss falls
    assert allocator.entropy.max() < 0.01 if collapses else allocator.entropy.min() > 0.1
    assert "entropy of rank and location" in allocator.warning() if warns else allocator.warning() is None
