"""model.py against transformers: logits, gradients, generation, checkpoints, the Hub, and every way a load can fail."""

import hashlib
import http.server
import json
import operator
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lora  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from model import UserError, generate, load, resolve, save  # noqa: E402

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4

BASE = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
DEBERTA = dict(relative_attention=True, position_buckets=8, max_relative_positions=12, norm_rel_ebd="layer_norm",
               position_biased_input=False, type_vocab_size=0)
# name -> (transformers' prefix, settings beside BASE)
DECODERS = {
    "llama": ("Llama", dict()),
    "llama-gqa-tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-bias-head_dim": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=12, num_key_value_heads=1)),
    "llama-llama3": ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=500.0), head_dim=16)),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=5)),
    "mistral-wide-window": ("Mistral", dict(num_key_value_heads=2, sliding_window=4096)),
    "mistral-no-window": ("Mistral", dict(num_key_value_heads=4, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2)),
    "qwen2-window": ("Qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
                                   max_window_layers=1, tie_word_embeddings=True)),
    "qwen2-layer-types": ("Qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=3, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16)),
    "qwen3-bias": ("Qwen3", dict(num_key_value_heads=1, head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "olmo2": ("Olmo2", dict(num_key_value_heads=2)),
    "olmo2-bias": ("Olmo2", dict(num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True)),
    "gpt2": ("GPT2", dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)),
    "gpt2-untied": ("GPT2", dict(tie_word_embeddings=False, n_inner=40, activation_function="relu")),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=16)),
    "gemma-untied": ("Gemma", dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=False, hidden_size=48)),
}
ENCODERS = {
    "bert": ("Bert", dict()),
    "bert-wide": ("Bert", dict(num_attention_heads=8, hidden_size=64, hidden_act="gelu_new", type_vocab_size=3)),
    "roberta": ("Roberta", dict(pad_token_id=1, bos_token_id=0, type_vocab_size=1, layer_norm_eps=1e-5)),
    "roberta-pad0": ("Roberta", dict(pad_token_id=0, bos_token_id=1, hidden_act="relu", num_hidden_layers=1)),
    "xlm-roberta": ("XLMRoberta", dict(pad_token_id=1, bos_token_id=0, type_vocab_size=1)),
    # 8 buckets up to a distance of 11: most of a batch's distances share one, or lie beyond the last
    "deberta": ("DebertaV2", dict(DEBERTA, pos_att_type="p2c|c2p", share_att_key=True)),
    "deberta-unshared": ("DebertaV2", dict(DEBERTA, pos_att_type=["c2p", "p2c"], share_att_key=False,
                                           type_vocab_size=2)),
    "deberta-c2p": ("DebertaV2", dict(DEBERTA, pos_att_type="c2p", share_att_key=True, norm_rel_ebd="none")),
    "deberta-p2c": ("DebertaV2", dict(DEBERTA, pos_att_type=["p2c"], share_att_key=True, position_biased_input=True)),
    "deberta-c2p-unshared": ("DebertaV2", dict(DEBERTA, pos_att_type="c2p", share_att_key=False, position_buckets=-1)),
    "deberta-p2c-unshared": ("DebertaV2", dict(DEBERTA, pos_att_type="p2c", share_att_key=False, position_buckets=-1,
                                               max_relative_positions=20)),
    "deberta-near": ("DebertaV2", dict(DEBERTA, pos_att_type="p2c|c2p", share_att_key=True, position_buckets=28,
                                       max_relative_positions=-1, cls_dropout=0.2, pooler_dropout=0.3)),
}
VITS = {
    "vit": ("ViT", dict(image_size=16, patch_size=4, num_channels=3)),
    "vit-gray": ("ViT", dict(image_size=[8, 12], patch_size=[4, 2], num_channels=1, qkv_bias=False, hidden_size=24)),
}


def class_of(prefix, kind):
    return getattr(transformers, f"{prefix}For{kind}".replace("GPT2ForCausalLM", "GPT2LMHeadModel"))


def build(prefix, settings, kind, seed=0, **other):
    """A transformers model with random weights, norms and biases included (their defaults would hide mistakes)."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **settings, **other})
    oracle = class_of(prefix, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return oracle


def batch(padding, B=3, T=14, vocabulary=67, pad=0, seed=1):
    """Random tokens without the special ids, and a mask with 0, 3 and 6 tokens of padding on that side, or None."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    for row in range(B):
        n = 3 * row
        if padding == "left":
            mask[row, :n] = False
        elif padding == "right" and n:
            mask[row, -n:] = False
    return torch.where(mask, tokens, pad), mask if padding else None


def close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert theirs.std() > 1e-3  # logits that are all alike would prove nothing
    assert (ours - theirs).abs().max() <= tolerance


ALL = {**DECODERS, **ENCODERS, **VITS}


def kind_of(name):
    """What `load` builds from the name's checkpoint by default, as transformers calls it."""
    return "CausalLM" if name in DECODERS else "ImageClassification" if name in VITS else "SequenceClassification"


def saved(name, folder, kind=None, shards="5GB", **other):
    """The transformers model of that name, which is also saved in `folder`."""
    oracle = build(*ALL[name], kind or kind_of(name), **other)
    oracle.save_pretrained(folder, max_shard_size=shards)
    return oracle


def inputs_for(name, padding=None, T=14, config=None):
    """A batch as our arguments and as transformers'."""
    if name in VITS:
        channels, height, width = config.image_size if config else (3, 16, 16)
        pixels = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
        return (pixels,), {"pixel_values": pixels}
    tokens, mask = batch(padding, T=T, pad=ALL[name][1].get("pad_token_id", 0))
    return (tokens, mask), {"input_ids": tokens, "attention_mask": None if mask is None else mask.long()}


def same_logits(name, oracle, ours, padding=None, T=14, tolerance=TOLERANCE):
    """Our logits, of a model or of the checkpoint in a folder, are transformers' at every real token."""
    ours = ours if isinstance(ours, torch.nn.Module) else load(ours)
    args, keywords = inputs_for(name, padding, T, ours.config)
    real = args[1] if padding and ours.head_kind == "lm" else slice(None)
    with torch.no_grad():
        close(ours(*args)[real], oracle(**keywords).logits[real], tolerance)


# ---- logits

