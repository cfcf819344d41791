"""Metrics, evaluation of a checkpoint or a run, generation scoring and reports.

    python eval.py runs/lora-vit-digits-digits-rot90-0           # a run again: the identical numbers
    python eval.py roberta-base --task cola [--adapter FOLDER]   # an untouched model, or with an adapter of PEFT's
    python eval.py merge runs/lora-roberta-base-cola-0 merged    # a checkpoint with the adapter in its weights
    python eval.py --plot runs/quality/*                         # pictures of a run or of several (needs matplotlib)

The last line on stdout is one JSON object with the result.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import lora
import model as models
from extras import devices
from extras.adapter_files import load_adapter
from extras.flags import Parser, number, path_of, run_program, say, to_json
from model import UserError, note


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
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return math.nan
    return float(np.corrcoef(predictions, labels)[0, 1])


def spearman(predictions, labels):
    """Spearman correlation: Pearson's of the ranks, ties given their mean rank; arrays (N,)."""
    ranks = []
    for values in (predictions, labels):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return pearson(*ranks)


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, task, split, batch_size, tokenizer=None, generate=True, score="generation", samples=None):
    """Measure the model on one split: {metric name: number}, the task's metrics, by its own `evaluate` if it has one.

    Language models also get `loss` and `perplexity` per answer token, and with `generate` the share of rows whose
    answer is right: what the task extracts from the text that the model generates, or with score="likelihood" the one
    of the allowed answers with the highest log-probability (not divided by length: they are about as long). A list
    `samples` gets a dict per generated text. Rows have a fixed order. UserError: the model's outputs are not finite.
    """
    was_training = model.training
    model.eval()
    order = data.batches(split.lengths, batch_size, shuffle=False)
    bar = tqdm(order, "evaluating", unit="batch", leave=False, dynamic_ncols=True, disable=None)  # None: no terminal
    if task.evaluate:
        result = task.evaluate(model, task, split, bar)
    elif task.kind == "lm":
        result = _perplexity(model, split, bar)
        if generate and score == "likelihood":
            likeliest = [words[scores.argmax()] == row["target"]
                         for row, words, scores in log_likelihoods(model, split, batch_size, tokenizer)]
            result["accuracy"] = float(np.mean(likeliest))
        elif generate and task.new_tokens:
            result |= _generated(model, task, split, batch_size, tokenizer, samples)
    else:
        outputs, labels = [], []
        for indices in bar:
            inputs, label = data.collate(split, indices, device=next(model.parameters()).device)
            outputs.append(logits(model, inputs).float())  # (B, C)
            labels.append(label)
        outputs, labels = torch.cat(outputs), torch.cat(labels).cpu().numpy()
        models.require_finite(outputs, model)
        outputs = outputs.squeeze(-1) if task.kind == "regress" else outputs.argmax(-1)
        result = {name: METRICS[name](outputs.cpu().numpy(), labels) for name in task.metrics}
    model.train(was_training)
    return result


def logits(model, inputs):
    """Run the model on a batch of `data.collate`, moved to the model's device."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    if isinstance(model, models.Decoder):
        inputs["right_padded"] = True  # as collate pads: causal attention then needs no mask
    return model(**inputs)


def token_loss(model, inputs, labels):
    """Sum of the cross-entropies of a batch's answer tokens, 0-d float32; never holds the logits of all of them."""
    return logits(model, {**inputs, "labels": labels})


def criterion(kind, logits, labels):
    """Sum over examples (or answer tokens) of the training loss, in float32: squared error or cross-entropy."""
    if kind == "regress":
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")  # logits (B, 1), labels (B,)
    return F.cross_entropy(logits.float(), labels, reduction="sum")  # logits (B or N, C), labels (B or N,)


def validation(model, kind, split, device):
    """A call that gives the mean loss on `split` as a 0-d tensor, without gradients and without dropout."""
    inputs, labels = data.collate(split, list(range(len(split))), device=device)

    @torch.no_grad()
    def loss():
        model.eval()
        total = token_loss(model, inputs, labels) if kind == "lm" else criterion(kind, logits(model, inputs), labels)
        model.train()
        value = total / labels.numel()
        if dist.is_initialized():  # all compute it, but one rounding apart they would part ways
            dist.broadcast(value, 0)
        return value

    return loss


