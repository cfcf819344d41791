"""model.py against transformers: logits, gradients, generation, checkpoints, the Hub, and every way a load can fail."""

import json
import operator
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import COMMIT, ROOT, mirror  # noqa: F401: one is a fixture

import eval as evaluation
import lora
import model as models
from model import UserError, generate, load, resolve, save

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

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


def both(name, folder, *args, **other):
    """transformers' model and ours of the same checkpoint."""
    return saved(name, folder, *args, **other), load(folder)


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def batch(padding, B=3, T=14, vocabulary=67, pad=0, seed=1):
    """Random tokens without the special ids, and a mask with 0, 3 and 6 tokens of padding on that side, or None."""
    tokens = torch.randint(3, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))
    lengths, places = T - 3 * torch.arange(B)[:, None], torch.arange(T)
    mask = {None: places >= 0 * lengths, "left": places >= T - lengths, "right": places < lengths}[padding]
    return torch.where(mask, tokens, pad), mask if padding else None


def inputs_for(name, padding=None, T=14):
    """(tokens, mask), or (pixels,)."""
    if name in VITS:
        shape = (1, 8, 12) if name == "vit-gray" else (3, 16, 16)
        return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)),
    return batch(padding, T=T, pad=ALL[name][1].get("pad_token_id", 0))


def outputs(model, inputs, mask=None, **keywords):
    """Logits of our model, or of transformers', whose masks are of integers and whose span heads give two."""
    if isinstance(model, transformers.PreTrainedModel) and mask is not None:
        keywords["attention_mask"] = mask.long()
    elif mask is not None:
        keywords["mask"] = mask
    output = model(inputs, **keywords)
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), -1)
    return getattr(output, "logits", output)


run = torch.no_grad()(outputs)


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert theirs.std() > 1e-3  # logits that are all alike would prove nothing
    assert (ours - theirs).abs().max() <= tolerance


def same_logits(name, oracle, ours, padding=None, T=14):
    """Our logits are transformers' at every real token."""
    inputs = inputs_for(name, padding, T)
    real = inputs[1] if padding and ours.head_kind != "classify" else slice(None)
    close(run(ours, *inputs)[real], run(oracle, *inputs)[real])


