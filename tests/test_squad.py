"""SQuAD: reading, windows, answers and scores against transformers' tokenizers and models and the official scripts' rules."""

import json
import os
import random
import re
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import eval as evaluation
import model as models
import train
from model import UserError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
WORDS = "the river runs north of an old town where Zoë's 12 mills, grinding corn, stood until 1849 (a flood) came down".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write(folder, questions, contexts=1, version2=False, seed=0):
    """train.json and dev.json in SQuAD's layout: which word follows a word, in contexts of up to 160 words."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        paragraphs = []
        for n in range(contexts):
            context = "  ".join(rng.choices(WORDS, k=(40, 160, 90)[n % 3])) + "."
            starts = [match.start() for match in re.finditer(r"\S+", context)]
            asked = []
            for k in range(questions):
                first = rng.randrange(len(starts) - 3)
                begin, end = starts[first], starts[first + rng.randrange(1, 4)] - 2
                answers = [{"text": context[begin:end], "answer_start": begin}, {"text": "the flood", "answer_start": 0}]
                question = f"  What is after {context[:begin].split()[-1:]}?" + " why" * 70 * (k == 1)
                asked.append({"id": f"{split}-{n}-{k}", "question": question, "answers": answers})
                if version2 and k % 3 == 2:
                    asked[-1].update(answers=[], plausible_answers=answers, is_impossible=True)
            paragraphs.append({"context": context, "qas": asked})
        file = {"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(file, indent=1 if split == "dev" else None))
    return folder


def make_model(folder, family, **other):
    """A small random model with a word-piece, byte-level or SentencePiece-like tokenizer, as transformers saves them."""
    special = [("[CLS]", 2), ("[SEP]", 3)]
    if family == "roberta":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=360, show_progress=False, special_tokens=PIECES,
                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    elif family == "deberta":
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=90, show_progress=False, special_tokens=PIECES,
                                                     unk_token="[UNK]")
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, show_progress=False, special_tokens=PIECES)
    backend.train_from_iterator([" ".join(WORDS), "What is after the first why?"] * 9, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]",
                                                sep_token="[SEP]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    relative = dict(relative_attention=True, pos_att_type="c2p|p2c", share_att_key=True, position_buckets=32,
                    position_biased_input=False, norm_rel_ebd="layer_norm")
    prefix = {"bert": "Bert", "roberta": "Roberta", "deberta": "DebertaV2"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=300, **(relative if family == "deberta" else {}), **other)
    getattr(transformers, f"{prefix}Model")(config).save_pretrained(folder)
    return fast


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_windows_and_labels(family, tmp_path):
    """Ids, offsets and labels are those of transformers' tokenizer with run_qa's settings and rules, long texts included."""
    fast = make_model(tmp_path / "model", family)
    rows = data.read(data.TASKS["squad2"], write(tmp_path / "data", 6, 3, version2=True), "train")
    split = data.encode(data.TASKS["squad2"], rows, data.Tokenizer.from_folder(tmp_path / "model"), 256)
    questions = [row["text"].lstrip() for row in rows]
    for i, question in enumerate(questions):
        spans = fast(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        questions[i] = question[:spans[63][1]] if len(spans) > 64 else question
    theirs = fast(questions, [row["pair"] for row in rows], truncation="only_second", max_length=256, stride=128,
                  return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True)
    assert [list(ids) for ids in split.tokens] == theirs["input_ids"] and len(split) > len(rows) + 3
    assert family == "roberta" or split.types is None or [list(t) for t in split.types] == theirs["token_type_ids"]
    found = 0
    for i, (number, offsets) in enumerate(zip(theirs["overflow_to_sample_mapping"], theirs["offset_mapping"])):
        inside = [n for n, sequence in enumerate(theirs.sequence_ids(i)) if sequence == 1]
        expected = np.full((len(offsets), 2), -1)
        expected[inside] = [offsets[n] for n in inside]
        assert split.rows[i] is rows[number] and (split.offsets[i] == expected).all()
        first = last = 0
        if rows[number]["span"]:
            begin, end = rows[number]["span"]
            if offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end:
                first = max(n for n in inside if offsets[n][0] <= begin)
                last = min(n for n in inside if offsets[n][1] >= end)
                found += 1
                assert rows[number]["pair"][offsets[first][0]:offsets[last][1]].strip() == rows[number]["answers"][0]
        assert split.labels[i].tolist() == [first, last]
    assert found >= len(rows) / 2


def best_answer(windows, context, version2):
    """utils_qa.py's rules in plain loops: 20 likeliest starts and ends, at most 30 tokens, null threshold 0."""
    candidates, null = [], min(start[0] + end[0] for start, end, _ in windows)
    for start, end, offsets in windows:
        for i in sorted(range(len(start)), key=lambda n: start[n], reverse=True)[:20]:
            for j in sorted(range(len(end)), key=lambda n: end[n], reverse=True)[:20]:
                if offsets[i][0] >= 0 and offsets[j][0] >= 0 and i <= j < i + 30:
                    candidates.append((start[i] + end[j], context[offsets[i][0]:offsets[j][1]]))
    score, text = max(candidates, default=(-np.inf, ""))
    return "" if version2 and null > score else text


