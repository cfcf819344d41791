"""data.py: every file layout, every error, encoding against transformers, batches, fetching from a loopback server."""

import gzip
import hashlib
import http.server
import io
import json
import os
import stat
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import TASKS  # noqa: E402
from model import UserError  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(path, text):
    """Write text (LF as it is) or bytes, with parent folders; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or the network."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANKS_MIRROR", "http://127.0.0.1:9")


# ------------------------------------------------------------------------------------------------------ GLUE's layouts


STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
MNLI = "index promptID pairID genre b1 b2 p1 p2 sentence1 sentence2".split()


def mnli(labels, gold):
    rows = [MNLI + labels + ["gold_label"]]
    rows += [[*"01234567", f"one {i}", f"two {i}", *[gold[0]] * len(labels), label] for i, label in enumerate(gold)]
    return "".join("\t".join(row) + "\n" for row in rows)


LAYOUTS = {
    "cola": (
        "CoLA",
        'gj04\t1\t\tHe said "go.\ngj04\t0\t*\tHim \u2028 went\x85 \x1c off.\r\n',
        [('He said "go.', None, 1), ("Him \u2028 went\x85 \x1c off.", None, 0)],
    ),
    "sst2": (
        "SST-2",
        'sentence\tlabel\r\na  film \t1\r\n"bad\rone\t0\r\n',
        [("a  film ", None, 1), ('"bad\rone', None, 0)],
    ),
    "mrpc": (
        "MRPC",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA "b\tC\r\n0\t9\t10\tD\tE',
        [('A "b', "C", 1), ("D", "E", 0)],
    ),
    "stsb": (
        "STS-B",
        STSB + "0\t-\t-\t-\t-\t-\t-\tA\tB\t5.0\n1\t-\t-\t-\t-\t-\t-\tC\tD\t0\n",
        [("A", "B", 5.0), ("C", "D", 0)],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t1\n4\t5\tshort\n7\t8\t9\tC?\t\t0\n",
        [("A?", "B?", 1), ("C?", "", 0)],
    ),
    "mnli": (
        "MNLI",
        mnli(["label1"], ["neutral", "contradiction", "entailment"]),
        [("one 0", "two 0", 1), ("one 1", "two 1", 2), ("one 2", "two 2", 0)],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tQ?\tS.\tnot_entailment\n1\tR?\tT.\tentailment\n",
        [("Q?", "S.", 1), ("R?", "T.", 0)],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tC\tD\tnot_entailment\n",
        [("A", "B", 0), ("C", "D", 1)],
    ),
}


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_glue_layouts(tmp_path, name, parent):
    """Official layouts: headers, byte-order mark, quotes, CR LF, Unicode separators, no final newline."""
    folder, text, expected = LAYOUTS[name]
    root = tmp_path / "data"
    for file in ("train.tsv", "dev_matched.tsv" if name == "mnli" else "dev.tsv"):
        write(root / folder / file, text)
    where = root if parent else root / folder
    task = data.find_task(name, where)
    for split in ("train", "dev"):
        rows = data.read(task, where, split)
        assert [(row["text"], row.get("pair"), row["label"]) for row in rows] == expected
    assert data.read(task, where, "train", limit=1) == rows[:1]
    assert type(rows[0]["label"]) is (float if name == "stsb" else int)


def test_mnli_has_two_dev_sets(tmp_path):
    text = mnli([f"label{i}" for i in range(1, 6)], ["entailment", "neutral"])
    write(tmp_path / "dev_matched.tsv", text)
    write(tmp_path / "dev_mismatched.tsv", text.replace("one", "other"))
    task = data.find_task("mnli", tmp_path)
    assert task.eval_splits == ("dev", "dev_mismatched")
    assert [data.read(task, tmp_path, split)[1]["text"] for split in task.eval_splits] == ["one 1", "other 1"]


def test_qqp_short_rows_are_counted(tmp_path, caplog):
    write(tmp_path / "train.tsv", LAYOUTS["qqp"][1])
    for _ in range(2):
        assert len(data.read(TASKS["qqp"], tmp_path)) == 2
    assert [r.message for r in caplog.records] == [f"{tmp_path}/train.tsv: skipped 1 short row"]


def test_mrpc_original_files(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    write(
        tmp_path / "msr_paraphrase_train.txt",
        header + "".join(f'{i % 2}\t{i}\t{i + 100}\tleft {i}\tright "{i}\r\n' for i in range(6)),
    )
    write(tmp_path / "mrpc_dev_ids.tsv", "1\t101\n4\t104\n2\t999\n")
    task = TASKS["mrpc"]
    assert [row["text"] for row in data.read(task, tmp_path, "dev")] == ["left 1", "left 4"]
    assert [row["text"] for row in data.read(task, tmp_path, "train")] == ["left 0", "left 2", "left 3", "left 5"]


# ------------------------------------------------------------------------------------------------ instructions, prompts


def ask(i, answer):
    return {
        "instruction": f"Q{i} {{x}} %s $(ls)?",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def test_prompt_survives_format_characters():
    text = data.prompt("what is {x} and {0} %s \\1?", "{input}")
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "what is {x} and {0} %s \\1?\n\n### Input:\n{input}\n\n### Response:\n"
    )
    assert data.prompt("a") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\na\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa"])
def test_commonsense_layout(tmp_path, name):
    task = TASKS[name]
    rows = [ask(i, answer) for i, answer in enumerate(task.answers)]
    write(tmp_path / task.folder / "test.json", json.dumps(rows, indent=1))
    read = data.read(data.find_task(name, tmp_path), tmp_path, "dev")
    assert [row["target"] for row in read] == list(task.answers)
    assert read[1]["prompt"] == data.prompt("Q1 {x} %s $(ls)?") and read[1]["answer"] == rows[1]["output"]
    assert all(data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in read)


def test_commonsense_is_one_training_set_and_many_tests(tmp_path, caplog):
    for name, answer in (("boolq", "true"), ("piqa", "solution2")):
        for file in ("train.json", "test.json"):
            write(tmp_path / TASKS[name].folder / file, json.dumps([ask(name, answer)]))
    task = data.find_task("commonsense", tmp_path)
    assert task.eval_splits == ("boolq", "piqa")
    assert [row["target"] for split in task.eval_splits for row in data.read(task, tmp_path, split)] == [
        "true",
        "solution2",
    ]
    assert len(data.read(task, tmp_path, "dev")) == len(data.read(task, tmp_path, "train")) == 2
    assert "training on train.json of boolq, piqa" in caplog.text
    write(tmp_path / "commonsense_170k.json", json.dumps([ask(i, "whatever") for i in range(5)]))
    assert len(data.read(task, tmp_path, "train")) == 5
    assert data.find_task("commonsense").eval_splits == data.COMMONSENSE


def test_gsm8k(tmp_path):
    rows = [
        {"question": "How many?", "answer": "3*400=<<3*400=1200>>1,200\n#### 1,200"},
        {"question": "?", "answer": "#### -3"},
    ]
    write(tmp_path / "gsm8k" / "test.jsonl", jsonl(rows))
    read = data.read(TASKS["gsm8k"], tmp_path, "dev")
    assert [row["target"] for row in read] == ["1200", "-3"] and read[0]["prompt"] == data.prompt("How many?")


@pytest.mark.parametrize(
    "text, answers, expected",
    [
        ("the correct answer is true", ("true", "false"), "true"),
        ("false, not true", ("true", "false"), "false"),
        ("True", ("true", "false"), ""),
        ("", ("true", "false"), ""),
        ("answer: solution2 because solution1 is", ("solution1", "solution2"), "solution2"),
        ("answer6 or answer5", TASKS["siqa"].answers, "answer5"),
        ("ending4", TASKS["hellaswag"].answers, "ending4"),
        ("option3", TASKS["winogrande"].answers, ""),
        ("axb a.b", ("a+b", "a.b"), "a.b"),
        ("#### 18", data.last_number, "18"),
        ("so $1,234,567.", data.last_number, "1234567"),
        ("it is $80,000.50.", data.last_number, "80000.5"),
        ("16 - 3 = 13 left", data.last_number, "13"),
        ("minus: -$5", data.last_number, "-5"),
        ("10-4", data.last_number, "4"),
        ("72.00", data.last_number, "72"),
        ("0.0", data.last_number, "0"),
        ("of 1,2,3 the last", data.last_number, "3"),
        ("about .5", data.last_number, ".5"),
        ("100", data.last_number, "100"),
        ("1,000 and 12,34", data.last_number, "34"),
        ("no number", data.last_number, ""),
    ],
)
def test_extract_answer(text, answers, expected):
    assert data.extract_answer(text, answers) == expected


@pytest.mark.parametrize("lines", [False, True])
def test_own_instructions(tmp_path, caplog, lines):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)] + [
        {"instruction": f"i{i}", "input": "with" if i % 2 else None, "output": f"o{i}"} for i in range(25)
    ]
    path = write(tmp_path / ("all.jsonl" if lines else "all.json"), jsonl(rows) + "\n\n" if lines else json.dumps(rows))
    train, dev = (data.read(data.find_task("instructions", path), path, split) for split in ("train", "dev"))
    assert len(train) == 40 and [row["answer"] for row in train + dev] == [
        row.get("output", row["answer"] if "answer" in row else 0) for row in rows
    ]
    assert train[21]["prompt"] == data.prompt("i1", "with") and "target" not in train[0]
    assert "5 of 45 rows are dev (the last)" in caplog.text
    write(tmp_path / "two" / "train.jsonl", jsonl(rows[:7]))
    write(tmp_path / "two" / "dev.json", json.dumps(rows[:3]))
    assert [len(data.read(TASKS["instructions"], tmp_path / "two", split)) for split in ("train", "dev")] == [7, 3]


def test_at_most_1000_rows_are_held_out(tmp_path):
    path = write(tmp_path / "big.jsonl", jsonl([{"question": str(i), "answer": str(i)} for i in range(10_050)]))
    assert len(data.read(TASKS["instructions"], path, "dev")) == 1000
    assert data.read(TASKS["instructions"], path, "train")[-1]["answer"] == "9049"


# ------------------------------------------------------------------- published sets: training, and completions to score


HOSTILE = "{x} %s \u2028 \\n \x00 </s> <|im_end|> $(ls) \U0001f600 ### Instruction:\n"
SOLUTION = "We have $\\frac12$ of 3.\nSo it is $\\boxed{\\frac{3}{2}}$."


def completion(response, score):
    return {
        "model": "m",
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": response,
        "overall_score": score,
        "fine-grained_score": 4.0,
        "annotations": {"honesty": {"Rating": "4"}},
    }


def message(role, content):
    return {"role": role, "content": content}


# task: (file, rows as they are published, prompt of each without its frame, answer of each); sources in the comments
PUBLISHED = {
    # huggingface.co/datasets/meta-math/MetaMathQA
    "metamathqa": (
        "MetaMathQA-395K.json",
        [
            {
                "type": "MATH_AnsAug",
                "query": f"Q{i} {HOSTILE}",
                "original_question": "o",
                "response": f"{HOSTILE}\nThe answer is: {i}",
            }
            for i in range(20)
        ],
        [data.prompt(f"Q{i} {HOSTILE}") for i in range(20)],
        [f"{HOSTILE}\nThe answer is: {i}" for i in range(20)],
    ),
    # huggingface.co/datasets/m-a-p/CodeFeedback-Filtered-Instruction
    "codefeedback": (
        "CodeFeedback-Filtered-Instruction.jsonl",
        [
            {"query": f"Q{i} {HOSTILE}", "answer": "```python\nx\n```", "resource": "evolinstruct", "lang": "python"}
            for i in range(11)
        ],
        [data.prompt(f"Q{i} {HOSTILE}") for i in range(11)],
        ["```python\nx\n```"] * 11,
    ),
    # huggingface.co/datasets/openbmb/UltraFeedback, and HuggingFaceH4/ultrafeedback_binarized as JSON lines
    "ultrafeedback": (
        "flan.jsonl",
        [
            {
                "source": "flan",
                "instruction": "Q0",
                "models": ["a", "b", "c"],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
                "completions": [completion("bad", 2.0), completion(HOSTILE, 8.5), completion("worse", 8)],
            },
            {"source": "flan", "instruction": "none", "models": [], "completions": []},
            {
                "prompt": "Q1",
                "prompt_id": "0",
                "chosen": [message("user", "Q1"), message("assistant", "good")],
                "rejected": [message("user", "Q1"), message("assistant", "bad")],
                "messages": [],
                "score_chosen": 8.0,
            },
            {
                "source": "flan",
                "instruction": "Q2",
                "models": ["a"],
                "completions": [completion("half \ud83d pair", 1)],
            },
        ],
        [data.prompt("Q0"), data.prompt("Q1"), data.prompt("Q2")],
        [HOSTILE, "good", "half ? pair"],
    ),
    # github.com/tatsu-lab/stanford_alpaca
    "alpaca": (
        "alpaca_data.json",
        [
            {"instruction": "I0", "input": "", "output": "O0"},
            {"instruction": "I1", "input": HOSTILE, "output": HOSTILE},
            {"instruction": "some are empty", "input": "", "output": ""},
        ],
        [data.prompt("I0"), data.prompt("I1", HOSTILE)],
        ["O0", HOSTILE],
    ),
    # github.com/meta-math/MetaMath, and the rows of github.com/hendrycks/math and github.com/openai/prm800k
    "math": (
        "MATH_test.jsonl",
        [
            {"idx": "hendrycks_math_1", "instruction": HOSTILE, "input": "", "output": SOLUTION, "type": "Algebra"},
            {"problem": "P", "level": "Level 5", "type": "Algebra", "solution": SOLUTION},
            {
                "problem": "P",
                "solution": SOLUTION,
                "answer": "\\frac{3}{2}",
                "subject": "Algebra",
                "level": 5,
                "unique_id": "t",
            },
        ],
        [data.prompt(HOSTILE), data.prompt("P"), data.prompt("P")],
        [SOLUTION] * 3,
    ),
    # github.com/openai/human-eval
    "humaneval": (
        "HumanEval.jsonl",
        [
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f"def f():\n    {HOSTILE}\n",
                "entry_point": "f",
                "canonical_solution": "    return 1\n",
                "test": "def check(f):\n    assert f() == 1\n",
            }
            for i in range(2)
        ],
        [f"def f():\n    {HOSTILE}".rstrip()] * 2,
        ["    return 1\n"] * 2,
    ),
    # github.com/google-research/google-research/tree/master/mbpp, whole and sanitized
    "mbpp": (
        "mbpp.jsonl",
        [
            {
                "text": "T",
                "code": "def f():\r\n  return 1",
                "task_id": i,
                "test_setup_code": "",
                "challenge_test_list": [],
                "test_list": ["assert f() == 1", "assert f() != 2"],
            }
            for i in (1, 10, 11, 510, 511, 974)
        ]
        + [
            {
                "source_file": "x",
                "task_id": 12,
                "prompt": "T",
                "code": "def f():\r\n  return 1",
                "test_imports": [],
                "test_list": ["assert f() == 1"],
            }
        ],
        ['"""\nT\nassert f() == 1\n"""\n'] * 3,
        ["def f():\r\n  return 1"] * 3,
    ),
    # huggingface.co/datasets/tatsu-lab/alpaca_eval
    "alpacaeval": (
        "alpaca_eval.json",
        [{"dataset": "helpful_base", "instruction": HOSTILE, "output": "O", "generator": "text_davinci_003"}],
        [data.prompt(HOSTILE)],
        ["O"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets(tmp_path, name):
    """The official files are read as they come, in a folder and named directly; nothing in them is formatted."""
    (file, rows, prompts, answers), task = PUBLISHED[name], TASKS[name]
    path = write(tmp_path / file, json.dumps(rows, indent=1) if file.endswith(".json") else jsonl(rows))
    tuning = task.files.get("train") == task.files["dev"]
    for where in (tmp_path, path) if name != "math" else (tmp_path,):  # MATH's two splits are two files
        read = [row for split in ["train"] * tuning + ["dev"] for row in data.read(task, where, split)]
        assert [row["prompt"] for row in read] == prompts
        assert [row["answer"] for row in read] == answers
    if tuning:
        assert len(data.read(task, tmp_path, "dev")) == -(-len(prompts) // 10)
    elif name == "math":
        assert [row["target"] for row in read] == ["\\frac{3}{2}"] * 3
    else:
        scored = [row for row in rows if row["task_id"] not in (1, 10, 511, 974)] if "task_id" in rows[0] else rows
        assert [row["sample"] for row in read] == [{key: row[key] for key in task.sample} for row in scored]
        with pytest.raises(UserError, match=f"{name} has no training set: train on another task"):
            data.read(task, tmp_path, "train")


def test_rows_without_an_answer_are_counted(tmp_path, caplog):
    write(tmp_path / "alpaca_data.json", json.dumps(PUBLISHED["alpaca"][1]))
    data.read(TASKS["alpaca"], tmp_path)
    assert f"{tmp_path}: skipped 1 row without an answer" in caplog.text


def test_gzipped_lines(tmp_path):
    _, rows, prompts, _ = PUBLISHED["humaneval"]
    path = write(tmp_path / "HumanEval.jsonl.gz", gzip.compress(jsonl(rows).encode()))
    assert [row["prompt"] for row in data.read(TASKS["humaneval"], tmp_path, "dev")] == prompts
    for bad in (b"no gzip", path.read_bytes()[:40], path.read_bytes()[:-9] + b"123456789"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="HumanEval.jsonl.gz: a broken archive .*: fetch it again"):
            data.read(TASKS["humaneval"], tmp_path, "dev")


def test_math_as_it_is_in_the_official_archive(tmp_path):
    for split, subject, n in (("train", "algebra", 1), ("train", "geometry", 2), ("test", "algebra", 3)):
        write(
            tmp_path / "MATH" / split / subject / f"{n}.json",
            json.dumps(
                {"problem": f"P{n}", "level": "Level 1", "type": subject, "solution": f"\\boxed{{{n}}}"}, indent=4
            ),
        )
    for split, targets in (("train", ["1", "2"]), ("dev", ["3"])):
        assert [row["target"] for row in data.read(TASKS["math"], tmp_path, split)] == targets
    with pytest.raises(UserError, match="MATH/train.jsonl: no such file: correct --data to name a file"):
        data.read(TASKS["math"], tmp_path / "MATH" / "test", "train")


@pytest.mark.parametrize(
    "text, expected",
    [
        # hand-checked; the phrase counts before the box, its last occurrence, up to a full stop that ends a line
        ("... so x = 2.\nThe answer is: 12", "12"),
        ("The answer is: 1.\nThe answer is: 3.5.\nmore", "3.5"),
        ("The answer is: $5", "$5"),
        ("\\boxed{7} The answer is: 8.", "8"),
        ("the answer is 4", ""),
        ("\\boxed{1} and \\boxed{2}.", "2"),
        ("$\\boxed{\\text{(A)} x^{2}}$", "\\text{(A)}x^{2}"),
        ("\\boxed 9$ and", "9"),
        ("\\fbox{x}", "x"),
        ("\\boxed{1} \\fbox{2}", "1"),
        ("\\boxed{unclosed {3}", ""),
        ("\\boxed", ""),
        ("}{\\boxed}{", ""),
        ("", ""),
        # github.com/hendrycks/math, modeling/math_equivalence_test.py: both sides of its cases of equal answers
        ("\\boxed{\\tfrac{1}{2} +\\! \\frac1{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
        ("\\boxed{\\\\dfrac{1}{2} +\\frac{1}{72}}", "\\frac{1}{2}+\\frac{1}{72}"),
        ("\\boxed{10\\text{ units}}", "10"),
        ("\\boxed{10 }", "10"),
        ("\\boxed{\\$10}", "10"),
        ("\\boxed{\\left(x-2\\right)\\left(x+2\\right)}", "(x-2)(x+2)"),
        ("\\boxed{.1}", "0.1"),
        ("\\boxed{10\\%}", "10"),
        ("\\boxed{10\\sqrt{3} + \\sqrt4}", "10\\sqrt{3}+\\sqrt{4}"),
        ("\\boxed{10\\sqrt3 + \\sqrt{4}}", "10\\sqrt{3}+\\sqrt{4}"),
        ("\\boxed{\\frac34i}", "\\frac{3}{4}i"),
        ("\\boxed{\\tfrac83}", "\\frac{8}{3}"),
        ("\\boxed{1/2}", "\\frac{1}{2}"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        # and other rules of its math_equivalence.py
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{abc=5}", "abc=5"),
        ("\\boxed{5x - 7y + 11z + 4 = 0}", "5x-7y+11z+4=0"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{45^{\\circ}}", "45"),
        ("\\boxed{\\frac{.5}2}", "\\frac{0.5}2"),
        ("\\boxed{-3/4}", "\\frac{-3}{4}"),
        ("\\boxed{03/4}", "03/4"),
        ("\\boxed{1/2/3}", "1/2/3"),
        ("\\boxed{\\frac}", "\\frac"),
        ("\\boxed{\\sqrt}", "\\sqrt"),
    ],
)
def test_final_answer(text, expected):
    assert data.final_answer(text) == data.extract_answer(text, data.final_answer) == expected


def test_a_reference_solution_has_its_answer_in_a_box():
    assert data.final_answer("The answer is: 8. \\boxed{7}", reference=True) == "7"
    assert (
        data.last_number("5 of 7 #### 1,000", reference=True) == "1000"
        and data.last_number("5 of 7", reference=True) == ""
    )


def test_allowed_answers_are_those_that_the_prompt_lists():
    row = {
        "prompt": "Answer format: answer1/answer2/answer3",
        "answer": "the correct answer is answer2",
        "target": "answer2",
        "answers": TASKS["siqa"].answers,
    }
    assert data.allowed(row) == (
        ["answer1", "answer2", "answer3"],
        [f"the correct answer is answer{i}" for i in (1, 2, 3)],
    )
    assert data.allowed({**row, "prompt": "answer2 is in it by chance"})[0] == list(TASKS["siqa"].answers)
    assert data.allowed({**row, "answer": "B", "answers": ("answer1", "answer2")})[1] == ["answer1", "answer2"]


def test_decoded_text_keeps_the_space_that_it_begins_with(tmp_path):
    """SentencePiece's decoder drops the first space of a text: Python would lose an indent."""
    make_tokenizer(tmp_path, "llama")
    tokenizer = data.Tokenizer.from_folder(tmp_path)
    vocabulary = {"<unk>": 0, "\u2581def": 1, "\u2581return": 2, "\u2581": 3, "x": 4, "</s>": 5}
    tokenizer.backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer.backend.add_special_tokens(["</s>"])
    assert tokenizer.decode([3, 3, 2, 4, 5]) == "  returnx"
    assert tokenizer.decode([3, 3, 2, 4, 5], [5, 1, 4]) == "   returnx"


