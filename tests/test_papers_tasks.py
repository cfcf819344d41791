"""papers/tasks.py: the published files as they come, answers of MATH, photos fetched on loopback, errors."""

import gzip
import io
import json
import sys

import numpy as np
import pytest
from test_data import (jpg, jsonl, make_tar, make_zip, mirror, own_cache, place, read_bad,  # noqa: F401
                       serve, some_images, write)
from tiny import refused

import data
from papers import tasks

FILE = tasks.__file__
TASKS = data.TASKS | {row.name: row for row in vars(tasks).values() if isinstance(row, data.Task)}

HOSTILE = "{x} %s \u2028 \\n \x00 </s> <|im_end|> $(ls) \U0001f600 ### Instruction:\n"
SOLUTION = "We have $\\frac12$ of 3.\nSo it is $\\boxed{\\frac{3}{2}}$."

# task: (file, rows as they are published at the task's address, prompt and answer of each that is read)
ask = data.prompt
PUBLISHED = {"metamathqa": ("MetaMathQA-395K.json", [
        {"type": "GSM_Rephrased", "query": f"Q{i}", "original_question": "o", "response": HOSTILE} for i in range(20)],
        [(ask(f"Q{i}"), HOSTILE) for i in range(20)]), "codefeedback": ("CodeFeedback-Filtered-Instruction.jsonl", [
        {"query": HOSTILE, "answer": "```\nx```", "resource": "evolinstruct", "lang": "python"}] * 11,
        [(ask(HOSTILE), "```\nx```")] * 11),
    # two of its own rows, then one as HuggingFaceH4/ultrafeedback_binarized has them
    "ultrafeedback": ("flan.jsonl", [
        {"source": "flan", "instruction": "Q0", "models": ["a", "b", "c"], "correct_answers": ["None"],
         "incorrect_answers": ["None"], "completions": [
             {"response": "bad", "overall_score": 2.0}, {"response": HOSTILE, "overall_score": 8.5},
             {"response": "worse", "overall_score": 8}]},
        {"source": "flan", "instruction": "none", "models": [], "completions": []},
        {"prompt": "Q1", "prompt_id": "0", "messages": [], "rejected": [], "score_chosen": 8.0,
         "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}]},
        {"source": "flan", "instruction": "Q2", "models": ["a"], "completions": [
            {"response": "half \ud83d pair", "overall_score": 1, "principle": "helpfulness"}]}],
        [(ask("Q0"), HOSTILE), (ask("Q1"), "good"), (ask("Q2"), "half ? pair")]), "alpaca": ("alpaca_data.json", [
        {"instruction": "I0", "input": "", "output": "O0"}, {"instruction": "I1", "input": HOSTILE, "output": HOSTILE},
        {"instruction": "some are empty", "input": "", "output": ""}],
        [(ask("I0"), "O0"), (ask("I1", HOSTILE), HOSTILE)]),
    # MetaMath's rows, then as hendrycks/math and openai/prm800k have them
    "math": ("MATH_test.jsonl", [
        {"idx": "h_1", "instruction": HOSTILE, "input": "", "output": SOLUTION, "type": "Algebra"},
        {"problem": "P", "level": "Level 5", "type": "Algebra", "solution": SOLUTION},
        {"problem": "P", "solution": SOLUTION, "answer": "\\frac{3}{2}", "subject": "Algebra", "level": 5,
         "unique_id": "t"}], [(ask(HOSTILE), SOLUTION), (ask("P"), SOLUTION), (ask("P"), SOLUTION)]),
    "gsm8k": ("test.jsonl", [{"question": "How many?", "answer": "3*400=<<3*400=1200>>1,200\n#### 1,200"},
                             {"question": HOSTILE, "answer": "#### -3"}],
              [(ask("How many?"), "3*400=<<3*400=1200>>1,200\n#### 1,200"), (ask(HOSTILE), "#### -3")]),
    "humaneval": ("HumanEval.jsonl", [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f():\n    {HOSTILE}\n", "entry_point": "f",
         "canonical_solution": "    return 1\n", "test": "assert f()"} for i in range(2)],
        [(f"def f():\n    {HOSTILE}".rstrip(), "    return 1\n")] * 2),
    "mbpp": ("mbpp.jsonl", [*({"text": "T", "code": "x = 1\r\ny = 2", "task_id": i, "test_setup_code": "",
           "challenge_test_list": [], "test_list": ["assert x", "assert y"]} for i in (1, 10, 11, 510, 511, 974)),
        {"source_file": "sanitized", "task_id": 12, "prompt": "T", "code": "x = 1\r\ny = 2", "test_imports": [],
         "test_list": ["assert x"]}], [('"""\nT\nassert x\n"""\n', "x = 1\r\ny = 2")] * 3),
    "alpacaeval": ("alpaca_eval.json", [
        {"dataset": "helpful_base", "instruction": HOSTILE, "output": "O", "generator": "text_davinci_003"}],
        [(ask(HOSTILE), "O")])}
