"""data.py: file layouts, errors, encoding and images against transformers, batches, fetching on loopback."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
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
    """No cache of the user, no network; what an earlier test noted is noted again."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANKS_MIRROR", "http://127.0.0.1:9")
    data.note.cache_clear()


LAYOUTS = {"cola": ("CoLA", 'gj04\t1\t\tHe said "go.\ngj04\t0\t*\tHim \u2028 went\x85\r\x1c off.\r\n',
             [('He said "go.', 1), ("Him \u2028 went\x85\r\x1c off.", 0)]),
    "mrpc": ("MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA "b\tC\r\n0\t9\t10\tD\tE',
             [('A "b', "C", 1), ("D", "E", 0)]),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t1\n4\t5\tshort\n"
            "7\t8\t9\tC?\t\t0\n", [("A?", "B?", 1), ("C?", "", 0)]),
    "mnli": ("MNLI", "pairID\tsentence1\tsentence2\tgold_label\n1n\tA\tB\tneutral\n2c\tC\tD\tcontradiction\n"
             "3e\tE\tF\t-\n4e\tG\tH\tentailment\n", [("A", "B", 1), ("C", "D", 2), ("G", "H", 0)]),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel\n0\tQ?\tS.\tnot_entailment\n1\tR?\tT.\tentailment\n",
             [("Q?", "S.", 1), ("R?", "T.", 0)]),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tC\tD\tnot_entailment\n",
            [("A", "B", 0), ("C", "D", 1)])}
LEFT_OUT = {"qqp": "skipped 1 short row", "mnli": "left out 1 row without a gold label"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_glue_layouts(tmp_path, caplog, name):
    """Byte-order mark, quotes, CR LF, Unicode separators, no final newline, gzipped."""
    folder, text, expected = LAYOUTS[name]
    write(tmp_path / folder / "train.tsv.gz", gzip.compress(text.encode()))
    write(tmp_path / folder / ("dev_matched.tsv" if name == "mnli" else "dev.tsv"), text)
    for where in (tmp_path, tmp_path / folder):
        for split in ("train", "dev"):
            rows = data.read(replace(TASKS[name], name="mine"), where, split)
            assert [tuple(row.values()) for row in rows] == expected
    if name == "mnli":
        write(tmp_path / folder / "dev_mismatched.tsv", text.replace("entailment", "neutral"))
        assert [row["label"] for row in data.read(TASKS[name], where, "dev_mismatched")] == [1, 2, 1]
    assert LEFT_OUT.get(name, "") in caplog.text and "not read" not in caplog.text
    assert f"{len(rows)} train rows: 1 '" in caplog.text


REAL = {("cola", "glue"): (8551, 1043), ("sst2", "glue"): (67349, 872), ("stsb", "glue"): (5749, 1500),
        ("boolq", "commonsense"): (9427, 3270), ("arc-c", "commonsense"): (1119, 1172),
        ("piqa", "commonsense"): (0, 1838), ("siqa", "commonsense"): (0, 1954),
        ("winogrande", "commonsense"): (0, 1267), ("gsm8k", "."): (7473, 1319)}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the real data")
@pytest.mark.parametrize("name, folder", REAL)
def test_real_files(name, folder, caplog):
    for split, count in zip(("train", "dev"), REAL[name, folder]):
        rows = data.read(TASKS[name], SHARED / folder, split) if count else []
        assert len(rows) == count and "not read" not in caplog.text
        scored = [row for row in rows if "target" in row]
        assert all(data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in scored)


def table(form, rows):
    """Text of a file of rows; quoted.tsv: as pandas writes cells with quotes in them."""
    if form.startswith("json"):
        return jsonl(rows) + "\n\n" if form == "jsonl" else json.dumps(rows)
    lines = [list(rows[0]), *(row.values() for row in rows)]
    if form != "tsv":
        lines = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    mark, end = (",", "\r\n") if form == "csv" else ("\t", "\n")
    return end.join(mark.join(line) for line in lines) + "\n\n"


@pytest.mark.parametrize("form", ["tsv", "quoted.tsv", "csv", "jsonl", "json"])
@pytest.mark.parametrize("columns", [["review"], ["sentence1", "sentence2"], ["question", "sentence"]])
def test_own_classification(tmp_path, caplog, form, columns):
    texts = ["plain", 'with "quote"', "comma, and \u2028 separator", "one" if form == "tsv" else "two\n\tlines"]
    rows = [{columns[-1]: text[::-1], columns[0]: text, "label": label, "split": "more", "uid": "x", "n": "5"}
            for text, label in zip(texts, ["pos", "neg", "neutral", "neg"])]
    ending = form.removeprefix("quoted.")
    paths = [write(tmp_path / f"train.{ending}", table(form, rows)),
             write(tmp_path / f"valid.{ending}.gz", gzip.compress(table(form, rows).encode()))]
    task = data.find_task("text-classification", tmp_path)
    assert task.labels == ("neg", "neutral", "pos")
    for split in ("train", "dev"):
        read = data.read(task, tmp_path, split)
        assert [row["text"] for row in read] == texts and [row["label"] for row in read] == [2, 0, 1, 0]
        assert len(columns) == 1 or [row["pair"] for row in read] == [text[::-1] for text in texts]
        assert f"{tmp_path}: 4 {split} rows: 2 'neg', 1 'neutral', 1 'pos'" in caplog.text
    named = {record.message for record in caplog.records if "not read" in record.message}
    assert named == {f"{path}: not read: column 'split'" for path in paths}


LONG = "word " * 100_000
PARSED = {"sentence1": "a b", "sentence2": "c d", "sentence1_parse": "(ROOT a b)", "annotator_labels": ["neutral"]}
MSR = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n" + "".join(
    f'{i % 2}\t{i}\t{i + 100}\tleft {i}\tright "{i}\r\n' for i in range(6))
