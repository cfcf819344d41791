"""Model cards: what a run was and how to load what it left, in its folder and in the one that people upload."""

import json
import re
from pathlib import Path

import numpy as np

import data
import lora
import model as models
from allocators import policy
from eval import read_log, read_run
from extras.report import markdown

# by kind of task: transformers' class, the Hub's name for what it does
AUTO = {"lm": ("AutoModelForCausalLM", "text-generation"),
        "image": ("AutoModelForImageClassification", "image-classification"),
        "span": ("AutoModelForQuestionAnswering", "question-answering"),
        "classify": ("AutoModelForSequenceClassification", "text-classification"),
        "regress": ("AutoModelForSequenceClassification", "text-classification")}


def write_cards(folder, train_rows):
    """Write the model card of a finished run into its folder, and into adapter/ or model/, which people upload.

    Names that a user chose appear as code spans or as JSON strings (which Python and YAML read), so they break nothing.
    """
    folder = Path(folder)
    s, labels = read_run(folder)
    log, ranks = read_log(folder / "metrics.jsonl"), read_log(folder / "ranks.jsonl")[-1]
    task, adapter, base = data.task_row(s.task), (folder / "adapter").is_dir(), models.HUB.get(s.model, s.model)
    method = s.method.rpartition(":")[2]  # of one in a file: without the path, which is nobody's business
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII) and not Path(s.model).is_dir()
    front = {"base_model": base} if on_hub else {}  # the Hub refuses names that are not its own
    front |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": AUTO[task.kind][1],
              "tags": list(dict.fromkeys(["lora"] * adapter + [method, task.name]))}
    name = " ".join((base if on_hub else Path(base).name).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))  # longer than any in the name
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "",
             f"# {method} on {task.name}, from {fence} {name} {fence}", ""]
    before, after = log[0].get("eval", {}) if log[0]["step"] == 0 else {}, log[-1]["eval"]
    rows = [[key, *("" if m.get(key) is None else f"{m[key]:.4f}" for m in (before, after))]
            for key in after if key != "eval_rows"]
    lines += markdown([f"after {log[-1]['step']:,} steps", "before", "after"], rows)
    now, mean, peak = log[-1]["trainable_params"].values()
    lines += [f"Trained on {train_rows:,} rows; evaluated on {after['eval_rows']:,} rows.", "",
              f"Trainable parameters besides the head: {now:,} (mean {mean:,}, peak {peak:,}).", ""]
    shown = ("seed", "rank", "alpha", "dropout", "targets", "scaling", "init", "dora", "lora_plus_ratio", "freeze_a",
             "lr", "schedule", "warmup", "weight_decay", "clip", "batch_size", "accumulate", "epochs", "max_length",
             "limit_train", "limit_eval", "dtype")
    unused = {*policy(s.method).unread, *policy(s.method).refuses}
    values = {key: getattr(s, key, None) for key in shown if key not in unused}
    if "targets" in values:
        values["targets"] = ", ".join(s.targets or [])
    lines += markdown(["setting", "value"], [[key, value] for key, value in values.items()
                                             if value not in (None, "") and value is not False])
    if ranks["ranks"]:
        image, kinds = grid(ranks["ranks"])
        rows = [[i, *("" if np.isnan(rank) else f"{rank:.0f}" for rank in row)] for i, row in enumerate(image)]
        lines += markdown([f"rank at step {ranks['step']:,}: block", *kinds], rows)
    part = "adapter" if adapter else "model"
    for place, path in ((folder, part), (folder / part, ".")):
        code = ["```python", *loading_code(s, labels, task.kind, base, adapter, path), "```", ""]
        if adapter and s.init_weights == "random":
            code = ["The base model is no checkpoint: its weights were drawn at random.", ""]
        (place / "README.md").write_text("\n".join(lines + code), encoding="utf-8", errors="backslashreplace")


def loading_code(s, labels, kind, base, adapter, path):
    """Lines of Python that load the adapter at `path` with PEFT, or the model there with transformers."""
    auto, text = AUTO[kind][0], kind != "image"
    lines = [f"from transformers import {auto}" + ", AutoTokenizer" * text]
    if adapter:
        base = str(models.resolve(base)) if base == "vit-digits" else base
        outputs = {"regress": "num_labels=1", "span": "num_labels=2"}.get(kind, f"id2label={dict(enumerate(labels))!a}")
        options = "" if kind == "lm" else f", {outputs}, ignore_mismatched_sizes=True"
        lines += ["from peft import PeftModel", "", f"base = {json.dumps(base)}",
                  f'model = {auto}.from_pretrained(base, dtype="{s.dtype}"{options})',
                  f'model = PeftModel.from_pretrained(model, "{path}").eval()  # or where you put these files']
    else:
        lines += ["", f'base = "{path}"  # or where you put these files', f"model = {auto}.from_pretrained(base)"]
    if text:
        lines += ["tokenizer = AutoTokenizer.from_pretrained(base)",
                  "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
                  "model.config.pad_token_id = tokenizer.pad_token_id"]
    return lines


def grid(values):
    """{"blocks.3.query": number} as (array (blocks, kinds) with nan where there is no such matrix, kinds)."""
    kinds = [kind for kind in lora.TARGETS if any(name.endswith(f".{kind}") for name in values)]
    image = np.full((1 + max(int(name.split(".")[1]) for name in values), len(kinds)), np.nan)
    for name, value in values.items():
        _, block, kind = name.split(".")
        image[int(block), kinds.index(kind)] = value
    return image, kinds