@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_lm_logits(name, padding, tmp_path):
    oracle = saved(name, tmp_path)
    ours, ((tokens, mask), keywords) = load(tmp_path), inputs_for(name, padding)
    same_logits(name, oracle, ours, padding)
    with torch.no_grad():
        theirs = oracle(**keywords).logits
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        positions = real.flatten().nonzero()[::3, 0]
        close(ours(tokens, mask, positions=positions), theirs.flatten(0, 1)[positions])
        if padding == "right":
            close(ours(tokens, mask, right_padded=True)[real], theirs[real])
    assert ours.fresh == [] and not any(p.requires_grad for p in ours.parameters()) and not ours.training


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "olmo2", "gpt2", "qwen2", "qwen3", "gemma", *ENCODERS])
def test_text_classification(name, labels, padding, tmp_path):
    oracle = saved(name, tmp_path, "SequenceClassification", num_labels=labels)
    ours, ((tokens, mask), keywords) = load(tmp_path), inputs_for(name, padding)
    same_logits(name, oracle, ours, padding)
    with torch.no_grad():
        if name in DECODERS and padding == "right":
            close(ours(tokens, mask, right_padded=True), oracle(**keywords).logits)
        if name in ENCODERS:
            kinds = max(1, oracle.config.type_vocab_size)
            types = torch.randint(0, kinds, tokens.shape, generator=torch.Generator().manual_seed(2))
            close(ours(tokens, mask, types), oracle(**keywords, token_type_ids=types).logits)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta-unshared"])
def test_span_head(name, padding, tmp_path):
    """Logits of every real token and the loss equal those of transformers' question answering; so does a save."""
    oracle = saved(name, tmp_path / "theirs", "QuestionAnswering", hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0)
    ours, ((tokens, mask), keywords) = load(tmp_path / "theirs"), inputs_for(name, padding)
    assert ours.head_kind == "span" and ours.fresh == []
    ends = torch.tensor([[7, 7], [6, 9], [7, 8]])  # of the answers
    theirs = oracle(**keywords, start_positions=ends[:, 0], end_positions=ends[:, 1])
    logits, both = ours(tokens, mask), torch.stack((theirs.start_logits, theirs.end_logits), -1)
    real = slice(None) if mask is None else mask
    close(logits[real], both[real])
    assert (train.criterion("span", logits, ends) / ends.numel() - theirs.loss).abs() < 1e-5
    save(ours, tmp_path / "ours")
    again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert again(**keywords).start_logits[real].equal(theirs.start_logits[real])
    fresh = load(tmp_path / "theirs", head="classify", num_labels=3)
    assert fresh.fresh and all(n.startswith(("head.", "pooler.")) for n in fresh.fresh)


@pytest.mark.parametrize("labels", [1, 10])
@pytest.mark.parametrize("name", VITS)
def test_vit(name, labels, tmp_path):
    same_logits(name, saved(name, tmp_path, num_labels=labels), tmp_path)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_all_tokens_for_hooks_and_hidden_states(name, tmp_path):
    """The last block computes the first token alone for the head, and all tokens for whoever else looks."""
    oracle, ours = (m.eval() for m in gradient_models(name, tmp_path))
    inputs = inputs_for(name)[0][0]
    seen = []
    with torch.no_grad():
        logits, theirs = ours(inputs), oracle(inputs, output_hidden_states=True)
        close(ours.hidden_states(inputs), theirs.hidden_states[-1])
        assert ours.hidden_states(inputs, first_token_only=True).shape[1] == 1
        ours.blocks[-1].query.register_forward_hook(lambda module, args, output: seen.append(output))
        close(ours(inputs), logits, 1e-5)
    assert seen[0].shape == theirs.hidden_states[-1].shape


@pytest.mark.parametrize("name, rope", [("llama", {}), ("llama-llama3", LLAMA3), ("mistral", {}), ("qwen3", {}),
                                        ("llama-linear", dict(type="linear", factor=4.0))])
def test_classic_rope_settings(name, rope, tmp_path):
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling instead of rope_parameters."""
    oracle = saved(name, tmp_path)
    theta = ... if name == "mistral" else oracle.config.rope_parameters["rope_theta"]  # mistral's is the default
    edit_config(tmp_path, rope_parameters=..., rope_theta=theta, rope_scaling=rope or None)
    same_logits(name, oracle, tmp_path)


@pytest.mark.parametrize("T", [4, 5, 6, 7])
def test_window_edges(T, tmp_path):
    same_logits("mistral", saved("mistral", tmp_path), tmp_path, T=T)


@pytest.mark.parametrize("name, padding, right_padded, masked, causal", [
    ("llama-gqa-tied", None, False, False, True), ("llama-gqa-tied", "left", False, True, False),
    ("llama-gqa-tied", "right", True, False, True), ("mistral", None, False, True, False),
    ("mistral-wide-window", None, False, False, True), ("bert", None, False, False, False),
    ("bert", "right", False, True, False)])
def test_masks_only_where_they_are_needed(name, padding, right_padded, masked, causal, tmp_path, monkeypatch):
    """Without padding the attention kernel gets no mask, and is told to be causal instead: the fast path."""
    _, ours = gradient_models(name, tmp_path)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, is_causal=False, **keywords):
        calls.append((attn_mask is not None, is_causal))
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    ours(*batch(padding), **({"right_padded": True} if right_padded else {}))
    assert calls == [(masked, causal)] * ours.config.layers


@pytest.mark.parametrize("name, kind", [("llama-gqa-tied", "CausalLM"), ("gemma", "CausalLM"), ("gpt2", "CausalLM"),
                                        ("olmo2", "CausalLM"), ("qwen3", "SequenceClassification"),
                                        ("bert", "SequenceClassification"), ("vit", "ImageClassification")])
def test_bfloat16(name, kind, tmp_path):
    saved(name, tmp_path, kind, num_labels=3)
    oracle = class_of(ALL[name][0], kind).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path, dtype=torch.bfloat16)
    head = torch.bfloat16 if kind == "CausalLM" else torch.float32  # a trained head keeps small steps
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: head if n.startswith("head.") else torch.bfloat16 for n, _ in ours.named_parameters()}
    assert all(buffer.dtype == torch.float32 for buffer in ours.buffers())  # the rotary frequencies
    args, keywords = inputs_for(name, "left" if name in DECODERS else None)
    with torch.no_grad():
        theirs, logits = oracle(**keywords).logits, ours(*args)
    assert logits.dtype == head
    real = args[1] if kind == "CausalLM" else slice(None)
    # same operations in the same order: what is left is the order of sums inside kernels
    assert (logits[real] - theirs[real]).float().abs().max() <= 0.02 * theirs[real].float().abs().max()


@pytest.mark.parametrize("name", ["deberta", "deberta-unshared"])
def test_bfloat16_deberta(name, tmp_path):
    """No further from transformers' float32 logits than transformers' own bfloat16 ones, on average over batches."""
    oracle = saved(name, tmp_path, num_labels=5, initializer_range=0.1)
    rounded = transformers.DebertaV2ForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, errors = load(tmp_path, dtype=torch.bfloat16), []
    for seed in range(20):
        tokens, mask = batch("right", T=20, seed=seed)
        with torch.no_grad():
            exact, theirs = (m(tokens, attention_mask=mask.long()).logits for m in (oracle, rounded))
            errors.append([(logits - exact).abs().mean() for logits in (ours(tokens, mask), theirs)])
    mine, their = torch.tensor(errors).mean(0)
    assert 0 < mine <= their


@pytest.mark.parametrize("T", [128, 129, 300, 530])
def test_deberta_buckets(T, tmp_path):
    """DeBERTaV3's own buckets: 256, exact up to a distance of 128, then logarithmic up to 511, one for all beyond."""
    oracle = saved("deberta", tmp_path, position_buckets=256, max_relative_positions=-1, num_hidden_layers=2,
                   max_position_embeddings=512)
    same_logits("deberta", oracle, tmp_path, "right", T)


