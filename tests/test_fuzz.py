"""Random input files: each loads or gives the project's own one-line error, never another exception."""

import io
import json
import logging
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save

import data
import eval as evaluation
import lora
import model as models
from extras import adapter_files, images, tokenizer
from papers import tasks

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st
from model import UserError

few = settings(max_examples=100, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
odd = [2**31, 2**63, 10**30, -2**64, 10**400, 1e308, -0.0, 0.5]
numbers = st.one_of(st.integers(-3, 70), st.sampled_from(odd), st.floats())
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5)
NO_JSON = (b"", b"\xff\xfe", b"[1]", b"null", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'"\\ud800"',
           b'{"a": NaN, "a": 1e999}', b"\x00" * 50)


def dicts(keys, values, **sizes):
    """Dictionaries with some of these keys, a string of names."""
    return st.dictionaries(st.sampled_from(keys.split()), values, **sizes)


def changed(config, keys, values):
    """The config with some keys changed and perhaps one left out, or no config at all."""
    def change(changes, removed):
        return {key: value for key, value in {**config, **changes}.items() if key != removed}

    changes = dicts(keys, values, min_size=1, max_size=3)
    return st.builds(change, changes, st.sampled_from([None, *config])) | st.sampled_from(NO_JSON)


cell = st.one_of(st.text(max_size=12), st.sampled_from(
    ["0", "1", "2.5", "", '"', "nan", "a\x85b", "\x0c", "sentence", "label", "x\r"]))
TABLES = {  # head and a good row, but for its label
    "text-classification": ("text\tpair\tlabel", "a\tb\t{}"), "text-regression": ("text,score", "a,1.{}"),
    "cola": ("gj04\t1\t\tGood.", "gj04\t{}\t\tGood."), "mrpc": ("#1 String\t#2 String\tQuality", "a\tb\t{}")}


def tables(task):
    """Files of good rows and odd ones, sometimes under another head."""
    head, good = TABLES[task]
    rows = "\n".join(good.format(i % 2) for i in range(12))
    odd = st.lists(st.lists(cell, min_size=1, max_size=4).map("\t".join), max_size=2).map("\n".join)
    texts = st.builds("{}\n{}\n{}".format, st.sampled_from([head, head, "sentence\tlabel", ""]), st.just(rows), odd)
    return texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)


def some_json(answer, odd, form):
    """A file of good rows and odd ones, as one list or as lines."""
    good = dict(instruction="a", question="a", output="the correct answer is true", answer=answer, text="t", score=1)
    every = [good | {"label": i % 2} for i in range(12)] + odd
    return (json.dumps(every) if form == "list" else "\n".join(map(json.dumps, every))).encode()


rows = dicts("instruction input output answer question text label score pair context system history chosen prompt",
             st.one_of(values, st.sampled_from(["true", "#### 5", "no ####", "\ud800", "a"])), max_size=5)
files = st.builds(some_json, st.sampled_from(["true", "#### 5"]), st.lists(st.one_of(rows, values), max_size=1),
                  st.sampled_from(["list", "lines"]))
texts = st.one_of(st.lists(rows, max_size=4).map(json.dumps), st.text(max_size=40),
                  st.text(alphabet='{}[]":,0aen\\ \n', max_size=40))
encoded = texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.sampled_from(NO_JSON)
encoded = st.booleans().flatmap(lambda good: files if good else encoded)


def read(name, folder):
    rows = data.read(data.find_task(name, str(folder)), str(folder), "train")
    assert rows and all(isinstance(row.get("text", ""), str) for row in rows)


SIZES = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
             max_position_embeddings=10, initializer_range=0.1)
CONFIGS = {"bert": {}, "roberta": {}, "gemma": dict(head_dim=4), "mistral": dict(sliding_window=4),
           "llama": dict(num_key_value_heads=1, rope_scaling=dict(rope_type="linear", factor=2.0)),
           "qwen2": dict(num_key_value_heads=1, use_sliding_window=True, layer_types=None),
           "vit": dict(image_size=8, patch_size=4, num_channels=1)}
CONFIGS = {family: {**SIZES, "model_type": family, **own} for family, own in CONFIGS.items()}
KEYS = " ".join(SIZES) + """ hidden_act head_dim pad_token_id id2label num_labels architectures rope_theta rope_scaling
    rope_parameters tie_word_embeddings sliding_window use_sliding_window max_window_layers layer_types qkv_bias
    attention_bias mlp_bias rms_norm_eps layer_norm_eps hidden_dropout_prob attention_dropout classifier_dropout
    type_vocab_size is_decoder quantization_config image_size patch_size num_channels"""
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["query"],
           "bias": "none", "alpha_pattern": {"0.attention.self.query": 3}, "rank_pattern": {}, "use_rslora": False,
           "modules_to_save": None}
MORE = " use_dora fan_in_fan_out lora_bias init_lora_weights layers_to_transform layer_replication"
regexes = st.sampled_from(["query", "(", "a{9999999999}", "[", ".*", "(?P<x>q)(?P<x>q)"])
patterns = st.dictionaries(st.one_of(st.text(max_size=8), regexes), values, max_size=2)
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."
names = st.one_of(st.text(max_size=6).filter(lambda text: text != "__metadata__"), st.sampled_from(
    [QUERY + "lora_A.weight", QUERY + "lora_B.weight", "lora_A.weight", "", "classifier.weight",
     "base_model.model.classifier.bias"]))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])
