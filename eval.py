"""Metrics, evaluation of a checkpoint or a run, generation scoring, reports and plots.

    python eval.py runs/lora-vit-digits-digits-rot90-0           # a run again: the identical numbers
    python eval.py roberta-base --task cola --data glue/         # an untouched model
    python eval.py roberta-base --task cola --adapter FOLDER     # an adapter that PEFT made, say
    python eval.py merge runs/lora-roberta-base-cola-0 merged    # a checkpoint with the adapter in its weights
    python eval.py --plot runs/lalora-minilm-stsb-0              # pictures of a run (needs matplotlib)
    python eval.py --plot runs/quality/*                         # pictures of a comparison

The last line on stdout is one JSON object with the result.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import lora
import model as models
from model import UserError


# ---------------------------------------------------------------------------------------------- metrics


def accuracy(predictions, labels):
    """Share of predictions that equal their label; arrays (N,)."""
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    """Harmonic mean of precision and recall of class 1; 0 where neither exists; arrays (N,) of 0 and 1."""
    hits = np.sum((predictions == 1) & (labels == 1))
    claimed_and_true = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / claimed_and_true) if claimed_and_true else 0.0


def matthews(predictions, labels):
    """Matthews correlation coefficient for any number of classes; 0 where either side is constant; arrays (N,)."""
    classes = np.union1d(predictions, labels)
    predicted, true = predictions[:, None] == classes, labels[:, None] == classes  # (N, C)
    n, p, t = len(labels), predicted.sum(0, dtype=float), true.sum(0, dtype=float)
    variances = (n * n - p @ p) * (n * n - t @ t)
    return float((n * np.sum(predicted & true) - p @ t) / math.sqrt(variances)) if variances else 0.0


def pearson(predictions, labels):
    """Pearson correlation; nan where either side is constant or there are fewer than two; arrays (N,)."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (predictions, labels))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y), -1, 1))


def spearman(predictions, labels):
    """Spearman correlation: Pearson's of the ranks, ties given their mean rank; arrays (N,)."""
    return pearson(_mean_ranks(predictions), _mean_ranks(labels))


def _mean_ranks(values):
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, task, split, batch_size, tokenizer=None, generate=True, score="generation", samples=None):
    """Measure the model on one split: {metric name: number}, the task's own metrics.

    Language models also get `loss` and `perplexity` per answer token, and with `generate` the share of rows whose
    answer is right: what the task extracts from the text that the model generates, or with score="likelihood" the one
    of the allowed answers with the highest log-probability (not divided by length: they are about as long). A list
    `samples` gets a dict per generated text. The order of rows and batches is fixed, so the same weights on the same
    machine give the same numbers.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = data.batches(split, batch_size, seed=0, epoch=0, shuffle=False)
    bar = tqdm(order, "evaluating", unit="batch", leave=False, dynamic_ncols=True, disable=None)  # None: no terminal
    if task.kind == "lm":
        result = _perplexity(model, split, bar, device)
        if generate and score == "likelihood":
            likeliest = [words[scores.argmax()] == row["target"]
                         for row, words, scores in log_likelihoods(model, split, batch_size, tokenizer)]
            result["accuracy"] = float(np.mean(likeliest))
        elif generate and task.new_tokens:
            result |= _generated(model, task, split, batch_size, tokenizer, device, samples)
    else:
        outputs, labels = [], []
        for indices in bar:
            inputs, label = data.collate(split, indices)
            output = logits(model, inputs).float()  # (B, C)
            outputs.append(output.squeeze(-1) if task.kind == "regress" else output.argmax(-1))
            labels.append(label)
        outputs, labels = torch.cat(outputs).cpu().numpy(), torch.cat(labels).numpy()
        result = {name: METRICS[name](outputs, labels) for name in task.metrics}
    model.train(was_training)
    return result


def logits(model, inputs):
    """Run the model on a batch of `data.collate`, moved to the model's device."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    if isinstance(model, models.Decoder):
        inputs["right_padded"] = True  # as collate pads: causal attention then needs no mask
    return model(**inputs)