def copy_tensors(folder, change):
    """Rewrite a checkpoint with `change` applied to its dict of tensors."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


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


CLASSIFIERS = ["llama-gqa-tied", "mistral", "olmo2", "gpt2", "qwen2", "qwen3", "gemma", *ENCODERS]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name, kind, labels", [
    *((name, "CausalLM", 2) for name in DECODERS),
    *((name, "SequenceClassification", labels) for name in CLASSIFIERS for labels in (1, 3)),
    *((name, "QuestionAnswering", 2) for name in ("bert", "roberta", "deberta", "deberta-unshared"))])
def test_logits(name, kind, labels, padding, tmp_path):
    """Of a language model, at all tokens or some; of a classifier with its labels; of spans, with their loss."""
    oracle, ours = both(name, tmp_path, kind, num_labels=labels)
    same_logits(name, oracle, ours, padding)
    tokens, mask = inputs_for(name, padding)
    theirs, real = run(oracle, tokens, mask), slice(None)
    if kind == "CausalLM":
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        positions = real.flatten().nonzero()[::3, 0]
        close(run(ours, tokens, mask, positions=positions), theirs.flatten(0, 1)[positions])
    if name in DECODERS and padding == "right":
        close(run(ours, tokens, mask, right_padded=True)[real], theirs[real])
    if kind == "SequenceClassification" and name in ENCODERS:
        kinds = max(1, oracle.config.type_vocab_size)
        types = torch.randint(0, kinds, tokens.shape, generator=torch.Generator().manual_seed(2))
        close(run(ours, tokens, mask, types=types), run(oracle, tokens, mask, token_type_ids=types))
    if kind == "QuestionAnswering":
        ends = torch.tensor([[7, 7], [6, 9], [7, 8]])  # of the answers
        loss = oracle(tokens, mask, start_positions=ends[:, 0], end_positions=ends[:, 1]).loss
        assert (evaluation.criterion("span", run(ours, tokens, mask), ends) / ends.numel() - loss).abs() < 1e-5
    assert ours.fresh == [] and not any(p.requires_grad for p in ours.parameters()) and not ours.training


BUCKETS = dict(position_buckets=256, max_relative_positions=-1, num_hidden_layers=2, max_position_embeddings=512)


@pytest.mark.parametrize("name, padding, T, settings", [
    *((name, None, None, dict(num_labels=labels)) for name in VITS for labels in (1, 10)),
    *(("mistral", None, T, {}) for T in (4, 5, 6, 7)),  # around its window of 5
    # DeBERTaV3's own buckets: 256, exact up to a distance of 128, then logarithmic up to 511, one for all beyond
    *(("deberta", "right", T, BUCKETS) for T in (128, 129, 300, 530))])
def test_logits_at_edges(name, padding, T, settings, tmp_path):
    same_logits(name, *both(name, tmp_path, **settings), padding, T)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_all_tokens_for_hooks_and_hidden_states(name, tmp_path):
    """The last block computes the first token alone for the head, and all tokens for whoever else looks."""
    oracle, ours = both(name, tmp_path)
    inputs, seen = inputs_for(name)[0], []
    with torch.no_grad():
        logits, theirs = ours(inputs), oracle(inputs, output_hidden_states=True)
        close(ours.hidden_states(inputs), theirs.hidden_states[-1])
        assert ours.hidden_states(inputs, first_token_only=True).shape[1] == 1
        ours.blocks[-1].query.register_forward_hook(lambda module, args, output: seen.append(output))
        close(ours(inputs), logits, 1e-5)
    assert seen[0].shape == theirs.hidden_states[-1].shape


@pytest.mark.parametrize("name, settings", [
    ("llama", dict(rope_theta=10000.0)), ("llama-llama3", dict(rope_theta=500.0, rope_scaling=LLAMA3)), ("mistral", {}),
    ("qwen3", dict(rope_theta=10000.0)), ("llama-linear", dict(rope_scaling=dict(type="linear", factor=4.0))),
    ("qwen2-layer-types", dict(layer_types=..., max_window_layers=2))])
def test_settings_of_transformers_4(name, settings, tmp_path):
    """config.json with rope_theta and rope_scaling instead of rope_parameters, and without layer_types."""
    saved(name, tmp_path)
    edit_config(tmp_path, **{"rope_parameters": ..., **settings})
    same_logits(name, class_of(name).from_pretrained(tmp_path).eval(), load(tmp_path))


@pytest.mark.parametrize("name, padding, masked, causal", [
    ("llama-gqa-tied", None, False, True), ("llama-gqa-tied", "left", True, False),
    ("llama-gqa-tied", "right", False, True), ("mistral", None, True, False),
    ("mistral-wide-window", None, False, True), ("bert", None, False, False), ("bert", "right", True, False)])
def test_masks_only_where_they_are_needed(name, padding, masked, causal, tmp_path):
    """Without padding the attention kernel gets no mask, and is told to be causal instead: the fast path."""
    ours = both(name, tmp_path, **NO_DROPOUT)[1].train()
    kernel, functional = "scaled_dot_product_attention", torch.nn.functional
    with mock.patch.object(functional, kernel, wraps=getattr(functional, kernel)) as spy:
        ours(*batch(padding), **({"right_padded": True} if padding == "right" and name in DECODERS else {}))
    calls = [(call.kwargs["attn_mask"] is not None, call.kwargs["is_causal"]) for call in spy.call_args_list]
    assert calls == [(masked, causal)] * ours.config.num_hidden_layers


@pytest.mark.parametrize("name, kind", [("llama-gqa-tied", "CausalLM"), ("gemma", "CausalLM"), ("gpt2", "CausalLM"),
                                        ("olmo2", "CausalLM"), ("qwen3", "SequenceClassification"),
                                        ("bert", "SequenceClassification"), ("vit", "ImageClassification"),
                                        ("deberta", "SequenceClassification"),
                                        ("deberta-unshared", "SequenceClassification")])
def test_bfloat16(name, kind, tmp_path):
    saved(name, tmp_path, kind, num_labels=3)
    oracle = class_of(name, kind).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path, dtype=torch.bfloat16)
    head = torch.bfloat16 if kind == "CausalLM" else torch.float32  # a trained head keeps small steps
    for n, parameter in ours.named_parameters():
        assert parameter.dtype == (head if n.startswith("head.") else torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in ours.buffers())  # the rotary frequencies
    inputs = inputs_for(name, "left" if name in DECODERS else None)
    theirs, logits = run(oracle, *inputs), run(ours, *inputs)
    assert logits.dtype == head
    real = inputs[1] if kind == "CausalLM" else slice(None)
    # same operations in the same order: what is left is the order of sums inside kernels
    assert (logits[real] - theirs[real]).float().abs().max() <= 0.02 * theirs[real].float().abs().max()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "qwen3", "olmo2", "gpt2", "gemma", "bert", "roberta",
                                  "deberta", "deberta-unshared", "vit"])
def test_training_mode(name, tmp_path):
    """Without dropout: transformers' logits and gradients (projections, norms, embeddings, head), also checkpointed.

    Then fewer numbers are kept for the backward pass. There is no graph break (the eager backend traces as any other).
    """
    oracle, ours = (model.train() for model in both(name, tmp_path, **NO_DROPOUT))
    paths, stored = dict(oracle.named_parameters()), load_file(tmp_path / "model.safetensors").keys()
    assert models.stored_names(ours).keys() == {key for key in stored if not key.startswith("vit.pooler.")}
    assert all(ours.hf_name(n, module=True) in paths for n in ours.plain_names)
    assert name == "vit" or all(ours.hf_name(n, module=True) == ours.hf_name(n) for n in ours.plain_names)
    names = [n for n in ours.plain_names if re.match(
        r"head|(embed|relative_embed|patch|blocks\.(0\.query|1\.down|1\.value|2\.norm1|\d\.position_.*))\.weight", n)]
    parameters = [ours.get_parameter(n).requires_grad_() for n in names]
    inputs = inputs_for(name, "right")
    real, sizes = inputs[1] if name in DECODERS else slice(None), []
    theirs = outputs(oracle, *inputs)[real]
    weights = torch.randn_like(theirs)
    for ours.checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            logits = ours(*inputs)[real]
        sizes.append(sum(kept))
        close(logits.detach(), theirs.detach())
        gradients = torch.autograd.grad((logits * weights).sum(), parameters)
        for n, gradient in zip(names, gradients):
            path = ours.hf_name(n, module=True)
            expected, = torch.autograd.grad((theirs * weights).sum(), paths[path], retain_graph=True)
            together = models.stored_names(ours).get(path, [n])
            expected = models.turned(ours, n, expected).chunk(len(together))[together.index(n)]
            assert expected.abs().max() > 0
            assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1), n
    assert sizes[1] < sizes[0] / 2
    ours.checkpointing = False
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    close(run(compiled, *inputs)[real], theirs.detach())
    torch._dynamo.reset()


DROPOUTS = {**dict.fromkeys(("bert", "roberta"), [
                "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]),
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
    oracle, ours = both(name, tmp_path, **{**dict.fromkeys(sum(DROPOUTS.values(), []), 0.0), where: 0.4})
    ours.blocks[-1].register_forward_hook(lambda *_: None)
    inputs, logits = inputs_for(name)[0], []
    for model, seed in ((oracle, 5), (ours, 5), (ours, 6)):
        torch.manual_seed(seed)
        logits.append(run(model.train(), inputs))
    close(logits[1], logits[0])
    assert (logits[2] - logits[1]).abs().max() > 1e-2


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


HEAD, POOLER = ["head.weight", "head.bias"], ["pooler.weight", "pooler.bias"]
DENSE_HEAD = ["head.dense.weight", "head.dense.bias", "head.out_proj.weight", "head.out_proj.bias"]


@pytest.mark.parametrize("name, module, prefix, others, fresh", [
    ("bert", False, "bert.", {"embeddings.position_ids": (1, 64), "cls.predictions.bias": (67,)}, POOLER + HEAD),
    ("deberta", False, "", {"lm_predictions.lm_head.bias": (67,), "mask_predictions.dense.weight": (32, 32),
                            "deberta.embeddings.position_embeddings.weight": (64, 32)}, DENSE_HEAD),
    ("vit", False, "vit.", {}, HEAD), ("vit", True, "vit.", {}, HEAD), ("vit", True, "", {}, [])])
def test_names_in_other_files(name, module, prefix, others, fresh, tmp_path):
    """Pre-trained models without our head but with their own, without prefix, with older or newer names."""
    oracle, ours = both(name, tmp_path, num_labels=3)
    names = {n: ours.hf_name(n, module) for n in ours.plain_names if n not in fresh}
    assert module == (sum(names[n] != ours.hf_name(n) for n in names) == 3 * 16)
    names = {ours.hf_name(n): theirs.removeprefix(prefix) for n, theirs in names.items()}

    def change(tensors):
        old = {theirs.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensors[k]
               for k, theirs in names.items()}
        return old | {k: torch.zeros(shape) for k, shape in others.items()}

    copy_tensors(tmp_path, change)
    ours = load(tmp_path, num_labels=3)
    assert ours.fresh == fresh
    copy_fresh(ours, oracle)
    same_logits(name, oracle, ours, "right")


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


@pytest.mark.parametrize("name, kind, fresh, dtype", [
    ("llama", "CausalLM", ["head.weight"], torch.float32), ("roberta", "MaskedLM", DENSE_HEAD, torch.float32),
    ("roberta", "SequenceClassification", DENSE_HEAD[2:], torch.float32),
    ("bert", "QuestionAnswering", POOLER + HEAD, torch.float32),
    ("bert", "SequenceClassification", HEAD, torch.bfloat16)])
def test_new_classification_head(name, kind, fresh, dtype, tmp_path):
    """For a language model's checkpoint, or one with another number of labels; all else is the checkpoint's."""
    saved(name, tmp_path, kind)
    first, again, other = (load(tmp_path, "classify", 5, dtype, seed=seed) for seed in (0, 0, 1))
    assert first.fresh == fresh and not first.get_parameter(fresh[0]).requires_grad
    assert all(p.equal(other.get_parameter(n)) == (n not in fresh or "bias" in n) for n, p in first.named_parameters())
    inputs = inputs_for(name, "right")
    logits = run(first, *inputs)
    assert logits.shape == (3, 5) and logits.equal(run(again, *inputs)) and not logits.equal(run(other, *inputs))
    layer, = lora.attach(first, {"blocks.1.query": 2}, alpha=4).values()
    refused("blocks.1.query", "merge", call=save, args=(first, tmp_path / "saved"))
    layer.merge()
    save(first, tmp_path / "saved")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert oracle.config.architectures == [type(oracle).__name__] == [class_of(name, "SequenceClassification").__name__]
    assert oracle.config.num_labels == load(tmp_path / "saved").config.num_labels == 5 and oracle.dtype == dtype
    assert (run(oracle, *inputs) - logits).abs().max() <= (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_parameters_are_converted_and_no_view_of_the_file(stored, tmp_path):
    saved("llama", tmp_path)
    copy_tensors(tmp_path, lambda tensors: {k: v.to(stored) for k, v in tensors.items()})
    ours, weights = load(tmp_path), tmp_path / "model.safetensors"
    expected = {k: v.float().clone() for k, v in load_file(weights).items()}
    with open(weights, "r+b") as file:  # as when another program writes there
        file.write(bytes(weights.stat().st_size))
    assert all(ours.get_parameter(n).equal(expected[ours.hf_name(n)]) for n in ours.plain_names)


MILLIONS = """
    minilm 22.7 bert-base 110 bert-large 335 roberta-base 125 roberta-large 355 xlm-roberta-base 278
    xlm-roberta-large 560 deberta-v3-xsmall 70.7 deberta-v3-small 141 deberta-v3-base 184 deberta-v3-large 435
    gpt2 124 gpt2-medium 355 dialogpt-medium 355 smollm2 134.5 smollm2-135m 134.5 smollm2-360m 361.8 smollm2-1.7b 1710
    llama2-7b 6740 llama2-13b 13020 llama3-8b 8030 llama3.1-8b 8030 llama3.2-1b 1240 llama3.2-3b 3210
    mistral-7b 7240 mistral-7b-v0.3 7250 olmo2-1b 1480 olmo2-7b 7300 qwen2-7b 7620 qwen2.5-0.5b 490 qwen2.5-1.5b 1540
    qwen2.5-3b 3090 qwen2.5-7b 7620 qwen3-0.6b 600 qwen3-1.7b 1720 qwen3-4b 4020 qwen3-8b 8190 gemma-7b 8540
    vit-b16 86 vit-l16 304""".split()


def test_named_architectures(monkeypatch, tmp_path):
    """Sizes are those of papers and model cards; small random ones start as, and save for, transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    millions = dict(zip(MILLIONS[::2], map(float, MILLIONS[1::2])))
    assert set(millions) == set(models.CONFIGS) == set(models.HUB)
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, image_size=32, n_embd=32, n_layer=2, n_head=2)
    for name, raw in models.CONFIGS.items():
        monkeypatch.setitem(models.CONFIGS, name, {**raw, **{k: v for k, v in small.items() if k in raw}})
        ours, again = (load(name, num_labels=3, weights="random", seed=4) for _ in range(2))
        assert set(ours.fresh) == set(ours.plain_names)
        with torch.device("meta"):
            whole = type(ours)(models.normalise(raw, name), ours.head_kind)
        total = sum(p.numel() for n, p in whole.named_parameters() if not (ours.tied and n == "head.weight"))
        assert abs(total / 1e6 - millions[name]) < 0.01 * millions[name], (name, total)
        inputs = torch.randn(2, 3, 32, 32) if ours.family == "vit" else batch(None, vocabulary=50)[0]
        logits = run(ours, inputs)
        assert logits.equal(run(again, inputs)) and torch.isfinite(logits).all()
        save(ours, tmp_path / name)
        auto = getattr(transformers, f"AutoModelFor{ours.heads[ours.head_kind]}")
        oracle = auto.from_pretrained(tmp_path / name).eval()
        assert (logits - run(oracle, inputs)).abs().max() <= 1e-4
        torch.manual_seed(0)
        initial = dict(auto.from_config(oracle.config).named_parameters())
        for n in ours.plain_names:
            expected, parameter = initial[ours.hf_name(n, module=True)], ours.get_parameter(n)
            if parameter.dim() == 1:
                assert parameter.unique().equal(expected.unique()), (name, n)
            elif parameter.numel() >= 32 * 32:
                assert abs(parameter.std() - expected.std()) < 0.2 * expected.std(), (name, n)


