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
ALL = {**DECODERS, **ENCODERS, **VITS}


# ---- set-up that tests share

def class_of(name, kind=None):
    """transformers' class of the name in ALL, by default what `load` builds from its checkpoint."""
    default = "CausalLM" if name in DECODERS else "ImageClassification" if name in VITS else "SequenceClassification"
    return getattr(transformers, f"{ALL[name][0]}For{kind or default}".replace("GPT2ForCausalLM", "GPT2LMHeadModel"))


def saved(name, folder, kind=None, shards="5GB", **other):
    """transformers' model, saved, with random norms and biases, too: their defaults would hide mistakes."""
    torch.manual_seed(0)
    prefix, settings = ALL[name]
    oracle = class_of(name, kind)(getattr(transformers, f"{prefix}Config")(**{**BASE, **settings, **other})).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    oracle.save_pretrained(folder, max_shard_size=shards)
    return oracle


def training_models(name, folder, **settings):
    """transformers' model and ours in training mode, without dropout."""
    zero = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0) if name not in DECODERS else {}
    return saved(name, folder, **zero, **settings).train(), load(folder).train()


def batch(padding, B=3, T=14, vocabulary=67, pad=0, seed=1):
    """Random tokens without the special ids, and a mask with 0, 3 and 6 tokens of padding on that side, or None."""
    tokens = torch.randint(3, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))
    lengths, places = T - 3 * torch.arange(B)[:, None], torch.arange(T)
    mask = {None: places >= 0 * lengths, "left": places >= T - lengths, "right": places < lengths}[padding]
    return torch.where(mask, tokens, pad), mask if padding else None


def inputs_for(name, padding=None, T=14, config=None):
    """A batch as our arguments and as transformers'."""
    if name in VITS:
        channels, height, width = config.image_size if config else (3, 16, 16)
        pixels = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
        return (pixels,), {"pixel_values": pixels}
    tokens, mask = batch(padding, T=T, pad=ALL[name][1].get("pad_token_id", 0))
    return (tokens, mask), {"input_ids": tokens, "attention_mask": None if mask is None else mask.long()}


@torch.no_grad()
def run(model, *args, **keywords):
    """Logits of our model, or of transformers', whose masks are of integers."""
    if isinstance(model, transformers.PreTrainedModel) and len(args) == 2:
        args, keywords["attention_mask"] = args[:1], None if args[1] is None else args[1].long()
    output = model(*args, **keywords)
    return getattr(output, "logits", output)


def close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert theirs.std() > 1e-3  # logits that are all alike would prove nothing
    assert (ours - theirs).abs().max() <= tolerance


def same_logits(name, oracle, ours, padding=None, T=14, tolerance=TOLERANCE):
    """Our logits, of a model or of the checkpoint in a folder, are transformers' at every real token."""
    ours = ours if isinstance(ours, torch.nn.Module) else load(ours)
    args, keywords = inputs_for(name, padding, T, ours.config)
    real = args[1] if padding and ours.head_kind == "lm" else slice(None)
    close(run(ours, *args)[real], run(oracle, **keywords)[real], tolerance)


def copy_tensors(folder, change, name="model.safetensors"):
    """Rewrite a checkpoint with `change(tensors)` applied to its dict of tensors."""
    tensors = {k: v.clone() for k, v in load_file(folder / name).items()}
    save_file(change(tensors) or tensors, folder / name, metadata={"format": "pt"})


def copy_fresh(ours, oracle):
    """Give our new parameters the oracle's values."""
    for name in ours.fresh:
        ours.get_parameter(name).data.copy_(dict(oracle.named_parameters())[ours.hf_name(name)])


