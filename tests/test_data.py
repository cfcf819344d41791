"""data.py: every file layout, every error, encoding and images against transformers, batches, fetching on loopback."""

import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import TASKS  # noqa: E402
from model import UserError  # noqa: E402
from tiny import interrupted_after  # noqa: E402

transformers, Image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(path, text):
    """Write text (LF as it is), bytes or JSON, with parent folders; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text if isinstance(text, (str, bytes)) else json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or the network, nor has an earlier one's note kept it from being printed."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANKS_MIRROR", "http://127.0.0.1:9")
    data.note.cache_clear()


def classify(path, split="train", **options):
    """Rows of the user's own table."""
    return data.read(data.find_task("text-classification", path), path, split, **options)


# ------------------------------------------------------------------------------------------------------ GLUE's layouts

STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
MNLI = "index promptID pairID genre b1 b2 p1 p2 sentence1 sentence2".split()


def mnli(labels, gold):
    rows = [MNLI + labels + ["gold_label"]]
    rows += [[*"01234567", f"one {i}", f"two {i}", *[gold[0]] * len(labels), label] for i, label in enumerate(gold)]
    return "".join("\t".join(row) + "\n" for row in rows)


LAYOUTS = {
    "cola": ("CoLA", 'gj04\t1\t\tHe said "go.\ngj04\t0\t*\tHim \u2028 went\x85 \x1c off.\r\n',
             [('He said "go.', None, 1), ("Him \u2028 went\x85 \x1c off.", None, 0)]),
    "sst2": ("SST-2", 'sentence\tlabel\r\na  film \t1\r\n"bad\rone\t0\r\n',
             [("a  film ", None, 1), ('"bad\rone', None, 0)]),
    "mrpc": ("MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA "b\tC\r\n0\t9\t10\tD\tE',
             [('A "b', "C", 1), ("D", "E", 0)]),
    "stsb": ("STS-B", STSB + "0\t-\t-\t-\t-\t-\t-\tA\tB\t5.0\n1\t-\t-\t-\t-\t-\t-\tC\tD\t0\n",
             [("A", "B", 5.0), ("C", "D", 0)]),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t1\n4\t5\tshort\n"
            "7\t8\t9\tC?\t\t0\n", [("A?", "B?", 1), ("C?", "", 0)]),
    "mnli": ("MNLI", mnli(["label1"], ["neutral", "contradiction", "-", "entailment"]),
             [("one 0", "two 0", 1), ("one 1", "two 1", 2), ("one 3", "two 3", 0)]),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel\n0\tQ?\tS.\tnot_entailment\n1\tR?\tT.\tentailment\n",
             [("Q?", "S.", 1), ("R?", "T.", 0)]),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tC\tD\tnot_entailment\n",
            [("A", "B", 0), ("C", "D", 1)]),
}
LEFT_OUT = {"qqp": "skipped 1 short row", "mnli": "left out 1 row without a gold label"}


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_glue_layouts(tmp_path, caplog, name, parent):
    """Official layouts: headers, byte-order mark, quotes, CR LF, Unicode separators, no final newline, gzipped."""
    folder, text, expected = LAYOUTS[name]
    root = tmp_path / "data"
    write(root / folder / "train.tsv.gz", gzip.compress(text.encode()))
    write(root / folder / ("dev_matched.tsv" if name == "mnli" else "dev.tsv"), text)
    write(root / folder / "dev_mismatched.tsv", mnli([f"label{i}" for i in range(1, 6)], ["entailment", "neutral"]))
    where = root if parent else root / folder
    task = data.find_task(name, where)
    for split in ("train", "dev"):
        rows = data.read(task, where, split)
        assert [(row["text"], row.get("pair"), row["label"]) for row in rows] == expected
    assert data.read(task, where, "train", limit=2) == rows[:2]
    assert type(rows[0]["label"]) is (float if name == "stsb" else int)
    if name == "mnli":
        assert [row["label"] for row in data.read(task, where, "dev_mismatched")] == [0, 1]
    assert LEFT_OUT.get(name, "") in caplog.text and "not read" not in caplog.text
    assert name == "stsb" or f"{len(rows)} train rows: 1 '" in caplog.text


def test_mrpc_original_files(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = "".join(f'{i % 2}\t{i}\t{i + 100}\tleft {i}\tright "{i}\r\n' for i in range(6))
    write(tmp_path / "msr_paraphrase_train.txt", header + rows)
    write(tmp_path / "mrpc_dev_ids.tsv", "1\t101\n4\t104\n2\t999\n")
    assert [row["text"] for row in data.read(TASKS["mrpc"], tmp_path, "dev")] == ["left 1", "left 4"]
    train = [row["text"] for row in data.read(TASKS["mrpc"], tmp_path, "train")]
    assert train == ["left 0", "left 2", "left 3", "left 5"]


# ------------------------------------------------------------------------------------------------ instructions, prompts


def ask(i, answer):
    return {"instruction": f"Q{i} {{x}} %s $(ls)?", "input": "", "output": f"the correct answer is {answer}",
            "answer": answer}


def test_prompt_survives_format_characters():
    text = data.prompt("what is {x} and {0} %s \\1?", "{input}")
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "what is {x} and {0} %s \\1?\n\n### Input:\n{input}\n\n### Response:\n")
    assert data.prompt("a") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\na\n\n### Response:\n")


@pytest.mark.parametrize("name", ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa"])
def test_commonsense_layout(tmp_path, caplog, name):
    task = TASKS[name]
    rows = [ask(i, answer) for i, answer in enumerate(task.answers)]
    write(tmp_path / task.folder / "test.json", json.dumps(rows, indent=1))
    read = data.read(data.find_task(name, tmp_path), tmp_path, "dev")
    assert [row["target"] for row in read] == list(task.answers)
    assert read[1]["prompt"] == data.prompt("Q1 {x} %s $(ls)?") and read[1]["answer"] == rows[1]["output"]
    assert all(data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in read)
    assert caplog.text == ""


def test_commonsense_is_one_training_set_and_many_tests(tmp_path, caplog):
    for name, answer in (("boolq", "true"), ("piqa", "solution2")):
        for file in ("train.json", "test.json"):
            write(tmp_path / TASKS[name].folder / file, [ask(name, answer)])
    task = data.find_task("commonsense", tmp_path)
    assert task.eval_splits == ("boolq", "piqa")
    targets = [row["target"] for split in task.eval_splits for row in data.read(task, tmp_path, split)]
    assert targets == ["true", "solution2"]
    assert len(data.read(task, tmp_path, "dev")) == len(data.read(task, tmp_path, "train")) == 2
    assert "training on train.json of boolq, piqa" in caplog.text
    write(tmp_path / "commonsense_170k.json", [ask(i, "whatever") for i in range(5)])
    assert len(data.read(task, tmp_path, "train")) == 5
    assert data.find_task("commonsense").eval_splits == data.COMMONSENSE


EXTRACTED = [
    ("false, not true", ("true", "false"), "false"), ("True", ("true", "false"), ""), ("", ("true", "false"), ""),
    ("answer6 or answer5", TASKS["siqa"].answers, "answer5"), ("axb a.b", ("a+b", "a.b"), "a.b"),
    ("so $1,234,567.", data.last_number, "1234567"), ("it is $80,000.50.", data.last_number, "80000.5"),
    ("16 - 3 = 13 left", data.last_number, "13"), ("minus: -$5", data.last_number, "-5"),
    ("10-4", data.last_number, "4"), ("72.00", data.last_number, "72"), ("0.0", data.last_number, "0"),
    ("of 1,2,3 the last", data.last_number, "3"), ("about .5", data.last_number, ".5"),
    ("100", data.last_number, "100"), ("1,000 and 12,34", data.last_number, "34"),
    ("no number", data.last_number, "")]


@pytest.mark.parametrize("text, answers, expected", EXTRACTED)
def test_extract_answer(text, answers, expected):
    assert data.extract_answer(text, answers) == expected


@pytest.mark.parametrize("lines", [False, True])
def test_own_instructions(tmp_path, caplog, lines):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    rows += [{"instruction": f"i{i}", "input": "with" if i % 2 else None, "output": f"o{i}"} for i in range(25)]
    path = write(tmp_path / ("all.jsonl" if lines else "all.json"), jsonl(rows) + "\n\n" if lines else rows)
    train, dev = (data.read(data.find_task("instructions", path), path, split) for split in ("train", "dev"))
    answers = [row.get("output", row.get("answer")) for row in rows]
    assert len(train) == 40 and [row["answer"] for row in train + dev] == answers
    assert train[21]["prompt"] == data.prompt("i1", "with") and "target" not in train[0]
    assert "5 of 45 rows are dev (the last)" in caplog.text
    write(tmp_path / "two" / "train.jsonl.gz", gzip.compress(jsonl(rows[:7]).encode()))
    write(tmp_path / "two" / "dev.json", rows[:3])
    assert [len(data.read(TASKS["instructions"], tmp_path / "two", split)) for split in ("train", "dev")] == [7, 3]


def test_context_and_system_prompt_are_read_and_the_rest_is_named(tmp_path, caplog):
    rows = [{"instruction": "Q", "context": "C", "response": "R", "category": "qa", "hint": "think of it"},
            {"question": "Q", "response": "R", "system_prompt": "Be kind.", "id": "flan.1"},
            {"instruction": "Q", "output": "R", "history": [["q1", "a1"], ["q2", "a2"]]},
            {"prompt": "Q", "completion": "R", "turns": [{"text": "more"}], "scores": [1, 2], "n": "17"},
            {"prompt": "Q", "chosen": [{"role": "user", "content": name} for name in "QAR"]}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows * 5))
    read = data.read(TASKS["instructions"], path)
    expected = [data.prompt("Q", "C"), "Be kind.\n\n" + data.prompt("Q"), *[data.prompt("Q")] * 3]
    assert [row["prompt"] for row in read[:5]] == expected and {row["answer"] for row in read} == {"R"}
    notes = [record.message for record in caplog.records]
    assert notes[:4] == [*(f"{path}: not read: column '{name}'" for name in ("hint", "history", "turns")),
                         f"{path}: conversations of more than two messages: only prompt and last message are read"]
    assert len(notes) == 5 and "rows are dev" in notes[4]


