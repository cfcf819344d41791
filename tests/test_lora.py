"""The LoRA layer and its files, PiSSA, MiLoRA, DoRA, LoRA+ and LoRA-FA: against PEFT, torch and NumPy."""

import re
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import NO_DROPOUT, both
from test_train import cache  # noqa: F401: a fixture
from tiny import POLICIES, Tiny, batches, refused, settings, train, training_of

import allocators
import lora
import train as program
from extras import adapter_files, singular

peft = pytest.importorskip("peft")
loraplus = pytest.importorskip("peft.optimizers")

Family = namedtuple("Family", "changes targets task_type")  # of test_model's settings; what is adapted; PEFT's word
FAMILIES = {"roberta": Family(NO_DROPOUT, ["query", "value", "out", "down"], "SEQ_CLS"),
    "bert": Family(NO_DROPOUT, ["query", "out", "down"], "SEQ_CLS"), "vit": Family({}, ["query", "value", "up"], None),
    "deberta": Family(NO_DROPOUT, ["query", "key", "value", "out", "up", "down"], "SEQ_CLS"),
    "llama": Family(dict(num_key_value_heads=2), ["query", "value", "up", "down"], "CAUSAL_LM")}


def pair(family, folder):
    """The same random weights in transformers, saved in `folder`, and here."""
    return both(family, folder, num_labels=3, **FAMILIES[family].changes)


def batch(family, generator, image=(3, 16, 16)):
    """A random batch as (their inputs, our inputs, labels); texts are padded on the right."""
    if family == "vit":
        pixels = torch.randn(6, *image, generator=generator)
        return {"pixel_values": pixels}, {"pixels": pixels}, torch.randint(3, (6,), generator=generator)
    tokens = torch.randint(5, 60, (6, 11), generator=generator)
    lengths = torch.randint(4, 12, (6,), generator=generator)
    mask = torch.arange(11) < lengths[:, None]
    tokens[~mask] = 1
    labels = torch.randint(3, (6,), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask.long()}, {"tokens": tokens, "mask": mask}, labels


def pass_of(family, inputs, labels):
    """A forward pass for train.py's Training.step; of a language model's tokens each real one is to be predicted."""
    if family == "llama":
        positions = (inputs["mask"].roll(-1, 1) & (torch.arange(11) < 10)).flatten().nonzero()[:, 0]
        inputs, labels = inputs | {"positions": positions}, inputs["tokens"].flatten()[positions + 1]
    return inputs, labels, 1 / len(labels)


def losses(family, logits, inputs, labels):
    if family != "llama":
        return F.cross_entropy(logits, labels)
    real = inputs["mask"][:, 1:]
    return F.cross_entropy(logits[:, :-1][real], inputs["tokens"][:, 1:][real])


def peft_layers(theirs, model):
    """PEFT's LoRA layers of the blocks, by our names."""
    every = lora.sites(model, [kind for kind in lora.TARGETS if hasattr(model.blocks[0], kind)])
    found = {name: theirs.base_model.model.get_submodule(model.hf_name(name, module=True)) for name, _, _ in every}
    return {name: layer for name, layer in found.items() if hasattr(layer, "lora_A")}


def same_in_peft(model, base, folder, family, tolerance=1e-4):
    """The saved adapter gives the same logits in PEFT, also merged, and here; returns PEFT's ranks."""
    adapter_files.save_adapter(model.eval(), folder, str(base), FAMILIES[family].task_type, head=family != "llama")
    theirs, again = pair(family, base)
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    real = inputs["mask"] if family == "llama" else slice(None)
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ranks = {name: len(layer.lora_A.default.weight) for name, layer in peft_layers(loaded, model).items()}
    layers = adapter_files.load_adapter(again, folder)
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert {layer.dropout for layer in layers.values()} == {layer.dropout for layer in lora.adapters(model).values()}
    with torch.no_grad():
        expected = model(**inputs)[real]
        found = [loaded(**their_inputs).logits, loaded.merge_and_unload()(**their_inputs).logits, again(**inputs)]
        for logits in found:
            torch.testing.assert_close(logits[real], expected, rtol=0, atol=tolerance)
    return ranks