# (files, training texts, their labels, what is noted): what spreadsheets, pandas, SNLI and people write
READ = {"mrpc": ({"msr_paraphrase_train.txt": MSR, "mrpc_dev_ids.tsv": "1\t101\n4\t104\n2\t999\n"},
             ["left 0", "left 2", "left 3", "left 5"], [0, 0, 1, 1], "4 train rows"),
    "numbers sort as numbers, 1.0 is 1, spaces around a label do not count": (
        {"train.jsonl": jsonl([{"text": "t", "label": n} for n in (10, "9", 1.0, "10.0", " 1 ")])},
        ["t"] * 4, [1, 0, 2, 0], "1 of 5 rows are dev (evenly spread)"), "SNLI marks pairs without a majority": (
        dict.fromkeys(("train.jsonl", "dev.jsonl"), jsonl({**PARSED, "gold_label": label} for label in "x--y")),
        ["a b"] * 2, [0, 1], "left out 2 rows without a gold label"),
    "long cells, blank lines": ({"train.csv": f'text,label\n"{LONG}",a\n\nb,b\n\n\n', "dev.csv": "text,label\na,a\n"},
                                [LONG, "b"], [0, 1], "2 train rows"), "quotes that are no CSV are text": (
        {"train.tsv": 'text\tlabel\n"so" he said\ta\n"bad\tb\n"" \ta\n', "dev.tsv": "text\tlabel\na\ta\n"},
        ['"so" he said', '"bad', '"" '], [0, 1, 0], "3 train rows"),
    "quotes in two rows": (dict.fromkeys(("train.tsv", "dev.tsv"), 'text\tlabel\n"Stop\t0\nGo\t1\nOn"\t0\n'),
                           ['"Stop', "Go", 'On"'], [0, 1, 0], "3 train rows"), "a second text, a second label": (
        {"train.jsonl": jsonl({"text": "t", "tweet": "5", "label": n, "score": n} for n in (1, 2, 3))},
        ["t"] * 2, [1, 2], "train.jsonl: not read: columns 'tweet', 'score'"),
    "a column without a name": (dict.fromkeys(("train.csv", "dev.csv"), ",text,label,\nc,a,1,\nd,b,0,\n"),
                                ["a", "b"], [1, 0], "not read: column 'column 1'"),
    "lines that end as old Macs end them": (dict.fromkeys(("train.tsv", "dev.tsv"), "text\tlabel\rc\tx\rd\ty\r"),
                                            ["c", "d"], [0, 1], "2 train rows"),
    "files that are not read": (dict.fromkeys(("train.tsv", "dev.tsv"), "text\tlabel\nc\tx\nd\ty\n") | dict.fromkeys(
        ("train.csv", "train.tsv.gz", "test.csv", "README.txt"), "x"), ["c", "d"], [0, 1],
        ": rows are read from dev.tsv, train.tsv, not 'test.csv, train.csv, train.tsv.gz'")}


@pytest.mark.parametrize("name", READ)
def test_files_of_all_sorts(tmp_path, caplog, name):
    contents, texts, labels, noted = READ[name]
    for file, text in contents.items():
        write(tmp_path / file, text)
    task = data.find_task(name if name in TASKS else "text-classification", tmp_path)
    rows = data.read(task, tmp_path)
    assert [row["text"] for row in rows] == texts and [row["label"] for row in rows] == labels
    assert noted in caplog.text and ("not read" in caplog.text) == ("not read" in noted)
    if name == "mrpc":
        assert [row["text"] for row in data.read(task, tmp_path, "dev")] == ["left 1", "left 4"]


def numbered(count, classes):
    """A .csv of this many rows, sorted by their classes."""
    return "text,label\n" + "".join(f"{i},{i * classes // count}\n" for i in range(count))


@pytest.mark.parametrize("rows", [3, 10, 11, 29, 81, 100, 12_345])
def test_held_out_rows_of_a_sorted_file(tmp_path, rows):
    """Every row is in one split, a tenth are dev, some of every third of a sorted file, not all of even number."""
    path = write(tmp_path / "all.csv", numbered(rows, 3))
    task = data.find_task("text-classification", path)
    train, dev = data.read(task, path), data.read(task, path, "dev")
    assert sorted(int(row["text"]) for row in train + dev) == list(range(rows))
    assert len(dev) == min(-(-rows // 10), 1000)
    assert rows < 25 or {row["label"] for row in dev} == {0, 1, 2} and {int(row["text"]) % 2 for row in dev} == {0, 1}


def test_limits_look_at_the_rows_that_are_used(tmp_path):
    for file in ("train.csv", "dev.csv"):
        write(tmp_path / file, numbered(60, 2) + "bad row\n")
    task = data.find_task("text-classification", None, ["0", "1"])
    assert len(data.read(task, tmp_path, limit=40)) == 40
    assert len(data.read(task, tmp_path, "dev", limit=20)) == 20
    with refused("all labels are '0' in the 20 rows: raise the limit or shuffle the rows"):
        data.read(task, tmp_path, limit=20)


@pytest.mark.parametrize("label", ["-1", -1, "-1.0", " ", "NaN", float("nan"), None])
def test_a_missing_label_is_no_class(tmp_path, label):
    rows = [{"text": "t", "label": other} for other in ("0", "1", label)]
    read_bad(tmp_path, "text-classification", {"train.jsonl": jsonl(rows)}, "train.jsonl line 3: .*label")


def test_context_and_system_prompt_are_read_and_the_rest_is_named(tmp_path, caplog):
    rows = [{"instruction": "Q", "context": "C", "response": "R", "category": "qa", "hint": "think of it"},
            {"question": "Q", "response": "R", "system_prompt": "Be kind.", "id": "flan.1"},
            {"instruction": "Q", "output": "R", "history": [["q1", "a1"], ["q2", "a2"]]},
            {"prompt": "Q", "completion": "R", "turns": [{"text": "more"}], "scores": [1, 2], "n": "17"},
            {"prompt": "Q", "chosen": [{"role": role, "content": role[0]} for role in ("Q", "A", "R")]},
            {"prompt": "Q", "chosen": [{"role": role, "content": role} for role in ("assistant", "user")]}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows * 5))
    read, task = data.read(TASKS["instructions"], path), "Below is an instruction that describes a task"
    ask = " Write a response that appropriately completes the request.\n\n### Instruction:\nQ\n\n"
    plain = f"{task}.{ask}### Response:\n"
    whole = f"{task}, paired with an input that provides further context.{ask}### Input:\nC\n\n### Response:\n"
    assert [row["prompt"] for row in read[:5]] == [whole, "Be kind.\n\n" + plain, plain, plain, plain]
    assert {row["answer"] for row in read} == {"R"}
    notes = [record.message for record in caplog.records]
    assert notes[:3] == [f"{path}: not read: column '{name}'" for name in ("hint", "history", "turns")]
    assert len(notes) == 6 and "two messages" in notes[3] and "skipped 5" in notes[4] and "rows are dev" in notes[5]


def test_commonsense_is_one_training_set_and_many_tests(tmp_path, caplog):
    for name in ("boolq", "siqa"):
        rows = [{"instruction": "Q, answer1/answer2/answer3", "input": "", "answer": answer,
                 "output": f"the correct answer is {answer}"} for answer in TASKS[name].answers]
        for file in ("train.json", "test.json"):
            write(tmp_path / TASKS[name].folder / file, json.dumps(rows, indent=1))
    derived = write(tmp_path / "mine.py", "import data\nMINE = data.replace(data.TASKS['commonsense'], name='x')")
    task = data.find_task("commonsense", tmp_path)
    assert task.eval_splits == data.find_task(f"{derived}:MINE", tmp_path).eval_splits == ("boolq", "siqa")
    assert "evaluating on boolq, siqa alone" in caplog.text
    read = data.read(task, tmp_path, "siqa")
    listed, known = ["answer1", "answer2", "answer3"], [f"answer{i}" for i in (1, 2, 3, 4, 5)]
    assert [row["target"] for row in read] == known
    assert data.allowed(read[1]) == (listed, [f"the correct answer is {answer}" for answer in listed])
    for row in (read[4], read[1] | {"prompt": "answer2 is in it by chance"}):
        assert data.allowed(row)[0] == known
    assert len(data.read(task, tmp_path, "boolq")) == 2 and len(data.read(task, tmp_path, "train")) == 7
    assert "training on train.json of boolq, siqa" in caplog.text and "not read" not in caplog.text
    write(tmp_path / "commonsense_170k.json", rows)
    assert len(data.read(task, tmp_path, "train")) == 5


@pytest.mark.parametrize("text, number", [
    ("so $1,234,567.", "1234567"), ("it is $80,000.50.", "80000.5"), ("16 - 3 = 13 left", "13"), ("minus: -$5", "-5"),
    ("10-4", "4"), ("0.0", "0"), ("about .5", ".5"), ("100", "100"), ("1,000 and 12,34", "34"), ("none", "")])
def test_answers_are_the_last_number_or_the_first_word(text, number):
    assert data.extract_answer(text, data.last_number) == number
    assert data.last_number(f"3 #### {text}", True) == number * (text[:4] not in ("16 -", "10-4", "1,00"))  # two
    for text, word in (("false, not true", "false"), ("True", ""), ("axb a.b", "a.b"), ("a.bc", "a.bc")):
        assert data.extract_answer(text, ("true", "false", "a+b", "a.b", "a.bc")) == word


def some_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, *pictures):
    """The Split of pictures (C, H, W) for a model with these image_settings."""
    return data.encode(TASKS["digits"], [{"pixels": pixels, "label": 0} for pixels in pictures], image=image)


