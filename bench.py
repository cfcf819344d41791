"""Speed and memory of every method, side by side with PEFT and with the least that any adapter must do.

    python bench.py speed --model roberta-base --init-weights random --methods all   # one table, needs no checkpoint
    python bench.py inference     # latency with and without adapters, unmerged and merged
    python bench.py memory        # peak memory per method and shape, each in a process of its own
    python bench.py quality --model roberta-base --tasks cola,stsb --methods all  # metrics, paired over seeds

The table goes to stdout, whose last line is one JSON object, the same rows as JSON lines to --out, progress to stderr.
quality starts train.py for each run, takes its flags, too, and skips the runs that --results holds.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import json
import math
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import allocators
import data
import eval as evaluation
import lora
import model as models
import train
from model import UserError
from train import say, setting

PEFT = ("lora", "adalora", "dora")  # methods that PEFT has, too
ADAPTIVE = ("lora", "lalora", "adalora", "weightlora", "lelora")


@dataclass
class Bench:
    """What to measure; a field is a flag of every command."""

    methods: list = setting(None, "what", "methods and dora, or all; default: all for speed, a policy each for memory")
    model: str = setting(None, "what", "short name, Hub id or folder; default: roberta-base; llama2-7b for inference, "
                                       "on a CPU its first 2 blocks")
    init_weights: str = setting("random", "what", "random needs no checkpoint; the time does not depend on the values",
                                ("random", "checkpoint"))
    layers: int = setting(0, "what", "number of blocks; 0 = the model's own")
    batch_size: int = setting(8, "what", "examples per step")
    length: int = setting(128, "what", "tokens per example")
    fill: float = setting(1.0, "what", "mean share of real tokens; below 1 the rows differ in length and are padded")
    rank: int = setting(8, "what", "nominal rank")
    targets: list = setting(None, "what", "projections to adapt; default: train.py's for the family")
    dropout: float = setting(0.0, "what", "of the model and of the adapters")
    new_tokens: int = setting(32, "what", "tokens that inference generates")
    seed: int = setting(0, "what", "of weights and data")
    rounds: int = setting(15, "how", "timed steps per contender, interleaved")
    warmup: int = setting(3, "how", "steps before, at least 3")
    modes: list = setting(None, "how", "eager, compiled or both; default eager on a CPU, both on a GPU")
    peft: bool = setting(True, "how", "PEFT beside it, where it is installed")
    memory: bool = setting(True, "how", "peak memory, from one more process per contender")
    profile: bool = setting(False, "how", "print the operators that a step's time goes to")
    device: str = setting("auto", "machine", "cpu, cuda ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "the model's; auto = bfloat16 on a GPU, else float32",
                         ("auto", "float32", "bfloat16"))
    out: str = setting(None, "machine", "JSON lines; default runs/bench-COMMAND.jsonl")


# ---------------------------------------------------------------------------------------------- models and data


@contextlib.contextmanager
def folder_for(b):
    """A folder with the model's config.json, as --layers and --dropout say; weights and tokenizer are linked."""
    config, folder = models.find_config(b.model, b.init_weights)
    raw = dict(config.raw)
    if b.layers:
        raw["num_hidden_layers"] = b.layers
        raw.pop("layer_types", None)
    raw |= dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
                          "classifier_dropout"), b.dropout)
    with tempfile.TemporaryDirectory() as made:
        for file in folder.iterdir() if folder else ():
            if file.name != "config.json" and (b.init_weights == "checkpoint" or "safetensors" not in file.name):
                (Path(made) / file.name).symlink_to(file.resolve())
        (Path(made) / "config.json").write_text(json.dumps(raw))
        yield made


def base_model(b, folder):
    """The frozen model that all contenders share, and its task's kind; settles --targets."""
    decoder = models.find_config(folder, b.init_weights)[0].kind == "decoder"
    head, labels = ("lm", None) if decoder else ("classify", 2)
    base = models.load(folder, head, labels, getattr(torch, b.dtype), b.device, b.init_weights, b.seed)
    b.targets = b.targets or train.default_targets(decoder)
    return base, "lm" if decoder else "image" if base.family == "vit" else "classify"


def settings_for(b, method, **changes):
    """train.Settings for one contender; warm-up phases are as short as they can be, the run is long."""
    fields = dict(method=method, model=b.model, rank=b.rank, alpha=2.0 * b.rank, dropout=b.dropout, targets=b.targets,
                  lr=1e-4, weight_decay=0.01, seed=b.seed, device=b.device, dtype=b.dtype, init_weights=b.init_weights,
                  accumulate=1, batch_size=b.batch_size, max_length=b.length, weightlora_steps=2, adalora_t_init=1)
    return train.Settings(**fields | changes)