def test_a_reference_solution_has_its_answer_in_its_own_place():
    assert [data.last_number(f"5 of 7{end}", reference=True) for end in (" #### 1,000", "")] == ["1000", ""]


def test_allowed_answers_are_those_that_the_prompt_lists():
    row = {"prompt": "Answer format: answer1/answer2/answer3", "answer": "the correct answer is answer2",
           "target": "answer2", "answers": TASKS["siqa"].answers}
    expected = ["answer1", "answer2", "answer3"], [f"the correct answer is answer{i}" for i in (1, 2, 3)]
    assert data.allowed(row) == expected
    assert data.allowed({**row, "prompt": "answer2 is in it by chance"})[0] == list(TASKS["siqa"].answers)
    assert data.allowed({**row, "answer": "B", "answers": ("answer1", "answer2")})[1] == ["answer1", "answer2"]


# ---------------------------------------------------------------------------------------------------- the user's tables


def table(suffix, rows):
    """Text of a file of rows; quoted TSV is tsv with every cell quoted, as pandas writes cells with quotes."""
    if suffix.startswith("json"):
        return jsonl(rows) if suffix == "jsonl" else json.dumps(rows)
    lines = [list(rows[0]), *(row.values() for row in rows)]
    if suffix == "tsv":
        return "\n".join("\t".join(line) for line in lines)
    mark, end = (",", "\r\n") if suffix == "csv" else ("\t", "\n")
    return end.join(mark.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines)


PAIRS = [("text", None), ("sentence", None), ("review", None), ("sentence1", "sentence2"), ("question1", "question2"),
         ("premise", "hypothesis"), ("text", "pair"), ("text", "text_pair"), ("question", "sentence"),
         ("question", "context"), ("text", "context")]


@pytest.mark.parametrize("suffix", ["tsv", "quoted.tsv", "csv", "jsonl", "json"])
@pytest.mark.parametrize("columns", PAIRS)
def test_own_classification(tmp_path, caplog, suffix, columns):
    """Both texts are read whatever they are called; blank last lines are no rows; what is not read is named."""
    texts = ["plain", 'with "quote"', "comma, and \u2028 separator", "one" if suffix == "tsv" else "two\n\tlines"]
    labels = ["pos", "neg", "neutral", "neg"]
    names = [name for name in (*columns, "label", "remark", "uid", "weight") if name]
    rows = [dict(zip(names, [text, *[text[::-1]] * bool(columns[1]), label, "a remark", "x", "0.5"]))
            for text, label in zip(texts, labels)]
    ending = suffix.removeprefix("quoted.")
    write(tmp_path / f"train.{ending}", table(suffix, rows) + "\n\n" * (suffix != "json"))
    write(tmp_path / f"valid.{ending}.gz", gzip.compress(table(suffix, rows).encode()))
    task = data.find_task("text-classification", tmp_path)
    assert task.labels == ("neg", "neutral", "pos")
    for split in ("train", "dev"):
        read = data.read(task, tmp_path, split)
        assert [row["text"] for row in read] == texts and [row["label"] for row in read] == [2, 0, 1, 0]
        assert [row.get("pair") for row in read] == [text[::-1] if columns[1] else None for text in texts]
        assert f"{tmp_path}: 4 {split} rows: 2 'neg', 1 'neutral', 1 'pos'" in caplog.text
    named = {record.message for record in caplog.records if "not read" in record.message}
    assert named == {f"{tmp_path}/{file}: not read: column 'remark'" for file in
                     (f"train.{ending}", f"valid.{ending}.gz")}
    assert data.find_task("text-classification", None, ["b", "a"]).labels == ("b", "a")  # an earlier run's


@pytest.mark.parametrize("label", ["-1", -1, "-1.0", "-", "", " ", "nan", "NaN", "None", "<NA>", float("nan"), None])
def test_a_missing_label_is_no_class(tmp_path, label):
    """Not in training rows, nor where the labels are known, nor in dev rows alone."""
    rows = [{"text": "t", "label": other} for other in ("0", "1", "0")]
    path = write(tmp_path / "train.jsonl", jsonl([*rows, {"text": "t", "label": label}]))
    with pytest.raises(UserError, match="train.jsonl line 4: .*label"):
        classify(path)
    write(tmp_path / "train.jsonl", jsonl(rows))
    write(tmp_path / "dev.jsonl", jsonl([{"text": "t", "label": label}, *rows]))
    with pytest.raises(UserError, match="dev.jsonl line 1: .*label"):
        classify(tmp_path, "dev")
    if isinstance(label, str):
        write(tmp_path / "train.tsv", f"sentence\tlabel\na\t0\nb\t1\nc\t{label}\n")
        with pytest.raises(UserError, match="train.tsv line 4: label .* stands for a missing one"):
            data.read(TASKS["sst2"], tmp_path)


def numbered(count, classes):
    """A .csv of this many rows, sorted by their classes."""
    return "text,label\n" + "".join(f"{i},{i * classes // count}\n" for i in range(count))


LONG = "word " * 100_000
PARSED = {"sentence1": "a b", "sentence2": "c d", "sentence1_parse": "(ROOT a b)", "annotator_labels": ["neutral"]}
# (files, training texts, their labels, what is noted): what spreadsheets, pandas, SNLI and people write
READ = {
    "numbers sort as numbers, 1.0 is 1, spaces around a label do not count": (
        {"train.jsonl": jsonl([{"text": "t", "label": n} for n in (10, "9", 1.0, "10.0", " 1 ")])},
        ["t"] * 4, [2, 1, 2, 0], "1 of 5 rows are dev (evenly spread)"),
    "SNLI marks pairs without a majority": (
        dict.fromkeys(("train.jsonl", "dev.jsonl"), jsonl({**PARSED, "gold_label": label} for label in "x--y")),
        ["a b"] * 2, [0, 1], "left out 2 rows without a gold label"),
    "long cells, blank lines": ({"train.csv": f'text,label\n"{LONG}",a\n\nb,b\n\n\n', "dev.csv": "text,label\na,a\n"},
                                [LONG, "b"], [0, 1], "2 train rows"),
    "quotes that are no CSV are text": (
        {"train.tsv": 'text\tlabel\n"so" he said\ta\n"bad\tb\n"" \ta\n', "dev.tsv": "text\tlabel\na\ta\n"},
        ['"so" he said', '"bad', '"" '], [0, 1, 0], "3 train rows"),
    "a second file of the same name": (
        {"train.csv": "text,label\na,x\nb,y\n", "train.tsv": "text\tlabel\nc\tx\nd\ty\n", "train.tsv.gz": b"an older",
         "dev.tsv": "text\tlabel\nc\tx\n"}, ["c", "d"], [0, 1], ": train.tsv is read, not train.tsv.gz, train.csv"),
}