@pytest.mark.parametrize("shard_bytes", [5e9, 2e4])
@pytest.mark.parametrize("name, kind", [
    *((name, None) for name in ("llama-gqa-tied", "llama-llama3", "gpt2", "olmo2", "mistral", "bert", "roberta",
                                "xlm-roberta", "deberta", "vit")),
    *((name, "SequenceClassification") for name in ("gpt2", "gemma", "qwen3")),
    *((name, "QuestionAnswering") for name in ("bert", "roberta", "deberta", "deberta-unshared"))])
def test_save_loads_in_transformers(name, kind, shard_bytes, tmp_path):
    _, ours = both(name, tmp_path / "original", kind, num_labels=2 if kind == "QuestionAnswering" else 3)
    for n in ours.plain_names:  # as if trained
        ours.get_parameter(n).add_(0.01)
    inputs = inputs_for(name)[0]
    save(ours, tmp_path / "saved", 5e9 if shard_bytes == 2e4 else 2e4)
    save(ours, tmp_path / "saved", shard_bytes)  # over an earlier one with other shards
    assert (tmp_path / "saved" / "model.safetensors").exists() == (shard_bytes == 5e9)
    oracle = class_of(name, kind).from_pretrained(tmp_path / "saved").eval()
    assert oracle.dtype == torch.float32
    close(run(oracle, inputs), run(ours, inputs))
    assert run(load(tmp_path / "saved"), inputs).equal(run(ours, inputs))


