"""Speed and memory of every method, side by side with PEFT and with the least that any adapter must do.

    python bench.py speed --model roberta-base --init-weights random --methods all   # one table, needs no checkpoint
    python bench.py memory        # peak memory per method and shape, each in a process of its own
    python bench.py quality --model roberta-base --tasks cola,stsb --methods all  # metrics, paired over seeds

The table goes to stdout, whose last line is one JSON object with the same rows; progress to stderr.
quality starts train.py for each run, takes its flags, too, and skips the runs that --results holds.
"""

import contextlib
import copy
import ctypes
import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
from extras import devices, images, source
from extras.flags import parser_of, run_program, say, setting, to_json
from extras.report import LOSSES, comparison, read_results, sign_flip, table, write_csv
from model import UserError


@dataclass
class Bench:
    """What to measure; a field is a flag of every command."""

    methods: list = setting(None, "what", "methods and dora, or all; default: all for speed, a policy each for memory")
    model: str = setting("roberta-base", "what", "short name, Hub id or folder")
    init_weights: str = setting("random", "what", "the time does not depend on it", ("random", "checkpoint"))
    weights: str = setting("float", "what", "int8 = the frozen matrices of the blocks in 8 bits", ("float", "int8"))
    layers: int = setting(0, "what", "number of blocks; 0 = the model's own")
    batch_size: int = setting(8, "what", "examples per step", low=1)
    length: int = setting(128, "what", "tokens per example", low=4)
    rank: int = setting(8, "what", "nominal rank", low=1)
    targets: list = setting(None, "what", "projections to adapt; default: train.py's for the family")
    dropout: float = setting(0.0, "what", "of the model and of the adapters", high=1)
    seed: int = setting(0, "what", "of weights and data")
    rounds: int = setting(15, "how", "timed steps per contender, interleaved", low=1)
    warmup: int = setting(3, "how", "steps before", low=3)
    modes: list = setting(None, "how", "of eager,compiled,graphs; default eager on a CPU, eager,compiled on a GPU")
    peft: bool = setting(True, "how", "PEFT beside it, where it is installed")
    device: str = setting("auto", "machine", "cpu, cuda ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "auto = bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16"))


# ---------------------------------------------------------------------------------------------- contenders


def base_model(b):
    """The frozen model that all contenders share, and its task's kind; settles --targets."""
    config, _ = models.find_config(b.model, b.init_weights)
    _, _, known = models.FAMILIES[config.raw["model_type"]]
    changes = {key: b.dropout for key in known if re.search("dropout|_pdrop", key)}
    if b.layers:
        changes |= {"n_layer" if "n_layer" in known else "num_hidden_layers": b.layers, "layer_types": None}
    decoder = config.kind == "decoder"
    b.targets = b.targets or train.DEFAULTS[config.kind][0]
    base = models.load(b.model, "lm" if decoder else "classify", None if decoder else 2, getattr(torch, b.dtype),
                       b.device, b.init_weights, b.seed, int8=b.weights == "int8", changes=changes)
    return base, "lm" if decoder else "image" if base.family == "vit" else "classify"


def settings_for(b, method):
    """train.Settings of a method, uniform LoRA's if it has none; warm-up phases are as short as they can be."""
    return train.Settings(
        method="lora" if method in ("floor", "uniform+validation", "dora") else method, dora=method == "dora",
        model=b.model, rank=b.rank, alpha=2.0 * b.rank, dropout=b.dropout, targets=b.targets, lr=1e-4, seed=b.seed,
        weight_decay=0.01, device=b.device, dtype=b.dtype, init_weights=b.init_weights, batch_size=b.batch_size,
        max_length=b.length, adalora_t_init=1, lalora_gamma=1.0, weightlora_steps=2, weightlora_examples=0,
        credit_steps=2, credit_examples=0)


def random_split(b, base, kind, rows):
    """A Split of random examples; half of a language model's tokens are answers."""
    generator, c = torch.Generator().manual_seed(b.seed), base.config
    labels = torch.randint(2, (rows,), generator=generator)
    if kind == "image":
        pixels = torch.randint(256, (rows, *c.image_size), generator=generator, dtype=torch.uint8)
        return data.Split(kind, [], [pixels[0].numel()] * rows, labels, pixels=pixels,
                          image=images.image_settings(None, c.image_size))
    tokens = torch.randint(5, c.vocab_size, (rows, b.length), generator=generator).int().numpy()
    return data.Split(kind, [], [b.length] * rows, labels, list(tokens), starts=[b.length // 2] * rows)


def batches_for(b, base, kind, count=4):
    """`count` random batches (inputs, labels) on the device, the same for every contender."""
    split, indices = random_split(b, base, kind, count * b.batch_size), list(range(count * b.batch_size))
    return [data.collate(split, indices[i::count], device=b.device) for i in range(count)]


def own_copy(base, shared=True):
    """A copy of the model that shares the frozen weights or none; a classifier's head, which is trained, is its own."""
    own = "head." if base.head_kind == "classify" else ()
    return copy.deepcopy(base, {id(p): p for name, p in base.named_parameters() if shared and not name.startswith(own)})


class Contender:
    """One method on its own copy of the model: takes training steps and keeps what each took.

    Ours has a `training` (train.Training), whose steps train.py takes, too. The floor and PEFT have `params`, which are
    trained, loss(inputs, labels), the mean loss, and PEFT after(step), its allocation.
    """

    def __init__(self, s, model, params=(), loss=None, after=None, training=None):
        self.s, self.model, self.loss, self.after, self.training = s, model.train(), loss, after, training
        self.params = training.params if training else list(params)
        self.trainable = sum(p.numel() for p in self.params)
        if not training:
            for p in self.params:
                p.requires_grad_(True)
            self.optimizer = torch.optim.AdamW(self.params, lr=s.lr, weight_decay=s.weight_decay, fused=True)
        self.losses, self.times, self.compiled = [], [], []  # the last: (graphs, graph breaks)

    def step(self, inputs, labels):
        """Take a step; returns its mean loss."""
        number = 1 + len(self.losses)
        if self.training:
            return self.training.step(number, [(inputs, labels, 1 / labels.numel())])[0]
        if self.s.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        if self.after:
            self.after(number)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def timed_step(self, batch):
        before, began = compiled_so_far(), clock(self.s.device)
        loss = self.step(*batch)
        self.times.append(clock(self.s.device) - began)
        self.losses.append(loss.item())
        self.compiled.append(np.subtract(compiled_so_far(), before))

    def policy_seconds(self, batch, times=20):
        """Mean seconds of the policy's own calls in a step, with cold caches, without LeLoRA's validation forward."""
        if not self.training:
            return None
        t, a, spent = self.training, self.training.allocator, 0.0
        cold = torch.empty(16 << 20, device=self.s.device)  # 64 MB, more than its cache
        inputs, labels = batch
        outputs = evaluation.logits(self.model, inputs)
        evaluation.criterion(t.kind, outputs, labels).backward()
        lora.gather_gradients([*t.params, *a.own])
        outputs = outputs.detach().requires_grad_()  # a penalty's own backward pass ends there
        if a.validation_loss:
            loss, a.validation_loss = a.validation_loss(), lambda: loss
        for i in range(times):
            cold.fill_(i)
            began = clock(self.s.device)
            a.after_backward(100 + i)
            a.budget()
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


def method_of(name):
    """(METHOD, its end: "", "/compiled" or "/graphs") of a contender's name; a policy's file may have / in its path."""
    return re.fullmatch("(.*?)(|/compiled|/graphs)", name).groups()


def contender(b, base, kind, name):
    """Build `name`: METHOD, dora, floor, uniform+validation or peft/METHOD, with or without /compiled or /graphs."""
    method, end = method_of(name)
    s = settings_for(b, method.removeprefix("peft/"))
    s.compile = {"": "off", "/compiled": "on", "/graphs": "graphs"}[end]
    if method.startswith("peft/"):
        from extras import peft_contender
        return Contender(s, *peft_contender.build(s, base, kind))
    policy = allocators.policy(s.method)
    moves_w = issubclass(policy, (allocators.Direct, allocators.LeLora))
    if moves_w and b.weights == "int8":
        raise UserError(f"--weights int8: {method} trains W or its components; leave it out of --methods")
    model = own_copy(base, shared=not (moves_w or ":" in method))  # a policy in a file may split components off W
    if method == "floor":
        made = floor(s, model, kind)
    else:
        if method == "uniform+validation":  # what LeLoRA is compared with: its capacity, and one validation forward
            s.rank = 3 * b.rank
        allocator = policy(model, s, 1000)
        rows = allocators.LeLora.validation_rows if method == "uniform+validation" else allocator.validation_rows
        if rows:
            aside = random_split(b, base, kind, rows)
            allocator.validation_loss = evaluation.validation(model, kind, aside, s.device)
        if method == "uniform+validation":
            allocator.after_backward = lambda step: allocator.validation_loss()
        made = Contender(s, model, training=train.Training(s, model, kind, allocator))
    if end:
        models.compile_blocks(model.blocks, s.compile == "graphs")
    return made


def floor(s, model, kind):
    """The least that any adapter must do: train one number, added to what each matrix gives, and the head."""
    def shifted(linear, inputs, output):
        return output + linear.shift.to(output.dtype)

    def loss(inputs, labels):
        return evaluation.criterion(kind, evaluation.logits(model, inputs), labels) / labels.numel()

    params = list(model.head.parameters()) if kind != "lm" else []
    for site, _, _ in lora.sites(model, s.targets):
        linear = model.get_submodule(site)
        linear.shift = nn.Parameter(torch.zeros((), device=s.device))
        linear.register_forward_hook(shifted)
        params.append(linear.shift)
    return Contender(s, model, params, loss)


# ---------------------------------------------------------------------------------------------- speed and memory


def contender_names(b, default):
    """Names of all contenders, in the table's order; those of PEFT are left out with a note where it is absent."""
    methods = list(allocators.METHODS) if b.methods == ["all"] else b.methods or default
    ends = ["" if mode == "eager" else f"/{mode}" for mode in b.modes]
    names = ["floor", *methods, *["uniform+validation"] * ("lelora" in methods)]
    names = [name + end for end in ends for name in names]
    in_peft = ("lora", "adalora", "dora") if b.peft and b.weights == "float" else ()
    theirs = [f"peft/{method}{end}" for end in ends for method in in_peft if method in methods]
    if theirs and not (importlib.util.find_spec("peft") and importlib.util.find_spec("transformers")):
        say("note: peft and transformers are not installed (requirements-dev.txt), so their column is left out")
        theirs = []
    return names + theirs


def leave_out(b, name, error):
    """Name a contender that has nothing to train in this model, as bitfit without biases; its error if asked for."""
    if method_of(name)[0] in (b.methods or ()):
        raise error
    say(f"note: {name} is left out: {error}")


def speed(b):
    """Step time of every method, the floor and PEFT, interleaved in one process, and what a GPU waits for."""
    names, runners = contender_names(b, list(allocators.METHODS)), {}
    base, kind = base_model(b)
    for name in names:
        try:
            runners[name] = contender(b, base, kind, name)
        except UserError as error:
            leave_out(b, name, error)
    batches = batches_for(b, base, kind)
    for i in tqdm(range(b.warmup + b.rounds), "rounds", file=sys.stderr):
        for runner in runners.values():  # interleaved: what else the machine does hits all alike
            runner.timed_step(batches[i % len(batches)])

    def ratio(runner, name):
        """Median over rounds of its step time over another's in the same round; None without that other."""
        return statistics.median(np.divide(runner.times, runners[name].times)[b.warmup:]) if name in runners else None

    tokens, rows = b.batch_size * (1 if kind == "image" else b.length), []  # an image counts as one
    for name, r in runners.items():
        seconds, (method, end) = statistics.median(r.times[b.warmup:]), method_of(name)
        row = {"contender": name, "step_ms": 1e3 * seconds, "to_lora": ratio(r, "lora" + end),
               "to_floor": ratio(r, "floor" + end), "to_peft": ratio(r, f"peft/{method}{end}")}
        if method == "lelora":
            row["to_uniform_and_validation"] = ratio(r, "uniform+validation" + end)
        row |= {"tokens_per_second": tokens / seconds, "trainable": r.trainable}
        if end:
            graphs, breaks = np.transpose(r.compiled)
            row |= {"graph_breaks": int(breaks.sum()), "recompilations": int(np.count_nonzero(graphs[2:]))}
        if b.device.startswith("cuda"):
            row["synchronisations"] = synchronisations(r, batches[0])
        policy = r.policy_seconds(batches[0])  # the last: it moves the policy on
        row["policy_percent"] = None if policy is None else 100 * policy / seconds
        rows.append(row | {"first_loss": r.losses[0]})
    return rows


def synchronisations(runner, batch):
    """How often one step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        runner.step(*batch)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def memory(b):
    """Peak memory and step time of every method, the floor and PEFT at three shapes, each in a process of its own."""
    shapes = [(b.batch_size, b.length), (max(1, b.batch_size // 2), b.length), (b.batch_size, max(4, b.length // 2))]
    names, rows = contender_names(b, ["lora", "lalora", "adalora", "weightlora", "lelora"]), []
    for (batch, length), name in tqdm([*itertools.product(dict.fromkeys(shapes), names)], "memory", file=sys.stderr):
        shaped = dataclasses.replace(b, batch_size=batch, length=length)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                measured = process.submit(one, shaped, name).result()
                rows.append({"batch": batch, "length": length, "contender": name} | measured)
            except UserError as error:
                leave_out(b, name, error)
            except RuntimeError as error:  # no memory, or the system has killed it for that
                raise UserError(f"{name}: its own process failed: {error}") from None
    return rows


def one(b, name):
    """Measure one contender in this process: peak memory and time of the steps after the warm-up."""
    compiled_so_far()  # what is imported late is no part of a step's memory
    if name.startswith("peft/"):
        from extras import peft_contender  # noqa: F401
    devices.forget_peak_memory(b.device)
    imports = 0 if b.device.startswith("cuda") else devices.peak_memory(b.device)
    base, kind = base_model(b)
    weights = sum(p.nbytes for p in base.parameters())
    runner, batches = contender(b, base, kind, name), batches_for(b, base, kind, 2)
    del base
    for i in range(b.warmup):
        runner.timed_step(batches[i % 2])
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what was freed goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    devices.forget_peak_memory(b.device)
    for i in range(b.rounds):
        runner.timed_step(batches[i % 2])
    return {"peak_mb": (devices.peak_memory(b.device) - imports) / 2**20, "weights_mb": weights / 2**20,
            "step_ms": 1e3 * statistics.median(runner.times[b.warmup:])}


# ---------------------------------------------------------------------------------------------- quality: its runs


@dataclass
class Comparison:
    """Which runs `quality` compares; all flags besides are train.py's and hold for every run."""

    methods: str = setting("all", "rows", "with flags of their own, as in 'lora,lora --init pissa,lalora'; or all")
    steps: list = setting(None, "rows", "numbers of optimizer steps, as in 250,1000,4000: each row once for each")
    budgets: list = setting(None, "rows", "ranks, as in 1,2,8: each row once for each, or at uniform LoRA's budget")
    tasks: list = setting(None, "columns", "default: the model's own")
    metric: str = setting(None, "columns", "the number to compare; default: the task's headline")
    seeds: int = setting(5, "fairness", "runs of each, with seeds from --first-seed on", low=1, high=41)
    first_seed: int = setting(0, "fairness", "the first seed that is reported")
    match_budget: bool = setting(False, "fairness", "choose ranks and alphas for uniform LoRA's parameters, to 5 %%")
    tune: str = setting("", "fairness", "a grid, as in 'lr=5e-4,1e-3 alpha=8,16': each row and task takes from it what "
                                        "is best on average over seeds that are not reported")
    tune_seeds: int = setting(2, "fairness", "runs of each choice, with seeds 1000, 1001, ...", low=1)
    tune_rows: int = setting(0, "fairness", "training rows of those runs; 0 = as --limit-train says")
    split_eval: bool = setting(False, "fairness", "tune on one half of the evaluation rows, report the other")
    run: bool = setting(True, "runs", "make the runs that are missing; without, print what there is")
    keep_old: bool = setting(False, "runs", "take results of another version of the program, input or device")
    jobs: int = setting(1, "runs", "runs at a time; they share out the GPUs or the CPU's cores", low=1)
    results: str = setting("runs/quality.jsonl", "runs", "file of finished runs, a line each: they are not made again")
    runs: str = setting("runs/quality", "runs", "folder of their run folders")
    csv: str = setting(None, "output", "file for a line per run with all of its numbers")
    picture: str = setting(None, "output", "PNG file for quality over --steps, if several, or trained parameters")


class Run:
    """One run of train.py: `row` and `task` are its place in the table, `flags` what it is told besides task and seed.

    `settings` is what they set, as train.py reads it; runs with the same `key`, that, the hash of the source and of
    the flags' files and the kind of device, are the same run. `columns` are the tasks that it has numbers for, `point`
    where on --steps and --budgets the row is, `times` its alpha over the one that was told, `line` what `make` has
    found or made, or None.
    """

    def __init__(self, row, task, seed, flags, folder):
        self.row, self.task, self.seed, self.flags, self.folder = row, task, seed, list(flags), folder
        self.columns, self.times, self.line = [task], 1.0, None
        self.point = row.partition(" @ ")[2]
        for flag in ("--method", "--task", "--seed", "--out", "--resume"):
            if [word.partition("=")[0] for word in self.flags].count(flag) > (flag == "--method"):
                raise UserError(f"{flag} is the comparison's own: use --methods, --tasks, --seeds, --runs")
        self.words = [*flags, "--task", task, "--seed", str(seed)]
        self.s = train.Settings(**vars(TRAIN.parse_args(self.words)))
        allocators.policy(self.s.method)  # complains about one that is not known
        self.settings = changed(vars(self.s))
        told = json.dumps(self.settings, sort_keys=True)
        device = devices.find_device("auto") if self.s.device == "auto" else self.s.device
        self.key = told, source.source_of(self.s), device.partition(":")[0]
        content = hashlib.sha256("".join(self.key).encode()).hexdigest()
        self.out = Path(folder) / re.sub(r"[^\w+.]+", "-", f"{row}-{task.rpartition(':')[2]}-{seed}-{content[:8]}")

    def again(self, seed, *flags):
        """The same with another seed and more flags, which override those before."""
        return Run(self.row, self.task, seed, [*self.flags, *flags], self.folder)

    def filled(self):
        """Its settings with the values that train.py takes for those that are not told."""
        s = copy.copy(self.s)
        train.settle(s, models.find_config(s.model, s.init_weights)[0])
        return s

    def perform(self, env):
        """Do what is left of it; returns its line for the results. Raises subprocess.CalledProcessError."""
        if not (self.out / "result.json").exists():
            begun = (self.out / "run.json").exists()
            words = ["--resume", str(self.out)] if begun else [*self.words, "--out", str(self.out)]
            start(["train.py", *words], env)
        run, result = (json.loads((self.out / name).read_text()) for name in ("run.json", "result.json"))
        settled = {name: value for name, value in changed(run["settings"]).items()
                   if name not in ("out", "model", "data", "adapter", "ranks")}  # absolute paths, of this machine
        return {"row": self.row, "settings": self.settings, "settled": settled, "source": run.get("source"), **result}

    def numbers(self, line):
        """{column: {metric: number}} of its line in the results."""
        return {self.task: line}


def start(words, env=None):
    """What a program beside this one prints; raises subprocess.CalledProcessError."""
    command = [sys.executable, str(Path(__file__).with_name(words[0])), *words[1:]]
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=True).stdout


TRAIN = parser_of(train.Settings, "")


def changed(settings):
    """Those of a run's settings that are not train.py's defaults."""
    return {name: value for name, value in settings.items() if value != getattr(train.Settings, name, None)}


def make(runs, q):
    """Give the runs their `line` in the results, and make those that have none, q.jobs at a time.

    Returns {name: what went wrong} of those that failed. A run that was begun goes on from its last checkpoint. Ctrl-C
    reaches the runs, too: they stop at a checkpoint.
    """
    lines, failed, different = read_results(q.results), {}, {run.key: run for run in runs}
    old, take_old = [key for key in different if key not in lines and key[0] in lines], q.keep_old or not q.run
    if old:
        say(f"note: {len(old)} of {len(different)} results are of another version of the program, input or device: "
            + ("taken as they are" if take_old else "made again; --keep-old takes them as they are"))
    if take_old:
        lines |= {key: lines[key[0]] for key in old}
    waiting = [run for key, run in different.items() if key not in lines] if q.run else []
    for folder in (Path(q.results).parent, Path(q.runs)) if waiting else ():
        folder.mkdir(parents=True, exist_ok=True)
    lock, todo = threading.Lock(), iter(waiting)

    def work(env):
        for run in todo:
            log = Path(f"{run.out}.stderr.txt")
            try:
                run.line = lines[run.key] = run.perform(env)
                log.unlink(missing_ok=True)
                with lock:
                    append(q.results, run.line)
                scores([run], q.metric)  # a --metric that is not measured is refused after one run, not after all
            except subprocess.CalledProcessError as error:
                log.write_text(error.stderr, encoding="utf-8")
                last = (error.stderr.strip().splitlines() or ["?"])[-1]
                failed[run.out.name] = f"{last} (all of it: {log})"
                say(f"{run.out.name}: {failed[run.out.name]}")
            bar.update()

    with ThreadPoolExecutor(q.jobs) as pool, tqdm(total=len(waiting), desc="runs", disable=not waiting) as bar:
        try:
            list(pool.map(work, devices.environments(q.jobs)))
        except KeyboardInterrupt:
            say("stopped; the same command goes on")
            raise SystemExit(130) from None
        finally:
            waiting.clear()  # which ends `todo`
    for run in runs:
        run.line = lines.get(run.key)
    return failed


def append(file, line):
    """Add a line to a file of JSON lines, after what a process that was killed may have left of one."""
    with open(file, "a+b") as f:
        f.seek(max(0, f.tell() - 1))
        torn = f.read() not in (b"", b"\n")
        f.write(b"\n" * torn + to_json(line).encode() + b"\n")


def check(q, rows, tuned):
    """Refuse what would be chosen twice (by `rows`, by --tune: `tuned`), tuning seeds, files without a folder."""
    axes = [flag for flag, there in (("--steps", q.steps), ("--rank", q.budgets)) if there]
    for flag in tuned:
        if tuned.count(flag) > 1:
            raise UserError(f"--tune {flag[2:]}: is there twice: write its values once, with commas between them")
        if flag in axes or flag == "--rank" and q.match_budget:  # which goes on from a row's own rank
            raise UserError(f"--tune {flag[2:]}: what --match-budget, --budgets or --steps choose; leave one out")
    for task in q.tasks or ():
        data.task_row(task)  # complains about one that is not known
    for row, words in rows.items():
        for flag in (word.partition("=")[0] for word in words):
            if flag in (*axes, *tuned):
                raise UserError(f"row {row!r}: its {flag} would be --tune's, --budgets' or --steps'; leave one out")
    if q.tune and {*range(1000, 1000 + q.tune_seeds)} & {*range(q.first_seed, q.first_seed + q.seeds)}:
        raise UserError(f"--first-seed {q.first_seed}: seeds from 1000 on are --tune's, never reported: lower it")
    if not q.run and not Path(q.results).is_file():
        raise UserError(f"--no-run --results {q.results}: there is no such file; name one, or leave out --no-run")
    for file in filter(None, (q.csv, q.picture)):
        if not Path(file).absolute().parent.is_dir() or Path(file).is_dir():
            raise UserError(f"{file}: no file can be there; name another place")
    if q.picture and not q.picture.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--picture {q.picture}: a .png, .pdf or .svg is written; name one")


def quality(argv):
    """Make the runs of a comparison that are not made yet; returns the table as Markdown and a JSON object about it."""
    parser = parser_of(Comparison, "Compare methods over tasks and seeds; all other flags are train.py's.")
    parser.usage = "%(prog)s quality [flags] [train.py's flags]"
    own, flags = parser.parse_known_args(argv)
    q = Comparison(**vars(own))
    grid = grid_of(q.tune)
    methods = list(allocators.METHODS)
    if q.methods != "all":  # a comma may be part of a flag
        names = "|".join(map(re.escape, allocators.METHODS))
        methods = re.split(rf",\s*(?=(?:{names}|[^\s,]+\.py:\w+)(?:[\s,]|$))", q.methods)
    try:
        rows = {method: shlex.split(method) for method in methods}
    except ValueError as error:
        raise UserError(f"--methods {q.methods}: {error}: close the quotation") from None
    check(q, rows | {"of every row": flags}, tuned=grid[0][::2])
    for name, values in (("steps", q.steps), ("rank", q.budgets)):
        if values:
            rows = {f"{row} @ {name} {n}" if len(values) > 1 else row: [*words, f"--{name}", n]
                    for row, words in rows.items() for n in values}
    q.tasks = list(dict.fromkeys(q.tasks or [])) or [Run("", "", 0, flags, q.runs).filled().task]
    cells = [Run(row, task, 0, [*flags, "--method", *words], q.runs) for row, words in rows.items() for task in q.tasks]
    for choice in grid:  # complains before the first run
        cells[0].again(0, *choice)
    failed, chosen = {}, {}
    free = {flag.removeprefix("--").replace("-", "_") for flag in grid[0][::2]}  # of which each row has its own
    if q.match_budget:
        cells = match_budget(cells, q)
        free |= {"rank", "alpha"}
    if q.tune:
        cells, chosen, failed = tune(cells, q)
    half = ["--eval-half", "report"] * q.split_eval
    runs = [cell.again(seed, *half) for cell in cells for seed in range(q.first_seed, q.first_seed + q.seeds)]
    failed |= make(runs, q)
    about = summarise(runs, q.metric, free) | {"chosen": chosen, "failed": failed}
    done = [run for run in runs if run.line]
    if q.csv:
        write_csv(q.csv, done)
    if q.picture:
        from extras import pictures
        pictures.plot_quality(q.picture, q.steps and len(q.steps) > 1, done, about["metrics"])
    return comparison(about), about


# ---------------------------------------------------------------------------------------------- quality: a fair choice


def match_budget(cells, q):
    """The cells with ranks whose mean budget is within 5 % of uniform LoRA's; a cell is a row and task.

    A method's ranks depend on its training, so they are found by training with seed 0: at the rank as it was told,
    then at that times what was too much or too little. Those runs stay in the results and count if they fit. alpha
    grows with the rank; full, bitfit, --adapter and --ranks have none. Raises UserError without the row `lora`.
    """
    uniform = {(cell.task, cell.point): cell for cell in cells if cell.row.partition(" @ ")[0] == "lora"}
    if not uniform:
        raise UserError("--match-budget compares with uniform LoRA: add lora to --methods")
    told = {cell: cell.filled() for cell in cells
            if allocators.base_method(cell.s.method) not in ("full", "bitfit") and not (cell.s.adapter or cell.s.ranks)}
    tried, ranks = {cell: [] for cell in told}, {cell: s.rank for cell, s in told.items()}  # ranks: to try next

    def budget(run):
        return run.line["trainable_params"]["mean"] if run.line else math.inf

    def closest(cell):
        aim = budget(tried[uniform[cell.task, cell.point]][0])
        if aim == math.inf:
            raise UserError(f"--match-budget: uniform LoRA has no result on {cell.task}; see above")
        return min(((budget(run) / aim - 1, run) for run in tried[cell]), key=lambda pair: abs(pair[0]))

    for _ in range(6):
        for cell, rank in ranks.items():
            times = (rank / told[cell].rank) ** (0.5 if told[cell].scaling == "rslora" else 1)  # keeps the scale
            run = cell.again(0, "--rank", str(rank), "--alpha", f"{told[cell].alpha * times:g}")
            run.times = times
            tried[cell].append(run)
        make([tried[cell][-1] for cell in ranks], q)
        best, ranks = {cell: closest(cell) for cell in tried}, {}
        for cell, (off, run) in best.items():
            rank = max(1, round(run.s.rank / (1 + off)))
            failed = [other.s.rank for other in tried[cell] if not other.line and other.s.rank > run.s.rank]
            if failed and rank >= min(failed):
                rank = (run.s.rank + min(failed)) // 2
            if abs(off) > 0.05 and rank not in [other.s.rank for other in tried[cell]]:
                ranks[cell] = rank
    for cell, (off, run) in best.items():
        say(f"{cell.row}, {cell.task}: rank {run.s.rank}, mean budget {100 * off:+.1f} % from uniform LoRA's"
            + ": no rank tried comes closer" * (abs(off) > 0.05))
    return [best[cell][1] if cell in best else cell for cell in cells]


def grid_of(text, times=1):
    """Every choice of a grid "lr=1e-3,2e-3 alpha=8,16", as tuples of flags; alpha `times` what it says."""
    axes = []
    for word in text.split():
        name, _, values = word.partition("=")
        if not hasattr(train.Settings, name.replace("-", "_")) or not all(values.split(",")):
            raise UserError(f"--tune {word}: write settings and their values, as in 'lr=5e-4,1e-3 alpha=8,16'")
        flag = "--" + name.replace("_", "-")
        scaled = name == "alpha" and times != 1
        axes.append([(flag, f"{float(v) * times:g}" if scaled else v) for v in values.split(",")])
    return [sum(choice, ()) for choice in itertools.product(*axes)]


def tune(cells, q):
    """(the cells with the best choice of the grid, {row: {task: what that is}}, {cell without one: why}).

    The best is that by the mean of the metric over --tune-seeds, if all of them finished. The grid's alphas are meant
    for the rank that was told, and grow with --match-budget's.
    """
    more = ["--eval-half", "tune"] * q.split_eval + ["--limit-train", str(q.tune_rows)] * (q.tune_rows > 0)
    trials = {cell: {flags: [cell.again(1000 + i, *flags, *more) for i in range(q.tune_seeds)]
                     for flags in grid_of(q.tune, cell.times)} for cell in cells}
    make([run for choices in trials.values() for runs in choices.values() for run in runs], q)
    tuned, chosen, failed = [], {}, {}
    for cell, choices in trials.items():
        means = {}
        for flags, runs in choices.items():
            metrics, values = scores(runs, q.metric)
            numbers = values[cell.row].get(cell.task, {}).values()
            if len(numbers) == q.tune_seeds and math.isfinite(sum(numbers)):
                means[flags] = statistics.fmean(numbers) * (-1 if metrics[cell.task] in LOSSES else 1)
        if means:
            best = max(means, key=means.get)
            tuned.append(cell.again(0, *best))
            tries = sum(run.line is not None for runs in choices.values() for run in runs)
            chosen.setdefault(cell.row, {})[cell.task] = f"{' '.join(best)} (of {tries} runs)"
        else:
            failed[f"{cell.row}, {cell.task}"] = "left out: no choice of --tune has finished with all its seeds"
    return tuned, chosen, failed


# ---------------------------------------------------------------------------------------------- quality: its table


VARIANTS = {"scaling", "init", "dora", "lora_plus_ratio", "freeze_a"}  # settings that go with any policy
POLICY = {"method", "adapter", "ranks", "ranks_shuffled"} | {f.name for f in dataclasses.fields(train.Settings) if
          f.metadata["group"] not in ("what", "adapter", "optimization", "data", "machine")}


def scores(runs, metric=None):
    """({column: metric}, {row: {column: {seed: number}}}) of finished runs; columns are tasks, and their average.

    `metric` None takes each task's headline. Raises UserError for one that a run does not have.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.columns))
    metrics, values = dict.fromkeys(tasks, metric), {run.row: {} for run in runs}
    for run in runs:
        for task, numbers in run.numbers(run.line).items() if run.line else ():
            measured = [name for name, value in numbers.items() if type(value) is float and "second" not in name]
            if metric and metric not in (*measured, *data.task_row(task).metrics):  # what is NaN is in the file as null
                raise UserError(f"--metric {metric}: not measured on {task}, only {', '.join(measured)}")
            known = [name for name in (*data.task_row(task).metrics, "loss") if name in numbers]
            if known:  # else another program scores the task
                metrics[task] = metrics[task] or known[0]
                value = numbers.get(metrics[task])  # NaN is null in the file
                if type(value) not in (int, float, type(None)):
                    raise UserError(f"--results: {metrics[task]} of {run.row}, {task}, seed {run.seed} is no number "
                                    f"({value!r:.60}): remove that line")
                values[run.row].setdefault(task, {})[run.seed] = math.nan if value is None else value
    if len(tasks) > 1 and len({metrics[task] in LOSSES for task in tasks}) == 1:  # else there is none
        metrics["average"] = ""
        for row in values.values():
            seeds = set.intersection(*(set(row.get(task, ())) for task in tasks))
            if seeds:
                row["average"] = {seed: statistics.fmean(row[task][seed] for task in tasks) for seed in sorted(seeds)}
    return metrics, values


def baselines(runs, free=()):
    """{row: the row of uniform LoRA that it is compared with}, where there is one, of finished runs.

    The two equal each other in every setting that either was told, as it was filled in, but for the policy's own and
    those in `free`. Variants (PiSSA, DoRA ...) that the baseline has the row has, too: `lalora --dora` is compared with
    `lora --dora` if that is there, else with `lora`, and so is `lora --dora`.
    """
    def value(line, name):
        place = "settings" if name in ("model", "data") else "settled"  # in the run folder an absolute path
        return line[place].get(name, getattr(train.Settings, name))

    def variants(line):
        return line["settled"].keys() & VARIANTS

    def uniform(line):
        return value(line, "method") == "lora" and not {"adapter", "ranks"} & line["settings"].keys()

    def fits(line, base):
        told = (line["settings"].keys() | base["settings"].keys()) - POLICY - VARIANTS - set(free) | variants(base)
        same = uniform(line) and variants(base) == variants(line)
        return uniform(base) and not same and all(value(line, name) == value(base, name) for name in told)

    lines, found = {}, {}
    for run in runs:
        lines.setdefault(run.row, {})[run.task, run.seed, run.point] = run.line
    for row, own in lines.items():
        fitting = {}
        for name, others in lines.items():
            both = own.keys() & others.keys()
            if both and all(fits(own[place], others[place]) for place in both):
                fitting[name] = len(variants(others[min(both)]))
        if fitting:
            found[row] = max(fitting, key=fitting.get)
    return found


def summarise(runs, metric=None, free=()):
    """What the table says of the runs that are done, as a JSON object; rows are in the order of `runs`.

    A row has for each column mean and standard deviation over seeds, and the mean difference from its baseline, over
    the seeds that both have, with p of the sign-flip test; besides what was trained, seconds and memory.
    """
    done = [run for run in runs if run.line]
    (metrics, values), against, rows = scores(runs, metric), baselines(done, free), {}
    for name, columns in values.items():
        row = rows[name] = {"against": against.get(name)}
        for column, mine in columns.items():
            theirs = values.get(row["against"], {}).get(column, {})
            pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            asked = len({run.seed for run in runs if run.row == name and column in (*run.columns, "average")})
            row[column] = {"mean": statistics.fmean(mine.values()), "seeds": len(mine), "asked": asked, "p": None,
                           "std": float(np.std([*mine.values()], ddof=1)) if len(mine) > 1 else None}
            if pairs and not math.isnan(sum(pairs)):
                row[column] |= {"difference": statistics.fmean(pairs), "p": sign_flip(pairs)}
        lines = [run.line for run in done if run.row == name]
        if lines:
            sizes = [line["trainable_params"] for line in lines]
            row |= {"trainable_params": {k: statistics.fmean(size[k] for size in sizes) for k in sizes[0]},
                    "seconds": statistics.fmean(line["seconds"] for line in lines),
                    "peak_memory_mb": max(line["peak_memory_mb"] for line in lines)}
    return {"metrics": metrics, "rows": rows}


# ---------------------------------------------------------------------------------------------- command line


def settle(b):
    """Fill what depends on the machine; raises UserError for what cannot work."""
    b.device = devices.find_device(b.device)
    known = ["eager", "compiled", "graphs"] if devices.settle(b) else ["eager", "compiled"]
    b.modes = b.modes or known[:-1]
    if not {*b.modes} <= {*known}:
        raise UserError(f"--modes {','.join(b.modes)}: choose from {', '.join(known)}")


def answer(command, text, about):
    """Print a table and one line of JSON; exit status 1 if a run failed."""
    print(text)
    print(to_json({"command": command} | about))
    if about.get("failed"):
        raise SystemExit(1)


def report(command, b, rows):
    """Print what was measured: a table, and one line of JSON."""
    answer(command, table(rows), {"device": devices.device_name(b.device), "dtype": b.dtype, **devices.VERSIONS,
                                  "settings": dataclasses.asdict(b), "rows": rows})


COMMANDS = {"speed": speed, "memory": memory}


def main(argv=None):
    """Do what the command line says: measure, or compare."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["quality"]:
        answer("quality", *quality(argv[1:]))
        return
    parser = parser_of(Bench, __doc__.split("\n\n")[0])
    parser.usage = f"%(prog)s {{{','.join(COMMANDS)}}} [flags]  |  %(prog)s quality [--help]"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to measure")
    given = vars(parser.parse_args(argv))
    command, b = given.pop("command"), Bench(**given)
    settle(b)
    report(command, b, COMMANDS[command](b))


if __name__ == "__main__":
    run_program(main)