# ---------------------------------------------------------------------------------------------------- the user's tables


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json"])
@pytest.mark.parametrize("columns", [("text", None), ("sentence", None), ("sentence1", "sentence2"), ("text", "pair")])
def test_own_classification(tmp_path, suffix, columns):
    texts = ["plain", 'with "quote"', "comma, and \u2028 separator", "two\nlines" if suffix != "tsv" else "one"]
    labels = ["pos", "neg", "neutral", "neg"]
    names = [name for name in (*columns, "label") if name]
    rows = [
        dict(zip(names, ([text, text[::-1], label] if columns[1] else [text, label])))
        for text, label in zip(texts, labels)
    ]
    rows = [{**row, "extra": "x"} for row in rows]
    if suffix == "csv":

        def quote(value):
            return '"' + value.replace('"', '""') + '"'

        text = "\r\n".join(",".join(map(quote, line)) for line in [list(rows[0]), *(row.values() for row in rows)])
    elif suffix == "tsv":
        text = "\n".join("\t".join(line) for line in [list(rows[0]), *(row.values() for row in rows)])
    else:
        text = jsonl(rows) if suffix == "jsonl" else json.dumps(rows)
    write(tmp_path / f"train.{suffix}", text)
    write(tmp_path / f"valid.{suffix}", text)
    task = data.find_task("text-classification", tmp_path)
    assert task.labels == ("neg", "neutral", "pos")
    for split in ("train", "dev"):
        read = data.read(task, tmp_path, split)
        assert [row["text"] for row in read] == texts and [row["label"] for row in read] == [2, 0, 1, 0]
        assert [row.get("pair") for row in read] == [text[::-1] if columns[1] else None for text in texts]
    assert data.find_task("text-classification", None, ["b", "a"]).labels == ("b", "a")  # an earlier run's