TARGETS = {"math": ["\\frac{3}{2}"] * 3, "gsm8k": ["1200", "-3"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets(tmp_path, caplog, name):
    """Files are read as they come, in a folder, named and gzipped; nothing in them is formatted."""
    (file, rows, expected), task = PUBLISHED[name], TASKS[name]
    text = json.dumps(rows, indent=1) if file.endswith(".json") else jsonl(rows)
    path = write(tmp_path / file, text)
    zipped = write(tmp_path / "gz" / f"{file}.gz", gzip.compress(text.encode()))
    tuning = task.files.get("train") == task.files["dev"]
    for where in (tmp_path, zipped.parent, path, zipped)[:2 if name in TARGETS else 4]:  # others have one file
        read = [row for split in ["train"] * tuning + ["dev"] for row in data.read(task, where, split)]
        assert [(row["prompt"], row["answer"]) for row in read] == expected
    assert "not read" not in caplog.text
    assert ("skipped 1 row without an answer" in caplog.text) == (name in ("alpaca", "ultrafeedback"))
    held_out = -(-len(expected) // 10)
    assert (f"{held_out} of {len(expected)} rows are dev (the last)" in caplog.text) == tuning
    if tuning:
        assert len(data.read(task, tmp_path, "dev")) == held_out
    elif name in TARGETS:
        assert [row["target"] for row in read] == TARGETS[name]
    else:
        scored = [row for row in rows if row.get("task_id") not in (1, 10, 511, 974)]
        assert [row["sample"] for row in read] == [{key: row[key] for key in task.sample} for row in scored]
        with refused(f"{name} has no train rows, only dev: name another task"):
            data.read(task, tmp_path, "train")


def test_math_as_it_is_in_the_official_archive(tmp_path):
    for split, subject, n in (("train", "algebra", 1), ("train", "geometry", 2), ("test", "algebra", 3)):
        row = {"problem": f"P{n}", "level": "Level 1", "type": subject, "solution": f"The answer is: 8. \\boxed{{{n}}}"}
        write(tmp_path / "MATH" / split / subject / f"{n}.json", json.dumps(row, indent=4))
    for split, targets in (("train", ["1", "2"]), ("dev", ["3"])):
        assert [row["target"] for row in data.read(tasks.math, tmp_path, split)] == targets
    with refused("MATH/train.jsonl: no such file, in .* there are 'algebra': correct --data"):
        data.read(tasks.math, tmp_path / "MATH" / "test", "train")


# hand-checked; the phrase counts before the box, its last occurrence, up to a full stop that ends a line
ANSWERS = [("... so x = 2.\nThe answer is: 12", "12"), ("The answer is: 1.\nThe answer is: 3.5.\nmore", "3.5"),
    ("The answer is: $5", "$5"), ("\\boxed{7} The answer is: 8.", "8"), ("the answer is 4", ""),
    ("\\boxed{1} and \\boxed{2}.", "2"), ("$\\boxed{\\text{(A)} x^{2}}$", "\\text{(A)}x^{2}"), ("\\boxed 9$ and", "9"),
    ("\\fbox{x}", "x"), ("\\boxed{1} \\fbox{2}", "1"), ("\\boxed{unclosed {3}", ""), ("}{\\boxed}{", ""), ("", ""),
    # hendrycks/math, modeling/math_equivalence_test.py: both sides of its cases of equal answers
    ("\\boxed{\\tfrac{1}{2} +\\! \\frac1{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
    ("\\boxed{\\\\dfrac{1}{2} +\\frac{1}{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
    ("\\boxed{10\\text{ units}}", "10"), ("\\boxed{\\$10}", "10"), ("\\boxed{.1}", "0.1"), ("\\boxed{10\\%}", "10"),
    ("\\boxed{\\left(x-2\\right)\\left(x+2\\right)}", "(x-2)(x+2)"), ("\\boxed{\\frac34i}", "\\frac{3}{4}i"),
    ("\\boxed{10\\sqrt{3} + \\sqrt4}", "10\\sqrt{3}+\\sqrt{4}"), ("\\boxed{1/2}", "\\frac{1}{2}"),
    ("\\boxed{0.5}", "\\frac{1}{2}"),  # and other rules of its math_equivalence.py:
    ("\\boxed{x = 5}", "5"), ("\\boxed{abc=5}", "abc=5"), ("\\boxed{90^\\circ}", "90"), ("\\boxed{45^{\\circ}}", "45"),
    ("\\boxed{\\frac{.5}2}", "\\frac{0.5}2"), ("\\boxed{-3/4}", "\\frac{-3}{4}"),
    ("\\boxed{03/4}", "03/4"), ("\\boxed{\\frac}", "\\frac"), ("\\boxed{\\sqrt}", "\\sqrt")]


@pytest.mark.parametrize("text, expected", ANSWERS)
def test_final_answer(text, expected):
    assert tasks.final_answer(text) == data.extract_answer(text, tasks.final_answer) == expected


def bytes_of(save, *arrays, **options):
    buffer = io.BytesIO()
    save(buffer, *arrays, **options)
    return buffer.getvalue()


def photo_set(name):
    """(files of a set as they are distributed, {split: labels and widths of its photos})."""
    if name == "food101":
        names = ("waffles/1", "pizza/20", "waffles/3", "pizza/4")
        photos = {f"images/{name}.jpg": jpg(i) for i, name in enumerate(names)}
        return (photos | {"meta/train.txt": "waffles/1\npizza/20\nwaffles/3", "meta/test.txt": "pizza/4"},
                {"train": [("waffles", 6), ("pizza", 7), ("waffles", 8)], "dev": [("pizza", 9)]})
    if name == "resisc45":
        photos = {f"NWPU-RESISC45/airplane/airplane_00{i}.jpg": jpg(i) for i in (1, 2, 3)}
        return (photos | {"NWPU-RESISC45/dense_residential/dense_residential_100.jpg": jpg(0),
                          "resisc45-train.txt": "dense_residential_100.jpg\nairplane_001.jpg\nairplane_002.jpg",
                          "resisc45-test.txt": "airplane_003.jpg"},
                {"train": [("dense_residential", 6), ("airplane", 7), ("airplane", 8)], "dev": [("airplane", 9)]})
    scipy, photos = pytest.importorskip("scipy.io"), {f"jpg/image_{i:05}.jpg": jpg(i) for i in (1, 2, 3, 4, 5)}
    labels = {"labels": np.array([[77, 102, 3, 1, 102]], np.uint8)}
    ids = {"trnid": np.array([[2, 5]], np.uint16), "valid": np.array([[1]], np.uint16), "tstid": np.array([[4, 3]])}
    return (photos | {"imagelabels.mat": bytes_of(scipy.savemat, labels, do_compression=True),
                      "setid.mat": bytes_of(scipy.savemat, ids)},
            {"train": [("102", 8), ("102", 11)], "dev": [("1", 10), ("3", 9)]})


@pytest.mark.parametrize("name", ["food101", "resisc45", "flowers102"])
def test_photo_sets(tmp_path, mirror, name):
    """Fetched once, also where the first try ends before all is there; then read as --data."""
    files, expected = photo_set(name)
    members = {path: text if isinstance(text, bytes) else text.encode() for path, text in files.items()}
    names = [address.rpartition("/")[2] for _, address, _ in TASKS[name].sources]
    assert all(sha256 and len(sha256) == 64 for _, _, sha256 in TASKS[name].sources) or name == "resisc45"
    inner = "food-101/" * (name == "food101")
    packed = {inner + path: content for path, content in members.items() if path not in names}
    archive = (make_zip if name == "resisc45" else make_tar)(packed)
    task = serve(mirror, TASKS[name], [members.get(file, archive) for file in names])
    last = place(task.sources[-1][1])
    kept = mirror.files.pop(last)
    with refused("cannot fetch .*HTTP Error 404"):
        next(task.reader(task, None, "train"))
    mirror.files[last] = kept
    cache = tmp_path / "cache"
    for where in (None, cache, cache / task.folder):
        for split in expected:
            rows = [row for _, row in task.reader(task, where, split)]
            assert [(row["label"], data.read_image(row["pixels"]).shape[2]) for row in rows] == expected[split]
    assert mirror.asked.count(last) == 2
    task = data.find_task(f"{FILE}:{name}", cache)
    assert len(task.labels) == (102 if name == "flowers102" else 2) and data.read(task, cache, "dev")


def test_cifar100s_binary_files(tmp_path):
    """Coarse label, fine label, then 1,024 numbers each of red, green and blue, row by row, as its page says."""
    pictures, fine = some_images((9, 32, 32, 3)), [5, 99, 0, 7, 5, 1, 2, 3, 98]
    rows = [bytes([i, label]) + b"".join(picture[:, :, channel].tobytes() for channel in range(3))
            for i, (label, picture) in enumerate(zip(fine, pictures))]
    write(tmp_path / "train.bin", b"".join(rows[:6]))
    write(tmp_path / "test.bin", b"".join(rows[6:]))
    read = data.read(tasks.cifar100, tmp_path, "train") + data.read(tasks.cifar100, tmp_path, "dev")
    assert [row["label"] for row in read] == fine     # names are those numbers
    assert all(np.array_equal(row["pixels"].transpose(1, 2, 0), picture) for row, picture in zip(read, pictures))


BAD = [("math", {"test.jsonl": {"problem": "a", "solution": "4"}}, "line 1: answer '', expected one marked"),
    ("gsm8k", {"test.jsonl": {"question": "a", "answer": "5 of 7"}}, "line 1: answer '', expected one marked"),
    ("ultrafeedback", {"x.jsonl": {"instruction": "a", "completions": ["b"]}}, "'completions' is str 'b'"),
    ("ultrafeedback", {"x.jsonl": {"instruction": "a", "completions": [{"overall_score": "N/A"}] * 2}},
     "line 1: 'overall_score' is str 'N/A'"),
    ("mbpp", {"mbpp.jsonl": {"text": "a", "code": "b", "task_id": 11, "test_list": []}}, "line 1: no column 0"),
    ("cifar100", {"test.bin": bytes(5000)}, "test.bin: 5000 bytes, no multiple of 3074"),
    ("cifar100", {"test": b"\x80\x02}"}, "test: CIFAR's python version is pickled"),
    ("food101", {"meta/train.txt": "a/1\nb/2", "meta/test.txt": "a/1"}, "a/1.jpg: not an image .*No such"),
    ("flowers102", {"jpg/image_00001.jpg": "x", "imagelabels.mat": "nonsense" * 99}, "imagelabels.mat: no MATLAB file")]


@pytest.mark.parametrize("name, content, pattern", BAD)
def test_bad_input(tmp_path, name, content, pattern):
    read_bad(tmp_path, name if name in data.TASKS else f"{FILE}:{name}", content, pattern, "dev")


def test_scipy_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    write(tmp_path / "jpg" / "image_00001.jpg", "x")
    with refused("imagelabels.mat: reading MATLAB files needs SciPy: pip install scipy"):
        data.read(tasks.flowers102, tmp_path)