def test_npz_layouts(tmp_path, caplog):
    images, labels = some_images((20, 6, 5, 3)), np.arange(20) % 4 + 7
    np.savez(tmp_path / "a.npz", x_train=images[:12], y_train=labels[:12, None], x_test=images[12:], y_test=labels[12:])
    np.savez(tmp_path / "b.npz", images=images / 255, labels=labels, split=np.arange(20) >= 12)
    np.savez(tmp_path / "c.npz", images=images.transpose(0, 3, 1, 2), labels=labels, x_val=labels)
    expected = [(label - 7, image.transpose(2, 0, 1).tolist()) for label, image in zip(labels, images)]
    for name, held_out in (("a", range(12, 20)), ("b", range(12, 20)), ("c", (0, 17))):
        path = tmp_path / f"{name}.npz"
        task = data.find_task("npz", path)
        assert task.labels == ("7", "8", "9", "10")
        for split in ("train", "dev"):
            found = [(row["label"], row["pixels"].tolist()) for row in data.read(task, path, split)]
            assert found == [row for i, row in enumerate(expected) if (i in held_out) == (split == "dev")]
    assert f"{path}: not read: array 'x_val'" in caplog.text and "another file" not in caplog.text
    train = (tmp_path / "b.npz").rename(tmp_path / "train.npz")
    path.rename(tmp_path / "dev.npz")
    assert len(data.read(task, tmp_path)) == 12 and f"{train}: only its train rows are read" in caplog.text