def test_deberta_pretrained(tmp_path):
    """What is published: without a classification head, with the pre-training heads' and unused position tensors."""
    oracle = saved("deberta", tmp_path, num_labels=3)
    other = {"lm_predictions.lm_head.bias": torch.zeros(67), "mask_predictions.dense.weight": torch.zeros(32, 32),
             "deberta.embeddings.position_embeddings.weight": torch.zeros(64, 32)}
    copy_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k.startswith("deberta.")} | other)
    ours = load(tmp_path, num_labels=3)
    assert ours.fresh == ["head.dense.weight", "head.dense.bias", "head.out_proj.weight", "head.out_proj.bias"]
    for name in ours.fresh:
        ours.get_parameter(name).data.copy_(dict(oracle.named_parameters())[ours.hf_name(name)])
    tokens, mask = batch("right")
    with torch.no_grad():
        close(ours(tokens, mask), oracle(tokens, attention_mask=mask.long()).logits)


@pytest.mark.parametrize("changes", [
    dict(conv_kernel_size=3), dict(pooler_hidden_act="relu"),
    dict(relative_attention=False), dict(pos_att_type="p2p|c2p"), dict(pos_att_type=...), dict(position_buckets=23),
    dict(position_buckets=1), dict(max_relative_positions="12")])
def test_deberta_settings_that_are_refused(changes, tmp_path):
    saved("deberta", tmp_path)
    edit_config(tmp_path, **changes)
    refused("config.json", *changes, args=[tmp_path])


# ---- training mode

def gradient_models(name, tmp_path, **settings):
    zero = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0) if name not in DECODERS else {}
    return saved(name, tmp_path, **zero, **settings).train(), load(tmp_path).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "qwen3", "olmo2", "gpt2", "gemma", "bert", "roberta",
                                  "deberta", "deberta-unshared", "vit"])
def test_gradients(name, checkpointing, tmp_path):
    """Without dropout, train mode gives transformers' logits and gradients (projections, norms, embeddings, head)."""
    oracle, ours = gradient_models(name, tmp_path)
    ours.checkpointing = checkpointing
    names = ["blocks.0.query.weight", "blocks.1.down.weight", "blocks.2.norm1.weight", "blocks.1.value.weight"]
    names += ["patch.weight" if name == "vit" else "embed.weight"]
    names += ["blocks.0.position_key.weight", "blocks.1.position_query.weight", "relative_embed.weight"]
    names += [n for n, _ in ours.head.named_parameters(prefix="head")]
    names = [n for n in names if n in ours.plain_names]
    parameters = [ours.get_parameter(n).requires_grad_() for n in names]
    if name == "vit":
        inputs, keywords = (torch.randn(3, 3, 16, 16),), {}
        theirs = oracle(*inputs).logits
    else:
        tokens, mask = batch("right", pad=oracle.config.pad_token_id)
        inputs, theirs = (tokens, mask), oracle(tokens, attention_mask=mask.long()).logits
    logits = ours(*inputs)
    if name in DECODERS:
        logits, theirs = logits[inputs[1]], theirs[inputs[1]]
    close(logits.detach(), theirs.detach())
    weights = torch.randn_like(theirs)
    gradients = torch.autograd.grad((logits * weights).sum(), parameters)
    their_parameters = dict(oracle.named_parameters())
    for n, gradient in zip(names, gradients):
        path = ours.hf_name(n, module=True)
        expected, = torch.autograd.grad((theirs * weights).sum(), their_parameters[path], retain_graph=True)
        together = models.stored_names(ours).get(path, [n])
        expected = models.turned(ours, n, expected).chunk(len(together))[together.index(n)]
        assert expected.abs().max() > 0
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1), n


def test_checkpointing_saves_activations(tmp_path):
    _, ours = gradient_models("llama", tmp_path)
    ours.blocks[0].query.weight.requires_grad_()
    tokens, _ = batch(None)

    def saved():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ours(tokens)
        return sum(sizes)

    plain = saved()
    ours.checkpointing = True
    assert saved() < plain / 2


@pytest.mark.parametrize("name, where", [("bert", "hidden_dropout_prob"), ("bert", "attention_probs_dropout_prob"),
                                         ("bert", "classifier_dropout"), ("roberta", "hidden_dropout_prob"),
                                         ("roberta", "attention_probs_dropout_prob"), ("roberta", "classifier_dropout"),
                                         ("vit", "hidden_dropout_prob"), ("vit", "attention_probs_dropout_prob"),
                                         ("deberta", "hidden_dropout_prob"), ("deberta", "pooler_dropout"),
                                         ("deberta", "attention_probs_dropout_prob"), ("deberta", "cls_dropout"),
                                         ("llama", "attention_dropout"), ("mistral", "attention_dropout"),
                                         ("gpt2", "embd_pdrop"), ("gpt2", "resid_pdrop"), ("gpt2", "attn_pdrop")])
def test_dropout_is_where_transformers_has_it(name, where, tmp_path, monkeypatch):
    """The same random numbers are drawn in the same order, so with the same seed even the dropped logits agree.

    For that, masks come from F.dropout, and with a hook the last block computes all tokens instead of the first.
    """
    monkeypatch.setattr(models, "dropout", torch.nn.functional.dropout)
    zero = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
                          "attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"], 0.0)
    oracle = saved(name, tmp_path, **{**zero, where: 0.4})
    ours = load(tmp_path).train()
    ours.blocks[-1].register_forward_hook(lambda *_: None)
    oracle.train()
    inputs = inputs_for(name)[0][0]
    torch.manual_seed(5)
    theirs = oracle(inputs).logits
    torch.manual_seed(5)
    logits = ours(inputs)
    close(logits, theirs)
    torch.manual_seed(6)
    assert (ours(inputs) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "llama-gqa-tied", "mistral", "qwen3", "gemma", "gpt2",
                                  "vit"])
def test_one_graph_for_the_compiler(name, tmp_path):
    """No graph break in the forward pass (the eager backend traces as any other and needs no C++ compiler)."""
    _, ours = gradient_models(name, tmp_path)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    inputs, _ = inputs_for(name, "right")
    with torch.no_grad():
        close(compiled(*inputs), ours(*inputs))  # not equal: on a CPU eager code has its own product
    torch._dynamo.reset()


# ---- names

@pytest.mark.parametrize("head, name", [(head, name) for head in ("lm", "classify") for name in (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "bert", "roberta", "deberta", "deberta-unshared", "vit")
    if head == "classify" or name in DECODERS])