def _perplexity(model, split, batches, device):
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for indices in batches:
        inputs, labels = data.collate(split, indices)
        total += F.cross_entropy(logits(model, inputs).float(), labels.to(device), reduction="sum")  # (N, V)
        count += labels.numel()
    loss = (total / max(1, count)).item()
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _generated(model, task, split, batch_size, tokenizer, device, samples):
    """Share of rows whose generated answer is right, under the task's headline name; rows sorted by prompt length."""
    def stopped(ids):  # the newest tokens decide, each of which is a character or more
        texts = tokenizer.backend.decode_batch(ids[:, -1 - max(map(len, task.stop)):].tolist())
        return torch.tensor([any(stop in text for stop in task.stop) for text in texts], device=device)

    hits, new_tokens, written, ends = 0, 0, {}, {*tokenizer.eos_ids, tokenizer.pad_id}
    scored = "target" in split.rows[0]
    order = sorted(range(len(split)), key=lambda i: -split.starts[i])
    with tqdm(total=len(order), desc="generating", unit="row", leave=False, dynamic_ncols=True,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start:start + batch_size]
            tokens, mask = (t.to(device) for t in data.prompts(split, indices))
            output = models.generate(model, tokens, mask, task.new_tokens, tokenizer.eos_ids, tokenizer.pad_id,
                                     stopped if task.stop else None)
            for i, ids in zip(indices, output.tolist()):
                row, prompt = split.rows[i], split.tokens[i][:split.starts[i]]
                ids = ids[:next((n for n, token in enumerate(ids) if token in ends), len(ids))]
                new_tokens += len(ids)
                text = tokenizer.decode(ids, prompt)
                text = text[:min((text.find(stop) for stop in task.stop if stop in text), default=len(text))]
                written[i] = row.get("sample", {"prompt": row["prompt"]}) | {task.output: text}
                if scored:
                    found = data.extract_answer(text, row["answers"])
                    hits += found == row["target"]
                    written[i] |= {"answer": found, "target": row["target"]}
            bar.update(len(indices))
            rate = new_tokens / bar.format_dict["elapsed"]
            bar.set_postfix_str((f"{task.metrics[0]} {hits / bar.n:.3f}, " if scored else "") + f"{rate:.0f} tokens/s",
                                refresh=False)
    print(f"note: generated {new_tokens:,} tokens, {rate:.0f} tokens/s", file=sys.stderr)
    if samples is not None:
        samples += [written[i] for i in sorted(written)]
    return {task.metrics[0]: hits / len(order)} if scored else {}


def log_likelihoods(model, split, batch_size, tokenizer):
    """Yield (row, the answers it allows, each one's log-probability (answers,) float32) for all rows, longest first.

    That is after the prompt and what the row's answers begin with in common: this part is computed once and cached.
    """
    order, device = sorted(range(len(split)), key=lambda i: -split.starts[i]), next(model.parameters()).device
    for start in tqdm(range(0, len(order), batch_size), "likelihoods", unit="batch", leave=False, disable=None):
        chosen = order[start:start + batch_size]
        words, texts = zip(*(data.allowed(split.rows[i]) for i in chosen))
        answers = [[ids.tolist() for ids in tokenizer.encode(row, special=False)[0]] for row in texts]
        shared = [os.path.commonprefix([ids[:-1] for ids in row]) for row in answers]
        rest = [[ids[len(begin):] for ids in row] for row, begin in zip(answers, shared)]
        begun = [[*split.tokens[i][:split.starts[i]], *begin] for i, begin in zip(chosen, shared)]
        tokens, mask = (t.to(device) for t in data.pad(begun, 0, left=True))
        (B, T), longest = tokens.shape, max(len(ids) for row in rest for ids in row)
        cache, mask = models.Cache(model, B, T + longest), F.pad(mask, (0, longest), value=True)
        first = model(tokens, mask[:, :T], torch.arange(1, B + 1, device=device) * T - 1, cache)[:, None]  # (B, 1, V)
        scores = []
        for k in range(max(map(len, rest))):  # a row with fewer answers repeats its last
            ids, real = (t.to(device) for t in data.pad([row[min(k, len(row) - 1)] for row in rest], 0))  # (B, n)
            cache.length, n, logits = T, ids.shape[1], first
            if n > 1:
                logits = torch.cat((first, model(ids[:, :-1], mask[:, :T + n - 1], cache=cache)), 1)
            each = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]  # (B, n)
            scores.append((each * real).sum(1))
        for i, row, score in zip(chosen, words, torch.stack(scores, 1).cpu().numpy()):
            yield split.rows[i], row, score[:len(row)]


def evaluate_splits(model, task, splits, batch_size, tokenizer=None, generate=True, score="generation", samples=None):
    """Measure the model on {split name: Split}: {metric: number}, and "eval_rows", how many rows that were.

    With several splits each metric gets the split's name as suffix. The one without suffix is then that of the split
    "dev" (MNLI: matched), or else the mean over the splits (commonsense: over the tasks).
    """
    each = {name: evaluate(model, task, split, batch_size, tokenizer, generate, score, samples)
            for name, split in splits.items()}
    result = {}
    for metric in next(iter(each.values())):
        values = {name: metrics[metric] for name, metrics in each.items()}
        result[metric] = values["dev"] if "dev" in values else float(np.mean(list(values.values())))
        if len(each) > 1:
            result |= {f"{metric}_{name}": value for name, value in values.items() if name != "dev"}
    return result | {"eval_rows": sum(map(len, splits.values()))}


