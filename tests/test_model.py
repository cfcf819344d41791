"""model.py against transformers: logits, gradients, generation, checkpoints, the Hub, and faulty files."""

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
BUCKETS = dict(position_buckets=256, max_relative_positions=-1, num_hidden_layers=2, max_position_embeddings=512)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# name -> (transformers' prefix, settings beside BASE)
DECODERS = {"llama": ("Llama", dict()),
    "llama-gqa-tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-bias-head_dim": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=12, num_key_value_heads=1)),
    "llama-llama3": ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=500.0), head_dim=16)),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=5)),
    "qwen2-window": ("Qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
                                   max_window_layers=1, tie_word_embeddings=True)),
    "qwen2-layer-types": ("Qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=3, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16)), "olmo2": ("Olmo2", dict(num_key_value_heads=2)),
    "gpt2": ("GPT2", dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, n_inner=40)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=16))}
ENCODERS = {"bert": ("Bert", dict()),
    "roberta": ("Roberta", dict(pad_token_id=1, bos_token_id=0, type_vocab_size=1, layer_norm_eps=1e-5)),
    "roberta-pad0": ("Roberta", dict(pad_token_id=0, bos_token_id=1, hidden_act="relu", num_hidden_layers=1)),
    "xlm-roberta": ("XLMRoberta", dict(pad_token_id=1, bos_token_id=0, type_vocab_size=1)),
    # 8 buckets up to a distance of 11: most of a batch's distances share one, or lie beyond the last
    "deberta": ("DebertaV2", dict(DEBERTA, pos_att_type="p2c|c2p", share_att_key=True)),
    "deberta-apart": ("DebertaV2", dict(DEBERTA, pos_att_type=["c2p", "p2c"], share_att_key=False, type_vocab_size=2)),
    "deberta-c2p": ("DebertaV2", dict(DEBERTA, pos_att_type="c2p", share_att_key=True, norm_rel_ebd="none",
                                      position_buckets=-1)),
    "deberta-p2c": ("DebertaV2", dict(DEBERTA, pos_att_type=["p2c"], position_biased_input=True, position_buckets=-1,
                                      max_relative_positions=20))}
VITS = {"vit": ("ViT", dict(image_size=16, patch_size=4, num_channels=3)),
    "vit-gray": ("ViT", dict(image_size=[8, 12], patch_size=[4, 2], num_channels=1, qkv_bias=False, hidden_size=24))}
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


def batch(padding, B=3, T=14, vocabulary=67, pad=0, seed=1):
    """Random tokens, none special, and a mask with 0, 3 and 6 tokens of padding on that side."""
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
    """Logits of our model, or of transformers', whose span heads give two."""
    if mask is not None:
        keywords["attention_mask" if isinstance(model, transformers.PreTrainedModel) else "mask"] = mask
    output = model(inputs, **keywords)
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), -1)
    return getattr(output, "logits", output)


run = torch.no_grad()(outputs)


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3  # logits that are all alike would prove nothing
    assert (ours - theirs).abs().max() <= tolerance


def same_logits(name, oracle, ours, padding=None, T=14):
    """Our logits are transformers' at every real token."""
    inputs = inputs_for(name, padding, T)
    real = inputs[1] if padding and ours.head_kind != "classify" else slice(None)
    close(run(ours, *inputs)[real], run(oracle, *inputs)[real])


def change_tensors(folder, change):
    """Rewrite a checkpoint after `change` of its dict of tensors."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def draw_fresh(ours, oracle):
    """The same numbers in both for what is new in ours, large: else all logits look alike."""
    for name in ours.fresh:
        ours.get_parameter(name).data.copy_(oracle.get_parameter(ours.hf_name(name)).data.normal_())


def edit_config(folder, **changes):
    """Set keys of a config.json, or remove those that are `...`."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def refused(*parts, call=load, args=(), **keywords):
    with pytest.raises(UserError) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name, kind, labels", [*((name, "CausalLM", 2) for name in DECODERS),
    *((name, "SequenceClassification", labels) for labels in (1, 3) for name in (
        "llama-gqa-tied", "mistral", "olmo2", "gpt2", "qwen2-window", "qwen3", "gemma", *ENCODERS)),
    *((name, "QuestionAnswering", 2) for name in ("bert", "roberta", "deberta", "deberta-apart"))])