@pytest.mark.parametrize("family, changes", [
    ("roberta", {}), ("vit", {}), ("llama", dict(scaling="rslora", dropout=0.3)), ("roberta", dict(init="pissa")),
    ("llama", dict(init="pissa", dora=True)), ("llama", dict(dora=True, dropout=0.3)), ("roberta", dict(dora=True)),
    ("roberta", dict(dora=True, dropout=0.3)), ("llama", dict(lora_plus_ratio=3.0, dora=True)),
    ("llama", dict(freeze_a=True))], ids=str)
def test_training_is_pefts(family, changes, tmp_path, monkeypatch):
    """Same start, losses and weights with the same batches and dropout; PEFT reads the adapter."""
    monkeypatch.setattr(lora, "dropout", F.dropout)  # ours draws other masks on a CPU
    theirs, ours = pair(family, tmp_path / "base")
    decay = 0.0 if "init" in changes else 0.1  # train.py does not decay what is W's own
    s = settings(targets=FAMILIES[family].targets, alpha=12.0, lr=5e-3, weight_decay=decay, **changes)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=s.dropout, use_dora=s.dora, use_rslora=s.scaling == "rslora",
        target_modules=[ours.hf_name(name, module=True) for name, _, _ in lora.sites(ours, s.targets)],
        init_lora_weights="pissa" if s.init == "pissa" else True)).train()
    allocator, wrapped = allocators.Allocator(ours, s, 10), peft_layers(theirs, ours)
    for name, layer in allocator.layers.items():
        A, B = (getattr(wrapped[name], key).default.weight for key in ("lora_A", "lora_B"))
        if layer.start is None:
            layer.B.data.normal_(std=0.1)
        else:  # PEFT decomposes in float32, and a pair of vectors may be turned round
            for mine, its in ((layer.A.abs(), A.abs()), (layer.B.abs(), B.abs()), (layer.B @ layer.A, B @ A),
                              (layer.weight, wrapped[name].base_layer.weight)):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
        A.requires_grad_(not s.freeze_a).data.copy_(layer.A)
        B.data.copy_(layer.B)
    training = training_of(allocator, "lm" if family == "llama" else "classify")
    ours.head.requires_grad_(False)
    for group in training.optimizers[0].param_groups:  # above rounding noise, whose sign would else be a full step
        group["eps"] = 1e-4
    other = loraplus.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=s.lr, loraplus_lr_ratio=s.lora_plus_ratio,
                                               loraplus_weight_decay=s.weight_decay, eps=1e-4)
    generator = torch.Generator().manual_seed(1)
    ours.train().blocks[-1].register_forward_hook(lambda *_: None)  # so that it computes all tokens, as theirs does
    for step in range(1, 11):
        their_inputs, inputs, labels = batch(family, generator)
        torch.manual_seed(step)
        their_loss = losses(family, theirs(**their_inputs).logits, inputs, labels)
        their_loss.backward()
        other.step()
        other.zero_grad()
        torch.manual_seed(step)
        loss, _ = training.step(step, [pass_of(family, inputs, labels)])
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-4)
    for name, layer in allocator.layers.items():
        for part, key in (("A", "lora_A"), ("B", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            if getattr(layer, part) is not None:
                expected = getattr(wrapped[name], key).default.weight
                torch.testing.assert_close(getattr(layer, part), expected, rtol=1e-3, atol=2e-4)
    assert not s.freeze_a or training.optimizers[0].state.keys() == {stack.B for stack in allocator.stacks}
    same_in_peft(ours, tmp_path / "base", tmp_path / "adapter", family, tolerance=1e-3)


@pytest.mark.parametrize("kind, bias, dtype", [
    (lora.LoraLinear, True, torch.float32), (lora.DoraLinear, True, torch.float32),
    (lora.DoraLinear, False, torch.bfloat16)])
def test_the_layers_matrix_factors_and_merge(kind, bias, dtype):
    """x V^T + b in float64 NumPy with V = W + s B diag(g) A, or DoRA's; merging only rounds."""
    torch.manual_seed(0)
    layer = kind(torch.nn.Linear(40, 24, bias=bias).requires_grad_(False).to(dtype), 4, 2.0)
    layer.B.data.normal_(std=0.1)
    A, B, W = (t.detach().double().numpy() for t in (layer.A, layer.B, layer.weight))
    x = torch.randn(3, 7, 40).to(dtype)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for g, rank in (([0.7], 4), ([0.0], 0), ([1.0, 0.0, 0.5, -2.0], 3)):
        layer.g = torch.tensor(g)
        update = 2.0 * (B * g) @ A
        V = W + update
        if kind is lora.DoraLinear:
            layer.magnitude.data.mul_(torch.rand(24) + 0.5)
            V *= (layer.magnitude.detach().numpy() / np.linalg.norm(V, axis=1))[:, None]
        expected = x.double().numpy() @ V.T + (layer.bias.double().numpy() if bias else 0)
        np.testing.assert_allclose(layer(x).detach().double(), expected, **tolerance)
        np.testing.assert_allclose(layer.delta(), V - W, **tolerance)
        some_A, some_B = layer.factors()
        assert layer.let_through().sum() == rank  # what is switched off is left out, but DoRA keeps one
        assert len(some_A) == max(rank, kind is lora.DoraLinear)
        np.testing.assert_allclose(layer.scale * some_B @ some_A, update, **tolerance)
    for _ in range(2):  # once is enough
        layer.merge()
        np.testing.assert_allclose(layer.weight.double(), V, **tolerance)
        np.testing.assert_allclose(layer(x).detach().double(), expected, **tolerance)


@pytest.mark.parametrize("init, part", [("pissa", slice(4)), ("milora", slice(-4, None))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_detaching_gives_w_back_and_merging_keeps_what_it_has_become(init, part, dtype, tolerance):
    plain, model = (Tiny().to(dtype) for _ in range(2))
    allocator = allocators.Allocator(model, settings(init=init, alpha=12.0), 10)
    with refused("has an adapter already: drop it, or lora.detach it"):
        lora.attach(model, {"blocks.0.query": 4}, 8)
    with refused("its weights are damaged"):
        singular.windows(torch.full((4, 4), torch.nan), 1)
    for name, layer in allocator.layers.items():
        W, exact = plain.get_submodule(name).weight, tolerance
        U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
        np.testing.assert_allclose(layer.delta(), (U[:, part] * S[part]) @ Vh[part], atol=tolerance)
        torch.testing.assert_close(layer.weight.float() + layer.delta(), W.float(), rtol=0, atol=tolerance)
        assert layer.A.dtype == layer.B.dtype == torch.float32 and torch.equal(layer.A, layer.A.to(dtype).float())
        if name.endswith("value"):
            layer.B.data.normal_(std=0.1)
            W, exact = (layer.weight.float() + layer.delta()).to(dtype), 0
            layer.merge()
        lora.detach(model, name)
        torch.testing.assert_close(model.get_submodule(name).weight, W, rtol=0, atol=exact)
    assert not lora.adapters(model) and model.state_dict().keys() == plain.state_dict().keys()


def test_dora_keeps_its_lengths_without_components_and_is_finite_on_a_row_of_zeros(tmp_path):
    model, again, x = Tiny(), Tiny(), torch.randn(9, 12)
    for plain in (model, again):
        plain.blocks[0].query.weight[2] = 0
    allocator = allocators.Allocator(model, settings(dora=True), 10)
    train(training_of(allocator), batches(5))
    for layer in allocator.layers.values():
        layer.g = torch.zeros(1)
    assert 1e-2 < (model(x) - again(x)).abs().max() < 1
    adapter_files.save_adapter(model, tmp_path / "adapter", "base")
    adapter_files.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x), model(x))


OPTIONS = {"pissa": dict(init="pissa"), "milora": dict(init="milora"), "lora-fa": dict(freeze_a=True),
           "dora": dict(dora=True), "lora+": dict(lora_plus_ratio=4.0), "pissa, dora": dict(init="pissa", dora=True)}
MEANINGLESS = {"pissa": {"adalora", "lalora", "lelora"}, "dora": {"lelora"}, "lora+": {"adalora", "lelora"},
               "lora-fa": {"adalora", "lelora"}}
MEANINGLESS |= {"milora": MEANINGLESS["pissa"], "pissa, dora": MEANINGLESS["pissa"]}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", allocators.METHODS)
def test_every_combination_trains_or_is_refused(method, option, tmp_path):
    changes = OPTIONS[option]
    if method in MEANINGLESS[option] | {"full", "bitfit"}:
        first = "--" + next(iter(changes)).replace("_", "-")
        s = settings(method=method, out=str(tmp_path / "run"), **changes)
        with refused(f"^{first}.*--method {re.escape(method)}"):
            program.check(s, allocators.policy(method))
        return
    s = settings(**POLICIES, method=method, **changes, alpha=4.0, targets=["query", "value", "up"])
    torch.manual_seed(0)
    model, plain, history, x = Tiny(), Tiny(), [], torch.randn(9, 12)
    allocator = allocators.METHODS[method](model, s, 40)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    inputs, labels = next(batches(1, seed=9))
    allocator.validation_loss = lambda: F.cross_entropy(model(inputs), labels).detach()
    train(training_of(allocator), list(batches(4)) * 10, watch=lambda step, loss: history.append(loss.item()))
    allocator.check_ranks()
    assert np.isfinite(history).all() and np.mean(history[-4:]) < 0.97 * np.mean(history[:4])
    assert allocator.allocations or not allocator.dynamic
    adapter_files.save_adapter(model, tmp_path / "adapter", "base")
    adapter_files.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)
    if method != "adalora":  # whose capacity is held, not counted
        counted = sum(p.numel() * (layer.let_through().float().mean().item() if p is not layer.magnitude else 1)
                      for layer in allocator.layers.values() for p in (layer.A, layer.B, layer.magnitude)
                      if p is not None and p.requires_grad)
        assert allocator.budget().item() == pytest.approx(counted)


REFUSED = {  # what is said about which settings, where matrices are 32 x 32 and a run has 60 steps
    "--adalora-t-init 50 and --adalora-t-final 50": dict(method="adalora", adalora_t_init=50, adalora_t_final=50),
    "--adalora-t-init 0 and --adalora-t-final 0": dict(method="adalora", steps=1),
    "--adalora-t-init -1": dict(method="adalora", adalora_t_init=-1),
    "--credit-steps 60": dict(method="credit", credit_steps=60),
    "--weightlora-keep 7": dict(method="weightlora", weightlora_keep=7),
    "--weightlora-keep -1": dict(method="random", weightlora_keep=-1),
    "at least 3 steps": dict(method="weightlora", weightlora_steps=2, warmup=0.06),
    "--rank 17: weightlora+": dict(method="weightlora+", rank=17),
    "overlap where a matrix has 32 singular components; use at most 8": dict(method="lelora", rank=9),
    "--lelora-dims ['0']": dict(method="lelora", lelora_dims=["0"]),
    "--lelora-dims ['2', 'x']": dict(method="lelora", lelora_dims=["2", "x"]),
    "--lelora-locations front": dict(method="lelora", lelora_locations=["front"]),
    "--freeze-a: --lora-plus-ratio": dict(freeze_a=True, lora_plus_ratio=4.0),
    "--lalora-score fisher need a trained A": dict(method="lalora", freeze_a=True, lalora_score="fisher")}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message, tmp_path):
    s = settings(**REFUSED[message], out=str(tmp_path / "run"))
    with refused(re.escape(message)):
        program.check(s, allocators.policy(s.method))
        allocators.METHODS[s.method](Tiny(dim=32, hidden=48), s, s.steps or 60)
