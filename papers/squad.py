"""SQuAD 1.1 and 2.0, whose answers are parts of a text: --task papers/squad.py:squad, or :squad2.

It is also the example of a task that encodes its rows and measures the model itself. Its reader yields rows as any
task's does; Task(encode=...) makes their Split, here of several windows over a long text, and Task(evaluate=...)
returns its metrics, which `metrics` names. A Split's subclass may keep what only the latter needs. The kind says what
head the model has and what it learns: "span", the two ends of the answer.
"""

import functools
import math
import re
import string
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data import Split, Task, collate, get, json_rows, locate, note
from eval import logits
from model import UserError, require_finite


def read_squad(version2, task, data, split):
    """SQuAD's own layout, where in version 2 some questions have no answer.

    Rows are {id, text: question, pair: context, answers, span: the first one's characters or None}.
    """
    path, ids = locate(task, data, split)[0], set()
    where = path
    try:
        objects = [whole for _, whole in json_rows(path)] or [{}]  # an empty list has none
        for article in (article for whole in objects for article in whole["data"]):
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    where, span = f"{path} question {asked['id']}", None
                    row = {"id": get(asked, "id", where), "text": get(asked, "question", where),
                           "pair": get(paragraph, "context", where),
                           "answers": [get(answer, "text", where) for answer in asked["answers"]]}
                    if row["id"] in ids or not (row["answers"] or version2):
                        raise UserError(f"{where} is there twice, or has no answer: remove it, or --task "
                                        "papers/squad.py:squad2, where some have none")
                    if row["answers"]:
                        start = get(asked["answers"][0], "answer_start", where, int)
                        span = (start, start + len(row["answers"][0]))
                        if row["pair"][start:span[1]] != row["answers"][0]:
                            note(f"{path}: some answers do not stand at their answer_start, which is what is learned")
                    ids.add(row["id"])
                    yield where, row | {"span": span}
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: not SQuAD's layout ({type(error).__name__} {error}): fetch the file again") from None


# ------------------------------------------------------------------------------------------------------------- encoding

@dataclass
class Windows(Split):
    """offsets: which characters of its row's context each token is, N arrays (T, 2), -1 outside the context."""
    offsets: list | None = None


def encode_windows(task, rows, tokenizer, max_length, overlap=128, longest=64):
    """Return the Windows over the rows' contexts, each after its question's first `longest` tokens.

    Windows of a context overlap by `overlap` tokens. labels (N, 2): first and last token of the answer; 0, 0 ([CLS])
    if there is none, or not all of it is in the window. Source: transformers' run_qa.py.
    """
    backend = tokenizer.backend
    least = longest + backend.num_special_tokens_to_add(True) + overlap + 1
    if max_length < least:
        raise UserError(f"max length {max_length} leaves no room for a question and a text: use at least {least}")
    split = Windows(task.kind, [], [], tokens=[], types=[], offsets=[], pad_id=tokenizer.pad_id)
    labels = []
    for row in tqdm(rows, "tokenizing", leave=False, disable=len(rows) < 10_000):
        question = row["text"].lstrip()
        cut = backend.encode(question, add_special_tokens=False).offsets[:longest]
        backend.enable_truncation(max_length, stride=overlap, strategy="only_second")
        encoding = backend.encode(question[:cut[-1][1] if cut else 0], row["pair"])
        backend.no_truncation()
        for window in (encoding, *encoding.overflowing):
            context = np.flatnonzero(np.array(window.sequence_ids) == 1)
            offsets = np.full((len(window), 2), -1, np.int32)
            offsets[context] = np.array(window.offsets)[context]
            (starts, ends), span, label = offsets[context].T, row["span"], (0, 0)
            if span and len(context) and starts[0] <= span[0] and span[1] <= ends[-1]:
                first, last = np.searchsorted(starts, span[0], side="right") - 1, np.searchsorted(ends, span[1])
                label = (context[first], context[last])
            labels.append(label)
            split.rows.append(row)
            split.lengths.append(len(window))
            split.tokens.append(np.array(window.ids, np.int32))
            split.types.append(np.array(window.type_ids, np.int32))
            split.offsets.append(offsets)
    split.labels = torch.tensor(np.array(labels))
    split.types = split.types if tokenizer.types else None
    return split