# ---------------------------------------------------------------------------------------------- models, data and runs


def load_model(s, task, adapted=False):
    """The base model that the settings name, with the task's head; caps s.max_length at the model's positions.

    A checkpoint's head is put into the task's order of labels. `adapted`: an adapter brings the trained head.
    """
    labels = None if task.kind == "lm" else 1 if task.kind == "regress" else len(task.labels)
    shard = getattr(s, "shard", False)  # then no device has to hold the whole model, nor the host one for each process
    model = models.load(s.model, "lm" if task.kind == "lm" else "classify", labels, getattr(torch, s.dtype),
                        "cpu" if shard else s.device, s.init_weights, s.seed, mapped=shard)
    if model.fresh and s.init_weights == "checkpoint" and not adapted:
        print(f"note: {', '.join(model.fresh)} not in the checkpoint: initialised from seed {s.seed}", file=sys.stderr)
    if task.labels:
        if not any(name.startswith("head.") for name in model.fresh):
            _order_labels(model, task.labels)
        model.config.raw["id2label"] = dict(enumerate(task.labels))
        model.config.raw["label2id"] = {label: i for i, label in enumerate(task.labels)}
    positions = getattr(model, "max_length", s.max_length)
    if s.max_length > positions:
        print(f"note: {s.model} has {positions} positions: --max-length {s.max_length} is cut to that", file=sys.stderr)
        s.max_length = positions
    return model


def _order_labels(model, labels):
    """Permute the outputs of a trained head whose checkpoint names the same labels in another order."""
    saved = model.config.raw.get("id2label") or {}
    saved = [str(saved.get(str(i), saved.get(i))).lower() for i in range(len(saved))]
    wanted = [label.lower() for label in labels]
    if saved != wanted and sorted(saved) == sorted(wanted):
        last, order = getattr(model.head, "out_proj", model.head), [saved.index(label) for label in wanted]
        for parameter in last.parameters():
            parameter.data = parameter.data[order].clone()


def auto_device():
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_least(settings, **least):
    """Raises UserError for a number in the dict `settings` that is below its least."""
    for name, low in least.items():
        if settings.get(name, low) < low:
            raise UserError(f"--{name.replace('_', '-')} {settings[name]}: must be at least {low}")


def check_device(device):
    """Raises UserError unless `device` is a CPU or a GPU that is there."""
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None


def scoring(s, task):
    """How the settings have answers scored, keyword arguments of `evaluate`; raises UserError if that cannot be."""
    score, samples = getattr(s, "score", "generation"), getattr(s, "samples", None)  # older runs have none
    if score == "likelihood" and not isinstance(task.answers, tuple) and task.name != "commonsense":
        raise UserError(f"--score likelihood: {task.name} has no allowed answers listed: use --score generation")
    if task.sample and samples is None:
        raise UserError(f"{task.name} is scored by another program; name the file for its input by --samples")
    if samples is not None and (score == "likelihood" or not task.new_tokens):
        raise UserError(f"--samples: --task {task.name} --score {score} generates no text; leave it out")
    return {"score": score, "samples": samples}


def processor_for(s, task):
    """The data.Processor of the run's model: its tokenizer, or its image settings."""
    config, folder = models.find_config(s.model, s.init_weights)
    if task.kind != "image":
        folder = folder or models.resolve(s.model, weights=False)
    return data.Processor(task, folder, config.image_size)


def evaluate_run(folder, splits=None, shard=None, **changes):
    """Evaluate what a run folder holds, on a freshly loaded base model: {metric: number}.

    `splits` spares reading the data again; `shard(model, device)` spreads a model over the processes of a run, all of
    which then call this; the rest is as in `load_run`.
    """
    s, task, processor, model = load_run(folder, changes, shard)
    return evaluate_splits(model, task, splits or processor.evaluation(s), s.batch_size, processor.tokenizer,
                           **scoring(s, task))


