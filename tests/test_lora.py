"""The LoRA layer, its optimizer and its files, against PEFT and torch."""

import json
from collections import namedtuple

import pytest
import torch
from test_model import NO_DROPOUT, both
from tiny import Tiny, refused

import lora
from extras import adapter_files

peft = pytest.importorskip("peft")

Family = namedtuple("Family", "changes targets task_type")  # of test_model's settings; what is adapted; PEFT's word
FAMILIES = {
    "roberta": Family(NO_DROPOUT, ["query", "value", "out", "down"], "SEQ_CLS"),
    "bert": Family(NO_DROPOUT, ["query", "out", "down"], "SEQ_CLS"),
    "deberta": Family(NO_DROPOUT, ["query", "key", "value", "out", "up", "down"], "SEQ_CLS"),
    "llama": Family(dict(num_key_value_heads=2), ["query", "value", "up", "down"], "CAUSAL_LM"),
    "vit": Family({}, ["query", "value", "up"], None)}


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
        return torch.nn.functional.cross_entropy(logits, labels)
    real = inputs["mask"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1][real], inputs["tokens"][:, 1:][real])


def peft_layers(theirs, model):
    """PEFT's LoRA layers of the blocks, by our names."""
    every = lora.sites(model, [kind for kind in lora.TARGETS if hasattr(model.blocks[0], kind)])
    found = {name: theirs.base_model.model.get_submodule(model.hf_name(name, module=True)) for name, _, _ in every}
    return {name: layer for name, layer in found.items() if hasattr(layer, "lora_A")}


def same_parameters(layer, theirs, **tolerance):
    """A, B and DoRA's lengths are those of PEFT's layer."""
    for part, key in (("A", "lora_A"), ("B", "lora_B"), ("magnitude", "lora_magnitude_vector")):
        if getattr(layer, part) is not None:
            torch.testing.assert_close(getattr(layer, part), getattr(theirs, key).default.weight, **tolerance)


def test_g_switches_off_and_scales_components():
    layer, x = lora.attach(Tiny(), {"blocks.1.query": 5}, alpha=10)["blocks.1.query"], torch.randn(4, 7, 12)
    layer.B.data.normal_()
    for g, rank in ((torch.tensor([1.0, 0.0, 0.5, 0.0, -2.0]), 3), (torch.tensor([0.7]), 5), (torch.zeros(1), 0)):
        layer.g = g
        update = 2.0 * layer.B.detach() @ torch.diag(g.expand(5)) @ layer.A.detach()
        torch.testing.assert_close(layer(x), x @ (layer.weight + update).T + layer.bias, rtol=1e-4, atol=1e-4)
        A, B = layer.factors()
        assert len(A) == rank == layer.let_through().sum()  # what is switched off is left out
        torch.testing.assert_close(layer.scale * B @ A, update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.delta(), update, rtol=1e-5, atol=1e-5)


def same_in_peft(model, base, folder, family, tolerance=1e-4):
    """Save the adapter in `folder`: PEFT gives the same logits on the untouched base, also merged, and so do we.

    Returns the ranks that PEFT found, {our name: rank}.
    """
    adapter_files.save_adapter(model.eval(), folder, str(base), FAMILIES[family].task_type, head=family != "llama")
    theirs, again = pair(family, base)
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    real = inputs["mask"] if family == "llama" else slice(None)
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ranks = {name: len(layer.lora_A.default.weight) for name, layer in peft_layers(loaded, model).items()}
    layers, dropout = adapter_files.load_adapter(again, folder), max(layer.dropout for layer in lora.adapters(model).values())
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert all(layer.dropout == dropout for layer in layers.values())
    with torch.no_grad():
        expected = model(**inputs)[real]
        found = [loaded(**their_inputs).logits, loaded.merge_and_unload()(**their_inputs).logits, again(**inputs)]
        for logits in found:
            torch.testing.assert_close(logits[real], expected, rtol=0, atol=tolerance)
    return ranks


def test_unusable_settings_and_files_are_one_line(tmp_path):
    folder, model = tmp_path / "adapter", Tiny()
    folder.mkdir()
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    for text, message in [(None, "not found"), ("{", "not a JSON object"), ("[]", "JSON object"),
                          (json.dumps(good | {"lora_alpha": "x"}), "numbers"), (json.dumps(good), "damaged")]:
        if text is not None:
            (folder / "adapter_config.json").write_text(text)
        with refused(message):
            adapter_files.load_adapter(model, folder)
        (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
