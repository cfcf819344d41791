"""Random input files: each loads or gives the project's own one-line error, never another exception."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import refused

import data
import eval as evaluation
import lora
import model as models
from extras import adapter_files
from papers import tasks

hypothesis = pytest.importorskip("hypothesis")
tokenizers = pytest.importorskip("tokenizers")
from hypothesis import HealthCheck, given, settings, strategies as st
from model import UserError

few = settings(max_examples=100, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
odd = [2**31, 2**63, 10**30, -2**64, 10**400, 1e308, -0.0, 0.5]
numbers = st.one_of(st.integers(-3, 70), st.sampled_from(odd), st.floats())
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5)


def dicts(keys, values, **sizes):
    """Dictionaries with some of these keys, a string of names."""
    return st.dictionaries(st.sampled_from(keys.split()), values, **sizes)


def loads_or_says_why(call):
    """Run call(); an error must be one of the project's, in one line."""
    try:
        return call()
    except UserError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and len(message) < 2000, message


# ---------------------------------------------------------------------------------------------- data files

cell = st.one_of(st.text(max_size=12), st.sampled_from(
    ["0", "1", "2.5", "", '"', "nan", "a\x85b", "\x0c", "sentence", "label", "x\r"]))
heads = ["sentence\tlabel", "text\tpair\tlabel", "sentence1\tsentence2\tscore", "#1 String\t#2 String\tQuality",
         "question\tsentence\tlabel", "text,label", "label", ""]
cells = st.lists(st.lists(cell, min_size=1, max_size=4).map("\t".join), max_size=8)
tables = st.one_of(st.binary(max_size=60), st.builds(lambda head, rows, end: end.join([head, *rows]).encode(
    "utf-8", "surrogatepass"), st.sampled_from(heads), cells, st.sampled_from(["\n", "\r\n", "\r"])))
rows = dicts("instruction input output answer question text sentence label score pair context system history premise "
             "hypothesis gold_label chosen prompt",
             st.one_of(values, st.sampled_from(["true", "#### 5", "no ####", "\ud800", "a"])), max_size=5)
lines = st.one_of(st.lists(st.one_of(rows, values), max_size=5).map(lambda items: "\n".join(map(json.dumps, items))),
                  st.lists(rows, max_size=4).map(json.dumps), st.text(max_size=40),
                  st.text(alphabet='{}[]":,0aen\\ \n', max_size=40)).map(lambda text: text.encode("utf-8", "surrogatepass"))


@pytest.fixture
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


FILES = [("text-classification", "train.tsv"), ("text-regression", "train.csv"), ("cola", "train.tsv"),
         ("mrpc", "train.tsv"), ("qnli", "train.tsv"), ("stsb", "train.tsv"), ("instructions", "train.jsonl"),
         ("text-classification", "train.jsonl"), ("gsm8k", "train.jsonl"), ("text-regression", "train.json"),
         ("boolq", "train.json")]


@pytest.mark.parametrize("name, file", FILES)
@few
@given(generated=st.data())
def test_data_files(name, file, generated, tmp_path, quiet):
    (tmp_path / file).write_bytes(generated.draw(lines if "json" in file else tables))

    def call():
        rows = data.read(data.find_task(name, str(tmp_path)), str(tmp_path), "train")
        assert rows and all(isinstance(row.get("text", ""), str) for row in rows)

    loads_or_says_why(call)


# ---------------------------------------------------------------------------------------------- config.json

SIZES = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
             max_position_embeddings=10, initializer_range=0.1)
CONFIGS = {"bert": {}, "roberta": {}, "llama": dict(num_key_value_heads=1, rope_scaling=dict(rope_type="linear", factor=2.0)),
           "qwen2": dict(num_key_value_heads=1, use_sliding_window=True, layer_types=None),
           "mistral": dict(sliding_window=4), "gemma": dict(head_dim=4),
           "vit": dict(image_size=8, patch_size=4, num_channels=1)}
