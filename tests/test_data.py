"""data.py: every file layout, every error, encoding and images against transformers, batches, fetching on loopback."""

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from tiny import interrupted_after, mirror, refused  # noqa: F401: one is a fixture

import data
from data import TASKS

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_glue_layouts(tmp_path, caplog, name):
    """Official layouts: headers, byte-order mark, quotes, CR LF, Unicode separators, no final newline, gzipped."""
    folder, text, expected = LAYOUTS[name]
    write(tmp_path / folder / "train.tsv.gz", gzip.compress(text.encode()))
    write(tmp_path / folder / ("dev_matched.tsv" if name == "mnli" else "dev.tsv"), text)
    mismatched = mnli([f"label{i}" for i in range(1, 6)], ["entailment", "neutral"])
    write(tmp_path / folder / "dev_mismatched.tsv", mismatched)
    for where in (tmp_path, tmp_path / folder):
        for split in ("train", "dev"):
            rows = data.read(TASKS[name], where, split)
            assert [(row["text"], row.get("pair"), row["label"]) for row in rows] == expected
    assert data.read(TASKS[name], where, limit=2) == rows[:2]
    assert type(rows[0]["label"]) is (float if name == "stsb" else int)
    if name == "mnli":
        assert [row["label"] for row in data.read(TASKS[name], where, "dev_mismatched")] == [0, 1]
    assert LEFT_OUT.get(name, "") in caplog.text and "not read" not in caplog.text
    assert name == "stsb" or f"{len(rows)} train rows: 1 '" in caplog.text


def test_mrpc_original_files(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = "".join(f'{i % 2}\t{i}\t{i + 100}\tleft {i}\tright "{i}\r\n' for i in range(6))
    write(tmp_path / "msr_paraphrase_train.txt", header + rows)
    write(tmp_path / "mrpc_dev_ids.tsv", "1\t101\n4\t104\n2\t999\n")
    for split, numbers in (("dev", (1, 4)), ("train", (0, 2, 3, 5))):
        assert [row["text"] for row in data.read(TASKS["mrpc"], tmp_path, split)] == [f"left {i}" for i in numbers]


REAL = {("cola", "glue"): (8551, 1043), ("sst2", "glue"): (67349, 872), ("stsb", "glue"): (5749, 1500),
        ("boolq", "commonsense"): (9427, 3270), ("obqa", "commonsense"): (4957, 500),
        ("arc-e", "commonsense"): (2251, 2376), ("arc-c", "commonsense"): (1119, 1172),
        ("piqa", "commonsense"): (0, 1838), ("siqa", "commonsense"): (0, 1954),
        ("winogrande", "commonsense"): (0, 1267), ("gsm8k", "."): (7473, 1319)}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the real data")
@pytest.mark.parametrize("name, folder", REAL)
def test_real_files(name, folder, caplog):
    """Every row and column of the real files is read; expected outputs contain their own answers."""
    for split, count in zip(("train", "dev"), REAL[name, folder]):
        rows = data.read(TASKS[name], SHARED / folder, split) if count else []
        assert len(rows) == count and "not read" not in caplog.text
        scored = [row for row in rows if "target" in row]
        assert all(data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in scored)


# ------------------------------------------------------------------------------------------------ instructions, prompts

ALPACA = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
          "response that appropriately completes the request.\n\n### Instruction:\nwhat is {x} and {0} %s \\1?\n\n"
          "### Input:\n{input}\n\n### Response:\n")


def test_prompt_survives_format_characters():
    assert data.prompt("what is {x} and {0} %s \\1?", "{input}") == ALPACA
    without = ALPACA.replace(", paired with an input that provides further context", "")
    assert data.prompt("what is {x} and {0} %s \\1?") == without.replace("### Input:\n{input}\n\n", "")


def test_commonsense_is_one_training_set_and_many_tests(tmp_path, caplog):
    for name in ("boolq", "piqa"):
        rows = [{"instruction": f"Q{i}", "input": "", "output": f"the correct answer is {answer}", "answer": answer}
                for i, answer in enumerate(TASKS[name].answers)]
        for file in ("train.json", "test.json"):
            write(tmp_path / TASKS[name].folder / file, json.dumps(rows, indent=1))
        read = data.read(TASKS[name], tmp_path, "dev")
        assert [row["target"] for row in read] == list(TASKS[name].answers)
        assert read[1]["prompt"] == data.prompt("Q1") and read[1]["answer"] == rows[1]["output"]
    task = data.find_task("commonsense", tmp_path)
    assert task.eval_splits == ("boolq", "piqa") and data.find_task("commonsense").eval_splits == data.COMMONSENSE
    assert [len(data.read(task, tmp_path, split)) for split in ("boolq", "piqa", "train")] == [2, 2, 4]
    assert "training on train.json of boolq, piqa" in caplog.text and "not read" not in caplog.text
    write(tmp_path / "commonsense_170k.json", rows * 5)
    assert len(data.read(task, tmp_path, "train")) == 10


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


def test_allowed_answers_are_those_that_the_prompt_lists():
    row = {"prompt": "Answer format: answer1/answer2/answer3", "answer": "the correct answer is answer2",
           "target": "answer2", "answers": TASKS["siqa"].answers}
    expected = ["answer1", "answer2", "answer3"], [f"the correct answer is answer{i}" for i in (1, 2, 3)]
    assert data.allowed(row) == expected
    assert data.allowed({**row, "prompt": "answer2 is in it by chance"})[0] == list(TASKS["siqa"].answers)
    assert data.allowed({**row, "answer": "B", "answers": ("answer1", "answer2")})[1] == ["answer1", "answer2"]


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