def _perplexity(model, split, batches):
    total, count = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device), 0
    for indices in batches:
        inputs, labels = data.collate(split, indices, device=total.device)
        total += token_loss(model, inputs, labels)
        count += labels.numel()
    models.require_finite(total, model)
    loss = total.item() / max(1, count)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _generated(model, task, split, batch_size, tokenizer, samples):
    """Share of rows whose generated answer is right, under the task's headline name; rows sorted by prompt length."""
    device = next(model.parameters()).device

    def stopped(ids):  # the newest tokens decide, each of which is a character or more; up to 8 are new
        texts = tokenizer.backend.decode_batch(ids[:, -8 - max(map(len, task.stop)):].tolist())
        return torch.tensor([any(stop in text for stop in task.stop) for text in texts], device=device)

    hits, new_tokens, written, ends = 0, 0, {}, {*tokenizer.eos_ids, tokenizer.pad_id}
    order = data.batches(split.starts, batch_size, shuffle=False)  # longest prompts first
    bar = tqdm(order, "generating", unit="batch", leave=False, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 30)
    for indices in bar:
        begun = [split.tokens[i][:split.starts[i]] for i in indices]
        tokens, mask = (t.to(device) for t in data.pad(begun, split.pad_id, left=True))
        output = models.generate(model, tokens, mask, task.new_tokens, tokenizer.eos_ids, tokenizer.pad_id,
                                 stopped if task.stop else None)
        for i, prompt, ids in zip(indices, begun, output.tolist()):
            row = split.rows[i]
            ids = ids[:next((n for n, token in enumerate(ids) if token in ends), len(ids))]
            new_tokens += len(ids)
            text = tokenizer.decode(ids, prompt)
            text = text[:min((text.find(stop) for stop in task.stop if stop in text), default=len(text))]
            written[i] = row.get("sample", {"prompt": row["prompt"]}) | {task.output: text}
            if "target" in row:
                found = data.extract_answer(text, row["answers"])
                hits += found == row["target"]
                written[i] |= {"answer": found, "target": row["target"]}
        rate = new_tokens / (bar.format_dict["elapsed"] or math.inf)  # 0 where TQDM_DISABLE is set
        bar.set_postfix_str(f"{hits} of {len(written)} right, {rate:.0f} tokens/s", refresh=False)
    say(f"note: generated {new_tokens:,} tokens, {rate:.0f} tokens/s")
    if samples is not None:
        samples += [written[i] for i in sorted(written)]
    return {task.metrics[0]: hits / len(split)} if "target" in split.rows[0] else {}


def log_likelihoods(model, split, batch_size, tokenizer):
    """Yield (row, the answers it allows, each one's log-probability (answers,) float32) for all rows, longest first.

    That is after the prompt and what the row's answers begin with in common: this part is computed once and cached.
    """
    device = next(model.parameters()).device
    order = data.batches(split.starts, batch_size, shuffle=False)
    for chosen in tqdm(order, "likelihoods", unit="batch", leave=False, disable=None):
        words, begun, rest = [], [], []  # of each row: its answers; the ids that all begin with; those of each answer
        for i in chosen:
            allowed, texts = data.allowed(split.rows[i])
            encoded = tokenizer.encode_answers([split.rows[i]["prompt"]] * len(texts), texts)
            answers = [ids.tolist() for ids in encoded[1]]
            shared = os.path.commonprefix([ids[:-1] for ids in answers])
            words.append(allowed)
            begun.append([*split.tokens[i][:split.starts[i]], *shared])
            rest.append([ids[len(shared):] for ids in answers])
        tokens, mask = (t.to(device) for t in data.pad(begun, 0, left=True))
        B, T = tokens.shape
        longest = max(len(ids) for row in rest for ids in row)
        cache = models.Cache(model, B, T + longest)
        mask = F.pad(mask, (0, longest), value=True)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        ends = torch.arange(1, B + 1, device=device) * T - 1
        first = model(tokens, mask[:, :T], ends, cache, places[:, :T])[:, None]  # (B, 1, V)
        scores = []
        for k in range(max(map(len, rest))):  # a row with fewer answers repeats its last
            ids, real = (t.to(device) for t in data.pad([row[min(k, len(row) - 1)] for row in rest], 0))  # (B, n)
            n, logits = ids.shape[1], first
            if n > 1:
                cache.length = T
                others = model(ids[:, :-1], mask[:, :T + n - 1], None, cache, places[:, T:T + n - 1])
                logits = torch.cat((first, others), 1)
            each = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]  # (B, n)
            scores.append((each * real).sum(1))
        scores = torch.stack(scores, 1).cpu()  # (B, answers)
        models.require_finite(scores, model)
        for i, row, score in zip(chosen, words, scores.numpy()):
            yield split.rows[i], row, score[:len(row)]