BAD_SETTINGS = {
    "llama-gqa-tied": [
        dict(model_type="gpt_neox"), dict(model_type=...), dict(hidden_size=...), dict(hidden_size=-4),
        dict(intermediate_size="big"), dict(num_key_value_heads=3), dict(head_dim=7), dict(hidden_act="mish"),
        dict(vocab_size=True), dict(attention_dropout=1.5), dict(quantization_config=dict(bits=4)),
        dict(problem_type="multi_label_classification"), dict(hidden_size=33), dict(rope_scaling="linear"),
        dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), dict(rope_parameters=dict(rope_theta=-1.0)),
        dict(rope_parameters=dict(full_attention=dict(rope_type="default")))],
    "deberta": [
        dict(conv_kernel_size=3), dict(pooler_hidden_act="relu"), dict(relative_attention=False),
        dict(pos_att_type="p2p|c2p"), dict(pos_att_type=...), dict(position_buckets=23), dict(position_buckets=1),
        dict(max_relative_positions="12")],
    "qwen2-layer-types": [dict(layer_types=["full_attention"]), dict(sliding_window=-3)]}


@pytest.mark.parametrize("name, changes", [(name, changes) for name, rows in BAD_SETTINGS.items() for changes in rows])
def test_bad_settings(name, changes, tmp_path):
    saved(name, tmp_path)
    edit_config(tmp_path, **changes)
    remedies = dict(model_type="llama, mistral", problem_type="null", layer_types="3 entries", rope_scaling="llama3",
                    rope_parameters="'original_max_position_embeddings'")
    words = set(re.findall(r"-?\w[\w.|]*", str(changes).replace("Ellipsis", "missing")))
    parts = [*words - {"rope_parameters", "rope_scaling"}, *(remedies.get(key, "") for key in changes)]
    refused("config.json", *parts, args=(tmp_path,))