@pytest.mark.parametrize("name", READ)
def test_files_of_all_sorts(tmp_path, caplog, name):
    contents, texts, labels, noted = READ[name]
    for file, text in contents.items():
        write(tmp_path / file, text)
    rows = classify(tmp_path)
    assert [row["text"] for row in rows] == texts and [row["label"] for row in rows] == labels
    assert noted in caplog.text and "not read" not in caplog.text


def test_limits_look_at_the_rows_that_are_used(tmp_path):
    write(tmp_path / "train.csv", numbered(60, 2))
    write(tmp_path / "dev.csv", numbered(60, 2) + "bad row\n")
    with pytest.raises(UserError, match="all labels are '0' in the 20 rows: raise the limit or shuffle the rows"):
        classify(tmp_path, limit=20)
    assert len(classify(tmp_path, limit=40)) == 40 and len(classify(tmp_path, "dev", limit=20)) == 20


@pytest.mark.parametrize("rows", [3, 9, 10, 11, 29, 100, 1999, 12_345])
def test_held_out_rows_of_a_sorted_file(tmp_path, rows):
    """Every row is in exactly one split, the share is a tenth and every third of a sorted file gives dev rows."""
    path = write(tmp_path / "all.csv", numbered(rows, 3))
    task = replace(TASKS["text-classification"], labels=("0", "1", "2"))
    train, dev = data.read(task, path, "train"), data.read(task, path, "dev")
    assert sorted(int(row["text"]) for row in train + dev) == list(range(rows))
    assert len(dev) == min(-(-rows // 10), 1000)
    assert rows < 25 or {row["label"] for row in dev} == {0, 1, 2}


def test_own_regression(tmp_path):
    write(tmp_path / "train.csv", "sentence1,sentence2,score\na,b,-1.5\nc,d,1e3\n")
    write(tmp_path / "test.csv", "sentence1,sentence2,score\na,b,7\n")
    task = data.find_task("text-regression", tmp_path)
    assert [row["label"] for row in data.read(task, tmp_path)] == [-1.5, 1000.0]
    assert data.read(task, tmp_path, "dev") == [{"text": "a", "pair": "b", "label": 7.0}]


# ------------------------------------------------------------------------------------------------------------- images


def some_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_npz_layouts(tmp_path):
    images, labels = some_images((20, 6, 5, 3)), np.arange(20) % 4 + 7
    np.savez(tmp_path / "a.npz", x_train=images[:12], y_train=labels[:12, None], x_test=images[12:], y_test=labels[12:])
    np.savez(tmp_path / "b.npz", images=images / 255, labels=labels, split=np.arange(20) >= 12)
    np.savez(tmp_path / "c.npz", images=images.transpose(0, 3, 1, 2), labels=labels)
    for name in "ab":
        path = tmp_path / f"{name}.npz"
        task = data.find_task("npz", path)
        assert task.labels == ("7", "8", "9", "10")
        train, dev = data.read(task, path), data.read(task, path, "dev")
        assert [row["label"] for row in train + dev] == (labels - 7).tolist() and len(dev) == 8
        assert all(np.array_equal(row["pixels"], image.transpose(2, 0, 1)) for row, image in zip(train + dev, images))
    task = data.find_task("npz", tmp_path / "c.npz")
    assert len(data.read(task, tmp_path / "c.npz")) == 18 and len(data.read(task, tmp_path / "c.npz", "dev")) == 2


def test_digits_are_embedded_and_turn():
    """The asset is scikit-learn's digits, times 15, with a fixed stratified split."""
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    straight, turned = (
        [data.read(TASKS[name], None, split) for split in ("train", "dev")] for name in ("digits", "digits-rot90"))
    assert [len(rows) for rows in straight] == [1352, 445]
    found = sorted((row["label"], row["pixels"].tobytes()) for rows in straight for row in rows)
    theirs = zip(sklearn.target, sklearn.images)
    assert found == sorted((label, (image * 15).astype(np.uint8).tobytes()) for label, image in theirs)
    for a, b in zip(straight[1], turned[1]):
        assert a["label"] == b["label"] and np.array_equal(np.rot90(a["pixels"][0]), b["pixels"][0])
    shares = np.bincount([row["label"] for row in straight[1]]) / np.bincount(sklearn.target)
    assert 0.24 < shares.min() and shares.max() < 0.26


def jpg(i, form="JPEG"):
    """Bytes of a small image of size 8 x (6 + i)."""
    buffer = io.BytesIO()
    Image.fromarray(some_images((8, 6 + i, 3), i)).save(buffer, form)
    return buffer.getvalue()


def vit(folder, pixels=16, channels=3, **processor):
    write(folder / "config.json", {"model_type": "vit", "image_size": pixels, "num_channels": channels})
    if processor:
        write(folder / "preprocessor_config.json", processor)
    return data.image_settings(folder, (channels, pixels, pixels))


def save_modes(folder):
    """One smooth picture in every mode that Pillow stores; returns {file: its RGB or grey pixels}."""
    ramp = np.linspace(40, 215, 48 * 36).reshape(48, 36)
    grey, folder = ramp.astype(np.uint8), folder / "train" / "a"
    colour = Image.fromarray(np.stack([grey, grey[::-1], 255 - grey], -1))
    folder.mkdir(parents=True)
    made = {"L.png": Image.fromarray(grey), "1.png": Image.fromarray(grey > 128), "RGB.png": colour,
            "P.png": colour.quantize(64), "RGBA.png": colour.copy(), "CMYK.jpg": colour.convert("CMYK"),
            "LA.png": Image.fromarray(grey).convert("LA"), "I16.png": Image.fromarray((ramp * 257).astype(np.uint16)),
            "F.tiff": Image.fromarray((ramp / 255).astype(np.float32)), "YCbCr.jpg": colour.convert("YCbCr")}
    made["RGBA.png"].putalpha(Image.fromarray(grey))
    expected = {name: np.asarray(picture.convert("RGB")) for name, picture in made.items()}
    expected["I16.png"] = expected["F.tiff"] = np.repeat(grey[..., None], 3, -1)
    for name, picture in made.items():
        picture.save(folder / name)
    turned = colour.getexif()
    turned[0x0112] = 6      # the camera was held upright
    colour.save(folder / "turned.png", exif=turned)
    expected["turned.png"] = np.rot90(np.asarray(colour), -1)
    for name, array in {"f.npy": ramp / 255, "u2.npy": (ramp * 257).astype(np.uint16), "chw.npy": grey[None],
                        "i8.npy": grey.astype(np.int64), "rgba.npy": np.stack([grey] * 3 + [255 - grey], -1)}.items():
        np.save(folder / name, array)
        expected[name] = np.repeat(grey[..., None], 3, -1)
    return expected


def test_photos_of_every_mode_and_size(tmp_path):
    """Each is read upright, as uint8 of the model's size and channels; hidden files and deep folders do no harm."""
    expected = save_modes(tmp_path)
    for file in ("b/deep/er/1.png", "b/2.png"):
        write(tmp_path / "train" / file, (tmp_path / "train" / "a" / "RGB.png").read_bytes())
    for file in (".DS_Store", "Thumbs.db"):
        write(tmp_path / "train" / "b" / file, "junk")
    task = data.find_task("image-folder", tmp_path)
    rows = data.read(task, tmp_path)
    assert task.labels == ("a", "b") and [row["label"] for row in rows].count(1) == 2
    for row in rows:
        path, pixels = row["pixels"], data.read_image(row["pixels"]).astype(int)
        known = expected[path.name if row["label"] == 0 else "RGB.png"].transpose(2, 0, 1)
        assert np.abs(pixels - known).max() <= (12 if path.suffix == ".jpg" else 1), path  # grey is broadcast
        assert pixels.shape[1:] == known.shape[1:]
    for channels in (3, 1):
        split = data.encode(task, rows, image=vit(tmp_path / "vit", 20, channels))
        assert split.pixels.shape == (len(rows), channels, 20, 20) and split.pixels.dtype == torch.uint8
    inputs, labels = data.collate(split, [1, 0])
    torch.testing.assert_close(inputs["pixels"], (split.pixels[[1, 0]] / 255 - 0.5) / 0.5)
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_grey_and_colour_become_each_other_as_in_pillow(tmp_path, channels, mode):
    for shape in ((16, 16, 3), (16, 16)):
        pixels = some_images(shape)
        rows = [{"pixels": data.channels_first(pixels, "here"), "label": 0}]
        ours = data.encode(TASKS["digits"], rows, image=vit(tmp_path, 16, channels)).pixels[0]
        theirs = np.asarray(Image.fromarray(pixels).convert(mode))
        assert np.array_equal(ours, theirs[None] if channels == 1 else theirs.transpose(2, 0, 1))


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CROP = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
SQUARE = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
PROCESSORS = {
    "plain": SQUARE, "fast": {**SQUARE, "image_processor_type": "ViTImageProcessorFast", "resample": 3},
    "old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "resample": 2, **HALF},
    "nearest": {**SQUARE, "resample": 0}, "raw": {**SQUARE, "do_normalize": False},
    "bytes": {**SQUARE, "do_rescale": False},
    "factor": {**SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 27, "width": 29}, **CROP},
    "deit square": {"image_processor_type": "DeiTImageProcessor", "size": 28, "do_center_crop": True, "crop_size": 24},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, **CROP},
    "clip old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 26, "crop_size": 24, "do_convert_rgb": True},
    "clip square": {"image_processor_type": "CLIPImageProcessor", "size": {"height": 24, "width": 24}, **CROP},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_transformers_does(tmp_path, name):
    """Up to one level of 255, in larger, smaller, odd, wide and high pictures, of noise and of hard edges."""
    settings = vit(tmp_path, 24, **PROCESSORS[name])
    pictures = [some_images(shape + (3,)) for shape in ((24, 24), (48, 64), (65, 31), (24, 9), (11, 90))]
    boards = [np.kron(np.eye(n, dtype=np.uint8), np.full((5, 7), 255, np.uint8)) for n in (3, 9)]
    pictures += [np.repeat(board[..., None], 3, -1) for board in boards]
    rows = [{"pixels": picture.transpose(2, 0, 1), "label": 0} for picture in pictures]
    ours = data.collate(data.encode(TASKS["digits"], rows, image=settings), list(range(len(rows))))[0]["pixels"]
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    level = settings["scale"] / torch.tensor(settings["std"]).min()
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1.01 * level
    assert (ours - theirs).abs().mean() < 0.1 * level


REFUSED = {
    "resample": {"resample": 1}, "size": {"size": {"longest_edge": 24}}, "crop_size": {**CROP, "crop_size": 20},
    "do_pad": {"do_pad": True}, "rescale_offset": {"rescale_offset": True}, "offset": {"offset": True},
    "crop_pct": {"crop_pct": 0.9}, "do_flip_channel_order": {"do_flip_channel_order": True},
    "image_processor_type": {"image_processor_type": "SiglipImageProcessor"}, "image_mean": {"image_mean": [1, 2]},
    "image_std": {"image_std": [0, 1, 1]}, "rescale_factor": {"rescale_factor": "1/255"},
}


@pytest.mark.parametrize("name", [*REFUSED, "other size"])
def test_what_is_not_done_to_images_is_named(tmp_path, name):
    changes = REFUSED.get(name, {"size": {"height": 30, "width": 24}})
    with pytest.raises(UserError, match=f"preprocessor_config.json: {name if name in REFUSED else 'size'} .*: mend it"):
        vit(tmp_path, 24, **{"size": {"height": 24, "width": 24}} | changes)


def test_an_image_that_is_not_resized_must_fit(tmp_path):
    rows = [{"pixels": some_images((3, 24, 24)), "label": 0}, {"pixels": some_images((3, 24, 25)), "label": 0}]
    with pytest.raises(UserError, match="digits image 1: 24 x 25 pixels, the model takes"):
        data.encode(TASKS["digits"], rows, image=vit(tmp_path, 24, do_resize=False))
    rows = [{"pixels": some_images((3, 23, 40)), "label": 0}]
    with pytest.raises(UserError, match="digits image 0: 23 x 24 pixels, .* does not enlarge it"):
        data.encode(TASKS["digits"], rows, image=vit(tmp_path, 24, do_resize=False, **CROP))


# --------------------------------------------------------------------------------------------------------- tokenizing

TEXTS = ["The quick brown fox jumps over the lazy dog.", "the dog", "", "naïve café — 42 %", "fox " * 40,
         "unseen žluťoučký", "中文 The\tFOX\n [SEP] </s> fox", " Fox  dog"]


def make_tokenizer(folder, kind, model_type=None, **settings):
    """Train a small tokenizer of a kind and write a model folder with it as transformers would find one."""
    models, before, decoders, processors = (
        tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.processors)
    train, options = tokenizers.trainers.BpeTrainer, {"vocab_size": 200}
    if kind == "bert":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer()
        backend.pre_tokenizer, backend.decoder = before.BertPreTokenizer(), decoders.WordPiece()
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        train, config = tokenizers.trainers.WordPieceTrainer, {"model_type": "bert", "type_vocab_size": 2}
        template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1",
                    "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    elif kind == "sentencepiece":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = tokenizers.normalizers.Sequence([
            tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                             decoders.Strip(" ", 1, 0)])
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        config = {"model_type": "llama"}
        template = {"single": "<s> $A", "pair": "<s> $A <s>:1 $B:1", "special_tokens": [("<s>", 1)]}
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = before.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": "<unk>",
                   "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
        if kind == "bpe":
            special = {name: special[name] for name in ("bos_token", "eos_token")}
        config = {"model_type": "llama", "eos_token_id": [1, 7]}
        options = {"vocab_size": 400, "initial_alphabet": before.ByteLevel.alphabet()}
        template = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    names = [token if isinstance(token, str) else token["content"] for token in special.values()]
    trainer = train(show_progress=False, special_tokens=[*dict.fromkeys(names)], **options)
    more = ["### Response:\nthe correct answer is true"] if kind != "sentencepiece" else ["the correct answer is true"]
    backend.train_from_iterator(TEXTS[:4] * 5 + more, trainer)
    if kind == "sentencepiece":
        content = json.loads(backend.to_str())
        content["model"]["vocab"] |= {f"<0x{i:02X}>": len(content["model"]["vocab"]) + i for i in range(256)}
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(**template)
    backend.enable_truncation(5)  # settings left in the file must not matter
    backend.enable_padding(length=50)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    settings = {key: value for key, value in (special | settings).items() if value is not None}
    write(folder / "tokenizer_config.json", settings)
    write(folder / "special_tokens_map.json", special)
    write(folder / "config.json", config | ({"model_type": model_type} if model_type else {}))
    return folder