def load_run(folder, changes, shard=None):
    """A run folder's (settings, task, Processor, model): a fresh base with the run's adapter, or the run's own model.

    `changes` replace settings of the run, such as device, batch_size or data. Raises UserError when the folder is
    not a finished run.
    """
    folder = Path(folder)
    s, labels = read_run(folder, changes)
    s.shard = shard is not None  # one process alone loads the model as usual
    task = data.find_task(s.task, s.data, labels)
    if s.device.startswith("cuda") and not torch.cuda.is_available() and "device" not in changes:
        print(f"note: the run's device {s.device} is not here: evaluating on the CPU", file=sys.stderr)
        s.device = "cpu"
    check_device(s.device)
    scoring(s, task)  # complain before the model is loaded
    processor = processor_for(s, task)
    if (folder / "model").is_dir():
        where = {"model": str(folder / "model"), "init_weights": "checkpoint"}
        model = load_model(SimpleNamespace(**vars(s) | where), task)
    elif (folder / "adapter").is_dir():
        model = load_model(s, task, adapted=True)
        lora.load_adapter(model, folder / "adapter")
        if shard:
            shard(model, s.device)
    else:
        raise UserError(f"{folder}: neither adapter/ nor model/ in it; did the run finish?")
    return s, task, processor, model


def read_run(folder, changes=None):
    """Settings (as attributes) and label names of a run folder."""
    file = Path(folder) / "run.json"
    run = data.read_settings(file)
    try:
        settings = {key: run["settings"][key] for key in ("model", "task", "data", "method", "seed", "device", "dtype",
                                                          "init_weights", "limit_eval", "max_length", "batch_size")}
        if not all(isinstance(settings[key], int) for key in ("seed", "limit_eval", "max_length", "batch_size")):
            raise ValueError("a number is missing")
        return SimpleNamespace(**run["settings"] | (changes or {})), run["labels"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: missing, or no settings of a run ({error!r}); name a run's folder") from None


def save_model(model, processor, folder):
    """Write the plain model as a whole checkpoint folder, with its base's tokenizer or image processor."""
    raw = model.config.raw
    if model.head_kind == "classify" and processor.tokenizer and raw.get("pad_token_id") is None:
        raw["pad_token_id"] = processor.tokenizer.pad_id  # else transformers' decoders classify one text at a time
    with models.whole_folder(folder) as part:
        models.save(model, part)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                     "preprocessor_config.json", "generation_config.json"):
            if processor.folder and (processor.folder / name).is_file():
                shutil.copy(processor.folder / name, part)


