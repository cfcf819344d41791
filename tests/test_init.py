"""The papers' baselines that combine with policies: PiSSA, MiLoRA, DoRA, LoRA+ and LoRA-FA, against PEFT and NumPy."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_lora import FAMILIES, batch, losses, pair, pass_of, peft, peft_layers, same_in_peft, same_parameters
from tiny import POLICIES, Tiny, batches, refused, settings, train, training_of

import allocators
import lora
import train as program
from extras import adapter_files

loraplus = pytest.importorskip("peft.optimizers")

OPTIONS = {"pissa": dict(init="pissa"), "milora": dict(init="milora"), "dora": dict(dora=True),
           "lora+": dict(lora_plus_ratio=4.0), "lora-fa": dict(freeze_a=True),
           "pissa, dora": dict(init="pissa", dora=True)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------------------------------------- beside PEFT


def same_start(allocator, wrapped):
    """PiSSA's is PEFT's; else our adapters get PEFT's A, and both a B that is not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in allocator.layers.items():
        A, B = (getattr(wrapped[name], key).default.weight.data for key in ("lora_A", "lora_B"))
        if layer.magnitude is not None:
            torch.testing.assert_close(layer.magnitude, wrapped[name].lora_magnitude_vector.default.weight)
        if layer.start is None:
            layer.A.data.copy_(A)
            layer.B.data.copy_(0.1 * torch.randn(B.shape, generator=generator))
            B.copy_(layer.B)
            continue
        sign = (layer.A.data * A).sum(1).sign()  # a pair of singular vectors may be turned round
        A.mul_(sign[:, None])
        B.mul_(sign)
        torch.testing.assert_close(layer.A.data, A, rtol=1e-4, atol=1e-4)  # PEFT decomposes in float32
        torch.testing.assert_close(layer.B.data, B, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.weight, wrapped[name].base_layer.weight, rtol=1e-4, atol=1e-5)
        assert all(t.device.type == "cpu" for t in layer.start)


def optimizer_of(theirs, s):
    """PEFT's; eps is above rounding noise, of which else a full step of random sign would be taken."""
    trained = [p for name, p in theirs.named_parameters() if p.requires_grad and not (s.freeze_a and "lora_A" in name)]
    if s.lora_plus_ratio == 1:
        return torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay, eps=1e-4)
    return loraplus.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=s.lr, loraplus_lr_ratio=s.lora_plus_ratio,
                                              loraplus_weight_decay=s.weight_decay, eps=1e-4)


@pytest.mark.parametrize("family, changes", [
    *((family, dict(scaling=scaling)) for family in ("roberta", "llama", "vit") for scaling in ("nominal", "rslora")),
    ("llama", dict(dropout=0.3)), ("roberta", dict(init="pissa")), ("llama", dict(init="pissa")),
    ("llama", dict(init="pissa", dora=True)),
    *((family, dict(dora=True, dropout=p)) for family in ("roberta", "llama") for p in (0.0, 0.3)),
    ("llama", dict(lora_plus_ratio=3.0)), ("llama", dict(lora_plus_ratio=3.0, dora=True)),
    ("llama", dict(freeze_a=True))], ids=str)