def random_split(b, base, kind, rows):
    """A Split of random examples; half of a language model's tokens are answers."""
    generator, c = torch.Generator().manual_seed(b.seed), base.config
    labels = torch.randint(2, (rows,), generator=generator)
    if kind == "image":
        image = {"size": c.image_size[1:], "channels": c.image_size[0], "mean": 0.5, "std": 0.5}
        pixels = torch.randint(256, (rows, *c.image_size), generator=generator, dtype=torch.uint8)
        return data.Split(kind, [], [pixels[0].numel()] * rows, labels, pixels=pixels, image=image)
    least = max(2, round((2 * b.fill - 1) * b.length))  # their mean is fill * length
    lengths = [b.length, *torch.randint(least, b.length + 1, (rows - 1,), generator=generator).tolist()]
    tokens = [torch.randint(5, c.vocab_size, (n,), generator=generator).int().numpy() for n in lengths]
    return data.Split(kind, [], lengths, labels, tokens, starts=[n // 2 for n in lengths], pad_id=c.pad_id or 0)


def batches_for(b, base, kind, count=4):
    """`count` random batches (inputs, labels) on the device, the same for every contender."""
    split, made = random_split(b, base, kind, count * b.batch_size), []
    for i in range(count):
        inputs, labels = data.collate(split, list(range(i * b.batch_size, (i + 1) * b.batch_size)))
        made.append(({name: value.to(b.device) for name, value in inputs.items()}, labels.to(b.device)))
    return made


def own_copy(base, shared=True):
    """A copy of the model that shares the frozen weights; the head, which is trained, is its own."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()} if shared else {})
    if shared and base.head_kind == "classify":
        model.head = copy.deepcopy(base.head)
    return model.train()


# ---------------------------------------------------------------------------------------------- contenders


class Contender:
    """One method on its own copy of the model, ready to take the training steps that train.py takes.

    `params` are trained. Ours have a `training` (train.Training), the floor and PEFT a `loss(inputs, labels)`, the mean
    loss. `also(step)` is called at the end of a step: PEFT's allocation, or one more validation forward.
    """

    def __init__(self, s, model, params=(), training=None, loss=None, also=None):
        self.s, self.model, self.training, self.loss, self.also, self.taken = s, model, training, loss, also, 0
        self.params = training.params if training else list(params)
        self.trainable = sum(p.numel() for p in self.params)
        if not training:
            for p in params:
                p.requires_grad_(True)
            self.optimizer = torch.optim.AdamW(self.params, lr=s.lr, weight_decay=s.weight_decay, fused=True)
        self.losses, self.times, self.compiles, self.breaks = [], [], [], 0

    def step(self, batch):
        self.taken += 1
        if self.training:
            loss, _ = self.training.step(self.taken, [(*batch, 1 / batch[1].numel())])
        else:
            loss = self.loss(*batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
        if self.also:
            self.also(self.taken)
        if not self.training:
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed_step(self, batch):
        """Take a step; keeps its seconds, its loss, and what it compiled."""
        graphs, breaks = compiled_so_far()
        began = clock(self.s.device)
        loss = self.step(batch)
        self.times.append(clock(self.s.device) - began)
        self.losses.append(loss.item())
        now = compiled_so_far()
        self.compiles.append(now[0] - graphs)
        self.breaks += now[1] - breaks

    def policy_seconds(self, batch, times=20):
        """Mean seconds of the policy's own calls in a step, with cold caches, without LeLoRA's validation forward."""
        if not self.training:
            return None
        t, a, spent = self.training, self.training.allocator, 0.0
        cold = torch.empty(16 << 20, device=self.s.device)  # 64 MB, more than its cache
        inputs, labels = batch
        outputs = evaluation.logits(self.model, inputs)
        train.criterion(t.kind, outputs, labels).backward()
        lora.gather_gradients([*t.params, *a.own])
        outputs = outputs.detach()
        if a.validation_rows:
            loss, a.validation_loss = a.validation_loss(), lambda: loss
        for i in range(times):
            cold.fill_(i)
            began = clock(self.s.device)
            a.after_backward(100 + i)
            t.budget.add()
            a.after_step(100 + i)
            penalty = a.penalty(inputs, labels, outputs)
            if isinstance(penalty, torch.Tensor):
                penalty.backward()
            spent += clock(self.s.device) - began
        return spent / times


def clock(device):
    """Seconds; waits for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compiled_so_far():
    """(graphs, graph breaks) that torch.compile has made in this process."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def contender(b, base, kind, name):
    """Build the contender `name`: METHOD, floor or uniform+validation, each with /compiled or not, or peft/METHOD."""
    if name.startswith("peft/"):
        return peft_contender(b, base, kind, name[5:])
    method, _, mode = name.partition("/")
    plain = method in ("floor", "uniform+validation", "dora")
    s = settings_for(b, "lora" if plain else method, compile="on" if mode == "compiled" else "off", dora=method == "dora")
    if method == "uniform+validation":  # what LeLoRA is compared with: its capacity, and one validation forward
        s.rank = 3 * b.rank
    model = own_copy(base, shared=s.method not in ("full", "bitfit"))
    if method == "lelora":  # it changes the frozen weights
        for site, _, _ in lora.sites(model, s.targets):
            linear = model.get_submodule(site)
            linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
    if method == "floor":
        params = list(model.head.parameters()) if kind != "lm" else []
        for site, _, _ in lora.sites(model, s.targets):
            parent, _, child = site.rpartition(".")
            setattr(model.get_submodule(parent), child, Shifted(model.get_submodule(site)))
            params.append(getattr(model.get_submodule(parent), child).shift)

        def loss(inputs, labels):
            return train.criterion(kind, evaluation.logits(model, inputs), labels) / labels.numel()

        made = Contender(s, model, params, loss=loss)
    else:
        allocator = allocators.METHODS[s.method](model, s, 1000)
        if method in ("lelora", "uniform+validation"):
            aside = random_split(b, base, kind, allocators.LeLora.validation_rows)
            allocator.validation_loss = train.validation(model, kind, aside, s.device)
        also = (lambda step: allocator.validation_loss()) if method == "uniform+validation" else None
        made = Contender(s, model, training=train.Training(s, model, kind, allocator), also=also)
    if s.compile == "on":
        train.compile_blocks(model)
    return made


class Shifted(nn.Module):
    """The floor's layer: the frozen projection plus one trainable number."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.shift = linear, nn.Parameter(torch.zeros((), device=linear.weight.device))

    def forward(self, x):
        return self.linear(x) + self.shift.to(x.dtype)


def peft_model(b, base, kind, method):
    """transformers' model on the same weights with PEFT's adapters, as their users run them."""
    import peft
    import transformers
    s, dtype = settings_for(b, "lora"), getattr(torch, b.dtype)
    auto = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification",
            "image": "AutoModelForImageClassification"}[kind]
    raw = {k: v for k, v in base.config.raw.items() if k not in ("model_type", "num_labels", "id2label", "label2id")}
    config = transformers.AutoConfig.for_model(base.family, **raw)
    if kind != "lm":
        config.num_labels = base.config.num_labels
    with torch.device(b.device):
        theirs = getattr(transformers, auto).from_config(config, attn_implementation="sdpa", dtype=dtype)
    weights = {base.hf_name(name, module=True): base.get_parameter(name).data for name in base.plain_names}
    if kind != "lm":
        weights |= {k: v.to(dtype).clone() for k, v in weights.items() if k.startswith(tuple(base.head_names.values()))}
    unknown = theirs.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    assert not unknown, f"transformers' model has no {unknown[0]}"
    theirs.tie_weights()
    task_type = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS"}.get(kind)
    options = dict(lora_alpha=s.alpha, lora_dropout=b.dropout, task_type=task_type,
                   modules_to_save=[*base.head_names.values()] if kind != "lm" else None,
                   target_modules=[base.hf_name(name, module=True) for name, _, _ in lora.sites(base, s.targets)])
    if method == "adalora":
        chosen = peft.AdaLoraConfig(init_r=round(s.adalora_init_ratio * b.rank), target_r=b.rank, tinit=1, tfinal=500,
                                    deltaT=s.adalora_delta_t, total_step=1000, **options)
    else:
        chosen = peft.LoraConfig(r=b.rank, use_dora=method == "dora", **options)
    return peft.get_peft_model(theirs, chosen).train()


def peft_contender(b, base, kind, method):
    """`peft_model`, ready to take steps."""
    theirs = peft_model(b, base, kind, method)

    def loss(inputs, labels):
        if kind == "image":
            return theirs(pixel_values=inputs["pixels"].to(getattr(torch, b.dtype)), labels=labels).loss
        if kind == "lm":
            labels_at = torch.full_like(inputs["tokens"], -100)
            labels_at.view(-1)[inputs["positions"] + 1] = labels
            labels = labels_at
        return theirs(input_ids=inputs["tokens"], attention_mask=inputs["mask"].long(), labels=labels).loss

    allocate = theirs.base_model.update_and_allocate if method == "adalora" else None
    params = [p for p in theirs.parameters() if p.requires_grad]
    return Contender(settings_for(b, "lora"), theirs, params, loss=loss, also=allocate)


# ---------------------------------------------------------------------------------------------- commands


def contender_names(b, methods):
    """Names of all contenders, in the table's order; those of PEFT are left out with a note where it is absent."""
    names = []
    for mode in b.modes:
        names += [name + "/compiled" * (mode == "compiled") for name in
                  ["floor", *methods, *["uniform+validation"] * ("lelora" in methods)]]
    theirs = [f"peft/{method}" for method in PEFT if method in methods and b.peft]
    if theirs and not all(importlib.util.find_spec(module) for module in ("peft", "transformers")):
        say("note: peft and transformers are not installed (requirements-dev.txt), so their column is left out")
        theirs = []
    return names + theirs


def speed(b):
    """Step time, memory and what a GPU waits for, of every method, the floor and PEFT, interleaved in one process."""
    names = contender_names(b, b.methods or list(allocators.METHODS))
    few = dataclasses.replace(b, rounds=2)
    peaks = {name: measure_alone(few, name)["peak_mb"] for name in tqdm(names * b.memory, "memory", file=sys.stderr)}
    with folder_for(b) as folder:
        base, kind = base_model(b, folder)
        runners = {name: contender(b, base, kind, name) for name in names}
    batches = batches_for(b, base, kind)
    with tqdm(total=len(names) * (b.warmup + b.rounds), desc="steps", file=sys.stderr) as bar:
        for i in range(b.warmup + b.rounds):  # interleaved: what else the machine does hits all alike
            for runner in runners.values():
                runner.timed_step(batches[i % len(batches)])
                bar.update()
    peak = peak_flops(b)
    tokens = statistics.mean(real_tokens(inputs) for inputs, _ in batches)
    rows = []
    for name, r in runners.items():
        seconds = statistics.median(r.times[b.warmup:])
        method, _, mode = name.partition("/")
        row = {"contender": name, "step_ms": 1e3 * seconds,
               "to_lora": ratio(b, r, runners.get("lora/compiled" if mode == "compiled" else "lora")),
               "to_floor": ratio(b, r, runners.get("floor/compiled" if mode == "compiled" else "floor")),
               "to_peft": ratio(b, r, runners.get(f"peft/{method}")), "tokens_per_second": tokens / seconds,
               "mfu": flops(base, method, b.length, tokens) / seconds / peak, "trainable": r.trainable}
        if method == "lelora":
            row["to_uniform_and_validation"] = ratio(b, r, runners["uniform+validation" + name[6:]])
        if mode == "compiled":
            row |= {"graph_breaks": r.breaks, "recompilations": sum(n > 0 for n in r.compiles[2:])}
        if b.device.startswith("cuda"):
            row["synchronisations"] = synchronisations(r, batches[0])
        if b.profile:
            profile(r, name, batches[0])
        policy = r.policy_seconds(batches[0])  # the last: it moves the policy on
        row["policy_percent"] = None if policy is None else 100 * policy / seconds
        if b.memory:
            row |= {"peak_mb": peaks[name]}
            row |= {"peak_to_peft": peaks[name] / peaks[f"peft/{method}"]} if f"peft/{method}" in peaks else {}
        row |= {"first_loss": r.losses[0], "last_loss": r.losses[-1]}
        rows.append(row)
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in ("first_loss", "last_loss")]
    return rows, columns, {"peak_gflops": peak / 1e9, "tokens": tokens}


