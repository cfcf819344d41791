"""SQuAD against transformers' tokenizers and models, the rules of run_qa.py and of the official scripts."""

import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_tokenizer, read_bad, write
from test_model import saved

import data
import eval as evaluation
import train
from papers import squad

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
WORDS = "the river runs north of an old town where Zoë's 12 mills, grinding corn, stood till 1849 (a flood)".split()


def questions(split, version2, rng=random.Random(0)):
    """SQuAD's layout, with contexts of one and of several windows; a question is very long."""
    paragraphs = []
    for n, length in enumerate((40, 160, 90)):
        words, asked = rng.choices(WORDS, k=length), []
        starts, context = np.cumsum([0] + [len(word) + 2 for word in words]), "  ".join(words) + "."
        for k in range(6):
            first = rng.randrange(length - 4)
            text = context[starts[first]:starts[first + rng.randrange(1, 4)] - 2]
            answers = [{"text": text, "answer_start": int(starts[first])}, {"text": "the flood", "answer_start": 0}]
            row = {"id": f"{split}{n}{k}", "question": f"  What is after {words[first - 1]}" + " old" * 70 * (k == 1)}
            unanswered = version2 and k % 3 == 2
            asked.append({**row, "answers": [] if unanswered else answers, "is_impossible": unanswered})
        paragraphs.append({"context": context, "qas": asked})
    return {"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}


def prepare(folder, family, version2):
    """Write data and a small model; returns its tokenizer: word-piece, byte-level or like SentencePiece's."""
    for split in ("train", "dev"):
        parts = {"data": []}, questions(split, version2)  # all are read
        write(folder / "data" / f"{split}.json", "\n".join(map(json.dumps, parts)))
    kind = {"bert": "Bert", "roberta": "Roberta", "deberta": "DebertaV2"}[family]
    make_tokenizer(folder / "model", kind, texts=[" ".join(WORDS) + " What is after."])
    fast = transformers.AutoTokenizer.from_pretrained(folder / "model")
    saved(family, folder / "model", vocab_size=len(fast), max_position_embeddings=300, pad_token_id=0)
    return fast


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_windows_and_labels(family, tmp_path):
    fast = prepare(tmp_path, family, True)
    rows = data.read(data.replace(squad.squad2, name="mine"), tmp_path / "data", "train")
    split = data.encode(squad.squad2, rows, data.Tokenizer.from_folder(tmp_path / "model"), 256)
    asked = [row["text"].lstrip() for row in rows]
    for i, spans in enumerate(fast(asked, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]):
        asked[i] = asked[i][:spans[63][1]] if len(spans) > 64 else asked[i]
    theirs = fast(asked, [row["pair"] for row in rows], truncation="only_second", max_length=256, stride=128,
                  return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True)
    assert [list(ids) for ids in split.tokens] == theirs["input_ids"] and len(split) > len(rows) == split.count_rows()
    assert (family == "bert") == (split.types is not None)
    assert split.types is None or [list(types) for types in split.types] == theirs["token_type_ids"]
    for i, (number, offsets) in enumerate(zip(theirs["overflow_to_sample_mapping"], theirs["offset_mapping"])):
        inside = [n for n, sequence in enumerate(theirs.sequence_ids(i)) if sequence == 1]
        assert split.rows[i] is rows[number]
        assert split.offsets[i].tolist() == [list(o) if n in inside else [-1, -1] for n, o in enumerate(offsets)]
        (begin, end), label = rows[number]["span"] or (-1, -1), [0, 0]
        if offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end:
            label = [max(n for n in inside if offsets[n][0] <= begin), min(n for n in inside if offsets[n][1] >= end)]
            assert rows[number]["answers"][0] == rows[number]["pair"][offsets[label[0]][0]:offsets[label[1]][1]].strip()
        assert split.labels[i].tolist() == label
    assert (split.labels > 0).all(1).sum() > 8 and sum(row["span"] is None for row in rows) == 6


def best_answer(windows, context, version2):
    """utils_qa.py's rules in plain loops: 20 likeliest starts and ends, up to 30 tokens, threshold 0."""
    found, null = [(-np.inf, "")], min(start[0] + end[0] for start, end, _ in windows)
    for start, end, offsets in windows:
        for i in sorted(range(len(start)), key=lambda n: -start[n])[:20]:
            for j in sorted(range(len(end)), key=lambda n: -end[n])[:20]:
                if offsets[i][0] >= 0 and offsets[j][0] >= 0 and i <= j < i + 30:
                    found.append((start[i] + end[j], context[offsets[i][0]:offsets[j][1]]))
    score, text = max(found)
    return "" if version2 and null > score else text


def words_of(text):
    return re.sub(r"\b(?:the|an|a)\b", " ", text.lower().translate({ord(c): None for c in string.punctuation})).split()


def official(found, golds, version2):
    """(exact, F1) by the rules of evaluate-v1.1.py and evaluate-v2.0.py."""
    golds, a, scores = [words_of(gold) for gold in golds], words_of(found), []
    for b in ([gold for gold in golds if gold] or [[]]) if version2 else golds:
        same = sum(min(a.count(word), b.count(word)) for word in {*a})
        f1 = 2 * same / len(a) * same / len(b) / (same / len(a) + same / len(b)) if same else float(version2 and a == b)
        scores.append((float(a == b), f1))
    return tuple(map(max, zip(*scores)))


HARD = [("The  Mill!", ["mill"]), ("a", ["the"]), ("", []), ("x", []), ("", ["A."]), ("", ["mill"]),
        ("the", ["the", ""]), ("an old-town", ["old town", "oldtown"]), ("theory", ["the ory"]), ("12,000", ["12000"]),
        ("of of the town", ["of town town"]), ("mill", ["the", "mill corn", "corn mill mill"]),
        ("Zoë’s", ["zoës", "ZOË’S"]), ("A\u00a0mill\n", ["a mill"])]


@pytest.mark.parametrize("version2", [False, True])
def test_scores_are_those_of_the_official_scripts(version2):
    rng, words = random.Random(1), [*WORDS, "the", "a", "an", "The", ",", "'", "A.", "the-"]
    made = [[" ".join(rng.choices(words, k=rng.randrange(5))) for _ in range(rng.randrange(2, 5))] for _ in range(500)]
    for found, golds in HARD + [(texts[0], texts[1:]) for texts in made]:
        if golds or version2:
            ours = squad.answer_scores(found, golds, version2)
            assert ours == pytest.approx(official(found, golds, version2), abs=1e-12)


@pytest.mark.parametrize("family, name", [("bert", "squad"), ("roberta", "squad2"), ("deberta", "squad2")])
def test_a_run_and_its_answers(family, name, tmp_path, capsys, monkeypatch):
    version2 = name == "squad2"
    prepare(tmp_path, family, version2)
    train.main(["--model", str(tmp_path / "model"), "--task", f"{squad.__file__}:{name}", "--steps", "12", "--data",
                str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--batch-size", "8", "--lr", "0.02",
                "--max-length", "256"])
    result, (_, _, processor, ours) = json.loads(capsys.readouterr().out), evaluation.load_run(tmp_path / "run", {})
    monkeypatch.chdir(tmp_path / "run")
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], loaded := {})
    theirs = loaded["model"].base_model  # without PEFT's class for question answering, which drops token types
    rows, scores = data.read(getattr(squad, name), tmp_path / "data", "dev"), []
    for row in rows:
        split, windows = processor.encoded([row], 256), []
        for i in range(len(split)):
            inputs, _ = data.collate(split, [i])
            types = {"token_type_ids": inputs["types"]} if "types" in inputs else {}
            with torch.no_grad():
                output = theirs(inputs["tokens"], attention_mask=inputs["mask"].long(), **types)
                torch.testing.assert_close(ours(**inputs)[..., 1], output.end_logits, rtol=0, atol=1e-4)
            windows.append((output.start_logits[0].numpy(), output.end_logits[0].numpy(), split.offsets[i]))
        found = best_answer(windows, row["pair"], version2)
        scores.append(official(found, row["answers"], version2))
    assert (result["exact_match"], result["f1"]) == pytest.approx(tuple(np.mean(scores, axis=0)))
    assert result["before"]["f1"] != result["f1"] > 0 and result["eval_rows"] == len(rows) == 18
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "QUESTION_ANS" and saved["modules_to_save"] == ["qa_outputs"]