def test_hf_names(name, head, tmp_path):
    """hf_name gives the tensors of transformers' checkpoints, and with module=True the paths in its models."""
    oracle = saved(name, tmp_path, kind_of(name) if head == "lm" or name == "vit" else "SequenceClassification",
                   tie_word_embeddings=False)
    ours = load(tmp_path, head=head)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert {ours.hf_name(n) for n in ours.plain_names} <= stored
    assert stored - {ours.hf_name(n) for n in ours.plain_names} <= {"vit.pooler.dense.weight", "vit.pooler.dense.bias"}
    paths = dict(oracle.named_modules())
    for module_name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert paths[ours.hf_name(module_name, module=True)].weight.shape == module.weight.shape
            assert name == "vit" or ours.hf_name(module_name, module=True) == ours.hf_name(module_name)
    assert name.startswith("deberta") or ours.hf_name("head") in paths
    assert ours.hf_name("blocks.1", module=True) in paths
    assert {ours.hf_name(n, module=True) for n in ours.plain_names} <= set(dict(oracle.named_parameters()))
    projections = ["query", "key", "value", "out", "up", "down"] + (["gate"] if name in DECODERS else [])
    assert all(isinstance(getattr(block, p), torch.nn.Linear) for block in ours.blocks for p in projections)


# ---- generation

def prompts_for(oracle, lengths=(9, 4, 7, 2), seed=3):
    T = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths])
    tokens = torch.randint(3, oracle.config.vocab_size, mask.shape, generator=generator)
    return torch.where(mask, tokens, oracle.config.pad_token_id), mask


def hf_generate(oracle, tokens, mask, n, eos):
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=eos, pad_token_id=0)
    return oracle.generate(tokens, attention_mask=mask.long(), generation_config=settings)[:, tokens.shape[1]:]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-llama3", "mistral", "mistral-no-window", "qwen2-window",
                                  "qwen3", "gemma", "gpt2", "olmo2"])
def test_generation(name, tmp_path):
    oracle = saved(name, tmp_path)
    ours = load(tmp_path)
    tokens, mask = prompts_for(oracle)
    free = hf_generate(oracle, tokens, mask, 16, None)
    assert len(free.unique()) > 4
    assert generate(ours, tokens, mask, 16, None, 0).equal(free)
    one, two = free[0, 3].item(), free[2, 5].item()  # tokens that do occur: some rows stop, perhaps all
    for eos in (one, [one, two], free[:, 4].tolist()):
        expected = hf_generate(oracle, tokens, mask, 16, eos)
        assert generate(ours, tokens, mask, 16, eos, 0).equal(expected)
    assert expected.shape[1] < 16  # every row met its end in the last case
    for eos in (None, one):  # the same rows end where a function of what is generated says so, too
        seen, ends = [], torch.arange(len(tokens)) % 7 + 3
        result = generate(ours, tokens, mask, 16, eos, 0, lambda ids: seen.append(ids.clone()) or ids.shape[1] >= ends)
        expected = hf_generate(oracle, tokens, mask, 16, eos)[:, :result.shape[1]]
        assert result.equal(torch.where(torch.arange(result.shape[1]) < ends[:, None], expected, 0))
        assert [ids.shape[1] for ids in seen] == list(range(1, result.shape[1] + 1)) and seen[-1].equal(result)
    whole = tokens[mask.all(1)]
    assert generate(ours, whole, None, 5, one, 0).equal(hf_generate(oracle, whole, torch.ones_like(whole), 5, one))
    ours.train()
    assert generate(ours, tokens, mask, 2, None, 0).equal(free[:, :2]) and ours.training
    assert generate(ours, tokens, mask, 0, None, 0).shape == (len(tokens), 0)


def test_generation_bfloat16(tmp_path):
    saved("llama", tmp_path)
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens, mask = prompts_for(oracle)
    result = generate(load(tmp_path, dtype=torch.bfloat16), tokens, mask, 10, None, 0)
    assert result.equal(hf_generate(oracle, tokens, mask, 10, None))


# ---- loading

def copy_tensors(folder, change, name="model.safetensors"):
    """Rewrite a checkpoint with `change(tensors)` applied to its dict of tensors."""
    tensors = {k: v.clone() for k, v in load_file(folder / name).items()}
    save_file(change(tensors) or tensors, folder / name, metadata={"format": "pt"})


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            raw.pop(key, None)
        else:
            raw[key] = value
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "bert", "vit"])
def test_sharded(name, tmp_path):
    oracle = saved(name, tmp_path, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(name, oracle, tmp_path)


def test_base_checkpoint_with_old_names(tmp_path):
    """Saved from the model without a head, norms called gamma and beta, without pooler, with position_ids."""
    oracle = saved("bert", tmp_path, num_labels=3)

    def change(tensors):
        renamed = {k.removeprefix("bert."): v for k, v in tensors.items()
                   if "classifier" not in k and "pooler" not in k}
        renamed = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                   for k, v in renamed.items()}
        return {**renamed, "embeddings.position_ids": torch.arange(64)[None], "cls.predictions.bias": torch.zeros(67)}

    copy_tensors(tmp_path, change)
    ours = load(tmp_path)
    assert set(ours.fresh) == {"pooler.weight", "pooler.bias", "head.weight", "head.bias"}
    with torch.no_grad():
        for name in ours.fresh:
            ours.get_parameter(name).copy_(dict(oracle.named_parameters())[ours.hf_name(name)])
        tokens, mask = batch("right")
        close(ours(tokens, mask), oracle(tokens, attention_mask=mask.long()).logits)


def test_left_overs_of_old_versions_and_other_heads_are_ignored(tmp_path):
    oracle = saved("llama", tmp_path)
    copy_tensors(tmp_path, lambda tensors: {**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                            "score.weight": torch.ones(2, 32)})
    same_logits("llama", oracle, tmp_path)


@pytest.mark.parametrize("head", ["lm", "classify"])
@pytest.mark.parametrize("stored", ["embed", "lm_head", "both", "different"])
def test_tied_weights_under_either_name(stored, head, tmp_path, caplog):
    """As in transformers: whichever is there is both; two that differ are both used, which is said."""
    saved("llama-gqa-tied", tmp_path)

    def change(tensors):
        embed = tensors["model.embed_tokens.weight"]
        head = embed + 0.1 * torch.randn(embed.shape) if stored == "different" else embed
        if stored == "lm_head":
            del tensors["model.embed_tokens.weight"]
        return tensors if stored == "embed" else {**tensors, "lm_head.weight": head.clone()}

    copy_tensors(tmp_path, change)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load(tmp_path, head=head)
    tokens, _ = batch(None)
    assert ours.embed.weight.equal(oracle.model.embed_tokens.weight)
    if head == "lm":
        with torch.no_grad():
            close(ours(tokens), oracle(tokens).logits)
            save(ours, tmp_path / "saved")
            close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits, ours(tokens))
        assert ("lm_head.weight differs" in caplog.text) == (stored == "different")