def test_logits(name, kind, labels, padding, tmp_path):
    oracle, ours = both(name, tmp_path, kind, num_labels=labels)
    tokens, mask = inputs_for(name, padding)
    real = slice(None) if mask is None or kind == "SequenceClassification" else mask
    if kind == "SequenceClassification" and name in DECODERS:
        tokens[0, -1] = 0  # a real token with padding's id: transformers takes the one before it
    theirs = run(oracle, tokens, mask)
    close(run(ours, tokens, mask)[real], theirs[real])
    if kind == "CausalLM":
        positions = (tokens > 0).flatten().nonzero()[::3, 0]  # padding is 0
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


@pytest.mark.parametrize("name, T, settings, edits", [
    *((name, 0, dict(num_labels=labels), {}) for name in VITS for labels in (1, 10)),
    *(("mistral", T, {}, {}) for T in (4, 5, 6, 7)),  # around its window of 5
    # DeBERTaV3's buckets: exact up to a distance of 128, then logarithmic up to 511, one for all beyond
    *(("deberta", T, BUCKETS, {}) for T in (128, 129, 300, 530)),
    # transformers 4 has rope_theta and rope_scaling instead of rope_parameters, and no layer_types
    *((name, 14, {}, dict(edits, rope_parameters=...)) for name, edits in [
        ("llama", dict(rope_theta=10000.0)), ("mistral", {}), ("llama-llama3", dict(
            rope_theta=500.0, rope_scaling=LLAMA3, original_max_position_embeddings=24)),  # which wins
        ("llama-linear", dict(rope_scaling=dict(type="linear", factor=4.0))),
        ("qwen2-layer-types", dict(layer_types=..., max_window_layers=2))])])
def test_logits_at_edges_and_of_older_files(name, T, settings, edits, tmp_path):
    saved(name, tmp_path, **settings)
    edit_config(tmp_path, **edits)
    oracle = class_of(name).from_pretrained(tmp_path).eval()
    same_logits(name, oracle, load(tmp_path), "right" if name == "deberta" else None, T)


@pytest.mark.parametrize("name, padding, T, masked, causal", [
    ("llama-gqa-tied", None, 9, False, True), ("llama-gqa-tied", "left", 9, True, False),
    ("llama-gqa-tied", "right", 9, False, True), ("mistral", None, 6, True, False), ("mistral", None, 5, False, True),
    ("bert", None, 9, False, False), ("bert", "right", 9, True, False)])
def test_masks_only_where_they_are_needed(name, padding, T, masked, causal, tmp_path):
    """Without padding the kernel gets no mask, but is told to be causal: the fast path."""
    ours = both(name, tmp_path, **NO_DROPOUT)[1].train()
    spy = mock.Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", spy):
        ours(*batch(padding, T=T), **({"right_padded": True} if padding == "right" and name in DECODERS else {}))
    calls = [(call.kwargs["attn_mask"] is not None, call.kwargs["is_causal"]) for call in spy.call_args_list]
    assert calls == [(masked, causal)] * ours.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gemma", "gpt2", "olmo2", "qwen3", "bert", "vit", "deberta",
                                  "deberta-apart"])
def test_bfloat16(name, tmp_path):
    saved(name, tmp_path, num_labels=3)
    oracle = class_of(name).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path, dtype=torch.bfloat16)
    head = torch.bfloat16 if name in DECODERS else torch.float32  # a trained head keeps small steps
    for n, parameter in ours.named_parameters():
        assert parameter.dtype == (head if n.startswith("head.") else torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in ours.buffers())  # the rotary frequencies
    inputs = inputs_for(name, "left" if name in DECODERS else None)
    real = inputs[1] if name in DECODERS else slice(None)
    theirs, logits = (run(model, *inputs)[real].float() for model in (oracle, ours))
    # same operations in the same order: what is left is the order of sums inside kernels
    assert (logits - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral", "qwen3", "olmo2", "gpt2", "gemma", "bert", "roberta",
                                  "deberta", "deberta-apart", "vit"])
