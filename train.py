"""Fine-tune a frozen transformer with LoRA whose ranks a policy allocates: the command line, the loop, the run folder.

    python train.py                                              # the embedded default: a small ViT, offline
    python train.py --method lelora --model llama2-7b            # any method, any model
    python train.py --method lora --model roberta-base --task cola --data glue/
    python train.py --method my_policy.py:MyPolicy               # a policy in a file of your own
    python train.py --task my_tasks.py:MY_TASK --data mine/      # a task in one, see data.Task
    torchrun --nproc-per-node 8 train.py --model llama3-8b       # the same numbers on 8 GPUs; --shard: FSDP

Progress goes to stderr; the last line on stdout is one JSON object with the result.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import allocators
import data
import eval as evaluation
import lora
import model as models
from model import UserError


def setting(default, group, help, choices=None, low=0, high=2**63, above=None):
    """One field of `Settings`: default, the --help group it is listed in, help line, allowed values or bounds.

    Numbers go from `low` to below `high`, and are larger than `above`.
    """
    bounds = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, **bounds})


@dataclass
class Settings:
    """Everything that defines a run; a field is a flag (`--batch-size`), None takes the task's or the paper's value."""

    method: str = setting("lora", "what", "who decides the ranks, or a baseline: " + ", ".join(allocators.METHODS)
                          + ", or my_policy.py:MyPolicy")
    model: str = setting("vit-digits", "what", "short name, Hub id or folder with config.json and *.safetensors")
    task: str = setting(None, "what", "task name, or my_tasks.py:MY_TASK; default by model family (digits-rot90, "
                        "cola, commonsense)")
    data: str = setting(None, "what", "folder or file with the task's data; default: the cache, fetched if absent")
    out: str = setting(None, "what", "run folder; default runs/METHOD-MODEL-TASK-SEED")
    seed: int = setting(0, "what", "seed of initialisation, data order, dropout and policies")

    rank: int = setting(None, "adapter", "nominal rank r; capacity of each adapter for most methods", low=1)
    alpha: float = setting(None, "adapter", "LoRA alpha; the update is scaled by alpha / r. Unset: the papers'; "
                                         "adalora: 16 x the triplets it starts with", above=0)
    dropout: float = setting(None, "adapter", "dropout on the adapter's input", high=1)
    targets: list = setting(None, "adapter", "projections to adapt, of query,key,value,out,gate,up,down; "
                                             "default query,value (encoders, ViT) or query,key,value,up,down")
    scaling: str = setting("nominal", "adapter", "scale: alpha / r, alpha / r_i, or rsLoRA's alpha / sqrt(r)",
                           ("nominal", "own", "rslora"))
    ranks: str = setting(None, "adapter", "for --method lora: a run folder whose final ranks to take, or {name: rank} "
                                          "in JSON")
    ranks_shuffled: bool = setting(False, "adapter", "deal the ranks of --ranks to other matrices, by the seed")
    adapter: str = setting(None, "adapter", "folder of a PEFT adapter for --method lora to start from, as it is")
    init: str = setting("lora", "adapter", "start at W's r largest (pissa) or smallest (milora) singular components; "
                                           "then without --dropout", ("lora", "pissa", "milora"))
    dora: bool = setting(False, "adapter", "DoRA: trainable lengths of the rows of W + s B A")
    lora_plus_ratio: float = setting(1.0, "adapter", "LoRA+: learning rate of B over that of A; the paper suggests 16",
                                     above=0)
    freeze_a: bool = setting(False, "adapter", "LoRA-FA: train B alone")

    epochs: float = setting(None, "optimization", "passes over the training set", above=0)
    steps: int = setting(None, "optimization", "optimizer steps; overrides --epochs", low=1)
    batch_size: int = setting(None, "optimization", "examples per batch, of all processes together", low=1)
    accumulate: int = setting(1, "optimization", "batches per optimizer step", low=1)
    optimizer: str = setting("adamw", "optimization", "muon: torch's Muon for A and B, AdamW for the rest",
                             ("adamw", "sgd", "muon"))
    lr: float = setting(None, "optimization", "peak learning rate; adalora: its authors', or twice LoRA's", above=0)
    weight_decay: float = setting(None, "optimization", "decoupled weight decay (with sgd, L2); none on W's own "
                                                        "components (LeLoRA, PiSSA, MiLoRA)")
    warmup: float = setting(None, "optimization", "warm-up: below 1 a share of all steps (0.06 = 6 %%), else steps; "
                                               "weightlora: none")
    schedule: str = setting("linear", "optimization", "learning rate after warm-up", ("linear", "cosine", "constant"))
    clip: float = setting(1.0, "optimization", "clip the gradient's norm to this; 0 = never")

    max_length: int = setting(None, "data", "longest input in tokens; the rest is cut", low=1)
    limit_train: int = setting(0, "data", "use only the first N training rows; 0 = all")
    limit_eval: int = setting(0, "data", "use only the first N evaluation rows; 0 = all")
    eval_batch_size: int = setting(0, "data", "examples at a time in evaluation; 0 = as in training, or what a GPU "
                                              "holds")
    sample_train: bool = setting(False, "data", "draw the rows of --limit-train by the seed")
    eval_half: str = setting("all", "data", "evaluate on all rows, or on one of two halves drawn once for all: one to "
                                            "tune on, one to report", ("all", "tune", "report"))
    score: str = setting("generation", "data", "score generated answers, or the likeliest of the allowed ones",
                         ("generation", "likelihood"))

    device: str = setting("auto", "machine", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "the model's; auto = bfloat16 on a GPU, else float32",
                         ("auto", "float32", "bfloat16"))
    weights: str = setting("float", "machine", "int8 = keep the frozen matrices of the blocks in 8 bits, a quarter of "
                                               "float32's memory", ("float", "int8"))
    compile: str = setting("auto", "machine", "compile each block with torch.compile; auto = on a GPU",
                           ("auto", "on", "off"))
    checkpointing: bool = setting(False, "machine", "recompute activations in the backward pass to save memory")
    forward_rows: int = setting(0, "machine", "split a batch into forward passes of at most N rows; 0 = as many as fit "
                                              "a GPU's memory; recompute activations where no row does")
    shard: bool = setting(False, "machine", "under torchrun: spread the frozen weights over the devices (FSDP)")
    init_weights: str = setting("checkpoint", "machine", "random = build the architecture without weights",
                                ("checkpoint", "random"))
    log_every: int = setting(10, "machine", "steps between lines in metrics.jsonl and ranks.jsonl", low=1)
    eval_every: int = setting(0, "machine", "steps between evaluations; 0 = each epoch, at most 10 in all")
    save_every: int = setting(0, "machine", "steps between checkpoints; 0 = with each evaluation")
    keep: int = setting(2, "machine", "checkpoints to keep", low=1)
    max_bad_steps: int = setting(10, "machine", "steps in a row with a non-finite loss or gradient that end the run",
                                 low=1)
    resume: str = setting(None, "machine", "run folder to go on with from its newest checkpoint, with its own settings")
    eval_before: bool = setting(True, "machine", "evaluate before training, too")

    r_min: int = setting(4, "static", "smallest rank r_min; a lower --rank is raised to it", low=1)
    r_max: int = setting(32, "static", "largest rank; a higher --rank is cut to it", low=1)
    empirical_depth: str = setting("text", "static", "depth of block i of L for empirical: i / L, or i / (L - 1) as in "
                                                     "its authors' code", ("text", "code"))
    adalora_init_ratio: float = setting(1.5, "adalora", "capacity over --rank: the first budget over the last", low=1)
    adalora_t_init: int = setting(None, "adalora", "t_i, steps before the first pruning; default 10 %% of the run")
    adalora_t_final: int = setting(None, "adalora", "t_f, steps with the final budget; default 50 %% of the run")
    adalora_delta_t: int = setting(10, "adalora", "Delta_T, steps between allocations", low=1)
    adalora_beta1: float = setting(0.85, "adalora", "beta_1, smoothing of the sensitivity", high=1)
    adalora_beta2: float = setting(0.85, "adalora", "beta_2, smoothing of its uncertainty", high=1)
    adalora_orth: float = setting(0.1, "adalora", "gamma, weight of the orthogonality penalty; its authors' scripts: "
                                                  "0.1, RTE and STS-B 0.3; PEFT: 0.5")
    lalora_gamma: float = setting(None, "lalora", "gamma, how fast the budget grows (Eq. 5); default by --rank")
    lalora_budget: str = setting("grow", "lalora", "Eq. 5, or full = r L from the start (w/o CAR)", ("grow", "full"))
    lalora_fidelity: str = setting("step", "lalora", "f: Eq. 10, truncated over full norm (section 3.3's prose), norm "
                                                     "at the start over now (5.2's), or 1",
                                   ("step", "truncation", "initial", "off"))
    lalora_score: str = setting("norm", "lalora", "contribution c: Eq. 9, or section 5.7's Fisher information",
                                ("norm", "fisher"))
    lalora_softmax: str = setting("relative", "lalora", "Eq. 8 over contributions over their mean, or as they are",
                                  ("relative", "raw"))
    weightlora_keep: int = setting(0, "weightlora", "K, matrices that keep an adapter; 0 = half")
    weightlora_steps: int = setting(0, "weightlora", "T, warm-up steps; 0 = 0.5 %% of the run, at least 5")
    weightlora_examples: int = setting(192, "weightlora", "rows that a warm-up step sees at least, in several batches")
    weightlora_lr: float = setting(5.0, "weightlora", "eta, step size of omega, times the schedule's rate", above=0)
    weightlora_threshold: str = setting("every", "weightlora", "threshold omega at each warm-up step or after the last",
                                        ("every", "end"))
    weightlora_rank_by: str = setting("value", "weightlora", "keep the largest omega (its authors' code), |omega| "
                                                             "(their text), or |omega - 1|",
                                      ("value", "magnitude", "moved"))
    credit_steps: int = setting(0, "credit", "T, warm-up steps; 0 = 10, or as many as the run has")
    credit_examples: int = setting(192, "credit", "rows that a warm-up step sees at least, in several batches")
    credit_power: float = setting(0.5, "credit", "power of the credit: 0 deals alike to all, above 1 to few")
    credit_cap: float = setting(4.0, "credit", "most rank of one matrix, over --rank", low=1)
    credit_budget: str = setting("parameters", "credit", "deal out uniform LoRA's parameters, or its units of rank",
                                 ("parameters", "ranks"))
    credit_share: float = setting(1.0, "credit", "how much of that is dealt out, to go below rank 1", above=0)
    lelora_dims: list = setting(None, "lelora", "candidate dimensions; default 0, powers of 2 up to --rank")
    lelora_locations: list = setting(None, "lelora", "candidate windows; default first,middle,last")
    lelora_reward_alpha: float = setting(0.8, "lelora", "alpha of the reward, the weight of the loss's change (Eq. 4)")
    lelora_every: int = setting(1, "lelora", "iterations between actions", low=1)
    lelora_ablate: str = setting("none", "lelora", "learn the rank alone, or the location alone (Fig. 5a); random: "
                                                   "learn nothing, the control", ("none", "rank", "location", "random"))
    lelora_start: str = setting("uniform", "lelora", "all actions equally likely at first, or as the heads are drawn "
                                                     "(Appendix B)", ("uniform", "kaiming"))
    lelora_baseline: str = setting("mean", "lelora", "compare the reward with its running mean, or only the loss's "
                                                     "change with its trend", ("mean", "trend"))
    lelora_policy_lr: float = setting(1e-3, "lelora", "eta_2, the policy network's learning rate (Eq. 10)")
    lelora_policy_optimizer: str = setting("sgd", "lelora", "Eq. 10's plain steps, or Adam", ("sgd", "adam"))
    lelora_inputs: str = setting("standardised", "lelora", "norms and singular values as the policy sees them",
                                 ("standardised", "raw"))


GROUPS = {"what": "what to run", "adapter": "adapter",
          "optimization": "optimization (unset: the papers' values for model, task and method)",
          "data": "data", "machine": "machine and logging",
          "static": "linear-decay, attention-heavy, empirical (Adaptive LoRA, section 3.1)",
          "adalora": "adalora (Zhang et al. 2023)", "lalora": "lalora (La-LoRA)",
          "weightlora": "weightlora, weightlora+, random (WeightLoRA)", "lelora": "lelora (LeLoRA)",
          "credit": "credit (this project's: rank in proportion to what it earns)"}


def parser_of(settings_class, description):
    """An ArgumentParser with one flag per field of the dataclass, grouped as its fields say."""
    parser = evaluation.Parser(description=description)
    groups = {}
    for f in dataclasses.fields(settings_class):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(GROUPS.get(name, name))
        flag, options = "--" + f.name.replace("_", "-"), {"default": f.default, "help": f.metadata["help"]}
        if f.type is bool:
            groups[name].add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            convert = (lambda text: [part for part in text.split(",") if part]) if f.type is list else f.type
            groups[name].add_argument(flag, type=convert, choices=f.metadata["choices"], metavar="X", **options)
    return parser


def check_bounds(settings):
    """Raises UserError for a number that is outside the bounds that stand beside its field."""
    for f in dataclasses.fields(settings):
        value, m = getattr(settings, f.name), f.metadata
        if f.type not in (int, float) or value is None:
            continue
        if not m["low"] <= value < m["high"] or m["above"] is not None and not value > m["above"]:
            least = f"above {m['above']}" if m["above"] is not None else f"from {m['low']} on"
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be a number {least} and below {m['high']:g}")


# ---------------------------------------------------------------------------------------------- settling the settings


def settle(s, config):
    """Fill the settings that are None: from the task's table row and the papers' values for the model's family."""
    kind, policy = config.kind, allocators.policy(s.method)
    own = [name for name in ("method", "rank", "alpha", "dropout", "targets", "scaling", "init", "dora", "ranks")
           if getattr(s, name) != getattr(Settings, name)]
    if s.adapter and own and not s.resume:
        raise UserError(f"--adapter {s.adapter}: goes with --method lora, with ranks, alphas, dropout and targets "
                        f"of its own: leave out --{own[0]}")
    if s.targets is None:
        s.targets = default_targets(kind == "decoder")
    s.task = s.task or {"decoder": "commonsense", "encoder": "cola", "vit": "digits-rot90"}[kind]
    task = data.find_task(s.task, s.data)
    takes = {"encoder": ("classify", "regress", "span"), "decoder": ("lm", "classify", "regress"),
             "vit": ("image",)}[kind]
    if task.kind not in takes:
        raise UserError(f"--task {s.task} is of the kind '{task.kind}', but {s.model} ({config.family}) does "
                        f"{', '.join(takes)}: choose another model or task")
    chosen, reasons = data.hyperparameters(task, config.family, config.hidden_size, s.method, s.rank,
                                           s.adalora_init_ratio)
    taken = []
    for name, value in chosen.items():
        is_set = name in ("epochs", "steps") and (s.epochs, s.steps) != (None, None)
        is_set |= s.adapter is not None and name in ("rank", "alpha", "dropout")
        if hasattr(s, name) and getattr(s, name) is None and not is_set:
            setattr(s, name, value)
            taken += [f"{name} {value:g} ({reasons[name]})"] if name in reasons else []
    if taken:
        say(f"{s.method}: " + ", ".join(taken))
    s.device = evaluation.auto_device() if s.device == "auto" else s.device
    cuda = s.device.startswith("cuda")
    if dist.is_initialized() and cuda:
        own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= there:
            raise UserError(f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: there are {there} GPUs here")
        s.device = f"cuda:{own}"
        torch.cuda.set_device(s.device)
    if s.dtype == "auto":  # a model that is trained itself, not through adapters, needs float32's small steps
        adapters = cuda and s.method not in ("full", "bitfit")
        s.dtype = "bfloat16" if adapters and torch.cuda.is_bf16_supported() else "float32"
    if cuda and s.dtype == "float32":
        torch.set_float32_matmul_precision("high")  # TF32: on a GPU several times as fast
    if s.compile == "auto":
        s.compile = "on" if cuda else "off"
    if not s.out:
        stem = f"runs/{evaluation.variant(s)}-{Path(s.model).name}-{task.name}-{s.seed}"
        names = [stem] + [f"{stem}-{n}" for n in range(2, 10_000)]
        s.out = next(name for name in names if not Path(name).exists())
    check(s, policy)
    return task


def default_targets(decoder):
    """The projections that the papers adapt in a decoder, or else in an encoder or ViT."""
    return ["query", "key", "value", "up", "down"] if decoder else ["query", "value"]


def check(s, policy):
    """Refuse settings that cannot work; raises UserError with one line that names the flag."""
    def flag(name):
        return f"--{name.replace('_', '-')} {getattr(s, name)}".removesuffix(" True")

    check_bounds(s)
    if not 0 < len(s.targets) == len(set(s.targets)):
        raise UserError(f"--targets {','.join(s.targets)}: name each projection once")
    if s.r_min > s.r_max:
        raise UserError(f"{flag('r_min')} is above {flag('r_max')}")
    for name in policy.refuses:
        if getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag(name)}: has no meaning with --method {s.method}; leave it out")
    if s.freeze_a and (s.lora_plus_ratio != 1 or s.method == "lalora" and s.lalora_score == "fisher"):
        raise UserError("--freeze-a: --lora-plus-ratio and --lalora-score fisher need a trained A; leave them out")
    if s.ranks and s.method != "lora":
        raise UserError(f"{flag('ranks')}: goes with --method lora, not {s.method}")
    if s.sample_train and not s.limit_train:
        raise UserError("--sample-train: how many rows? say --limit-train, too")
    if s.ranks_shuffled and not s.ranks:
        raise UserError("--ranks-shuffled: there are no --ranks to deal out")
    if s.optimizer == "muon" and s.method in ("full", "bitfit"):
        raise UserError(f"--optimizer muon: is for adapters' A and B, which --method {s.method} has not")
    if s.weights == "int8" and (s.shard or s.method in ("full", "bitfit", "lelora") or s.init != "lora"):
        raise UserError("--weights int8: is for adapters beside W, on one device: not for --shard, --init or methods "
                        "full, bitfit and lelora, which train W or its components")
    evaluation.check_device(s.device)
    if s.shard and not dist.is_initialized():
        raise UserError("--shard spreads the model over several devices: torchrun --nproc-per-node N train.py ...")
    if s.shard and s.method in ("full", "bitfit"):
        raise UserError(f"{flag('method')} trains the model's own weights, which --shard spreads: leave --shard out")
    if s.shard and issubclass(policy, allocators.WeightLora) and (s.dora or s.init != "lora"):
        raise UserError(f"{flag('method')} --shard: survivors would start at weights that are spread by then: leave "
                        "out --init and --dora")
    taken = Path(s.out).exists() and (not Path(s.out).is_dir() or any(Path(s.out).iterdir()))
    if taken and not s.resume and process_and_count()[0] == 0:
        raise UserError(f"{flag('out')}: exists and is not empty; choose another folder or remove it")