def evaluate_splits(model, task, splits, batch_size, tokenizer=None, **options):
    """Measure the model on {split name: Split} as `evaluate` does: {metric: number}, with "eval_rows", their number.

    With several splits each metric gets the split's name as suffix. The one without suffix is then that of the split
    "dev" (MNLI: matched), or else the mean over the splits (commonsense: over the tasks).
    """
    each = {name: evaluate(model, task, split, batch_size, tokenizer, **options) for name, split in splits.items()}
    result = {}
    for metric in next(iter(each.values())):
        values = {name: metrics[metric] for name, metrics in each.items()}
        result[metric] = values["dev"] if "dev" in values else float(np.mean(list(values.values())))
        if len(each) > 1:
            result |= {f"{metric}_{name}": value for name, value in values.items() if name != "dev"}
    return result | {"eval_rows": sum(split.count_rows() for split in splits.values())}


# ---------------------------------------------------------------------------------------------- models, data and runs


def load(s, task, adapted=False):
    """The base model that the settings name, with the task's head, and its data.Processor: (model, processor).

    A trained head is used where its labels are the data's (`match_labels`); else the head is drawn from s.seed and
    model.fresh names it. `adapted`: an adapter brings the head. s.max_length is cut to the model's positions.
    """
    s.device = devices.find_device(s.device)
    scoring(s, task)  # complain before the model is loaded
    config, folder = models.find_config(s.model, s.init_weights)
    if folder and (folder / "adapter_config.json").is_file():
        note(f"{folder}: the adapter in it is not applied: name it by --adapter")
    if (task.kind == "image") != (config.kind == "vit"):
        raise UserError(f"--task {task.name}: {s.model} does not do '{task.kind}': choose another")
    if task.kind != "image":
        folder = folder or models.resolve(s.model, weights=False)
    processor = data.Processor(task, folder, config)
    count = {"lm": None, "span": None, "regress": 1}.get(task.kind, len(task.labels))
    saved, outputs, remark = config.raw.get("id2label") or {}, None, None
    names = [str(saved.get(str(i), saved.get(i, f"LABEL_{i}"))) for i in range(config.num_labels)]
    others = config.raw.get("label2id") or {}
    by_number = {str(number): name for name, number in others.items()} if isinstance(others, dict) else {}
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names) and by_number.keys() == {*map(str, range(len(names)))}:
        names = [by_number[str(i)] for i in range(len(names))]
    if task.labels and (len(task.labels) == 2 or config.raw.keys() & {"id2label", "num_labels"}):  # 2: unsaid
        outputs, remark = match_labels(names, task.labels)
    shard = getattr(s, "shard", False)  # then no device has to hold the whole model, nor the host one for each process
    model = models.load(s.model, task.kind if task.kind in ("lm", "span") else "classify", count,
                        getattr(torch, s.dtype), "cpu" if shard else s.device, s.init_weights, s.seed, mapped=shard,
                        outputs=outputs, int8=getattr(s, "weights", "float") == "int8")
    if task.labels:
        model.config.raw["id2label"] = dict(enumerate(task.labels))
        model.config.raw["label2id"] = {label: i for i, label in enumerate(task.labels)}
    if s.init_weights == "checkpoint" and not adapted:
        if model.unused_outputs:
            note(f"the head of {s.model} is not used: its {model.unused_outputs} outputs ({listed(names)}) "
                      f"are not this task's ({listed(task.labels or ['a number'])})")
        if model.fresh:
            note(f"{', '.join(model.fresh)} not in the checkpoint: initialised from seed {s.seed}")
        elif remark:
            note(f"the head of {s.model}: {remark}")
    model.labels, model.head_rows, model.head_remark = task.labels, outputs or None, remark
    if s.max_length > model.max_length:
        note(f"{s.model} has {model.max_length} positions: --max-length {s.max_length} is cut to that")
        s.max_length = model.max_length
    return model, processor


