"""papers/tasks.py: the published files as they come, answers of MATH, photos, errors, fetching on loopback."""

import gzip
import io
import json
import sys

import numpy as np
import pytest
from test_data import jpg, jsonl, make_tar, make_zip, mirror, own_cache, place, read_bad, serve, write  # noqa: F401
from tiny import refused

import data
from papers import tasks

FILE = tasks.__file__
TASKS = data.TASKS | {row.name: row for row in vars(tasks).values() if isinstance(row, data.Task)}


def find(name, where=None):
    return data.find_task(f"{FILE}:{name}", where)


# ------------------------------------------------------------------- published sets: training, and completions to score

HOSTILE = "{x} %s \u2028 \\n \x00 </s> <|im_end|> $(ls) \U0001f600 ### Instruction:\n"
SOLUTION = "We have $\\frac12$ of 3.\nSo it is $\\boxed{\\frac{3}{2}}$."


def rated(response, score):
    return {"model": "m", "principle": "helpfulness", "custom_system_prompt": "", "response": response,
            "overall_score": score, "fine-grained_score": 4.0, "annotations": {"honesty": {"Rating": "4"}}}


def chat(answer):
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]


def mbpp(i):
    return {"text": "T", "code": "def f():\r\n  return 1", "task_id": i, "test_setup_code": "",
            "challenge_test_list": [], "test_list": ["assert f() == 1", "assert f() != 2"]}