def merge(folder, out, changes):
    """Write a run's model, the adapter added into its weights, as the checkpoint folder `out`; returns its path.

    It has the run's dtype unless `changes` (see `load_run`) say otherwise. Matrices are merged in place and one at a
    time, so memory holds the weights once.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another folder or remove it")
    _, _, processor, model = load_run(folder, {"device": "cpu"} | changes)
    for layer in lora.adapters(model).values():
        layer.merge()
    save_model(model, processor, out)
    return out


# ---------------------------------------------------------------------------------------------- model card

AUTO = {"lm": ("AutoModelForCausalLM", "text-generation"),
        "image": ("AutoModelForImageClassification", "image-classification"),
        "classify": ("AutoModelForSequenceClassification", "text-classification"),
        "regress": ("AutoModelForSequenceClassification", "text-classification")}


def write_cards(folder, train_rows=None):
    """Write the model card of a finished run into its folder, and into adapter/ or model/, which people upload."""
    folder = Path(folder)
    part = "adapter" if (folder / "adapter").is_dir() else "model"
    for place, path in ((folder, part), (folder / part, ".")):
        (place / "README.md").write_text(card(folder, path, train_rows), encoding="utf-8", errors="backslashreplace")


def card(folder, path, train_rows=None):
    """A run's model card: Markdown with the Hub's front matter. `path` is where its code finds the adapter or model.

    Names that a user chose appear as code spans or as JSON strings (which Python and YAML read), so they break nothing.
    """
    folder, (s, labels) = Path(folder), read_run(folder)
    log, ranks = _read_log(folder / "metrics.jsonl"), _read_log(folder / "ranks.jsonl")[-1]
    kind, adapter, base = data.TASKS[s.task].kind, (folder / "adapter").is_dir(), models.HUB.get(s.model, s.model)
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII) and not Path(s.model).is_dir()
    lines = ["---"] + [f"base_model: {json.dumps(base)}"] * bool(on_hub)  # the Hub refuses names that are not its own
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {AUTO[kind][1]}", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in dict.fromkeys(["lora"] * adapter + [s.method, s.task])] + ["---", ""]
    name = " ".join((base if on_hub else Path(base).name).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))  # longer than any in the name
    lines += [f"# {s.method} on {s.task}, from {fence} {name} {fence}", ""]

    before, after = log[0].get("eval", {}) if log[0]["step"] == 0 else {}, log[-1]["eval"]
    rows = [[key, *("" if m.get(key) is None else f"{m[key]:.4f}" for m in (before, after))]
            for key in after if key != "eval_rows"]
    lines += markdown([f"after {log[-1]['step']:,} steps", "before", "after"], rows)
    trained = "" if train_rows is None else f"Trained on {train_rows:,} rows; evaluated on "
    lines += [(trained or "Evaluated on ") + f"{after['eval_rows']:,} rows.", ""]
    size = {key: f"{n:,}" for key, n in log[-1]["trainable_params"].items()}
    lines += [f"Trainable parameters besides the head: {size['now']} (mean {size['mean']}, peak {size['peak']}).", ""]
    shown = ("seed", "rank", "alpha", "dropout", "targets", "scaling", "init", "dora", "lora_plus_ratio", "freeze_a",
             "lr", "schedule", "warmup", "weight_decay", "clip", "batch_size", "accumulate", "epochs", "max_length",
             "limit_train", "limit_eval", "dtype")
    values = {key: getattr(s, key, None) for key in shown}
    values["targets"] = ", ".join(s.targets or [])
    rows = [[key, value] for key, value in values.items() if value not in (None, "") and value is not False]
    lines += markdown(["setting", "value"], rows)
    if ranks["ranks"]:
        image, kinds = grid(ranks["ranks"])
        rows = [[i, *("" if np.isnan(rank) else f"{rank:.0f}" for rank in row)] for i, row in enumerate(image)]
        lines += markdown([f"rank at step {ranks['step']:,}: block", *kinds], rows)
    if adapter and s.init_weights == "random":
        return "\n".join([*lines, "The base model is no checkpoint: its weights were drawn at random.", ""])
    return "\n".join([*lines, "```python", *_loading_code(s, labels, kind, base, adapter, path), "```", ""])


def _loading_code(s, labels, kind, base, adapter, path):
    """Lines of Python that load the adapter with PEFT, or the model with transformers."""
    auto, text = AUTO[kind][0], kind != "image"
    lines = [f"from transformers import {auto}" + ", AutoTokenizer" * text]
    if adapter:
        base = str(models.resolve(base)) if base == "vit-digits" else base
        options = {"lm": "", "regress": ", num_labels=1, ignore_mismatched_sizes=True"}.get(
            kind, f", id2label={dict(enumerate(labels))!a}, ignore_mismatched_sizes=True")
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


def markdown(head, rows):
    """Lines of a Markdown table, the last one empty."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def variant(s):
    """A run's method with what is combined with it, for names: lora, lora-pissa, lalora-dora, lora-plus16, lora-fa."""
    return "-".join([s.method.rpartition(":")[2], *[s.init] * (s.init != "lora"), *["dora"] * s.dora, *["fa"] * s.freeze_a,
                     *[f"plus{s.lora_plus_ratio:g}"] * (s.lora_plus_ratio != 1)])


def summary(metrics):
    """Metrics as a person reads them."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "eval_rows")


# ---------------------------------------------------------------------------------------------- plots


def plot(*folders):
    """Draw one run's pictures into its folder, or several runs' into the folder that holds them; returns their paths.

    One run: training.png has loss, metrics, budget and the policy's own numbers over steps; ranks.png the rank of each
    kind of matrix over blocks and steps, and the final ranks; choices.png LeLoRA's windows, or WeightLoRA's omega.
    Several: curves.png has loss and metric over steps, a row for each task; what is no run is left out. Raises
    UserError without matplotlib or without a run.
    """
    plt, runs = pyplot(), read_runs(folders)
    if len(folders) == 1:
        return save_figures(plt, runs[0].folder, _plot_run(plt, runs[0]))
    return save_figures(plt, common_folder(runs), {"curves.png": _plot_curves(plt, runs)})


def pyplot():
    """matplotlib's pyplot, drawing into files; raises UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figures(plt, folder, figures):
    """Write {file name: figure} into `folder`; returns the paths."""
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return [folder / name for name in figures]


def read_runs(folders):
    """The runs among `folders`, each with folder, s (its settings), metrics and ranks (lines of its logs).

    Of several, what is no run is left out and named. Raises UserError if none is one.
    """
    runs, others = [], []
    for folder in dict.fromkeys(Path(os.path.abspath(name)) for name in folders):
        if folder.is_file():  # a picture, where runs/* was typed
            continue
        try:
            s, _ = read_run(folder)
            metrics, ranks = _read_log(folder / "metrics.jsonl"), _read_log(folder / "ranks.jsonl")
            runs.append(SimpleNamespace(folder=folder, s=s, metrics=metrics, ranks=ranks))
        except (UserError, OSError) as error:
            if len(folders) == 1:
                raise
            others.append(folder.name)
    if others:
        data.note(f"left out, not a run's folder: {', '.join(others)}")
    if not runs:
        raise UserError(f"no run among {len(folders)} paths; name folders that train.py wrote")
    return runs


