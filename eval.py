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
    """Measure the model on {split name: Split}; with several splits each metric gets the split's name as suffix.

    The headline without suffix is then that of the split "dev" (MNLI: matched), or else the mean over the splits
    (commonsense: over the tasks).
    """
    each = {name: evaluate(model, task, split, batch_size, tokenizer, generate, score, samples)
            for name, split in splits.items()}
    if len(each) == 1:
        return next(iter(each.values()))
    metrics = next(iter(each.values())).keys()
    head = {m: each["dev"][m] if "dev" in each else float(np.mean([e[m] for e in each.values()])) for m in metrics}
    return head | {f"{m}_{name}": e[m] for name, e in each.items() if name != "dev" for m in metrics}


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


def write_cards(folder):
    """Write the model card of a finished run into its folder, and into adapter/ or model/, which people upload."""
    folder = Path(folder)
    part = "adapter" if (folder / "adapter").is_dir() else "model"
    for place, path in ((folder, part), (folder / part, ".")):
        (place / "README.md").write_text(card(folder, path), encoding="utf-8", errors="backslashreplace")


def card(folder, path):
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
    rows = [[key, *("" if m.get(key) is None else f"{m[key]:.4f}" for m in (before, after))] for key in after]
    lines += markdown([f"after {log[-1]['step']:,} steps", "before", "after"], rows)
    size = {key: f"{n:,}" for key, n in log[-1]["trainable_params"].items()}
    lines += [f"Trainable parameters besides the head: {size['now']} (mean {size['mean']}, peak {size['peak']}).", ""]
    shown = ("seed", "rank", "alpha", "dropout", "scaling", "init", "dora", "lora_plus_ratio", "freeze_a", "lr",
             "schedule", "warmup", "weight_decay", "batch_size", "accumulate", "epochs", "max_length", "dtype")
    rows = [[key, value] for key in shown if (value := getattr(s, key, None)) is not None and value is not False]
    lines += markdown(["setting", "value"], rows)
    if ranks["ranks"]:
        grid, kinds = _grid(ranks["ranks"])
        rows = [[i, *("" if np.isnan(rank) else f"{rank:.0f}" for rank in row)] for i, row in enumerate(grid)]
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
    return "-".join([s.method, *[s.init] * (s.init != "lora"), *["dora"] * s.dora, *["fa"] * s.freeze_a,
                     *[f"plus{s.lora_plus_ratio:g}"] * (s.lora_plus_ratio != 1)])