def test_training_mode(name, tmp_path):
    """Without dropout: transformers' logits and gradients, also checkpointed, which keeps less; no graph break."""
    oracle, ours = (model.train() for model in both(name, tmp_path, **NO_DROPOUT))
    paths, names = dict(oracle.named_parameters()), [n for n in ours.plain_names if re.match(
        r"head|(embed|relative_embed|patch|blocks\.(0\.query|1\.down|1\.value|2\.norm1|\d\.position_.*))\.weight", n)]
    parameters, inputs = [ours.get_parameter(n).requires_grad_() for n in names], inputs_for(name, "right")
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


DROPOUTS = {"hidden_dropout_prob": ["bert", "deberta", "vit"], "cls_dropout": ["deberta"],
            "pooler_dropout": ["deberta"], "embd_pdrop": ["gpt2"], "resid_pdrop": ["gpt2"], "attn_pdrop": ["gpt2"],
            "attention_probs_dropout_prob": ["bert", "deberta", "vit"], "classifier_dropout": ["bert", "roberta"],
            "attention_dropout": ["llama"]}


@pytest.mark.parametrize("name, where", [(name, where) for where, names in DROPOUTS.items() for name in names])
def test_dropout_is_where_transformers_has_it(name, where, tmp_path, monkeypatch):
    """The same random numbers in the same order: with the same seed even dropped logits agree."""
    monkeypatch.setattr(models, "dropout", torch.nn.functional.dropout)
    oracle, ours = both(name, tmp_path, **dict.fromkeys(DROPOUTS, 0.0) | {where: 0.4})
    ours.blocks[-1].register_forward_hook(lambda *_: None)  # so that it computes all tokens, as theirs does
    inputs, logits = inputs_for(name)[0], []
    for model, seed in ((oracle, 5), (ours, 5), (ours, 6)):
        torch.manual_seed(seed)
        logits.append(run(model.train(), inputs))
    close(logits[1], logits[0])
    assert (logits[2] - logits[1]).abs().max() > 1e-2


def hf_generate(oracle, tokens, mask, n, eos, pad=0):
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=eos, pad_token_id=pad)
    return oracle.generate(tokens, attention_mask=mask.long(), generation_config=settings)[:, tokens.shape[1]:]


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "llama"), *((torch.float32, name) for name in (
    "llama-gqa-tied", "llama-llama3", "mistral", "qwen2-window", "qwen3", "gemma", "gpt2", "olmo2"))])
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
    tensors = {key: torch.zeros(shape) for key, shape in others.items()}
    for n in set(ours.plain_names) - set(fresh):
        key = ours.hf_name(n, module).removeprefix(prefix)
        key = key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[key] = ours.get_parameter(n)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load(tmp_path, num_labels=3)
    with open(tmp_path / "model.safetensors", "r+b") as file:  # as when another program writes there
        file.write(bytes(os.path.getsize(file.name)))
    assert ours.fresh == fresh
    draw_fresh(ours, oracle)
    same_logits(name, oracle, ours, "right")


@pytest.mark.parametrize("stored", ["embed", "lm_head", "both", "different"])
def test_tied_weights_under_either_name(stored, tmp_path, caplog):
    """As in transformers: whichever is there is both; two that differ are both used, which is said."""
    saved("llama-gqa-tied", tmp_path)

    def change(tensors):
        embed = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embed + 0.1 * torch.randn(embed.shape) * (stored == "different")
        tensors.pop({"embed": "lm_head.weight", "lm_head": "model.embed_tokens.weight"}.get(stored), None)

    change_tensors(tmp_path, change)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, tokens = load(tmp_path), batch(None)[0]
    assert load(tmp_path, "classify").embed.weight.equal(oracle.model.embed_tokens.weight)
    assert ("lm_head.weight differs" in caplog.text) == (stored == "different")
    save(ours, tmp_path / "saved")
    for theirs in (oracle, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        close(run(ours, tokens), run(theirs, tokens))


def test_what_is_not_used_is_named(tmp_path, caplog):
    """Another head (trl's), keys of config.json, decoding settings: a line each; not what is old."""
    oracle, old = saved("llama-gqa-tied", tmp_path), "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda t: t.update({old: torch.ones(4), "score.weight": torch.ones(2, 32)}))
    assert load(tmp_path) and not caplog.text
    change_tensors(tmp_path, lambda t: t.update({"v_head.summary.weight": torch.ones(1, 32)}))
    edit_config(tmp_path, residual_multiplier=0.2, transformers_version="4.0", logits_scaling=None, cls_dropout=0.5)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.9, "repetition_penalty": 1.1}')
    ours, tokens = load(tmp_path), batch(None)[0]
    close(run(ours, tokens), run(oracle, tokens))
    for _ in range(2):
        generate(ours, tokens, None, 2, None, 0)
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, repetition_penalty=5)
    generate(load(tmp_path), tokens, None, 2, None, 0)
    key, head, decoding, *others = caplog.messages
    assert key.endswith("with it: residual_multiplier, cls_dropout") and head.endswith(": v_head.summary.weight")
    assert decoding.endswith(": do_sample True, repetition_penalty 1.1")
    assert others[-1].endswith("config.json: not applied, decoding is greedy: repetition_penalty 5")