def match_labels(names, labels):
    """Which outputs of a trained head are the data's `labels`: (their indices or [], what was assumed or None).

    Equal names match in any order and case. Outputs that have no `names` but LABEL_i match by their number, or else
    in order if they are as many. If the data have the numbers of all outputs instead of their names, they match, too.
    """
    folded = [[label.strip().casefold() for label in side] for side in (names, labels)]
    names, wanted = folded if all(len({*side}) == len(side) for side in folded) else (names, labels)  # "us", not "US"
    unnamed = all(re.fullmatch(r"label_\d+", name.casefold()) for name in names)
    if unnamed:
        wanted = [f"label_{label}" if label.isdecimal() else label for label in wanted]
    if set(wanted) <= set(names):
        return [names.index(label) for label in wanted], None
    if unnamed and len(wanted) == len(names):
        return list(range(len(names))), f"its outputs have no names: taken to be {listed(labels)} in this order"
    numbers = [int(label) for label in wanted if label.isdecimal()]
    if sorted(numbers) == list(range(len(names))) and not any(name.isdecimal() for name in names):
        return numbers, f"the data's {listed(sorted(labels))} are taken as the numbers of its outputs {listed(names)}"
    return [], None


def listed(names, most=5):
    """The first of many names, for a message."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def scoring(s, task):
    """How the settings have answers scored, keyword arguments of `evaluate`; raises UserError if that cannot be."""
    score = getattr(s, "score", "generation")  # an older run's settings have none, nor those of a plain model
    samples = getattr(s, "samples", None)
    if score == "likelihood" and not isinstance(task.answers, tuple) and task.reader is not data.read_commonsense:
        raise UserError(f"--score likelihood: {task.name} has no allowed answers listed: use --score generation")
    known = ["pearson", "spearman"] if task.kind == "regress" else ["accuracy", "matthews"]
    known += ["f1"] if len(task.labels) == 2 else []
    wrong = [name for name in task.metrics if name not in known]
    if wrong and task.kind in ("classify", "image", "regress") and not task.evaluate:
        raise UserError(f"task {task.name} of {len(task.labels)} labels: its metrics may be {', '.join(known)}, not "
                        f"{', '.join(wrong)}: correct its row, or give it an evaluate of its own")
    if task.sample and samples is None:
        raise UserError(f"{task.name} is scored by another program; name the file for its input by --samples")
    if samples is not None and (score == "likelihood" or not task.new_tokens):
        raise UserError(f"--samples: --task {task.name} --score {score} generates no text; leave it out")
    return {"score": score, "samples": samples}


def evaluate_run(folder, splits=None, shard=None, **changes):
    """Evaluate what a run folder holds, on a freshly loaded base model: {metric: number}.

    `splits` spares reading the data again; `shard(model, device)` spreads a model over the processes of a run, all of
    which then call this; the rest is as in `load_run`.
    """
    return evaluate_loaded(*load_run(folder, changes, shard), splits, merge=shard is None)


def evaluate_loaded(s, task, processor, model, splits=None, merge=True):
    """Evaluate a model that is not trained any further, as the settings say: {metric: number}.

    Where text is generated its adapters are merged into the weights for good, so that a token costs what the plain
    model's does; all numbers are then those of the merged model, one rounding of the weights' dtype apart.
    """
    scored = scoring(s, task)
    int8 = getattr(s, "weights", "float") == "int8"  # merged weights would be floats, which may not fit
    if merge and not int8 and task.new_tokens and scored["score"] == "generation":
        lora.merge_adapters(model)
    splits = splits or processor.evaluation(s)
    rows = devices.rows_at_once(s, task, model, splits)
    return evaluate_splits(model, task, splits, rows, processor.tokenizer, **scored)


def load_run(folder, changes, shard=None):
    """A run folder's (settings, task, Processor, model): a fresh base with the run's adapter, or the run's own model.

    `changes` replace settings of the run, such as device, batch_size or data. A language model may be put to another
    task of text, whose data are then in their usual place.
    """
    folder = Path(folder)
    s, labels = read_run(folder)
    if changes.get("task", s.task) != s.task:
        if {data.task_row(s.task).kind, data.task_row(changes["task"]).kind} != {"lm"}:
            raise UserError(f"{folder} was trained on {s.task}; leave out --task {changes['task']}")
        s.data = None
    vars(s).update(changes, shard=shard is not None)  # one process alone loads the model as usual
    task = data.find_task(s.task, s.data, labels)
    if s.device.startswith("cuda") and not torch.cuda.is_available() and "device" not in changes:
        note(f"the run's device {s.device} is not here: evaluating on the CPU")
        s.device = "cpu"
    if (folder / "model").is_dir():
        where = {"model": str(folder / "model"), "init_weights": "checkpoint"}
        model, processor = load(SimpleNamespace(**vars(s) | where), task)
    elif (folder / "adapter").is_dir():
        model, processor = load(s, task, adapted=True)
        model.labels = ()  # the run's head has their order
        load_adapter(model, folder / "adapter")
        if shard:
            shard(model, s.device)
    else:
        raise UserError(f"{folder}: neither adapter/ nor model/ in it; did the run finish?")
    return s, task, processor, model


def load_untrained(name, adapter, random_head, changes):
    """As `load_run`, of a checkpoint, with the PEFT adapter in the folder `adapter` or None."""
    if "task" not in changes:
        raise UserError(f"{name}: not a run folder, so name a --task to evaluate the model on")
    task = data.find_task(changes["task"], changes.get("data"))
    settings = {"data": None, "limit_eval": 0, "batch_size": 32, "seed": 0, "max_length": task.max_length,
                "device": "auto", "dtype": "float32", "init_weights": "checkpoint"}
    s = SimpleNamespace(model=name, **settings | changes)
    model, processor = load(s, task, adapted=adapter is not None)
    if adapter is not None:
        load_adapter(model, adapter, name)
    elif model.fresh and not random_head:
        raise UserError(f"{name} has no head trained for {task.name}, its answers would be random: name a model "
                        "that has one, train one, or say --random-head")
    return s, task, processor, model


def read_run(folder):
    """Settings (as attributes) and label names of a run folder."""
    file = Path(folder) / "run.json"
    run = models.read_settings(file)
    try:
        settings = {key: run["settings"][key] for key in ("model", "task", "data", "method", "seed", "device", "dtype",
                                                          "init_weights", "limit_eval", "max_length", "batch_size")}
        numbers = all(isinstance(settings[key], int) for key in ("seed", "limit_eval", "max_length", "batch_size"))
        if not numbers or settings["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError("a number or the dtype is missing")
        return SimpleNamespace(**run["settings"]), run["labels"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: missing, or no settings of a run ({error!r}); name a run's folder") from None


def read_log(file):
    """The lines of a run's log, as dicts; raises UserError where there is none."""
    lines = [line for _, line in data.json_rows(file)]
    if not lines:
        raise UserError(f"{file}: empty; the run has not logged a step yet")
    return lines