def words_of(text):
    kept = [c for c in text.lower() if c not in string.punctuation]
    return re.sub(r"\b(?:the|an|a)\b", " ", "".join(kept)).split()


def official(found, golds, version2):
    """The rules of evaluate-v1.1.py and evaluate-v2.0.py: (exact, F1) of one question."""
    golds = ([gold for gold in golds if words_of(gold)] or [""]) if version2 else golds
    exact, f1 = [], []
    for gold in golds:
        a, b = words_of(found), words_of(gold)
        exact.append(float(" ".join(a) == " ".join(b)))
        left, same = list(b), 0
        for word in a:
            if word in left:
                left.remove(word)
                same += 1
        if version2 and not (a and b):
            f1.append(float(a == b))
        else:
            precision, recall = same / max(1, len(a)), same / max(1, len(b))
            f1.append(2 * precision * recall / (precision + recall) if same else 0.0)
    return max(exact), max(f1)


HARD = [("The  Mill!", ["mill"]), ("a", ["the"]), ("", []), ("x", []), ("", ["A."]), ("an old-town", ["old town", "oldtown"]),
        ("theory", ["the ory"]), ("12,000", ["12000"]), ("of of the town", ["of town town"]), ("Zoë’s", ["zoë's", "ZOË’S"]),
        ("", ["mill"]), ("mill", ["the", "mill corn", "corn mill mill"]), ("A\u00a0mill\n", ["a mill"]), ("the", ["the", ""])]


@pytest.mark.parametrize("version2", [False, True])
def test_scores_are_the_official_scripts(version2):
    rng = random.Random(1)
    pick = [*WORDS, "the", "a", "an", "The", ",", "'", "A.", "the-"]
    cases = HARD + [(" ".join(rng.choices(pick, k=rng.randrange(5))),
                     [" ".join(rng.choices(pick, k=rng.randrange(5))) for _ in range(rng.randrange(1, 4))]) for _ in range(500)]
    for found, golds in cases:
        if golds or version2:
            assert evaluation.answer_scores(found, golds, version2) == pytest.approx(official(found, golds, version2), abs=1e-12)


@pytest.mark.parametrize("family, name", [("bert", "squad"), ("roberta", "squad2"), ("deberta", "squad2")])
def test_a_run_and_its_answers(family, name, tmp_path, capsys):
    """Trained on, evaluated and loaded in PEFT: the same logits, and the scores of the rules above on these logits."""
    make_model(tmp_path / "model", family)
    folder, task = write(tmp_path / "data", 6, 3, version2=name == "squad2"), data.TASKS[name]
    train.main(["--model", str(tmp_path / "model"), "--task", name, "--data", str(folder), "--out", str(tmp_path / "run"),
                "--steps", "12", "--batch-size", "8", "--lr", "0.02", "--max-length", "256", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    _, _, processor, ours = evaluation.load_run(tmp_path / "run", {})
    base = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval().base_model  # whose wrapper drops token types
    rows, scores = data.read(task, folder, "dev"), []
    for row in rows:
        split = processor.encode([row], 256) if hasattr(processor, "encode") else processor.training([row], 256)
        windows = []
        for i in range(len(split)):
            inputs, _ = data.collate(split, [i])
            types = {"token_type_ids": inputs["types"]} if "types" in inputs else {}
            with torch.no_grad():
                output = theirs(inputs["tokens"], attention_mask=inputs["mask"].long(), **types)
                torch.testing.assert_close(ours(**inputs)[..., 1], output.end_logits, rtol=0, atol=1e-4)
            windows.append((output.start_logits[0].numpy(), output.end_logits[0].numpy(), split.offsets[i]))
        scores.append(official(best_answer(windows, row["pair"], name == "squad2"), row["answers"], name == "squad2"))
    exact, f1 = np.mean(scores, axis=0)
    assert (result["exact_match"], result["f1"]) == pytest.approx((exact, f1)) and result["before"]["f1"] != f1
    assert result["eval_rows"] == len(rows) == 18
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "QUESTION_ANS" and saved["modules_to_save"] == ["qa_outputs"]