# ---------------------------------------------------------------------------------------------- more than one device
#
# Every process computes the same step on its share of each batch: gradients are added up before policies see them, so
# all hold the same adapters and policy state, and decide alike. Process 0 alone prints and writes.


def process_and_count():
    """This process's number and how many there are: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes():
    """Join the processes that torchrun started, if it did; only process 0 is heard, apart from errors.

    Raises RunError when another one has ended in the middle.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))  # the others wait while 0 evaluates
    try:
        with contextlib.ExitStack() as quiet:
            if dist.get_rank():
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RunError("another process of this run has ended") from error
        raise
    dist.destroy_process_group()


def after_process_0(s):
    """Others wait here until process 0 comes, which reads, fetches and complains first; they take over its --out."""
    out = [s.out]
    dist.broadcast_object_list(out)
    s.out = out[0]


def add_up(tensors):
    """Replace each tensor by its sum over the processes: one message for all."""
    if process_and_count()[1] == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def agree_on(number):
    """The largest of the processes' numbers, on all; on the hosts, so that no device is waited for."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def start_alike(s, step, tensors):
    """Give all processes the parameters of process 0, which draws as if it were alone; dropout differs."""
    process, count = process_and_count()
    if count > 1:
        for p in tensors:
            dist.broadcast(p.data, 0)
    if process:
        torch.manual_seed(int(np.random.SeedSequence((s.seed, step, process)).generate_state(1)[0]))


def compare(step, training):
    """Raise RunError unless all processes hold the same parameters, vectors and policy state, by their sums."""
    if process_and_count()[1] == 1:
        return
    state = {name: t for name, t in training.state().items() if not name.endswith("generator")}
    sums = torch.stack([t.detach().sum(dtype=torch.float64).to(training.device) for t in state.values()])
    extremes = torch.stack([sums, -sums])  # the largest, and minus the smallest
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    different = [name for name, most, least in zip(state, *extremes.tolist()) if most != -least]
    if different:
        raise RunError(f"step {step}: the processes no longer hold the same {different[0]}", resumable=False)


def shard(model, device):
    """Spread the frozen weights over the processes (FSDP2), block by block from the CPU; what is trained stays whole.

    So policies and checkpoints see plain tensors, and only the weights of a block at work are on a device whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, not above: a second that other runs need not wait for
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    whole = {p for layer in lora.adapters(model).values() for p in layer.parameters(recurse=False)}
    whole |= set(model.head.parameters()) if model.head_kind != "lm" else set()
    for p in whole:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)