@pytest.mark.parametrize("name, kind, fresh, dtype", [
    ("roberta", "SequenceClassification", DENSE_HEAD[2:], torch.float32),
    ("roberta", "MaskedLM", DENSE_HEAD, torch.float32), ("bert", "QuestionAnswering", POOLER + HEAD, torch.float32),
    ("llama", "CausalLM", ["head.weight"], torch.float32), ("bert", "SequenceClassification", HEAD, torch.bfloat16)])
def test_new_classification_head(name, kind, fresh, dtype, tmp_path):
    saved(name, tmp_path, kind)
    first, again, other = (load(tmp_path, "classify", 5, dtype, seed=seed) for seed in (0, 0, 1))
    assert first.fresh == fresh and not first.get_parameter(fresh[0]).requires_grad
    assert all(p.equal(other.get_parameter(n)) == (n not in fresh or "bias" in n) for n, p in first.named_parameters())
    inputs = inputs_for(name, "right")
    logits = run(first, *inputs)
    assert logits.shape == (3, 5) and logits.equal(run(again, *inputs)) and not logits.equal(run(other, *inputs))


@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
def test_parameters_of_other_types_are_converted(stored, tmp_path):
    saved("llama", tmp_path).to(stored).save_pretrained(tmp_path)
    ours, expected = load(tmp_path), load_file(tmp_path / "model.safetensors")
    assert all(ours.get_parameter(n).equal(expected[ours.hf_name(n)].float()) for n in ours.plain_names)


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
        assert logits.equal(run(again, inputs))
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


@pytest.mark.parametrize("name, kind", [
    *((name, None) for name in ("llama-gqa-tied", "mistral", "xlm-roberta", "vit")), ("gpt2", "SequenceClassification"),
    *((name, "QuestionAnswering") for name in ("bert", "roberta", "deberta-apart"))])
def test_save_loads_in_transformers(name, kind, tmp_path):
    _, ours = both(name, tmp_path / "original", kind, num_labels=2 if kind == "QuestionAnswering" else 3)
    inputs = inputs_for(name)[0]
    for shard_bytes in (2e4, 5e9, 2e4):
        save(ours, tmp_path / "saved", shard_bytes)
        assert (tmp_path / "saved" / "model.safetensors").exists() == (shard_bytes == 5e9)
        oracle = class_of(name, kind).from_pretrained(tmp_path / "saved").eval()
        close(run(oracle, inputs), run(ours, inputs))
        assert run(load(tmp_path / "saved"), inputs).equal(run(ours, inputs))


BAD_SETTINGS = {"llama": [
        dict(model_type=...), dict(model_type="gpt_neox"), dict(hidden_size=-4), dict(is_causal=False),
        dict(hidden_size=33), dict(head_dim=7), dict(num_key_value_heads=3), dict(hidden_act="mish"),
        dict(vocab_size=True), dict(attention_dropout=1.5), dict(quantization_config=dict(bits=4)),
        dict(problem_type="multi_label_classification"), dict(rope_scaling="linear"),
        dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), dict(rope_parameters=dict(rope_theta=-1.0)),
        dict(rope_parameters=dict(full_attention=dict(rope_type="default")))], "deberta": [
        dict(relative_attention=False), dict(pos_att_type="p2p|c2p"), dict(pos_att_type=...), dict(position_buckets=23),
        dict(position_buckets=1), dict(max_relative_positions="12"), dict(relative_attention=...)],
    "qwen2-layer-types": [dict(layer_types=["full_attention"]), dict(sliding_window=-3)]}