def test_best_span():
    rng, context = np.random.default_rng(0), "".join(map(chr, range(200, 300)))  # no character twice
    for length in [0, 1, 2, 15, 25, *rng.integers(30, 100, 90)]:
        inside = [[n // 2, n // 2 + 1] for n in range(length)]  # as of bytes: two tokens are one character
        offsets = np.array([[-1, -1]] * 3 + inside + [[-1, -1]])
        trend = np.outer(np.arange(len(offsets)), (1, -1)) * rng.choice([0, 0.05, 0.2])
        logits = rng.normal(size=(len(offsets), 2)) + trend
        score, start, end = squad.best_span(logits, offsets)
        assert context[start:end] == best_answer([(*logits.T, offsets)], context, False)
        assert (score == -np.inf) == (start == end)


@pytest.mark.parametrize("change, part", [
    (dict(id="dev00"), "twice"), (dict(answers=[]), "squad2"), (dict(question=None), "question"),
    (dict(answers=[{"answer_start": 3}]), "text"), (dict(answers=5), "SQuAD's layout"),
    (dict(answers=[{"text": "a", "answer_start": "3"}]), "answer_start"), (None, "SQuAD's layout")])
def test_bad_files_are_one_line(change, part, tmp_path):
    file = questions("dev", False)
    file["data"][0]["paragraphs"][0]["qas"][3].update(change or {})
    read_bad(tmp_path, f"{squad.__file__}:squad", {"dev.json": file if change else []}, f"dev.json.*{part}", "dev")