def edit_config(folder, **changes):
    """Set keys of a config.json, or remove those that are `...`."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def refused(*parts, call=load, args=(), **keywords):
    with pytest.raises(UserError) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    for part in parts:
        assert part in message, message


# ---- logits

CLASSIFIERS = ["llama-gqa-tied", "mistral", "olmo2", "gpt2", "qwen2", "qwen3", "gemma", *ENCODERS]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name, labels", [*((name, None) for name in DECODERS),
                                          *((name, labels) for name in CLASSIFIERS for labels in (1, 3))])
def test_logits(name, labels, padding, tmp_path):
    """Of a language model, at all tokens or some; of a classifier with `labels`; with the paddings and token types."""
    oracle = saved(name, tmp_path, labels and "SequenceClassification", **({"num_labels": labels} if labels else {}))
    ours, ((tokens, mask), keywords) = load(tmp_path), inputs_for(name, padding)
    same_logits(name, oracle, ours, padding)
    theirs, real = run(oracle, **keywords), slice(None)
    if labels is None:
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        positions = real.flatten().nonzero()[::3, 0]
        close(run(ours, tokens, mask, positions=positions), theirs.flatten(0, 1)[positions])
    if name in DECODERS and padding == "right":
        close(run(ours, tokens, mask, right_padded=True)[real], theirs[real])
    if name in ENCODERS:
        kinds = max(1, oracle.config.type_vocab_size)
        types = torch.randint(0, kinds, tokens.shape, generator=torch.Generator().manual_seed(2))
        close(run(ours, tokens, mask, types), run(oracle, **keywords, token_type_ids=types))
    assert ours.fresh == [] and not any(p.requires_grad for p in ours.parameters()) and not ours.training


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
    oracle, ours = (m.eval() for m in training_models(name, tmp_path))
    inputs, seen = inputs_for(name)[0][0], []
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


@pytest.mark.parametrize("name, padding, masked, causal", [
    ("llama-gqa-tied", None, False, True), ("llama-gqa-tied", "left", True, False),
    ("llama-gqa-tied", "right", False, True), ("mistral", None, True, False),
    ("mistral-wide-window", None, False, True), ("bert", None, False, False), ("bert", "right", True, False)])
def test_masks_only_where_they_are_needed(name, padding, masked, causal, tmp_path, monkeypatch):
    """Without padding the attention kernel gets no mask, and is told to be causal instead: the fast path."""
    _, ours = training_models(name, tmp_path)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, is_causal=False, **keywords):
        calls.append((attn_mask is not None, is_causal))
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    ours(*batch(padding), **({"right_padded": True} if padding == "right" and name in DECODERS else {}))
    assert calls == [(masked, causal)] * ours.config.layers


@pytest.mark.parametrize("name, kind", [("llama-gqa-tied", "CausalLM"), ("gemma", "CausalLM"), ("gpt2", "CausalLM"),
                                        ("olmo2", "CausalLM"), ("qwen3", "SequenceClassification"),
                                        ("bert", "SequenceClassification"), ("vit", "ImageClassification")])
def test_bfloat16(name, kind, tmp_path):
    saved(name, tmp_path, kind, num_labels=3)
    oracle = class_of(name, kind).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path, dtype=torch.bfloat16)
    head = torch.bfloat16 if kind == "CausalLM" else torch.float32  # a trained head keeps small steps
    for n, parameter in ours.named_parameters():
        assert parameter.dtype == (head if n.startswith("head.") else torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in ours.buffers())  # the rotary frequencies
    args, keywords = inputs_for(name, "left" if name in DECODERS else None)
    theirs, logits = run(oracle, **keywords), run(ours, *args)
    assert logits.dtype == head
    real = args[1] if kind == "CausalLM" else slice(None)
    # same operations in the same order: what is left is the order of sums inside kernels
    assert (logits[real] - theirs[real]).float().abs().max() <= 0.02 * theirs[real].float().abs().max()


@pytest.mark.parametrize("name", ["deberta", "deberta-unshared"])
def test_bfloat16_deberta(name, tmp_path):
    """No further from transformers' float32 logits than transformers' own bfloat16 ones, on average over batches."""
    oracle = saved(name, tmp_path, num_labels=5, initializer_range=0.1)
    rounded = class_of(name).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, errors = load(tmp_path, dtype=torch.bfloat16), []
    for seed in range(20):
        inputs = batch("right", T=20, seed=seed)
        exact = run(oracle, *inputs)
        errors.append([(run(model, *inputs) - exact).abs().mean() for model in (ours, rounded)])
    mine, their = torch.tensor(errors).mean(0)
    assert 0 < mine <= their


@pytest.mark.parametrize("T", [128, 129, 300, 530])
def test_deberta_buckets(T, tmp_path):
    """DeBERTaV3's own buckets: 256, exact up to a distance of 128, then logarithmic up to 511, one for all beyond."""
    oracle = saved("deberta", tmp_path, position_buckets=256, max_relative_positions=-1, num_hidden_layers=2,
                   max_position_embeddings=512)
    same_logits("deberta", oracle, tmp_path, "right", T)


