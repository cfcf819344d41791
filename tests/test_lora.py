"""The LoRA layer, its optimizer and its files, against PEFT and torch."""

import json

import pytest
import torch
from tiny import Tiny

import lora
import model as models
from model import UserError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
TEXT = dict(SMALL, vocab_size=60, max_position_embeddings=40, num_labels=3)
FAMILIES = {
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(
        **TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        **SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3)),
}
PEFT_TARGETS = {"roberta": ["query", "value", "output.dense"], "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
                "vit": ["q_proj", "v_proj", "fc1"]}
TARGETS = {"roberta": ["query", "value", "out", "down"], "llama": ["query", "value", "up", "down"],
           "vit": ["query", "value", "up"]}
ROLES = {"q_proj": "query", "v_proj": "value", "fc1": "up", "up_proj": "up", "down_proj": "down",
         "query_proj": "query", "key_proj": "key", "value_proj": "value"}


def pair(family, folder):
    """The same random weights in transformers and here."""
    torch.manual_seed(7)
    theirs = FAMILIES[family]()
    theirs.save_pretrained(folder)
    return theirs, models.load(folder, "lm" if family == "llama" else "classify", 3)


def batch(family, generator):
    """A random batch as (their inputs, our inputs, labels); texts are padded on the right."""
    if family == "vit":
        pixels = torch.randn(6, 1, 8, 8, generator=generator)
        return {"pixel_values": pixels}, {"pixels": pixels}, torch.randint(3, (6,), generator=generator)
    tokens = torch.randint(5, 60, (6, 11), generator=generator)
    lengths = torch.randint(4, 12, (6,), generator=generator)
    mask = torch.arange(11) < lengths[:, None]
    tokens[~mask] = 1
    labels = torch.randint(3, (6,), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask.long()}, {"tokens": tokens, "mask": mask}, labels


def losses(family, logits, inputs, labels):
    if family != "llama":
        return torch.nn.functional.cross_entropy(logits, labels)
    real = inputs["mask"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1][real], inputs["tokens"][:, 1:][real])