CONFIGS = {family: {**SIZES, "model_type": family, **own} for family, own in CONFIGS.items()}
KEYS = " ".join(SIZES) + """ hidden_act head_dim pad_token_id id2label num_labels architectures rope_theta rope_scaling
    rope_parameters tie_word_embeddings sliding_window use_sliding_window max_window_layers layer_types qkv_bias
    attention_bias mlp_bias rms_norm_eps layer_norm_eps hidden_dropout_prob attention_dropout classifier_dropout
    type_vocab_size is_decoder quantization_config image_size patch_size num_channels"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A loadable checkpoint folder per family."""
    root = tmp_path_factory.mktemp("models")
    for family, config in CONFIGS.items():
        (root / family).mkdir()
        (root / family / "config.json").write_text(json.dumps(config))
        models.save(models.load(root / family, weights="random"), root / family)
    return root


def changed(config, changes, removed):
    return {key: value for key, value in {**config, **changes}.items() if key not in removed}


@pytest.mark.parametrize("family", CONFIGS)
@few
@given(changes=dicts(KEYS, values, min_size=1, max_size=3),
       removed=st.sets(st.sampled_from([*SIZES, "model_type"]), max_size=1))
def test_configs(family, changes, removed, folders):
    folder = folders / family
    (folder / "config.json").write_text(json.dumps(changed(CONFIGS[family], changes, removed)))
    loads_or_says_why(lambda: models.load(folder))


SETTINGS = """tokenizer_class do_lower_case strip_accents add_prefix_space add_bos_token truncation_side legacy
    added_tokens_decoder additional_special_tokens model_max_length split_special_tokens bos_token eos_token pad_token
    unk_token cls_token sep_token chat_template"""
CLASSES = "BertTokenizer RobertaTokenizerFast GPT2Tokenizer LlamaTokenizer PreTrainedTokenizerFast".split()
tokens = st.one_of(values, st.sampled_from(["a", "[PAD]", *CLASSES]), st.fixed_dictionaries({"content": values}),
                   dicts("3 x 900", st.fixed_dictionaries({"content": values, "special": values})))


@few
@given(config=dicts("pad_token_id bos_token_id eos_token_id unk_token_id model_type", values),
       names=dicts(SETTINGS, tokens), generation=dicts("eos_token_id", values),
       model=st.sampled_from(["word", "piece", "bytes", "vocab.txt", "vocab.json"]), junk=st.binary(max_size=30))
def test_tokenizer_settings(config, names, generation, model, junk, tmp_path, quiet):
    kinds = {"word": tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"),
             "piece": tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")}
    backend = tokenizers.Tokenizer(kinds.get(model, tokenizers.models.BPE({"a": 0}, [])))
    if model == "bytes":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    if model.startswith("vocab"):
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.txt").write_bytes(junk)
        (tmp_path / "vocab.json").write_bytes(junk or b'{"a": 0}')
        (tmp_path / "merges.txt").write_bytes(junk[::-1])
    for file, value in (("config.json", config), ("tokenizer_config.json", names), ("generation_config.json", generation)):
        (tmp_path / file).write_text(json.dumps(value))
    loads_or_says_why(lambda: data.Tokenizer.from_folder(tmp_path).encode(["a a"]))
    for file in ("vocab.txt", "vocab.json", "merges.txt"):
        (tmp_path / file).unlink(missing_ok=True)


STEPS = """image_mean image_std size crop_size do_resize do_center_crop do_rescale rescale_factor do_normalize resample
    image_processor_type do_pad"""
steps = st.one_of(values, st.lists(numbers, max_size=4), dicts("height width shortest_edge", st.integers(-1, 300)),
                  st.sampled_from(["ViTImageProcessor", "CLIPImageProcessor", "DeiTFeatureExtractor"]))


@few
@given(settings=dicts(STEPS, steps), shape=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_image_settings(settings, shape, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    rows = [{"pixels": np.zeros((1, *shape), np.uint8), "label": 0}]

    def call():
        split = data.encode(data.TASKS["digits"], rows, image=data.image_settings(tmp_path, (3, 224, 224)))
        assert data.collate(split, [0])[0]["pixels"].shape == (1, 3, 224, 224)

    loads_or_says_why(call)


def saved(form):
    """Bytes of a small picture, array, or MATLAB file."""
    buffer, pixels = io.BytesIO(), np.arange(64, dtype=np.uint8).reshape(8, 8)
    if form == "npy":
        np.save(buffer, pixels)
    elif form == "mat":
        pytest.importorskip("scipy.io").savemat(buffer, {"labels": pixels}, do_compression=True)
    else:
        pytest.importorskip("PIL.Image").fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "npy", "mat"])
@few
@given(place=st.floats(0, 1), junk=st.binary(max_size=6), cut=st.booleans())
def test_damaged_images(form, place, junk, cut, tmp_path):
    """A few bytes overwritten, or the end cut off."""
    whole = saved(form)
    at = int(place * len(whole))
    path = tmp_path / f"1.{form}"
    path.write_bytes(whole[:at] + junk + (b"" if cut else whole[at + len(junk):]))
    loads_or_says_why(lambda: tasks.read_mat(path, "labels") if form == "mat" else data.read_image(path))


# ---------------------------------------------------------------------------------------------- adapters, runs

ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["query"], "bias": "none",
           "alpha_pattern": {"0.attention.self.query": 3}, "rank_pattern": {}, "use_rslora": False, "modules_to_save": None}