def ratio(b, r, other):
    """Median over rounds of one contender's step time over another's in the same round, or None."""
    return statistics.median(x / y for x, y in zip(r.times[b.warmup:], other.times[b.warmup:])) if other else None


def real_tokens(inputs):
    return len(inputs["pixels"]) if "pixels" in inputs else int(inputs["mask"].sum())  # images count as one


def flops(base, method, length, tokens):
    """FLOPs that a step needs: per token 2 for a weight forward, 2 backward, 2 for its gradient if it is trained, and
    attention's products forward and twice that backward. An encoder's last block needs keys and values only.
    """
    c, lm, first = base.config, base.head_kind == "lm", base.blocks[0]
    if base.family == "vit":
        length = base.positions.shape[1]
        tokens = tokens * length
    weights = sum(p.numel() for p in first.parameters() if p.dim() > 1)
    last = weights if lm else first.key.weight.numel() + first.value.weight.numel()
    products = (c.layers - 1) * weights + last
    attention = 4 * length * c.heads * c.head_dim * (c.layers / 2 if lm else c.layers - 1)  # causal: half
    return tokens * ((6 if method == "full" else 4) * products + 3 * attention)


def peak_flops(b):
    """The fastest of a few large matrix products in the run's dtype, as operations per second."""
    n, best = 8192 if b.device.startswith("cuda") else 2048, 0.0
    x, layer = torch.randn(n, n, device=b.device).to(getattr(torch, b.dtype)), models.Linear(n, n, bias=False)
    layer.weight = nn.Parameter(x, requires_grad=False)
    for product in (layer, x.mm) * 3:
        product(x)
        began = clock(b.device)
        product(x)
        best = max(best, 2 * n ** 3 / (clock(b.device) - began))
    return best