# ---------------------------------------------------------------------------------------------- a step


class Training:
    """What changes while a run goes on, and the step that changes it; bench.py takes the same steps.

    `kind` is the task's, `allocator` the policy, `params` what the optimizers move: the adapters' stacks and a trained
    head.
    """

    saved = ("moving", "vectors", "optimizers", "budget", "bad", "running")

    def __init__(self, s, model, kind, allocator):
        self.s, self.model, self.kind, self.allocator = s, model, kind, allocator
        self.device = torch.device(s.device)
        self.head = [] if kind == "lm" else list(model.head.parameters())
        for p in allocator.parameters() + self.head:
            p.requires_grad_(True)
        self.budget, self.bad = Budget(allocator), BadSteps(self.device)
        self.running = torch.zeros(2, device=self.device)  # loss since the last line in the log, its number of steps
        self.params = allocator.parameters() + self.head
        self.optimizers = lora.optimizers_for(s, self.params)

    @property
    def moving(self):
        """What differs from the base model: the trained, what a policy moves itself, and LoRA-FA's frozen A."""
        return [p.data for p in [*self.params, *self.allocator.own, *self.allocator.drawn()]]

    @property
    def vectors(self):
        return self.allocator.vectors()

    def follow(self):
        """Make the optimizers hold the parameters that there are now, after adapters came or went."""
        self.params = self.allocator.parameters() + self.head
        for optimizer, groups in zip(self.optimizers, lora.groups_for(self.s, self.params)):
            lora.follow(optimizer, groups)

    def state(self):
        """The policy's state and this one's, {name: live tensor}."""
        return lora.state_of(self.allocator, "policy") | lora.state_of(self)

    def restore(self, state):
        """Put back what `state` gave: the policy first, which says what adapters there are."""
        lora.restore(self.allocator, state, "policy")
        self.allocator.match_adapters()
        self.allocator.restored()
        self.follow()
        lora.restore(self, state)

    def forward_backward(self, passes):
        """Leave the gradients of the loss at the layers; returns it, a 0-d tensor."""
        loss = torch.zeros((), device=self.device)
        for inputs, labels, weight in passes:
            self.allocator.real = inputs.get("mask")
            if self.kind == "lm" and not self.allocator.reads_outputs():
                outputs, part = None, evaluation.token_loss(self.model, inputs, labels) * weight
            else:
                outputs = evaluation.logits(self.model, inputs)
                part = criterion(self.kind, outputs, labels) * weight
            penalty = self.allocator.penalty(inputs, labels, outputs) / (len(passes) * process_and_count()[1])
            (part + penalty).backward()
            loss += part.detach()
        return loss

    def step(self, step, passes, rate=1.0):
        """Take optimizer step `step` at `rate` times the peak learning rate; returns its loss and gradient norm, 0-d.

        `passes` are the forward passes of this process, (inputs, labels, weight) each: weight is 1 over the number of
        labels of the whole step, so that each label counts the same, or 0.
        """
        s, allocator = self.s, self.allocator
        allocator.rate = rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * rate * group["lr_ratio"]
        loss = self.forward_backward(passes)

        moved = [*self.params, *allocator.own]
        lora.gather_gradients(moved)
        grads = [p.grad for p in moved if p.grad is not None]
        add_up([loss, *grads, *(getattr(allocator, name) for name in allocator.summed)])
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        ok = self.bad.guard(step, loss, norm, grads, self.optimizers, allocator)
        allocator.after_backward(step)

        nn.utils.clip_grads_with_norm_(self.params, s.clip or math.inf, norm.where(ok, 0))
        for optimizer in self.optimizers:
            optimizer.step()
        self.budget.add()

        if allocator.after_step(step):
            self.follow()
            start_alike(s, step, self.moving)
        for p in moved:
            p.grad = None
        for name in allocator.summed:
            getattr(allocator, name).zero_()
        self.running += torch.where(ok, torch.stack((loss, torch.ones_like(loss))), 0)
        return loss, norm