def test_own_labels_that_are_numbers_sort_as_numbers(tmp_path):
    path = write(tmp_path / "train.jsonl", jsonl([{"text": "t", "label": label} for label in (10, 9, 1, 10)]))
    task = data.find_task("text-classification", path)
    assert task.labels == ("1", "9", "10")


@pytest.mark.parametrize("rows", [3, 9, 10, 11, 29, 100, 1999, 12_345])
def test_held_out_rows_of_a_sorted_file(tmp_path, rows):
    """Every row is in exactly one split, the share is a tenth and every third of a sorted file gives dev rows."""
    path = write(tmp_path / "all.csv", "text,label\n" + "".join(f"{i},{i * 3 // rows}\n" for i in range(rows)))
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
    np.savez(tmp_path / "b.npz", images=images, labels=labels, split=np.arange(20) >= 12)
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
        [data.read(TASKS[name], None, split) for split in ("train", "dev")] for name in ("digits", "digits-rot90")
    )
    assert [len(rows) for rows in straight] == [1352, 445]
    found = sorted((row["label"], row["pixels"].tobytes()) for rows in straight for row in rows)
    assert found == sorted(
        (label, (image * 15).astype(np.uint8).tobytes()) for label, image in zip(sklearn.target, sklearn.images)
    )
    for a, b in zip(straight[1], turned[1]):
        assert a["label"] == b["label"] and np.array_equal(np.rot90(a["pixels"][0]), b["pixels"][0])
    shares = np.bincount([row["label"] for row in straight[1]]) / np.bincount(sklearn.target)
    assert 0.24 < shares.min() and shares.max() < 0.26