def common_folder(runs):
    """The innermost folder that holds all of the runs' folders."""
    return Path(os.path.commonpath([run.folder.parent for run in runs]))


def _read_log(file):
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{file}: no readable log ({error}); name the folder of a finished run") from None
    if not lines:
        raise UserError(f"{file}: empty; the run has not logged a step yet")
    return lines


def alike(runs, *ignored):
    """{(task, label): runs}; a label is a method and the settings, but `ignored`, in which its runs on a task vary."""
    ignored = {"seed", "out", "resume", "log_every", "eval_every", "save_every", "keep", "eval_before", "max_bad_steps",
               *ignored}

    def shown(value):
        return ",".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name

    tried = {}  # (method, setting) -> task -> the values that occur
    for run in runs:
        for key, value in vars(run.s).items():
            tried.setdefault((run.s.method, key), {}).setdefault(run.s.task, set()).add(shown(value))
    groups = {}
    for run in runs:
        label = [run.s.method]
        for key, value in vars(run.s).items():
            if key not in ignored and max(map(len, tried[run.s.method, key].values())) > 1:
                key = re.sub("^(adalora|lalora|weightlora|lelora)_", "", key).replace("_", " ")
                label.append(f"{key} {shown(value)}")
        label = ", ".join(label).replace("$", r"\$")  # a dollar sign alone would start a formula
        groups.setdefault((run.s.task, label), []).append(run)

    def numbers_by_size(key):  # 2 before 12
        return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", ": ".join(key))]

    return {key: groups[key] for key in sorted(groups, key=numbers_by_size)}


def _plot_curves(plt, runs):
    """Training loss and evaluation over steps: a row of panels for each task, a colour for what is alike but the seed."""
    groups = alike(runs)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    labels = list(dict.fromkeys(label for _, label in groups))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(11, 3.8 * len(tasks)), layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20").colors
    shown = {}
    for (task, label), group in groups.items():
        losses, evaluations = axes[tasks.index(task)]
        colour = colours[labels.index(label) % len(colours)]
        metric = headline(group)
        for run in group:
            _draw(losses, [(m["step"], m["loss"]) for m in run.metrics if "loss" in m], color=colour)
            shown[label] = _draw(evaluations, [(m["step"], m["eval"].get(metric)) for m in run.metrics if "eval" in m],
                                 color=colour)
        losses.set_title(f"{task}: training loss")
        evaluations.set_title(f"{task}: {metric}")
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
    return figure


def headline(runs):
    """The metric that runs on one task are compared by: the task's first, or the loss where answers were not scored."""
    metric = data.TASKS[runs[0].s.task].metrics[0]
    scored = [metric in line["eval"] for run in runs for line in run.metrics if "eval" in line]
    return metric if scored and all(scored) else "loss"


def _draw(axis, points, **options):
    """A curve through the (step, number or None) in `points`, with markers if they are few."""
    points = [(step, value) for step, value in points if value is not None]
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    steps, values = zip(*points) if points else ((), ())
    return axis.plot(steps, values, marker="o" if len(points) < 15 else None, markersize=3, **options)[0]


def _plot_run(plt, run):
    figures, last = {"training.png": _plot_training(plt, run.metrics)}, run.ranks[-1]
    if last["ranks"]:
        figures["ranks.png"] = _plot_ranks(plt, run.ranks)
    title = f"{run.s.method} on {Path(run.s.model).name}, {run.s.task}, seed {run.s.seed}"
    for figure in figures.values():
        figure.suptitle(title, parse_math=False)  # a name may have dollar signs
    return figures


def _plot_training(plt, metrics):
    steps, evaluations = [m for m in metrics if "loss" in m], [m["eval"] | m for m in metrics if "eval" in m]
    usual = {"step", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "examples_per_second", "trainable_params"}
    own = [key for key in (steps[-1] if steps else {}) if key not in usual]
    measured = [key for key in (evaluations[-1]["eval"] if evaluations else {}) if key not in ("loss", "eval_rows")]
    panels = [("training loss", ["loss"], steps), ("evaluation", measured, evaluations),
              ("trainable adapter parameters", ["now", "mean", "peak"], [m["trainable_params"] | m for m in metrics])]
    if own:
        panels.append(("the policy's own numbers", own, steps))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axis, (title, keys, lines) in zip(axes, panels):
        axis.set_title(title)
        for key in keys:
            _draw(axis, [(line["step"], line.get(key)) for line in lines], label=key)
        if keys:
            axis.legend(fontsize="small")
    axes[2].set_ylim(bottom=0)
    return figure