# ---- training mode

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "qwen3", "olmo2", "gpt2", "gemma", "bert", "roberta",
                                  "deberta", "deberta-unshared", "vit"])
def test_gradients(name, checkpointing, tmp_path):
    """Without dropout, train mode gives transformers' logits and gradients (projections, norms, embeddings, head)."""
    oracle, ours = training_models(name, tmp_path)
    ours.checkpointing = checkpointing
    names = [n for n in ours.plain_names if re.match(
        r"head|(embed|relative_embed|patch|blocks\.(0\.query|1\.down|1\.value|2\.norm1|\d\.position_.*))\.weight", n)]
    parameters = [ours.get_parameter(n).requires_grad_() for n in names]
    args, keywords = inputs_for(name, "right")
    logits, theirs = ours(*args), oracle(**keywords).logits
    if name in DECODERS:
        logits, theirs = logits[args[1]], theirs[args[1]]
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
    _, ours = training_models("llama", tmp_path)
    ours.blocks[0].query.weight.requires_grad_()
    sizes = []
    for ours.checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            ours(batch(None)[0])
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2


DROPOUTS = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
            "roberta": ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
            "vit": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
            "deberta": ["hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"],
            "llama": ["attention_dropout"], "mistral": ["attention_dropout"],
            "gpt2": ["embd_pdrop", "resid_pdrop", "attn_pdrop"]}


@pytest.mark.parametrize("name, where", [(name, where) for name, places in DROPOUTS.items() for where in places])
def test_dropout_is_where_transformers_has_it(name, where, tmp_path, monkeypatch):
    """The same random numbers are drawn in the same order, so with the same seed even the dropped logits agree.

    For that, masks come from F.dropout, and with a hook the last block computes all tokens instead of the first.
    """
    monkeypatch.setattr(models, "dropout", torch.nn.functional.dropout)
    oracle = saved(name, tmp_path, **{**dict.fromkeys(sum(DROPOUTS.values(), []), 0.0), where: 0.4}).train()
    ours = load(tmp_path).train()
    ours.blocks[-1].register_forward_hook(lambda *_: None)
    inputs, logits = inputs_for(name)[0][0], []
    for model, seed in ((oracle, 5), (ours, 5), (ours, 6)):
        torch.manual_seed(seed)
        logits.append(run(model, inputs))
    close(logits[1], logits[0])
    assert (logits[2] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "llama-gqa-tied", "mistral", "qwen3", "gemma", "gpt2",
                                  "vit"])
def test_one_graph_for_the_compiler(name, tmp_path):
    """No graph break in the forward pass (the eager backend traces as any other and needs no C++ compiler)."""
    _, ours = training_models(name, tmp_path)
    inputs, _ = inputs_for(name, "right")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    close(run(compiled, *inputs), run(ours, *inputs))  # not equal: on a CPU eager code has its own product
    torch._dynamo.reset()


# ---- names

@pytest.mark.parametrize("head, name", [(head, name) for head in ("lm", "classify") for name in (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "bert", "roberta", "deberta", "deberta-unshared", "vit")
    if head == "classify" or name in DECODERS])
def test_hf_names(name, head, tmp_path):
    """hf_name gives the tensors of transformers' checkpoints, and with module=True the paths in its models."""
    kind = "SequenceClassification" if head == "classify" and name in DECODERS else None
    oracle = saved(name, tmp_path, kind, tie_word_embeddings=False)
    ours = load(tmp_path, head=head)
    stored, names = load_file(tmp_path / "model.safetensors").keys(), {ours.hf_name(n) for n in ours.plain_names}
    assert names <= stored and stored - names <= {"vit.pooler.dense.weight", "vit.pooler.dense.bias"}
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

def hf_generate(oracle, tokens, mask, n, eos, pad=0):
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=eos, pad_token_id=pad)
    return oracle.generate(tokens, attention_mask=mask.long(), generation_config=settings)[:, tokens.shape[1]:]


@pytest.mark.parametrize("dtype, name", [*((torch.float32, name) for name in (
    "llama-gqa-tied", "llama-llama3", "mistral", "mistral-no-window", "qwen2-window", "qwen3", "gemma", "gpt2",
    "olmo2")), (torch.bfloat16, "llama")])
