"""Hand-written RoBERTa/BERT, LLaMA-family, GPT-2 and ViT forward passes that read and write Hub checkpoints.

In every block the projections that can be adapted are called  query key value out [gate] up down.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import operator
import os
import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something that the user can mend, anywhere in the program; the message is one line with the remedy."""


note = functools.cache(logging.getLogger("model").warning)  # to stderr, each distinct line once per process


def cache_folder():
    """The folder for what is fetched or computed once: $RANKS_CACHE, else ~/.cache/adaptive-lora."""
    return Path(os.environ.get("RANKS_CACHE") or Path.home() / ".cache" / "adaptive-lora")


@contextlib.contextmanager
def publish(final, folder=True):
    """A place to write a folder or file, which takes the name `final` on the disk for good; not after an error."""
    part = final.with_name(f"{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    if folder:
        part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.glob("*"), part]:  # contents before the name
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)
        sync(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def digest(path):
    """SHA-256 of a file, in hexadecimal; it is not read into memory."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


# what the config.json of the models of a series have in common
BERT, VIT = dict(model_type="bert"), dict(model_type="vit", image_size=224)
ROBERTA = dict(model_type="roberta", type_vocab_size=1, layer_norm_eps=1e-5)
XLM = dict(ROBERTA, model_type="xlm-roberta")
DEBERTA = dict(model_type="deberta-v2", relative_attention=True, pos_att_type="p2c|c2p", share_att_key=True,
               position_buckets=256, norm_rel_ebd="layer_norm", position_biased_input=False, layer_norm_eps=1e-7)
GPT2 = dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
GPT2_MEDIUM = dict(GPT2, n_embd=1024, n_layer=24, n_head=16)
LLAMA = dict(model_type="llama", rms_norm_eps=1e-5)
STRETCHED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)
LLAMA31 = dict(LLAMA, rope_theta=5e5, rope_scaling=STRETCHED)
LLAMA32 = dict(LLAMA31, rope_scaling=dict(STRETCHED, factor=32.0), tie_word_embeddings=True)
SMOL = dict(LLAMA, rope_theta=1e5, tie_word_embeddings=True)
MISTRAL = dict(model_type="mistral", rms_norm_eps=1e-5, sliding_window=4096)
OLMO2 = dict(model_type="olmo2", rms_norm_eps=1e-6, rope_theta=5e5)
QWEN2 = dict(model_type="qwen2", rope_theta=1e6)
QWEN3 = dict(model_type="qwen3", rope_theta=1e6, head_dim=128)
TIED2, TIED3 = dict(QWEN2, tie_word_embeddings=True), dict(QWEN3, tie_word_embeddings=True)
GEMMA = dict(model_type="gemma", head_dim=256)
SIZES = ["vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads"]
# short name, Hub id and what its config.json says, so that `weights="random"` needs neither files nor network
NAMED = [
    ("minilm", "sentence-transformers/all-MiniLM-L6-v2", BERT, 30522, 512, 384, 1536, 6, 12),
    ("bert-base", "google-bert/bert-base-uncased", BERT, 30522, 512, 768, 3072, 12, 12),
    ("bert-large", "google-bert/bert-large-uncased", BERT, 30522, 512, 1024, 4096, 24, 16),
    ("roberta-base", "FacebookAI/roberta-base", ROBERTA, 50265, 514, 768, 3072, 12, 12),
    ("roberta-large", "FacebookAI/roberta-large", ROBERTA, 50265, 514, 1024, 4096, 24, 16),
    ("xlm-roberta-base", "FacebookAI/xlm-roberta-base", XLM, 250002, 514, 768, 3072, 12, 12),
    ("xlm-roberta-large", "FacebookAI/xlm-roberta-large", XLM, 250002, 514, 1024, 4096, 24, 16),
    ("deberta-v3-xsmall", "microsoft/deberta-v3-xsmall", DEBERTA, 128100, 512, 384, 1536, 12, 6),
    ("deberta-v3-small", "microsoft/deberta-v3-small", DEBERTA, 128100, 512, 768, 3072, 6, 12),
    ("deberta-v3-base", "microsoft/deberta-v3-base", DEBERTA, 128100, 512, 768, 3072, 12, 12),
    ("deberta-v3-large", "microsoft/deberta-v3-large", DEBERTA, 128100, 512, 1024, 4096, 24, 16),
    ("gpt2", "openai-community/gpt2", GPT2),
    ("gpt2-medium", "openai-community/gpt2-medium", GPT2_MEDIUM),
    ("dialogpt-medium", "microsoft/DialoGPT-medium", GPT2_MEDIUM),
    ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", dict(SMOL, pad_token_id=2), 49152, 8192, 576, 1536, 30, 9, 3),
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", SMOL, 49152, 8192, 576, 1536, 30, 9, 3),
    ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", SMOL, 49152, 8192, 960, 2560, 32, 15, 5),
    ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", dict(SMOL, rope_theta=1.3e5), 49152, 8192, 2048, 8192, 24, 32, 32),
    ("llama2-7b", "meta-llama/Llama-2-7b-hf", LLAMA, 32000, 4096, 4096, 11008, 32, 32, 32),
    ("llama2-13b", "meta-llama/Llama-2-13b-hf", LLAMA, 32000, 4096, 5120, 13824, 40, 40, 40),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B", dict(LLAMA, rope_theta=5e5), 128256, 8192, 4096, 14336, 32, 32, 8),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B", LLAMA31, 128256, 131072, 4096, 14336, 32, 32, 8),
    ("llama3.2-1b", "meta-llama/Llama-3.2-1B", LLAMA32, 128256, 131072, 2048, 8192, 16, 32, 8),
    ("llama3.2-3b", "meta-llama/Llama-3.2-3B", LLAMA32, 128256, 131072, 3072, 8192, 28, 24, 8),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1", MISTRAL, 32000, 32768, 4096, 14336, 32, 32, 8),
    ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", dict(MISTRAL, sliding_window=None, rope_theta=1e6),
     32768, 32768, 4096, 14336, 32, 32, 8),
    ("olmo2-1b", "allenai/OLMo-2-0425-1B", OLMO2, 100352, 4096, 2048, 8192, 16, 16, 16),
    ("olmo2-7b", "allenai/OLMo-2-1124-7B", OLMO2, 100352, 4096, 4096, 11008, 32, 32, 32),
    ("qwen2-7b", "Qwen/Qwen2-7B", QWEN2, 152064, 131072, 3584, 18944, 28, 28, 4),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", TIED2, 151936, 32768, 896, 4864, 24, 14, 2),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", TIED2, 151936, 131072, 1536, 8960, 28, 12, 2),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B", TIED2, 151936, 32768, 2048, 11008, 36, 16, 2),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B", QWEN2, 152064, 131072, 3584, 18944, 28, 28, 4),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", TIED3, 151936, 40960, 1024, 3072, 28, 16, 8),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", TIED3, 151936, 40960, 2048, 6144, 28, 16, 8),
    ("qwen3-4b", "Qwen/Qwen3-4B", TIED3, 151936, 40960, 2560, 9728, 36, 32, 8),
    ("qwen3-8b", "Qwen/Qwen3-8B", QWEN3, 151936, 40960, 4096, 12288, 36, 32, 8),
    ("gemma-7b", "google/gemma-7b", GEMMA, 256000, 8192, 3072, 24576, 28, 16, 16),
    ("vit-b16", "google/vit-base-patch16-224-in21k", VIT, 0, 0, 768, 3072, 12, 12),
    ("vit-l16", "google/vit-large-patch16-224-in21k", VIT, 0, 0, 1024, 4096, 24, 16),
]
HUB = {name: hub_id for name, hub_id, *_ in NAMED}
CONFIGS = {name: {**series, **dict(zip(SIZES, numbers))} for name, _, series, *numbers in NAMED}


def resolve(name, weights=True):
    """The checkpoint folder of a local path (which wins), `vit-digits`, a short name of `HUB` or a Hub id `org/name`.

    Hub files go to huggingface_hub's cache; pickled weights are never fetched, with `weights=False` none at all.
    Raises UserError when the files cannot be had.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name == "vit-digits":
        return Path(__file__).resolve().parent / "assets" / "vit-digits"
    repo = HUB.get(str(name), str(name))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"model '{name}': no such folder, nor a Hub id 'org/name', nor vit-digits, {', '.join(HUB)}")
    import huggingface_hub  # here, not above: half a second that a run on local files need not wait for
    from huggingface_hub.errors import HfHubHTTPError
    wanted = ["*.json", "*.txt", "*.jinja", "*.model"] + ["*.safetensors"] * weights
    try:  # sub-folders and consolidated*.safetensors hold the same weights in other formats
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted,
                                                      ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError, HfHubHTTPError.__mro__[1]) as error:  # the last: its HTTP client's HTTPError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"model '{name}': cannot get {repo} from the Hub ({reason}); put config.json, *.safetensors "
                        f"and tokenizer*.json of https://huggingface.co/{repo} into a folder and give its path, or "
                        "set HF_TOKEN if the model is gated") from error