def _plot_ranks(plt, ranks):
    kinds, steps = grid(ranks[-1]["ranks"])[1], [line["step"] for line in ranks]
    history = np.stack([grid(line["ranks"])[0] for line in ranks])  # (times, blocks, kinds)
    top = max(1, np.nanmax(history))
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(4.2 * (len(kinds) + 1), 4), layout="constrained")
    for i, kind in enumerate(kinds):
        axes[i].set_title(kind)
        shown = heat(axes[i], history[:, :, i].T, "step", [0, *steps], vmin=0, vmax=top)
        figure.colorbar(shown, ax=axes[i], label="rank")
    axes[-1].set_title(f"final ranks (step {steps[-1]})")
    shown = heat(axes[-1], history[-1], "matrix", kinds=kinds, vmin=0, vmax=top)
    figure.colorbar(shown, ax=axes[-1], label="rank")
    write_numbers(axes[-1], history[-1], 0.6 * top)
    return figure


def grid(values):
    """{"blocks.3.query": number} as (array (blocks, kinds) with nan where there is no such matrix, kinds)."""
    kinds = [kind for kind in lora.TARGETS if any(name.endswith(f".{kind}") for name in values)]
    image = np.full((1 + max(int(name.split(".")[1]) for name in values), len(kinds)), np.nan)
    for name, value in values.items():
        _, block, kind = name.split(".")
        image[int(block), kinds.index(kind)] = value
    return image, kinds


def heat(axis, image, x, edges=None, kinds=(), **options):
    """A heat map (blocks, columns), for a colour bar; `edges` are the columns' limits, by default around 0, 1, ..."""
    blocks, columns = image.shape
    edges = np.arange(columns + 1) - 0.5 if edges is None else edges
    shown = axis.pcolormesh(edges, np.arange(blocks + 1) - 0.5, image, **options)
    axis.set(xlabel=x, ylabel="block")
    axis.invert_yaxis()
    axis.yaxis.get_major_locator().set_params(integer=True)
    if kinds:
        axis.set_xticks(range(len(kinds)), kinds, rotation=45 * (len("".join(map(str, kinds))) > 16))
    return shown


def write_numbers(axis, image, bright):
    """Write the numbers into a heat map's cells, unless they are too many; in white where they are below `bright`."""
    for row, column in np.ndindex(image.shape) if image.size <= 120 else []:
        if not np.isnan(image[row, column]):
            axis.text(column, row, f"{image[row, column]:.2f}".rstrip("0").rstrip("."), ha="center", va="center",
                      fontsize="small", color="white" if image[row, column] < bright else "black")


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help ends each line with the default."""

    def __init__(self, description, usage="[flags]"):
        super().__init__(description=description, usage="%(prog)s " + usage, allow_abbrev=False, formatter_class=_Help)

    def error(self, message):
        refuse(f"{self.prog}: {message}; see --help")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=120)

    def _get_help_string(self, action):
        shown = action.default not in (None, argparse.SUPPRESS, False, 0) and "default" not in action.help
        choices = f": {', '.join(action.choices)}" if action.choices else ""
        return action.help + choices + (" (default: %(default)s)" if shown else "")


def refuse(message):
    """Bad input: one line on stderr and exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def command(main):
    """Run a program's main(); what is wrong with the user's input becomes one line and exit status 2."""
    try:
        main()
    except (UserError, OSError) as error:
        refuse(error)