def fit_memory(training, batches):
    """On a GPU, settle how many rows a forward pass takes: as many of the longest ones as its memory holds.

    Where no single row fits, activations are recomputed and it is tried again. Tried for real, forward and backward.
    """
    s, model, batch = training.s, training.model, min(training.s.batch_size, len(batches.split))
    if training.device.type != "cuda" or s.forward_rows:
        return
    s.forward_rows = rows = math.ceil(batch / process_and_count()[1])
    longest = np.argsort(batches.split.lengths)[::-1][:rows].tolist()
    later = 3 * sum(p.nbytes for p in training.params)  # stacked gradients and two moments
    held = torch.empty(later, dtype=torch.uint8, device=training.device)
    model.train()
    while True:
        before = torch.cuda.get_rng_state(training.device)
        try:
            batch = data.collate(batches.split, longest[:s.forward_rows], batches.widths, s.device)
            training.forward_backward([(*batch, 0.0)])
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        torch.cuda.set_rng_state(before, training.device)
        for p in [*model.parameters(), *training.params]:
            p.grad = None
        torch.cuda.empty_cache()
        if fits:
            break
        if s.forward_rows == 1 and model.checkpointing:
            raise UserError(f"--max-length {s.max_length}: one row does not fit the memory of {s.device}: lower it")
        if s.forward_rows == 1:
            s.checkpointing = model.checkpointing = True
            s.forward_rows = 2 * rows
        s.forward_rows = math.ceil(s.forward_rows / 2)
    for name in training.allocator.summed:
        getattr(training.allocator, name).zero_()
    s.forward_rows = -agree_on(-s.forward_rows)
    del held
    if s.forward_rows < rows or s.checkpointing:
        say(f"memory: forward passes of {s.forward_rows} rows" + ", activations recomputed" * s.checkpointing)