def test_training_is_pefts(family, changes, tmp_path):
    """Same start, losses and weights on the same batches with the same dropout; PEFT reads the adapter."""
    theirs, ours = pair(family, tmp_path / "base")
    decay = 0.0 if "init" in changes else 0.1  # train.py does not decay what is W's own
    s = settings(targets=FAMILIES[family].targets, alpha=12.0, lr=5e-3, weight_decay=decay, **changes)
    _, inputs, _ = batch(family, torch.Generator().manual_seed(2))
    plain = ours(**inputs)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=s.dropout, use_dora=s.dora, use_rslora=s.scaling == "rslora",
        target_modules=[ours.hf_name(name, module=True) for name, _, _ in lora.sites(ours, s.targets)],
        init_lora_weights="pissa" if s.init == "pissa" else True)).train()
    allocator, wrapped = allocators.Allocator(ours, s, 10), peft_layers(theirs, ours)
    torch.testing.assert_close(ours(**inputs), plain, rtol=1e-4, atol=1e-4)
    assert wrapped.keys() == allocator.layers.keys()
    same_start(allocator, wrapped)
    other, training = optimizer_of(theirs, s), training_of(allocator, "lm" if family == "llama" else "classify")
    ours.head.requires_grad_(False)
    for group in training.optimizers[0].param_groups:
        group["eps"] = 1e-4
    generator = torch.Generator().manual_seed(1)
    starts = {p: p.detach().clone() for layer in allocator.layers.values() for p in (layer.A, layer.B)}
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
        same_parameters(layer, wrapped[name], rtol=1e-3, atol=2e-4)
        assert ((layer.A - starts[layer.A]).abs().max() > 1e-3) != s.freeze_a
        assert (layer.B - starts[layer.B]).abs().max() > 1e-3
    if s.freeze_a:
        assert set(training.optimizers[0].state) == {stack.B for stack in allocator.stacks}
        assert all(torch.equal(layer.A, starts[layer.A]) for layer in allocator.layers.values())
    same_in_peft(ours, tmp_path / "base", tmp_path / "adapter", family, tolerance=1e-3)


# ---------------------------------------------------------------------------------------------- PiSSA, MiLoRA


@pytest.mark.parametrize("init", ["lora", "pissa", "milora"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_detaching_gives_w_back_and_merging_keeps_what_it_has_become(init, dtype, tolerance):
    """In bfloat16 the layer adds what was taken off W, but for the rounding of the weight."""
    plain, x = Tiny().to(dtype), torch.randn(3, 12, dtype=dtype)
    model = copy.deepcopy(plain)
    allocator = allocators.Allocator(model, settings(init=init, alpha=12.0), 10)
    for name, layer in allocator.layers.items():
        W = plain.get_submodule(name).weight
        assert torch.equal(layer.weight, W) == (init == "lora") and layer.A.dtype == layer.B.dtype == torch.float32
        torch.testing.assert_close(layer.weight.float() + layer.delta(), W.float(), rtol=0, atol=tolerance)
        if init != "lora":  # W's four largest or smallest components
            U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
            part = {"pissa": slice(4), "milora": slice(-4, None)}[init]
            np.testing.assert_allclose(layer.delta(), (U[:, part] * S[part]) @ Vh[part], atol=tolerance)
            assert torch.equal(layer.A, layer.A.to(dtype).float())
        if name.endswith("value"):
            layer.B.data.normal_(std=0.1)
            W, y = (layer.weight.float() + layer.delta()).to(dtype), layer(x)
            layer.merge()
            layer.merge()  # once is enough
            assert torch.equal(layer.weight, W)
            torch.testing.assert_close(layer(x), y, rtol=25 * tolerance, atol=25 * tolerance)
        lora.detach(model, name)
        now = model.get_submodule(name).weight
        torch.testing.assert_close(now, W, rtol=0, atol=0 if init == "lora" or name.endswith("value") else tolerance)
    assert not lora.adapters(model) and model.state_dict().keys() == plain.state_dict().keys()


# ---------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("bias, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_doras_matrix_and_its_merge(bias, dtype):
    """The layer is m V / |V| in float64 NumPy, g included; merging only rounds."""
    torch.manual_seed(0)
    layer = lora.DoraLinear(torch.nn.Linear(40, 24, bias=bias).requires_grad_(False).to(dtype), 4, 2.0)
    layer.B.data.normal_(std=0.1)
    layer.g = torch.tensor([1.0, 0.0, 0.5, -2.0])
    layer.magnitude.data.mul_(torch.rand(24) + 0.5)
    x = torch.randn(3, 7, 40).to(dtype)
    A, B, m, W, g = (t.detach().double().numpy() for t in (layer.A, layer.B, layer.magnitude, layer.weight, layer.g))
    V = W + 2.0 * (B * g) @ A
    V *= (m / np.linalg.norm(V, axis=1))[:, None]
    expected = x.double().numpy() @ V.T + (layer.bias.double().numpy() if bias else 0)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(layer(x).detach().double(), expected, **tolerance)
    layer.merge()
    np.testing.assert_allclose(layer.weight.double(), V, **tolerance)
    np.testing.assert_allclose(layer(x).detach().double(), expected, **tolerance)


def test_dora_without_active_components_keeps_its_lengths(tmp_path):
    model = Tiny()
    allocator = allocators.Allocator(model, settings(dora=True), 10)
    for layer in allocator.layers.values():
        layer.g = torch.zeros(1)
        layer.magnitude.data.mul_(torch.rand(12) + 0.5)
    again, x = Tiny(), torch.randn(9, 12)
    assert (model(x) - again(x)).abs().max() > 1e-2
    adapter_files.save_adapter(model, tmp_path / "adapter", "base")
    adapter_files.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x), model(x))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "magnitude" not in key}, file)
    with refused("needs a lora_magnitude_vector"):
        adapter_files.load_adapter(Tiny(), tmp_path / "adapter")