def test_digits_are_embedded_and_turn():
    """The asset is scikit-learn's digits, times 15, with a fixed stratified split."""
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    train, dev = (data.read(TASKS["digits"], None, split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (1352, 445)
    found = sorted((row["label"], row["pixels"].tobytes()) for row in train + dev)
    images = (theirs.images * 15).astype(np.uint8)
    assert found == sorted((label, image.tobytes()) for label, image in zip(theirs.target, images))
    shares = np.bincount([row["label"] for row in dev]) / np.bincount(theirs.target)
    assert 0.24 < shares.min() and shares.max() < 0.26
    for a, b in zip(dev, data.read(replace(TASKS["digits-rot90"], name="mine"), None, "dev")):
        assert a["label"] == b["label"] and np.array_equal(np.rot90(a["pixels"][0]), b["pixels"][0])


def jpg(i):
    """Bytes of a small image of size 8 x (6 + i)."""
    buffer = io.BytesIO()
    Image.fromarray(some_images((8, 6 + i, 3), i)).save(buffer, "JPEG")
    return buffer.getvalue()


def settings(folder, **processor):
    """image_settings of a model of 3 x 24 x 24 pixels with this preprocessor_config.json, a fast one as in 5.x."""
    whole, nested = ("processor_config.json", {"image_processor": processor}), "Fast" in str(processor)
    write(folder / (whole[0] if nested else "preprocessor_config.json"), whole[1] if nested else processor)
    return data.image_settings(folder, (3, 24, 24))


def test_photos_of_every_mode_and_size(tmp_path, caplog):
    """Upright, grey as three channels, resized to the model's size; what is hidden, or beside the classes, is left."""
    for file in ("a/.DS_Store", "a/Thumbs.db", "b/deep/er/1.jpg", ".ipynb_checkpoints/1.jpg", "2.jpg"):
        write(tmp_path / "train" / file, jpg(0) if file.endswith(".jpg") else "junk")
    folder, ramp = tmp_path / "train" / "a", np.linspace(40, 215, 48 * 36).reshape(48, 36)
    grey = ramp.astype(np.uint8)
    colour = Image.fromarray(np.stack([grey, grey[::-1], 255 - grey], -1))
    turned = colour.getexif()
    turned[0x0112] = 6      # the camera was held upright
    colour.save(folder / "turned.png", exif=turned)
    made = {"RGB.png": colour, "P.png": colour.quantize(64), "RGBA.png": colour.copy(), "L.png": Image.fromarray(grey),
            "CMYK.jpg": colour.convert("CMYK"), "1.png": Image.fromarray(grey > 128)}
    made["RGBA.png"].putalpha(made["L.png"])
    expected = {file: np.asarray(picture.convert("RGB")) for file, picture in made.items()}
    made["I16.png"] = Image.fromarray((ramp * 257).astype(np.uint16))
    made["F.tiff"] = Image.fromarray((ramp / 255).astype(np.float32))
    for file, picture in made.items():
        picture.save(folder / file)
    made["P.png"].save(folder / "two.gif", save_all=True, append_images=[made["P.png"].rotate(180)])
    expected["two.gif"] = expected["P.png"]
    np.save(folder / "i8.npy", grey.astype(np.int64))
    np.save(folder / "rgba.npy", np.stack([grey] * 3 + [255 - grey], -1))
    expected |= dict.fromkeys("I16.png F.tiff i8.npy u16.npy rgba.npy".split(), np.array(made["L.png"].convert("RGB")))
    expected["turned.png"] = np.rot90(np.asarray(colour), -1)
    np.save(folder / "u16.npy", (grey.astype(np.uint16) * 257).astype(">u2"))
    folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    task = data.find_task("image-folder", tmp_path)
    *rows, last = data.read(task, tmp_path)
    assert task.labels == ("a", "b") and last["label"] == 1 and "not read: *.jpg in no class's folder" in caplog.text
    for name, place, message in (("lost.png", "/nowhere", "not an image"), ("loop", folder, "a link to a folder")):
        (folder / name).symlink_to(place)
        with refused(f"{name}: {message}"):
            encoded(settings(tmp_path), *(row["pixels"] for row in data.read(task, tmp_path)))
        (folder / name).unlink()
    assert {row["pixels"].name for row in rows if row["label"] == 0} == expected.keys()
    for row in rows:
        file, pixels = row["pixels"].name, data.read_image(row["pixels"]).transpose(1, 2, 0)
        assert pixels.shape[:2] == expected[file].shape[:2]
        assert np.abs(pixels - expected[file].astype(int)).max() <= (12 if file == "CMYK.jpg" else 1)
        for channels, mode in ((3, "RGB"), (1, "L")):
            split = data.encode(task, [row], image=data.image_settings(None, (channels, 20, 20)))
            assert split.pixels.shape == (1, channels, 20, 20)
            if file == "RGB.png":
                resized = colour.convert(mode).resize((20, 20), Image.Resampling.BILINEAR)
                assert np.array_equal(split.pixels[0].permute(1, 2, 0).squeeze(), resized)


CROP = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
SQUARE = {"size": {"height": 24, "width": 24}}
PROCESSORS = {"ViTImageProcessor": {**SQUARE, "resample": 0, "do_normalize": False},
    "ViTImageProcessorFast": {**SQUARE, "do_rescale": False, "resample": 3},
    "ViTFeatureExtractor": {"size": 24, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.9] * 3},
    "DeiTImageProcessor": {"size": {"height": 27, "width": 29}, **CROP},
    "CLIPImageProcessor": {"size": {"shortest_edge": 24}, **CROP},
    "CLIPFeatureExtractor": {"size": 26, "crop_size": 24, "do_convert_rgb": True, "default_to_square": True},
    "CLIPImageProcessorFast": {**SQUARE, **CROP}}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_transformers_does(tmp_path, name):
    """Up to one level of 255, in pictures of many shapes, of noise and of hard edges."""
    key = "feature_extractor_type" if "Feature" in name else "image_processor_type"
    image = settings(tmp_path, **{key: name}, **PROCESSORS[name])
    pictures = [some_images(shape + (3,)) for shape in ((24, 24), (48, 64), (65, 31), (24, 9), (11, 90))]
    boards = [np.kron(np.eye(n, dtype=np.uint8), np.full((5, 7), 255, np.uint8)) for n in (3, 9)]
    pictures += [np.repeat(board[..., None], 3, -1) for board in boards]
    split = encoded(image, *(picture.transpose(2, 0, 1) for picture in pictures))
    ours = data.collate(split, list(range(len(pictures))))[0]["pixels"]
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    level = image["scale"] / torch.tensor(image["std"]).min()
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1.01 * level
    assert (ours - theirs).abs().mean() < 0.1 * level


@pytest.mark.parametrize("named, changes", [
    ("resample", {"resample": 1}), ("size .'lon.*", {"size": {"longest_edge": 24}}), ("do_pad", {"do_pad": True}),
    ("crop_size", {**CROP, "crop_size": 20}), ("size", {"size": {"height": 3, "width": 24}}),
    ("image_processor_type", {"image_processor_type": "Siglip"}), ("image_mean", {"image_mean": [1, 2]}),
    ("image_std", {"image_std": [0, 1, 1]}), ("rescale_factor", {"rescale_factor": "1/255"})])
def test_what_is_not_done_to_images_is_named(tmp_path, named, changes):
    with refused(f"preprocessor_config.json: {named} .*: mend it"):
        settings(tmp_path, **SQUARE | changes)


def test_an_image_that_is_not_resized_must_fit_and_does_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    whole = settings(tmp_path, do_resize=False)
    with refused("digits image 1: 24 x 25 pixels, the model takes"):
        encoded(whole, some_images((3, 24, 24)), some_images((3, 24, 25)))
    with refused("digits image 0: 23 x 24 pixels, .* does not enlarge it"):
        encoded(settings(tmp_path, do_resize=False, **CROP), some_images((3, 23, 40)))
    with refused("digits image 0: reading or resizing images needs Pillow: pip install pillow"):
        encoded(settings(tmp_path, **SQUARE), some_images((3, 23, 40)))
    junk = {"train/a/1.png": "junk", "train/b/1.png": "junk"}
    read_bad(tmp_path, "image-folder", junk, "1.png: reading or resizing images needs Pillow")


TEXTS = ["The quick brown fox jumps over the lazy dog.", "the dog", "", "naïve café — 42 %", "fox " * 40,
         "unseen žluťoučký", "中文 The\tFOX\n [SEP] </s> fox", " Fox  dog"]


def make_tokenizer(folder, kind="Roberta", model_type=None, texts=TEXTS[:4], file=None, **settings):
    """Train and save a tokenizer of transformers' class; settings, file: more for tokenizer_config, tokenizer.json."""
    untrained, texts = getattr(transformers, f"{kind}Tokenizer")(), [*texts * 5, "the correct answer is true", "\n"]
    trained = untrained.train_new_from_iterator(texts, 400, show_progress=False)
    trained.backend_tokenizer.enable_truncation(5)  # settings left in the file must not matter
    trained.backend_tokenizer.enable_padding(length=50)
    trained.save_pretrained(folder)
    write(folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text()) | (file or {}))
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
    plain = ours.encode(TEXTS, special=False)[0]
    assert [list(row) for row in plain] == fast(TEXTS, add_special_tokens=False)["input_ids"]
    for text in TEXTS[:2]:
        assert ours.decode(ours.encode([text])[0][0]) == fast.decode(fast(text)["input_ids"], skip_special_tokens=True)
    return ours


