"""What a fork of this project relies on: policies of its own, optimizers of its own, activations, given ranks."""

import contextlib
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_lora import batch, pair
from test_readme import code
from test_train import settled
from tiny import Tiny, batches, checkpoint, refused, resumed, resumes_to_the_same_bits, settings, train, training_of

import allocators
import lora
import train as program


class Late(allocators.Allocator):
    """Switches components off and holds them still in its first step, not in setup."""

    def after_step(self, step):
        for layer in self.layers.values():
            layer.g = torch.tensor([1.0, 1.0, 0.0, 0.0])
            layer.mask_updates(layer.g)
        self.current.fill_(2)


def test_ranks_that_differ_from_the_adapters_are_found():
    training = train(training_of(Late(Tiny(), settings(optimizer="sgd"), 10)), batches(1))
    training.allocator.check_ranks()
    again = resumed(Late(Tiny(), settings(optimizer="sgd"), 10), checkpoint(training))
    again.allocator.check_ranks()  # each g is back, though it came late, and each mask
    assert all(layer.A.active.flatten().tolist() == [1, 1, 0, 0] for layer in again.allocator.layers.values())
    again.allocator.layers["blocks.1.value"].g.fill_(1)
    with refused("has rank 2, but its g lets 4 .* `saved`"):
        again.allocator.check_ranks()


def test_a_policy_derived_from_another_takes_its_settings(tmp_path):
    """Also from a file that imports what is beside it and has dataclasses."""
    (tmp_path / "beside_own.py").write_text("from allocators import AdaLora")
    (tmp_path / "own.py").write_text("from __future__ import annotations\nimport beside_own, dataclasses\n"
                                     "@dataclasses.dataclass\nclass D:\n x: int\nclass Own(beside_own.AdaLora): pass\n")
    own, theirs = (vars(settled("--method", method, "--out", tmp_path / "run")[0])
                   for method in (f"{tmp_path}/own.py:Own", "adalora"))
    assert theirs["alpha"] == 16 * 12 and own | {"method": "adalora"} == theirs


class Keeps(allocators.Allocator):
    saved, thing = ("thing",), 0


@pytest.mark.parametrize("before, after", [("phase 2", "phase 1"), (torch.ones(2), None), ({1, 2}, {1}),
                                           ([1] * 11, [1] * 10), (torch.tensor(2.5), torch.tensor(0))])
def test_state_that_cannot_be_kept_is_an_error(before, after):
    first, again = (Keeps(Tiny(), settings(), 10) for _ in range(2))
    first.thing, again.thing = before, after
    with pytest.raises(TypeError, match="thing"):
        resumed(again, checkpoint(training_of(first)))