def to_json(value, indent=None):
    """JSON text, of tensors too; numbers that JSON has no word for become null."""
    def clean(v):
        v = v.tolist() if isinstance(v, torch.Tensor) else v
        if isinstance(v, dict):
            return {k: clean(w) for k, w in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(w) for w in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(clean(value), indent=indent)


@functools.cache
def source_hash(method):
    """SHA-256 of the program's own source, all *.py beside this file, and of the method's if that is a `file.py:Class`."""
    own = Path(method.partition(":")[0]).expanduser()
    digest = hashlib.sha256()
    for file in [*sorted(Path(__file__).parent.glob("*.py")), *[own] * own.is_file()]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def report(s, metrics, path, samples, generator):
    """Write the samples, if they are asked for, to `path`, and print the result as one line of JSON."""
    if path:
        samples = [{**sample, "generator": generator} if "generator" in sample else sample for sample in samples]
        text = json.dumps(samples, indent=1) if path.endswith(".json") else "\n".join(map(json.dumps, samples))
        Path(path).write_text(text + "\n", encoding="utf-8")
    print(to_json({"task": s.task, "method": getattr(s, "method", None), "model": s.model, "seed": s.seed, **metrics}))


def main(argv=None):
    """Parse the command line, evaluate, print the result as one line of JSON."""
    parser = Parser(__doc__.split("\n\n")[0],
                    "RUN_OR_MODEL [flags]  |  %(prog)s merge RUN OUT  |  %(prog)s --plot RUN ...")
    parser.add_argument("what", metavar="RUN_OR_MODEL", help="a run folder, or a model name, Hub id or folder")
    parser.add_argument("places", nargs="*", metavar="RUN OUT",
                        help="merge: write a run's merged model to OUT; --plot: more runs to compare")
    parser.add_argument("--plot", action="store_true", help="draw a run's ranks, curves and choices into its folder, "
                                                            "or a comparison of runs into the folder they are in")
    parser.add_argument("--task", metavar="X", help="task of an untouched model; default: the one a run was trained on")
    parser.add_argument("--adapter", metavar="X", help="folder of a PEFT adapter to put on the model")
    parser.add_argument("--score", choices=("generation", "likelihood"), metavar="X",
                        help="score the answers that the model generates, or the likeliest of the allowed ones")
    parser.add_argument("--samples", metavar="FILE", help="write generated answers: a list in a .json, else JSON lines")
    parser.add_argument("--data", metavar="X", help="the task's folder or file; default: the run's, else the cache")
    parser.add_argument("--limit-eval", type=int, metavar="X", help="use only the first N rows; 0 = all")
    parser.add_argument("--batch-size", type=int, metavar="X", help="examples at a time; default: the run's, else 32")
    parser.add_argument("--max-length", type=int, metavar="X", help="longest input; default: the run's or task's")
    parser.add_argument("--device", metavar="X", help="cpu, cuda ...; default: the run's, else a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), metavar="X",
                        help="the model's; default: the run's, else float32")
    parser.add_argument("--seed", type=int, metavar="X", help="seed of a head that the checkpoint lacks")
    args = parser.parse_args(argv)
    own = ("what", "places", "task", "adapter", "samples", "plot")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in own}
    if args.samples:
        given["samples"] = []
        if not Path(args.samples).absolute().parent.is_dir() or Path(args.samples).is_dir():
            raise UserError(f"--samples {args.samples}: no file can be there; name another place")
    check_least(given, limit_eval=0, batch_size=1, max_length=1)
    if args.plot and args.what != "merge":
        print(to_json({"plots": [str(path) for path in plot(args.what, *args.places)]}))
        return
    if args.places or args.what == "merge":
        if args.what != "merge":
            parser.error(f"unexpected {' '.join(args.places)}")
        if len(args.places) != 2 or args.task or args.adapter or args.plot or given.keys() - {"device", "dtype"}:
            parser.error("merge takes RUN and OUT, and no flags but --device and --dtype")
        print(to_json({"merged": str(merge(*args.places, given))}))
        return
    if (Path(args.what) / "run.json").exists():
        s, _ = read_run(args.what)
        if args.seed is not None:
            raise UserError(f"{args.what} is a run, whose seed is {s.seed}; leave out --seed")
        if args.adapter is not None:
            raise UserError(f"{args.what} is a run, with its own adapter; leave out --adapter or name its model")
        if args.task not in (None, s.task):
            if {data.TASKS[s.task].kind, data.find_task(args.task, args.data).kind} != {"lm"}:
                raise UserError(f"{args.what} was trained on {s.task}; leave out --task {args.task}")
            s.task, given = args.task, {"task": args.task, "data": None} | given
        metrics = evaluate_run(args.what, **given)
        report(s, metrics, args.samples, given.get("samples"), Path(args.what).resolve().name)
        return
    if args.task is None:
        raise UserError(f"{args.what}: not a run folder, so name a --task to evaluate the model on")
    task = data.find_task(args.task, args.data)
    s = SimpleNamespace(**{
        "model": args.what, "task": args.task, "data": None, "limit_eval": 0, "batch_size": 32, "seed": 0,
        "max_length": task.max_length, "device": auto_device(), "dtype": "float32",
        "init_weights": "checkpoint"} | given)
    check_device(s.device)
    scored, processor = scoring(s, task), processor_for(s, task)
    model = load_model(s, task, adapted=args.adapter is not None)
    if args.adapter is not None:
        lora.load_adapter(model, args.adapter)
    metrics = evaluate_splits(model, task, processor.evaluation(s), s.batch_size, processor.tokenizer, **scored)
    report(s, metrics, args.samples, given.get("samples"), Path(args.what).name)


if __name__ == "__main__":
    command(main)