def summary(metrics):
    """Metrics as a person reads them."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


# ---------------------------------------------------------------------------------------------- plots


def plot(*folders):
    """Draw pictures of one run into its folder, or of several into the folder that holds them all; returns their paths.

    One run: training.png has loss, metrics, budget and the policy's own numbers over steps; ranks.png the rank of each
    kind of matrix over blocks and steps, and the final ranks; choices.png LeLoRA's windows by depth and kind, or
    WeightLoRA's omega. Several (methods x tasks x seeds, shown as means over seeds, error bars are standard deviations;
    what is no finished run is left out): quality.png has the headline metric over trainable parameters; ranks.png the
    final ranks; sparsity.png La-LoRA's ranks and sparsity (its Fig. 4); selection.png how alike the seeds' choices of
    matrices are (WeightLoRA's Fig. 5); memory.png memory and time over adapters kept (its Figs. 6-8); choices.png
    LeLoRA's windows and dimensions (its Fig. 3) and reward. Raises UserError without matplotlib or without a run.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder, pictures = (_plot_run if len(folders) == 1 else _plot_set)(plt, *folders)
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return [folder / name for name in pictures]


def _plot_run(plt, folder):
    folder, (s, _) = Path(folder), read_run(folder)
    metrics, ranks = _read_log(folder / "metrics.jsonl"), _read_log(folder / "ranks.jsonl")
    pictures = {"training.png": _plot_training(plt, metrics)}
    if ranks[-1]["ranks"]:
        pictures["ranks.png"] = _plot_ranks(plt, ranks)
    if "location" in ranks[-1]:
        pictures["choices.png"] = _plot_windows(plt, ranks)
    if "omega" in ranks[-1]:
        pictures["choices.png"] = _plot_omega(plt, ranks)
    for figure in pictures.values():  # a name may have dollar signs
        figure.suptitle(f"{s.method} on {Path(s.model).name}, {s.task}, seed {s.seed}", parse_math=False)
    return folder, pictures


def _read_log(file):
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{file}: no readable log ({error}); name the folder of a finished run") from None
    if not lines:
        raise UserError(f"{file}: empty; the run has not logged a step yet")
    return lines


def _grid(values):
    """{"blocks.3.query": number} as (array (blocks, kinds) with nan where there is no such matrix, kinds)."""
    kinds = [kind for kind in lora.TARGETS if any(name.endswith(f".{kind}") for name in values)]
    grid = np.full((1 + max(int(name.split(".")[1]) for name in values), len(kinds)), np.nan)
    for name, value in values.items():
        _, block, kind = name.split(".")
        grid[int(block), kinds.index(kind)] = value
    return grid, kinds


def _heat(axis, image, x, edges=None, kinds=(), **options):
    """A heat map (blocks, columns), for a colour bar; `edges` are the columns' limits, by default around 0, 1, ..."""
    blocks, columns = image.shape
    edges = np.arange(columns + 1) - 0.5 if edges is None else edges
    shown = axis.pcolormesh(edges, np.arange(blocks + 1) - 0.5, image, **options)
    axis.set_xlabel(x)
    axis.set_ylabel("block")
    axis.invert_yaxis()
    axis.yaxis.get_major_locator().set_params(integer=True)
    if kinds:
        axis.set_xticks(range(len(kinds)), kinds, rotation=45 * (len("".join(map(str, kinds))) > 16))
    return shown


def _numbers(axis, image, bright):
    """Write the numbers into a heat map's cells, unless they are too many; in white where they are below `bright`."""
    for row, column in np.ndindex(image.shape) if image.size <= 120 else []:
        if not np.isnan(image[row, column]):
            axis.text(column, row, f"{image[row, column]:.2f}".rstrip("0").rstrip("."), ha="center", va="center",
                      fontsize="small", color="white" if image[row, column] < bright else "black")


def _plot_ranks(plt, ranks):
    grids, kinds = zip(*(_grid(line["ranks"]) for line in ranks))
    history, kinds, steps = np.stack(grids, -1), kinds[0], [line["step"] for line in ranks]  # (blocks, kinds, times)
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(4.2 * (len(kinds) + 1), 4), layout="constrained")
    top = max(1, np.nanmax(history))
    for axis, kind, image in zip(axes, kinds, history.swapaxes(0, 1)):
        axis.set_title(kind)
        figure.colorbar(_heat(axis, image, "step", [0, *steps], vmin=0, vmax=top), ax=axis, label="rank")
    last, final = axes[-1], history[..., -1]
    last.set_title(f"final ranks (step {steps[-1]})")
    figure.colorbar(_heat(last, final, "matrix", kinds=kinds, vmin=0, vmax=top), ax=last, label="rank")
    _numbers(last, final, 0.6 * top)
    return figure


def _plot_training(plt, metrics):
    steps, evals = [m for m in metrics if "loss" in m], [m for m in metrics if "eval" in m]
    usual = {"step", "epoch", "loss", "lr", "grad_norm", "examples_per_second", "trainable_params"}
    own = [key for key in (steps[-1] if steps else {}) if key not in usual]
    figure, axes = plt.subplots(1, 3 + bool(own), figsize=(4.6 * (3 + bool(own)), 3.8), layout="constrained")
    panels = [("training loss", ["loss"], steps, lambda m, k: m[k])]
    panels += [("evaluation", [k for k in (evals[-1]["eval"] if evals else {}) if k != "loss"], evals,
                lambda m, k: m["eval"].get(k))]
    panels += [("trainable adapter parameters", ["now", "mean", "peak"], metrics,
                lambda m, k: m["trainable_params"][k])]
    panels += [("the policy's own numbers", own, steps, lambda m, k: m.get(k))] if own else []
    for axis, (title, keys, lines, value) in zip(axes, panels):
        for key in keys:
            points = [(m["step"], value(m, key)) for m in lines if value(m, key) is not None]
            axis.plot(*zip(*points), label=key, marker="o" if len(points) < 15 else None, markersize=3)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if keys:
            axis.legend(fontsize="small")
    axes[2].set_ylim(bottom=0)
    return figure