def test_cifar100(tmp_path):
    images, fine = some_images((6, 3, 32, 32)), [0, 99, 3, 4, 5, 6]
    raw = b"".join(bytes([19, label]) + image.tobytes() for label, image in zip(fine, images))
    for file in ("train.bin", "test.bin"):
        write(tmp_path / "cifar-100-binary" / file, raw)
    rows = data.read(data.find_task("cifar100", tmp_path), tmp_path, "dev")
    assert [row["label"] for row in rows] == fine
    assert all(np.array_equal(row["pixels"], image) for row, image in zip(rows, images))


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = some_images((4, 9, 7, 3))
    for i, (split, label) in enumerate([("train", "dog"), ("train", "cat"), ("val", "cat"), ("val", "dog")]):
        folder = tmp_path / split / label
        folder.mkdir(parents=True)
        image.fromarray(pixels[i]).save(folder / f"{i}.png") if i % 2 else np.save(folder / f"{i}.npy", pixels[i])
        write(folder / ".DS_Store", "junk")
    task = data.find_task("image-folder", tmp_path)
    assert task.labels == ("cat", "dog")
    rows = data.read(task, tmp_path) + data.read(task, tmp_path, "dev")
    assert [row["label"] for row in rows] == [0, 1, 0, 1]
    for row, i in zip(rows, (1, 0, 2, 3)):
        assert np.array_equal(row["pixels"], pixels[i].transpose(2, 0, 1))


def test_image_batches(tmp_path):
    """Resized as Pillow does (antialiased), grey repeated, normalised by the checkpoint's own mean and std."""
    image = pytest.importorskip("PIL.Image")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    write(tmp_path / "preprocessor_config.json", json.dumps(settings))
    grey = some_images((5, 1, 24, 24))
    rows = [{"pixels": pixels, "label": i} for i, pixels in enumerate(grey)]
    for size in (48, 24, 8):
        write(tmp_path / "config.json", json.dumps({"image_size": size, "num_channels": 3}))
        split = data.encode(TASKS["digits"], rows, image=data.image_settings(tmp_path))
        assert split.pixels.dtype == torch.uint8 and len(split) == 5
        inputs, labels = data.collate(split, [3, 1])
        assert inputs["pixels"].shape == (2, 3, size, size) and labels.tolist() == [3, 1]
        expected = np.asarray(image.fromarray(grey[3, 0]).resize((size, size), image.Resampling.BILINEAR)) / 255
        for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]):
            assert np.abs(inputs["pixels"][0, channel].numpy() * std + mean - expected).max() < 0.005


def test_image_batches_by_default(tmp_path):
    """Without preprocessor_config.json mean and std are 0.5; colour becomes grey for a model with one channel."""
    write(tmp_path / "config.json", json.dumps({"image_size": [8, 6], "num_channels": 1}))
    colour = some_images((2, 3, 8, 6))
    rows = [{"pixels": pixels, "label": 0} for pixels in colour]
    split = data.encode(TASKS["digits"], rows, image=data.image_settings(tmp_path))
    expected = (torch.from_numpy(colour).float().mean(1, keepdim=True) / 255 - 0.5) / 0.5
    torch.testing.assert_close(data.collate(split, [0, 1])[0]["pixels"], expected)


# --------------------------------------------------------------------------------------------------------- tokenizing


TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "the dog",
    "",
    "naïve café — 42 %",
    "fox " * 40,
    "unseen žluťoučký",
]


def make_tokenizer(folder, kind):
    """Train a small tokenizer and write a model folder with it as transformers would find one."""
    if kind == "bpe":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        special, config = (
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
            {"model_type": "llama", "eos_token_id": [1, 7]},
        )
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=200, show_progress=False, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        config = {"model_type": kind}
    backend.train_from_iterator(TEXTS[:4] * 5 + ["### Response:\nthe correct answer is true"], trainer)
    if kind == "bpe":
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    else:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    backend.enable_truncation(5)  # settings left in the file must not matter
    backend.enable_padding(length=50)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{name: token for name, token in special.items() if isinstance(token, str)},
            }
        ),
    )
    write(folder / "special_tokens_map.json", json.dumps(special))
    write(folder / "config.json", json.dumps(config))
    return folder


def compare_with_transformers(folder, fast):
    ours = data.Tokenizer.from_folder(folder)
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


@pytest.mark.parametrize("types", [0, 2])
def test_sentencepiece_tokenizer_of_deberta(types, tmp_path):
    """The tokenizer.json that transformers makes of DeBERTaV3's spm.model; types only where the model has a table."""
    transformers = pytest.importorskip("transformers")
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, unk_token="[UNK]", special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    pieces.train_from_iterator(TEXTS[:4] * 5, trainer)
    vocabulary = [tuple(piece) for piece in json.loads(pieces.to_str())["model"]["vocab"]]
    fast = transformers.DebertaV2TokenizerFast(vocab=vocabulary)
    fast.save_pretrained(tmp_path)
    write(tmp_path / "config.json", json.dumps({"model_type": "deberta-v2", "type_vocab_size": types}))
    ours = compare_with_transformers(tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert ours.types == bool(types) and ours.pad_id == 0
    assert "\u2581" in ours.backend.encode("the answer").tokens


@pytest.mark.parametrize("kind", ["bpe", "bert", "roberta"])
def test_encoding_equals_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path / "model", kind)
    special = json.loads((folder / "special_tokens_map.json").read_text())
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{name: token if isinstance(token, str) else token["content"] for name, token in special.items()},
    )
    ours = compare_with_transformers(folder, fast)
    if kind == "bpe":
        assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.eos_ids, ours.prefix) == (1, 0, 1, [1, 7], [0])
    else:
        assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.prefix) == (0, None, None, [])
    assert ours.types == (kind == "bert")


def checkpoint(name):
    folder = Path(os.environ.get("CHECKPOINTS", "")) / name
    if not os.environ.get("CHECKPOINTS") or not folder.is_dir():
        pytest.skip(f"set CHECKPOINTS to the folder that holds {name}/")
    return folder


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_encoding_equals_transformers_on_checkpoints(name):
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(name)
    compare_with_transformers(folder, transformers.AutoTokenizer.from_pretrained(folder))


def test_fallback_ids(tmp_path):
    folder = make_tokenizer(tmp_path / "model", "bert")
    write(folder / "special_tokens_map.json", "{}")
    write(folder / "tokenizer_config.json", json.dumps({"unk_token": "[UNK]"}))
    write(folder / "config.json", json.dumps({"model_type": "bert", "bos_token_id": 2, "eos_token_id": 3}))
    write(folder / "generation_config.json", json.dumps({"eos_token_id": [3, 5]}))
    ours = data.Tokenizer.from_folder(folder)
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.eos_ids, ours.prefix) == (3, 2, 3, [3, 5], [2])
    write(folder / "config.json", "{}")
    (folder / "generation_config.json").unlink()
    assert data.Tokenizer.from_folder(folder).pad_id == 1