REMEDIES = dict(model_type="llama, mistral", problem_type="null", layer_types="3 entries", rope_scaling="llama3",
                rope_parameters="'original_max_position_embeddings'")
INDEX, QUERY = "model.safetensors.index.json", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name, file, content, parts", [
    *((name, "config.json", changes, [REMEDIES.get(key, key) for key in changes])
      for name, rows in BAD_SETTINGS.items() for changes in rows),
    *(("llama", "model.safetensors", change, parts) for change, parts in [(lambda t: t.pop(QUERY), [QUERY, "missing"]),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}), ["layers.9", "unexpected"]),
        (lambda t: t.update({QUERY: torch.zeros(32, 31)}), [QUERY, "[32, 31]", "[32, 32]"]),
        (lambda t: t.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)}), [QUERY, "I8", "floats"]),
        (lambda t: t.update({QUERY.removeprefix("model."): torch.zeros(32, 32)}), ["q_proj", "twice"])]),
    ("llama", "config.json", None, ["No such file"]),
    ("llama", "model.safetensors", None, ["download", "save_pretrained", "LlamaForCausalLM"]),
    ("llama", "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ["damaged", "git lfs pull"]),
    *(("llama", INDEX, content, ["download"]) for content in (b"[]", b"{}", b'{"weight_map": 3}')),
    *(("llama", INDEX, b'{"weight_map": {"a": "%s"}}' % name, ["inside", "download"])
      for name in (b"../secret.safetensors", b"/etc/passwd", b"absent.safetensors"))])
def test_what_cannot_be_loaded(name, file, content, parts, tmp_path):
    """`content`: the file's, or a change of its settings or tensors; test_safety.py has more damage."""
    folder = tmp_path / "model"
    saved(name, folder)
    if file == INDEX:
        (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, dict):
        edit_config(folder, **content)
    elif callable(content):
        change_tensors(folder, content)
    else:
        (folder / file).write_bytes(content)
    refused(file, *parts, args=(folder,))


def test_heads_and_inputs_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("roberta-base", "bert", "gpt2", "roberta", "vit"):
        saved(name.replace("roberta-base", "llama"), tmp_path / name, max_position_embeddings=20)
    saved("qwen3", tmp_path / "classifier", "SequenceClassification")
    assert resolve("roberta-base").resolve() == tmp_path / "roberta-base"  # an existing folder wins
    refused("num_labels", "0", args=("roberta-base", "classify", 0))
    refused("head 'lm'", "bert", args=("bert", "lm"))
    refused("lm_head.weight", "missing", args=("classifier", "lm"))
    refused("(3, 8, 16)", "(3, 16, 16)", call=load("vit"), args=(torch.zeros(1, 3, 8, 16),))
    for name, longest in {"bert": 20, "gpt2": 20, "roberta": 18}.items():
        ours, tokens = load(name, "classify"), torch.full((1, longest + 1), 5)
        assert ours(tokens[:, 1:]).shape == (1, 2)
        refused(str(longest + 1), str(longest), "--max-length", call=ours, args=(tokens,))


