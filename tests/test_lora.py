"""The LoRA layer, its optimizer and its files, against PEFT and torch."""

import json
from collections import namedtuple

import pytest
import torch
from tiny import Tiny, refused

import lora
import model as models

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
TEXT = dict(SMALL, vocab_size=60, max_position_embeddings=40, num_labels=3)
STILL = dict(TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1)
Family = namedtuple("Family", "built config targets peft_targets task_type")
FAMILIES = {
    "roberta": Family("RobertaForSequenceClassification", transformers.RobertaConfig(**STILL),
                      ["query", "value", "out", "down"], ["query", "value", "output.dense"], "SEQ_CLS"),
    "bert": Family("BertForSequenceClassification", transformers.BertConfig(**STILL),
                   ["query", "out", "down"], ["query", "output.dense"], "SEQ_CLS"),
    "deberta": Family("DebertaV2ForSequenceClassification", transformers.DebertaV2Config(
        **STILL, relative_attention=True, pos_att_type="p2c|c2p", share_att_key=True, position_buckets=8,
        norm_rel_ebd="layer_norm", position_biased_input=False), ["query", "key", "value", "out", "up", "down"],
        ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"], "SEQ_CLS"),
    "llama": Family("LlamaForCausalLM", transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
                    ["query", "value", "up", "down"], ["q_proj", "v_proj", "up_proj", "down_proj"], "CAUSAL_LM"),
    "vit": Family("ViTForImageClassification", transformers.ViTConfig(
        **SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3),
        ["query", "value", "up"], ["q_proj", "v_proj", "fc1"], None)}
ROLES = {"q_proj": "query", "v_proj": "value", "fc1": "up", "up_proj": "up", "down_proj": "down",
         "query_proj": "query", "key_proj": "key", "value_proj": "value"}


def pair(family, folder):
    """The same random weights in transformers, saved in `folder`, and here."""
    torch.manual_seed(7)
    theirs = getattr(transformers, FAMILIES[family].built)(FAMILIES[family].config)
    theirs.save_pretrained(folder)
    return theirs.eval(), models.load(folder, "lm" if family == "llama" else "classify", 3)


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
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if hasattr(module, "lora_A") and index is not None:
            leaf = name.split(".")[-1]
            if leaf == "dense":
                leaf = "out" if "attention" in name else "up" if "intermediate" in name else "down"
            found[f"blocks.{index}.{ROLES.get(leaf, leaf)}"] = module
    return found


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
    lora.save_adapter(model.eval(), folder, str(base), FAMILIES[family].task_type, head=family != "llama")
    theirs, again = pair(family, base)
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    real = inputs["mask"] if family == "llama" else slice(None)
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ranks = {name: len(layer.lora_A.default.weight) for name, layer in peft_layers(loaded).items()}
    layers, dropout = lora.load_adapter(again, folder), max(layer.dropout for layer in lora.adapters(model).values())
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
            lora.load_adapter(model, folder)
        (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