def test_what_is_not_used_is_named(tmp_path, caplog):
    """Another head (trl's value head), unknown keys of config.json, decoding settings: one line each, then as ever."""
    oracle = saved("llama-gqa-tied", tmp_path)
    assert load(tmp_path) and not caplog.text
    copy_tensors(tmp_path, lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})
    edit_config(tmp_path, residual_multiplier=0.22, transformers_version="4.0", logits_scaling=None)
    decoding = dict(do_sample=True, top_p=0.9, repetition_penalty=1.1)
    (tmp_path / "generation_config.json").write_text(json.dumps(decoding))
    ours, (tokens, _) = load(tmp_path), batch(None)
    with torch.no_grad():
        close(ours(tokens), oracle(tokens).logits)
    generate(ours, tokens, None, 2, None, 0)
    generate(ours, tokens, None, 2, None, 0)
    head, = (message for message in caplog.messages if "v_head.summary.weight" in message)
    key, = (message for message in caplog.messages if "residual_multiplier" in message)
    decoding, = (message for message in caplog.messages if "repetition_penalty 1.1" in message)
    assert "logits_scaling" not in key and "do_sample" in decoding and len(caplog.messages) == 3


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_language_model_checkpoint_gets_a_classification_head(name, tmp_path):
    prefix, settings = {**DECODERS, **ENCODERS}[name]
    build(prefix, settings, "CausalLM" if name == "llama" else "MaskedLM").save_pretrained(tmp_path)
    first, again, other = (load(tmp_path, head="classify", num_labels=5, seed=s) for s in (0, 0, 1))
    assert first.fresh and all(n.startswith("head.") for n in first.fresh)
    tokens, mask = batch("right", pad=settings.get("pad_token_id", 0))
    with torch.no_grad():
        assert first(tokens, mask).shape == (3, 5)
        assert first(tokens, mask).equal(again(tokens, mask)) and not first(tokens, mask).equal(other(tokens, mask))
    assert not first.get_parameter(first.fresh[0]).requires_grad
    save(first, tmp_path / "saved")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert oracle.config.architectures == [type(oracle).__name__] and oracle.config.num_labels == 5
    with torch.no_grad():
        assert (oracle(tokens, attention_mask=mask.long()).logits - first(tokens, mask)).abs().max() <= TOLERANCE


def test_other_number_of_labels_starts_a_new_head(tmp_path):
    saved("roberta", tmp_path, num_labels=3)
    assert load(tmp_path).fresh == []
    ours = load(tmp_path, num_labels=7)
    assert ours.fresh == ["head.out_proj.weight", "head.out_proj.bias"] and ours.config.num_labels == 7
    assert ours.head.dense.weight.equal(load(tmp_path).head.dense.weight)


def test_vit_accepts_transformers_5_names_and_base_checkpoints(tmp_path):
    oracle = saved("vit", tmp_path, num_labels=4)
    pixels = torch.randn(2, 3, 16, 16)
    names = {n: load(tmp_path).hf_name(n) for n in load(tmp_path).plain_names}
    module = {names[n]: load(tmp_path).hf_name(n, module=True) for n in names}
    assert len({k for k in module if module[k] != k}) == 3 * 16
    copy_tensors(tmp_path, lambda tensors: {module[k]: v for k, v in tensors.items() if k in module})
    with torch.no_grad():
        close(load(tmp_path)(pixels), oracle(pixels).logits)
    for spelling in (module, {k: k for k in module}):
        oracle.save_pretrained(tmp_path)
        copy_tensors(tmp_path, lambda tensors: {spelling[k].removeprefix("vit."): v for k, v in tensors.items()
                                                if k in module and "classifier" not in k})
        ours = load(tmp_path, num_labels=4)
        assert ours.fresh == ["head.weight", "head.bias"]
        ours.head.load_state_dict(oracle.classifier.state_dict())
        with torch.no_grad():
            close(ours(pixels), oracle(pixels).logits)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_converted(stored, tmp_path):
    saved("llama", tmp_path)
    copy_tensors(tmp_path, lambda tensors: {k: v.to(stored) for k, v in tensors.items()})
    tensors = load_file(tmp_path / "model.safetensors")
    ours = load(tmp_path)
    for name in ours.plain_names:
        assert ours.get_parameter(name).equal(tensors[ours.hf_name(name)].float())


def test_parameters_are_no_view_of_the_file(tmp_path):
    saved("llama", tmp_path)
    ours, weights = load(tmp_path), tmp_path / "model.safetensors"
    expected = {k: v.clone() for k, v in load_file(weights).items()}
    with open(weights, "r+b") as file:  # as when another program writes there
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert all(ours.get_parameter(n).equal(expected[ours.hf_name(n)]) for n in ours.plain_names)


def test_loading_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """When a tensor is read from the file, none of those read before is alive."""
    saved("llama", tmp_path, shards="20KB")
    alive, peak = weakref.WeakSet(), []

    class Counting:
        def __init__(self, *args, **keywords):
            self.file = safe_open(*args, **keywords)
            self.keys, self.get_slice = self.file.keys, self.file.get_slice

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, key):
            tensor = self.file.get_tensor(key)
            alive.add(tensor)
            peak.append(len(alive))
            return tensor

    monkeypatch.setattr(models, "safe_open", Counting)
    ours = load(tmp_path)
    assert len(peak) == len(ours.plain_names) and max(peak) == 1 and not alive