def criterion(kind, logits, labels):
    """Sum over examples (or answer tokens) of the training loss, in float32: squared error or cross-entropy."""
    if kind == "regress":
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")  # logits (B, 1), labels (B,)
    return F.cross_entropy(logits.float(), labels, reduction="sum")  # logits (B or N, C), labels (B or N,)


def schedule(s, steps):
    """Learning rate over its peak after 0, 1, ... optimizer steps: linear warm-up, then linear, cosine or constant."""
    warmup = int(s.warmup) if s.warmup >= 1 else math.ceil(s.warmup * steps)

    def factor(step):
        if step < warmup:
            return step / max(1, warmup)
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[s.schedule]

    return factor


class Budget:
    """Trainable adapter parameters now, mean over steps, peak; on the device, for which only `report` waits."""

    saved = ("steps", "total", "peak")

    def __init__(self, allocator):
        self.allocator, self.steps = allocator, 0
        self.total, self.peak = (torch.zeros((), dtype=torch.float64, device=allocator.device) for _ in range(2))

    def add(self):
        """Count the allocation in force for one more step."""
        now = self.allocator.budget()
        self.total += now
        torch.maximum(self.peak, now, out=self.peak)
        self.steps += 1

    def report(self):
        """{"now", "mean", "peak"} as whole numbers."""
        now = self.allocator.budget()
        mean = self.total / self.steps if self.steps else now
        return {"now": round(now.item()), "mean": round(mean.item()), "peak": round(max(self.peak, now).item())}


class BadSteps:
    """Counts the steps whose loss or gradient was not finite; in such a step nothing moves.

    Whether a step was bad is known on the device only, and asking would make the host wait at every step. So all that
    follows is computed in either case, and a bad step made harmless: its gradients become zeros, the optimizers'
    `found_inf` holds weights and moments still (as torch.amp's GradScaler does it), and policies see `allocator.ok`.
    The counts stay on the device until `check` reads them, which waits for it.
    """

    saved = ("counts",)

    def __init__(self, device):
        self.counts = torch.zeros(4, dtype=torch.long, device=device)  # in all, in a row now, at most, the last step

    def guard(self, step, loss, norm, grads, optimizers, allocator):
        """Make the gradients harmless if their norm or the loss is not finite; returns whether all are (0-d, bool)."""
        ok = norm.isfinite() & loss.isfinite()
        bad = ~ok
        for grad in grads:
            grad.masked_fill_(bad, 0)
        allocator.ok = ok
        for optimizer in optimizers:
            optimizer.found_inf = bad.float()
        total, row, most, last = self.counts.unbind()
        total += bad
        row += 1
        row *= bad
        torch.maximum(most, row, out=most)
        last.copy_(torch.where(bad, step, last))
        return ok

    def check(self, limit, out):
        """The number of bad steps so far; raises RunError when `limit` or more came in a row."""
        total, _, most, last = self.counts.tolist()
        if most >= limit:
            newest = next(iter(checkpoints(out)), "none yet")
            raise RunError(f"step {last}: loss or gradient not finite for {most} steps in a row; last good checkpoint: "
                           f"{newest}; lower --lr or look at the rows")
        return total


# ---------------------------------------------------------------------------------------------- the loop