# Settings of config.json that are read, with transformers' defaults; ... where the file has to have one
COMMON = dict(num_labels=2, initializer_range=0.02, architectures=[], id2label={}, problem_type=None)
SHAPE = dict(COMMON, hidden_size=..., intermediate_size=..., num_hidden_layers=..., num_attention_heads=...)
IMAGES = dict(SHAPE, hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
              qkv_bias=True, image_size=None, patch_size=None, num_channels=3)
TEXT = dict(SHAPE, hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
            vocab_size=..., max_position_embeddings=..., type_vocab_size=2, pad_token_id=0, classifier_dropout=None)
RELATIVE = dict(TEXT, layer_norm_eps=1e-7, type_vocab_size=0, pos_att_type=None, share_att_key=False,
                max_relative_positions=-1, position_buckets=-1, norm_rel_ebd="none", position_biased_input=True,
                pooler_dropout=0.0, cls_dropout=None, relative_attention=False)
ROTARY = dict(SHAPE, vocab_size=..., hidden_act="silu", rms_norm_eps=1e-6, attention_dropout=0.0, pad_token_id=-1,
              num_key_value_heads=0, head_dim=0, attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
              rope_theta=None, rope_scaling=None, rope_parameters=None, original_max_position_embeddings=None)
WINDOWS = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
LEARNED = dict(COMMON, vocab_size=..., n_embd=..., n_layer=..., n_head=..., n_inner=0, n_positions=1024,
               activation_function="gelu_new", layer_norm_epsilon=1e-5, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1,
               tie_word_embeddings=True, pad_token_id=-1)
# model_type -> what its classes are called in transformers, kind of class here, settings
FAMILIES = {
    "bert": ("Bert", "encoder", TEXT),
    "roberta": ("Roberta", "encoder", dict(TEXT, pad_token_id=1)),
    "xlm-roberta": ("XLMRoberta", "encoder", dict(TEXT, pad_token_id=1)),
    "deberta-v2": ("DebertaV2", "encoder", RELATIVE),
    "llama": ("Llama", "decoder", ROTARY),
    "mistral": ("Mistral", "decoder", dict(ROTARY, sliding_window=4096)),
    "qwen2": ("Qwen2", "decoder", dict(ROTARY, **WINDOWS, qkv_bias=True)),
    "qwen3": ("Qwen3", "decoder", dict(ROTARY | WINDOWS, head_dim=128)),
    "gemma": ("Gemma", "decoder", dict(ROTARY, head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)),
    "olmo2": ("Olmo2", "decoder", dict(ROTARY, rms_norm_eps=1e-5)),
    "gpt2": ("GPT2", "decoder", LEARNED),
    "vit": ("ViT", "vit", IMAGES)}
# settings that are called otherwise in some families
NAMES = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
         "n_head": "num_attention_heads", "n_positions": "max_position_embeddings", "activation_function": "hidden_act",
         "resid_pdrop": "hidden_dropout_prob", "attn_pdrop": "attention_dropout", "cls_dropout": "classifier_dropout",
         "attention_probs_dropout_prob": "attention_dropout", "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps",
         "layer_norm_epsilon": "norm_eps"}
# Keys of config.json with which transformers computes what is not built here, unless they have the value given,
FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {},
         "is_encoder_decoder": False, "partial_rotary_factor": 1.0, "use_bidirectional_attention": False,
         "quantization_config": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "conv_kernel_size": 0, "pooler_hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
