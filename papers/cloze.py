"""Multiple choice for models too small for numbered answers: the likeliest of the answers' own texts is the model's.

    python train.py --task papers/cloze.py:arc-e --data FOLDER --model smollm2-135m

The rows are those of LLM-Adapters that `--task arc-e` reads. There, and so in the papers, a model is to write "the
correct answer is answer2" after a list of the answers, which one of 135 million parameters does not learn. Here it
reads "Question: ... Answer:" and goes on with an answer's text, as the LM Evaluation Harness asks ARC.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import TASKS, Split, collate, get, join_answers, json_rows, locate, name_unread
from eval import logits
from model import UserError, require_finite

ASKED = re.compile(r"Please choose the correct answer to the question: (.+)\n\n(Answer1: .+)\n\nAnswer format: (.+)",
                   re.S)
ANSWER = re.compile(r"(Answer\d): (.+?)(?= Answer\d: |$)", re.S)


def read_choices(task, data, split):
    """LLM-Adapters' rows as {prompt, answer: the right one, answers: the texts of all}."""
    for path in locate(task, data, split):
        for where, row in json_rows(path):
            name_unread(where, row, ("instruction", "answer", "output"))  # the last: the answer's number, in a sentence
            asked = ASKED.fullmatch(get(row, "instruction", where).strip())
            answers = {name.lower(): " " + text.strip() for name, text in ANSWER.findall(asked[2])} if asked else {}
            right = get(row, "answer", where).lower()
            if right not in answers or [*answers] != asked[3].split("/"):
                raise UserError(f"{where}: no question with Answer1: ... and {right!r} in it, each listed once in its "
                                "Answer format: mend the row")
            yield where, {"prompt": f"Question: {asked[1].strip()}\nAnswer:", "answer": answers[right],
                          "answers": [*answers.values()]}


@dataclass
class Choices(Split):
    """Prompts with their right answers, to learn; every: all answers of the rows, one after the other."""
    every: Split | None = None


def encode_choices(task, rows, tokenizer, max_length):
    """Return the Choices of rows, whole and without an eos, which no answer is judged by."""
    def texts(pairs):
        tokens, starts = join_answers(task, tokenizer, pairs)
        return dict(kind="lm", rows=rows, lengths=[*map(len, tokens)], tokens=tokens, starts=starts,
                    pad_id=tokenizer.pad_id)

    split = texts([(row["prompt"], row["answer"]) for row in rows])
    if max_length and max(split["lengths"]) > max_length:
        raise UserError(f"{task.name}: a row has {max(split['lengths'])} tokens: raise --max-length {max_length}")
    return Choices(**split, every=Split(**texts([(row["prompt"], text) for row in rows for text in row["answers"]])))


def evaluate_choices(model, task, split, batches):
    """Return {accuracy, accuracy_norm}: shares of the rows whose right answer has the highest log-probability.

    accuracy_norm: divided by the answer's number of characters (the harness's acc_norm). Ties go to the first answer.
    """
    counts = [len(row["answers"]) for row in split.rows]
    first, right = np.cumsum([0, *counts]), {"accuracy": 0, "accuracy_norm": 0}
    for indices in batches:
        chosen = [k for i in indices for k in range(first[i], first[i + 1])]
        inputs, labels = collate(split.every, chosen, device=next(model.parameters()).device)
        of = inputs["positions"] // inputs["tokens"].shape[1]                       # whose token each one is
        each = torch.log_softmax(logits(model, inputs).float(), -1).gather(-1, labels[:, None])[:, 0]
        scores = torch.zeros(len(chosen), device=each.device).index_add(0, of, each).cpu()
        require_finite(scores, model)
        for i, mine in zip(indices, scores.split([counts[i] for i in indices])):
            row = split.rows[i]
            lengths = torch.tensor([len(text.strip()) for text in row["answers"]])
            right["accuracy"] += row["answers"][mine.argmax()] == row["answer"]
            right["accuracy_norm"] += row["answers"][(mine / lengths).argmax()] == row["answer"]
    return {name: count / len(split) for name, count in right.items()}


arc_e, arc_c, obqa = (
    replace(TASKS[name], metrics=("accuracy", "accuracy_norm"), reader=read_choices, answers=None, new_tokens=0,
            encode=encode_choices, evaluate=evaluate_choices) for name in ("arc-e", "arc-c", "obqa"))