def test_classification_batches(tmp_path):
    """Pairs through encode and collate equal transformers' padded batch; types only for bert; pad_to picks a bucket."""
    transformers = pytest.importorskip("transformers")
    rows = [{"text": a, "pair": b, "label": i % 2} for i, (a, b) in enumerate(zip(TEXTS, TEXTS[::-1]))]
    for kind in ("bert", "roberta"):
        folder = make_tokenizer(tmp_path / kind, kind)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
        split = data.encode(TASKS["rte"], rows, data.Tokenizer.from_folder(folder), 24)
        for indices in ([1], [0, 4, 2], [5, 3]):
            inputs, labels = data.collate(split, indices)
            theirs = fast(
                [rows[i]["text"] for i in indices],
                [rows[i]["pair"] for i in indices],
                padding=True,
                truncation=True,
                max_length=24,
                return_tensors="pt",
                return_token_type_ids=True,
            )
            assert torch.equal(inputs["tokens"], theirs["input_ids"])
            assert torch.equal(inputs["mask"], theirs["attention_mask"].bool())
            assert ("types" in inputs) == (kind == "bert")
            assert kind != "bert" or torch.equal(inputs["types"], theirs["token_type_ids"])
            assert labels.tolist() == [i % 2 for i in indices] and labels.dtype == torch.long
        widths = [data.collate(split, [i], pad_to=[8, 16, 20])[0]["tokens"].shape[1] for i in range(6)]
        for width, length in zip(widths, split.lengths):
            assert width == min([bucket for bucket in (8, 16, 20) if bucket >= length], default=length)
        assert len(set(widths)) > 1
    regression = data.encode(
        TASKS["stsb"], [{"text": "a", "pair": "b", "label": 2.5}], data.Tokenizer.from_folder(folder)
    )
    assert data.collate(regression, [0])[1].dtype == torch.float32


def instruction_rows(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "prompt": data.prompt(" ".join(random.choice(["fox", "dog", "the"], random.integers(1, 12)))),
            "answer": f"the correct answer is {random.integers(1, 10**6)}",
        }
        for _ in range(count)
    ]


def test_instruction_batches(tmp_path, caplog):
    """Loss positions are the answer and eos exactly; prompts are what generation needs; truncation cuts the tail."""
    tokenizer = data.Tokenizer.from_folder(make_tokenizer(tmp_path / "model", "bpe"))
    rows = instruction_rows(12)
    split = data.encode(TASKS["boolq"], rows, tokenizer)
    inputs, labels = data.collate(split, list(range(12)), pad_to=[512])
    flat, start = inputs["tokens"].view(-1), 0
    for i, row in enumerate(rows):
        answer = tokenizer.encode([row["answer"]], special=False)[0][0].tolist() + [tokenizer.eos_id]
        part = inputs["positions"][start : start + len(answer)]
        assert labels[start : start + len(answer)].tolist() == answer == flat[part + 1].tolist()
        assert (part // inputs["tokens"].shape[1] == i).all() and inputs["mask"][i].sum() == split.lengths[i]
        sentence = [tokenizer.bos_id] + tokenizer.encode([row["prompt"]], special=False)[0][0].tolist() + answer
        assert inputs["tokens"][i][inputs["mask"][i]].tolist() == sentence
        start += len(answer)
    assert start == len(labels)
    tokens, mask = data.prompts(split, [2, 7])
    for row, prompt, real in zip((2, 7), tokens, mask):
        expected = [tokenizer.bos_id] + tokenizer.encode([rows[row]["prompt"]], special=False)[0][0].tolist()
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
        assert order != data.batches(split, size, seed, epoch=4) and order != data.batches(
            split, size, seed + 1, epoch=3
        )
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in order)
        assert padded < 1.15 * sum(lengths)
        longest = [max(lengths[i] for i in batch) for batch in order[:-1]]
        assert longest[:40] != sorted(longest[:40], reverse=True)  # grouped, yet in random order
    if not shuffle:
        assert [lengths[i] for batch in order for i in batch] == sorted(lengths, reverse=True)


def test_batches_of_equal_lengths_are_in_order_without_shuffle():
    assert data.batches(data.Split("image", [], [64] * 99), 50, shuffle=False) == [[*range(50)], [*range(50, 99)]]


# ------------------------------------------------------------------------------------------------------ hyperparameters


@pytest.mark.parametrize(
    "name, family, size, expected",
    [
        ("cola", "roberta", 768, dict(lr=4e-4, batch_size=64, epochs=80, warmup=0.06, weight_decay=0.1)),  # lelora 5
        ("mnli", "bert", 384, dict(lr=5e-4, batch_size=128, epochs=30)),
        ("stsb", "roberta", 1024, dict(lr=3e-4, batch_size=16, epochs=30, warmup=0.03)),  # lelora 6
        ("qnli", "roberta", 1024, dict(lr=1e-4, batch_size=6, epochs=10)),
        ("boolq", "llama", 4096, dict(lr=3e-4, batch_size=64, epochs=3, warmup=100, dropout=0.05)),  # lelora 7
        ("instructions", "gemma", 2048, dict(lr=3e-4, batch_size=64, epochs=3, warmup=100, dropout=0.05)),
        (
            "cola",
            "llama",
            4096,
            dict(steps=1024, epochs=None, batch_size=32, alpha=32, weight_decay=1e-4),
        ),  # weightlora 10
        ("sst2", "mistral", 4096, dict(steps=128, epochs=None, dropout=0.05, max_length=512)),
        (
            "gsm8k",
            "qwen3",
            4096,
            dict(steps=5000, warmup=500, batch_size=32, alpha=32, max_length=512),
        ),  # weightlora 11
    ],
)
def test_hyperparameters_are_the_papers(name, family, size, expected):
    found, _ = data.hyperparameters(TASKS[name], family, size, "lora")
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "family, size", [("bert", 384), ("roberta", 1024), ("llama", 2048), ("qwen3", 4096), ("vit", 768)]
)
@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "weightlora"])
def test_hyperparameters_are_complete(family, size, method):
    keys = {
        "lr",
        "batch_size",
        "epochs",
        "steps",
        "warmup",
        "weight_decay",
        "max_length",
        "dropout",
        "alpha",
        "rank",
        "schedule",
    }
    for task in TASKS.values():
        found, _ = data.hyperparameters(task, family, size, method)
        assert set(found) == keys and (found["epochs"] is None) != (found["steps"] is None) and 0 < found["lr"] < 0.01


# ---------------------------------------------------------------------------------------------------------- bad input


COLA = "gj04\t1\t\tGood.\ngj04\t0\t*\tBad are.\n"
GOOD = {"instruction": "q", "input": "", "output": "the correct answer is true", "answer": "true"}


def tsv(name, text, split="train"):
    """Case: this text as a file of a GLUE task."""

    def make(folder):
        write(folder / "train.tsv", text)
        data.read(data.find_task(name, folder), folder, split)

    return make


def own(name, file, text):
    """Case: this text as the user's own file, or as training and dev file."""

    def make(folder):
        for stem in ("train", "dev"):
            path = write(folder / file.replace("train", stem), text)
        where = folder if "train" in file else path
        data.read(data.find_task(name, where), where)

    return make


def published(name, row):
    """Case: this row in the file of a published set."""

    def make(folder):
        names = TASKS[name].files["dev"]
        write(
            folder / names[0].replace("*", "flan"),
            json.dumps([row]) if names[0].endswith(".json") or name == "math" else jsonl([row]),
        )
        data.read(TASKS[name], folder, "dev")

    return make


def arrays(labels=(0, 1, 0), **more):
    def make(folder):
        np.savez(folder / "a.npz", **{"images": some_images((len(labels), 4, 4)), "labels": np.array(labels), **more})
        data.read(data.find_task("npz", folder / "a.npz"), folder / "a.npz")

    return make


def image_files(files):
    def make(folder):
        for name, content in files.items():
            write(folder / name, content)
        data.read(data.find_task("image-folder", folder), folder)

    return make