FAST, LOWER = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"file": {"normalizer": {"type": "Lowercase"}}}
# name: (transformers' class, what tokenizer_config.json says against tokenizer.json, family); oracle: AutoTokenizer
OVERRIDES = {"as it is": ("Roberta", FAST), "bert": ("Bert", {}), "split": ("Bert", {"split_special_tokens": True}),
    "no class": ("Bert", {"tokenizer_class": None, "do_lower_case": False}),
    "accents, chinese": ("Bert", {"strip_accents": False, "tokenize_chinese_chars": False}),
    "left": ("Bert", {"truncation_side": "left"}), "special tokens": ("Bert", {"cls_token": "[UNK]"}),
    "not for this class": ("Bert", FAST | {"do_lower_case": False}), "added": ("Bert", {"added_tokens_decoder": {
        "900": {"content": "quick", "normalized": False}, "5": {"content": "fox", "special": True}}}),
    "electra": ("Bert", {"tokenizer_class": "ElectraTokenizer", "do_lower_case": False}),
    "untyped": ("Bert", {"model_input_names": ["input_ids"]}), "bert unk": ("Bert", {"unk_token": "fox"}),
    "untyped class": ("Bert", {"tokenizer_class": "DistilBertTokenizer"}),
    "extra": ("Roberta", FAST | {"pad_token": "<|pad|>", "mask_token": "dog", "additional_special_tokens": [
        {"content": "fox", "lstrip": True, "special": True, "__type": "AddedToken"}]}),
    "named extra": ("Bert", {"extra_special_tokens": {"animal_token": "fox"}}),
    "roberta": ("Roberta", {}, "roberta"), "roberta space": ("Roberta", {"add_prefix_space": True}, "roberta"),
    "gpt2": ("GPT2", {"add_prefix_space": True}, "gpt2"), "eos": ("Roberta", FAST | {"add_eos_token": True}),
    "llama": ("Llama", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True}),
    "llama no space": ("Llama", {"add_prefix_space": False}), "llama legacy": ("Llama", {"legacy": True}),
    "llama byte level": ("Roberta", {"tokenizer_class": "LlamaTokenizer"}), "bart": ("GPT2", {
        "tokenizer_class": "BartTokenizer", **LOWER}), "qwen2, whatever is named": ("GPT2", FAST | LOWER, "qwen2"),
    "deberta": ("DebertaV2", {}), "deberta changed, no class": ("DebertaV2", {
        "tokenizer_class": None, "do_lower_case": True, "split_by_punct": True}), "gemma": ("Gemma", LOWER),
    "xlm": ("XLMRoberta", {}), "xlm no space or class": ("XLMRoberta", {
        "tokenizer_class": None, "add_prefix_space": False})}


@pytest.mark.parametrize("name", OVERRIDES)
def test_encoding_equals_transformers(tmp_path, name):
    kind, settings, *model_type = OVERRIDES[name]
    ours = compare_with_transformers(make_tokenizer(tmp_path, kind, *model_type, **settings))
    assert ours.types == (kind in ("Bert", "DebertaV2") and "untyped" not in name)
    if name == "as it is":
        assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (0, 3, [1, 3, 7], [2])
    assert kind not in ("DebertaV2", "XLMRoberta") or ours.pad_id == (kind == "XLMRoberta")


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_encoding_equals_transformers_on_checkpoints(name):
    folder = Path(os.environ.get("CHECKPOINTS", "none")) / name
    if not folder.is_dir():
        pytest.skip(f"set CHECKPOINTS to the folder that holds {name}/")
    compare_with_transformers(folder)


@pytest.mark.parametrize("kind, model_type", [("Bert", "bert"), ("Roberta", "roberta"), ("GPT2", "gpt2"),
                                              ("GPT2", "qwen2")])
def test_vocabularies_without_tokenizer_json(tmp_path, kind, model_type):
    """For families that need tokenizer.json the message has the command that makes it."""
    file = make_tokenizer(tmp_path, kind, model_type, tokenizer_class=None) / "tokenizer.json"
    tokenizers.Tokenizer.from_file(str(file)).model.save(str(tmp_path))
    file.unlink()
    if model_type == "qwen2":
        with refused("fetch the model's tokenizer files, or make it: pip install") as caught:
            data.Tokenizer.from_folder(tmp_path)
        command = str(caught.value).partition(", then python ")[2]
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True, capture_output=True)
    compare_with_transformers(tmp_path)


def processor(folder, task="rte", vocab_size=200, types=2):
    """What prepares a task's rows for a model with so many embeddings."""
    return data.Processor(TASKS[task], folder, SimpleNamespace(vocab_size=vocab_size, type_vocab_size=types))


def test_settings_of_a_tokenizer_that_are_not_followed_are_named(tmp_path, caplog):
    folder = make_tokenizer(tmp_path, "Llama", tokenizer_class="BertTokenizer", add_eos_token=True, model_max_length=8,
                            added_tokens_decoder={"77": {"content": "<new>"}})
    size = data.Tokenizer.from_folder(folder).backend.get_vocab_size()
    processor(folder, "sst2", size).encoded([{"text": "the dog", "label": 0}], 32)
    make_tokenizer(tmp_path, "Bert")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "X", "unk_token": "[UNK]", "normalise_numbers": True})
    write(folder / "config.json", {"model_type": "bert", "eos_token_id": 3})
    write(folder / "generation_config.json", {"eos_token_id": [3, 5]})
    ours = data.Tokenizer.from_folder(folder)
    assert (ours.pad_id, ours.eos_id, ours.eos_ids, ours.prefix) == (3, 3, [3, 5], [2])
    write(folder / "config.json", "{}")
    (folder / "generation_config.json").unlink()
    assert data.Tokenizer.from_folder(folder).pad_id == 1
    for named in ("add_eos_token is True", "<new>' has id 77", "BertTokenizer does not fit", "length, 8", "class 'X'",
                  "tokenizer_config.json: not used: 'normalise_numbers'"):
        assert named in caplog.text