def test_a_row_of_zeros_stays_finite_under_dora():
    linear = torch.nn.Linear(6, 5).requires_grad_(False)
    linear.weight[2] = 0
    layer = lora.DoraLinear(linear, 2, 1.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(5):
        layer(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters()) and layer(torch.randn(3, 6)).isfinite().all()


# ---------------------------------------------------------------------------------------------- combinations


PAIRS = [(method, option) for method in allocators.METHODS for option in OPTIONS]
MEANINGLESS = {"pissa": {"adalora", "lalora", "lelora"}, "dora": {"lelora"}, "lora+": {"adalora", "lelora"},
               "lora-fa": {"adalora", "lelora"}}
MEANINGLESS |= {"milora": MEANINGLESS["pissa"], "pissa, dora": MEANINGLESS["pissa"]}


@pytest.mark.parametrize("method, option", PAIRS)
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
    "--adalora-t-final 65": dict(method="adalora", adalora_t_final=65),
    "--adalora-t-init -1": dict(method="adalora", adalora_t_init=-1),
    "--credit-steps 60": dict(method="credit", credit_steps=60),
    "--weightlora-keep 7": dict(method="weightlora", weightlora_keep=7),
    "--weightlora-keep 9": dict(method="random", weightlora_keep=9),
    "--weightlora-keep -1": dict(method="weightlora", weightlora_keep=-1),
    "--weightlora-steps 60": dict(method="weightlora", weightlora_steps=60),
    "--weightlora-steps 1": dict(method="weightlora", weightlora_steps=1),
    "--weightlora-steps 0": dict(method="weightlora", steps=1),
    "--rank 17: weightlora+": dict(method="weightlora+", rank=17),
    "overlap where a matrix has 32 singular components; use at most 8": dict(method="lelora", rank=9),
    "--lelora-dims ['0']": dict(method="lelora", lelora_dims=["0"]),
    "--lelora-dims ['2', 'x']": dict(method="lelora", lelora_dims=["2", "x"]),
    "--lelora-dims ['-2']": dict(method="lelora", lelora_dims=["-2"]),
    "--lelora-locations front": dict(method="lelora", lelora_locations=["front"]),
    "--freeze-a: --lora-plus-ratio": dict(freeze_a=True, lora_plus_ratio=4.0),
    "--lalora-score fisher need a trained A": dict(method="lalora", freeze_a=True, lalora_score="fisher")}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message, tmp_path):
    s = settings(**REFUSED[message], out=str(tmp_path / "run"))
    with refused(re.escape(message)):
        program.check(s, allocators.policy(s.method))
        allocators.METHODS[s.method](Tiny(dim=32, hidden=48), s, s.steps or 60)