def test_random_named_architectures(monkeypatch, tmp_path):
    """Every built-in configuration builds (with few layers and rows), deterministically, and saves for transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, image_size=32, n_embd=32, n_layer=2, n_head=2)
    for name, raw in models.CONFIGS.items():
        family = raw["model_type"]
        monkeypatch.setitem(models.CONFIGS, name, {**raw, **{k: v for k, v in small.items() if k in raw}})
        ours, again = (load(name, num_labels=3, weights="random", seed=4) for _ in range(2))
        assert set(ours.fresh) == set(ours.plain_names)
        ours.config.raw["mark"] = 1
        assert "mark" not in again.config.raw and "mark" not in models.CONFIGS[name]
        del ours.config.raw["mark"]
        inputs = torch.randn(2, 3, 32, 32) if family == "vit" else batch(None, vocabulary=50)[0]
        with torch.no_grad():
            assert ours(inputs).equal(again(inputs)) and torch.isfinite(ours(inputs)).all()
        save(ours, tmp_path / name)
        auto = {"vit": "AutoModelForImageClassification",
                "encoder": "AutoModelForSequenceClassification"}.get(ours.config.kind, "AutoModelForCausalLM")
        oracle = getattr(transformers, auto).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert (ours(inputs) - oracle(inputs).logits).abs().max() <= TOLERANCE


def test_random_initialisation_is_that_of_transformers(tmp_path):
    for name in ("gemma", "bert", "deberta", "vit"):
        prefix, settings = ALL[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**{**BASE, **settings})
        oracle = class_of(prefix, kind_of(name))(config)
        oracle.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        ours = load(tmp_path / name, weights="random")
        theirs = dict(oracle.named_parameters())
        for n in ours.plain_names:
            expected, parameter = theirs[ours.hf_name(n, module=True)], ours.get_parameter(n)
            if expected.numel() > 100:
                assert abs(parameter.std() - expected.std()) < 0.2 * expected.std(), n
            else:
                assert parameter.dim() > 1 or parameter.equal(expected), n


def test_sizes_of_named_architectures():
    """Sizes of the named architectures in parameters, as their papers and model cards report them."""
    expected = {"minilm": 22.7e6, "smollm2": 134.5e6,
                "roberta-base": 125e6, "roberta-large": 355e6, "bert-base": 110e6, "bert-large": 335e6,
                "xlm-roberta-base": 278e6, "xlm-roberta-large": 560e6, "deberta-v3-xsmall": 70.7e6,
                "deberta-v3-small": 141e6, "deberta-v3-base": 184e6, "deberta-v3-large": 435e6,
                "gpt2": 124e6, "gpt2-medium": 355e6, "dialogpt-medium": 355e6, "smollm2-135m": 134.5e6,
                "smollm2-360m": 361.8e6, "smollm2-1.7b": 1.71e9, "llama3.1-8b": 8.03e9, "llama3.2-1b": 1.24e9,
                "llama3.2-3b": 3.21e9, "mistral-7b-v0.3": 7.25e9, "olmo2-1b": 1.48e9, "olmo2-7b": 7.30e9,
                "qwen2.5-0.5b": 0.49e9, "qwen2.5-1.5b": 1.54e9, "qwen2.5-3b": 3.09e9, "qwen2.5-7b": 7.62e9,
                "qwen3-0.6b": 0.6e9, "qwen3-1.7b": 1.72e9, "qwen3-4b": 4.02e9,
                "llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "llama3-8b": 8.03e9, "mistral-7b": 7.24e9,
                "qwen2-7b": 7.62e9, "qwen3-8b": 8.19e9, "gemma-7b": 8.54e9, "vit-b16": 86e6, "vit-l16": 304e6}
    assert set(expected) == set(models.CONFIGS) == set(models.HUB)
    for name, size in expected.items():
        config = models.normalise(models.CONFIGS[name], name)
        kind = {"encoder": models.Encoder, "vit": models.ViT}.get(config.kind, models.Decoder)
        with torch.device("meta"):
            ours = kind(config, "lm" if kind is models.Decoder else "classify")
        total = sum(p.numel() for n, p in ours.named_parameters() if not (config.tied and n == "head.weight"))
        assert abs(total - size) < 0.01 * size, (name, total)


# ---- saving

@pytest.mark.parametrize("shard_bytes", [5e9, 2e4])
@pytest.mark.parametrize("name, kind", [
    *((name, "CausalLM") for name in ("llama-gqa-tied", "llama-llama3", "gpt2", "olmo2", "mistral")),
    *((name, "SequenceClassification") for name in ("gpt2", "gemma", "qwen3", "bert", "roberta", "xlm-roberta",
                                                    "deberta")),
    ("vit", "ImageClassification")])
def test_save_loads_in_transformers(name, kind, shard_bytes, tmp_path):
    saved(name, tmp_path / "original", kind, num_labels=3)
    ours = load(tmp_path / "original")
    with torch.no_grad():
        for n in ours.plain_names:  # as if trained
            ours.get_parameter(n).add_(0.01)
    inputs = inputs_for(name)[0][0]
    save(ours, tmp_path / "saved", 5e9 if shard_bytes == 2e4 else 2e4)
    save(ours, tmp_path / "saved", shard_bytes)  # over an earlier one with other shards
    files = {p.name for p in (tmp_path / "saved").iterdir()}
    assert ("model.safetensors" in files) == (shard_bytes == 5e9) and not any("tmp" in f for f in files)
    oracle = class_of(ALL[name][0], kind).from_pretrained(tmp_path / "saved").eval()
    assert oracle.dtype == torch.float32
    with torch.no_grad():
        close(oracle(inputs).logits, ours(inputs), 1e-4)
        assert load(tmp_path / "saved")(inputs).equal(ours(inputs))


def test_save_new_head_dtype_and_adapters(tmp_path):
    saved("bert", tmp_path / "original", num_labels=2)
    ours = load(tmp_path / "original", num_labels=5, dtype=torch.bfloat16)
    layer, = lora.attach(ours, {"blocks.1.query": 2}, alpha=4).values()
    refused("blocks.1.query", "merge", call=save, args=(ours, tmp_path / "saved"))
    layer.merge()
    save(ours, tmp_path / "saved")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype="auto")
    assert oracle.config.num_labels == 5 and oracle.dtype == torch.bfloat16
    assert type(oracle).__name__ == "BertForSequenceClassification"
    assert models.find_config(tmp_path / "saved")[0].num_labels == 5


# ---- what is refused

@pytest.fixture
def llama(tmp_path):
    saved("llama-gqa-tied", tmp_path / "llama")
    return tmp_path / "llama"


def refused(*parts, call=load, args=(), **keywords):
    with pytest.raises(UserError) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("changes, parts", [
    (dict(model_type="gpt_neox"), ["gpt_neox", "llama", "vit"]), (dict(model_type=...), ["model_type"]),
    (dict(hidden_size=...), ["hidden_size", "missing"]), (dict(num_hidden_layers=0), ["num_hidden_layers", "0"]),
    (dict(hidden_size=-4), ["hidden_size", "-4"]), (dict(intermediate_size="big"), ["intermediate_size", "big"]),
    (dict(hidden_size=33, head_dim=None), ["num_attention_heads", "33"]),
    (dict(num_key_value_heads=3), ["num_key_value_heads", "3"]), (dict(head_dim=7), ["head_dim", "7"]),
    (dict(hidden_act="mish"), ["hidden_act", "mish"]), (dict(vocab_size=True), ["vocab_size"]),
    (dict(attention_dropout=1.5), ["attention_dropout", "1.5"]), (dict(rms_norm_eps="x"), ["rms_norm_eps"]),
    (dict(rope_parameters=None, rope_scaling=dict(type="yarn", factor=2.0)), ["yarn", "llama3"]),
    (dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), ["low_freq_factor"]),
    (dict(rope_parameters=dict(rope_type="dynamic", factor=8.0)), ["dynamic"]),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), ["rope"]),
    (dict(rope_parameters=dict(rope_theta=-1.0)), ["rope_theta"]), (dict(rope_scaling="linear"), ["rope"]),
    (dict(quantization_config=dict(bits=4)), ["quantization_config"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary"]), (dict(add_cross_attention=True), ["add_cross_attention"]),
    (dict(pruned_heads={"0": [1]}), ["pruned_heads"]),
    (dict(problem_type="multi_label_classification"), ["problem_type", "null"]),
])
def test_bad_config(changes, parts, llama):
    edit_config(llama, **changes)
    refused("config.json", *parts, args=(llama,))


@pytest.mark.parametrize("file, content, parts", [
    *(("config.json", content, ["JSON"]) for content in (b"{", b"[1]", b"\xff\xfe{")),
    ("model.safetensors", b"\x10" + bytes(7) + b"not JSON at all." * 9, ["damaged"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", ["Git LFS", "git lfs pull"]),
    *(("model.safetensors", keep, ["damaged"]) for keep in (0, 5, 300, -100)),
    *(("model.safetensors.index.json", content, ["index"]) for content in (b"{", b"[]", b'{"weight_map": 3}', b"{}"))])
def test_damaged_files(file, content, parts, llama):
    """`content` is what is in the file, or how many bytes of it are left."""
    whole = (llama / "model.safetensors").read_bytes()
    if file.endswith("index.json"):
        (llama / "model.safetensors").unlink()
    (llama / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    refused(file, *parts, args=(llama,))


def test_layer_types_and_window(tmp_path):
    saved("qwen2-layer-types", tmp_path)
    edit_config(tmp_path, layer_types=["full_attention"])
    refused("layer_types", "3", args=(tmp_path,))
    edit_config(tmp_path, layer_types=..., max_window_layers=2)
    assert models.find_config(tmp_path)[0].windows == [None, None, 3]
    assert transformers.AutoConfig.from_pretrained(tmp_path).layer_types[1:] == ["full_attention", "sliding_attention"]
    edit_config(tmp_path, sliding_window=-3)
    refused("sliding_window", "-3", args=(tmp_path,))


def test_missing_files(llama, tmp_path):
    weights = llama / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    refused("model.safetensors", "download", args=(llama,))
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    refused("pytorch_model.bin", "save_pretrained", "LlamaForCausalLM", args=(llama,))
    weights.write_bytes(kept)
    (llama / "config.json").unlink()
    refused("config.json", "no such file", args=(llama,))


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, parts", [
    (lambda t: {k: v for k, v in t.items() if k != QUERY}, [QUERY, "missing"]),
    (lambda t: {**t, "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, ["layers.9", "unexpected"]),
    (lambda t: {**t, QUERY.replace("weight", "bias"): torch.zeros(32)}, ["q_proj.bias", "unexpected"]),
    (lambda t: {**t, QUERY: torch.zeros(32, 31)}, [QUERY, "[32, 31]", "[32, 32]"]),
    (lambda t: {**t, QUERY: torch.zeros(32, 32, dtype=torch.int8)}, [QUERY, "I8", "floats"]),
    (lambda t: {**t, QUERY.removeprefix("model."): torch.zeros(32, 32)}, ["q_proj", "twice"]),
])
def test_wrong_tensors(change, parts, llama):
    copy_tensors(llama, change)
    refused("model.safetensors", *parts, args=(llama,))


def test_missing_language_model_head(tmp_path):
    build(*DECODERS["qwen3"], "SequenceClassification").save_pretrained(tmp_path)
    refused("lm_head.weight", "missing", args=(tmp_path, "lm"))


@pytest.mark.parametrize("shard, part", [("../secret.safetensors", "inside"), ("/etc/passwd", "inside"), (7, "inside"),
                                         ("absent.safetensors", "absent.safetensors")])
def test_bad_index(shard, part, llama):
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    save_file({"x": torch.zeros(1)}, llama.parent / "secret.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {QUERY: shard}}))
    refused("model.safetensors.index.json", part, "download", args=(llama,))


def test_bad_arguments(llama, tmp_path):
    refused("num_labels", "0", args=(llama, "classify", 0))
    refused("head", "lm", args=(llama, "tagging"))
    saved("bert", tmp_path / "bert")
    refused("head 'lm'", "bert", args=(tmp_path / "bert", "lm"))
    for name in ("no-such-model", "./nowhere", str(tmp_path / "nowhere"), "a/b/c", "../x"):
        refused("roberta-base", args=(name,))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_sequences_longer_than_the_position_table(name, tmp_path):
    saved(name, tmp_path, max_position_embeddings=20)
    ours = load(tmp_path)
    longest = 20 if name == "bert" else 18
    assert ours(torch.full((1, longest), 5)).shape == (1, 2)
    refused(str(longest + 1), str(longest), "--max-length", call=ours, args=(torch.full((1, longest + 1), 5),))


def test_images_of_another_size(tmp_path):
    saved("vit", tmp_path)
    refused("(3, 8, 16)", "(3, 16, 16)", call=load(tmp_path), args=(torch.zeros(1, 3, 8, 16),))


# ---- names and the Hub

def test_local_names(tmp_path, monkeypatch):
    assert resolve("vit-digits") == ROOT / "assets" / "vit-digits"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta-base").mkdir()
    assert resolve("roberta-base").resolve() == tmp_path / "roberta-base"  # an existing folder wins
    assert resolve(tmp_path / "roberta-base") == tmp_path / "roberta-base"


@pytest.fixture
def hub(tmp_path):
    """A server with the Hub's routes: `hub.files[repo]` maps file names to bytes, `hub.requests` is what was asked."""
    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        files, requests, fail_after, gated = {}, [], {}, set()
        sha = "0123456789abcdef0123456789abcdef01234567"

        def answer(self, status, body=b"{}", **headers):
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                cut = self.fail_after.pop(self.path.rsplit("/", 1)[-1], None)
                self.wfile.write(body[:cut])
                self.close_connection = cut is not None  # it breaks in the middle

        def do_GET(self):
            path = self.path.split("?")[0]
            self.requests.append((self.command, path, self.headers.get("Range")))
            repo, kind, file = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/[^/]+)?/?(.*)",
                                            path).groups()
            if repo in self.gated:
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            if repo not in self.files:
                return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            files = self.files[repo]
            if kind != "resolve":
                listed = [{"type": "file", "path": n, "rfilename": n, "size": len(b),
                           "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
                body = listed if kind == "tree" else {"id": repo, "sha": self.sha, "siblings": listed}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            body = files[file]
            headers = dict(ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.sha, Accept_Ranges="bytes")
            start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if start:
                headers["Content_Range"] = f"bytes {start[1]}-{len(body) - 1}/{len(body)}"
                return self.answer(206, body[int(start[1]):], **headers)
            return self.answer(200, body, **headers)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.environment = {**{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()},
                       "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub"),
                       "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                       "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    yield Hub
    server.shutdown()
    server.server_close()


def run_resolve(calls, environment, **other):
    """`resolve` in a new process (huggingface_hub reads its environment when imported) -> (path, error) per call."""
    code = (f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); import model\n"
            f"for name, weights in {calls!r}:\n"
            "    try: print(json.dumps([str(model.resolve(name, weights)), '']))\n"
            "    except model.UserError as error: print(json.dumps(['', str(error)]))")
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **other}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub(hub, tmp_path):
    """Downloads only what is needed, resumes a broken one, then works from the cache; and every failure is one line."""
    oracle = build(*DECODERS["llama"], "CausalLM")
    oracle.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    files = {p.name: p.read_bytes() for p in (tmp_path / "original").iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "model.onnx": b"x", "consolidated.safetensors": b"x", "README.md": b"x",
                "onnx/model.safetensors": b"x"}
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "vocab.txt": b"a", "vocab.json": b"{}", "merges.txt": b"a"}
    large = os.urandom(1 << 20) * 24  # huggingface_hub writes 10 MB at a time: only beyond can it resume
    hub.files = {"FacebookAI/roberta-base": {**files, **unwanted, "tokenizer.json": b"{}"},  # a short name's Hub id
                 "org/broken": {"config.json": b"{}", "model.safetensors": large}, "org/half": {**small, **unwanted},
                 "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
                 "org/gated": {"config.json": b"{}"}}
    hub.gated, hub.fail_after = {"org/gated"}, {"model.safetensors": 15 << 20}
    calls = [("org/broken", True), ("org/broken", True), ("roberta-base", True), ("org/half", False),
             ("org/absent", True), ("org/gated", True), ("org/pickled", True)]
    first, again, sharded, half, absent, gated, pickled = run_resolve(calls, hub.environment)
    assert not hub.fail_after and not again[1]  # it did break; with a retry, ours or the library's, all is there
    assert (Path(again[0]) / "model.safetensors").read_bytes() == large
    assert any(start and int(start.removeprefix("bytes=").split("-")[0]) > 0 for _, _, start in hub.requests)
    fetched = {p.name for p in Path(sharded[0]).rglob("*") if p.is_file()}
    assert fetched == set(files) | {"tokenizer.json"}
    assert not {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests} & set(unwanted)
    tokens, _ = batch(None)
    with torch.no_grad():
        close(load(sharded[0])(tokens), oracle(tokens).logits)
    assert {p.name for p in Path(half[0]).iterdir()} == set(small)
    for (path, error), parts in [(absent, ["https://huggingface.co/org/absent", "RepositoryNotFound", "tokenizer"]),
                                 (gated, ["Gated", "HF_TOKEN"]), (pickled, ["no *.safetensors", "convert"])]:
        assert not path and "\n" not in error and all(part in error for part in parts), error

    hub.requests.clear()
    cached, absent = run_resolve([("roberta-base", True), ("org/absent", True)], hub.environment, HF_HUB_OFFLINE="1")
    assert cached == sharded and not hub.requests  # offline, from the cache
    assert not absent[0] and "https://huggingface.co/org/absent" in absent[1]
    (path, error), = run_resolve([("org/absent", True)], hub.environment, HF_ENDPOINT="http://127.0.0.1:9")
    assert not path and "org/absent" in error and "\n" not in error