def compare_with_transformers(folder):
    fast, ours = transformers.AutoTokenizer.from_pretrained(folder), data.Tokenizer(folder)
    pairs = TEXTS[::-1]
    for length in (None, 64, 16, 8):
        for second in (None, pairs):
            ids, types = ours.encode(TEXTS, second, length)
            theirs = fast(TEXTS, second, truncation=length is not None, max_length=length, return_token_type_ids=True)
            assert [list(row) for row in ids] == theirs["input_ids"]
            assert [list(row) for row in types] == theirs["token_type_ids"]
    ids, _ = ours.encode(TEXTS, special=False)
    assert [list(row) for row in ids] == fast(TEXTS, add_special_tokens=False)["input_ids"]
    for text in TEXTS[:2]:
        assert ours.decode(ours.encode([text])[0][0]) == fast.decode(fast(text)["input_ids"], skip_special_tokens=True)
    return ours


PIECES = [("DebertaV2Tokenizer", {}), ("DebertaV2Tokenizer", {"do_lower_case": True}), ("XLMRobertaTokenizer", {}),
          ("DebertaV2Tokenizer", {"split_by_punct": True}), ("XLMRobertaTokenizer", {"add_prefix_space": False})]


@pytest.mark.parametrize("kind, settings", PIECES)
def test_sentencepiece_tokenizers_of_encoders(kind, settings, tmp_path):
    """The tokenizer.json that transformers makes of DeBERTaV3's and XLM-R's; types where the model has a table."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if kind == "DebertaV2Tokenizer" else ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, unk_token=names[3], special_tokens=names)
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    pieces.train_from_iterator(TEXTS[:4] * 5, trainer)
    vocabulary = [tuple(piece) for piece in json.loads(pieces.to_str())["model"]["vocab"]]
    getattr(transformers, kind)(vocab=vocabulary).save_pretrained(tmp_path)
    saved, types = json.loads((tmp_path / "tokenizer_config.json").read_text()), 2 * bool(settings)
    write(tmp_path / "tokenizer_config.json", saved | settings)
    family = "deberta-v2" if kind == "DebertaV2Tokenizer" else "xlm-roberta"
    write(tmp_path / "config.json", {"model_type": family, "type_vocab_size": types})
    ours = compare_with_transformers(tmp_path)
    assert ours.types == (family == "deberta-v2" and types > 0) and ours.pad_id == (family == "xlm-roberta")
    assert "\u2581" in ours.backend.encode("the answer").tokens or settings.get("add_prefix_space") is False


# name: (kind, what tokenizer_config.json says against tokenizer.json); the oracle is AutoTokenizer
OVERRIDES = {
    "as it is": ("bpe", {}), "bert": ("bert", {"tokenizer_class": "BertTokenizer"}),
    "cased": ("bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "cased fast": ("bert", {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False, "strip_accents": True}),
    "no class": ("bert", {"tokenizer_class": None, "do_lower_case": False}),
    "accents": ("bert", {"tokenizer_class": "BertTokenizer", "strip_accents": False}),
    "chinese": ("bert", {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}),
    "left": ("bert", {"tokenizer_class": "BertTokenizer", "truncation_side": "left"}),
    "any class left": ("bpe", {"truncation_side": "left"}), "not for this class": ("bert", {"do_lower_case": False}),
    "split": ("bert", {"tokenizer_class": "BertTokenizer", "split_special_tokens": True}),
    "added": ("bert", {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": {
        "900": {"content": "quick", "lstrip": False, "rstrip": False, "normalized": False, "special": False,
                "single_word": False}, "5": {"content": "fox", "special": True}}}),
    "special tokens": ("bert", {"tokenizer_class": "BertTokenizer", "cls_token": "[UNK]"}),
    "electra": ("bert", {"tokenizer_class": "ElectraTokenizer", "do_lower_case": False}),
    "extra": ("bpe", {"additional_special_tokens": ["fox"], "pad_token": "<|pad|>", "mask_token": "dog"}),
    "roberta": ("roberta", {"tokenizer_class": "RobertaTokenizer"}),
    "roberta space": ("roberta", {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}),
    "gpt2": ("bpe", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "gpt2 bos": ("bpe", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}),
    "eos": ("bpe", {"add_eos_token": True}), "neither": ("bpe", {"add_bos_token": False}),
    "llama": ("sentencepiece", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}),
    "llama eos": ("sentencepiece", {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}),
    "llama no space": ("sentencepiece", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "llama legacy": ("sentencepiece", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "llama byte level": ("bpe", {"tokenizer_class": "LlamaTokenizer"}),
}
TYPES = {"roberta": "roberta", "roberta space": "roberta", "gpt2": "gpt2", "gpt2 bos": "gpt2"}


@pytest.mark.parametrize("name", OVERRIDES)
def test_encoding_equals_transformers(tmp_path, name):
    kind, settings = OVERRIDES[name]
    ours = compare_with_transformers(make_tokenizer(tmp_path, kind, TYPES.get(name), **settings))
    if name == "as it is":
        assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (1, 1, [1, 7], [0])
    elif kind == "bert":
        assert (ours.pad_id, ours.eos_id, ours.types) == (0, None, True)


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_encoding_equals_transformers_on_checkpoints(name):
    folder = Path(os.environ.get("CHECKPOINTS", "none")) / name
    if not folder.is_dir():
        pytest.skip(f"set CHECKPOINTS to the folder that holds {name}/")
    compare_with_transformers(folder)


def split_files(folder, kind, model_type):
    """A repository without tokenizer.json: its vocabulary as vocab.txt, or as vocab.json and merges.txt."""
    make_tokenizer(folder, kind, model_type, tokenizer_class=None)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    if kind == "bert":
        write(folder / "vocab.txt", "".join(f"{token}\n" for token in sorted(model["vocab"], key=model["vocab"].get)))
    else:
        write(folder / "vocab.json", model["vocab"])
        write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    return folder


@pytest.mark.parametrize("kind, model_type", [("bert", "bert"), ("roberta", "roberta"), ("bpe", "gpt2")])
def test_vocabularies_without_tokenizer_json(tmp_path, kind, model_type):
    compare_with_transformers(split_files(tmp_path, kind, model_type))


def test_the_remedy_for_other_vocabularies_works(tmp_path):
    """What the message says to run makes a tokenizer.json, with which the ids are transformers'."""
    with pytest.raises(UserError, match="fetch the model's tokenizer files, or make it: pip install") as caught:
        data.Tokenizer(split_files(tmp_path, "bpe", "qwen2"))
    command = str(caught.value).partition(", then python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, capture_output=True)
    compare_with_transformers(tmp_path)


def test_fallback_ids(tmp_path, caplog):
    folder = make_tokenizer(tmp_path, "bert")
    write(folder / "special_tokens_map.json", "{}")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "X", "unk_token": "[UNK]", "normalise_numbers": True})
    write(folder / "config.json", {"model_type": "bert", "bos_token_id": 2, "eos_token_id": 3})
    write(folder / "generation_config.json", {"eos_token_id": [3, 5]})
    ours = data.Tokenizer(folder)
    assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (3, 3, [3, 5], [2])
    assert f"{folder}/tokenizer_config.json: not used: 'normalise_numbers'" in caplog.text
    write(folder / "config.json", "{}")
    (folder / "generation_config.json").unlink()
    assert data.Tokenizer(folder).pad_id == 1