class Grow(allocators.Allocator):
    """Blocks get adapters one by one, at step 9 one a larger one; `masked`: values' components are held still, too."""

    masked, saved = False, ("mask",)

    def setup(self):
        self.mask = torch.ones(4)
        self.grow(0)

    def grow(self, block):
        self.add({name: 4 for name, i, _ in self.sites if i == block})
        self.restored()

    def restored(self):
        for name, layer in self.layers.items():
            if self.masked and name.endswith("value"):
                layer.mask_updates(self.mask)

    def after_step(self, step):
        self.mask.copy_((torch.arange(4) + step) % 4 > 0)
        if step in (3, 6):
            self.grow(step // 3)
        if step == 9:
            self.drop(["blocks.0.query"])
            self.add({"blocks.0.query": 5}, init="milora")
        return self.masked and step in (3, 6, 9)  # who forgets to say so is followed, too


def moments(training):
    """The optimizers' state of every adapter, {(name, "A" or "B"): state or None}."""
    found = {}
    for optimizer in training.optimizers:
        for p, state in optimizer.state.items():
            for i, part in enumerate(getattr(p, "parts", [p])):
                found[part] = {key: t[i] if p is not part and t.dim() else t for key, t in state.items()}
    return {(name, key): found.get(getattr(layer, key)) for name, layer in training.allocator.layers.items()
            for key in "AB"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("masked", [False, True])
def test_adapters_come_and_go_and_the_others_go_on(masked, optimizer, monkeypatch):
    monkeypatch.setattr(Grow, "masked", masked)
    build = lambda: Grow(Tiny(), settings(optimizer=optimizer, weight_decay=0.1, dropout=0.1), 12)
    data, training, before = list(batches(12)), training_of(build()), {}

    def follow():
        before.update(copy.deepcopy(moments(training)))  # adapters have come or gone, the optimizers not followed
        program.Training.follow(training)

    training.follow = follow
    for step, rows in enumerate(data, start=1):
        held = dict(training.allocator.layers)
        values = {name: layer.A.detach().clone() for name, layer in held.items()}
        moving = training.allocator.mask.bool()
        train(training, [rows], first=step)
        for name, layer in held.items():
            expected = moving if masked and name.endswith("value") else True
            assert ((layer.A != values[name]).any(1) == expected).all()
        assert bool(before) == (step in (3, 6, 9))
        after = moments(training)
        for (name, key), old in before.items():
            assert (old is None) == (held.get(name) is not training.allocator.layers[name])  # new ones start afresh
            assert old or not after[name, key]
            assert all(torch.equal(value, after[name, key][k]) for k, value in (old or {}).items())
        before.clear()
        training.allocator.check_ranks()
    for stop in (2, 6, 10):
        resumes_to_the_same_bits(build, data, stop)
    with refused("blocks.2.value has an adapter"):
        training.allocator.add({"blocks.2.value": 2})


class Sign(torch.optim.Optimizer):
    """A forker's own: sign descent with momentum, state made in the first step, weight decay."""

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            state["mean"] = state.get("mean", torch.zeros_like(p)).lerp(p.grad, 0.3)
            p.mul_(0.99).sub_(state["mean"].sign(), alpha=1e-2)


@pytest.mark.parametrize("cls, options", [(torch.optim.SGD, dict(lr=1e-2, momentum=0.9, weight_decay=0.2)),
                                          (Sign, dict(defaults={})),
                                          (torch.optim.RMSprop, dict(lr=1e-2, momentum=0.5, weight_decay=0.2)),
                                          (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.2))])
def test_any_optimizer_holds_components_still(cls, options):
    """Each component goes as under the optimizer alone, fed only the steps in which it may move and none is bad."""
    torch.manual_seed(0)
    whole, masks = lora.stacked([torch.nn.Parameter(torch.randn(4, 5)) for _ in range(3)]), torch.ones(3, 4)
    for part, mask in zip(whole.parts, masks):
        part.active = mask[:, None]
    alone = [[torch.nn.Parameter(row.clone()) for row in part] for part in whole.data]
    ours = cls is torch.optim.AdamW  # whose components have clocks of their own
    optimizer = lora.AdamW([whole], **options) if ours else lora.hold_still(cls([whole], **options))
    others = [[cls([row], **options) for row in rows] for rows in alone]
    for step in range(40):
        masks.copy_(torch.rand(3, 4) < 0.5)
        bad, grad = step % 7 == 3, torch.randn(3, 4, 5)
        before = whole.detach().clone()
        whole.grad = grad * masks[..., None]
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        moved = masks.bool() & ~torch.tensor(bad)
        assert torch.equal((whole != before).any(2), moved)
        for i, k in moved.nonzero().tolist():
            alone[i][k].grad = grad[i, k].clone()
            others[i][k].step()
    expected = torch.stack([torch.stack(rows) for rows in alone]).detach()
    torch.testing.assert_close(whole.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("early", [False, True])
def test_late_masks_hold_or_are_refused_where_there_were_none(early):
    allocator = allocators.Allocator(Tiny(), settings(), 10)
    allocator.drop(["blocks.0.query"])
    allocator.add({"blocks.0.query": 3})
    if early:
        allocator.layers["blocks.0.query"].mask_updates(torch.ones(3))
    training, late = train(training_of(allocator), batches(1)), allocator.layers["blocks.1.query"]
    late.mask_updates(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    before = late.A.detach().clone()
    with contextlib.nullcontext() if early else refused("mask_updates"):
        train(training, batches(3), first=2)
        assert (late.A != before).any(1).tolist() == [False, True, True, True]


def test_muon_is_torchs_on_each_matrix():
    allocator = allocators.Allocator(Tiny(), settings(optimizer="muon", weight_decay=0.1), 99)
    training, other = training_of(allocator), copy.deepcopy(allocator.model)
    params = [p for name, p in other.named_parameters() if name.endswith((".A", ".B"))]
    muon = torch.optim.Muon(params, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step, (x, labels) in enumerate(batches(5), start=1):
        train(training, [(x, labels)], first=step)
        F.cross_entropy(other(x), labels).backward()
        muon.step()
        muon.zero_grad()
        for name, layer in allocator.layers.items():
            torch.testing.assert_close(layer.B, other.get_submodule(name).B, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [dict(), dict(init="pissa"), dict(init="milora", dora=True), dict(method="lelora")])
def test_disabled_adapters_leave_the_base_model(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path))
    s, model, base, x = settings(**changes, rank=2), Tiny(dim=16), Tiny(dim=16), torch.randn(9, 16)
    allocator = allocators.METHODS[s.method](model, s, 20)
    allocator.validation_loss = lambda: torch.tensor(1.0)
    train(training_of(allocator), batches(20, dim=16))
    trained = model(x)
    with lora.disabled(model):
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), trained) and (trained - base(x)).abs().max() > 0.01
    lora.merge_adapters(model)
    with lora.disabled(model):
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)