def test_generation(name, dtype, tmp_path):
    saved(name, tmp_path)
    oracle, ours = class_of(name).from_pretrained(tmp_path, dtype=dtype).eval(), load(tmp_path, dtype=dtype)
    oracle.generation_config.eos_token_id = None
    mask = torch.arange(9) >= 9 - torch.tensor([9, 4, 7, 2])[:, None]
    tokens = torch.randint(3, 67, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
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


# ---- loading

def renamed(tensors, prefix):
    """The tensors of a headless checkpoint of old: names without prefix, norms called gamma and beta, no pooler."""
    names = {k: k.removeprefix(prefix).replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta") for k in tensors if "classifier" not in k and "pooler" not in k}
    return {theirs: tensors[k] for k, theirs in names.items()}


@pytest.mark.parametrize("name, prefix, others, fresh", [
    ("bert", "bert.", {"embeddings.position_ids": (1, 64), "cls.predictions.bias": (67,)},
     ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]),
    ("deberta", "", {"lm_predictions.lm_head.bias": (67,), "mask_predictions.dense.weight": (32, 32),
                     "deberta.embeddings.position_embeddings.weight": (64, 32)},
     ["head.dense.weight", "head.dense.bias", "head.out_proj.weight", "head.out_proj.bias"])])
def test_pretrained_encoder(name, prefix, others, fresh, tmp_path):
    """What is published: no classification head, but the pre-training heads' and unused position tensors."""
    oracle = saved(name, tmp_path, num_labels=3)
    copy_tensors(tmp_path, lambda tensors: renamed(tensors, prefix) | {k: torch.zeros(n) for k, n in others.items()})
    ours = load(tmp_path, num_labels=3)
    assert ours.fresh == fresh
    copy_fresh(ours, oracle)
    close(run(ours, *batch("right")), run(oracle, *batch("right")))


def test_vit_accepts_transformers_5_names_and_base_checkpoints(tmp_path):
    oracle = saved("vit", tmp_path, num_labels=4)
    ours = load(tmp_path)
    module = {ours.hf_name(n): ours.hf_name(n, module=True) for n in ours.plain_names}
    assert len({k for k in module if module[k] != k}) == 3 * 16
    copy_tensors(tmp_path, lambda tensors: {module[k]: v for k, v in tensors.items() if k in module})
    same_logits("vit", oracle, tmp_path)
    for spelling in (module, {k: k for k in module}):
        oracle.save_pretrained(tmp_path)
        copy_tensors(tmp_path, lambda tensors: {spelling[k].removeprefix("vit."): v for k, v in tensors.items()
                                                if k in module and "classifier" not in k})
        ours = load(tmp_path, num_labels=4)
        assert ours.fresh == ["head.weight", "head.bias"]
        copy_fresh(ours, oracle)
        same_logits("vit", oracle, ours)


@pytest.mark.parametrize("head", ["lm", "classify"])
@pytest.mark.parametrize("stored", ["embed", "lm_head", "both", "different"])
def test_tied_weights_under_either_name(stored, head, tmp_path, caplog):
    """As in transformers: whichever is there is both; two that differ are both used, which is said."""
    saved("llama-gqa-tied", tmp_path)

    def change(tensors):
        embed = tensors.pop("model.embed_tokens.weight")
        other = embed + 0.1 * torch.randn(embed.shape) * (stored == "different")
        return tensors | ({} if stored == "lm_head" else {"model.embed_tokens.weight": embed}) | (
            {} if stored == "embed" else {"lm_head.weight": other})

    copy_tensors(tmp_path, change)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load(tmp_path, head=head)
    tokens, _ = batch(None)
    assert ours.embed.weight.equal(oracle.model.embed_tokens.weight)
    if head == "lm":
        close(run(ours, tokens), run(oracle, tokens))
        save(ours, tmp_path / "saved")
        close(run(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tokens), run(ours, tokens))
        assert ("lm_head.weight differs" in caplog.text) == (stored == "different")


def test_what_is_not_used_is_named(tmp_path, caplog):
    """Another head (trl's), keys of config.json, decoding settings: a line each; not what old versions left there."""
    oracle = saved("llama-gqa-tied", tmp_path)
    copy_tensors(tmp_path, lambda tensors: {**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                            "score.weight": torch.ones(2, 32)})
    assert load(tmp_path) and not caplog.text
    copy_tensors(tmp_path, lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})
    edit_config(tmp_path, residual_multiplier=0.2, transformers_version="4.0", logits_scaling=None, cls_dropout=0.5)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.9, "repetition_penalty": 1.1}')
    ours, tokens = load(tmp_path), batch(None)[0]
    close(run(ours, tokens), run(oracle, tokens))
    for _ in range(2):
        generate(ours, tokens, None, 2, None, 0)
    key, head, decoding = caplog.messages
    assert key.endswith("models: residual_multiplier, cls_dropout") and head.endswith(": v_head.summary.weight")
    assert decoding.endswith(": do_sample True, repetition_penalty 1.1")