tensors = st.builds(torch.zeros, st.lists(st.integers(0, 9), max_size=3), dtype=dtypes)
RUN = "model task data method seed device dtype init_weights limit_eval max_length batch_size"


@pytest.fixture
def folder(name, tmp_path):
    """A tiny checkpoint, for BERT with an adapter; or a tokenizer; or an empty folder."""
    family = name.split()[0]
    if family in CONFIGS:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
        models.save(models.load(tmp_path, weights="random"), tmp_path)
    if family == "bert":
        model = models.load(tmp_path)
        lora.attach(model, {"blocks.0.query": 2, "blocks.1.query": 2}, alpha=4)
        adapter_files.save_adapter(model, tmp_path / "adapter", "base", head=False)
    if family in TOKENIZERS:
        TOKENIZERS[family].save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load_adapter(folder):
    model = models.load(folder)
    adapter_files.load_adapter(model, folder / "adapter")
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


CLASSES = "BertTokenizer RobertaTokenizerFast GPT2Tokenizer LlamaTokenizer PreTrainedTokenizerFast".split()
tokens = st.one_of(values, st.sampled_from(["a", "[PAD]", *CLASSES]), st.fixed_dictionaries({"content": values}),
                   dicts("3 x 900", st.fixed_dictionaries({"content": values, "special": values})))
TOKENIZERS = {"WordLevel": tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"),
              "WordPiece": tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
              "BPE": tokenizers.models.BPE({"a": 0}, [])}
TOKENIZERS = {kind: tokenizers.Tokenizer(model) for kind, model in TOKENIZERS.items()}
TOKENIZERS["BPE"].pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
IDS = "pad_token_id bos_token_id eos_token_id unk_token_id model_type"


def tokenize(folder):
    data.Tokenizer.from_folder(folder).encode(["a a"])


steps = st.one_of(values, st.lists(numbers, max_size=4), dicts("height width shortest_edge", st.integers(-1, 300)),
                  st.sampled_from(["ViTImageProcessor", "CLIPImageProcessor", "DeiTFeatureExtractor"]))


def prepare(folder):
    image = data.image_settings(folder, (3, 224, 224))
    for shape in ((1, 1), (7, 40), (40, 23)):
        rows = [{"pixels": np.zeros((1, *shape), np.uint8), "label": 0}]
        split = data.encode(data.TASKS["digits"], rows, image=image)
        assert data.collate(split, [0])[0]["pixels"].shape == (1, 3, 224, 224)


def damaged(form, place, junk, cut):
    """Bytes of a small picture, array, or MATLAB file, a few of them overwritten, or the end cut off."""
    buffer, pixels = io.BytesIO(), np.arange(64, dtype=np.uint8).reshape(8, 8)
    if form == "npy":
        np.save(buffer, pixels)
    elif form == "mat":
        pytest.importorskip("scipy.io").savemat(buffer, {"labels": pixels}, do_compression=True)
    else:
        pytest.importorskip("PIL.Image").fromarray(pixels).save(buffer, form)
    whole = buffer.getvalue()
    at = int(place * len(whole))
    return whole[:at] + junk + (b"" if cut else whole[at + len(junk):])


def open_image(form, folder):
    path = folder / f"1.{form}"
    return tasks.read_mat(path, "labels") if form == "mat" else data.read_image(path)


# a family or something else, and the file: (its bytes or what JSON it is, what loads the folder with it)
FILES = {f"{task} {file}": (encoded if "json" in file else tables(task), partial(read, task)) for task, file in (
    ("text-classification", "train.tsv"), ("text-regression", "train.csv"), ("cola", "train.tsv"),
    ("mrpc", "train.tsv"), ("instructions", "train.jsonl"), ("text-classification", "train.jsonl"),
    ("gsm8k", "train.jsonl"), ("text-regression", "train.json"), ("boolq", "train.json"))}
FILES |= {f"{family} config.json": (changed(config, KEYS, values), models.load) for family, config in CONFIGS.items()}
FILES |= {
    "bert adapter/adapter_config.json": (changed(ADAPTER, " ".join(ADAPTER) + MORE, values | patterns), load_adapter),
    "bert adapter/adapter_model.safetensors": (st.dictionaries(names, tensors, max_size=4).map(save), load_adapter),
    "bert run.json": (st.one_of(values, st.sampled_from(NO_JSON), st.fixed_dictionaries(
        {"settings": dicts(RUN, values, min_size=8), "labels": values})), evaluation.evaluate_run),
    "vit preprocessor_config.json": (dicts(" ".join((*images.VIT, *images.NO_STEPS)), steps, max_size=2), prepare)}
SETTINGS = " ".join(sorted(tokenizer.TOKENIZER_SETTINGS))
FILES |= {f"{kind} tokenizer_config.json": (dicts(SETTINGS, tokens, max_size=4), tokenize) for kind in TOKENIZERS}
FILES |= {f"WordLevel {file}": (dicts(IDS, values), tokenize) for file in ("config.json", "generation_config.json")}
FILES |= {f"image 1.{form}": (
    st.builds(damaged, st.just(form), st.floats(0, 1), st.binary(max_size=6), st.booleans()), partial(open_image, form))
    for form in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "npy", "mat")}


@pytest.mark.parametrize("name", FILES)
@few
@given(generated=st.data())
def test_files(name, generated, folder, caplog):
    contents, load = FILES[name]
    content = generated.draw(contents)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name.split()[1]).write_bytes(content)
    caplog.set_level(logging.CRITICAL)
    try:
        load(folder)
    except UserError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and len(message) < 2000, message