INDEX, QUERY = "model.safetensors.index.json", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("file, content, parts", [
    ("config.json", None, ["No such file"]),
    ("model.safetensors", None, ["download", "save_pretrained", "LlamaForCausalLM"]),
    ("config.json", b"{", ["JSON"]),
    ("model.safetensors", b"\x10" + bytes(7) + b"not JSON at all." * 9, ["damaged"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", ["git lfs pull"]),
    *(("model.safetensors", keep, ["damaged"]) for keep in (0, 5, 300, -100)),
    *((INDEX, content, ["download"]) for content in (b"{", b"[]", b"{}", b'{"weight_map": 3}')),
    *((INDEX, b'{"weight_map": {"a": %s}}' % name, ["inside", "download"])
      for name in (b'"../secret.safetensors"', b'"/etc/passwd"', b"7", b'"absent.safetensors"')),
    *(("model.safetensors", change, parts) for change, parts in [
        (lambda t: {k: v for k, v in t.items() if k != QUERY}, [QUERY, "missing"]),
        (lambda t: {**t, "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, ["layers.9", "unexpected"]),
        (lambda t: {**t, QUERY.replace("weight", "bias"): torch.zeros(32)}, ["q_proj.bias", "unexpected"]),
        (lambda t: {**t, QUERY: torch.zeros(32, 31)}, [QUERY, "[32, 31]", "[32, 32]"]),
        (lambda t: {**t, QUERY: torch.zeros(32, 32, dtype=torch.int8)}, [QUERY, "I8", "floats"]),
        (lambda t: {**t, QUERY.removeprefix("model."): torch.zeros(32, 32)}, ["q_proj", "twice"])])])
def test_missing_and_damaged_files(file, content, parts, tmp_path):
    """`content` is what is in the file, how many bytes of it are left, or a change of its tensors."""
    folder, weights = tmp_path / "llama", tmp_path / "llama" / "model.safetensors"
    saved("llama", folder)
    whole = weights.read_bytes()
    if file not in ("config.json", "model.safetensors"):
        weights.rename(tmp_path / "secret.safetensors")
    if content is None:
        (folder / file).unlink()
    elif callable(content):
        copy_tensors(folder, content)
    else:
        (folder / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    refused(file, *parts, args=(folder,))


def test_names_and_heads(tmp_path, monkeypatch):
    assert resolve("vit-digits") == ROOT / "assets" / "vit-digits"
    monkeypatch.chdir(tmp_path)
    saved("llama", tmp_path / "roberta-base")  # an existing folder wins
    assert resolve("roberta-base").resolve() == resolve(tmp_path / "roberta-base") == tmp_path / "roberta-base"
    refused("num_labels", "0", args=("roberta-base", "classify", 0))
    refused("head", "lm", args=("roberta-base", "tagging"))
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


def published(repo, files):
    """What the Hub serves of a repository, {file name: bytes}: {path: bytes}."""
    listed = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files.items()]
    about = {f"tree/{COMMIT}": listed, "revision/main": {"id": repo, "sha": COMMIT}}
    return {f"/{repo}/resolve/{COMMIT}/{name}": content for name, content in files.items()} | {
        f"/api/models/{repo}/{route}": json.dumps(answer).encode() for route, answer in about.items()}


def test_hub(tmp_path, monkeypatch, mirror):  # noqa: F811
    """Downloads only what is needed, then works from the cache; and every failure is one line."""
    oracle = saved("llama", tmp_path / "original", shards="20KB")
    files = {p.name: p.read_bytes() for p in (tmp_path / "original").iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "model.onnx": b"x", "consolidated.safetensors": b"x", "README.md": b"x",
                "onnx/model.safetensors": b"x"}
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "vocab.txt": b"a", "vocab.json": b"{}", "merges.txt": b"a"}
    mirror.files |= published("FacebookAI/roberta-base", {**files, **unwanted, "tokenizer.json": b"{}"})  # a short name's
    mirror.files |= published("org/half", {**small, **unwanted, "model.safetensors": b"x"})
    there = f"http://127.0.0.1:{mirror.server_port}"
    hub = {"ENDPOINT": there, "HF_HUB_CACHE": str(tmp_path / "hub"),
           "HUGGINGFACE_CO_URL_TEMPLATE": there + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in hub.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sharded, half = resolve("roberta-base"), resolve("org/half", weights=False)
    assert {p.name for p in sharded.iterdir()} == set(files) | {"tokenizer.json"}
    assert not {path.rsplit("/", 1)[-1] for path in mirror.asked} & set(unwanted)
    same_logits("llama", oracle, load(sharded))
    assert {p.name for p in half.iterdir()} == set(small)
    remedy = "https://huggingface.co/org/absent", "tokenizer", "HF_TOKEN"
    refused("RepositoryNotFound", *remedy, call=resolve, args=("org/absent",))
    mirror.asked.clear()
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert resolve("roberta-base") == sharded and not mirror.asked
        refused(*remedy, call=resolve, args=("org/absent",))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(*remedy, call=resolve, args=("org/absent",))


real = pytest.mark.skipif("CHECKPOINTS" not in os.environ, reason="CHECKPOINTS: the folder of minilm/, smollm2-135m/")


@real
def test_minilm():
    folder = Path(os.environ["CHECKPOINTS"]) / "minilm"
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ours = load(folder, num_labels=3)
    assert ours.fresh == ["head.weight", "head.bias"]
    for parameter in oracle.classifier.parameters():
        parameter.data.normal_()  # at the start of a training they are so small that all logits look alike
    copy_fresh(ours, oracle)
    inputs, types = batch("right", T=30, vocabulary=30000), (torch.arange(30) > 12).long().expand(3, -1)
    close(run(ours, *inputs, types=types), run(oracle, *inputs, token_type_ids=types))


@real
def test_smollm2():
    """Logits and generation; with int8 within 2 %, and the blocks take a quarter of float32's bytes."""
    folder = Path(os.environ["CHECKPOINTS"]) / "smollm2-135m"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, int8 = load(folder), load(folder, int8=True)
    assert ours.fresh == []
    tokens, mask = batch("left", T=20, vocabulary=40000, pad=2)
    close(run(ours, tokens, mask)[mask], run(oracle, tokens, mask)[mask])
    assert generate(ours, tokens, mask, 12, 2, 2).equal(hf_generate(oracle, tokens, mask, 12, 2, pad=2))
    exact, rounded = (run(model, batch(None, T=60, vocabulary=40000)[0]) for model in (ours, int8))
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    sizes = [sum(p.nbytes for p in model.blocks.parameters()) for model in (int8, ours)]
    assert sizes[0] < 0.26 * sizes[1]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa-tied", "vit"])
def test_int8(name, tmp_path):
    """Every matrix of the blocks is within half a step of its own; products, gradients, adapters and merging follow."""
    _, plain = both(name, tmp_path)
    ours, inputs = load(tmp_path, int8=True), inputs_for(name)[0]
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