@pytest.mark.parametrize("name, kind, fresh", [
    ("llama", "CausalLM", ["head.weight"]),
    ("roberta", "MaskedLM", ["head.dense.weight", "head.dense.bias", "head.out_proj.weight", "head.out_proj.bias"]),
    ("roberta", "SequenceClassification", ["head.out_proj.weight", "head.out_proj.bias"])])
def test_new_classification_head(name, kind, fresh, tmp_path):
    """For a language model's checkpoint, or one with another number of labels; all else is the checkpoint's."""
    saved(name, tmp_path, kind)
    first, again, other = (load(tmp_path, head="classify", num_labels=5, seed=s) for s in (0, 0, 1))
    assert first.fresh == fresh and not first.get_parameter(fresh[0]).requires_grad
    assert all(p.equal(other.get_parameter(n)) == (n not in fresh or "bias" in n) for n, p in first.named_parameters())
    inputs, _ = inputs_for(name, "right")
    logits = run(first, *inputs)
    assert logits.shape == (3, 5) and logits.equal(run(again, *inputs)) and not logits.equal(run(other, *inputs))
    save(first, tmp_path / "saved")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert oracle.config.architectures == [type(oracle).__name__] and oracle.config.num_labels == 5
    assert (run(oracle, *inputs) - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_parameters_are_converted_and_no_view_of_the_file(stored, tmp_path):
    saved("llama", tmp_path)
    copy_tensors(tmp_path, lambda tensors: {k: v.to(stored) for k, v in tensors.items()})
    ours, weights = load(tmp_path), tmp_path / "model.safetensors"
    expected = {k: v.float().clone() for k, v in load_file(weights).items()}
    with open(weights, "r+b") as file:  # as when another program writes there
        file.write(bytes(weights.stat().st_size))
    assert all(ours.get_parameter(n).equal(expected[ours.hf_name(n)]) for n in ours.plain_names)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "bert", "vit"])