def test_decoded_text_keeps_the_space_that_it_begins_with(tmp_path):
    """SentencePiece's decoder drops the first space of a text: Python would lose an indent."""
    tokenizer = data.Tokenizer(make_tokenizer(tmp_path, "bpe"))
    vocabulary = {"<unk>": 0, "\u2581def": 1, "\u2581return": 2, "\u2581": 3, "x": 4, "</s>": 5}
    tokenizer.backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer.backend.add_special_tokens(["</s>"])
    assert tokenizer.decode([3, 3, 2, 4, 5]) == "  returnx"
    assert tokenizer.decode([3, 3, 2, 4, 5], [5, 1, 4]) == "   returnx"


def processor(folder, task="rte", vocab_size=200, types=2):
    return data.Processor(TASKS[task], folder, SimpleNamespace(vocab_size=vocab_size, type_vocab_size=types))


def test_tokens_are_checked_against_the_model(tmp_path, caplog):
    folder = make_tokenizer(tmp_path, "bert")
    size = data.Tokenizer(folder).backend.get_vocab_size()
    rows = [{"text": "the dog", "pair": "fox", "label": 0}]
    assert len(processor(folder, vocab_size=size).training(rows, 32)) == 1
    with pytest.raises(UserError, match="rte, row 'the dog': token .* has id .*, the model only .* embeddings: fetch"):
        processor(folder, vocab_size=20).training(rows, 32)
    with pytest.raises(UserError, match=f"the tokenizer has {size} tokens, the model 999: it is not this model's"):
        processor(folder, vocab_size=999)
    with pytest.raises(UserError, match="a pair's texts have 2 types, the model only 1 type embeddings"):
        processor(folder, types=1).training(rows, 32)
    make_tokenizer(folder, "bpe", add_bos_token=False, pad_token="<|pad|>")
    ours = processor(folder, "sst2", size := data.Tokenizer(folder).pad_id)
    assert ours.tokenizer.pad_id == 1 and f"pad token '<|pad|>' has id {size}, the model only {size}" in caplog.text
    content = json.loads((folder / "tokenizer.json").read_text())
    write(folder / "tokenizer.json", content | {"post_processor": None})
    ours = processor(folder, "sst2", size)
    with pytest.raises(UserError, match="sst2, row '': no token: remove the row"):
        ours.training([{"text": "a", "label": 0}, {"text": "", "label": 1}], 32)


def test_classification_batches(tmp_path):
    """Pairs through encode and collate equal transformers' padded batch; types only for bert; pad_to picks a bucket."""
    rows = [{"text": a, "pair": b, "label": i % 2} for i, (a, b) in enumerate(zip(TEXTS, TEXTS[::-1]))]
    for kind in ("bert", "roberta"):
        folder = make_tokenizer(tmp_path / kind, kind, kind)
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        split = data.encode(TASKS["rte"], rows, data.Tokenizer(folder), 24)
        for indices in ([1], [0, 4, 2], [5, 3]):
            inputs, labels = data.collate(split, indices)
            texts = [[rows[i][name] for i in indices] for name in ("text", "pair")]
            theirs = fast(*texts, padding=True, truncation=True, max_length=24, return_tensors="pt",
                          return_token_type_ids=True)
            assert torch.equal(inputs["tokens"], theirs["input_ids"])
            assert torch.equal(inputs["mask"], theirs["attention_mask"].bool())
            assert ("types" in inputs) == (kind == "bert")
            assert kind != "bert" or torch.equal(inputs["types"], theirs["token_type_ids"])
            assert labels.tolist() == [i % 2 for i in indices] and labels.dtype == torch.long
        widths = [data.collate(split, [i], pad_to=[8, 16, 20])[0]["tokens"].shape[1] for i in range(6)]
        for width, length in zip(widths, split.lengths):
            assert width == min([bucket for bucket in (8, 16, 20) if bucket >= length], default=length)
        assert len(set(widths)) > 1
    rows = [{"text": "a", "pair": "b", "label": 2.5}]
    split = data.encode(TASKS["stsb"], rows, data.Tokenizer(folder))
    assert data.collate(split, [0])[1].dtype == torch.float32