# task: (file, rows as they are published, prompt and answer of each that is read); where they are in the comments
ask = data.prompt
PUBLISHED = {
    # huggingface.co/datasets/meta-math/MetaMathQA
    "metamathqa": ("MetaMathQA-395K.json", [
        {"type": "MATH_AnsAug", "query": f"Q{i}", "original_question": "o", "response": HOSTILE} for i in range(20)],
        [(ask(f"Q{i}"), HOSTILE) for i in range(20)]),
    # huggingface.co/datasets/m-a-p/CodeFeedback-Filtered-Instruction
    "codefeedback": ("CodeFeedback-Filtered-Instruction.jsonl", [
        {"query": HOSTILE, "answer": "```python\nx\n```", "resource": "evolinstruct", "lang": "python"}] * 11,
        [(ask(HOSTILE), "```python\nx\n```")] * 11),
    # huggingface.co/datasets/openbmb/UltraFeedback, and HuggingFaceH4/ultrafeedback_binarized as JSON lines
    "ultrafeedback": ("flan.jsonl", [
        {"source": "flan", "instruction": "Q0", "models": ["a", "b", "c"], "correct_answers": ["None"],
         "incorrect_answers": ["None"], "completions": [rated("bad", 2.0), rated(HOSTILE, 8.5), rated("worse", 8)]},
        {"source": "flan", "instruction": "none", "models": [], "completions": []},
        {"prompt": "Q1", "prompt_id": "0", "chosen": chat("good"), "rejected": chat("bad"), "messages": [],
         "score_chosen": 8.0},
        {"source": "flan", "instruction": "Q2", "models": ["a"], "completions": [rated("half \ud83d pair", 1)]}],
        [(ask("Q0"), HOSTILE), (ask("Q1"), "good"), (ask("Q2"), "half ? pair")]),
    # github.com/tatsu-lab/stanford_alpaca
    "alpaca": ("alpaca_data.json", [
        {"instruction": "I0", "input": "", "output": "O0"}, {"instruction": "I1", "input": HOSTILE, "output": HOSTILE},
        {"instruction": "some are empty", "input": "", "output": ""}],
        [(ask("I0"), "O0"), (ask("I1", HOSTILE), HOSTILE)]),
    # github.com/meta-math/MetaMath, and the rows of github.com/hendrycks/math and github.com/openai/prm800k
    "math": ("MATH_test.jsonl", [
        {"idx": "hendrycks_math_1", "instruction": HOSTILE, "input": "", "output": SOLUTION, "type": "Algebra"},
        {"problem": "P", "level": "Level 5", "type": "Algebra", "solution": SOLUTION},
        {"problem": "P", "solution": SOLUTION, "answer": "\\frac{3}{2}", "subject": "Algebra", "level": 5,
         "unique_id": "t"}], [(ask(HOSTILE), SOLUTION), (ask("P"), SOLUTION), (ask("P"), SOLUTION)]),
    # github.com/openai/grade-school-math
    "gsm8k": ("test.jsonl", [{"question": "How many?", "answer": "3*400=<<3*400=1200>>1,200\n#### 1,200"},
                             {"question": HOSTILE, "answer": "#### -3"}],
              [(ask("How many?"), "3*400=<<3*400=1200>>1,200\n#### 1,200"), (ask(HOSTILE), "#### -3")]),
    # github.com/openai/human-eval
    "humaneval": ("HumanEval.jsonl", [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f():\n    {HOSTILE}\n", "entry_point": "f",
         "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n"} for i in range(2)],
        [(f"def f():\n    {HOSTILE}".rstrip(), "    return 1\n")] * 2),
    # github.com/google-research/google-research/tree/master/mbpp, whole and sanitized
    "mbpp": ("mbpp.jsonl", [*map(mbpp, (1, 10, 11, 510, 511, 974)),
        {"source_file": "x", "task_id": 12, "prompt": "T", "code": "def f():\r\n  return 1", "test_imports": [],
         "test_list": ["assert f() == 1"]}], [('"""\nT\nassert f() == 1\n"""\n', "def f():\r\n  return 1")] * 3),
    # huggingface.co/datasets/tatsu-lab/alpaca_eval
    "alpacaeval": ("alpaca_eval.json", [
        {"dataset": "helpful_base", "instruction": HOSTILE, "output": "O", "generator": "text_davinci_003"}],
        [(ask(HOSTILE), "O")]),
}
TARGETS = {"math": ["\\frac{3}{2}"] * 3, "gsm8k": ["1200", "-3"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets(tmp_path, caplog, name):
    """The official files are read as they come, in a folder, named and gzipped; nothing in them is formatted."""
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
        row = {"problem": f"P{n}", "level": "Level 1", "type": subject, "solution": f"\\boxed{{{n}}}"}
        write(tmp_path / "MATH" / split / subject / f"{n}.json", json.dumps(row, indent=4))
    for split, targets in (("train", ["1", "2"]), ("dev", ["3"])):
        assert [row["target"] for row in data.read(tasks.math, tmp_path, split)] == targets
    with refused("MATH/train.jsonl: no such file, in .* there are 'algebra': correct --data"):
        data.read(tasks.math, tmp_path / "MATH" / "test", "train")


# hand-checked; the phrase counts before the box, its last occurrence, up to a full stop that ends a line
ANSWERS = [
    ("... so x = 2.\nThe answer is: 12", "12"), ("The answer is: 1.\nThe answer is: 3.5.\nmore", "3.5"),
    ("The answer is: $5", "$5"), ("\\boxed{7} The answer is: 8.", "8"), ("the answer is 4", ""),
    ("\\boxed{1} and \\boxed{2}.", "2"), ("$\\boxed{\\text{(A)} x^{2}}$", "\\text{(A)}x^{2}"),
    ("\\boxed 9$ and", "9"), ("\\fbox{x}", "x"), ("\\boxed{1} \\fbox{2}", "1"), ("\\boxed{unclosed {3}", ""),
    ("\\boxed", ""), ("}{\\boxed}{", ""), ("", ""),
    # github.com/hendrycks/math, modeling/math_equivalence_test.py: both sides of its cases of equal answers
    ("\\boxed{\\tfrac{1}{2} +\\! \\frac1{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
    ("\\boxed{\\\\dfrac{1}{2} +\\frac{1}{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
    ("\\boxed{10\\text{ units}}", "10"), ("\\boxed{10 }", "10"), ("\\boxed{\\$10}", "10"),
    ("\\boxed{\\left(x-2\\right)\\left(x+2\\right)}", "(x-2)(x+2)"), ("\\boxed{.1}", "0.1"), ("\\boxed{10\\%}", "10"),
    ("\\boxed{10\\sqrt{3} + \\sqrt4}", "10\\sqrt{3}+\\sqrt{4}"),
    ("\\boxed{10\\sqrt3 + \\sqrt{4}}", "10\\sqrt{3}+\\sqrt{4}"), ("\\boxed{\\frac34i}", "\\frac{3}{4}i"),
    ("\\boxed{\\tfrac83}", "\\frac{8}{3}"), ("\\boxed{1/2}", "\\frac{1}{2}"), ("\\boxed{0.5}", "\\frac{1}{2}"),
    # and other rules of its math_equivalence.py
    ("\\boxed{x = 5}", "5"), ("\\boxed{abc=5}", "abc=5"), ("\\boxed{5x - 7y + 11z + 4 = 0}", "5x-7y+11z+4=0"),
    ("\\boxed{90^\\circ}", "90"), ("\\boxed{45^{\\circ}}", "45"), ("\\boxed{\\frac{.5}2}", "\\frac{0.5}2"),
    ("\\boxed{-3/4}", "\\frac{-3}{4}"), ("\\boxed{03/4}", "03/4"), ("\\boxed{1/2/3}", "1/2/3"),
    ("\\boxed{\\frac}", "\\frac"), ("\\boxed{\\sqrt}", "\\sqrt")]


@pytest.mark.parametrize("text, expected", ANSWERS)
def test_final_answer(text, expected):
    assert tasks.final_answer(text) == data.extract_answer(text, tasks.final_answer) == expected


def test_a_reference_solution_has_its_answer_in_its_own_place():
    assert tasks.final_answer("The answer is: 8. \\boxed{7}", reference=True) == "7"
    assert [data.last_number(f"5 of 7{end}", reference=True) for end in (" #### 1,000", "")] == ["1000", ""]


def food():
    names = {"train": ["waffles/1", "pizza/20", "waffles/3"], "test": ["pizza/4"]}
    files = {f"images/{name}.jpg": jpg(i) for i, name in enumerate(sum(names.values(), []))}
    return files | {f"meta/{split}.txt": "\n".join(lines) for split, lines in names.items()} | {"meta/classes.txt": "x"}


def resisc():
    names = {"train": ["dense_residential_100.jpg", "airplane_001.jpg", "airplane_002.jpg"],
             "test": ["airplane_003.jpg"], "val": ["airplane_004.jpg"]}
    numbered = enumerate(sum(names.values(), []))
    files = {f"NWPU-RESISC45/{name.rpartition('_')[0]}/{name}": jpg(i) for i, name in numbered}
    return files | {f"resisc45-{split}.txt": "\n".join(lines) for split, lines in names.items()}


def flowers():
    scipy, files = pytest.importorskip("scipy.io"), {f"jpg/image_{i:05}.jpg": jpg(i) for i in (1, 2, 3, 4, 5)}
    ids = {"trnid": np.array([[2, 5]], np.uint16), "valid": np.array([[1]], np.uint16), "tstid": np.array([[4, 3]])}
    for name, arrays in (("imagelabels", {"labels": np.array([[77, 102, 3, 1, 102]], np.uint8)}), ("setid", ids)):
        buffer = io.BytesIO()
        scipy.savemat(buffer, {**arrays, "labels" if name == "imagelabels" else "trnid": next(iter(arrays.values()))},
                      do_compression=True)
        files[f"{name}.mat"] = buffer.getvalue()
    return files


# task: (its files, {split: labels and widths of its photos}), as they are distributed
PHOTO_SETS = {"food101": (food, {"train": [("waffles", 6), ("pizza", 7), ("waffles", 8)], "dev": [("pizza", 9)]}),
              "resisc45": (resisc, {"train": [("dense_residential", 6), ("airplane", 7), ("airplane", 8)],
                                    "dev": [("airplane", 9)]}),
              "flowers102": (flowers, {"train": [("102", 8), ("102", 11)], "dev": [("1", 10), ("3", 9)]})}


@pytest.mark.parametrize("name", PHOTO_SETS)
def test_photo_sets(tmp_path, mirror, name):
    """Archives and lists are fetched once, also where the first try ends before all are there; then read as --data."""
    files, expected = PHOTO_SETS[name]
    members = {path: text if isinstance(text, bytes) else text.encode() for path, text in files().items()}
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
    task = find(name, cache)
    assert len(task.labels) == (102 if name == "flowers102" else 2) and data.read(task, cache, "dev")


# ---------------------------------------------------------------------------------------------------------- bad input

def published(name, row, pattern):
    """Case: this row in the file of a published set."""
    return name, {TASKS[name].files["dev"][0].replace("*", "flan"): jsonl([row])}, pattern


BAD = [
    published("math", {"problem": "a", "solution": "4"}, "line 1: answer '', expected one marked as math's are"),
    published("ultrafeedback", {"instruction": "a", "completions": ["b"]}, "'completions' is str 'b'"),
    published("ultrafeedback", {"instruction": "a", "completions": [{"overall_score": "N/A"}] * 2},
              "line 1: 'overall_score' is str 'N/A'"),
    published("mbpp", {"text": "a", "code": "b", "task_id": 11, "test_list": []}, "line 1: no column 0"),
    ("cifar100", {"test.bin": bytes(5000)}, "test.bin: 5000 bytes, no multiple of 3074"),
    ("cifar100", {"test": b"\x80\x02}"}, "test: CIFAR's python version is pickled"),
    ("food101", {"meta/train.txt": "a/1\nb/2", "meta/test.txt": "a/1"}, "a/1.jpg: not an image .*No such"),
    ("flowers102", {"jpg/image_00001.jpg": "x", "imagelabels.mat": "nonsense" * 99},
     "imagelabels.mat: no MATLAB file")]


@pytest.mark.parametrize("name, content, pattern", BAD)
def test_bad_input(tmp_path, name, content, pattern):
    read_bad(tmp_path, f"{FILE}:{name}", content, pattern, "dev")


def test_scipy_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    write(tmp_path / "jpg" / "image_00001.jpg", "x")
    with refused("imagelabels.mat: reading MATLAB files needs SciPy: pip install scipy"):
        data.read(tasks.flowers102, tmp_path)