# ----------------------------------------------------------------------------------------------------------- evaluation

def best_span(logits, offsets, candidates=20, longest=30):
    """Return (score, start, end) of a window's best answer, characters of the context; score -inf where there is none.

    Score: the sum of the logits (T, 2) of first and last token, each among the likeliest `candidates`, of `longest`
    tokens at most. Source: postprocess_qa_predictions in transformers' utils_qa.py.
    """
    first, last = np.argsort(-logits, axis=0, kind="stable")[:candidates].T
    first = first[:, None]
    start, end = offsets[first, 0], offsets[last, 1]
    fits = (start >= 0) & (end > start) & (first <= last) & (last < first + longest)  # (candidates, candidates)
    scores = np.where(fits, logits[first, 0] + logits[last, 1], -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return (scores[i, j], start[i, 0], end[j]) if fits.any() else (-math.inf, 0, 0)


def plain(text):
    """Lower case without punctuation, articles and further spaces, as SQuAD's evaluation scripts compare answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(found, answers, version2=False):
    """(exact match, F1 of words) of an answer, with the best of the right `answers`; the numbers of SQuAD's scripts.

    In version 2 right answers without words do not count; where none is left, no answer "" is the right one.
    """
    found, rights, f1s = plain(found), [plain(text) for text in answers], []
    if version2:
        rights = [right for right in rights if right] or [""]
    for right in rights:
        common = sum((Counter(found.split()) & Counter(right.split())).values())
        both = len(found.split()) + len(right.split())
        f1s.append(2 * common / both if common else float(version2 and both == 0))
    return float(found in rights), max(f1s)


def evaluate_windows(version2, model, task, split, batches):
    """Exact match and F1 of the best answer in all windows of a question; squad2: or of none, if that scores more.

    No answer scores what it does in the window that finds it least likely (transformers' utils_qa.py, threshold 0).
    """
    best, none = {}, {}
    for indices in batches:
        inputs, _ = collate(split, indices)
        outputs = logits(model, inputs).float()     # (B, T, 2)
        require_finite(outputs, model)
        for i, output in zip(indices, outputs.cpu().numpy()):
            row, output = split.rows[i], output[:split.lengths[i]]
            score, start, end = best_span(output, split.offsets[i])
            best[row["id"]] = max(best.get(row["id"], (-math.inf,)), (score, row["pair"][start:end], row["answers"]))
            none[row["id"]] = min(none.get(row["id"], math.inf), output[0].sum())
    scores = []
    for name, (score, text, answers) in best.items():
        text = "" if version2 and none[name] > score else text
        scores.append(answer_scores(text, answers, version2))
    return dict(zip(task.metrics, np.mean(scores, axis=0).tolist()))


# ------------------------------------------------------------------------------------------------------------ the tasks

def version(name, number, epochs):
    """Return the row of a version of SQuAD, with weightlora Table 12's settings but for half its batch, and length 384."""
    files = {split: (f"{split}-{number}.json", f"{split}.json") for split in ("train", "dev")}
    sources = tuple((split, f"https://rajpurkar.github.io/SQuAD-explorer/dataset/{names[0]}", None)
                    for split, names in files.items())
    base, reader = (3e-4, 32, epochs), functools.partial(read_squad, number == "v2.0")
    return Task(name, "span", ("exact_match", "f1"), reader, (), files, name, sources, base=base, large=base,
                settings=dict(warmup=100, weight_decay=1e-4, alpha=32, dropout=0.05), max_length=384,
                encode=encode_windows, evaluate=functools.partial(evaluate_windows, number == "v2.0"))


squad = version("squad", "v1.1", 10)
squad2 = version("squad2", "v2.0", 15)