# ---- real checkpoints

def real(name):
    folder = os.environ.get("CHECKPOINTS")
    if not folder:
        pytest.skip("CHECKPOINTS is not set: it names the folder that holds minilm/ and smollm2-135m/")
    return Path(folder) / name


def test_minilm():
    folder = real("minilm")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ours = load(folder, num_labels=3)
    assert ours.fresh == ["head.weight", "head.bias"]
    with torch.no_grad():
        for parameter in oracle.classifier.parameters():
            parameter.normal_()  # at the start of a training they are so small that all logits look alike
        ours.head.load_state_dict(oracle.classifier.state_dict())
        tokens, mask = batch("right", T=30, vocabulary=30000)
        types = (torch.arange(30) > 12).long().expand(3, -1)
        close(ours(tokens, mask, types), oracle(tokens, attention_mask=mask.long(), token_type_ids=types).logits)


def test_smollm2():
    folder = real("smollm2-135m")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load(folder)
    assert ours.fresh == []
    tokens, mask = batch("left", T=20, vocabulary=40000, pad=2)
    with torch.no_grad():
        close(ours(tokens, mask)[mask], oracle(tokens, attention_mask=mask.long()).logits[mask])
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=2)
    expected = oracle.generate(tokens, attention_mask=mask.long(), generation_config=settings)[:, 20:]
    assert generate(ours, tokens, mask, 12, 2, 2).equal(expected)