# and those that change no logits (names, export, memory, pre-training, decoding), or would show in tensors' shapes
IRRELEVANT = re.compile(
    r"_.*|.*_tokens?(_ids?)?|.*_length|.*_penalty|.*dtype|.*beam.*|.*_ngram_size|output_.*|pooler_.*|summary_.*|"
    r"mask_.*|cls_token.*|unsloth_.*|tokenizer_class|transformers_version|transformers\.js_config|torchscript|prefix|"
    r"use_(cache|bfloat16|mrope)|tf_legacy_loss|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|n_ctx|"
    r"directionality|encoder_stride|finetuning_task|task_specific_params|is_llama_config|rope_interleaved|return_dict|"
    r"tie_(word_embeddings|encoder_decoder)|initializer_factor|cross_attention_hidden_size|temperature|top_[kp]|legacy|"
    r"typical_p|do_sample|num_return_sequences|early_stopping|remove_invalid_values|bad_words_ids|auto_map|label2id|"
    r"reorder_and_upcast_attn|embedding_size|attention_head_size|max_position_embeddings|is_causal")
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
ROPE = {"default": [], "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}


class Config(SimpleNamespace):
    """The settings of a config.json and what follows from them, called alike in every family; see `normalise`.

    kind: "encoder", "decoder" or "vit"; rope: its theta, type and that type's settings; windows: tokens that a query
    sees, itself included, or None for all, per layer; image_size (channels, height, width); patch_size (height, width).
    """

    # of families that have no such setting
    vocab_size = max_position_embeddings = type_vocab_size = hidden_dropout_prob = max_window_layers = 0
    num_key_value_heads = head_dim = layer_types = rope = sliding_window = qkv_bias = None
    tie_word_embeddings = False
    use_sliding_window = attention_bias = mlp_bias = True


def find_config(name, weights="checkpoint", changes=None):
    """Return (Config, folder) of the model `name`; with weights="random" a name in `CONFIGS` needs no folder: None."""
    if weights == "random" and name in CONFIGS and not Path(name).is_dir():
        return normalise(CONFIGS[name] | (changes or {}), f"built-in config of {name}"), None
    folder = resolve(name, weights=weights != "random")
    path = folder / "config.json"
    return normalise(read_json(path) | (changes or {}), path), folder


def distinct(pairs, where=""):
    """The dict of (name, value) pairs; raises UserError if a name is there twice: one of the values would be lost."""
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        raise UserError(f"{where}{max(names, key=names.count)[:40]!a} is there twice: rename or remove one")
    return dict(pairs)


def read_json(path):
    """The dict in a JSON file; raises UserError if there is none in it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}, expected an object")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: is {path.parent} the folder that was meant?") from None
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not a JSON object ({error}); mend it, or download it again") from None
    return raw


def read_settings(path):
    """The dict in a JSON file, {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def normalise(raw, path):
    """Turn the dict of a config.json into a Config, with transformers' defaults; `path` is for error messages."""
    def refuse(key, expected):
        raise UserError(f"{path}: '{key}' is {raw.get(key, 'missing')!r}, expected {expected}")

    def check(key, value, kind, low, high):
        if not isinstance(value, (int, kind)) or isinstance(value, bool) or not low <= value <= high:
            refuse(key, f"{kind.__name__} from {low} to {high}")

    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        refuse("model_type", f"one of {', '.join(FAMILIES)}")
    _, kind, settings = FAMILIES[family]
    family = "roberta" if family == "xlm-roberta" else family  # which differs in its vocabulary and its class's name
    c = Config(family=family, kind=kind, raw=raw)
    for key, only in (FIXED | {"is_causal": kind == "decoder"}).items():
        if raw.get(key) not in (None, only):
            refuse(key, f"{only}: nothing else is supported")
    for key, default in settings.items():
        value = raw.get(key, default)
        if value is None and key != "sliding_window":  # where null means that there is none
            value = default
        if default is ... or type(default) is int and value is not None:
            check(key, value, int, 1 if default is ... else min(default, 0), 2**24)
        elif isinstance(default, float) or "dropout" in key and value is not None:
            check(key, value, float, 0, 1)
        elif isinstance(default, (list, dict)) and not isinstance(value, type(default)):
            refuse(key, f"a {type(default).__name__}")
        setattr(c, NAMES.get(key, key), value)
    known = {"model_type", *settings, *FIXED}
    unread = [key for key, value in raw.items() if value not in (None, False, 0, "", [], {})
              and key not in known and not IRRELEVANT.fullmatch(key)]
    if unread:
        note(f"{path}: not read, as no family here computes with it: {', '.join(unread)}")

    if c.problem_type == "multi_label_classification":
        refuse("problem_type", "one label per row: several are not supported; set it to null to train a head anew")
    c.num_labels = len(c.id2label) or c.num_labels
    c.intermediate_size = c.intermediate_size or 4 * c.hidden_size
    hidden, heads = c.hidden_size, c.num_attention_heads
    c.num_key_value_heads, c.head_dim = c.num_key_value_heads or heads, c.head_dim or hidden // heads
    if (heads % c.num_key_value_heads or hidden % heads and c.head_dim == hidden // heads
            or kind == "decoder" and c.head_dim % 2):
        raise UserError(f"{path}: num_attention_heads {heads} must divide hidden_size {hidden} and be a multiple of "
                        f"num_key_value_heads {c.num_key_value_heads}, head_dim {c.head_dim} must be even")
    if family == "gemma" and c.hidden_act == "gelu":  # so its first releases say and mean the tanh form
        c.hidden_act = "gelu_pytorch_tanh"
    if not isinstance(c.hidden_act, str) or c.hidden_act not in ACTIVATIONS:
        refuse("activation_function" if family == "gpt2" else "hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    c.qkv_bias = c.attention_bias if c.qkv_bias is None else c.qkv_bias
    if "rope_theta" in settings:  # transformers 5 writes rope_scaling and rope_theta into rope_parameters
        rope = c.rope_scaling or c.rope_parameters or {}
        rope = {"rope_theta": c.rope_theta or 1e4, **(rope if isinstance(rope, dict) else {"type": rope})}
        rope |= {key: raw[key] for key in ROPE["llama3"][3:] if raw.get(key)}  # which wins there
        rope["rope_type"] = str(rope.get("rope_type", rope.get("type", "default")))
        numbers = [rope.get(key) for key in ["rope_theta", *ROPE.get(rope["rope_type"], ["unknown"])]]
        if not (all(isinstance(n, (int, float)) and 0 < n < 1e12 for n in numbers)
                and rope.get("partial_rotary_factor", 1) == 1 and "full_attention" not in rope):
            raise UserError(f"{path}: rope settings {rope} are not supported, only rope_theta and the rope_type "
                            + ", ".join(f"{kind} with {keys}" if keys else kind for kind, keys in ROPE.items()))
        c.rope = rope
    window, first = c.sliding_window if c.use_sliding_window else None, c.max_window_layers
    kinds = c.layer_types or ["sliding_attention" if i >= first else "full" for i in range(c.num_hidden_layers)]
    if not isinstance(kinds, list) or len(kinds) != c.num_hidden_layers:
        refuse("layer_types", f"{c.num_hidden_layers} entries, one per layer")
    c.windows = [window if kind == "sliding_attention" else None for kind in kinds]
    if kind == "vit":
        image, patch = (tuple(size) if isinstance(size, list) else (size, size)
                        for size in (c.image_size or 224, c.patch_size or 16))
        if not (len(image) == len(patch) == 2 and all(type(n) is type(p) is int and 0 < p <= n <= 2**14
                                                      for n, p in zip(image, patch))):
            refuse("image_size", f"positive integers not below patch_size {patch}")
        c.image_size, c.patch_size = (c.num_channels, *image), patch
    model_class(c).settle(c, refuse)
    return c


class FrozenProduct(torch.autograd.Function):
    """x W^T + b by oneDNN, of frozen W and b: on CPUs where MKL is slow in float32 (AMD), twice as fast as F.linear."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):  # reads W^T in place
        return torch.ops.mkldnn._linear_pointwise(grad, ctx.saved_tensors[0].T, None, "none", [], ""), None, None


def has_frozen_product(x, weight, bias=None):
    """Whether `FrozenProduct` computes x W^T + b: frozen, float32, on a CPU; compiled code has its own."""
    return (not torch.compiler.is_compiling() and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and x.dtype == weight.dtype == torch.float32 and x.dim() > 1
            and not (weight.requires_grad or bias is not None and bias.requires_grad))


class Linear(nn.Linear):
    """nn.Linear that trains with `FrozenProduct` where it can; evaluations round as everybody's do."""

    def forward(self, x):
        if torch.is_grad_enabled() and has_frozen_product(x, self.weight, self.bias):
            return FrozenProduct.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class TokenLoss(torch.autograd.Function):
    """Sum of the cross-entropies of logits x W^T: x (N, D), W (V, D), labels (N,) long -> 0-d float32.

    Gradients are computed with the loss (as in Liger-Kernel, Hsu et al. 2024), by rows: of 2^25 logits at a time.
    """

    @staticmethod
    def forward(ctx, x, weight, labels, chunk=2**25):
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        product = FrozenProduct.apply if needs_x and has_frozen_product(x, weight) else F.linear
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        rows = max(1, chunk // len(weight))
        for start in range(0, len(x), rows):
            part, answers = x[start:start + rows], labels[start:start + rows, None]
            p = product(part, weight, None).float().log_softmax(-1)  # (rows, V)
            total -= p.gather(1, answers).sum()
            if needs_x or needs_weight:  # the gradient of the logits is softmax - one-hot
                grad = p.exp_().scatter_add_(1, answers, -torch.ones_like(p[:, :1])).to(x.dtype)
            if needs_x:
                grad_x[start:start + rows] = product(grad, weight.T, None)
            if needs_weight:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if g is None else (grad * g).to(g.dtype) for g in ctx.saved_tensors), None, None


def dropout(x, p):
    """Dropout whose mask takes 16 random bits per entry: drawing is most of dropout's time on a CPU."""
    if x.device.type != "cpu" or p in (0, 1) or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    keep = bits[:x.numel()].view(x.shape).ge_(round(p * 2**16) - 2**15)  # 0 or 1, still int16: bool is slow to convert
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def attention(q, k, v, mask, causal, p, scale):
    """Softmax attention of q (B, H, T, D) over k and v (B, G, S, D), mask None or bool (B, 1, T, S) -> (B, T, H * D).

    A mask of floats (B, H, T, S) is added to q k^T times `scale`. CUDA's masked kernels know no groups of query heads:
    there k and v are repeated. The heads of a single query token become the rows of one query. In training the CPU's
    kernel is slower than the plain formula: 3 times in bfloat16, a little with dropout `p`.
    """
    (B, H, T, D), G = q.shape, k.shape[1]
    plain = q.device.type == "cpu" and torch.is_grad_enabled() and (p > 0 or q.dtype == torch.bfloat16)
    grouped = G < H and T > 1 and mask is None and not plain
    if G < H and T == 1:
        q, causal = q.reshape(B, G, H // G, D), False
    elif G < H and not grouped:
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    if plain:
        scores = (q * scale) @ k.mT  # (B, H, T, S)
        seen = torch.ones(T, T, dtype=torch.bool).tril() if causal else mask
        if seen is not None and seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -math.inf)
        if seen is not None:
            scores = scores + seen
        y = dropout(scores.softmax(-1), p) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale,
                                           enable_gqa=grouped)
    return y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32; gemma stores the weight minus one, it and olmo2 multiply before the cast."""

    def __init__(self, size, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset = config.norm_eps, float(config.family == "gemma")
        self.cast_last = config.family in ("gemma", "olmo2")

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return (y * (self.weight.float() + self.offset)).to(x.dtype) if self.cast_last else self.weight * y.to(x.dtype)


def rope_frequencies(config):
    """Angular frequencies of the rotary embedding, float32 (head_dim / 2,), scaled as `config.rope` says."""
    rope = config.rope
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim)
    if rope["rope_type"] == "default":
        return frequencies
    blend = 0.0
    if rope["rope_type"] == "llama3":  # waves longer than the old context are stretched, short ones stay, others blend
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope["factor"] + blend * frequencies


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, D) with cos and sin (T, D) or (B, 1, T, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Cache:
    """Preallocated keys and values of all layers, each (layers, B, kv_heads, capacity, head_dim)."""

    def __init__(self, model, batch, capacity):
        c, like = model.config, model.embed.weight  # which may be sharded: new_empty would be, too
        self.keys, self.values = torch.empty(2, c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim,
                                             dtype=like.dtype, device=like.device)
        self.length = 0  # tokens that all layers have seen; advanced by Decoder.forward

    def update(self, layer, k, v):
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end], self.values[layer, :, :, self.length:end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def make_norm(config):
    """The norm between the parts of the family's blocks: RMSNorm with rotary embedding, else LayerNorm."""
    D = config.hidden_size
    return RMSNorm(D, config) if config.rope else nn.LayerNorm(D, eps=config.norm_eps)


class Block(nn.Module):
    """Attention and MLP with norms before both; in olmo2 after both, in encoders after the sums."""

    def __init__(self, config, index):
        super().__init__()
        D, inner, dim, self.config = config.hidden_size, config.intermediate_size, config.head_dim, config
        q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.query = Linear(D, q, bias=config.qkv_bias)
        self.key, self.value = (Linear(D, kv, bias=config.qkv_bias) for _ in range(2))
        self.out = Linear(q, D, bias=config.attention_bias)
        if config.rope:
            self.gate = Linear(D, inner, bias=config.mlp_bias)
        self.up, self.down = Linear(D, inner, bias=config.mlp_bias), Linear(inner, D, bias=config.mlp_bias)
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        if config.family == "qwen3":  # one norm for all heads, of each head
            self.query_norm, self.key_norm = RMSNorm(dim, config), RMSNorm(dim, config)
        elif config.family == "olmo2":  # of all heads together
            self.query_norm, self.key_norm = RMSNorm(q, config), RMSNorm(kv, config)
        self.index, self.window, self.family = index, config.windows[index], config.family
        self.head_dim, self.scale = dim, dim ** -0.5
        self.dropout, self.attention_dropout = Dropout(config.hidden_dropout_prob), config.attention_dropout
        self.activation, self.gated = ACTIVATIONS[config.hidden_act], config.rope is not None
        self.norm_sum, self.norm_last = config.kind == "encoder", config.family == "olmo2"
        self.norm_first = not (self.norm_sum or self.norm_last)

    def forward(self, x, masks, first_token_only=False, angles=None, cache=None, **more):
        """x (B, T, D) -> (B, T, D), or (B, 1, D) of the first token.

        masks: {window: (mask (B or 1, 1, 1 or T, S), is_causal)}; angles: (cos, sin) for `rotate`; more: for `attend`.
        """
        y = self.norm1(x) if self.norm_first else x
        if first_token_only:  # nobody reads the others' outputs
            x = x[:, :1]
        q, k, v = self.query(y[:, :1] if first_token_only else y), self.key(y), self.value(y)
        if self.family == "olmo2":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (split_heads(t, self.head_dim) for t in (q, k, v))
        if self.family == "qwen3":
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        y = self.attend(q, k, v, *masks[self.window], **more)
        x = self.add(x, self.dropout(self.out(y)), self.norm1)
        y = self.norm2(x) if self.norm_first else x
        y = self.activation(self.gate(y)) * self.up(y) if self.gated else self.activation(self.up(y))
        return self.add(x, self.dropout(self.down(y)), self.norm2)

    def attend(self, q, k, v, mask, causal):
        """`attention` with the block's own scale and dropout."""
        return attention(q, k, v, mask, causal, self.attention_dropout if self.training else 0.0, self.scale)

    def add(self, x, y, norm):
        if self.norm_sum:
            return norm(x + y)
        return x + (norm(y) if self.norm_last else y)


def causal_mask(mask, start, length, window, device):
    """(mask, is_causal) for `length` queries from index `start` on: mask (B or 1, 1, T, S) bool, or None if not needed.

    A query sees the real tokens less than `window` before it, and itself even if it is padding: rows without any are
    NaN in some kernels. The kernel's own causal rule costs less than a mask and is used where it is enough.
    """
    end = start + length
    if mask is None and (window is None or end <= window) and (start == 0 or length == 1):
        return None, length > 1
    q, k = torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device)
    seen = (k <= q) & (k > q - (window or end))  # (T, S)
    return (seen[None, None] if mask is None else seen & mask[:, None, None, :end] | (k == q)), False


class Transformer(nn.Module):
    """What the three model classes share: names in transformers' checkpoints, and the loop over the blocks."""

    module_names = {}  # where transformers' models name things otherwise than its checkpoints

    @staticmethod
    def settle(config, refuse):
        """Add to a Config what follows in this family alone; refuse(key, expected) raises UserError."""

    def __init__(self, config, head):
        super().__init__()
        self.config, self.family, self.head_kind = config, config.family, head  # head "lm", "classify" or "span"
        self.tied = head == "lm" and config.tie_word_embeddings  # the head is the embedding
        self.max_length = math.inf  # tokens that there are positions for
        self.checkpointing = False  # True: in training, recompute each block's activations in the backward pass
        self.fresh, self.plain_names = [], []  # parameters that the checkpoint lacked; all, without later adapters
        self.unused_outputs = 0  # of a trained head in the checkpoint that was left out
        self.labels = ()  # of a classifier's outputs, and which of the base's they are; eval.load sets all three
        self.head_rows = self.head_remark = None
        self.decoding = None  # what `generate` says about the checkpoint's own settings

    def hf_name(self, name, module=False):
        """Our parameter's or module's name in transformers' checkpoints; module=True: in its models, as PEFT has it."""
        for ours, theirs in self.head_names.items():
            if name.startswith(ours):
                return name.replace(ours, theirs, 1)
        names = {**self.names, **(self.module_names if module else {})}
        return ".".join([self.prefix, *(names.get(part, part) for part in name.split("."))])

    def classify(self, x):
        """Logits of the head, which is float32 whatever the model's dtype: x (..., D) -> (..., num_labels)."""
        return self.head(x.to(next(self.head.parameters()).dtype))

    def run_blocks(self, x, masks, first_token_only=False, **inputs):
        """Every block in turn, x (B, T, D) -> (B, T, D), or (B, 1, D) with `first_token_only` and no hook there."""
        first_token_only = first_token_only and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                                                        or m._backward_pre_hooks for m in self.blocks[-1].modules())
        for block in self.blocks:
            run = block
            if self.checkpointing and self.training:
                run = functools.partial(checkpoint, block, use_reentrant=False)
            x = run(x, masks, first_token_only and block is self.blocks[-1], **inputs)
        return x