JOINED = {"sentencepiece": ("sentencepiece", {"tokenizer_class": "LlamaTokenizer"}), "byte level": ("roberta", {}),
          "bos": ("bpe", {"add_bos_token": True}), "eos": ("bpe", {"add_eos_token": True}),
          "both": ("bpe", {"add_bos_token": True, "add_eos_token": True})}


@pytest.mark.parametrize("name", JOINED)
def test_prompt_and_answer_are_encoded_as_one_text(tmp_path, caplog, name):
    """The ids are transformers' for the joined text; where a prompt's ids do not begin them, both are encoded apart."""
    kind, settings = JOINED[name]
    folder = make_tokenizer(tmp_path, kind, **settings)
    ours, fast = data.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": data.prompt("fox"), "answer": answer} for answer in ("the dog", "true", " fox", "  \n", "é")]
    split = data.encode(TASKS["instructions"], rows, ours)
    for row, ids, start in zip(rows, split.tokens, split.starts):
        theirs = fast(row["prompt"] + row["answer"])["input_ids"]
        theirs = theirs if theirs[-1] == ours.eos_id else [*theirs, ours.eos_id]
        assert ids.tolist() == theirs
        prompt = fast(row["prompt"], add_special_tokens=False)["input_ids"]
        assert ids[:start].tolist() == [*ours.prefix, *prompt]
    assert "apart" not in caplog.text
    rows[1] = {"prompt": "the qui", "answer": "ck fox"}
    split = data.encode(TASKS["instructions"], rows, ours)
    apart = [fast(text, add_special_tokens=False)["input_ids"] for text in ("the qui", "ck fox")]
    assert split.tokens[1].tolist() == [*ours.prefix, *apart[0], *apart[1], ours.eos_id]
    assert "1 of 5 answers were encoded apart from their prompts" in caplog.text


def instruction_rows(count, seed=0):
    random = np.random.default_rng(seed)
    return [{"prompt": data.prompt(" ".join(random.choice(["fox", "dog", "the"], random.integers(1, 12)))),
             "answer": f"the correct answer is {random.integers(1, 10**6)}"} for _ in range(count)]


def test_instruction_batches(tmp_path, caplog):
    """Loss positions are the answer and eos exactly; prompts are what generation needs; truncation cuts the tail."""
    tokenizer = data.Tokenizer(make_tokenizer(tmp_path, "bpe"))
    rows = instruction_rows(12)
    split = data.encode(TASKS["boolq"], rows, tokenizer)
    inputs, labels = data.collate(split, list(range(12)), pad_to=[512])
    flat, start = inputs["tokens"].view(-1), 0
    for i, row in enumerate(rows):
        answer = split.tokens[i][split.starts[i]:].tolist()
        assert tokenizer.decode(answer) == row["answer"] and answer[-1] == tokenizer.eos_id
        part = inputs["positions"][start:start + len(answer)]
        assert labels[start:start + len(answer)].tolist() == answer == flat[part + 1].tolist()
        assert (part // inputs["tokens"].shape[1] == i).all() and inputs["mask"][i].sum() == split.lengths[i]
        assert inputs["tokens"][i][inputs["mask"][i]].tolist() == split.tokens[i].tolist()
        start += len(answer)
    assert start == len(labels) == data.count_labels(split, list(range(12)))
    tokens, mask = data.prompts(split, [2, 7])
    for row, prompt, real in zip((2, 7), tokens, mask):
        expected = tokenizer.prefix + tokenizer.encode([rows[row]["prompt"]], special=False)[0][0].tolist()
        assert prompt[real].tolist() == expected and real[-1] and real.sum() == len(expected)
        assert (prompt[~real] == tokenizer.pad_id).all()
    cut = sorted(split.starts)[6]
    short = data.encode(TASKS["boolq"], rows, tokenizer, max_length=cut)
    kept = [i for i in range(12) if split.starts[i] < cut]
    assert short.rows == [rows[i] for i in kept] and max(short.lengths) <= cut
    assert all(list(a) == list(split.tokens[i][:cut]) for a, i in zip(short.tokens, kept))
    assert f"dropped {12 - len(kept)} of 12 rows" in caplog.text
    with pytest.raises(UserError, match="no row has its answer within max length 9"):
        data.encode(TASKS["boolq"], rows, tokenizer, max_length=9)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count, size", [(1, 1), (5, 8), (64, 8), (1000, 7), (3001, 32)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_properties(seed, count, size, shuffle):
    lengths = np.random.default_rng(seed).integers(1, 200, count).tolist()
    split = data.Split("classify", [], lengths)
    order = data.batches(split, size, seed, epoch=3, shuffle=shuffle)
    assert sorted(i for batch in order for i in batch) == list(range(count))
    assert [len(batch) for batch in order[:-1]] == [size] * (len(order) - 1) and 1 <= len(order[-1]) <= size
    assert order == data.batches(split, size, seed, epoch=3, shuffle=shuffle)
    if shuffle and count > 100:
        assert order != data.batches(split, size, seed, epoch=4)
        assert order != data.batches(split, size, seed + 1, epoch=3)
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in order)
        assert padded < 1.15 * sum(lengths)
        longest = [max(lengths[i] for i in batch) for batch in order[:-1]]
        assert longest[:40] != sorted(longest[:40], reverse=True)  # grouped, yet in random order
    if not shuffle:
        assert [lengths[i] for batch in order for i in batch] == sorted(lengths, reverse=True)


# ------------------------------------------------------------------------------------------------------ hyperparameters

PAPERS = [
    ("cola", "roberta", 768, dict(lr=4e-4, batch_size=64, epochs=80, warmup=0.06, weight_decay=0.1)),  # lelora 5
    ("mnli", "bert", 384, dict(lr=5e-4, batch_size=128, epochs=30)),
    ("stsb", "roberta", 1024, dict(lr=3e-4, batch_size=16, epochs=30, warmup=0.03)),  # lelora 6
    ("qnli", "roberta", 1024, dict(lr=1e-4, batch_size=6, epochs=10)),
    ("boolq", "llama", 4096, dict(lr=3e-4, batch_size=64, epochs=3, warmup=100, dropout=0.05)),  # lelora 7
    ("instructions", "gemma", 2048, dict(lr=3e-4, batch_size=64, epochs=3, warmup=100, dropout=0.05)),
    ("cola", "llama", 4096, dict(steps=1024, epochs=None, batch_size=32, alpha=32, weight_decay=1e-4)),  # weightlora 10
    ("sst2", "mistral", 4096, dict(steps=128, epochs=None, dropout=0.05, max_length=512)),
    ("gsm8k", "qwen3", 4096, dict(steps=5000, warmup=500, batch_size=32, alpha=32, max_length=512))]  # weightlora 11


@pytest.mark.parametrize("name, family, size, expected", PAPERS)
def test_hyperparameters_are_the_papers(name, family, size, expected):
    found, _ = data.hyperparameters(TASKS[name], family, size, "lora")
    assert {key: found[key] for key in expected} == expected


def test_a_method_decides_what_its_authors_say_and_why():
    chosen, reasons = data.hyperparameters(TASKS["rte"], "roberta", 768, "adalora", rank=4)
    assert chosen["alpha"] == 16 * 6 and chosen["lr"] == 1.2e-3 and set(reasons) == {"alpha", "lr"}
    chosen, _ = data.hyperparameters(TASKS["boolq"], "llama", 4096, "adalora", adalora_init_ratio=1.25)
    assert chosen["alpha"] == 16 * 40 and chosen["lr"] == 2 * 3e-4  # rank 32
    gammas = [data.hyperparameters(TASKS["rte"], "roberta", 768, "lalora", rank=r)[0]["lalora_gamma"] for r in (8, 64)]
    assert gammas == [1.1, 2.2]  # the budget's logarithm has to grow twice as far
    assert data.hyperparameters(TASKS["rte"], "roberta", 768, "weightlora+")[0]["warmup"] == 0
    assert data.hyperparameters(TASKS["rte"], "roberta", 768, "random")[1] == {}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "qwen3", "vit"])
@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "weightlora"])
def test_hyperparameters_are_complete(family, method):
    keys = set("lr batch_size epochs steps warmup weight_decay max_length dropout alpha rank schedule".split())
    for task, size in itertools.product(TASKS.values(), (384, 4096)):
        found, _ = data.hyperparameters(task, family, size, method)
        assert set(found) == keys and (found["epochs"] is None) != (found["steps"] is None) and 0 < found["lr"] < 0.01