def test_hub(tmp_path, monkeypatch, mirror):  # noqa: F811
    """Downloads only what is needed, then works from the cache; and every failure is one line."""
    oracle = saved("llama", tmp_path / "original", shards="20KB")
    repo, there = "FacebookAI/roberta-base", f"http://127.0.0.1:{mirror.server_port}"
    small, weights = ({p.name: p.read_bytes() for p in (tmp_path / "original").glob(pattern)}
                      for pattern in ("*.json", "*.safetensors"))
    small |= {"tokenizer.json": b"{}", "vocab.txt": b"a"}
    unwanted = ("pytorch_model.bin", "model.onnx", "consolidated.safetensors", "onnx/model.safetensors")
    files = small | weights | dict.fromkeys(unwanted, b"x")
    listed = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files.items()]
    mirror.files |= {f"/{repo}/resolve/{COMMIT}/{name}": content for name, content in files.items()} | {
        f"/api/models/{repo}/tree/{COMMIT}": json.dumps(listed).encode(),
        f"/api/models/{repo}/revision/main": json.dumps({"id": repo, "sha": COMMIT}).encode()}
    for name, value in {"ENDPOINT": there, "HF_HUB_CACHE": str(tmp_path / "hub"),
                        "HUGGINGFACE_CO_URL_TEMPLATE": there + "/{repo_id}/resolve/{revision}/{filename}"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert {p.name for p in resolve("roberta-base", weights=False).iterdir()} == small.keys()
    folder = resolve("roberta-base")
    assert {p.name for p in folder.iterdir()} == small.keys() | weights.keys()
    assert not any(path.endswith(unwanted) for path in mirror.asked)
    same_logits("llama", oracle, load(folder))
    remedy = "https://huggingface.co/org/absent", "tokenizer", "HF_TOKEN"
    refused("RepositoryNotFound", *remedy, call=resolve, args=("org/absent",))
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        assert resolve("roberta-base") == folder  # from the cache
        refused(*remedy, call=resolve, args=("org/absent",))


real = pytest.mark.skipif("CHECKPOINTS" not in os.environ, reason="CHECKPOINTS: has minilm/ and smollm2-135m/")


@real
def test_minilm():
    folder = Path(os.environ["CHECKPOINTS"]) / "minilm"
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ours = load(folder, num_labels=3)
    assert ours.fresh == ["head.weight", "head.bias"]
    draw_fresh(ours, oracle)
    inputs, types = batch("right", T=30, vocabulary=30000), (torch.arange(30) > 12).long().expand(3, -1)
    close(run(ours, *inputs, types=types), run(oracle, *inputs, token_type_ids=types))


@real
def test_smollm2():
    folder = Path(os.environ["CHECKPOINTS"]) / "smollm2-135m"
    oracle, ours = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), load(folder)
    tokens, mask = batch("left", T=20, vocabulary=40000, pad=2)
    close(run(ours, tokens, mask)[mask], run(oracle, tokens, mask)[mask])
    assert generate(ours, tokens, mask, 12, 2, 2).equal(hf_generate(oracle, tokens, mask, 12, 2, pad=2))
    exact, rounded = (run(model, batch(None, T=60, vocabulary=40000)[0]) for model in (ours, load(folder, int8=True)))
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa-tied", "vit"])
def test_int8(name, tmp_path):
    """Blocks' matrices are within half a step of their own; products, gradients and merging follow."""
    _, plain = both(name, tmp_path)
    ours, inputs = load(tmp_path, int8=True), inputs_for(name)[0]
    for n in plain.plain_names:
        exact, kept = plain.get_parameter(n), operator.attrgetter(n)(ours)
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((kept - exact).abs() <= step / 2 + 1e-6).all() if n.startswith("blocks.") else kept.equal(exact)
        exact.data.copy_(kept)
    assert ours.blocks[0].query.q.dtype == torch.int8
    close(run(ours, inputs), run(plain, inputs))
    losses = []
    for model in (ours, plain):  # adapters on them get the gradients of the dequantised weights
        torch.manual_seed(0)
        layers = lora.attach(model, {"blocks.0.query": 2, "blocks.1.down": 2}, alpha=4, dora=name == "bert")
        for layer in layers.values():
            layer.B.data.normal_()
        model(inputs).square().mean().backward()
        losses.append([layer.A.grad for layer in layers.values()])
    for gradient, expected in zip(*losses):
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
    refused("int8", call=lora.adapters(ours)["blocks.0.query"].split_off, args=(torch.zeros(2, 32), torch.zeros(32, 2)))
    refused("blocks.0.query", "merge", call=save, args=(ours, tmp_path / "merged"))
    lora.merge_adapters(ours)
    save(ours, tmp_path / "merged")
    close(run(load(tmp_path / "merged"), inputs), run(plain, inputs))