def npy(shape, dtype=np.uint8):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, dtype))
    return buffer.getvalue()


def model(files, tokens=("a",), task="cola", max_length=None, **row):
    def make(folder):
        make_tokenizer(folder, "bert")
        for name, text in files.items():
            (folder / name).unlink() if text is None else write(folder / name, text)
        row_ = {"text": "a", "label": 0, "prompt": "a", "answer": "b", **row}
        data.encode(TASKS[task], [row_], data.Tokenizer.from_folder(folder), max_length)

    return make


def image_model(**files):
    def make(folder):
        for name, value in files.items():
            write(folder / f"{name}.json", json.dumps(value))
        data.image_settings(folder)

    return make


def two_files(first, second):
    def make(folder):
        write(folder / "train.csv", first)
        write(folder / "dev.csv", second)
        data.read(data.find_task("text-classification", folder), folder, "dev")

    return make


def mrpc(folder):
    write(folder / "msr_paraphrase_train.txt", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb\n")
    data.read(TASKS["mrpc"], folder)


BAD = {
    "unknown task": (lambda folder: data.find_task("colla"), "no task 'colla': choose from cola, "),
    "negative limit": (lambda folder: data.read(TASKS["digits"], None, limit=-1), "limit -1: .*use 0 for all"),
    "unknown split": (lambda folder: data.read(TASKS["mnli"], folder, "test"), "no split 'test': .*dev_mismatched"),
    "no such folder": (
        lambda folder: data.read(TASKS["cola"], folder / "none"),
        "none/CoLA/train.tsv: no such file: correct",
    ),
    "no such file": (lambda folder: data.read(TASKS["cola"], folder), "CoLA/train.tsv: no such file.*--data"),
    "a file as folder": (
        lambda folder: data.read(TASKS["cola"], write(folder / "x.tsv", COLA)),
        "x.tsv/CoLA/.*: no such file",
    ),
    "no data": (lambda folder: data.read(TASKS["text-classification"]), "--task text-classification needs --data"),
    "no instruction data": (lambda folder: data.find_task("npz"), "--task npz needs --data"),
    "no dev ids": (mrpc, "mrpc_dev_ids.tsv: no such file"),
    "empty file": (tsv("cola", ""), "train.tsv: the file is empty"),
    "blank file": (tsv("cola", " \n\n"), "train.tsv: the file is empty"),
    "header only": (tsv("sst2", "sentence\tlabel\n"), "no train rows"),
    "not UTF-8": (tsv("cola", COLA.encode() + b"x\t1\t\tna\xefve\n"), r"train.tsv line 3: byte \d+ is not UTF-8"),
    "UTF-16": (tsv("cola", COLA.encode("utf-16")), "train.tsv line 1: byte 0 is not UTF-8"),
    "short row": (tsv("cola", COLA + "gj04\t1\tx\n"), "train.tsv line 3: 3 columns, expected 4"),
    "long row": (tsv("cola", COLA + "gj04\t1\t\ta\tb\n"), "train.tsv line 3: 5 columns, expected 4"),
    "blank line": (tsv("cola", COLA + "\n" + COLA), "train.tsv line 3: 1 columns, expected 4"),
    "missing column": (tsv("sst2", "text\tlabel\na\t1\n"), "line 2: no column 'sentence' .there are .*rename"),
    "unknown label": (tsv("cola", COLA + "gj04\t2\t\tx\n"), "train.tsv line 3: label '2' is none of .'0', '1'.:"),
    "empty label": (tsv("cola", COLA + "gj04\t\t\tx\n"), "line 3: label '' is none of"),
    "unlabelled pair": (
        tsv("mnli", mnli(["label1"], ["neutral", "-"])),
        "line 3: label '-' is none of .'entailment', 'neutral'",
    ),
    "one class": (tsv("cola", "a\t1\t\tx\nb\t1\t\ty\n"), "all labels are '1': add another class"),
    "score no number": (
        tsv("stsb", STSB + "0" + "\t-" * 6 + "\ta\tb\tfour\n"),
        "line 2: score 'four' is no number in .0, 5.",
    ),
    "score too high": (
        tsv("stsb", STSB + "0" + "\t-" * 6 + "\ta\tb\t5.5\n"),
        "line 2: score '5.5' is no number in .0, 5.",
    ),
    "score nan": (tsv("stsb", STSB + "0" + "\t-" * 6 + "\ta\tb\tnan\n"), "line 2: score 'nan'"),
    "own score infinite": (own("text-regression", "train.csv", "text,score\na,inf\nb,1\n"), "line 2: score 'inf'"),
    "label unseen in training": (
        two_files("text,label\na,x\nb,y\n", "text,label\nc,z\n"),
        "dev.csv line 2: label 'z' is none of .'x', 'y'",
    ),
    "own file without text": (
        own("text-classification", "train.csv", "words,label\na,1\n"),
        "line 2: no column 'text' .there are .'words', 'label'",
    ),
    "own file without label": (
        own("text-classification", "train.jsonl", jsonl([{"text": "a"}])),
        "line 1: no column 'label'",
    ),
    "broken CSV": (
        own("text-classification", "train.csv", 'text,label\n"a"b,1\n'),
        "train.csv line 2: .*mend the CSV quoting",
    ),
    "own short CSV row": (
        own("text-classification", "train.csv", "text,label\na\n"),
        "train.csv line 2: 1 columns, expected 2",
    ),
    "wrong suffix": (
        own("text-classification", "a.xlsx", "x"),
        "a.xlsx.*correct --data to name a file or its folder",
    ),
    "text is a number": (
        own("text-classification", "train.jsonl", jsonl([{"text": 3, "label": 1}])),
        "line 1: 'text' is int",
    ),
    "label is null": (
        own("text-classification", "train.jsonl", jsonl([{"text": "a", "label": None}])),
        "line 1: 'label' is NoneType",
    ),
    "half a surrogate pair": (
        own("instructions", "train.jsonl", '{"question": "\\ud800", "answer": "b"}'),
        "line 1: 'question' is",
    ),
    "not JSON": (
        own("instructions", "train.json", '[{"question": "a",\n "answer": }]'),
        "train.json line 2: not JSON",
    ),
    "broken JSON line": (
        own("instructions", "train.jsonl", jsonl([GOOD, GOOD]) + "{oops}\n"),
        "train.jsonl line 3: not JSON",
    ),
    "deeply nested JSON": (own("instructions", "train.json", "[" * 200_000), "train.json line 1: not JSON"),
    "JSON list of text": (own("instructions", "train.json", '["a"]'), "train.json row 1: str, expected an object"),
    "JSON number": (own("instructions", "train.json", "3"), "train.json line 1: int, expected an object"),
    "JSON line with a list": (
        own("instructions", "train.jsonl", jsonl([GOOD]) + "[3]\n"),
        "row 1: int, expected an object",
    ),
    "missing keys": (
        own("instructions", "train.jsonl", jsonl([GOOD, {"instruction": "a"}])),
        "line 2: .'instruction'.: expected",
    ),
    "no keys": (own("instructions", "train.jsonl", "{}\n"), "line 1: ..: expected instruction"),
    "empty answer": (
        own("instructions", "train.jsonl", jsonl([{"question": "a", "answer": " "}])),
        "line 1: the answer is empty",
    ),
    "answer is a number": (
        own("instructions", "train.jsonl", jsonl([{"question": "a", "answer": 4}])),
        "line 1: 'answer' is int",
    ),
    "no ####": (
        lambda folder: (
            write(folder / "train.jsonl", jsonl([{"question": "a", "answer": "4"}])),
            data.read(TASKS["gsm8k"], folder),
        ),
        "train.jsonl line 1: answer '', expected a number after ####",
    ),
    "no box": (published("math", {"problem": "a", "solution": "4"}), r"row 1: answer '', expected one in .boxed"),
    "completions are text": (
        published("ultrafeedback", {"instruction": "a", "completions": ["b"]}),
        "'completions' is str 'b'",
    ),
    "no rating": (
        published("ultrafeedback", {"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]}),
        "line 1: no column 'overall_score'",
    ),
    "rating is text": (
        published(
            "ultrafeedback", {"instruction": "a", "completions": [{"response": "b", "overall_score": "N/A"}] * 2}
        ),
        "line 1: 'overall_score' is str 'N/A'",
    ),
    "message without content": (
        published("ultrafeedback", {"prompt": "a", "chosen": [{"role": "b"}]}),
        "no column 'content'",
    ),
    "no task_id": (published("humaneval", {"prompt": "a", "canonical_solution": "b"}), "line 1: no column 'task_id'"),
    "no tests": (published("mbpp", {"text": "a", "code": "b", "task_id": 11, "test_list": []}), "line 1: no column 0"),
    "task_id is text": (
        published("mbpp", {"text": "a", "code": "b", "task_id": "11", "test_list": ["c"]}),
        "'task_id' is str '11'",
    ),
    "layout of nothing": (
        published("alpaca", {"input": "a", "output": "b"}),
        "row 1: .'input', 'output'.: expected instruction",
    ),
    "choice out of range": (
        lambda folder: (
            write(folder / "test.json", json.dumps([GOOD, {**GOOD, "answer": "maybe"}])),
            data.read(TASKS["boolq"], folder, "dev"),
        ),
        "row 2: answer 'maybe', expected true or false",
    ),
    "object arrays": (arrays(images=np.array([{}, {}, {}], object)), "a.npz: no .npz of plain arrays"),
    "not an npz": (own("npz", "a.npz", b"nonsense"), "a.npz: no .npz of plain arrays"),
    "truncated npz": (own("npz", "a.npz", b"PK\3\4 cut"), "a.npz: no .npz of plain arrays"),
    "npy called npz": (own("npz", "a.npz", npy((2, 2))), "a.npz: no .npz of plain arrays"),
    "missing array": (arrays(x_train=some_images((2, 4, 4))), "a.npz: no column 'y_train'"),
    "fewer labels": (arrays(images=some_images((4, 4, 4))), r"images \(4, 4, 4\) and labels \(3,\)"),
    "labels are floats": (arrays(labels=(0.5, 1.0, 2.0)), "float64: expected"),
    "flat images": (arrays(images=some_images((3, 16))), r"images \(3, 16\) and labels"),
    "float images": (arrays(images=np.zeros((3, 4, 4))), r"images\[.\]: float64 \(4, 4\), expected uint8"),
    "five channels": (arrays(images=some_images((3, 4, 4, 5))), r"images\[.\]: uint8 \(4, 4, 5\), expected"),
    "split of another length": (arrays(split=np.zeros(4)), r"split has shape \(4,\), expected \(3,\)"),
    "cut cifar file": (
        lambda folder: (write(folder / "train.bin", bytes(5000)), data.read(TASKS["cifar100"], folder)),
        "train.bin: 5000 bytes, no multiple of 3074",
    ),
    "cifar label": (
        lambda folder: (
            write(folder / "train.bin", bytes([0, 100]) + bytes(3072)),
            data.read(TASKS["cifar100"], folder),
        ),
        r"images\[0\]: label '100' is none of .'0', '1', ",
    ),
    "no image folder": (
        lambda folder: data.find_task("image-folder", folder),
        "no folder train: --data must name one",
    ),
    "no images": (
        lambda folder: (
            (folder / "train" / "a").mkdir(parents=True),
            data.read(data.find_task("image-folder", folder), folder),
        ),
        "no train rows",
    ),
    "mixed shapes": (
        image_files({"train/a/1.npy": npy((4, 4)), "train/b/2.npy": npy((4, 5))}),
        r"2.npy: shape \(1, 4, 5\) after \(1, 4, 4\): make",
    ),
    "object image": (image_files({"train/a/1.npy": b"\x93NUMPY\1\0junk"}), "1.npy: not an image"),
    "not an image": (image_files({"train/a/1.png": "junk"}), "1.png: not an image"),
    "no tokenizer": (model({"tokenizer.json": None}), "tokenizer.json: no such file: make it with transformers"),
    "broken tokenizer": (model({"tokenizer.json": "{}"}), "tokenizer.json: not a tokenizer"),
    "broken tokenizer config": (model({"tokenizer_config.json": "{,}"}), "tokenizer_config.json line 1: not JSON"),
    "tokenizer config is a list": (
        model({"tokenizer_config.json": "[3]"}),
        "tokenizer_config.json row 1: int, expected",
    ),
    "no room for text": (model({}, max_length=2), "max length 2 leaves no room for text"),
    "no eos": (model({}, task="boolq"), "the tokenizer has no eos token"),
    "mean of another size": (
        image_model(config={"num_channels": 1}, preprocessor_config={"image_mean": [1, 2, 3]}),
        "preprocessor_config.json: image_mean and image_std do not fit 1 channels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, name):
    """Each malformed input raises UserError with one line that names the place and a remedy."""
    make, pattern = BAD[name]
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(UserError, match=pattern) as caught:
        make(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_pillow_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="1.png: reading images needs Pillow: pip install pillow"):
        image_files({"train/a/1.png": "junk"})(tmp_path)


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


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if isinstance(content, tuple):  # a symbolic link
                info.external_attr, content = (stat.S_IFLNK | 0o777) << 16, content[0]
            file.writestr(info, content)
    return buffer.getvalue()


def serve_cola(mirror, monkeypatch, body, sha256=None):
    mirror.files["/dl.fbaipublicfiles.com/glue/data/CoLA.zip"] = body
    source = (TASKS["cola"].sources[0][:2] + (sha256 or hashlib.sha256(body).hexdigest(),),)
    monkeypatch.setitem(TASKS, "cola", replace(TASKS["cola"], sources=source))
    return TASKS["cola"]


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.suffix in (".part", ".zip", ".gz")]


def test_fetch_archive(tmp_path, mirror, monkeypatch):
    task = serve_cola(
        mirror,
        monkeypatch,
        make_zip({"CoLA/": "", "CoLA/train.tsv": COLA, "CoLA/dev.tsv": COLA, "CoLA/more.txt": "x"}),
    )
    assert len(data.read(task)) == 2 and len(data.read(task, None, "dev")) == 2
    assert len(mirror.asked) == 1  # the second read finds the files
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == ["CoLA", "dev.tsv", "train.tsv"]


def test_every_glue_task_names_its_archive():
    for name in LAYOUTS:
        assert all(address.startswith("https://") and len(sha256) == 64 for _, address, sha256 in TASKS[name].sources)
    readme = SHARED / "README.md"
    if not readme.is_file():
        pytest.skip("no ../shared: checksums not compared with its list")
    listed = readme.read_text()
    for name in LAYOUTS:
        for _, address, sha256 in TASKS[name].sources:
            assert f"`{address.removeprefix(data.FACEBOOK)}`" in listed and sha256 in listed


def test_fetch_refuses_another_checksum(tmp_path, mirror, monkeypatch):
    task = serve_cola(mirror, monkeypatch, make_zip({"CoLA/train.tsv": COLA}), sha256="0" * 64)
    with pytest.raises(UserError, match="CoLA.zip: SHA-256 is [0-9a-f]{64}, not 0{64}: the file is damaged"):
        data.read(task)
    assert not leftovers(tmp_path) and not (tmp_path / "cache" / "CoLA" / "train.tsv").exists()


def test_fetch_interrupted_then_complete(tmp_path, mirror, monkeypatch):
    body = make_zip(
        {"CoLA/train.tsv": os.urandom(50_000).hex()[:10] + "\t1\t\ta\nb\t0\t\tc\n", "CoLA/dev.tsv": os.urandom(9000)}
    )
    task = serve_cola(mirror, monkeypatch, body)
    mirror.cut.add("/dl.fbaipublicfiles.com/glue/data/CoLA.zip")
    with pytest.raises(UserError, match="the connection ended at .* run this again|cannot fetch"):
        data.read(task)
    assert not leftovers(tmp_path)
    mirror.cut.clear()
    assert len(data.read(task)) == 2


@pytest.mark.parametrize(
    "members",
    [
        {"CoLA/train.tsv": COLA, "../evil.txt": "x"},
        {"CoLA/train.tsv": COLA, "CoLA/../../evil.txt": "x"},
        {"CoLA/train.tsv": COLA, "/tmp/evil.txt": "x"},
        {"CoLA/train.tsv": COLA, "..\\evil.txt": "x"},
        {"CoLA/train.tsv": COLA, "C:\\evil.txt": "x"},
        {"CoLA/train.tsv": ("/etc/passwd",)},
    ],
)
def test_fetch_refuses_archives_that_escape(tmp_path, mirror, monkeypatch, members):
    task = serve_cola(mirror, monkeypatch, make_zip(members))
    with pytest.raises(UserError, match="refused: member .* is a link or leaves its folder"):
        data.read(task)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not Path("/tmp/evil.txt").exists()


def test_unpack_has_a_size_limit(tmp_path):
    archive = write(tmp_path / "a.zip", make_zip({"x/a": bytes(5000), "x/b": bytes(5000), "x/c": bytes(10**6)}))
    with pytest.raises(UserError, match="refused: it unpacks to more than 9999 bytes"):
        data.unpack(archive, {"x/a": tmp_path / "a", "x/b": tmp_path / "b"}, limit=9999)
    assert list(tmp_path.iterdir()) == []


def test_fetch_broken_archive(tmp_path, mirror, monkeypatch):
    task = serve_cola(mirror, monkeypatch, b"not a zip")
    with pytest.raises(UserError, match="CoLA.zip: a broken archive"):
        data.read(task)
    assert not leftovers(tmp_path)


def make_tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_fetch_cifar(tmp_path, mirror):
    rows = b"".join(bytes([0, label]) + some_images(3072, label).tobytes() for label in range(3))
    address = "/www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    for bad in ({"cifar-100-binary/train.bin": "/etc/passwd"}, {"../x": b"1"}):
        mirror.files[address] = make_tar(bad)
        with pytest.raises(UserError, match="refused: member"):
            data.read(TASKS["cifar100"])
        (tmp_path / "cache" / "checksums.json").unlink()
    mirror.files[address] = make_tar({"cifar-100-binary/train.bin": rows, "cifar-100-binary/test.bin": rows[:3074]})
    assert [len(data.read(TASKS["cifar100"], None, split)) for split in ("train", "dev")] == [3, 1]
    assert len(mirror.asked) == 3


def test_first_seen_checksum_is_remembered(tmp_path, mirror):
    address = "/raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/boolq/test.json"
    mirror.files[address] = json.dumps([GOOD]).encode()
    assert len(data.read(TASKS["boolq"], None, "dev")) == 1
    assert mirror.asked == [address]  # the training file is not needed for this
    file = tmp_path / "cache" / "boolq" / "test.json"
    known = json.loads((tmp_path / "cache" / "checksums.json").read_text())
    assert known == {"https:/" + address: hashlib.sha256(file.read_bytes()).hexdigest()}
    file.unlink()
    assert len(data.read(TASKS["boolq"], None, "dev")) == 1  # the same again
    file.unlink()
    mirror.files[address] = json.dumps([GOOD, GOOD]).encode()
    with pytest.raises(UserError, match="has changed: if you trust it, remove its line from .*checksums.json"):
        data.read(TASKS["boolq"], None, "dev")
    assert not file.exists()


def test_fetch_mrpc_and_gsm8k(mirror, monkeypatch):
    mirror.files["/raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl"] = (
        jsonl([{"question": "a", "answer": "#### 5"}] * 11).encode()
    )
    assert [row["target"] for row in data.read(TASKS["gsm8k"], None, "dev")] == ["5"] * 11
    text = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    text += b"1\t2\t3\ta\tb\r\n0\t4\t5\tc\td\r\n1\t6\t7\te\tf\r\n"
    files = {"glue/data/mrpc_dev_ids.tsv": b"4\t5\n", "senteval/senteval_data/msr_paraphrase_train.txt": text}
    mirror.files.update({"/dl.fbaipublicfiles.com/" + name: body for name, body in files.items()})
    sources = tuple(
        ("", address, hashlib.sha256(files[address.removeprefix(data.FACEBOOK)]).hexdigest())
        for _, address, _ in TASKS["mrpc"].sources
    )
    task = replace(TASKS["mrpc"], sources=sources)
    assert [row["text"] for row in data.read(task, None, "dev")] == ["c"]
    with pytest.raises(UserError, match="all labels are '1'"):
        data.read(task)


def test_fetch_a_set_in_several_files(tmp_path, mirror):
    """UltraFeedback: what was fetched before an interruption is not taken for the whole."""
    _, rows, prompts, _ = PUBLISHED["ultrafeedback"]
    addresses = ["/" + address.removeprefix("https://") for _, address, _ in TASKS["ultrafeedback"].sources]
    assert len(addresses) == 6
    mirror.files.update(dict.fromkeys(addresses[:4], jsonl(rows).encode()))
    for _ in range(2):
        with pytest.raises(UserError, match="cannot fetch .*truthful_qa.jsonl .*put it into"):
            data.read(TASKS["ultrafeedback"])
    mirror.files.update(dict.fromkeys(addresses, jsonl(rows).encode()))
    assert len(data.read(TASKS["ultrafeedback"])) + len(data.read(TASKS["ultrafeedback"], None, "dev")) == 6 * len(
        prompts
    )
    assert [mirror.asked.count(address) for address in addresses] == [1, 1, 1, 1, 3, 1]


def test_fetch_gzipped_lines(mirror):
    _, rows, prompts, _ = PUBLISHED["humaneval"]
    mirror.files["/" + TASKS["humaneval"].sources[0][1].removeprefix("https://")] = gzip.compress(jsonl(rows).encode())
    for _ in range(2):
        assert [row["prompt"] for row in data.read(TASKS["humaneval"], None, "dev")] == prompts
    assert len(mirror.asked) == 1


def test_no_network_is_one_line(tmp_path):
    """RANKS_MIRROR points at a closed port."""
    for task, verb in ((TASKS["sst2"], "unpack"), (TASKS["commonsense"], "put"), (TASKS["cifar100"], "unpack")):
        with pytest.raises(
            UserError,
            match=f"cannot fetch https://.*: download it elsewhere and {verb} it into "
            f"{tmp_path}/cache/.*, or name a folder with its files by --data",
        ) as caught:
            data.read(task)
        assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path)


def test_missing_on_the_server(mirror):
    with pytest.raises(UserError, match="cannot fetch https://raw.*HTTP Error 404"):
        data.read(TASKS["piqa"])


# ---------------------------------------------------------------------------------------------------------- real data


REAL = {
    ("cola", "glue"): (8551, 1043),
    ("sst2", "glue"): (67349, 872),
    ("stsb", "glue"): (5749, 1500),
    ("boolq", "commonsense"): (9427, 3270),
    ("obqa", "commonsense"): (4957, 500),
    ("arc-e", "commonsense"): (2251, 2376),
    ("arc-c", "commonsense"): (1119, 1172),
    ("piqa", "commonsense"): (0, 1838),
    ("siqa", "commonsense"): (0, 1954),
    ("winogrande", "commonsense"): (0, 1267),
    ("gsm8k", "."): (7473, 1319),
}


@pytest.mark.parametrize("name, folder", REAL)
def test_real_files(name, folder):
    """Every row of the real files is read; expected outputs contain their own answers."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with the real data")
    task = data.find_task(name, SHARED / folder)
    for split, count in zip(("train", "dev"), REAL[name, folder]):
        rows = data.read(task, SHARED / folder, split) if count else []
        assert len(rows) == count
        assert all(
            data.extract_answer(row["answer"], row["answers"]) == row["target"] for row in rows if "target" in row
        )


def test_real_commonsense_together():
    if not SHARED.is_dir():
        pytest.skip("no ../shared with the real data")
    task = data.find_task("commonsense", SHARED / "commonsense")
    assert task.eval_splits == ("boolq", "piqa", "siqa", "winogrande", "arc-e", "arc-c", "obqa")
    assert len(data.read(task, SHARED / "commonsense")) == 9427 + 4957 + 2251 + 1119


def test_real_text_through_a_real_tokenizer():
    if not SHARED.is_dir():
        pytest.skip("no ../shared with the real data")
    transformers = pytest.importorskip("transformers")
    folder = checkpoint("minilm")
    rows = data.read(TASKS["stsb"], SHARED / "glue", "dev", limit=300)
    split = data.encode(TASKS["stsb"], rows, data.Tokenizer.from_folder(folder), 32)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        [row["text"] for row in rows], [row["pair"] for row in rows], truncation=True, max_length=32
    )["input_ids"]
    assert [list(ids) for ids in split.tokens] == theirs