class Encoder(Transformer):
    """bert and roberta with a head for classification, regression (num_labels = 1) or spans."""

    block = Block
    heads = {"classify": "SequenceClassification", "span": "QuestionAnswering"}
    head_names = {"head": "classifier"}
    names = {"embed": "embeddings.word_embeddings", "embed_norm": "embeddings.LayerNorm", "blocks": "encoder.layer",
             "positions": "embeddings.position_embeddings", "types": "embeddings.token_type_embeddings",
             "pooler": "pooler.dense", "query": "attention.self.query", "key": "attention.self.key",
             "value": "attention.self.value", "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
             "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm"}

    def __init__(self, config, head):
        super().__init__(config, head)
        D, self.prefix = config.hidden_size, config.family
        self.embed = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Embedding(config.max_position_embeddings, D) if config.max_position_embeddings else None
        self.types = nn.Embedding(config.type_vocab_size, D) if config.type_vocab_size else None
        self.embed_norm = make_norm(config)
        self.dropout, p = Dropout(config.hidden_dropout_prob), config.classifier_dropout
        head_dropout = Dropout(config.hidden_dropout_prob if p is None else p)
        self.blocks = nn.ModuleList(self.block(config, i) for i in range(config.num_hidden_layers))
        if head == "span":
            self.head, self.head_names = Linear(D, 2), {"head": "qa_outputs"}
        elif config.family == "bert":
            self.pooler, self.head = Linear(D, D), Linear(D, config.num_labels)
            self.pooled_dropout = head_dropout
        else:
            self.head = nn.Sequential(OrderedDict(first_dropout=head_dropout, dense=Linear(D, D), activation=nn.Tanh(),
                                                  dropout=head_dropout, out_proj=Linear(D, config.num_labels)))
        self.max_length = config.max_position_embeddings or math.inf
        if config.family == "roberta":  # counts positions from pad_id + 1
            self.max_length -= config.pad_token_id + 1

    def forward(self, tokens, mask=None, types=None):
        """Logits (B, num_labels) of the first token; span: (B, T, 2), of all, as an answer's first and last."""
        if self.head_kind == "span":
            return self.classify(self.hidden_states(tokens, mask, types))
        x = self.hidden_states(tokens, mask, types, first_token_only=True)[:, 0]  # (B, D)
        return self.classify(self.pooled_dropout(torch.tanh(self.pooler(x))) if self.family == "bert" else x)

    def hidden_states(self, tokens, mask=None, types=None, first_token_only=False):
        """tokens, mask (bool, True = real token, None: no padding) and types, all (B, T), -> (B, T, D).

        `first_token_only`: see `run_blocks`.
        """
        visible = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
        x = self.dropout(self.embeddings(tokens, types))
        return self.run_blocks(x, {None: (visible, False)}, first_token_only)

    def embeddings(self, tokens, types=None):
        """What the first block reads, (B, T, D); raises UserError when T exceeds the position table."""
        T, pad = tokens.shape[1], self.config.pad_token_id
        if T > self.max_length:
            raise UserError(f"{T} tokens, but the model has {self.max_length} positions: lower --max-length")
        x = self.embed(tokens)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.family == "roberta":  # padding has position pad
            real = tokens != pad
            x = x + self.positions(real.cumsum(1) * real + pad)
        elif self.positions is not None:
            x = x + self.positions.weight[:T]
        return self.embed_norm(x)