class Watch(allocators.Allocator):
    """Sums each matrix's inputs over the real tokens; its penalty is the KL to the base model."""

    summed = ("total",)

    def setup(self):
        super().setup()
        self.total = torch.zeros(len(self.names), self.model.get_submodule(self.names[0]).in_features)
        self.seen, self.terms = [], []

    def watch(self, name, x, real):
        x = x if real is None else x * real[..., None]
        self.total[self.names.index(name)] += x.detach().flatten(0, -2).sum(0)

    def penalty(self, *args):
        names = {"torch": torch, "F": F, "lora": lora}
        exec(code("def penalty"), names)  # the README's
        self.terms.append(names["penalty"](self, *args))
        return self.terms[-1]

    def after_backward(self, step):
        self.seen.append(self.total.clone())


@pytest.mark.parametrize("family, compiled", [("roberta", False), ("roberta", True), ("deberta", False)])
def test_a_policy_sees_real_tokens_of_all_passes_and_the_base_model(family, compiled, tmp_path):
    model, plain = (pair(family, tmp_path)[1] for _ in range(2))
    allocator = Watch(model, settings(), 10)
    training = program.Training(allocator.settings, model.train(), "classify", allocator)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # as train.py has it
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)  # a graph break is an error
    inputs_of = {name: [] for name in allocator.names}
    for name in allocator.names:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs_of[name].append(args[0]))
    generator = torch.Generator().manual_seed(2)
    data = [batch(family, generator)[1:] for _ in range(3)]
    for step in (1, 2):
        training.step(step, [(inputs, labels, 1 / 18) for inputs, labels in data])
    for inputs, _ in data:
        plain(**inputs)
    for row, name in zip(allocator.seen[0], allocator.names):  # in the first step all is as in the base model
        expected = sum((x * inputs["mask"][..., None]).sum((0, 1)) for x, (inputs, _) in zip(inputs_of[name], data))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    assert len(allocator.terms) == 6 and max(allocator.terms[:3]) < 1e-6 < 1e-5 < min(allocator.terms[3:])
    model.eval()(**data[0][0])
    assert not allocator.total.any()  # zeroed after the step; evaluation is not seen


def test_given_ranks(tmp_path):
    def given(**changes):
        return allocators.Allocator(Tiny(), settings(ranks=str(source), **changes), 10)

    names = [name for name, _, _ in lora.sites(Tiny(), ["query", "value"])]
    first, last = dict.fromkeys(names, 9), dict(zip(names, (1, 0, 3, 4, 2, 7)))
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps({"step": 1, "ranks": r}) + "\n" for r in (first, last)))
    (tmp_path / "own.json").write_text(json.dumps({name: rank for name, rank in last.items() if rank}))
    for source in (tmp_path / "own.json", tmp_path):
        (tmp_path / "result.json").touch()
        allocator = given()
        assert allocator.ranks() == last
        assert {name: layer.rank for name, layer in allocator.layers.items()} == {n: r for n, r in last.items() if r}
        assert all(layer.scale == 8 / 4 for layer in allocator.layers.values())
    dealt = [tuple(given(ranks_shuffled=True, seed=seed).ranks().values()) for seed in (0, 0, 1, 2)]
    assert dealt[0] == dealt[1] and len(set(dealt)) == 3 and all(sorted(d) == [0, 1, 2, 3, 4, 7] for d in dealt)
    source.joinpath("ranks.jsonl").write_text(json.dumps({"ranks": {"blocks.0.value": 5, "blocks.1.up": 2}}) + "\n")
    mixed = [given(targets=["value", "up"], ranks_shuffled=i > 0, seed=i) for i in range(5)]  # of two sizes
    assert len({policy.budget().item() for policy in mixed}) == 1 < len({str(policy.ranks()) for policy in mixed})