# ---------------------------------------------------------------------------------------------------- the user's tables

PAIRS = [("text", None), ("sentence", None), ("review", None), ("sentence1", "sentence2"), ("question1", "question2"),
         ("premise", "hypothesis"), ("text", "text_pair"), ("question", "sentence"), ("text", "context")]


def table(form, rows):
    """Text of a file of rows; quoted TSV is tsv with every cell quoted, as pandas writes cells with quotes."""
    if form.startswith("json"):
        return jsonl(rows) + "\n\n" if form == "jsonl" else json.dumps(rows)
    lines = [list(rows[0]), *(row.values() for row in rows)]
    if form != "tsv":
        lines = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    mark, end = (",", "\r\n") if form == "csv" else ("\t", "\n")
    return end.join(mark.join(line) for line in lines) + "\n\n"


@pytest.mark.parametrize("form", ["tsv", "quoted.tsv", "csv", "jsonl", "json"])
@pytest.mark.parametrize("columns", PAIRS)
def test_own_classification(tmp_path, caplog, form, columns):
    """Both texts are read whatever they are called; blank last lines are no rows; what is not read is named."""
    texts = ["plain", 'with "quote"', "comma, and \u2028 separator", "one" if form == "tsv" else "two\n\tlines"]
    names = [name for name in (*columns, "label", "remark", "uid", "weight") if name]
    rows = [dict(zip(names, [text, *[text[::-1]] * bool(columns[1]), label, "a remark", "x", "0.5"]))
            for text, label in zip(texts, ["pos", "neg", "neutral", "neg"])]
    ending = form.removeprefix("quoted.")
    paths = [write(tmp_path / f"train.{ending}", table(form, rows)),
             write(tmp_path / f"valid.{ending}.gz", gzip.compress(table(form, rows).encode()))]
    task = data.find_task("text-classification", tmp_path)
    assert task.labels == ("neg", "neutral", "pos")
    for split in ("train", "dev"):
        read = data.read(task, tmp_path, split)
        assert [row["text"] for row in read] == texts and [row["label"] for row in read] == [2, 0, 1, 0]
        assert [row.get("pair") for row in read] == [text[::-1] if columns[1] else None for text in texts]
        assert f"{tmp_path}: 4 {split} rows: 2 'neg', 1 'neutral', 1 'pos'" in caplog.text
    named = {record.message for record in caplog.records if "not read" in record.message}
    assert named == {f"{path}: not read: column 'remark'" for path in paths}
    assert data.find_task("text-classification", None, ["b", "a"]).labels == ("b", "a")  # an earlier run's


@pytest.mark.parametrize("label", ["-1", -1, "-1.0", "-", "", " ", "nan", "NaN", "None", "<NA>", float("nan"), None])
def test_a_missing_label_is_no_class(tmp_path, label):
    """Not in training rows, nor in dev rows alone."""
    rows = [{"text": "t", "label": other} for other in ("0", "1", "0")]
    path = write(tmp_path / "train.jsonl", jsonl([*rows, {"text": "t", "label": label}]))
    with refused("train.jsonl line 4: .*label"):
        classify(path)
    write(tmp_path / "train.jsonl", jsonl(rows))
    write(tmp_path / "dev.jsonl", jsonl([{"text": "t", "label": label}, *rows]))
    with refused("dev.jsonl line 1: .*label"):
        classify(tmp_path, "dev")


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
    with refused("all labels are '0' in the 20 rows: raise the limit or shuffle the rows"):
        classify(tmp_path, limit=20)
    assert len(classify(tmp_path, limit=40)) == 40 and len(classify(tmp_path, "dev", limit=20)) == 20