# --------------------------------------------------------------------------------------------- tasks in a user's file

OWN_TASK = """
from dataclasses import replace
from data import TASKS, Task, own, read_texts
from data import read_arrays as read
LIKED = Task("liked", "classify", ("accuracy",), read_texts, files=own(".tsv"), columns=("said", None, "liked"))
NEAR = replace(TASKS["digits-rot90"], name="digits-near", base=(1e-3, 16, 3))
"""


def test_a_task_in_a_file(tmp_path):
    file = write(tmp_path / "mine.py", OWN_TASK)
    write(tmp_path / "train.tsv", "liked\tsaid\nyes\tgood\nno\tbad\n")
    write(tmp_path / "dev.tsv", "liked\tsaid\nno\tbad\n")
    for name in (f"{file}:LIKED", f"{file}:liked"):     # the variable's name or the task's
        task = data.find_task(name, tmp_path)
        assert (task.name, task.labels) == ("liked", ("no", "yes"))
        assert data.read(task, tmp_path, "dev") == [{"text": "bad", "label": 0}]


@pytest.mark.parametrize("name, message", [
    ("none.py:LIKED", "--task none.py:LIKED: there is no file none.py"), ("mine.txt:X", "there is no file mine.txt"),
    ("mine.py:DISLIKED", r"the file has no data.Task DISLIKED: define it, or name one of \['LIKED', 'NEAR'\]"),
    ("mine.py:read", "the file has no data.Task read"), ("mine", "no task 'mine': choose from .*, my_tasks.py:")])
def test_what_is_no_task_in_a_file(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", OWN_TASK)
    write(tmp_path / "mine.txt", OWN_TASK)
    with pytest.raises(UserError, match=message):
        data.find_task(name)


def test_a_task_in_a_file_from_training_to_a_table(tmp_path, monkeypatch, capsys):
    """train.py, eval.py from another folder, --resume after the file's folder is left, bench.py quality; the hash."""
    import bench
    import eval as evaluation
    import train
    file = write(tmp_path / "mine.py", OWN_TASK)
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "4", "--limit-train", "64", "--limit-eval", "40", "--batch-size", "8", "--no-eval-before"]
    with interrupted_after(2):
        train.main(["--task", "mine.py:NEAR", *flags, "--save-every", "1", "--out", "run"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "../run"])
    trained = json.loads(capsys.readouterr().out)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["settings"]["task"] == f"{file}:NEAR" and settings["settings"]["lr"] == 1e-3
    assert "lora on digits-near" in (tmp_path / "run" / "README.md").read_text()
    for task in ((), ("--task", "../mine.py:NEAR")):
        evaluation.main(["../run", *task])
        again = json.loads(capsys.readouterr().out)
        assert again["task"] == trained["task"] == "digits-near" and again["accuracy"] == trained["accuracy"]
    monkeypatch.chdir(tmp_path)
    bench.main(["quality", "--tasks", "mine.py:NEAR,digits", "--methods", "lora", "--seeds", "1", *flags])
    assert {"mine.py:NEAR", "digits"} < json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["lora"].keys()
    before = evaluation.source_hash("lora", "mine.py:NEAR")
    assert before == settings["source"] != evaluation.source_hash("lora", "digits")
    write(file, OWN_TASK + "# changed")
    evaluation.source_hash.cache_clear()
    assert evaluation.source_hash("lora", str(file) + ":NEAR") != before


# ---------------------------------------------------------------------------------------------------------- bad input

COLA = "gj04\t1\t\tGood.\ngj04\t0\t*\tBad are.\n"
GOOD = {"instruction": "q", "input": "", "output": "the correct answer is true", "answer": "true"}


def files(name, content, split="train", named=None):
    """Case: these files of a task; `named`: it is --data, not the folder."""
    def make(folder):
        for path, text in content.items():
            write(folder / path, text)
        where = folder / named if named else folder
        task = data.find_task(name, where)
        rows = data.read(task, where, split)
        if task.kind == "image":
            data.encode(task, rows, image=data.image_settings(None, (3, 4, 4)))
    return make


def glue(name, text):
    return files(name, {"train.tsv": text})


def own(text, file="train.csv", name="text-classification"):
    return files(name, {file: text, file.replace("train", "dev"): text})


def rows(*rows, name="instructions"):
    return own(jsonl(rows), "train.jsonl", name)