def test_tokens_are_checked_against_the_model(tmp_path, caplog):
    size = data.Tokenizer.from_folder(make_tokenizer(tmp_path, "Bert")).backend.get_vocab_size()
    rows = [{"text": "the dog", "pair": "fox", "label": 0}]
    ready = processor(tmp_path, vocab_size=size)
    assert len(ready.encoded(rows, 32)) == len(ready.encoded(rows, 4)) == 1
    with refused("row .*'text': 'fox'.*: only some rows are pairs"):    # as another split's may be
        ready.encoded([{"text": "fox", "label": 0}], 32)
    for model, length, message in (
            ({"vocab_size": 20}, 32, "row 'the dog': token .* has id .*: fetch the model's own tokenizer"),
            ({"vocab_size": 999}, 32, f"the tokenizer has {size} tokens, the model 999"),
            ({"types": 1}, 32, "a pair's texts have 2 types, the model only 1"),
            ({}, 2, "max length 2 leaves no room for text")):
        with refused(message):
            processor(tmp_path, **model).encoded(rows, length)
    with refused("the tokenizer has no eos token"):
        processor(tmp_path, "boolq").encoded([{"prompt": "a", "answer": "b"}], 32)
    make_tokenizer(tmp_path, **FAST, pad_token="<|pad|>")
    size = data.Tokenizer.from_folder(tmp_path).pad_id
    assert processor(tmp_path, "sst2", size).tokenizer.pad_id == 3
    assert f"pad token '<|pad|>' has id {size}, the model only {size}" in caplog.text and "1 of 1 rows" in caplog.text
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tokenizer.json", content | {"post_processor": None})
    with refused("sst2, row '': no token: remove the row"):
        processor(tmp_path, "sst2", size).encoded([{"text": "a", "label": 0}, {"text": "", "label": 1}], 32)


@pytest.mark.parametrize("kind, settings", [("Llama", {}), ("GPT2", {}), ("Roberta", FAST | {"add_bos_token": True}),
                                            ("Roberta", FAST | {"add_eos_token": True})])
def test_prompt_and_answer_are_encoded_as_one_text(tmp_path, caplog, kind, settings):
    """Apart where a merge crosses; decoded, an answer keeps the space it begins with: an indent of Python."""
    folder = make_tokenizer(tmp_path, kind, **settings)
    ours, fast = data.Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": data.prompt("fox"), "answer": answer} for answer in ("the dog", "true", "  fox", "  \n", "é")]
    split = data.encode(TASKS["instructions"], rows, ours)
    for row, ids, start in zip(rows, split.tokens, split.starts):
        theirs = fast(row["prompt"] + row["answer"])["input_ids"]
        assert ids.tolist() == (theirs if theirs[-1] == ours.eos_id else [*theirs, ours.eos_id])
        prompt = fast(row["prompt"], add_special_tokens=False)["input_ids"]
        assert ids[:start].tolist() == [*ours.prefix, *prompt]
        assert "\n" in row["answer"] or ours.decode(ids[start:], ids[:start]) == row["answer"]
    assert "apart" not in caplog.text
    rows[1] = {"prompt": "the qui", "answer": "ck fox"}
    split = data.encode(TASKS["instructions"], rows, ours)
    apart = [fast(text, add_special_tokens=False)["input_ids"] for text in ("the qui", "ck fox")]
    assert split.tokens[1].tolist() == [*ours.prefix, *apart[0], *apart[1], ours.eos_id]
    assert "1 of 5 answers were encoded apart from their prompts" in caplog.text


def test_instruction_batches(tmp_path, caplog):
    tokenizer, random = data.Tokenizer.from_folder(make_tokenizer(tmp_path)), np.random.default_rng(0)
    rows = [{"prompt": data.prompt(" ".join(random.choice(["fox", "dog", "the"], random.integers(1, 12)))),
             "answer": f"the correct answer is {random.integers(1, 10**6)}"} for _ in range(12)]
    split = data.encode(TASKS["boolq"], rows, tokenizer)
    for i, length in enumerate(split.lengths):
        width = data.collate(split, [i], pad_to=[100, 128, 150])[0]["tokens"].shape[1]
        assert width == min([bucket for bucket in (100, 128, 150) if bucket >= length], default=length)
    inputs, labels = data.collate(split, list(range(12)), pad_to=[512])
    answers = [ids[start:].tolist() for ids, start in zip(split.tokens, split.starts)]
    assert [tokenizer.decode(ids) for ids in answers] == [row["answer"] for row in rows]
    assert {ids[-1] for ids in answers} == {tokenizer.eos_id} and labels.tolist() == sum(answers, [])
    assert len(labels) == data.count_labels(split, list(range(12)))
    s = SimpleNamespace(batch_size=6, accumulate=1, steps=1, seed=0, forward_rows=0, max_length=192, device="cpu")
    batches, s.compile = data.Batches(s, split), "on"  # it is settled once the number of steps is known
    assert {given["tokens"].shape[1] for given, _, _ in batches.take()[0]} <= {*batches.widths}
    places = [range(512 * i + split.starts[i] - 1, 512 * i + split.lengths[i] - 1) for i in range(12)]
    assert inputs["positions"].tolist() == [place for part in places for place in part]
    for ids, tokens, mask in zip(split.tokens, inputs["tokens"], inputs["mask"]):
        assert tokens[mask].tolist() == tokens[:len(ids)].tolist() == ids.tolist()
    cut = sorted(split.starts)[6]
    short = data.encode(TASKS["boolq"], rows, tokenizer, max_length=cut)
    kept = [i for i in range(12) if split.starts[i] < cut]
    assert short.rows == [rows[i] for i in kept] and f"dropped {12 - len(kept)} of 12 rows" in caplog.text
    assert all(list(a) == list(split.tokens[i][:cut]) for a, i in zip(short.tokens, kept))
    with refused("no row has its answer within max length 9"):
        data.encode(TASKS["boolq"], rows, tokenizer, max_length=9)