def _plot_windows(plt, ranks):
    """LeLoRA's windows by block and by kind."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, part, label in ((axes[0], 1, "block"), (axes[1], 2, "matrix")):
        _shares(axis, ranks, lambda name: name.split(".")[part], label)
    return figure


def _shares(axis, ranks, group, label):
    """LeLoRA's Fig. 3 (a, b): how often each window was chosen (with a dimension above 0), by group(matrix name)."""
    counts, bottom = {}, 0
    for line in ranks:
        for name, window in sorted(line["location"].items(), key=lambda item: int(item[0].split(".")[1])):
            counts.setdefault(group(name), np.zeros(3))[window] += bool(line["ranks"][name])
    shares = np.stack([c / max(1, c.sum()) for c in counts.values()])
    for window, share in zip(("first", "middle", "last"), shares.T):
        axis.bar(list(counts), share, bottom=bottom, label=window)
        bottom = bottom + share
    axis.set(xlabel=label, ylabel="share of logged steps", ylim=(0, 1.4), yticks=np.linspace(0, 1, 6))
    axis.legend(title="singular components", loc="upper center", ncols=3, fontsize="small")


def _plot_omega(plt, ranks):
    """WeightLoRA: omega over the warm-up, and at its end with the selected matrices marked."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    warmup = [line for line in ranks if "selected" not in line] + [line for line in ranks if "selected" in line][:1]
    selected = ranks[-1].get("selected", {})
    for name in ranks[-1]["omega"]:
        chosen = selected.get(name)
        axes[0].plot([line["step"] for line in warmup], [line["omega"][name] for line in warmup],
                     color="C1" if chosen else "0.6", zorder=2 if chosen else 1)
    axes[0].set_title("omega (orange: kept)")
    axes[0].set_xlabel("step")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    grid, kinds = _grid(ranks[-1]["omega"])
    marks, _ = _grid({name: selected.get(name, 0) for name in ranks[-1]["omega"]})
    axes[1].set_title("omega at the end of the warm-up (x: kept)")
    figure.colorbar(_heat(axes[1], grid, "matrix", kinds=kinds), ax=axes[1], label="omega")
    for block, kind in zip(*np.nonzero(marks == 1)):
        axes[1].text(kind, block, "x", ha="center", va="center", color="white", fontweight="bold")
    return figure


# ---------------------------------------------------------------------------------------------- plots of a set


def _plot_set(plt, *folders):
    runs, others = [], []
    for folder in dict.fromkeys(Path(os.path.abspath(f)) for f in folders if not Path(f).is_file()):
        try:
            (s, _), result = read_run(folder), json.loads((folder / "result.json").read_text(encoding="utf-8"))
            metrics, ranks = _read_log(folder / "metrics.jsonl"), _read_log(folder / "ranks.jsonl")
            last, metric = ranks[-1], data.TASKS[s.task].metrics[0]
            metric = metric if metric in result else "loss"
            kept = last.get("selected", {} if "omega" in last else last["ranks"])  # none before the warm-up's end
            runs.append(SimpleNamespace(
                folder=folder, s=s, metrics=metrics, ranks=ranks, final=last["ranks"],
                kept={name for name in kept if kept[name]}, point=(s.rank, s.alpha, s.weightlora_keep),
                size=result["trainable_params"]["mean"], quality={metric: result.get(metric)},
                costs={"peak memory (MB)": result.get("peak_memory_mb"), "training time (s)": result["seconds"]}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            others.append(folder.name)
    if others:
        print(f"note: left out, not a finished run: {', '.join(others)}", file=sys.stderr)
    if not runs:
        raise UserError(f"--plot: no finished run among {len(folders)} paths; name run folders with a result.json")

    def of(*methods):
        return [run for run in runs if run.s.method in methods]

    pictures = {"quality.png": _plot_curves(
        plt, _groups(runs, "rank", "alpha", "weightlora_keep"), lambda run: run.size,
        "trainable parameters, mean over steps", lambda run: run.quality, log=True)}
    selecting = [run for run in of("weightlora", "weightlora+", "random") if run.kept]
    seeds = {key: group for key, group in _groups(selecting).items() if len(group) > 1}
    lalora = [run for run in of("lalora") if (run.folder / "adapter").is_dir()]
    for name, draw, groups in (
            ("ranks.png", _plot_final_ranks, _groups([run for run in runs if run.final])),
            ("sparsity.png", _plot_sparsity, _groups(lalora)), ("selection.png", _plot_selection, seeds),
            ("choices.png", _plot_choices, _groups(of("lelora")))):
        if groups:
            pictures[name] = draw(plt, groups)
    if selecting:
        pictures["memory.png"] = _plot_curves(
            plt, _groups(selecting + of("lora"), "weightlora_keep"), lambda run: sum(map(bool, run.final.values())),
            "adapters kept", lambda run: run.costs)
    folder = Path(os.path.commonpath([run.folder.parent for run in runs]))
    return folder, {name: figure for name, figure in pictures.items() if figure}


def _groups(runs, *ignored):
    """{(task, label): runs}; a label is a method and the settings, but `ignored`, in which its runs on a task vary."""
    ignored, tried, groups = {"seed", "out", "resume", "log_every", "eval_every", "save_every", "keep", "eval_before",
                              "max_bad_steps", *ignored}, {}, {}

    def shown(value):
        return ",".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name

    for run in runs:
        for key, value in vars(run.s).items():
            tried.setdefault((run.s.method, key), {}).setdefault(run.s.task, set()).add(shown(value))
    for run in runs:
        label = [run.s.method]
        for key, value in vars(run.s).items():
            if key not in ignored and max(map(len, tried[run.s.method, key].values())) > 1:
                key = re.sub("^(adalora|lalora|weightlora|lelora)_", "", key).replace("_", " ")
                label.append(f"{key} {shown(value)}")
        label = ", ".join(label).replace("$", r"\$")  # a dollar sign alone would start a formula
        groups.setdefault((run.s.task, label), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [  # 2 before 12
        int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", ": ".join(item[0]))]))


def _panels(plt, keys, width, height):
    """A figure, and its axes for the (row, title) in `keys`: a row's side by side, at most 8 before the next line."""
    rows = [row for row, _ in keys]
    rows = rows if len(set(rows)) < len(rows) else [""] * len(rows)  # one panel each: all in one row
    columns = max(math.ceil(n / math.ceil(n / 8)) for n in map(rows.count, rows))
    tops, lines = {}, 0
    for row in dict.fromkeys(rows):
        tops[row], lines = lines, lines + math.ceil(rows.count(row) / columns)
    figure, axes = plt.figure(figsize=(width * columns, height * lines), layout="constrained"), []
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    if len({row for row, _ in keys}) == 1:
        figure.suptitle(keys[0][0])
        keys = [key[1:] for key in keys]
    for i, (row, key) in enumerate(zip(rows, keys)):
        line, column = divmod(rows[:i].count(row), columns)
        axes.append(figure.add_subplot(lines, columns, (tops[row] + line) * columns + column + 1))
        axes[-1].set_title("\n".join(textwrap.wrap(": ".join(key), int(10 * width))), fontsize="medium")
    return figure, axes