def synchronisations(runner, batch):
    """How often one step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            runner.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def profile(runner, name, batch):
    """Print the operators that one step spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as watched:
        runner.step(batch)
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    say(f"{name}\n{watched.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50)}")


# ---------------------------------------------------------------------------------------------- one process per point


def measure_alone(b, name, **changes):
    """What `one` gives for the contender `name` in a fresh process."""
    settings = json.dumps(dataclasses.asdict(b) | changes)
    done = subprocess.run([sys.executable, __file__, "one", name, settings], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: its own process failed: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def last_line(text):
    """The last line that a process printed: what went wrong, if it is on stderr."""
    return (text.strip().splitlines() or ["?"])[-1]


def one(b, name):
    """Measure one contender in this process: step time, policy time, peak memory of the steps after the warm-up."""
    if name.startswith("peft/"):
        import peft, transformers  # noqa: F401 - their code is no part of a step's memory
    start = train.resident()[0]
    with folder_for(b) as folder:
        base, kind = base_model(b, folder)
        if name in VARIANTS:
            model = variant(b, base, kind, name)
            del base
            reset_peak(b.device)
            generate(b, model)
            return {"peak_mb": peak_bytes(b.device, start) / 2**20}
        runner = contender(b, base, kind, name)
    batches, size = batches_for(b, base, kind, 2), nbytes(base.parameters())
    del base
    for i in range(b.warmup):
        runner.timed_step(batches[i % 2])
    reset_peak(b.device)
    for i in range(b.rounds):
        runner.timed_step(batches[i % 2])
    peak = peak_bytes(b.device, start)
    seconds = statistics.median(runner.times[b.warmup:])
    policy = runner.policy_seconds(batches[0])
    return {"contender": name, "step_ms": 1e3 * seconds, "policy_ms": None if policy is None else 1e3 * policy,
            "peak_mb": peak / 2**20, "imports_mb": start / 2**20, "weights_mb": size / 2**20}


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(device, start):
    """Most memory in use since `reset_peak`: of a GPU, or resident beyond the `start` that the imports took."""
    return train.peak_memory(device) - (0 if device.startswith("cuda") else start)


def reset_peak(device):
    """Forget the peak so far and give what was freed back to the system."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------- inference


VARIANTS = ("base", "unmerged", "unmerged, half the rank", "merged")


def inference(b):
    """Time to first token, inter-token latency, tokens per second, memory, one sequence at a time (La-LoRA, Table 13).

    Uniform LoRA as it is trained, with half the rank as a policy may leave it, and merged, beside the base model.
    """
    alone = {name: measure_alone(b, name) for name in tqdm(VARIANTS, "memory", file=sys.stderr)} if b.memory else {}
    with folder_for(b) as folder:
        base, kind = base_model(b, folder)
    runners = {name: variant(b, base, kind, name) for name in VARIANTS}
    times = {name: [] for name in VARIANTS}
    for i in tqdm(range(b.warmup + b.rounds), "generating", file=sys.stderr):
        for name, model in runners.items():
            times[name].append(generate(b, model))
    rows = []
    for name in VARIANTS:
        first, between = (statistics.median(t[i] for t in times[name][b.warmup:]) for i in (0, 1))
        rows.append({"variant": name, "ttft_ms": 1e3 * first, "itl_ms": 1e3 * between, "tokens_per_second":
                     b.new_tokens / (first + (b.new_tokens - 1) * between), **alone.get(name, {})})
    return rows, ["variant", "ttft_ms", "itl_ms", "tokens_per_second", *["peak_mb"] * b.memory], {}


def variant(b, base, kind, name):
    """The model as `VARIANTS` says, in evaluation mode; the adapters' B is random, so that merging does something."""
    if kind != "lm":
        raise UserError(f"--model {b.model}: inference generates text: choose a decoder, as llama2-7b")
    model = own_copy(base).eval()
    if name == "base":
        return model
    rank = max(1, b.rank // 2) if "half" in name else b.rank
    ranks = {site: rank for site, _, _ in lora.sites(model, b.targets)}
    for layer in lora.attach(model, ranks, 2 * b.rank, nominal=b.rank).values():
        layer.B.data.normal_(std=0.02)
        if name == "merged":
            layer.linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            layer.merge()
    if name == "merged":
        for site in ranks:
            lora.detach(model, site)
    return model


def generate(b, model):
    """Seconds to the first token, and the median between the following ones, of one greedy continuation."""
    generator = torch.Generator().manual_seed(b.seed)
    prompt = torch.randint(5, model.config.vocab_size, (1, b.length), generator=generator).to(b.device)
    at, go_on = [clock(b.device)], torch.zeros(1, dtype=torch.bool, device=b.device)

    def note(generated):
        at.append(clock(b.device))
        return go_on

    models.generate(model, prompt, None, b.new_tokens, None, 0, note)
    return at[1] - at[0], statistics.median(y - x for x, y in zip(at[1:], at[2:]))


# ---------------------------------------------------------------------------------------------- memory


def memory(b):
    """Peak memory and step time of every method, the floor and PEFT at three shapes, each in a process of its own."""
    shapes = [(b.batch_size, b.length), (max(1, b.batch_size // 2), b.length), (b.batch_size, max(4, b.length // 2))]
    few, rows = dataclasses.replace(b, rounds=min(b.rounds, 5)), []
    points = [(shape, name) for shape in dict.fromkeys(shapes) for name in contender_names(b, b.methods or ADAPTIVE)]
    for (batch, length), name in tqdm(points, "memory", file=sys.stderr):
        measured = measure_alone(few, name, batch_size=batch, length=length)
        rows.append({"batch": batch, "length": length, **measured})
    return rows, ["batch", "length", "contender", "peak_mb", "weights_mb", "step_ms", "policy_ms"], {}


# ---------------------------------------------------------------------------------------------- quality


@dataclass
class Comparison:
    """Which runs `quality` compares; all flags besides are train.py's and hold for every run."""

    tasks: list = setting(None, "comparison", "the columns; default: the model's own")
    methods: str = setting("all", "comparison", "the rows: methods, where need be with flags of their own, as in "
                                                "'lora,lora --init pissa,lalora --lalora-gamma 1'; or all")
    seeds: int = setting(5, "comparison", "runs of each, with seeds 0, 1, ...")
    match_budget: bool = setting(False, "comparison", "choose the other methods' ranks, and alphas in proportion, "
                                                      "for mean trainable parameters within 5 %% of uniform LoRA's")
    metric: str = setting(None, "comparison", "the number to compare; default: the task's headline")
    jobs: int = setting(1, "comparison", "runs at a time; they share out the GPUs or the CPU's cores")
    results: str = setting("runs/quality.jsonl", "comparison", "finished runs, a line each; their folders lie beside")


LEVEL = 0.1  # of the sign-flip test: with 5 seeds its least p is 1/16
VARIED = {"scaling", "init", "dora", "lora_plus_ratio", "freeze_a", "adapter"}  # what makes --method lora another one
LOSSES = ("loss", "perplexity")  # metrics of which less is better; all others are shares, shown as percent


class Run:
    """One run of train.py: `row` and `task` are its place in the table, `flags` all that it is told but --out.

    `settings` holds what they set, as train.py reads it: runs with the same settings, `key` as JSON, are the same run.
    `columns` are the tasks it is evaluated on, by default the one it is trained on.
    """

    def __init__(self, row, task, seed, flags, results, columns=None):
        self.row, self.task, self.seed, self.columns = row, task, seed, columns or [task]
        self.flags = [*flags, "--task", task, "--seed", str(seed)]
        self.s = settings_of(self.flags)
        if self.s.out or self.s.resume:
            raise UserError("--out and --resume are the comparison's own; leave them out")
        self.settings = {k: v for k, v in vars(self.s).items() if v != getattr(train.Settings, k)}
        self.plain = self.s.method == "lora" and not self.settings.keys() & VARIED
        self.key = json.dumps(self.settings, sort_keys=True)
        content = hashlib.sha256(self.key.encode()).hexdigest()
        name = re.sub(r"[^\w+.]+", "-", f"{row}-{task}-{seed}-{content[:8]}")
        self.out = Path(results).with_suffix("") / name

    def begin_or_resume(self):
        """The command line that makes this run, or what an interruption left of it."""
        begun = (self.out / "run.json").exists()
        return ["train.py", *(["--resume", str(self.out)] if begun else [*self.flags, "--out", str(self.out)])]

    def evaluate_on(self, task):
        """The command line that evaluates the finished run on another task than its own."""
        columns = data.TASKS[task].sample  # of a completion that another program scores: AlpacaEval reads a list
        samples = ["--samples", str(self.out / (task + (".json" if "generator" in columns else ".jsonl")))]
        return ["eval.py", str(self.out), "--task", task, *samples * bool(columns)]


def quality(argv):
    """Make the runs of a comparison that are not made yet; returns the table as Markdown and a JSON object about it."""
    parser = train.parser_of(Comparison, "Compare methods over tasks and seeds; all other flags are train.py's.")
    parser.usage = "%(prog)s quality [flags] [train.py's flags]"
    own, flags = parser.parse_known_args(argv)
    q = Comparison(**vars(own))
    check_shared(flags)
    evaluation.check_least(vars(q), seeds=1, jobs=1)
    names = "|".join(sorted(map(re.escape, allocators.METHODS), key=len, reverse=True))
    rows = list(allocators.METHODS) if q.methods == "all" else re.split(rf",\s*(?=(?:{names})(?:[\s,]|$))", q.methods)
    if q.tasks is None:
        s = settings_of(flags)
        q.tasks = [train.settle(s, models.find_config(s.model, s.init_weights)[0]).name]
    runs = [Run(row, task, seed, [*flags, "--method", *shlex.split(row)], q.results)
            for row in rows for task in q.tasks for seed in range(q.seeds)]
    runs = matched(runs, q) if q.match_budget else runs
    failed = make(runs, q)
    text, about = summarise(runs, finished(q.results), q.metric, failed)
    Path(q.results).with_suffix(".md").write_text(text, encoding="utf-8")
    return text, about


@functools.cache
def train_parser():
    return train.parser_of(train.Settings, "")


def settings_of(flags):
    """train.Settings of a list of train.py's flags."""
    return train.Settings(**vars(train_parser().parse_args(flags)))


def check_shared(flags):
    """Raises UserError for flags that differ between the runs of a comparison."""
    for flag, instead in {"--method": "--methods", "--task": "--tasks", "--seed": "--seeds"}.items():
        if flag in flags:
            raise UserError(f"{flag} differs between the runs that are compared: use {instead}")


def finished(results):
    """The lines of a results file, by their settings as JSON; what is no such line, or half of one, is skipped."""
    lines = {}
    if Path(results).exists():
        for line in Path(results).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                about = json.loads(line)
                lines[json.dumps(about["settings"], sort_keys=True)] = about
    return lines


def make(runs, q):
    """Make the runs that the results lack, q.jobs at a time; returns {name: last line on stderr} of those that failed.

    A run that was begun goes on from its last checkpoint. Ctrl-C reaches the runs, too: they stop at a checkpoint.
    """
    done, failed, lock, devices = finished(q.results), {}, threading.Lock(), queue.Queue()
    waiting = list({run.key: run for run in runs if run.key not in done}.values())
    for i in range(q.jobs):
        devices.put(i)
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // q.jobs))} | os.environ if q.jobs > 1 else dict(os.environ)
    Path(q.results).parent.mkdir(parents=True, exist_ok=True)

    def one_run(run):
        device = devices.get()
        gpus = torch.cuda.device_count()
        gpus = {"CUDA_VISIBLE_DEVICES": str(device % gpus)} if gpus > 1 else {}

        def call(words):
            command = [sys.executable, str(Path(__file__).with_name(words[0])), *words[1:]]
            process = subprocess.run(command, env=env | gpus, capture_output=True, text=True, errors="replace")
            if process.returncode:
                failed[run.out.name] = last_line(process.stderr)
                say(f"{run.out.name}: {failed[run.out.name]}")
            return process.stdout if process.returncode == 0 else None

        try:
            if not (run.out / "result.json").exists() and call(run.begin_or_resume()) is None:
                return
            about = {"row": run.row, "settings": run.settings} | json.loads((run.out / "result.json").read_text())
            for task in run.columns:
                if not numbers_of(about, task):
                    printed = call(run.evaluate_on(task))
                    if printed is None:
                        return
                    about.setdefault("evaluated", {})[task] = json.loads(printed.splitlines()[-1])
            with lock, open(q.results, "a+b") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a process that was killed
                file.write(b"\n" * torn + evaluation.to_json(about).encode() + b"\n")
        finally:
            devices.put(device)

    with ThreadPoolExecutor(q.jobs) as pool, tqdm(total=len(waiting), desc="runs", file=sys.stderr) as bar:
        try:
            for future in as_completed([pool.submit(one_run, run) for run in waiting]):
                future.result()
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            say("stopped; the same command goes on")
            raise SystemExit(130) from None
    return failed


def numbers_of(line, column):
    """The metrics that a finished run's line has for a task: its own, a part of its own, or another one evaluated."""
    if line["task"] == column:
        return line
    parts = {key.removesuffix(f"_{column}"): value for key, value in line.items() if key.endswith(f"_{column}")}
    return parts or line.get("evaluated", {}).get(column)


def scores(runs, done, metric=None):
    """({task: metric}, {(row, column): {seed: number}}) of the runs that are done; columns are the tasks, and average.

    `metric` None takes each task's headline. Raises UserError for one that a run does not have.
    """
    tasks = list(dict.fromkeys(column for run in runs for column in run.columns))
    found = {(run.row, column, run.seed): numbers_of(done[run.key], column) or {}
             for run in runs for column in run.columns if run.key in done}
    metrics = {task: metric or next((m for m in data.TASKS[task].metrics if not found or any(
        m in numbers for (_, column, _), numbers in found.items() if column == task)), "loss") for task in tasks}
    values = {(run.row, column): {} for run in runs for column in [*tasks, *["average"] * (len(tasks) > 1)]}
    for (row, task, seed), numbers in found.items():  # none if another program scores the task
        if metrics[task] in numbers:
            value = numbers[metrics[task]]
            values[row, task][seed] = math.nan if value is None else value  # JSON has no nan
        elif metric:
            raise UserError(f"--metric {metric}: not in the results on {task}: {', '.join(numbers)}")
    for row, column in values:
        if column == "average":
            seeds = sorted(set.intersection(*(set(values[row, task]) for task in tasks)))
            values[row, column] = {seed: statistics.fmean(values[row, task][seed] for task in tasks) for seed in seeds}
    return metrics, values


def summarise(runs, done, metric=None, failed=(), paper=None):
    """(Markdown, JSON object) of the runs that are done; rows and columns are in the order of `runs`.

    Cells are means and standard deviations over seeds, in percent but for losses, with `paper`'s numbers {row: {column:
    text}} in brackets. Each row is compared with plain uniform LoRA, over the seeds that both have; arrows mark p <=
    LEVEL.
    """
    metrics, values = scores(runs, done, metric)
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*values))
    less, paper = metrics[columns[0]] in LOSSES, paper or {}
    plain, rank = {run.row: run.s.rank for run in runs if run.plain}, {run.row: run.s.rank for run in runs}
    base = {row: next((r for r in plain if plain[r] == rank[row]), next(iter(plain), None)) for row in rows}
    means = {place: statistics.fmean(numbers.values()) for place, numbers in values.items() if numbers}
    best = {c: (min if less else max)((m for (_, column), m in means.items() if column == c and not math.isnan(m)),
                                      default=None) for c in columns}
    cells, tests, about = [], 0, {"rows": {}, "metrics": metrics, "failed": dict(failed)}
    for row in rows:
        about["rows"][row], texts = {}, []
        for column in columns:
            mine, text = values[row, column], ""
            theirs = {} if row in plain else values.get((base[row], column), {})
            if mine:
                pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
                mean, std = means[row, column], statistics.stdev(mine.values()) if len(mine) > 1 else None
                p = None if not pairs or math.isnan(sum(pairs)) else sign_flip(pairs)
                about["rows"][row][column] = {"mean": mean, "std": std, "seeds": len(mine), "p": p}
                tests += p is not None
                scale, digits = (1, 3) if less else (100, 1)
                text = f"{scale * mean:.{digits}f}"
                text = f"**{text}**" if mean == best[column] and len(rows) > 1 else text
                text += f" ± {scale * std:.{digits}f}" if std is not None else ""
                text += (" ↑" if sum(pairs) > 0 else " ↓") if p is not None and p <= LEVEL else ""
            printed = paper.get(row, {}).get(column)
            texts.append(text if printed is None else f"{text} ({printed})".strip())
        own = [done[run.key] for run in runs if run.row == row and run.key in done]
        if own:
            size = {k: statistics.fmean(line["trainable_params"][k] for line in own) for k in ("now", "mean", "peak")}
            spent, peak = statistics.fmean(line["seconds"] for line in own), max(line["peak_memory_mb"] for line in own)
            about["rows"][row] |= {"trainable_params": size, "seconds": spent, "peak_memory_mb": peak}
            sizes = [f"{n:,.0f}" for n in size.values()]
            texts += [" / ".join(sizes if len(set(sizes)) > 1 else sizes[:1]), f"{spent:,.1f}", f"{peak:,.0f}"]
        more = ", ".join(f"{key} {value}" for key, value in paper.get(row, {}).items() if key not in columns)
        cells.append([row, *texts, *[""] * (len(columns) + 3 - len(texts)), *[more] * bool(paper)])
    heads = ["method", *(f"{c}, {metrics[c]}" if c in metrics else c for c in columns), "trainable: last / mean / peak"]
    text = "\n".join(evaluation.markdown([*heads, "s", "MB", *["(the paper's other numbers)"] * bool(paper)], cells))
    text += "\nIn brackets what the paper printed, for its own model and rows.\n" * bool(paper)
    if tests:
        seeds = len({run.seed for run in runs})
        text += (f"\n± standard deviation over seeds. ↑ ↓: differs from uniform LoRA by a paired sign-flip test"
                 f" over seeds, p ≤ {LEVEL} (with {seeds} seeds p is at least {2 / 2 ** seeds:.2g}); of {tests} "
                 f"comparisons chance alone would mark {LEVEL * tests:.1f}.\n")
    return text, about


def sign_flip(differences):
    """Two-sided p of the paired permutation test: how often random signs give a sum as far from 0; exact up to 16."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)  # a row for each choice of signs
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (2 ** 16, len(d)))
    return float(np.mean(np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)))


def matched(runs, q):
    """The runs with ranks, and alphas in proportion, whose mean budget is within 5 % of that of the row `lora`.

    A method's ranks depend on its training, so they are found by training with seed 0: at the rank as it was told,
    then at that times what was too much or too little. Those runs stay in the results and count if they fit. full and
    bitfit have no rank. Raises UserError without the row `lora`.
    """
    if not any(run.row == "lora" for run in runs):
        raise UserError("--match-budget compares with uniform LoRA: add lora to --methods")
    told, tried = {}, {}
    for run in runs:
        if (run.row, run.task) not in told:
            s = copy.copy(run.s)
            train.settle(s, models.find_config(s.model, s.init_weights)[0])
            told[run.row, run.task] = s.rank, s.alpha, run.flags, s.method in ("full", "bitfit")

    def at(place, rank, seed):
        own_rank, alpha, flags, fixed = told[place]
        scaled = [] if fixed else ["--rank", str(rank), "--alpha", f"{alpha * rank / own_rank:g}"]
        return Run(*place, seed, [*flags, *scaled], q.results)

    ranks, asked = {place: rank for place, (rank, *_) in told.items()}, set()
    for _ in range(6):
        trials = {place: at(place, rank, 0) for place, rank in ranks.items()}
        asked |= set(ranks.items())
        make(trials.values(), q)
        done = finished(q.results)
        for place, trial in trials.items():
            if trial.key in done and not told[place][3]:
                tried.setdefault(place, {})[ranks[place]] = done[trial.key]["trainable_params"]["mean"]
        lost = [task for _, task in told if ("lora", task) not in tried]
        if lost:
            raise UserError(f"--match-budget: uniform LoRA's run on {lost[0]} failed; see above")
        off = {place: {rank: size / next(iter(tried["lora", place[1]].values())) - 1 for rank, size in sizes.items()}
               for place, sizes in tried.items()}
        for place, by_rank in off.items():
            best = min(by_rank, key=lambda rank: abs(by_rank[rank]))
            next_one = max(1, round(best / (1 + by_rank[best])))
            ranks[place] = best if abs(by_rank[best]) <= 0.05 or (place, next_one) in asked else next_one
        if asked.issuperset(ranks.items()):
            break
    for place, by_rank in off.items():
        rank, by = min(by_rank.items(), key=lambda item: abs(item[1]))
        say(f"{', '.join(place)}: rank {rank}, mean budget {100 * by:+.1f} % from uniform LoRA's"
            + ": no rank tried comes closer" * (abs(by) > 0.05))
        ranks[place] = rank
    return [at((run.row, run.task), ranks[run.row, run.task], run.seed) for run in runs]


# ---------------------------------------------------------------------------------------------- command line


def table(rows, columns):
    """A table of `columns` as text: three significant digits, nothing where a row has no such number."""
    def text(v):
        return "" if v is None else f"{v:.3g}" if isinstance(v, float) and abs(v) < 100 else f"{v:,.0f}" if isinstance(
            v, (int, float)) else str(v)
    cells = [columns] + [[text(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in cells)


COMMANDS = {"speed": speed, "inference": inference, "memory": memory}


def settle(b, command):
    """Fill what depends on the machine; raises UserError for what cannot work."""
    b.device = evaluation.auto_device() if b.device == "auto" else b.device
    evaluation.check_device(b.device)
    cuda = b.device.startswith("cuda")
    if b.model is None:
        b.model = "llama2-7b" if command == "inference" else "roberta-base"
        b.layers = b.layers or (2 if command == "inference" and not cuda else 0)
    b.dtype = ("bfloat16" if cuda else "float32") if b.dtype == "auto" else b.dtype
    b.modes = b.modes or (["eager", "compiled"] if cuda else ["eager"])
    b.methods = None if b.methods == ["all"] else b.methods
    for name, known in (("methods", (*allocators.METHODS, "dora")), ("modes", ("eager", "compiled"))):
        wrong = [value for value in getattr(b, name) or () if value not in known]
        if wrong:
            choices = ", ".join([*known, *["all"] * (name == "methods")])
            raise UserError(f"--{name} {wrong[0]}: choose from {choices}")
    evaluation.check_least(vars(b), batch_size=1, length=4, rank=1, rounds=1, warmup=3, layers=0)
    if not 0 <= b.dropout < 1 or not 0.5 <= b.fill <= 1:
        raise UserError("--dropout must be from 0 to below 1, --fill from 0.5 to 1")


def answer(command, text, about):
    """Print a table of runs and one line of JSON; exit status 1 if a run failed."""
    print(text)
    print(evaluation.to_json({"command": command} | about))
    if about.get("failed"):
        raise SystemExit(1)


def main(argv=None):
    """Parse the command line, measure, print the table and one line of JSON."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["one"]:  # a process that `measure_alone` started
        print(evaluation.to_json(one(Bench(**json.loads(argv[2])), argv[1])))
        return
    if argv[:1] == ["quality"]:
        answer("quality", *quality(argv[1:]))
        return
    parser = train.parser_of(Bench, __doc__.split("\n\n")[0])
    parser.usage = f"%(prog)s {{{','.join(COMMANDS)}}} [flags]  |  %(prog)s quality [--help]"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    b = Bench(**given)
    settle(b, command)
    rows, columns, about = COMMANDS[command](b)
    about |= {"command": command, "device": train.device_name(b.device), "dtype": b.dtype, **train.versions()}
    print(table(rows, columns))
    out = Path(b.out or f"runs/bench-{command}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(evaluation.to_json(row | about) + "\n" for row in rows), encoding="utf-8")
    print(evaluation.to_json({**about, "settings": dataclasses.asdict(b), "rows": rows}))


if __name__ == "__main__":
    evaluation.command(main)