MORE = " use_dora fan_in_fan_out lora_bias init_lora_weights layers_to_transform layer_replication"
regexes = st.sampled_from(["query", "(", "a{9999999999}", "[", ".*", "(?P<x>q)(?P<x>q)"])
patterns = st.dictionaries(st.one_of(st.text(max_size=8), regexes), values, max_size=2)


@pytest.fixture
def adapted(folders, tmp_path):
    """A tiny BERT, its plain configuration on disk, the folder of an adapter for it, and a call that loads that."""
    (folders / "bert" / "config.json").write_text(json.dumps(CONFIGS["bert"]))
    model = models.load(folders / "bert")
    lora.attach(model, {"blocks.0.query": 2, "blocks.1.query": 2}, alpha=4)
    adapter_files.save_adapter(model, tmp_path, "base", head=False)

    def load():
        for name in list(lora.adapters(model)):
            lora.detach(model, name)
        adapter_files.load_adapter(model, tmp_path)
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()

    return tmp_path, load


@few
@given(changes=dicts(" ".join(ADAPTER) + MORE, st.one_of(values, patterns), min_size=1, max_size=3),
       removed=st.sets(st.sampled_from([*ADAPTER]), max_size=2))
def test_adapter_configs(changes, removed, adapted):
    folder, load = adapted
    (folder / "adapter_config.json").write_text(json.dumps(changed(ADAPTER, changes, removed)))
    loads_or_says_why(load)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."
names = st.one_of(st.text(max_size=6).filter(lambda text: text != "__metadata__"), st.sampled_from(
    [QUERY + "lora_A.weight", QUERY + "lora_B.weight", "lora_A.weight", "", "classifier.weight", "base_model.model.classifier.bias"]))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])


@few
@given(tensors=st.dictionaries(names, st.tuples(st.lists(st.integers(0, 9), max_size=3), dtypes), max_size=4))
def test_adapter_tensors(tensors, adapted):
    folder, load = adapted
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    loads_or_says_why(load)


RUN = "model task data method seed device dtype init_weights limit_eval max_length batch_size"


@few
@given(run=st.one_of(values, st.fixed_dictionaries({"settings": dicts(RUN, values, min_size=8), "labels": values})))
def test_settings_of_a_run(run, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run))
    loads_or_says_why(lambda: evaluation.evaluate_run(tmp_path))


def read(name, folder):
    return data.read(data.find_task(name, str(folder)), str(folder))


NO_JSON = (b"", b"\xff\xfe", b"[1]", b"null", b"{", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": NaN, "a": 1e999}',
           b"9" * 5000, b'"\\ud800"', b"\x00" * 50)


@pytest.mark.parametrize("file, load", [
    ("train.json", lambda folder, _: read("instructions", folder)), ("config.json", lambda folder, _: models.load(folder)),
    ("train.json", lambda folder, _: read("text-classification", folder)), ("adapter_config.json", lambda _, load: load()),
    ("run.json", lambda folder, _: evaluation.evaluate_run(folder))])
def test_files_that_are_no_json_object_or_nested_too_deep(file, load, adapted):
    folder, load_adapter = adapted
    for content in NO_JSON:
        (folder / file).write_bytes(content)
        with refused("."):
            load(folder, load_adapter)