def _plot_curves(plt, groups, x, xlabel, values, log=False):
    """The numbers values(run) over x(run): a panel per task and number, a curve per label, a point per rank and K."""
    panels = {}
    for (task, label), group in groups.items():
        for run, (name, value) in ((run, item) for run in group for item in values(run).items() if item[1] is not None):
            curve = panels.setdefault((task, name), {}).setdefault(label, {})
            curve.setdefault(run.point, []).append((x(run), value))
    if not panels:
        return None
    figure, axes = _panels(plt, list(panels), 4.4, 3.8)
    figure.set_figwidth(figure.get_figwidth() + 1.8)  # the legend's
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    colours, shown = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20").colors, {}
    for axis, (key, curves) in zip(axes, panels.items()):
        for label, points in curves.items():
            rows = sorted((*np.mean(p, 0), np.std(p, 0, ddof=len(p) > 1)[1]) for p in points.values())
            i = labels.index(label)
            shown[label] = axis.errorbar(*np.transpose(rows), marker="osD^v<>PX*p"[i % 11], markersize=5, capsize=3,
                                         color=colours[i % len(colours)])
        xs = [a for points in curves.values() for p in points.values() for a, _ in p]
        if log and max(xs) > 10 * min(xs) > 0:
            axis.set_xscale("log")
        axis.set(xlabel=xlabel, ylabel=key[1])
        axis.grid(alpha=0.3)
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small", ncols=1 + len(shown) // 20)
    return figure


def mean_ranks(runs):
    """Mean final rank of each matrix over runs, which have theirs as `final`: {name: number}."""
    return {name: float(np.mean([run.final[name] for run in runs])) for name in runs[0].final}


def _plot_final_ranks(plt, groups):
    grids = [_grid(mean_ranks(runs)) for runs in groups.values()]
    top = max(1, *(np.nanmax(grid) for grid, _ in grids))
    blocks, kinds = np.max([grid.shape for grid, _ in grids], 0)
    figure, axes = _panels(plt, list(groups), max(2, 0.45 * kinds), max(3.2, 0.17 * blocks + 1))
    for axis, (grid, kinds) in zip(axes, grids):
        shown = _heat(axis, grid, "", kinds=kinds, vmin=0, vmax=top)
        _numbers(axis, grid.round(1), 0.6 * top)
    figure.colorbar(shown, ax=axes, label="mean final rank", fraction=0.02)
    return figure