def rewind_log(file, step):
    """Drop what a run's log says of later than `step`, and half a line at its end; UserError names a damaged line."""
    lines, kept = file.read_bytes().splitlines(keepends=True) if file.exists() else [], []
    for i, text in enumerate(lines, start=1):
        try:
            line = json.loads(text) if text.endswith(b"}\n") or i < len(lines) else {"step": math.inf}
            kept += [text] if line["step"] < step + ("eval" not in line) else []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} line {i}: no line of a run's log ({error!r}): remove it") from None
    with models.publish(file, folder=False) as part:
        part.write_bytes(b"".join(kept))


def save_model(model, processor, folder):
    """Write the plain model as a whole checkpoint folder, with its base's tokenizer or image processor."""
    raw = model.config.raw
    if model.head_kind == "classify" and processor.tokenizer and raw.get("pad_token_id") is None:
        raw["pad_token_id"] = processor.tokenizer.pad_id  # else transformers' decoders classify one text at a time
    with models.publish(folder) as part:
        models.save(model, part)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
                     "merges.txt", "added_tokens.json", "chat_template.jinja",
                     "preprocessor_config.json", "processor_config.json", "generation_config.json"):
            if processor.folder and (processor.folder / name).is_file():
                shutil.copy(processor.folder / name, part)


def merge(folder, out, changes):
    """Write a run's model, the adapter added into its weights, as the checkpoint folder `out`; returns its path.

    It has the run's dtype unless `changes` (see `load_run`) say otherwise. Memory holds the weights once.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another folder or remove it")
    _, _, processor, model = load_run(folder, {"device": "cpu"} | changes)
    lora.merge_adapters(model)
    save_model(model, processor, out)
    return out


# ---------------------------------------------------------------------------------------------- words for numbers


def variant(s):
    """A run's method with what is combined with it, for names: lora, lora-pissa, lalora-dora, lora-plus16, lora-fa."""
    return "-".join([s.method.rpartition(":")[2], *[s.init] * (s.init != "lora"), *["dora"] * s.dora,
                     *["fa"] * s.freeze_a, *[f"plus{s.lora_plus_ratio:g}"] * (s.lora_plus_ratio != 1)])