@pytest.mark.parametrize("rows", [3, 9, 10, 11, 29, 100, 12_345])
def test_held_out_rows_of_a_sorted_file(tmp_path, rows):
    """Every row is in exactly one split, the share is a tenth and every third of a sorted file gives dev rows."""
    path = write(tmp_path / "all.csv", numbered(rows, 3))
    train, dev = classify(path), classify(path, "dev")
    assert sorted(int(row["text"]) for row in train + dev) == list(range(rows))
    assert len(dev) == min(-(-rows // 10), 1000)
    assert rows < 25 or {row["label"] for row in dev} == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------------- images

def some_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def digit(pixels):
    return {"pixels": pixels, "label": 0}


def test_npz_layouts(tmp_path):
    images, labels = some_images((20, 6, 5, 3)), np.arange(20) % 4 + 7
    np.savez(tmp_path / "a.npz", x_train=images[:12], y_train=labels[:12, None], x_test=images[12:], y_test=labels[12:])
    np.savez(tmp_path / "b.npz", images=images / 255, labels=labels, split=np.arange(20) >= 12)
    np.savez(tmp_path / "c.npz", images=images.transpose(0, 3, 1, 2), labels=labels)
    for name, held_out in (("a", 8), ("b", 8), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        task = data.find_task("npz", path)
        assert task.labels == ("7", "8", "9", "10")
        train, dev = data.read(task, path), data.read(task, path, "dev")
        assert len(dev) == held_out and len(train) + len(dev) == 20
        if name != "c":
            assert [row["label"] for row in train + dev] == (labels - 7).tolist()
            for row, image in zip(train + dev, images):
                assert np.array_equal(row["pixels"], image.transpose(2, 0, 1))


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
    grey = ramp.astype(np.uint8)
    colour = Image.fromarray(np.stack([grey, grey[::-1], 255 - grey], -1))
    made = {"L.png": Image.fromarray(grey), "1.png": Image.fromarray(grey > 128), "RGB.png": colour,
            "P.png": colour.quantize(64), "RGBA.png": colour.copy(), "CMYK.jpg": colour.convert("CMYK"),
            "LA.png": Image.fromarray(grey).convert("LA"), "I16.png": Image.fromarray((ramp * 257).astype(np.uint16)),
            "F.tiff": Image.fromarray((ramp / 255).astype(np.float32)), "YCbCr.jpg": colour.convert("YCbCr")}
    made["RGBA.png"].putalpha(Image.fromarray(grey))
    expected = {name: np.asarray(picture.convert("RGB")) for name, picture in made.items()}
    for name, picture in made.items():
        picture.save(folder / name)
    turned = colour.getexif()
    turned[0x0112] = 6      # the camera was held upright
    colour.save(folder / "turned.png", exif=turned)
    expected["turned.png"] = np.rot90(np.asarray(colour), -1)
    arrays = {"f.npy": ramp / 255, "u2.npy": (ramp * 257).astype(np.uint16), "chw.npy": grey[None],
              "i8.npy": grey.astype(np.int64), "rgba.npy": np.stack([grey] * 3 + [255 - grey], -1)}
    for name, array in arrays.items():
        np.save(folder / name, array)
    return expected | dict.fromkeys(("I16.png", "F.tiff", *arrays), np.repeat(grey[..., None], 3, -1))


def test_photos_of_every_mode_and_size(tmp_path):
    """Each is read upright, as uint8 of the model's size and channels; hidden files and deep folders do no harm."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    expected = save_modes(tmp_path / "train" / "a")
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
    colour, grey = (data.encode(task, rows, image=vit(tmp_path / "vit", 20, channels)).pixels for channels in (3, 1))
    assert colour.shape == (len(rows), 3, 20, 20) and grey.shape == (len(rows), 1, 20, 20)
    for row, pixels in zip(rows, grey):
        if row["pixels"].name in ("RGB.png", "L.png"):
            picture = Image.open(row["pixels"]).convert("L").resize((20, 20), Image.Resampling.BILINEAR)
            assert np.array_equal(pixels[0], picture)


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
    split = data.encode(TASKS["digits"], [digit(picture.transpose(2, 0, 1)) for picture in pictures], image=settings)
    ours = data.collate(split, list(range(len(pictures))))[0]["pixels"]
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    level = settings["scale"] / torch.tensor(settings["std"]).min()
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1.01 * level
    assert (ours - theirs).abs().mean() < 0.1 * level


REFUSED = {
    "resample": {"resample": 1}, "size .'lon.*": {"size": {"longest_edge": 24}}, "crop_size": {**CROP, "crop_size": 20},
    "do_pad": {"do_pad": True}, "rescale_offset": {"rescale_offset": True}, "crop_pct": {"crop_pct": 0.9},
    "do_flip_channel_order": {"do_flip_channel_order": True}, "size": {"size": {"height": 3, "width": 24}},
    "image_processor_type": {"image_processor_type": "SiglipImageProcessor"}, "image_mean": {"image_mean": [1, 2]},
    "image_std": {"image_std": [0, 1, 1]}, "rescale_factor": {"rescale_factor": "1/255"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_to_images_is_named(tmp_path, name):
    with refused(f"preprocessor_config.json: {name} .*: mend it"):
        vit(tmp_path, 24, **SQUARE | REFUSED[name])


def test_an_image_that_is_not_resized_must_fit(tmp_path):
    whole = vit(tmp_path, 24, do_resize=False)
    with refused("digits image 1: 24 x 25 pixels, the model takes"):
        data.encode(TASKS["digits"], [digit(some_images((3, 24, width))) for width in (24, 25)], image=whole)
    with refused("digits image 0: 23 x 24 pixels, .* does not enlarge it"):
        cropped = vit(tmp_path, 24, do_resize=False, **CROP)
        data.encode(TASKS["digits"], [digit(some_images((3, 23, 40)))], image=cropped)


def test_extras_are_named_where_they_are_missing(tmp_path, monkeypatch):
    """Arrays of the model's size do without Pillow."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    read_bad(tmp_path, "image-folder", photo("1.png", "junk"), "1.png: reading or resizing images needs Pillow: pip")
    rows = [digit(some_images((3, 4, 4)))]
    assert len(data.encode(TASKS["digits"], rows, image=data.image_settings(None, (3, 4, 4)))) == 1
    with refused("digits image 0: reading or resizing images needs Pillow"):
        data.encode(TASKS["digits"], rows, image=data.image_settings(None, (3, 5, 4)))


# --------------------------------------------------------------------------------------------------------- tokenizing

TEXTS = ["The quick brown fox jumps over the lazy dog.", "the dog", "", "naïve café — 42 %", "fox " * 40,
         "unseen žluťoučký", "中文 The\tFOX\n [SEP] </s> fox", " Fox  dog"]
def make_tokenizer(folder, kind="Roberta", model_type=None, texts=TEXTS[:4], **settings):
    """Train a small tokenizer, which transformers' class saves with what tokenizer_config.json says besides."""
    models, before = tokenizers.models, tokenizers.pre_tokenizers
    model, splitter, special = {
        "Bert": (models.WordPiece(unk_token="[UNK]"), before.BertPreTokenizer(), "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        "Roberta": (models.BPE(), before.ByteLevel(add_prefix_space=False), "<s> </s> <unk> <pad> <mask>"),
        "GPT2": (models.BPE(), before.ByteLevel(add_prefix_space=False), "<|endoftext|>"),
        "Llama": (models.BPE(unk_token="<unk>"), before.Metaspace(split=False), "<unk> <s> </s>"),
        "DebertaV2": (models.Unigram(), before.Metaspace(), "[PAD] [CLS] [SEP] [UNK]"),
        "XLMRoberta": (models.Unigram(), before.Metaspace(), "<s> <pad> </s> <unk>")}[kind]
    backend, special = tokenizers.Tokenizer(model), special.split()
    backend.pre_tokenizer = splitter
    options = {"unk_token": special[3]} if isinstance(model, models.Unigram) else {}
    if kind in ("Roberta", "GPT2"):
        options = {"initial_alphabet": before.ByteLevel.alphabet()}
    trainer = type(model.get_trainer())
    backend.train_from_iterator([*texts * 5, "the correct answer is true"], trainer(
        vocab_size=400 if options else 200, show_progress=False, special_tokens=special, **options))
    content = json.loads(backend.to_str())["model"]
    vocab, merges = content["vocab"], [tuple(pair) for pair in content.get("merges", ())]
    if kind == "Llama":
        vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    vocab = vocab if isinstance(vocab, dict) else [tuple(piece) for piece in vocab]
    saved = getattr(transformers, f"{kind}Tokenizer")(vocab, **{"merges": merges} if merges else {})
    saved.save_pretrained(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)  # settings left in the file must not matter
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    write(folder / "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None})
    family = {"Bert": "bert", "DebertaV2": "deberta-v2", "XLMRoberta": "xlm-roberta"}.get(kind, "llama")
    ends = {"eos_token_id": [1, 7]} if family == "llama" else {}
    write(folder / "config.json", {"model_type": model_type or family, "type_vocab_size": 2} | ends)
    return folder


def compare_with_transformers(folder):
    fast, ours = transformers.AutoTokenizer.from_pretrained(folder), data.Tokenizer.from_folder(folder)
    for length in (None, 64, 16, 8):
        for second in (None, TEXTS[::-1]):
            ids, types = ours.encode(TEXTS, second, length)
            theirs = fast(TEXTS, second, truncation=length is not None, max_length=length, return_token_type_ids=True)
            assert [list(row) for row in ids] == theirs["input_ids"]
            assert [list(row) for row in types] == theirs["token_type_ids"]
    ids, _ = ours.encode(TEXTS, special=False)
    assert [list(row) for row in ids] == fast(TEXTS, add_special_tokens=False)["input_ids"]
    for text in TEXTS[:2]:
        assert ours.decode(ours.encode([text])[0][0]) == fast.decode(fast(text)["input_ids"], skip_special_tokens=True)
    return ours


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
# name: (transformers' class, what tokenizer_config.json says against tokenizer.json, family); oracle: AutoTokenizer
OVERRIDES = {
    "as it is": ("Roberta", FAST), "bert": ("Bert", {}), "cased": ("Bert", {"do_lower_case": False}),
    "cased fast": ("Bert", {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False, "strip_accents": True}),
    "no class": ("Bert", {"tokenizer_class": None, "do_lower_case": False}),
    "accents": ("Bert", {"strip_accents": False}), "chinese": ("Bert", {"tokenize_chinese_chars": False}),
    "left": ("Bert", {"truncation_side": "left"}), "any class left": ("Roberta", FAST | {"truncation_side": "left"}),
    "not for this class": ("Bert", FAST | {"do_lower_case": False}), "split": ("Bert", {"split_special_tokens": True}),
    "added": ("Bert", {"added_tokens_decoder": {
        "900": {"content": "quick", "lstrip": False, "rstrip": False, "normalized": False, "special": False,
                "single_word": False}, "5": {"content": "fox", "special": True}}}),
    "special tokens": ("Bert", {"cls_token": "[UNK]"}),
    "electra": ("Bert", {"tokenizer_class": "ElectraTokenizer", "do_lower_case": False}),
    "extra": ("Roberta", FAST | {"additional_special_tokens": ["fox"], "pad_token": "<|pad|>", "mask_token": "dog"}),
    "roberta": ("Roberta", {}, "roberta"), "roberta space": ("Roberta", {"add_prefix_space": True}, "roberta"),
    "gpt2": ("GPT2", {"add_prefix_space": True}, "gpt2"), "gpt2 bos": ("GPT2", {"add_bos_token": True}, "gpt2"),
    "eos": ("Roberta", FAST | {"add_eos_token": True}), "neither": ("Roberta", FAST | {"add_bos_token": False}),
    "llama": ("Llama", {"add_bos_token": True, "add_eos_token": False}),
    "llama eos": ("Llama", {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}),
    "llama no space": ("Llama", {"add_prefix_space": False}), "llama legacy": ("Llama", {"legacy": True}),
    "llama byte level": ("Roberta", {"tokenizer_class": "LlamaTokenizer"}),
    "deberta": ("DebertaV2", {}), "deberta lower": ("DebertaV2", {"do_lower_case": True}),
    "deberta points": ("DebertaV2", {"split_by_punct": True}), "xlm": ("XLMRoberta", {}),
    "xlm no space": ("XLMRoberta", {"add_prefix_space": False}),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_encoding_equals_transformers(tmp_path, name):
    kind, settings, *model_type = OVERRIDES[name]
    ours = compare_with_transformers(make_tokenizer(tmp_path, kind, *model_type, **settings))
    assert ours.types == (kind in ("Bert", "DebertaV2"))
    if name == "as it is":
        assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (3, 1, [1, 7], [0])
    if kind in ("DebertaV2", "XLMRoberta"):
        assert ours.pad_id == (kind == "XLMRoberta")
        assert "\u2581" in ours.backend.encode("the answer").tokens or settings.get("add_prefix_space") is False


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_encoding_equals_transformers_on_checkpoints(name):
    folder = Path(os.environ.get("CHECKPOINTS", "none")) / name
    if not folder.is_dir():
        pytest.skip(f"set CHECKPOINTS to the folder that holds {name}/")
    compare_with_transformers(folder)


@pytest.mark.parametrize("kind, model_type", [("Bert", "bert"), ("Roberta", "roberta"), ("GPT2", "gpt2"),
                                              ("GPT2", "qwen2")])
def test_vocabularies_without_tokenizer_json(tmp_path, kind, model_type):
    """vocab.txt, or vocab.json and merges.txt; for other families the message says how to make a tokenizer.json."""
    make_tokenizer(tmp_path, kind, model_type, tokenizer_class=None)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    if kind == "Bert":
        write(tmp_path / "vocab.txt", "".join(f"{token}\n" for token in sorted(model["vocab"], key=model["vocab"].get)))
    else:
        write(tmp_path / "vocab.json", model["vocab"])
        write(tmp_path / "merges.txt", "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    if model_type == "qwen2":
        with refused("fetch the model's tokenizer files, or make it: pip install") as caught:
            data.Tokenizer.from_folder(tmp_path)
        command = str(caught.value).partition(", then python ")[2]
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True, capture_output=True)
    compare_with_transformers(tmp_path)


def test_fallback_ids(tmp_path, caplog):
    folder = make_tokenizer(tmp_path, "Bert")
    write(folder / "special_tokens_map.json", "{}")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "X", "unk_token": "[UNK]", "normalise_numbers": True})
    write(folder / "config.json", {"model_type": "bert", "eos_token_id": 3})
    write(folder / "generation_config.json", {"eos_token_id": [3, 5]})
    ours = data.Tokenizer.from_folder(folder)
    assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (3, 3, [3, 5], [2])
    assert f"{folder}/tokenizer_config.json: not used: 'normalise_numbers'" in caplog.text
    write(folder / "config.json", "{}")
    (folder / "generation_config.json").unlink()
    assert data.Tokenizer.from_folder(folder).pad_id == 1


def test_settings_that_tokenizer_json_overrules_are_named(tmp_path, caplog):
    """transformers, too, goes by tokenizer.json there (`test_encoding_equals_transformers`)."""
    folder = make_tokenizer(tmp_path, "Llama", tokenizer_class="BertTokenizer", add_eos_token=True, model_max_length=8,
                            added_tokens_decoder={"77": {"content": "<new>"}})
    size = data.Tokenizer.from_folder(folder).backend.get_vocab_size()
    processor = data.Processor(TASKS["sst2"], folder, SimpleNamespace(vocab_size=size, type_vocab_size=2))
    processor.training([{"text": "the dog", "label": 0}], 32)
    for named in ("add_eos_token is True", "<new>' has id 77", "BertTokenizer does not fit", "model_max_length, 8"):
        assert named in caplog.text


def test_decoded_text_keeps_the_space_that_it_begins_with(tmp_path):
    """SentencePiece's decoder drops the first space of a text: Python would lose an indent."""
    tokenizer = data.Tokenizer.from_folder(make_tokenizer(tmp_path))
    vocabulary = {"<unk>": 0, "\u2581def": 1, "\u2581return": 2, "\u2581": 3, "x": 4, "</s>": 5}
    tokenizer.backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer.backend.add_special_tokens(["</s>"])
    assert tokenizer.decode([3, 3, 2, 4, 5]) == "  returnx"
    assert tokenizer.decode([3, 3, 2, 4, 5], [5, 1, 4]) == "   returnx"


def test_tokens_are_checked_against_the_model(tmp_path, caplog):
    def processor(task="rte", vocab_size=200, types=2):
        return data.Processor(TASKS[task], tmp_path, SimpleNamespace(vocab_size=vocab_size, type_vocab_size=types))

    size = data.Tokenizer.from_folder(make_tokenizer(tmp_path, "Bert")).backend.get_vocab_size()
    rows = [{"text": "the dog", "pair": "fox", "label": 0}]
    assert len(processor(vocab_size=size).training(rows, 32)) == 1
    with refused("rte, row 'the dog': token .* has id .*, the model only .* embeddings: fetch"):
        processor(vocab_size=20).training(rows, 32)
    with refused(f"the tokenizer has {size} tokens, the model 999: it is not this model's"):
        processor(vocab_size=999)
    with refused("a pair's texts have 2 types, the model only 1 type embeddings"):
        processor(types=1).training(rows, 32)
    with refused("max length 2 leaves no room for text"):
        processor().training(rows, 2)
    with refused("the tokenizer has no eos token"):
        processor("boolq").training([{"prompt": "a", "answer": "b"}], 32)
    make_tokenizer(tmp_path, **FAST, pad_token="<|pad|>")
    size = data.Tokenizer.from_folder(tmp_path).pad_id
    assert processor("sst2", size).tokenizer.pad_id == 1
    assert f"pad token '<|pad|>' has id {size}, the model only {size}" in caplog.text
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tokenizer.json", content | {"post_processor": None})
    with refused("sst2, row '': no token: remove the row"):
        processor("sst2", size).training([{"text": "a", "label": 0}, {"text": "", "label": 1}], 32)
    write(tmp_path / "tokenizer.json", "{}")
    with refused("tokenizer.json: not a tokenizer"):
        processor()


JOINED = {"sentencepiece": ("Llama", {}), "byte level": ("Roberta", {}), "no eos": ("GPT2", {}),
          "bos": ("Roberta", FAST | {"add_bos_token": True}), "eos": ("Roberta", FAST | {"add_eos_token": True})}


@pytest.mark.parametrize("name", JOINED)
def test_prompt_and_answer_are_encoded_as_one_text(tmp_path, caplog, name):
    """The ids are transformers' for the joined text; where a prompt's ids do not begin them, both are encoded apart."""
    kind, settings = JOINED[name]
    folder = make_tokenizer(tmp_path, kind, **settings)
    ours, fast = data.Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": data.prompt("fox"), "answer": answer} for answer in ("the dog", "true", " fox", "  \n", "é")]
    split = data.encode(TASKS["instructions"], rows, ours)
    for row, ids, start in zip(rows, split.tokens, split.starts):
        theirs = fast(row["prompt"] + row["answer"])["input_ids"]
        assert ids.tolist() == (theirs if theirs[-1] == ours.eos_id else [*theirs, ours.eos_id])
        prompt = fast(row["prompt"], add_special_tokens=False)["input_ids"]
        assert ids[:start].tolist() == [*ours.prefix, *prompt]
    assert "apart" not in caplog.text
    rows[1] = {"prompt": "the qui", "answer": "ck fox"}
    split = data.encode(TASKS["instructions"], rows, ours)
    apart = [fast(text, add_special_tokens=False)["input_ids"] for text in ("the qui", "ck fox")]
    assert split.tokens[1].tolist() == [*ours.prefix, *apart[0], *apart[1], ours.eos_id]
    assert "1 of 5 answers were encoded apart from their prompts" in caplog.text


def test_instruction_batches(tmp_path, caplog):
    """Loss positions are the answer and eos exactly; truncation cuts the tail."""
    tokenizer, random = data.Tokenizer.from_folder(make_tokenizer(tmp_path)), np.random.default_rng(0)
    rows = [{"prompt": data.prompt(" ".join(random.choice(["fox", "dog", "the"], random.integers(1, 12)))),
             "answer": f"the correct answer is {random.integers(1, 10**6)}"} for _ in range(12)]
    split = data.encode(TASKS["boolq"], rows, tokenizer)
    for i, length in enumerate(split.lengths):
        width = data.collate(split, [i], pad_to=[100, 128, 150])[0]["tokens"].shape[1]
        assert width == min([bucket for bucket in (100, 128, 150) if bucket >= length], default=length)
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
    cut = sorted(split.starts)[6]
    short = data.encode(TASKS["boolq"], rows, tokenizer, max_length=cut)
    kept = [i for i in range(12) if split.starts[i] < cut]
    assert short.rows == [rows[i] for i in kept] and max(short.lengths) <= cut
    assert all(list(a) == list(split.tokens[i][:cut]) for a, i in zip(short.tokens, kept))
    assert f"dropped {12 - len(kept)} of 12 rows" in caplog.text
    with refused("no row has its answer within max length 9"):
        data.encode(TASKS["boolq"], rows, tokenizer, max_length=9)


@pytest.mark.parametrize("count, size", [(1, 1), (5, 8), (64, 8), (1000, 7), (3001, 32)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_properties(count, size, shuffle):
    lengths = np.random.default_rng(0).integers(1, 200, count).tolist()
    order = data.batches(lengths, size, 0, epoch=3, shuffle=shuffle)
    assert sorted(i for batch in order for i in batch) == list(range(count))
    assert [len(batch) for batch in order[:-1]] == [size] * (len(order) - 1) and 1 <= len(order[-1]) <= size
    assert order == data.batches(lengths, size, 0, epoch=3, shuffle=shuffle)
    if shuffle and count > 100:
        assert order != data.batches(lengths, size, 0, epoch=4) and order != data.batches(lengths, size, 1, epoch=3)
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


# --------------------------------------------------------------------------------------------- tasks in a user's file

OWN_TASK = """
from dataclasses import replace
from data import TASKS, Task, collate, encode, own, read_texts
from eval import logits
LIKED = Task("liked", "classify", ("accuracy",), read_texts, files=own(".tsv"), columns=("said", None, "liked"),
             encode=lambda task, rows, *more: encode(replace(task, encode=None), rows + rows, *more))
def near(model, task, split, batches):
    pairs = [(logits(model, inputs).argmax(-1), labels) for inputs, labels in (collate(split, b) for b in batches)]
    return {"near": sum((abs(a - b) <= 1).sum().item() for a, b in pairs) / len(split)}
NEAR = replace(TASKS["digits-rot90"], name="digits-near", metrics=("near",), base=(1e-3, 16, 3),
               settings={"alpha": 7}, evaluate=near)
ROWS = [("row 1", {"text": "a", "label": "no"}), ("row 2", {"text": "b", "label": "yes"})]
BARE = Task("bare", "classify", ("accuracy",), lambda task, data, split: ROWS)
"""


def test_a_task_in_a_file(tmp_path):
    file = write(tmp_path / "mine.py", OWN_TASK)
    write(tmp_path / "train.tsv", "liked\tsaid\nyes\tgood\nno\tbad\n")
    write(tmp_path / "dev.tsv", "liked\tsaid\nno\tbad\n")
    for name in (f"{file}:LIKED", f"{file}:liked"):     # the variable's name or the task's
        task = data.find_task(name, tmp_path)
        assert (task.name, task.labels) == ("liked", ("no", "yes"))
        rows = data.read(task, tmp_path, "dev")
        assert rows == [{"text": "bad", "label": 0}]
    split = data.encode(task, rows, data.Tokenizer.from_folder(make_tokenizer(tmp_path / "tokenizer")), 8)
    assert len(split) == 2 and split.count_rows() == 1     # by its own encode
    assert data.find_task(f"{file}:BARE").labels == ("no", "yes")
    for name, message in (("none.py:LIKED", "--task none.py:LIKED: there is no file none.py"),
                          (f"{file}:Task", r"no data.Task Task: define it, or name one of \['LIKED', 'NEAR', 'BARE'\]"),
                          ("squad", "no task 'squad': choose from .*, papers/squad.py:squad .*, my_tasks.py:")):
        with refused(message):
            data.find_task(name)


def test_a_task_in_a_file_from_training_to_a_table(tmp_path, monkeypatch, capsys):
    """train.py, --resume and eval.py after the file's folder is left, bench.py quality; the hash of the sources."""
    import bench
    import eval as evaluation
    import train
    file = write(tmp_path / "mine.py", OWN_TASK)
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "4", "--limit-train", "64", "--limit-eval", "40", "--batch-size", "8", "--no-eval-before"]
    with interrupted_after(2):
        train.main(["--task", "mine.py:NEAR", *flags, "--save-every", "1", "--out", "run"])
    write(tmp_path / "elsewhere" / "x", "")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "../run"])
    evaluation.main(["../run"])
    trained, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert again["task"] == trained["task"] == "digits-near" and again["near"] == trained["near"] > 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["task"] == f"{file}:NEAR"
    assert (about["settings"]["lr"], about["settings"]["alpha"]) == (1e-3, 7)
    monkeypatch.chdir(tmp_path)
    bench.main(["quality", "--tasks", "mine.py:NEAR,digits", "--methods", "lora", "--seeds", "1", *flags])
    compared = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert compared["metrics"] == {"mine.py:NEAR": "near", "digits": "accuracy", "average": ""}
    assert {"mine.py:NEAR", "digits"} < compared["rows"]["lora"].keys()
    before = evaluation.source_hash("lora", "mine.py:NEAR")
    assert before == about["source"] != evaluation.source_hash("lora", "digits")
    write(file, OWN_TASK + "# changed")
    evaluation.source_hash.cache_clear()
    assert evaluation.source_hash("lora", str(file) + ":NEAR") != before


# ---------------------------------------------------------------------------------------------------------- bad input

def bytes_of(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def npz(labels=(0, 1, 0), **more):
    images = {"images": some_images((3, 4, 4)), "labels": np.array(labels), **more}
    return {"train.npz": bytes_of(np.savez, **images)}


def photo(name, content):
    return {"train/b/0.npy": bytes_of(np.save, some_images((4, 4))), f"train/a/{name}": content}


def bomb():
    """A PNG whose header says that it has 2^31 pixels."""
    content = bytearray(jpg(0, "PNG"))
    content[16:24] = struct.pack(">II", 2**16, 2**15)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


COLA = "gj04\t1\t\tGood.\ngj04\t0\t*\tBad are.\n"
GOOD = {"instruction": "q", "input": "", "output": "the correct answer is true", "answer": "true"}
# task, its files, what the line says, and the split or file that is read
BAD = [
    ("cola", {}, "CoLA/train.tsv: no such file, in .* there are no files"),
    ("cola", {"x.tsv": COLA}, "x.tsv/CoLA/.*: no such file", "train", "x.tsv"),
    ("text-classification", {"a.tsv": "x", "b.xlsx": "y", ".c": "z"},
     "train.tsv: no such file, in .* there are 'a.tsv', 'b.xlsx': correct --data to name a file"),
    ("mrpc", {"msr_paraphrase_train.txt": "Quality\t#1 ID\n1\t2\n"}, "_dev_ids.tsv: no such file"),
    ("cola", {"train.tsv": ""}, "train.tsv: the file is empty"),
    ("sst2", {"train.tsv": "sentence\tlabel\n"}, "no train rows"),
    ("cola", {"train.tsv": COLA.encode() + b"x\t1\t\tna\xefve\n"}, r"train.tsv line 3: byte \d+ is not UTF-8"),
    ("cola", {"train.tsv": COLA + "gj04\t1\tx\n"}, "train.tsv line 3: 3 columns, expected 4"),
    ("cola", {"train.tsv": "a\t1\t\tx\nb\t1\t\ty\n"}, "all labels are '1' in the 2 rows: add another class"),
    ("text-regression", {"train.csv": "text,score\na,inf\nb,1\n"}, "line 2: score 'inf'"),
    ("stsb", {"train.tsv": STSB + "0" + "\t-" * 6 + "\ta\tb\t5.5\n"}, "line 2: score '5.5' is no number in .0, 5."),
    ("text-classification", {"train.csv": "text,label\na,x\nb,y\n", "dev.csv": "text,label\nc,z\n"},
     "dev.csv line 2: label 'z' is none of .'x', 'y'", "dev"),
    ("text-classification", {"train.csv": "words,label\na,1\n"}, "no column 'text' .there are .'words', 'label'"),
    ("text-classification", {"train.csv": 'text,label\n"a"b,1\n'}, "train.csv line 2: .*mend the CSV quoting"),
    ("text-classification", {"train.jsonl": jsonl([{"text": 3, "label": 1}])}, "line 1: 'text' is int"),
    ("instructions", {"train.jsonl": jsonl([{"question": "\ud800", "answer": "b"}])}, "line 1: 'question' is"),
    ("instructions", {"train.json": '[{"question": "a",\n "answer": }]'}, "train.json line 2: not JSON"),
    ("instructions", {"train.json": '["a"]'}, "train.json row 1: str, expected an object"),
    ("gsm8k", {"test.jsonl.gz": b"no gzip"}, "a broken archive .*: fetch it again", "dev"),
    ("gsm8k", {"test.jsonl.gz": gzip.compress(b"{}" * 99)[:-9]}, "a broken archive", "dev"),
    ("boolq", {"test.json": [GOOD, {**GOOD, "answer": "maybe"}]}, "row 2: answer 'maybe', expected true or", "dev"),
    ("npz", {"train.npz": b"nonsense"}, "train.npz: no .npz of plain arrays"),
    ("npz", npz(images=some_images((4, 4, 4))), r"images \(4, 4, 4\), labels \(3,\)"),
    ("npz", npz(labels=(0.5, 1.0, 2.0)), "float64 and split .*: expected"),
    ("npz", npz(images=some_images((3, 16))), r"images \(3, 16\), labels"),
    ("npz", npz(images=np.full((3, 4, 4), 1.5)), r"images\[.\]: float64 from 0.0 to 1.5, expected uint8"),
    ("npz", npz(images=some_images((3, 6, 6, 5))), r"images\[.\]: uint8 \(6, 6, 5\), expected"),
    ("npz", npz(split=np.zeros(4)), r"and split \(4,\): expected"),
    ("image-folder", photo("1.jpg", jpg(60)[:-300]), "1.jpg: not an image .*truncated"),
    ("image-folder", photo("1.png", bomb()), "1.png: not an image .*2147483648 pixels"),
]


def read_bad(folder, name, content, pattern, split="train", file=""):
    """These files of a task are refused by one line that `pattern` finds; `file`: --data names it, not the folder."""
    for path, text in content.items():
        write(folder / path, text)
    with refused(pattern):
        task = data.find_task(name, folder / file)
        rows = data.read(task, folder / file, split)
        data.encode(task, rows, image=data.image_settings(None, (3, 4, 4)))


@pytest.mark.parametrize("case", BAD, ids=[case[2] for case in BAD])
def test_bad_input_is_one_line(tmp_path, case):
    """Each malformed input raises UserError with one line that names the place and a remedy."""
    read_bad(tmp_path, *case)


# ----------------------------------------------------------------------------------------------------------- fetching

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


COLA_ZIP = {"CoLA/": "", "CoLA/train.tsv": COLA, "CoLA/dev.tsv": COLA, "CoLA/original/more.txt": "x"}
EVIL = ("../evil.txt", "CoLA/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil")


def test_fetch_archive(tmp_path, mirror):
    """Another checksum, then a connection that ends early, then all of it, once; no member gets out of the folder."""
    mirror.files[place(TASKS["cola"].sources[0][1])] = make_zip(COLA_ZIP)
    with refused("CoLA.zip .it is damaged: its SHA-256 is [0-9a-f]{64}, not [0-9a-f]{64}.: run this again"):
        data.read(TASKS["cola"])
    packed = make_zip(COLA_ZIP | {"CoLA/test.tsv": os.urandom(9000)} | dict.fromkeys(EVIL, "x"))
    task, folder = serve(mirror, TASKS["cola"], [packed]), tmp_path / "cache" / "CoLA"
    mirror.cut.update(mirror.files)
    with refused("the connection ended at .* run this again"):
        data.read(task)
    assert not list(folder.iterdir())
    mirror.cut.clear()
    assert len(data.read(task)) == 2 and len(data.read(task, None, "dev")) == 2
    assert len(mirror.asked) == 3 and not Path("/tmp/evil.txt").exists()
    assert {path.name for path in folder.iterdir()} == {"dev.tsv", "original", "test.tsv", "train.tsv"}
    assert all(folder in path.parents for path in tmp_path.rglob("*") if path.is_file())


def test_every_published_archive_has_a_checksum():
    sources = [source for name in LAYOUTS for source in TASKS[name].sources]
    assert all(address.startswith("https://") and len(sha256) == 64 for _, address, sha256 in sources)
    if not (SHARED / "README.md").is_file():
        pytest.skip("no ../shared: checksums not compared with its list")
    listed = (SHARED / "README.md").read_text()
    assert all(f"`{address.removeprefix(data.FACEBOOK)}` | {sha256}" in listed.replace("(MRPC) ", "").replace(
        "(which of its rows are dev) ", "") for _, address, sha256 in sources)


def test_no_network_is_one_line(tmp_path):
    with refused("--task text-classification needs --data"):
        data.read(TASKS["text-classification"])
    for name, verb in (("sst2", "unpack"), ("commonsense", "put")):
        with refused(f"cannot fetch https://.*: run this again, or download it elsewhere and {verb} it into "
                     f"{tmp_path}/cache/.*, or name a folder with its files by --data"):
            data.read(TASKS[name])
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