def sparsity(folder, blocks, epsilon=1e-4):
    """La-LoRA's Eq. 1, log(share of near-zero entries / epsilon), for each block of an adapter folder; array (blocks,).

    P is the increment s B A (Fig. 1) of all matrices of a block together; near zero is |P| < epsilon (as the text says,
    the formula has no bars), the logarithm the natural one. A block without adapters has the increment 0.
    DoRA's lengths, which need W, are left out.
    """
    config, tensors = lora.read_adapter(folder)
    small, size = np.zeros(blocks), np.zeros(blocks)
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            path, B = key[len("base_model.model."):-len(".lora_A.weight")], tensors[key.replace("lora_A", "lora_B")]
            P = config["alpha_pattern"].get(path, config["lora_alpha"]) / len(A) * B @ A
            block = int(re.search(r"\.(\d+)\.", path)[1])
            small[block] += (P.abs() < epsilon).sum().item()
            size[block] += P.numel()
    with np.errstate(divide="ignore"):  # no entry near zero: -inf
        return np.log(np.where(size, small / np.maximum(size, 1), 1) / epsilon)


def _plot_sparsity(plt, groups):
    figure, axes = _panels(plt, list(groups), 3.8, 3.4)
    for axis, runs in zip(axes, groups.values()):
        ranks = np.nanmean(_grid(mean_ranks(runs))[0], 1)  # (blocks,)
        axis.bar(range(len(ranks)), ranks, color="0.75")
        axis.set(xlabel="block", ylabel="final rank (bars)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        line = axis.twinx()
        line.plot(np.mean([sparsity(run.folder / "adapter", len(ranks)) for run in runs], 0), "C3o-", markersize=4)
        line.set_ylabel("sparsity, Eq. 1 (line)", color="C3")
    return figure


def jaccard(sets):
    """Pairwise Jaccard similarity |a & b| / |a | b| of n sets that are not empty; array (n, n)."""
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def _plot_selection(plt, groups):
    figure, axes = _panels(plt, list(groups), 2.6, 3)
    for axis, runs in zip(axes, groups.values()):
        image, seeds = jaccard([run.kept for run in runs]), [run.s.seed for run in runs]
        shown = _heat(axis, image, "seed", kinds=seeds, vmin=0, vmax=1)
        _numbers(axis, image, 0.6)
        axis.set(yticks=range(len(seeds)), yticklabels=seeds, ylabel="seed")
    figure.colorbar(shown, ax=axes, label="Jaccard similarity", fraction=0.02)
    return figure


def _plot_choices(plt, groups):
    columns = ("windows by depth", "windows by kind", "dimension by depth", "dimension by kind", "reward")
    figure, axes = _panels(plt, [(f"{label}, {task}", title) for task, label in groups for title in columns], 4, 3.2)
    for row, runs in zip(np.reshape(axes, (-1, 5)), groups.values()):
        lines = [line for run in runs for line in run.ranks]
        blocks = len(_grid(lines[-1]["ranks"])[0])

        def depth(name):
            return ("front", "middle", "back")[3 * int(name.split(".")[1]) // blocks]

        for i, label, group in ((0, "blocks", depth), (1, "matrix", lambda name: name.split(".")[2])):
            _shares(row[i], lines, group, label)
            _mean_curves(row[2 + i], [(group(name), line["step"], rank)
                                      for line in lines for name, rank in line["ranks"].items()], 10)
            row[2 + i].set(xlabel="step (means of tenths of the run)", ylabel="mean dimension")
            row[2 + i].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        _mean_curves(row[4], [("", line["step"], line["reward"])
                              for run in runs for line in run.metrics if line.get("reward") is not None], 200)
        row[4].set(xlabel="step", ylabel="reward")
    return figure


def _mean_curves(axis, points, parts):
    """A curve for each label of the (label, step, value) in `points`: means over `parts` equal parts of the steps."""
    curves, last = {}, max([1, *(step for _, step, _ in points)])
    for label, step, value in points:
        curves.setdefault(label, {}).setdefault(math.ceil(parts * step / last), []).append((step, value))
    for label, curve in curves.items():
        axis.plot(*np.transpose([np.mean(curve[part], 0) for part in sorted(curve)]), label=label)
    axis.grid(alpha=0.3)


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