def peft_layers(theirs):
    """PEFT's LoRA layers by our names, told apart by block index and by the order of projections in a block."""
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            index = next(int(part) for part in name.split(".") if part.isdigit())
            leaf = name.split(".")[-1]
            if leaf == "dense":
                leaf = "out" if "attention" in name else "up" if "intermediate" in name else "down"
            found[f"blocks.{index}.{ROLES.get(leaf, leaf)}"] = module
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_twenty_adamw_steps_equal_pefts(family, rslora, tmp_path):
    theirs, ours = pair(family, tmp_path)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, use_rslora=rslora,
                                                         target_modules=PEFT_TARGETS[family]))
    ranks = {name: 4 for name, _, _ in lora.sites(ours, TARGETS[family])}
    layers = lora.attach(ours, ranks, alpha=12, nominal=4, scaling="rslora" if rslora else "nominal")
    wrapped = peft_layers(theirs)
    assert wrapped.keys() == layers.keys()
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        layer.A.data = wrapped[name].lora_A.default.weight.detach().clone()
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator)
        wrapped[name].lora_B.default.weight.data = layer.B.detach().clone()
    theirs.train()
    ours.train()
    # eps above rounding noise: a gradient that is only noise would take full steps of random sign in either
    options = dict(lr=5e-3, weight_decay=0.1, eps=1e-5)
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **options)
    our_optimizer = torch.optim.AdamW([p for layer in layers.values() for p in (layer.A, layer.B)], **options)
    moved = 0.0
    for _ in range(20):
        their_inputs, inputs, labels = batch(family, generator)
        their_loss = losses(family, theirs(**their_inputs).logits, inputs, labels)
        loss = losses(family, ours(**inputs), inputs, labels)
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-4)
        for optimizer, value in ((their_optimizer, their_loss), (our_optimizer, loss)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for name, layer in layers.items():
        assert (layer.A - wrapped[name].lora_A.default.weight).abs().max() < 1e-4
        assert (layer.B - wrapped[name].lora_B.default.weight).abs().max() < 1e-4
        moved = max(moved, layer.B.grad.abs().max().item())
    assert moved > 1e-4  # the comparison is not one of zeros


def test_g_switches_off_and_scales_components():
    layer, x = lora.attach(Tiny(), {"blocks.1.query": 5}, alpha=10)["blocks.1.query"], torch.randn(4, 7, 12)
    layer.B.data.normal_()
    for g, rank in ((torch.tensor([1.0, 0.0, 0.5, 0.0, -2.0]), 3), (torch.tensor([0.7]), 5), (torch.zeros(1), 0)):
        layer.g = g
        update = 2.0 * layer.B.detach() @ torch.diag(g.expand(5)) @ layer.A.detach()
        torch.testing.assert_close(layer(x), x @ (layer.weight + update).T + layer.bias, rtol=1e-4, atol=1e-4)
        A, B = layer.factors()
        assert len(A) == rank == layer.active_rank()  # what is switched off is left out
        torch.testing.assert_close(layer.scale * B @ A, update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.delta(), update, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_adapters_input_only():
    torch.manual_seed(0)
    layer = lora.LoraLinear(torch.nn.Linear(64, 16), 4, 1.0, dropout=0.5).train()
    x = torch.randn(500, 64)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)  # B is zero: nothing but the frozen path, undropped
    layer.B.data.normal_()
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), plain + dropped @ layer.A.T @ layer.B.T)
    layer.eval()
    torch.testing.assert_close(layer(x), plain + x @ layer.A.T @ layer.B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_detach(dtype):
    model = Tiny().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = lora.attach(model, {name: 4 for name, _, _ in lora.sites(model, ["query", "up"])}, alpha=8)
    for layer in layers.values():
        layer.B.data.normal_(std=0.05)
        assert layer.A.dtype == layer.B.dtype == torch.float32
    x = torch.randn(3, 12, dtype=dtype)
    plain = model(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name, layer in layers.items():
        merged = layer.weight.float() + layer.delta()
        layer.merge()
        layer.merge()  # once is enough
        assert torch.equal(layer.weight, merged.to(dtype))
    torch.testing.assert_close(model(x), plain, rtol=tolerance, atol=tolerance)

    other = Tiny().to(dtype)
    for name in lora.attach(other, dict.fromkeys(layers, 4), alpha=8):
        lora.detach(other, name)
    assert not lora.adapters(other) and other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_parameter_counts_and_gradients(tmp_path):
    _, model = pair("llama", tmp_path)
    ranks = {name: 1 + i % 3 for i, (name, _, _) in enumerate(lora.sites(model, ["key", "gate", "down"]))}
    lora.attach(model, ranks, alpha=4)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = {"key": 32 + 16, "gate": 32 + 48, "down": 48 + 32}
    assert trainable == sum(rank * shapes[name.split(".")[-1]] for name, rank in ranks.items())
    model(torch.randint(5, 60, (2, 5))).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_rank_zero_stays_plain():
    model = Tiny()
    plain = model.blocks[0].query
    layers = lora.attach(model, {"blocks.0.query": 0, "blocks.1.query": 2}, alpha=4)
    assert list(layers) == ["blocks.1.query"] and model.blocks[0].query is plain


def test_optimizer_without_masks_is_torchs_adamw():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = lora.AdamW(ours, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stack", [False, True])
def test_masked_components_stand_still_and_keep_their_own_clock(stack):
    """A component behaves as under torch's AdamW fed only the steps at which it was active, also within a stack."""
    torch.manual_seed(1)
    layers = {str(i): lora.LoraLinear(torch.nn.Linear(6, 5), 4, 1.0) for i in range(2)}
    masks = torch.ones(2, 4)
    for layer, mask in zip(layers.values(), masks):
        layer.B.data.normal_()
        layer.mask_updates(mask)
    pairs = [(layer.A, layer.B) for layer in layers.values()]
    rows = [[torch.nn.Parameter(A.detach()[k].clone()) for k in range(4)] for A, _ in pairs]
    columns = [[torch.nn.Parameter(B.detach()[:, k].clone()) for k in range(4)] for _, B in pairs]
    alone = [[torch.optim.AdamW(both, lr=1e-2, weight_decay=0.2) for both in zip(*some)] for some in zip(rows, columns)]
    held = [p for pair in pairs for p in pair]
    if stack:
        held = lora.Stack(layers).parameters
    optimizer = lora.AdamW(held, lr=1e-2, weight_decay=0.2)
    for step in range(60):
        masks.copy_(torch.rand(2, 4) < 0.4)
        before = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
        grads = [(torch.randn(4, 6), torch.randn(5, 4)) for _ in pairs]
        for (A, B), grad in zip(pairs, grads):
            A.grad, B.grad = (g.clone() for g in grad)
        lora.gather_gradients(held)
        optimizer.step()
        optimizer.zero_grad()
        for i, (A, B) in enumerate(pairs):
            still = masks[i] == 0
            assert torch.equal(A[still], before[i][0][still]) and torch.equal(B[:, still], before[i][1][:, still])
            for k in range(4):
                if masks[i, k]:
                    rows[i][k].grad, columns[i][k].grad = grads[i][0][k].clone(), grads[i][1][:, k].clone()
                    alone[i][k].step()
    for i, (A, B) in enumerate(pairs):
        torch.testing.assert_close(A.detach(), torch.stack([r.detach() for r in rows[i]]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B.detach(), torch.stack([c.detach() for c in columns[i]], 1), rtol=1e-5, atol=1e-5)


def same_in_peft(model, base, folder, family, tolerance=1e-4):
    """Save the adapter in `folder`: PEFT gives the same logits on the untouched base, also merged, and so do we.

    Returns our base model with the adapter that was read."""
    task_type = {"roberta": "SEQ_CLS", "llama": "CAUSAL_LM", "vit": None}[family]
    lora.save_adapter(model.eval(), folder, str(base), task_type, head=family != "llama")
    theirs, again = pair(family, base)
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    real = inputs["mask"] if family == "llama" else slice(None)
    expected = model(**inputs)[real]
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    lora.load_adapter(again, folder)
    for logits in (loaded(**their_inputs).logits, loaded.merge_and_unload()(**their_inputs).logits, again(**inputs)):
        torch.testing.assert_close(logits[real], expected, rtol=tolerance, atol=tolerance)
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_files_load_in_peft(family, tmp_path):
    """Non-uniform ranks, components switched off and the trained head."""
    _, model = pair(family, tmp_path / "base")
    ranks = {name: 1 + i % 4 for i, (name, _, _) in enumerate(lora.sites(model, TARGETS[family]))}
    layers = lora.attach(model, ranks, alpha=6, nominal=4)
    for i, layer in enumerate(layers.values()):
        layer.B.data.normal_(std=0.2)
        layer.g = torch.ones(layer.rank)
        layer.g[0] = 0.0 if i == 3 else 0.7  # the fourth has rank 4: one component is off
    if family != "llama":
        for p in model.head.parameters():
            p.data.normal_()
    again = same_in_peft(model, tmp_path / "base", tmp_path / "adapter", family)
    assert {n: layer.rank for n, layer in lora.adapters(again).items()} == ranks | {list(ranks)[3]: 3}


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_made_by_peft_load_here(rslora, tmp_path):
    theirs, model = pair("roberta", tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=rslora,
                             target_modules=["query", "value"], rank_pattern={"layer.1.attention.self.query": 2},
                             alpha_pattern={"value": 9})
    wrapped = peft.get_peft_model(theirs, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name or "classifier" in name:
            p.data.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    layers = lora.load_adapter(model, tmp_path / "adapter")
    assert sorted({layer.rank for layer in layers.values()}) == [2, 4]
    their_inputs, inputs, _ = batch("roberta", torch.Generator().manual_seed(5))
    torch.testing.assert_close(model(**inputs), wrapped.eval()(**their_inputs).logits, rtol=1e-4, atol=1e-4)


def test_unusable_settings_and_files_are_one_line(tmp_path):
    _, model = pair("vit", tmp_path / "base")
    with pytest.raises(UserError, match="--targets gate"):
        lora.sites(model, ["query", "gate"])
    with pytest.raises(UserError, match="wquery"):
        lora.sites(model, ["wquery"])
    with pytest.raises(UserError, match="33 components for blocks.0.query"):
        lora.attach(model, {"blocks.0.query": 33}, alpha=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    changed = [({"peft_type": "IA3"}, "IA3"), ({"lora_bias": True}, "lora_bias"), ({"bias": "all"}, "bias"),
               ({"lora_alpha": "x"}, "numbers"), ({}, "adapter_model.safetensors")]
    for text, message in [(None, "not found"), ("{", "not a JSON object"), ("[]", "JSON object"),
                          *((json.dumps(good | change), message) for change, message in changed)]:
        if text is not None:
            (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            lora.load_adapter(model, folder)
        assert "\n" not in str(error.value)
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="damaged"):
        lora.load_adapter(model, folder)