def buffered(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def arrays(labels=(0, 1, 0), **more):
    images = {"images": some_images((len(labels), 4, 4)), "labels": np.array(labels), **more}
    return files("npz", {"a.npz": buffered(np.savez, **images)}, named="a.npz")


def photos(content, name="1.npy"):
    """Case: this file in a folder of images."""
    return files("image-folder", {"train/b/0.npy": buffered(np.save, some_images((4, 4))), f"train/a/{name}": content})


def model(files, task="cola", max_length=None):
    def make(folder):
        make_tokenizer(folder, "bert")
        for name, text in files.items():
            (folder / name).unlink() if text is None else write(folder / name, text)
        row = {"text": "a", "label": 0, "prompt": "a", "answer": "b"}
        data.encode(TASKS[task], [row], data.Tokenizer(folder), max_length)
    return make


def bomb():
    """A PNG whose header says that it has 2^31 pixels."""
    content = bytearray(jpg(0, "PNG"))
    content[16:24] = struct.pack(">II", 2**16, 2**15)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


BAD = {
    "unknown task": (lambda folder: data.find_task("colla"), "no task 'colla': choose from cola, "),
    "unknown split": (lambda folder: data.read(TASKS["mnli"], folder, "test"), "mnli has no test rows, only"),
    "no such folder": (lambda folder: data.read(TASKS["cola"], folder / "none"), "none/CoLA/train.tsv: no such file, in .* there are no files"),
    "other names": (files("text-classification", {"a.tsv": "x", "b.xlsx": "y", ".c": "z"}),
                    "train.tsv: no such file, in .* there are 'a.tsv', 'b.xlsx': correct --data to name a file"),
    "a file as folder": (files("cola", {"x.tsv": COLA}, named="x.tsv"), "x.tsv/CoLA/.*: no such file"),
    "no data": (lambda folder: data.read(TASKS["text-classification"]), "--task text-classification needs --data"),
    "no dev ids": (files("mrpc", {"msr_paraphrase_train.txt": "Quality\t#1 ID\n1\t2\n"}), "_dev_ids.tsv: no such file"),
    "empty file": (glue("cola", ""), "train.tsv: the file is empty"),
    "header only": (glue("sst2", "sentence\tlabel\n"), "no train rows"),
    "not UTF-8": (glue("cola", COLA.encode() + b"x\t1\t\tna\xefve\n"), r"train.tsv line 3: byte \d+ is not UTF-8"),
    "short row": (glue("cola", COLA + "gj04\t1\tx\n"), "train.tsv line 3: 3 columns, expected 4"),
    "missing column": (glue("sst2", "text\tlabel\na\t1\n"), "line 2: no column 'sentence' .there are .*rename"),
    "one class": (glue("cola", "a\t1\t\tx\nb\t1\t\ty\n"), "all labels are '1' in the 2 rows: add another class"),
    "score infinite": (own("text,score\na,inf\nb,1\n", name="text-regression"), "line 2: score 'inf' is no finite"),
    "label unseen in training": (
        files("text-classification", {"train.csv": "text,label\na,x\nb,y\n", "dev.csv": "text,label\nc,z\n"}, "dev"),
        "dev.csv line 2: label 'z' is none of .'x', 'y'"),
    "own file without text": (own("words,label\na,1\n"), "line 2: no column 'text' .there are .'words', 'label'"),
    "broken CSV": (own('text,label\n"a"b,1\n'), "train.csv line 2: .*mend the CSV quoting"),
    "text is a number": (rows({"text": 3, "label": 1}, name="text-classification"), "line 1: 'text' is int"),
    "half a surrogate pair": (own('{"question": "\\ud800", "answer": "b"}', "train.jsonl", "instructions"),
                              "line 1: 'question' is"),
    "not JSON": (own('[{"question": "a",\n "answer": }]', "train.json", "instructions"), "train.json line 2: not JSON"),
    "JSON list of text": (own('["a"]', "train.json", "instructions"), "train.json row 1: str, expected an object"),
    "missing keys": (rows(GOOD, {"instruction": "a"}), "line 2: no column 'output'"),
    "no answer": (rows({"question": "a", "answer": " "}), "no train rows"),
    "no ####": (files("gsm8k", {"train.jsonl": jsonl([{"question": "a", "answer": "4"}])}),
                "train.jsonl line 1: answer '', expected one marked as gsm8k's are"),
    "no gzip": (files("gsm8k", {"test.jsonl.gz": b"no gzip"}, "dev"), "a broken archive .*: fetch it again"),
    "cut gzip": (files("gsm8k", {"test.jsonl.gz": gzip.compress(b"{}" * 99)[:-9]}, "dev"), "a broken archive"),
    "choice out of range": (files("boolq", {"test.json": [GOOD, {**GOOD, "answer": "maybe"}]}, "dev"),
                            "row 2: answer 'maybe', expected true or false"),
    "object arrays": (arrays(images=np.array([{}, {}, {}], object)), "a.npz: no .npz of plain arrays"),
    "not an npz": (files("npz", {"a.npz": b"nonsense"}, named="a.npz"), "a.npz: no .npz of plain arrays"),
    "missing array": (arrays(x_train=some_images((2, 4, 4))), "a.npz: no column 'y_train'"),
    "fewer labels": (arrays(images=some_images((4, 4, 4))), r"images \(4, 4, 4\), labels \(3,\)"),
    "labels are floats": (arrays(labels=(0.5, 1.0, 2.0)), "float64 and split .*: expected"),
    "flat images": (arrays(images=some_images((3, 16))), r"images \(3, 16\), labels"),
    "float images": (arrays(images=np.full((3, 4, 4), 1.5)), r"images\[.\]: float64 from 0.0 to 1.5, expected uint8"),
    "five channels": (arrays(images=some_images((3, 6, 6, 5))), r"images\[.\]: uint8 \(6, 6, 5\), expected"),
    "split of another length": (arrays(split=np.zeros(4)), r"and split \(4,\): expected"),
    "no image folder": (files("image-folder", {"a/1.png": "x"}), "train: no such file, in .* there are 'a': correct --data"),
    "no images": (lambda folder: (folder / "train" / "a").mkdir(parents=True) or files("image-folder", {})(folder),
                  "no train rows"),
    "not an image": (photos("junk", "1.png"), "1.png: not an image"),
    "cut image": (lambda folder: photos(jpg(60)[:-300], "1.jpg")(folder), "1.jpg: not an image .*truncated"),
    "decompression bomb": (lambda folder: photos(bomb(), "1.png")(folder), "1.png: not an image .*2147483648 pixels"),
    "no tokenizer": (model({"tokenizer.json": None}), "tokenizer.json: no such file, nor a vocabulary"),
    "broken tokenizer": (model({"tokenizer.json": "{}"}), "tokenizer.json: not a tokenizer"),
    "tokenizer config is a list": (model({"tokenizer_config.json": "[3]"}), "_config.json row 1: int, expected"),
    "tokenizer setting of a wrong type": (
        model({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": []}}), "not a tokenizer"),
    "no room for text": (model({}, max_length=2), "max length 2 leaves no room for text"),
    "no eos": (model({}, task="boolq"), "the tokenizer has no eos token"),
}


@pytest.mark.parametrize("make, pattern", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(tmp_path, make, pattern):
    """Each malformed input raises UserError with one line that names the place and a remedy."""
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(UserError, match=pattern) as caught:
        make(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_extras_are_named_where_they_are_missing(tmp_path, monkeypatch):
    """Arrays of the model's size do without Pillow."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="1.png: reading or resizing images needs Pillow: pip install pillow"):
        photos("junk", "1.png")(tmp_path)
    rows = [{"pixels": some_images((3, 4, 4)), "label": 0}]
    assert len(data.encode(TASKS["digits"], rows, image=data.image_settings(None, (3, 4, 4)))) == 1
    with pytest.raises(UserError, match="digits image 0: reading or resizing images needs Pillow"):
        data.encode(TASKS["digits"], rows, image=data.image_settings(None, (3, 5, 4)))


# ----------------------------------------------------------------------------------------------------------- fetching


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves files {path: bytes}; a path in `cut` is announced whole and sent by half."""

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path in self.server.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.cut, server.asked = {}, set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RANKS_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()


def place(address):
    return "/" + address.partition("://")[2]


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for member in members.items():
            file.writestr(*member)
    return buffer.getvalue()


def make_tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def serve(mirror, task, bodies):
    """Serve these bodies as a task's sources; returns the task with their checksums."""
    sources = []
    for (split, address, sha256), body in zip(task.sources, bodies):
        mirror.files[place(address)] = body
        sources.append((split, address, sha256 and hashlib.sha256(body).hexdigest()))
    return replace(task, sources=tuple(sources))


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.suffix in (".part", ".zip", ".gz", ".tgz")]


COLA_ZIP = {"CoLA/": "", "CoLA/train.tsv": COLA, "CoLA/dev.tsv": COLA, "CoLA/original/more.txt": "x"}


EVIL = ("../evil.txt", "CoLA/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil")


def test_fetch_archive(tmp_path, mirror):
    """Another checksum, then a connection that ends early, then all of it, once; no member gets out of the folder."""
    mirror.files[place(TASKS["cola"].sources[0][1])] = make_zip(COLA_ZIP)
    with pytest.raises(UserError, match="CoLA.zip .it is damaged: its SHA-256 is .{64}, not .{64}.: run"):
        data.read(TASKS["cola"])
    packed = make_zip(COLA_ZIP | {"CoLA/test.tsv": os.urandom(9000)} | dict.fromkeys(EVIL, "x"))
    task = serve(mirror, TASKS["cola"], [packed])
    mirror.cut.update(mirror.files)
    with pytest.raises(UserError, match="the connection ended at .* run this again"):
        data.read(task)
    folder = tmp_path / "cache" / "CoLA"
    assert not leftovers(tmp_path) and not (folder / "train.tsv").exists()
    mirror.cut.clear()
    assert len(data.read(task)) == 2 and len(data.read(task, None, "dev")) == 2
    assert len(mirror.asked) == 3 and not leftovers(tmp_path) and not Path("/tmp/evil.txt").exists()
    assert {path.name for path in folder.iterdir()} == {"dev.tsv", "original", "test.tsv", "train.tsv"}
    assert all(folder in path.parents for path in tmp_path.rglob("*") if path.is_file())


def test_every_published_archive_has_a_checksum():
    for name in LAYOUTS:
        assert all(address.startswith("http") and len(sha256) == 64 for _, address, sha256 in TASKS[name].sources)
    readme = SHARED / "README.md"
    if not readme.is_file():
        pytest.skip("no ../shared: checksums not compared with its list")
    listed = readme.read_text()
    for name in LAYOUTS:
        for _, address, sha256 in TASKS[name].sources:
            assert f"`{address.removeprefix(data.FACEBOOK)}`" in listed and sha256 in listed


def test_no_network_is_one_line(tmp_path, monkeypatch, mirror):
    """A closed port, then a server that does not have the file."""
    with pytest.raises(UserError, match="cannot fetch https://raw.*HTTP Error 404"):
        data.read(TASKS["piqa"])
    monkeypatch.setenv("RANKS_MIRROR", "http://127.0.0.1:9")
    for task, verb in ((TASKS["sst2"], "unpack"), (TASKS["commonsense"], "put")):
        pattern = (f"cannot fetch https://.*: run this again, or download it elsewhere and {verb} it into {tmp_path}/cache/.*, "
                   "or name a folder with its files by --data")
        with pytest.raises(UserError, match=pattern) as caught:
            data.read(task)
        assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------------------------------------------------- real data

REAL = {("cola", "glue"): (8551, 1043), ("sst2", "glue"): (67349, 872), ("stsb", "glue"): (5749, 1500),
        ("boolq", "commonsense"): (9427, 3270), ("obqa", "commonsense"): (4957, 500),
        ("arc-e", "commonsense"): (2251, 2376), ("arc-c", "commonsense"): (1119, 1172),
        ("piqa", "commonsense"): (0, 1838), ("siqa", "commonsense"): (0, 1954),
        ("winogrande", "commonsense"): (0, 1267), ("gsm8k", "."): (7473, 1319)}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the real data")
@pytest.mark.parametrize("name, folder", REAL)
def test_real_files(name, folder, caplog):
    """Every row and column of the real files is read; expected outputs contain their own answers."""
    task = data.find_task(name, SHARED / folder)
    for split, count in zip(("train", "dev"), REAL[name, folder]):
        rows = data.read(task, SHARED / folder, split) if count else []
        assert len(rows) == count and "not read" not in caplog.text
        scored = [row for row in rows if "target" in row]
        assert all(data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in scored)