@pytest.mark.parametrize("count, size", [(1, 1), (5, 8), (64, 8), (1000, 7), (3001, 32)])
def test_batches_properties(count, size):
    lengths = np.random.default_rng(0).integers(1, 200, count).tolist()
    for shuffle in (True, False):
        order = data.batches(lengths, size, 0, epoch=3, shuffle=shuffle)
        assert sorted(i for batch in order for i in batch) == list(range(count))
        assert {len(batch) for batch in order[:-1]} <= {size} and len(order) == -(-count // size)
        assert order == data.batches(lengths, size, 0, epoch=3, shuffle=shuffle)
    assert [lengths[i] for batch in order for i in batch] == sorted(lengths, reverse=True)
    if count > 100:
        order = data.batches(lengths, size, 0, epoch=3)
        assert order not in (data.batches(lengths, size, 0, epoch=4), data.batches(lengths, size, 1, epoch=3))
        longest = [max(lengths[i] for i in batch) for batch in order]
        assert sum(n * len(batch) for n, batch in zip(longest, order)) < 1.15 * sum(lengths)
        assert longest[:40] != sorted(longest[:40], reverse=True)  # grouped, yet in random order


# task, model's family and hidden size, changes of the method, what is chosen
PAPERS = [
    ("cola", "roberta", 768, {}, dict(lr=4e-4, batch_size=64, epochs=80, warmup=0.06, weight_decay=0.1)),  # lelora 5
    ("stsb", "roberta", 1024, {}, dict(lr=3e-4, batch_size=16, epochs=30, warmup=0.03)),  # lelora 6
    ("boolq", "llama", 4096, {}, dict(lr=3e-4, batch_size=64, epochs=3, warmup=100, dropout=0.05)),  # lelora 7
    ("cola", "llama", 4096, {}, dict(steps=1024, epochs=None, batch_size=32, alpha=32, weight_decay=1e-4)),  # 10
    ("gsm8k", "qwen3", 4096, {}, dict(steps=5000, warmup=500, batch_size=32, alpha=32, max_length=512)),  # and 11
    ("rte", "roberta", 768, dict(method="adalora", rank=4), dict(alpha=16 * 6, lr=1.2e-3, weight_decay=0.01)),
    ("boolq", "llama", 4096, dict(method="empirical"), dict(rank=16, alpha=32)),
    ("boolq", "llama", 4096, dict(method="empirical", rank=8), {}),  # LoRA's alpha, and so its scale
    ("boolq", "llama", 4096, dict(method="adalora", adalora_init_ratio=1.25), dict(alpha=16 * 40, lr=6e-4)),
    ("rte", "roberta", 768, dict(method="lalora", rank=64), dict(lalora_gamma=2.2)),
    *(("rte", "roberta", 768, dict(method=method), dict(warmup=0)) for method in ("weightlora+", "random"))]


@pytest.mark.parametrize("name, family, size, method, expected", PAPERS)
def test_hyperparameters_are_the_papers(name, family, size, method, expected):
    """What a method decides, as its authors say, has its reason."""
    found, reasons = data.hyperparameters(TASKS[name], family, size, **method)
    assert {key: found[key] for key in expected} == expected
    assert reasons.keys() == (expected.keys() if method else set())


OWN_TASK = """
from dataclasses import replace
from data import TASKS, Task, own, read_texts
LIKED = Task("liked", "classify", ("accuracy",), read_texts, files=own(".tsv"), columns=("said", None, "liked"))
COUNT = replace(TASKS["digits-rot90"], name="digits-count", metrics=("count",), base=(1e-3, 16, 3),
                settings={"alpha": 7}, evaluate=lambda model, task, split, batches: {"count": sum(map(len, batches))})
ROWS = [("row 1", {"text": "a", "label": 0}), ("row 2", {"text": "b", "label": 1})]
BARE = Task("bare", "classify", ("accuracy",), lambda task, data, split: ROWS)
"""


def test_a_task_in_a_file(tmp_path):
    file = write(tmp_path / "mine.py", OWN_TASK)
    write(tmp_path / "train.tsv", "liked\tsaid\nyes\tgood\nno\tbad\n")
    for name in (f"{file}:LIKED", f"{file}:liked"):     # the variable's name or the task's
        task = data.find_task(name, tmp_path)
        assert (task.name, task.labels) == ("liked", ("no", "yes"))
        assert data.read(task, tmp_path, "dev") == [{"text": "good", "label": 1}]
    bare = data.find_task(f"{file}:BARE")
    assert bare.labels == ("0", "1") and data.read(bare) == data.read(bare)
    with refused("row 3: no column 'text'"):
        data.read(replace(bare, reader=lambda *_: [("row 3", {"label": 0})]))
    for name, message in (("none.py:LIKED", "--task none.py:LIKED: there is no file none.py"),
                          (f"{file}:Task", "no data.Task Task: .*, or name one of .'LIKED', 'COUNT', 'BARE'"),
                          ("squad", "no task 'squad': choose from .*, papers/squad.py:squad")):
        with refused(message):
            data.find_task(name)


def test_a_task_in_a_file_from_training_to_a_table(tmp_path, monkeypatch, capsys):
    """Also after the file's folder is left; results are of its text."""
    import bench
    import eval as evaluation
    import train
    from extras.source import source_hash
    write(tmp_path / "mine.py", OWN_TASK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = "--steps 4 --limit-train 64 --limit-eval 40 --batch-size 8 --no-eval-before".split()
    with interrupted_after(2):
        train.main(["--task", "mine.py:COUNT", *flags, "--save-every", "1", "--out", "run"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "../run"])
    evaluation.main(["../run"])
    trained, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert again["task"] == trained["task"] == "digits-count" and again["count"] == trained["count"] == 40
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["settings"]["lr"], about["settings"]["alpha"]) == (1e-3, 7)
    monkeypatch.chdir(tmp_path)
    bench.main(["quality", "--tasks", "mine.py:COUNT,digits", "--methods", "lora", "--seeds", "1", *flags])
    compared = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert compared["metrics"] == {"mine.py:COUNT": "count", "digits": "accuracy", "average": ""}
    assert {"mine.py:COUNT", "digits"} < compared["rows"]["lora"].keys()
    assert about["source"] == source_hash("lora", "mine.py:COUNT")


def test_results_are_of_their_inputs_too(tmp_path, monkeypatch):
    """Another byte in an own file, in what it imports from beside it, or in a flag's file is another run."""
    from extras.source import source_hash
    monkeypatch.chdir(tmp_path)
    named, hashes = ["mine.py", "beside.py", "ranks/ranks.jsonl", "adapter/adapter_model.safetensors", "CoLA/train.tsv",
                     "model/model.safetensors"], set()
    for i, name in enumerate([*named, "ranks/picture.png", *named]):  # once to make it, once to change it
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("import beside" + "#" * i)
        hashes.add(source_hash.__wrapped__("mine.py:Policy", "cola", "ranks", "adapter", ".", "model"))
    assert len(hashes) == 12 and source_hash.__wrapped__("lora", "", data=".")  # "" = the default task


def npz(labels=(0, 1, 0), **more):
    buffer = io.BytesIO()
    np.savez(buffer, **{"images": some_images((3, 4, 4)), "labels": np.array(labels), **more})
    return {"train.npz": buffer.getvalue()}


COLA = "gj04\t1\t\tGood.\ngj04\t0\t*\tBad are.\n"
GOOD = {"instruction": "q", "input": "", "output": "the correct answer is true", "answer": "true"}
TWO = "text,label\na,x\nb,y\n"
# task, its files, what the line says, and the split that is read
BAD = [("text-classification", {"a.tsv": "x", "b.xlsx": "y", ".c": "z"},
     "train.tsv: no such file, in .* there are 'a.tsv', 'b.xlsx': correct --data .*, with train.tsv or train.csv or"),
    ("mrpc", {"msr_paraphrase_train.txt": "Quality\t#1 ID\n1\t2\n"}, "_dev_ids.tsv: no such file"),
    ("sst2", {"train.tsv": "sentence\tlabel\n"}, "no train rows"),
    ("cola", {"train.tsv": COLA.encode() + b"x\t1\t\tna\xefve\n"}, r"train.tsv line 3: byte \d+ is not UTF-8"),
    ("cola", {"train.tsv": COLA + "gj04\t1\tx\n"}, "train.tsv line 3: 3 columns, expected 4"),
    ("text-regression", {"train.csv": "text,score\nb,1\na,inf\n"}, "line 3: score 'inf'"),
    ("stsb", {"train.tsv": "sentence1\tsentence2\tscore\na\tb\t5.5\n"}, "line 2: score '5.5' is no number"),
    ("text-classification", {"train.csv": TWO, "dev.csv": "text,label\nc,\n"}, "dev.csv line 2: label ''", "dev"),
    ("text-classification", {"train.csv": TWO, "dev.csv": "text,label\nc,z\n"}, "dev.csv line 2: label 'z'", "dev"),
    ("text-classification", {"train.csv": "words,label\na,1\n"}, "line 2: no column 'text'"),
    ("text-classification", {"train.csv": 'text,label\n"a"b,1\n'}, "train.csv line 2: .*mend the CSV quoting"),
    ("text-classification", {"train.csv": "text,label,text\na,1,b\n"}, "line 1: 'text' is there twice: rename"),
    ("text-classification", {"train.jsonl": '{"text": "a", "label": 1, "label": 2}'}, "line 1: .*'label' is there twi"),
    ("text-classification", {"train.jsonl": jsonl([{"text": 3, "label": 1}])}, "line 1: 'text' is int"),
    ("instructions", {"train.jsonl": jsonl([{"question": "\ud800", "answer": "b"}])}, "line 1: 'question' is"),
    ("instructions", {"train.json": '[{"question": "a",\n "answer": }]'}, "train.json line 2: not JSON"),
    ("gsm8k", {"test.jsonl.gz": b"no gzip"}, "a broken archive .*: fetch it again", "dev"),
    ("gsm8k", {"test.jsonl.gz": gzip.compress(b"{}" * 99)[:-9]}, "a broken archive", "dev"),
    ("boolq", {"test.json": [GOOD, {**GOOD, "answer": "maybe"}]}, "row 2: answer 'maybe'", "dev"),
    ("boolq", {"test.json": [{**GOOD, "answer": "false"}]}, "row 1: answer 'false', but output says", "dev"),
    ("npz", npz(images=some_images((4, 4, 4))), r"images \(4, 4, 4\), labels \(3,\)"),
    ("npz", npz(labels=(0.5, 1.0, 2.0)), "float64 and split .*: expected"),
    ("npz", npz(images=np.full((3, 4, 4), 1.5)), r"images\[.\]: float64 from 0.0 to 1.5"),
    ("npz", npz(images=some_images((3, 6, 6, 5))), r"images\[.\]: uint8 \(6, 6, 5\)"),
    ("npz", npz(split=np.zeros(4)), r"and split \(4,\): expected"),
    ("npz", npz(split=np.array(["train", "test", "test"])), "N times 0 or 1"),
    ("image-folder", {"train/a/1.ppm": "P6 65536 32768 255\n", "train/b/1.ppm": ""}, "1.ppm: .*2147483648 pixels")]


def read_bad(folder, name, content, pattern, split="train"):
    """These files of a task are refused by one line that `pattern` finds."""
    for path, text in content.items():
        write(folder / path, text)
    with refused(pattern):
        task = data.find_task(name, folder)
        rows = data.read(task, folder, split)
        data.encode(task, rows, image=data.image_settings(None, (3, 4, 4)))


@pytest.mark.parametrize("case", BAD, ids=[case[2] for case in BAD])
def test_bad_input_is_one_line(tmp_path, case):
    read_bad(tmp_path, *case)


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


def test_fetch_archive(tmp_path, mirror, monkeypatch):
    """Missing, damaged, cut off, then all of it, once; no member gets out of the folder."""
    with refused("--task npz needs --data"):    # also if the labels are those of the digits
        data.read(replace(TASKS["npz"], labels=data.DIGITS))
    with refused("cannot fetch https://.*commonsense_170k.json .*, or download it elsewhere and put"):
        data.read(TASKS["commonsense"])
    with monkeypatch.context() as patch, refused("cannot fetch https://.*unknown url type"):
        patch.setenv("RANKS_MIRROR", "/some/folder")
        data.read(TASKS["commonsense"])
    mirror.asked.clear()
    members = {"CoLA/": "", "CoLA/train.tsv": COLA, "CoLA/dev.tsv": COLA, "CoLA/original/more.txt": "x"}
    evil = ("../evil.txt", "CoLA/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil")
    mirror.files[place(TASKS["cola"].sources[0][1])] = make_zip(members)
    mirror.files[place(TASKS["commonsense"].sources[0][1])] = b"\n<!DOCTYPE html><html>Log in first</html>"
    with refused("cannot fetch https://.*commonsense_170k.json .it is a web page instead.: run this again, or down"):
        data.read(TASKS["commonsense"])
    with refused("CoLA.zip .it is damaged: its SHA-256 is [0-9a-f]{64}, not [0-9a-f]{64}.: run this again"):
        data.read(TASKS["cola"])
    packed = make_zip(members | {"CoLA/test.tsv": os.urandom(9000)} | dict.fromkeys(evil, "x"))
    task, folder = serve(mirror, TASKS["cola"], [packed]), tmp_path / "cache" / "CoLA"
    mirror.cut.update(mirror.files)
    with refused("the connection ended at .* run this again"):
        data.read(task)
    assert not list(folder.iterdir())
    mirror.cut.clear()
    assert len(data.read(task)) == 2 and len(data.read(task, None, "dev")) == 2
    assert len(mirror.asked) == 4 and not Path("/tmp/evil.txt").exists()
    assert {path.name for path in folder.iterdir()} == {"dev.tsv", "original", "test.tsv", "train.tsv"}
    assert all(folder in path.parents for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the list of checksums")
def test_checksums_are_those_listed():
    listed = (SHARED / "README.md").read_text().splitlines()
    for name in ("sst2", "stsb", *LAYOUTS):
        for _, address, sha256 in TASKS[name].sources:
            file = address.removeprefix(data.FACEBOOK)
            assert [line for line in listed if f"`{file}`" in line and sha256 in line], file