def test_shards_one_tensor_at_a_time(name, tmp_path, monkeypatch):
    """When a tensor is read from one of transformers' shards, none of those read before is alive."""
    oracle = saved(name, tmp_path, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    alive, peak, turned = weakref.WeakSet(), [], models.turned

    def counted(model, name, tensor):
        if not tensor.is_meta:
            alive.add(tensor)
            peak.append(len(alive))
        return turned(model, name, tensor)

    monkeypatch.setattr(models, "turned", counted)
    ours = load(tmp_path)
    assert len(peak) > 9 * ours.config.layers and max(peak) == 1 and not alive
    same_logits(name, oracle, ours)


def test_random_named_architectures(monkeypatch, tmp_path):
    """Every built-in configuration builds (with few layers and rows), deterministically, and saves for transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, image_size=32, n_embd=32, n_layer=2, n_head=2)
    for name, raw in models.CONFIGS.items():
        monkeypatch.setitem(models.CONFIGS, name, {**raw, **{k: v for k, v in small.items() if k in raw}})
        ours, again = (load(name, num_labels=3, weights="random", seed=4) for _ in range(2))
        assert set(ours.fresh) == set(ours.plain_names)
        ours.config.raw["mark"] = 1
        assert "mark" not in again.config.raw and "mark" not in models.CONFIGS[name]
        del ours.config.raw["mark"]
        inputs = torch.randn(2, 3, 32, 32) if ours.family == "vit" else batch(None, vocabulary=50)[0]
        logits = run(ours, inputs)
        assert logits.equal(run(again, inputs)) and torch.isfinite(logits).all()
        save(ours, tmp_path / name)
        auto = {"vit": "AutoModelForImageClassification",
                "encoder": "AutoModelForSequenceClassification"}.get(ours.config.kind, "AutoModelForCausalLM")
        oracle = getattr(transformers, auto).from_pretrained(tmp_path / name).eval()
        assert (logits - run(oracle, inputs)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma", "bert", "deberta", "vit"])
def test_random_initialisation_is_that_of_transformers(name, tmp_path):
    prefix, settings = ALL[name]
    torch.manual_seed(0)
    oracle = class_of(name)(getattr(transformers, f"{prefix}Config")(**{**BASE, **settings}))
    oracle.config.save_pretrained(tmp_path)
    ours, theirs = load(tmp_path, weights="random"), dict(oracle.named_parameters())
    for n in ours.plain_names:
        expected, parameter = theirs[ours.hf_name(n, module=True)], ours.get_parameter(n)
        if expected.numel() > 100:
            assert abs(parameter.std() - expected.std()) < 0.2 * expected.std(), n
        else:
            assert parameter.dim() > 1 or parameter.equal(expected), n


MILLIONS = """
    minilm 22.7 bert-base 110 bert-large 335 roberta-base 125 roberta-large 355 xlm-roberta-base 278
    xlm-roberta-large 560 deberta-v3-xsmall 70.7 deberta-v3-small 141 deberta-v3-base 184 deberta-v3-large 435
    gpt2 124 gpt2-medium 355 dialogpt-medium 355 smollm2 134.5 smollm2-135m 134.5 smollm2-360m 361.8 smollm2-1.7b 1710
    llama2-7b 6740 llama2-13b 13020 llama3-8b 8030 llama3.1-8b 8030 llama3.2-1b 1240 llama3.2-3b 3210
    mistral-7b 7240 mistral-7b-v0.3 7250 olmo2-1b 1480 olmo2-7b 7300 qwen2-7b 7620 qwen2.5-0.5b 490 qwen2.5-1.5b 1540
    qwen2.5-3b 3090 qwen2.5-7b 7620 qwen3-0.6b 600 qwen3-1.7b 1720 qwen3-4b 4020 qwen3-8b 8190 gemma-7b 8540
    vit-b16 86 vit-l16 304""".split()


def test_sizes_of_named_architectures():
    """Sizes of the named architectures in parameters, as their papers and model cards report them."""
    expected = dict(zip(MILLIONS[::2], map(float, MILLIONS[1::2])))
    assert set(expected) == set(models.CONFIGS) == set(models.HUB)
    for name, millions in expected.items():
        config = models.normalise(models.CONFIGS[name], name)
        kind = {"encoder": models.Encoder, "vit": models.ViT}.get(config.kind, models.Decoder)
        with torch.device("meta"):
            ours = kind(config, "lm" if kind is models.Decoder else "classify")
        total = sum(p.numel() for n, p in ours.named_parameters() if not (ours.tied and n == "head.weight"))
        assert abs(total / 1e6 - millions) < 0.01 * millions, (name, total)


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
    for n in ours.plain_names:  # as if trained
        ours.get_parameter(n).add_(0.01)
    inputs = inputs_for(name)[0][0]
    save(ours, tmp_path / "saved", 5e9 if shard_bytes == 2e4 else 2e4)
    save(ours, tmp_path / "saved", shard_bytes)  # over an earlier one with other shards
    files = {p.name for p in (tmp_path / "saved").iterdir()}
    assert ("model.safetensors" in files) == (shard_bytes == 5e9) and not any("tmp" in f for f in files)
    oracle = class_of(name, kind).from_pretrained(tmp_path / "saved").eval()
    assert oracle.dtype == torch.float32
    close(run(oracle, inputs), run(ours, inputs))
    assert run(load(tmp_path / "saved"), inputs).equal(run(ours, inputs))


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


INDEX = "model.safetensors.index.json"
BAD_SETTINGS = {
    "llama-gqa-tied": [
        dict(model_type="gpt_neox"), dict(model_type=...), dict(hidden_size=...), dict(hidden_size=-4),
        dict(num_hidden_layers=0), dict(intermediate_size="big"), dict(num_key_value_heads=3), dict(head_dim=7),
        dict(hidden_act="mish"), dict(vocab_size=True), dict(attention_dropout=1.5), dict(rms_norm_eps="x"),
        dict(quantization_config=dict(bits=4)), dict(partial_rotary_factor=0.5), dict(add_cross_attention=True),
        dict(pruned_heads={"0": [1]}), dict(problem_type="multi_label_classification")],
    "deberta": [
        dict(conv_kernel_size=3), dict(pooler_hidden_act="relu"), dict(relative_attention=False),
        dict(pos_att_type="p2p|c2p"), dict(pos_att_type=...), dict(position_buckets=23), dict(position_buckets=1),
        dict(max_relative_positions="12")],
    "qwen2-layer-types": [dict(layer_types=["full_attention"]), dict(sliding_window=-3)]}


@pytest.mark.parametrize("name, changes", [(name, changes) for name, rows in BAD_SETTINGS.items() for changes in rows])
def test_bad_settings(name, changes, tmp_path):
    saved(name, tmp_path)
    edit_config(tmp_path, **changes)
    (key, value), = changes.items()
    expected = dict(model_type="llama, mistral", problem_type="null", layer_types="3 entries").get(key, key)
    refused("config.json", key, "missing" if value is ... else str(value), expected, args=(tmp_path,))


@pytest.mark.parametrize("changes, part", [
    (dict(hidden_size=33, head_dim=None), "hidden_size 33"),
    (dict(rope_parameters=None, rope_scaling=dict(type="yarn", factor=2.0)), "yarn"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    (dict(rope_parameters=dict(rope_type="dynamic", factor=8.0)), "dynamic"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "rope"),
    (dict(rope_parameters=dict(rope_theta=-1.0)), "rope_theta"), (dict(rope_scaling="linear"), "rope")])
def test_settings_that_do_not_go_together(changes, part, llama):
    edit_config(llama, **changes)
    refused("config.json", part, "llama3" if "rope" in part else "", args=(llama,))


def test_windows_from_a_layer_on(tmp_path):
    saved("qwen2-layer-types", tmp_path)
    edit_config(tmp_path, layer_types=..., max_window_layers=2)
    assert models.find_config(tmp_path)[0].windows == [None, None, 3]
    assert transformers.AutoConfig.from_pretrained(tmp_path).layer_types[1:] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("file, content, parts", [
    ("config.json", None, ["no such file"]), ("model.safetensors", None, ["download"]),
    ("pytorch_model.bin", b"pickle", ["save_pretrained", "LlamaForCausalLM"]),
    *(("config.json", content, ["JSON"]) for content in (b"{", b"[1]", b"\xff\xfe{")),
    ("model.safetensors", b"\x10" + bytes(7) + b"not JSON at all." * 9, ["damaged"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", ["Git LFS", "git lfs pull"]),
    *(("model.safetensors", keep, ["damaged"]) for keep in (0, 5, 300, -100)),
    *((INDEX, content, ["download"]) for content in (b"{", b"[]", b"{}", b'{"weight_map": 3}')),
    *((INDEX, b'{"weight_map": {"a": %s}}' % name, ["inside", "download"])
      for name in (b'"../secret.safetensors"', b'"/etc/passwd"', b"7", b'"absent.safetensors"'))])
def test_missing_and_damaged_files(file, content, parts, llama):
    """`content` is what is in the file, or how many bytes of it are left."""
    whole = (llama / "model.safetensors").read_bytes()
    if file not in ("config.json", "model.safetensors"):
        (llama / "model.safetensors").rename(llama.parent / "secret.safetensors")
    if content is None:
        (llama / file).unlink()
    else:
        (llama / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    refused(file, *parts, args=(llama,))


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


def test_bad_arguments(llama, tmp_path):
    refused("num_labels", "0", args=(llama, "classify", 0))
    refused("head", "lm", args=(llama, "tagging"))
    saved("qwen3", tmp_path / "classifier", "SequenceClassification")
    refused("lm_head.weight", "missing", args=(tmp_path / "classifier", "lm"))
    saved("bert", tmp_path / "bert")
    refused("head 'lm'", "bert", args=(tmp_path / "bert", "lm"))
    for name in ("no-such-model", "./nowhere", str(tmp_path / "nowhere"), "a/b/c", "../x"):
        refused("roberta-base", args=(name,))


@pytest.mark.parametrize("name, fits, longer", [
    ("bert", (1, 20), (1, 21)), ("roberta", (1, 18), (1, 19)), ("gpt2", (1, 20), (1, 21)),
    ("vit", (1, 3, 16, 16), (1, 3, 8, 16))])
def test_inputs_that_do_not_fit(name, fits, longer, tmp_path):
    saved(name, tmp_path, **({} if name == "vit" else {"max_position_embeddings": 20}))
    ours = load(tmp_path, "classify")
    assert ours(torch.full(fits, 5)).shape == (1, 2)
    parts = [str(longer[1:]), str(fits[1:])] if name == "vit" else [str(longer[1]), str(fits[1]), "--max-length"]
    refused(*parts, call=ours, args=(torch.full(longer, 5),))


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
        files, requests, fail_after = {}, [], {}
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
            if repo not in self.files:
                status, code = (403, "GatedRepo") if repo == "org/gated" else (404, "RepoNotFound")
                return self.answer(status, X_Error_Code=code, X_Error_Message="none for you")
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
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    oracle = saved("llama", tmp_path / "original", shards="20KB")
    files = {p.name: p.read_bytes() for p in (tmp_path / "original").iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "model.onnx": b"x", "consolidated.safetensors": b"x", "README.md": b"x",
                "onnx/model.safetensors": b"x"}
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "vocab.txt": b"a", "vocab.json": b"{}", "merges.txt": b"a"}
    large = os.urandom(1 << 20) * 24  # huggingface_hub writes 10 MB at a time: only beyond can it resume
    hub.files = {"FacebookAI/roberta-base": {**files, **unwanted, "tokenizer.json": b"{}"},  # a short name's Hub id
                 "org/broken": {"config.json": b"{}", "model.safetensors": large}, "org/half": {**small, **unwanted},
                 "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    hub.fail_after = {"model.safetensors": 15 << 20}
    calls = [("org/broken", True), ("org/broken", True), ("roberta-base", True), ("org/half", False),
             ("org/absent", True), ("org/gated", True), ("org/pickled", True)]
    first, again, sharded, half, absent, gated, pickled = run_resolve(calls, hub.environment)
    assert not hub.fail_after and not again[1]  # it did break; with a retry, ours or the library's, all is there
    assert (Path(again[0]) / "model.safetensors").read_bytes() == large
    assert any(start and int(start.removeprefix("bytes=").split("-")[0]) > 0 for _, _, start in hub.requests)
    fetched = {p.name for p in Path(sharded[0]).rglob("*") if p.is_file()}
    assert fetched == set(files) | {"tokenizer.json"}
    assert not {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests} & set(unwanted)
    same_logits("llama", oracle, sharded[0])
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
    for parameter in oracle.classifier.parameters():
        parameter.data.normal_()  # at the start of a training they are so small that all logits look alike
    copy_fresh(ours, oracle)
    inputs, types = batch("right", T=30, vocabulary=30000), (torch.arange(30) > 12).long().expand(3, -1)
    close(run(ours, *inputs, types), run(oracle, *inputs, token_type_ids=types))


def test_smollm2():
    folder = real("smollm2-135m")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load(folder)
    assert ours.fresh == []
    tokens, mask = batch("left", T=20, vocabulary=40000, pad=2)
    close(run(ours, tokens, mask)[mask], run(oracle, tokens, mask)[mask])
    assert generate(ours, tokens, mask, 12, 2, 2).equal(hf_generate(oracle, tokens, mask, 12, 2, pad=2))


# ---- 8-bit weights

@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa-tied", "vit"])
def test_int8(name, tmp_path):
    """Every matrix of the blocks is within half a step of its own; products, gradients, adapters and merging follow."""
    _, plain = (model.eval() for model in training_models(name, tmp_path))
    ours = load(tmp_path, int8=True)
    inputs = inputs_for(name)[0][0]
    for n in plain.plain_names:
        exact, kept = plain.get_parameter(n), operator.attrgetter(n)(ours)
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((kept - exact).abs() <= step / 2 + 1e-6).all() if n.startswith("blocks.") else kept.equal(exact)
        exact.data.copy_(kept)
    query = ours.blocks[0].query
    assert query.q.dtype == torch.int8 and query.q.nbytes * 4 == query.weight.nbytes
    close(run(ours, inputs), run(plain, inputs))
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
    close(run(load(tmp_path / "merged"), inputs), run(plain, inputs))


def test_int8_of_a_real_model():
    """SmolLM2's logits within 2 % of the float ones; the matrices of its blocks take a quarter of float32's bytes."""
    folder = real("smollm2-135m")
    plain, ours = load(folder), load(folder, int8=True)
    tokens, _ = batch(None, T=60, vocabulary=40000)
    exact = run(plain, tokens)
    assert (run(ours, tokens) - exact).norm() < 0.02 * exact.norm()
    sizes = [sum(p.nbytes for p in model.blocks.parameters()) for model in (ours, plain)]
    assert sizes[0] < 0.26 * sizes[1]