def train(training, batches, task, alive, evaluate, log):
    """Run the optimizer over `batches`; returns {"steps", "seconds", "trainable_params", ...}.

    `alive` is the run's Survival, `evaluate(step)` measures the model as it stands, `log(file, dict)` appends a line.
    """
    s, allocator, model = training.s, training.allocator, training.model
    steps, per_epoch, rate_at = batches.total_steps, batches.steps_per_epoch, schedule(s, batches.total_steps)
    eval_every = s.eval_every or max(per_epoch, math.ceil(steps / 10))
    save_every = s.save_every or eval_every
    done, seconds = alive.resume(training, batches)
    start_alike(s, done, training.moving)
    seen, started = 0, time.time() - seconds
    forget_peak_memory(s.device)
    model.train()
    with alive.until_a_signal(), tqdm(
            total=steps, initial=done, desc=f"{s.method} {task.name}", unit="step", dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30) as bar:  # a log file needs no animation
        for step in range(done + 1, steps + 1):
            if (step - 1) % eval_every == 0 and (step > 1 or s.eval_before):
                began = time.time()
                evaluate(step - 1)  # after the checkpoint: killed here, a run loses no step
                started += time.time() - began
            passes, rows = batches.take(allocator.examples(step))
            _, norm = training.step(step, passes, rate_at(step - 1))
            seen += rows
            bar.update()

            logged = step % s.log_every == 0 or step == steps
            stopping = alive.asked_to_stop()
            saved = step % save_every == 0 or step == steps or stopping
            if logged or saved:
                skipped = training.bad.check(min(s.max_bad_steps, steps), s.out)
                compare(step, training)
            if logged or step <= 10:  # warm-up phases are short
                numbers = allocator.log()
                log("ranks.jsonl", {"step": step, "ranks": allocator.ranks()}
                    | {k: v for k, v in numbers.items() if isinstance(v, dict)})
            if logged:
                (total, good), size = training.running.tolist(), training.budget.report()
                training.running.zero_()
                mean_loss, rate = total / good if good else math.nan, seen / (time.time() - started - seconds)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, budget {size['now']:,}, {rate:.0f} examples/s",
                                    refresh=False)
                log("metrics.jsonl", {"step": step, "epoch": round(step / per_epoch, 3), "loss": mean_loss,
                                      "lr": s.lr * rate_at(step - 1), "grad_norm": norm.item(),
                                      "skipped_steps": skipped, "examples_per_second": rate, "trainable_params": size}
                    | {k: v for k, v in numbers.items() if not isinstance(v, dict)})
            if saved:
                alive.save(training, batches, step, time.time() - started)
            if stopping:
                raise Interrupted(stopping)
    alive.asked_to_stop(now=True)  # in the last step
    model.eval()
    if allocator.dynamic and not allocator.allocations:
        raise UserError(f"{s.method} never allocated in {steps} steps, so this was plain LoRA: train longer")
    spent = time.time() - started
    return {"steps": steps, "seconds": round(spent, 2), "trainable_params": training.budget.report(),
            "held_params": sum(p.numel() for p in allocator.parameters()),
            "skipped_steps": training.bad.check(math.inf, s.out),
            "examples_per_second": round(seen / max(spent - seconds, 1e-9), 2),
            "peak_memory_mb": round(peak_memory(s.device) / 2**20)}


def start_at_mean(model, split):
    """Start a new regression head at the mean training label, where it has a bias (decoders' heads have none).

    From 0, the adapters push the features along the head until the mean is reached, faster than the head itself gets
    there, and the pooler's tanh saturates: with STS-B's labels (mean 2.7) at learning rate 2e-3 nothing is learned
    after that, here as in transformers + PEFT.
    """
    for name in model.fresh:
        if name.startswith("head.") and name.endswith("bias") and model.get_parameter(name).numel() == 1:
            model.get_parameter(name).data.fill_(split.labels.mean())


def validation(model, kind, split, device):
    """A call that gives the mean loss on `split` as a 0-d tensor, without gradients and without dropout."""
    inputs, labels = data.collate(split, list(range(len(split))), device=device)

    @torch.no_grad()
    def loss():
        model.eval()
        if kind == "lm":
            value = evaluation.token_loss(model, inputs, labels) / labels.numel()
        else:
            value = criterion(kind, evaluation.logits(model, inputs), labels) / labels.numel()
        model.train()
        if dist.is_initialized():  # all compute it, but one rounding apart they would part ways
            dist.broadcast(value, 0)
        return value

    return loss


def compile_blocks(model):
    """Compile each block on its own: blocks of one kind share a graph, and policies' work is outside."""
    torch._dynamo.config.recompile_limit = 64 + 8 * len(model.blocks)  # 8 are too few where adapters differ by block
    for block in model.blocks:
        block.compile()


# ---------------------------------------------------------------------------------------------- keeping a run alive