# ---- 8-bit weights

@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa-tied", "vit"])
def test_int8(name, tmp_path):
    """Every matrix of the blocks is within half a step of its own; products, gradients, adapters and merging follow."""
    _, plain = (model.eval() for model in gradient_models(name, tmp_path))
    ours = load(tmp_path, int8=True)
    inputs = inputs_for(name)[0][0]
    for n in plain.plain_names:
        exact, kept = plain.get_parameter(n), operator.attrgetter(n)(ours)
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((kept - exact).abs() <= step / 2 + 1e-6).all() if n.startswith("blocks.") else kept.equal(exact)
        exact.data.copy_(kept)
    query = ours.blocks[0].query
    assert query.q.dtype == torch.int8 and query.q.nbytes * 4 == query.weight.nbytes
    with torch.no_grad():
        close(ours(inputs), plain(inputs))
    losses = []
    for model in (ours, plain):  # adapters on them get the gradients of the dequantised weights
        layers = lora.attach(model, {"blocks.0.query": 2, "blocks.1.down": 2}, alpha=4, dora=name == "bert")
        for i, layer in enumerate(layers.values()):
            torch.nn.init.normal_(layer.A, generator=torch.Generator().manual_seed(i))
            torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(i + 9))
        model(inputs).square().mean().backward()
        losses.append([layer.A.grad for layer in layers.values()])
    for gradient, expected in zip(*losses):
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
    refused("int8", call=lora.adapters(ours)["blocks.0.query"].split_off, args=(torch.zeros(2, 32), torch.zeros(32, 2)))
    for model in (ours, plain):
        for layer in lora.adapters(model).values():
            layer.merge()
    save(ours, tmp_path / "merged")
    with torch.no_grad():
        close(load(tmp_path / "merged")(inputs), plain(inputs))


def test_int8_of_a_real_model():
    """SmolLM2's logits within 2 % of the float ones; the matrices of its blocks take a quarter of float32's bytes."""
    folder = real("smollm2-135m")
    plain, ours = load(folder), load(folder, int8=True)
    tokens, _ = batch(None, T=60, vocabulary=40000)
    with torch.no_grad():
        exact, logits = plain(tokens), ours(tokens)
    assert (logits - exact).norm() < 0.02 * exact.norm()
    sizes = [sum(p.nbytes for p in model.blocks.parameters()) for model in (ours, plain)]
    assert sizes[0] < 0.26 * sizes[1]