class Decoder(Transformer):
    """The LLaMA family and gpt2 with a next-token ("lm") or a sequence classification head."""

    heads = {"lm": "CausalLM", "classify": "SequenceClassification"}
    prefix = "model"
    names = {"embed": "embed_tokens", "blocks": "layers", "norm": "norm", "query": "self_attn.q_proj",
             "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
             "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm", "norm1": "input_layernorm",
             "norm2": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    olmo2_names = {**names, "norm1": "post_attention_layernorm", "norm2": "post_feedforward_layernorm"}
    gpt2_names = {"embed": "wte", "positions": "wpe", "blocks": "h", "norm": "ln_f", "query": "attn.c_attn",
                  "key": "attn.c_attn", "value": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc",
                  "down": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"}

    def __init__(self, config, head):
        super().__init__(config, head)
        self.head_names = {"head": "lm_head" if head == "lm" else "score"}
        D = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.head = Linear(D, config.vocab_size if head == "lm" else config.num_labels, bias=False)
        if config.family == "gpt2":
            self.prefix, self.names, self.max_length = "transformer", self.gpt2_names, config.max_position_embeddings
            self.positions = nn.Embedding(config.max_position_embeddings, D)
            self.dropout = Dropout(config.embd_pdrop)
        else:
            self.names = self.olmo2_names if config.family == "olmo2" else self.names
            self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def forward(self, tokens, mask=None, positions=None, cache=None, position_ids=None, right_padded=False,
                labels=None):
        """tokens (B, T) long, mask (B, T) bool with True = real token (None: no padding) -> logits.

        lm: (B, T, V), or (N, V) at `positions` (N,), flat indices into B * T; with `labels` (N,), which follow there,
        their `TokenLoss`. classify: (B, num_labels) at the last real token. right_padded=True promises padding
        on the right: causal attention never reaches it, and no mask is faster. `position_ids` (B, T): 0..T-1 by default
        (with left padding only gpt2's matter). With a `cache`, tokens are the next T and the mask covers all so far.
        """
        T, start, angles = tokens.shape[1], 0 if cache is None else cache.length, None
        x = self.embed(tokens)
        at = torch.arange(start, start + T, device=x.device) if position_ids is None else position_ids
        if self.family == "gpt2":
            if start + T > self.max_length:
                raise UserError(f"{start + T} tokens, but the model has {self.max_length} positions: lower "
                                "--max-length, or where text is generated leave out long prompts, which stay whole")
            x = self.dropout(x + self.positions(at))
        else:
            turn = torch.cat((at[..., None] * self.frequencies,) * 2, -1)  # (T, D) or (B, T, D)
            turn = turn if position_ids is None else turn[:, None]
            angles = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
        if self.family == "gemma":
            x = x * x.new_full((), self.config.hidden_size ** 0.5)  # a tensor: rounded to the dtype before multiplying
        padding = None if right_padded else mask
        masks = {w: causal_mask(padding, start, T, w, x.device) for w in dict.fromkeys(self.config.windows)}
        x = self.run_blocks(x, masks, angles=angles, cache=cache)
        if cache is not None:
            cache.length += T
        if self.head_kind == "classify":
            real = (tokens != self.config.pad_token_id) & (mask is None or mask)  # transformers asks for the id alone
            last = (torch.arange(T, device=x.device) * real).argmax(1)
            return self.classify(self.norm(x[torch.arange(len(x), device=x.device), last]))
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        if labels is None:
            return self.head(self.norm(x))
        W = self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()
        return TokenLoss.apply(self.norm(x), W, labels)


class ViT(Transformer):
    """Vision transformer with an image classification head on the class token."""

    heads = {"classify": "ImageClassification"}
    prefix, head_names = "vit", {"head": "classifier"}
    names = {**Encoder.names, "cls_token": "embeddings.cls_token", "patch": "embeddings.patch_embeddings.projection",
             "norm": "layernorm", "query": "attention.attention.query", "key": "attention.attention.key",
             "value": "attention.attention.value", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    module_names = {"blocks": "layers", "query": "attention.q_proj", "key": "attention.k_proj",
                    "value": "attention.v_proj", "out": "attention.o_proj", "up": "mlp.fc1", "down": "mlp.fc2"}

    def __init__(self, config, head):
        super().__init__(config, head)
        D, (channels, height, width), patch = config.hidden_size, config.image_size, config.patch_size
        self.patch = nn.Conv2d(channels, D, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, (height // patch[0]) * (width // patch[1]) + 1, D))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.head = Linear(D, config.num_labels)

    def forward(self, pixels):
        """pixels (B, C, H, W) float, normalised -> (B, num_labels); raises UserError for another image size."""
        x = self.hidden_states(pixels, first_token_only=True)[:, 0]  # (B, D) of the class token
        return self.classify(self.norm(x))

    def hidden_states(self, pixels, first_token_only=False):
        """The last block's output, class token first, (B, 1 + patches, D); see Encoder.hidden_states."""
        if pixels.shape[1:] != self.config.image_size:
            raise UserError(f"images of shape {tuple(pixels.shape[1:])}, but the model takes {self.config.image_size}")
        x = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.run_blocks(self.dropout(x), {None: (None, False)}, first_token_only)


def model_class(config):
    """The Transformer of a Config's family."""
    if config.family == "deberta-v2":
        from extras.deberta import Deberta  # which imports this module
        return Deberta
    return {"encoder": Encoder, "vit": ViT, "decoder": Decoder}[config.kind]


# settings of generation_config.json that change what transformers decodes, with the values that do not
DECODING = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0,
            "guidance_scale": 1, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0,
            "token_healing": False, **dict.fromkeys("""bad_words_ids suppress_tokens begin_suppress_tokens penalty_alpha
            forced_bos_token_id forced_eos_token_id min_new_tokens sequence_bias stop_strings
            exponential_decay_length_penalty watermarking_config max_time dola_layers constraints""".split())}


def load(name, head=None, num_labels=None, dtype=torch.float32, device="cpu", weights="checkpoint", seed=0,
         mapped=False, outputs=None, int8=False, changes=None):
    """Build the model `name` (see `resolve`) in evaluation mode, all parameters frozen; UserError: anything wrong.

    head: "lm" (decoders), "span" (encoders) or "classify" (`num_labels` outputs, 1 for regression; by default as many
    as the checkpoint has); None is what the checkpoint was saved as. weights="random" draws all from `seed`, as what
    `model.fresh` names. `mapped` leaves on the CPU what has the `dtype` in the file: pages that all processes of a
    machine share. `outputs`: indices of the checkpoint's outputs that become the model's, [] for a new head; by default
    all, if they are as many. `int8` keeps the blocks' matrices as extras/int8.py's; `changes` override the config.json.
    """
    config, folder = find_config(name, weights, changes)
    kind = model_class(config)
    if head is None:
        saved_as = str((config.raw.get("architectures") or [""])[0])
        head = next((ours for ours, theirs in kind.heads.items() if saved_as.endswith(theirs)), [*kind.heads][0])
    if head not in kind.heads:
        raise UserError(f"model '{name}': a {config.family} model has no head '{head}', only {' or '.join(kind.heads)}")
    there = config.num_labels  # outputs of the checkpoint's head, by its config.json
    if head == "span" or num_labels is not None:
        config.num_labels = 2 if head == "span" else num_labels
    if outputs is None:  # the checkpoint's own, if they are as many
        there, outputs = config.num_labels, list(range(config.num_labels))
    if config.num_labels < 1:
        raise UserError(f"num_labels is {config.num_labels}, expected 1 (regression) or more")
    with torch.device("meta"):
        model = kind(config, head)
    model.plain_names = [key for key, _ in model.named_parameters()]
    if weights == "random":
        model.fresh = [key for key in model.plain_names if not (model.tied and key == "head.weight")]
    else:
        model.fresh = read_weights(model, folder, there, outputs, dtype=dtype, device=device, mapped=mapped, int8=int8)
        path = folder / "generation_config.json"
        path = path if path.is_file() else folder / "config.json"  # where older releases have them
        asked = read_settings(path)
        other = [f"{key} {asked[key]}" for key, plain in DECODING.items() if asked.get(key) not in (None, plain)]
        model.decoding = f"{path}: not applied, decoding is greedy: {', '.join(other)}" if other else None
    # a new head is the same on every device; a whole random model is drawn where that is fast
    generator = torch.Generator(device if weights == "random" else "cpu").manual_seed(seed)
    for parameter in model.fresh:
        place(model, parameter, initial(model, parameter, generator), dtype, device, int8)
    if model.tied:
        model.head.weight = model.embed.weight
        model.plain_names.remove("head.weight")
    for buffer, value in list(model.named_buffers()):
        setattr(model, buffer, value.to(device))
    return model.eval()


def compile_blocks(blocks, graphs=False):
    """Compile each block on its own: those of one kind share code; with `graphs` a GPU replays it as a CUDA graph."""
    torch._dynamo.config.recompile_limit = 64 + 8 * len(blocks)  # 8 are too few where adapters differ by block
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # advice for float32; the blocks are bfloat16
    for block in blocks:
        block.compile(mode="reduce-overhead" if graphs else None)


def without_graphs(s):
    """Inside this context no CUDA graph is made or used: for shapes that come once, and trials of memory."""
    return torch.compiler.set_stance("force_eager") if s.compile == "graphs" else contextlib.nullcontext()


def place(model, name, value, dtype, device, int8=False, mapped=False):
    """Make a copy of `value` the frozen parameter `name`; see `load` for the options."""
    path, _, leaf = name.rpartition(".")  # a head that is trained stays float32, since small steps on bfloat16 are lost
    dtype = torch.float32 if path.startswith("head") and model.head_kind != "lm" else dtype
    if not (mapped and value.dtype == dtype and value.is_contiguous()):
        value = value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    module = model.get_submodule(path)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if int8 and name.startswith("blocks.") and leaf == "weight" and isinstance(module, Linear):
        from extras.int8 import Int8Linear  # which imports this module
        model.set_submodule(path, Int8Linear(module))


def initial(model, name, generator):
    """transformers' initialisation: biases 0, norms 1 (gemma's 0), normal(0, initializer_range), padding row 0."""
    config, shape = model.config, model.get_parameter(name).shape
    if name.endswith("bias") or "norm" in name:
        return torch.full(shape, 0.0 if name.endswith("bias") or config.family == "gemma" else 1.0)
    std = config.initializer_range
    if config.family == "gpt2" and name.startswith("blocks.") and ("out" in name or "down" in name):
        std /= math.sqrt(2 * config.num_hidden_layers)  # Radford et al. 2019, section 2.3: 2 residual sums per block
    value = torch.empty(shape, device=generator.device).normal_(0, std, generator=generator)
    if name == "embed.weight" and config.pad_token_id >= 0:
        value[config.pad_token_id:][:1] = 0
    return value


def weight_files(folder, config):
    """Paths of the checkpoint's safetensors files; raises UserError if there are none or one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        kind = (config.architectures or ["AutoModel"])[0]
        raise UserError(f"{single}: no such file, nor {index.name}; download it, or convert pickled weights (refused, "
                        "since unpickling runs code) where you trust them: python -c \"from transformers import "
                        f"{kind} as M; M.from_pretrained('.').save_pretrained('.')\"")
    files = read_json(index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else [f"weight_map {files}"]
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or not (folder / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is no file inside the folder; download it")
    return [folder / name for name in names]


# tensors that other heads or older versions of transformers left in a checkpoint
IGNORED = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|mask_token|masked_bias|attn\.bias)$|(^|\.)pooler\.|"
                     r"^(lm_head|cls|classifier|score|qa_outputs|decoder|(lm|mask)_predictions)\.|"
                     r"(^|\.)position_embeddings\.weight$")  # of a model that has no use for them


def open_weights(path):
    """safe_open; raises UserError for a file that is damaged, too large to be mapped, or a Git LFS pointer."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: damaged, a Git LFS pointer or too large to be mapped ({error}): "
                        "download it again, run git lfs pull, or free memory") from None


def read_weights(model, folder, there, outputs, **options):
    """Copy the checkpoint into `model`, one tensor at a time; returns the names of the parameters it does not have."""
    config, missing, others, trained_head = model.config, set(model.plain_names), [], model.head_kind != "lm"
    files = {path: open_weights(path) for path in weight_files(folder, config)}
    where = folder if len(files) > 1 else [*files][0]
    names, stored = stored_names(model, every_spelling=True), {key for file in files.values() for key in file.keys()}
    if config.tie_word_embeddings and not any(names.get(key) == ["embed.weight"] for key in stored):
        names["lm_head.weight"] = ["embed.weight"]
    body = {model.prefix, *(name.split(".")[0] for name in model.names.values())}  # where all tensors have to be known
    heads = {path.split(".")[0] for path in model.head_names.values()}
    for path, file in files.items():
        for key in file.keys():
            hf = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            ours, expected = names.get(hf, []), None
            if not ours and (IGNORED.search(hf) or hf.split(".")[0] not in body):
                others += [] if IGNORED.search(hf) and hf.split(".")[0] not in heads else [key]
                continue
            kind, shape = file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()
            if ours and missing.issuperset(ours):
                expected = list(as_stored(model, ours).shape)
            of_outputs = expected and trained_head and re.fullmatch(r"head\.(out_proj\.)?(weight|bias)", ours[0])
            if of_outputs:
                expected[0] = there  # of these the `outputs` are used
                if shape[1:] == expected[1:] and (shape != expected or not outputs):
                    model.unused_outputs = shape[0]
                    continue  # starts afresh
            if shape != expected or kind not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{path}: unexpected tensor '{key}', {kind} {shape}: by config.json there is "
                                 + (f"one of floats {expected}" if expected else "none, or it is here twice"))
            tensor = file.get_tensor(key)  # a view of the file
            tensor = tensor[outputs] if of_outputs else turned(model, ours[0], tensor)
            for name, part in zip(ours, tensor.split([len(model.get_parameter(name)) for name in ours])):
                place(model, name, part, **options)
            missing -= {*ours}
            del tensor, part  # before the next one is read
    if others:
        some = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        note(f"{where}: {len(others)} tensors of another head are not used, as in transformers: {some}")
    if model.tied and "head.weight" in missing:
        missing.remove("head.weight")
    elif model.tied and not torch.equal(model.head.weight, model.embed.weight):
        note(f"{where}: lm_head.weight differs from the embedding, though config.json ties them: both are used")
        model.tied = config.raw["tie_word_embeddings"] = False
    fresh = [name for name in model.plain_names if name in missing]
    for name in fresh:
        if not (trained_head and name.startswith(("head.", "pooler."))):
            raise UserError(f"{where}: tensor '{model.hf_name(name)}' is missing; download it again")
    return fresh


def stored_names(model, every_spelling=False):
    """{name in transformers' checkpoint: our parameters in it, one below the other}; also as its models spell them."""
    names = {}
    for name in model.plain_names:
        spellings = {model.hf_name(name)}
        if every_spelling:  # with or without the prefix that a model with a head has
            spellings.add(model.hf_name(name, module=True))
            spellings |= {theirs.removeprefix(f"{model.prefix}.") for theirs in spellings}
        for theirs in spellings:
            names.setdefault(theirs, []).append(name)
    return names


def turned(model, name, tensor):
    """Our parameter as transformers stores it, or back again: GPT-2's Conv1D has matrices (in, out)."""
    return tensor.t() if model.family == "gpt2" and name.startswith("blocks.") else tensor


def as_stored(model, names):
    """The tensor of transformers' checkpoint that our parameters make up, one below the other."""
    parts = [operator.attrgetter(name)(model).detach() for name in names]  # of adapted or int8 layers, too
    return turned(model, names[0], parts[0] if len(parts) == 1 else torch.cat(parts))


def save(model, folder, shard_bytes=5_000_000_000):
    """Write `model` over an earlier checkpoint, as transformers and `load` read it; UserError: unmerged adapters."""
    folder, config = Path(folder), model.config
    adapted = [name for name, module in model.named_modules() if getattr(module, "merged", None) is False]
    if adapted:
        raise UserError(f"{folder}: {len(adapted)} adapters ({adapted[0]} first) are not merged, and a checkpoint "
                         "holds plain weights only: merge them first, or write them with save_adapter")
    folder.mkdir(parents=True, exist_ok=True)
    from huggingface_hub import save_torch_state_dict  # here, not above: see `resolve`
    tensors = {key: as_stored(model, names) for key, names in stored_names(model).items()}
    save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes)
    raw = dict(config.raw)
    kind = f"{FAMILIES[raw['model_type']][0]}For{model.heads[model.head_kind]}"
    raw["architectures"] = [kind.replace("GPT2ForCausalLM", "GPT2LMHeadModel")]
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if model.head_kind != "lm" and len(raw.get("id2label") or ()) != config.num_labels:
        raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        raw["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    raw.pop("num_labels", None)  # transformers counts id2label
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def generate(model, tokens, mask, max_new_tokens, eos_ids, pad_id, stop=None):
    """Greedy continuation of left-padded prompts, tokens (B, T) long and mask (B, T) bool or None -> (B, N) long.

    A row ends after one of `eos_ids` (int, list or None), and `pad_id` follows. `stop`, called with what is generated
    so far (B, n), says which rows may end there, too: (B,) bool. A GPU is asked every 8 tokens whether all have ended,
    since asking waits for it: N may be up to 7 more. Raises UserError if logits are not finite.
    """
    (B, T), device = tokens.shape, tokens.device
    if model.decoding:
        note(model.decoding)
    eos = torch.tensor([eos_ids] if isinstance(eos_ids, int) else eos_ids or [], dtype=torch.long, device=device)
    padding = {}
    mask = None if mask is None or mask.all() else F.pad(mask.bool(), (0, max_new_tokens), value=True)
    cache = Cache(model, B, T + max_new_tokens)
    generated = torch.full((B, max_new_tokens), pad_id, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    every = 8 if device.type == "cuda" else 1
    total, rows = torch.zeros(B, device=device), torch.arange(B, device=device)
    ends = (rows + 1) * T - 1  # flat index of each row's last token
    for step in range(max_new_tokens):
        if mask is not None:
            places = (mask[:, :T + step].cumsum(1) - 1).clamp(min=0)
            padding = {"mask": mask[:, :T + step], "position_ids": places[:, cache.length:]}
        logits = model(tokens, positions=ends, cache=cache, **padding)  # (B, V)
        largest, chosen = logits.max(-1)
        total += largest
        generated[:, step] = torch.where(done, pad_id, chosen)
        done = done | torch.isin(generated[:, step], eos)
        if (step + 1) % every == 0 or step + 1 == max_new_tokens:
            if stop is not None:
                done = done | stop(generated[:, :step + 1])
            if done.all():
                generated = generated[:, :step + 1]
                break
        tokens, ends = generated[:, step:step + 1], rows
    require_finite(total, model)
    return generated


def require_finite(values, model):
    """Raises UserError if there is a nan or an infinity in `values`, computed from the model's outputs."""
    if not torch.isfinite(values).all():
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise UserError(f"the model's outputs in --dtype {dtype} are not finite: "
                        + ("its weights are damaged" if dtype == "float32" else "try --dtype float32"))