class RunError(RuntimeError):
    """A run that cannot go on, though its settings are right; the message is one line for the user, exit status 1."""

    def __init__(self, message, resumable=True):
        super().__init__(message)
        self.resumable = resumable


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; args[0] is its number."""


@contextlib.contextmanager
def on_signal(act):
    """Inside this context SIGINT and SIGTERM call act(number)."""
    before = {n: signal.signal(n, lambda number, _: act(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once(number):
    """A signal outside the training loop: there is nothing to finish."""
    raise Interrupted(number)


class Survival:
    """What keeps a run alive: the lock on its folder, signals, checkpoints and going on from them."""

    def __init__(self, s):
        self.s, self.came, self.file = s, [], None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()  # and so unlocks

    def claim(self):
        """Make the run folder this run's until the end; `self.file` is its run.json, open for writing at the end.

        The lock is the system's on that file: it goes with the process, however that ends. Raises UserError when the
        folder cannot be made, another run is at work in it, or this one has finished.
        """
        out = Path(self.s.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}): choose another folder") from None
        self.file = open(out / "run.json", "a", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is at work in this folder; wait, or choose another --out") from None
        except OSError as error:
            say(f"warning: {out}: cannot be locked here ({error.strerror}); start no second run in it")
        if not self.s.resume and self.file.tell():
            raise UserError(f"{out}: another run has begun in this folder; choose another --out")
        if self.s.resume and (out / "result.json").exists():
            raise UserError(f"--resume {out}: this run has finished; see its result.json")

    def begin(self, about):
        """Write run.json: from here on the run can be resumed."""
        self.file.write(evaluation.to_json(about, indent=2) + "\n")
        self.file.flush()
        models.sync(Path(self.s.out) / "run.json")
        models.sync(self.s.out)

    def until_a_signal(self):
        """A context in which the first signal asks to stop after the step; the second one stops at once."""
        def ask(number):
            if self.came and process_and_count()[1] == 1:  # torchrun passes on one, and kills 30 s later
                raise Interrupted(number)
            self.came.append(number)
        return on_signal(ask)

    def asked_to_stop(self, now=False):
        """The number of a signal that came, to any process, or 0; with `now`, to this one: raises Interrupted."""
        number = self.came[0] if self.came else 0
        if now and number:
            raise Interrupted(number)
        return number if now else agree_on(number)

    def save(self, training, batches, step, seconds):
        """Write checkpoints/step-N: beside, synced, then renamed; only the newest `keep` stay.

        Raises RunError when it cannot be written; those that are there stay.
        """
        if process_and_count()[0]:
            return
        s, folder = self.s, Path(self.s.out) / "checkpoints" / f"step-{step}"
        state = training.state() | lora.state_of(batches, "batches")
        state["random.cpu"] = torch.get_rng_state()
        if s.device.startswith("cuda"):
            state["random.cuda"] = torch.cuda.get_rng_state(s.device)
        try:
            for old in folder.parent.glob("*.part"):  # left by a run that was killed here
                shutil.rmtree(old)
            with models.publish(folder) as part:
                save_file({name: value.cpu().clone().contiguous() for name, value in state.items()},  # views, of one
                          part / "state.safetensors")
                about = {"step": step, "seconds": seconds, "sha256": digest(part / "state.safetensors")}
                (part / "state.json").write_text(json.dumps(about))
            models.sync(s.out)  # the name checkpoints/ itself
            for old in checkpoints(s.out)[s.keep:]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder}: cannot be written ({error}): make room") from None

    def resume(self, training, batches):
        """Put a run back to where its newest whole checkpoint left it; returns its (step, seconds), or (0, 0).

        A damaged checkpoint is reported and the one before it is taken. Raises UserError when all are damaged.
        """
        s = self.s
        if not s.resume:
            return 0, 0.0
        if not checkpoints(s.out):
            say(f"{s.out} has no checkpoint yet: starting from the beginning")
            cut_logs(s.out, 0)
            return 0, 0.0
        for folder in checkpoints(s.out):
            try:
                about = json.loads((folder / "state.json").read_text())
                with safe_open(folder / "state.safetensors", framework="pt"):  # a lying header costs nothing
                    if digest(folder / "state.safetensors") != about["sha256"]:
                        raise ValueError("checksum differs")
                state = {name: value.clone() for name, value in load_file(folder / "state.safetensors").items()}
                break
            except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
                say(f"warning: {folder}: damaged ({error}); trying the checkpoint before it")
        else:
            raise UserError(f"{s.out}: no whole checkpoint in checkpoints/; start the run again without --resume")
        training.restore(state)
        lora.restore(batches, state, "batches")
        torch.set_rng_state(state["random.cpu"])
        if s.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["random.cuda"], s.device)
        cut_logs(s.out, about["step"])
        say(f"resuming {s.out} after step {about['step']}")
        return about["step"], about["seconds"]


def digest(path):
    """SHA-256 of a file, in hexadecimal; it is not read into memory."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def checkpoints(out):
    """Checkpoint folders of a run folder, the newest first."""
    found = [path for path in (Path(out) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def cut_logs(out, step):
    """Remove what was logged after the checkpoint of `step`, its evaluation included: it happens again."""
    if process_and_count()[0]:
        return
    for file in (Path(out) / "metrics.jsonl", Path(out) / "ranks.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        logged = [(json.loads(line), line) for line in lines if line.endswith("\n")]  # the last may be half a line
        kept = [line for about, line in logged if about["step"] < step + ("eval" not in about)]
        with models.publish(file, folder=False) as part:
            part.write_text("".join(kept), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- a whole run


def run(s):
    """Do what the settings say, from reading the model to the final evaluation; returns the result as a dict.

    Leaves the run folder: run.json, metrics.jsonl, ranks.jsonl, result.json and adapter/ (model/ for full and bitfit).
    The final numbers are those of a freshly loaded model with the saved adapter: what eval.py gives for the folder.
    Of several processes, all call this and process 0 gets the result.
    """
    with Survival(s) as alive:
        training, batches, task, splits, processor = set_up(s, alive)
        out, process, model, allocator = Path(s.out), process_and_count()[0], training.model, training.allocator

        def log(file, line):
            if process:
                return
            try:
                with open(out / file, "a", encoding="utf-8") as f:
                    f.write(evaluation.to_json(line) + "\n")
            except OSError as error:  # a full disk does not say where
                raise OSError(error.errno, error.strerror, str(out / file)) from None

        def evaluate(step):  # generating the answers takes long: only at the end
            if process and not s.shard:
                return
            rows = evaluation.rows_at_once(s, task, model, splits)
            metrics = evaluation.evaluate_splits(model, task, splits, rows, processor.tokenizer, generate=False)
            log("metrics.jsonl", {"step": step, "eval": metrics, "trainable_params": training.budget.report()})
            if step == 0:
                say("before training: " + evaluation.summary(metrics))

        try:
            result = train(training, batches, task, alive, evaluate, log)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            newest = next(iter(checkpoints(out)), "none yet")
            raise RunError(f"step {training.budget.steps + 1}: out of memory ({str(error).splitlines()[0]}); try "
                           f"--forward-rows {max(1, (s.forward_rows or s.batch_size) // 2)}, --checkpointing or a "
                           f"lower --max-length; last checkpoint: {newest}") from None
        if process and not s.shard:
            return None
        if allocator.layers:
            allocator.check_ranks()
            task_type = {"lm": "CAUSAL_LM", "image": None, "span": "QUESTION_ANS"}.get(task.kind, "SEQ_CLS")  # PEFT's
            if process == 0:
                lora.save_adapter(model, out / "adapter", models.HUB.get(s.model, s.model), task_type,
                                  head=task.kind != "lm")
        else:
            evaluation.save_model(model, processor, out / "model")
        warning, train_rows = allocator.warning(), len(batches.split)
        if s.compile == "on":
            torch._dynamo.reset()  # it holds on to the model
        del model, allocator, training, batches  # the saved adapter is loaded onto a fresh base: make room for it
        if s.shard:
            agree_on(0)  # wait until the adapter is there
        after = evaluation.evaluate_run(out, splits=splits, shard=shard if s.shard else None, device=s.device)
        if process:
            return None
        log("metrics.jsonl", {"step": result["steps"], "eval": after, "trainable_params": result["trainable_params"]})
        say("after training: " + evaluation.summary(after))
        first = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        result = {"task": task.name, "method": s.method, "model": s.model, "seed": s.seed, **after, **result,
                  "train_rows": train_rows, "eval_rows": sum(split.count_rows() for split in splits.values()),
                  "before": first["eval"] if first["step"] == 0 else None, "out": str(out)}
        if warning:
            result["warning"] = warning
            say("warning: " + warning)
        evaluation.write_cards(out, train_rows)
        with models.publish(out / "result.json", folder=False) as part:  # the last: it is finished
            part.write_text(evaluation.to_json(result, indent=2) + "\n", encoding="utf-8")
        return result


def set_up(s, alive):
    """Read data and model, attach the policy, begin the run folder: (Training, Batches, task, splits, Processor).

    Whatever can be wrong with settings, model or data is found before the run folder exists.
    """
    process, count = process_and_count()
    if s.resume and process == 0:
        alive.claim()
    if process:
        after_process_0(s)
    warmup_is_ours = s.warmup is None
    task = settle(s, models.find_config(s.model, s.init_weights)[0])
    torch.manual_seed(s.seed)
    policy = allocators.policy(s.method)
    rows = data.read(task, s.data, "train", 0 if s.sample_train else s.limit_train)
    if s.sample_train:
        rows, _ = data.drawn(rows, s.limit_train, s.seed)
    rows, validation_rows = keep_aside(s, rows, policy.validation_rows)
    evaluation.scoring(s, task)
    model, processor = evaluation.load(s, task, adapted=s.adapter is not None)
    split, splits = processor.training(rows, s.max_length), processor.evaluation(s)
    batches = data.Batches(s, split, process, count)
    if warmup_is_ours and s.warmup >= 1:  # the papers' number of steps is meant for runs longer than this may be
        s.warmup = min(s.warmup, math.ceil(0.1 * batches.total_steps))
    if task.kind == "regress":
        start_at_mean(model, split)
    if s.adapter:
        layers = lora.load_adapter(model, s.adapter)
        if not layers:
            raise UserError(f"--adapter {s.adapter}: there is no matrix with an adapter in it to train")
        s.targets = sorted({name.split(".")[-1] for name in layers}, key=lora.TARGETS.index)
        s.dora = any(layer.magnitude is not None for layer in layers.values())
    allocator = policy(model, s, batches.total_steps)
    if validation_rows:
        aside = processor.training(validation_rows, s.max_length)
        allocator.validation_loss = validation(model, task.kind, aside, s.device)
    training = Training(s, model, task.kind, allocator)
    model.checkpointing = s.checkpointing
    if s.compile == "on":
        compile_blocks(model)
    if count > 1 and process == 0:
        after_process_0(s)
    if s.shard:
        shard(model, s.device)
    fit_memory(training, batches)
    if not s.resume and process == 0:
        alive.claim()
        alive.begin({"settings": dataclasses.asdict(s), "labels": list(task.labels), "versions": versions(),
                     "device": device_name(s.device), "command": shlex.join(sys.argv), "commit": commit(),
                     "source": evaluation.source_hash(s.method, s.task)})
    trainable, all_of_them = (sum(p.numel() for p in some) for some in (training.params, model.parameters()))
    say(f"{s.method} on {s.model}, {task.name}: {len(split):,} training rows, {batches.total_steps:,} steps, "
        f"{trainable:,} trainable of {all_of_them:,} parameters, {s.dtype} on {device_name(s.device)}; "
        f"run folder {s.out}")
    return training, batches, task, splits, processor


def keep_aside(s, rows, count):
    """(training rows, `count` rows taken out of them for good, drawn from the seed) for a policy's validation loss."""
    if len(rows) <= count:
        raise UserError(f"--method {s.method} keeps {count} training rows for validation, but there are only "
                        f"{len(rows)}: use more rows")
    aside, kept = data.drawn(rows, count, s.seed)
    return kept, aside


def versions():
    """Versions of what a run's numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def commit():
    """The git commit of this program, with "+" if files have changed since; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" * bool(changed.strip())


def device_name(device):
    """What the device is called: the GPU's name, or the CPU's architecture and number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def forget_peak_memory(device):
    """Start measuring `peak_memory` anew, where the system can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most bytes that this process has held since `forget_peak_memory`: of a GPU's memory, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident()[1]


def resident():
    """(now, peak) resident bytes of this process; Linux only, elsewhere the peak alone is known."""
    try:  # the system's own peak (getrusage) would begin with what the starting process held
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    except OSError:
        return 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def say(message):
    """A line for the person who watches, on stderr."""
    tqdm.write(message, file=sys.stderr)


def main(argv=None):
    """Parse the command line, run, print the result as one line of JSON."""
    parser = parser_of(Settings, __doc__.split("\n\n")[0])
    s = Settings(**vars(parser.parse_args(argv)))
    if s.resume:
        if s != dataclasses.replace(Settings(), resume=s.resume):
            parser.error("--resume takes the run's own settings: leave the other flags out")
        saved, _ = evaluation.read_run(s.resume)
        try:
            s = Settings(**vars(saved) | {"resume": s.resume, "out": s.resume})
        except TypeError as error:
            raise UserError(f"{s.resume}/run.json: of another version ({error}); start again") from None
    for name in ("data", "adapter", "ranks"):
        if getattr(s, name) is not None:  # the run folder must find it from anywhere
            setattr(s, name, os.path.abspath(os.path.expanduser(getattr(s, name))))
    if os.path.isdir(os.path.expanduser(s.model)):
        s.model = os.path.abspath(os.path.expanduser(s.model))
    for name in ("method", "task"):
        if ":" in (getattr(s, name) or ""):
            setattr(s, name, os.path.abspath(getattr(s, name)))  # with :Name at its end
    try:
        with on_signal(stop_at_once), processes():
            print(evaluation.to_json(run(s)))
    except (Interrupted, RunError, OSError, SafetensorError) as error:
        began = s.out and (Path(s.out) / "run.json").exists()
        if isinstance(error, OSError) and not began:
            raise
        process, count = process_and_count()
        reason, status = f"error: {error}", 1
        if isinstance(error, Interrupted):
            reason, status = f"stopped by {signal.Signals(error.args[0]).name}", 128 + error.args[0]
        program = "python" if count == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        command = f"{program} {shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(s.out)}" if began else ""
        if process == 0 or isinstance(error, OSError):  # of the others, all processes know
            onward = f"; go on with: {command}" if began else " before the run began"
            say(" ".join(reason.split()) + onward * getattr(error, "resumable", True))
        raise SystemExit(status) from None


if __name__ == "__main__":
    evaluation.command(main)