def free_folder(stem):
    """The first of the run folders `stem`, `stem`-2, `stem`-3 ... that there is none of yet."""
    return next(name for name in [stem] + [f"{stem}-{n}" for n in range(2, 10_000)] if not Path(name).exists())


def summary(metrics):
    """Metrics as a person reads them."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "eval_rows")


# ---------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """Parse the command line, evaluate, print the result as one line of JSON."""
    parser = Parser(__doc__.split("\n\n")[0],
                    "RUN_OR_MODEL [flags]  |  %(prog)s merge RUN OUT  |  %(prog)s --plot RUN ...")
    add = parser.add_argument
    add("what", type=path_of, metavar="RUN_OR_MODEL", nargs="+", help="a run folder, or a model name, Hub id or "
        "folder; merge RUN OUT: write a run's merged model to OUT; --plot: runs")
    add("--plot", action="store_true",
        help="draw a run's curves and ranks into its folder, or several runs' curves into the folder that holds them")
    add("--task", type=path_of, metavar="X", help="task of an untouched model, or mine.py:MY_TASK; default: the run's")
    add("--adapter", type=path_of, metavar="X", help="folder of a PEFT adapter to put on the model")
    add("--random-head", action="store_true", help="evaluate although the head was drawn at random: what chance gives")
    add("--score", choices=("generation", "likelihood"), metavar="X",
        help="score the answers that the model generates, or the likeliest of the allowed ones")
    add("--samples", type=path_of, metavar="FILE",
        help="write generated answers to score elsewhere: .json a list, else JSON lines")
    add("--data", type=path_of, metavar="X", help="the task's folder or file; default: the run's, else the cache")
    add("--limit-eval", type=number(int), metavar="X", help="use only the first N rows; 0 = all")
    add("--batch-size", type=number(int, 1), metavar="X", dest="eval_batch_size",
        help="examples at a time; default: the run's, else 32, on a GPU what fits it")
    add("--max-length", type=number(int, 1), metavar="X", help="longest input; default: the run's or task's")
    add("--device", metavar="X", help="cpu, cuda ...; default: the run's, else a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), metavar="X", help="default: the run's, else float32")
    args = parser.parse_args(argv)
    (what, *places), own = args.what, ("what", "plot", "adapter", "samples", "random_head")
    changes = {name: value for name, value in vars(args).items() if value is not None and name not in own}
    if ":" in changes.get("task", ""):
        changes["task"] = os.path.abspath(changes["task"])  # as a run's settings have it
    if args.plot:
        if changes or args.adapter or args.samples or args.random_head:
            parser.error("--plot takes runs, and no other flag")
        from extras import pictures  # which imports this module
        print(to_json({"plots": [str(path) for path in pictures.plot(args.what)]}))
        return
    if what == "merge":
        if len(places) != 2 or args.adapter or args.samples or args.random_head or changes.keys() - {"device", "dtype"}:
            parser.error("merge takes RUN and OUT, and no flags but --device and --dtype")
        print(to_json({"merged": str(merge(*places, changes))}))
        return
    if places:
        parser.error(f"unexpected {' '.join(places)}")
    if args.samples:
        changes["samples"], file = [], Path(args.samples).absolute()
        if not file.parent.is_dir() or file.exists() and not file.is_file():
            raise UserError(f"--samples {args.samples}: no file can be there; name another place")
    if not (Path(what) / "run.json").exists():
        loaded = load_untrained(what, args.adapter, args.random_head, changes)
    elif args.adapter or args.random_head:
        raise UserError(f"{what} is a run, with its own adapter and head; leave out --adapter and --random-head")
    else:
        loaded = load_run(what, changes)
    (s, task, *_), metrics = loaded, evaluate_loaded(*loaded)
    print(to_json({"task": task.name, "method": getattr(s, "method", None), "model": s.model, "seed": s.seed,
                   **metrics}))
    if args.samples:
        generator = Path(what).resolve().name
        samples = [{**sample, "generator": generator} if "generator" in sample else sample for sample in s.samples]
        text = json.dumps(samples, indent=1) if file.suffix == ".json" else "\n".join(map(json.dumps, samples))
        with models.publish(file, folder=False) as part:
            part.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
