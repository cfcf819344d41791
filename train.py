"""Fine-tune a frozen transformer with LoRA whose ranks a policy allocates: the command line, the loop, the run folder.

    python train.py                                              # the embedded default: a small ViT, offline
    python train.py --method lelora --model llama2-7b            # any method, any model
    python train.py --method lora --model roberta-base --task cola --data glue/
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
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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


def setting(default, group, help, choices=None):
    """One field of `Settings`: its default, the --help group it is listed in, its help line, its allowed values."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Settings:
    """Everything that defines a run; a field is a flag (`--batch-size`), None takes the task's or the paper's value."""

    method: str = setting("lora", "what", "who decides the ranks, or a baseline", tuple(allocators.METHODS))
    model: str = setting("vit-digits", "what", "short name, Hub id or folder with config.json and *.safetensors")
    task: str = setting(None, "what", "task name; default by model family (digits-rot90, cola, commonsense)")
    data: str = setting(None, "what", "folder or file with the task's data; default: the cache, fetched if absent")
    out: str = setting(None, "what", "run folder; default runs/METHOD-MODEL-TASK-SEED")
    seed: int = setting(0, "what", "seed of initialisation, data order, dropout and policies")

    rank: int = setting(None, "adapter", "nominal rank r; capacity of each adapter for most methods")
    alpha: float = setting(None, "adapter", "LoRA alpha; the update is scaled by alpha / r")
    dropout: float = setting(None, "adapter", "dropout on the adapter's input")
    targets: list = setting(None, "adapter", "projections to adapt, of query,key,value,out,gate,up,down; "
                                             "default query,value (encoders, ViT) or query,key,value,up,down")
    scaling: str = setting("nominal", "adapter", "scale: alpha / r, alpha / r_i, or rsLoRA's alpha / sqrt(r)",
                           ("nominal", "own", "rslora"))
    adapter: str = setting(None, "adapter", "folder of a PEFT adapter for --method lora to start from, as it is")
    init: str = setting("lora", "adapter", "start at W's r largest (pissa) or smallest (milora) singular components; "
                                           "then without --dropout", ("lora", "pissa", "milora"))
    dora: bool = setting(False, "adapter", "DoRA: trainable lengths of the rows of W + s B A")
    lora_plus_ratio: float = setting(1.0, "adapter", "LoRA+: learning rate of B over that of A; the paper suggests 16")
    freeze_a: bool = setting(False, "adapter", "LoRA-FA: train B alone")

    epochs: float = setting(None, "optimization", "passes over the training set")
    steps: int = setting(None, "optimization", "optimizer steps; overrides --epochs")
    batch_size: int = setting(None, "optimization", "examples per forward pass, of all processes together")
    accumulate: int = setting(1, "optimization", "forward passes per optimizer step")
    lr: float = setting(None, "optimization", "peak learning rate (AdamW)")
    weight_decay: float = setting(None, "optimization", "AdamW's decoupled weight decay")
    warmup: float = setting(None, "optimization", "warm-up: below 1 a share of all steps (0.06 = 6 %%), else steps")
    schedule: str = setting("linear", "optimization", "learning rate after warm-up", ("linear", "cosine", "constant"))
    clip: float = setting(1.0, "optimization", "clip the gradient's norm to this; 0 = never")

    max_length: int = setting(None, "data", "longest input in tokens; the rest is cut")
    limit_train: int = setting(0, "data", "use only the first N training rows; 0 = all")
    limit_eval: int = setting(0, "data", "use only the first N evaluation rows; 0 = all")
    score: str = setting("generation", "data", "score generated answers, or the likeliest of the allowed ones",
                         ("generation", "likelihood"))

    device: str = setting("auto", "machine", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "the model's; auto = bfloat16 on a GPU, else float32",
                         ("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "machine", "compile each block with torch.compile")
    checkpointing: bool = setting(False, "machine", "recompute activations in the backward pass to save memory")
    shard: bool = setting(False, "machine", "under torchrun: spread the frozen weights over the devices (FSDP)")
    init_weights: str = setting("checkpoint", "machine", "random = build the architecture without weights",
                                ("checkpoint", "random"))
    log_every: int = setting(10, "machine", "steps between lines in metrics.jsonl and ranks.jsonl")
    eval_every: int = setting(0, "machine", "steps between evaluations; 0 = each epoch, at most 10 in all")
    save_every: int = setting(0, "machine", "steps between checkpoints; 0 = with each evaluation")
    keep: int = setting(2, "machine", "checkpoints to keep")
    max_bad_steps: int = setting(10, "machine", "steps in a row with a non-finite loss or gradient that end the run")
    resume: str = setting(None, "machine", "run folder to go on with from its newest checkpoint, with its own settings")
    eval_before: bool = setting(True, "machine", "evaluate before training, too")

    r_min: int = setting(4, "static", "smallest rank r_min; a lower --rank is raised to it")
    r_max: int = setting(32, "static", "largest rank; a higher --rank is cut to it")
    adalora_init_ratio: float = setting(1.5, "adalora", "capacity over --rank: the first budget over the last")
    adalora_t_init: int = setting(0, "adalora", "t_i, steps before the first pruning; 0 = 10 %% of the run")
    adalora_t_final: int = setting(0, "adalora", "t_f, steps with the final budget; 0 = 50 %% of the run")
    adalora_delta_t: int = setting(10, "adalora", "Delta_T, steps between allocations")
    adalora_beta1: float = setting(0.85, "adalora", "beta_1, smoothing of the sensitivity")
    adalora_beta2: float = setting(0.85, "adalora", "beta_2, smoothing of its uncertainty")
    adalora_orth: float = setting(0.5, "adalora", "gamma, weight of the orthogonality penalty")
    lalora_gamma: float = setting(1.1, "lalora", "gamma, how fast the budget grows (Eq. 5)")
    lalora_budget: str = setting("grow", "lalora", "Eq. 5, or full = r L from the start (w/o CAR)", ("grow", "full"))
    lalora_fidelity: str = setting("step", "lalora", "f: Eq. 10, truncated over full norm (section 3.3's prose), or 1",
                                   ("step", "truncation", "off"))
    lalora_score: str = setting("norm", "lalora", "contribution c: Eq. 9, or section 5.7's Fisher information",
                                ("norm", "fisher"))
    weightlora_keep: int = setting(0, "weightlora", "K, matrices that keep an adapter; 0 = half")
    weightlora_steps: int = setting(0, "weightlora", "T, warm-up steps; 0 = 0.5 %% of the run, at least 5")
    weightlora_lr: float = setting(5.0, "weightlora", "eta, step size of omega")
    weightlora_threshold: str = setting("end", "weightlora", "threshold omega at every warm-up step or after the last",
                                        ("every", "end"))
    lelora_dims: list = setting(None, "lelora", "candidate dimensions; default 0, powers of 2 up to --rank")
    lelora_locations: list = setting(None, "lelora", "candidate windows; default first,middle,last")
    lelora_reward_alpha: float = setting(0.8, "lelora", "alpha of the reward, the weight of the loss's change (Eq. 4)")
    lelora_every: int = setting(1, "lelora", "iterations between actions")
    lelora_ablate: str = setting("none", "lelora", "learn the rank alone, or the location alone (Fig. 5a)",
                                 ("none", "rank", "location"))
    lelora_policy_lr: float = setting(1e-3, "lelora", "eta_2, the policy network's learning rate (Eq. 10)")
    lelora_policy_optimizer: str = setting("sgd", "lelora", "Eq. 10's plain steps, or Adam", ("sgd", "adam"))
    lelora_inputs: str = setting("standardised", "lelora", "norms and singular values as the policy sees them",
                                 ("standardised", "raw"))


GROUPS = {"what": "what to run", "adapter": "adapter", "optimization": "optimization (unset: the papers' values)",
          "data": "data", "machine": "machine and logging",
          "static": "linear-decay, attention-heavy, empirical (Adaptive LoRA, section 3.1)",
          "adalora": "adalora (Zhang et al. 2023)", "lalora": "lalora (La-LoRA)",
          "weightlora": "weightlora, weightlora+, random (WeightLoRA)", "lelora": "lelora (LeLoRA)"}


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


# ---------------------------------------------------------------------------------------------- settling the settings


def settle(s, config):
    """Fill the settings that are None: from the task's table row and the papers' values for the model's family."""
    kind = config.kind
    own = [name for name in ("method", "rank", "alpha", "dropout", "targets", "scaling", "init", "dora")
           if getattr(s, name) != getattr(Settings, name)]
    if s.adapter and own and not s.resume:
        raise UserError(f"--adapter {s.adapter}: goes with --method lora, with ranks, alphas, dropout and targets "
                           f"of its own: leave out --{own[0]}")
    if s.targets is None:
        s.targets = default_targets(kind == "decoder")
    s.task = s.task or {"decoder": "commonsense", "encoder": "cola", "vit": "digits-rot90"}[kind]
    task = data.find_task(s.task, s.data)
    takes = {"encoder": ("classify", "regress"), "decoder": ("lm", "classify", "regress"), "vit": ("image",)}[kind]
    if task.kind not in takes:
        raise UserError(f"--task {s.task} is of the kind '{task.kind}', but {s.model} ({config.family}) does "
                           f"{', '.join(takes)}: choose another model or task")
    for name, value in data.hyperparameters(task, config.family, config.hidden_size, s.method).items():
        is_set = name in ("epochs", "steps") and (s.epochs, s.steps) != (None, None)
        is_set |= s.adapter is not None and name in ("rank", "alpha", "dropout")
        if hasattr(s, name) and getattr(s, name) is None and not is_set:
            setattr(s, name, value)
    s.device = evaluation.auto_device() if s.device == "auto" else s.device
    if dist.is_initialized() and s.device.startswith("cuda"):
        s.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(s.device)
    if s.dtype == "auto":  # a model that is trained itself, not through adapters, needs float32's small steps
        s.dtype = "bfloat16" if s.device.startswith("cuda") and s.method not in ("full", "bitfit") else "float32"
    if not s.out:
        stem = f"runs/{evaluation.variant(s)}-{Path(s.model).name}-{s.task}-{s.seed}"
        names = [stem] + [f"{stem}-{n}" for n in range(2, 10_000)]
        s.out = next(name for name in names if not Path(name).exists())
    check(s)
    return task


def default_targets(decoder):
    """The projections that the papers adapt in a decoder, or else in an encoder or ViT."""
    return ["query", "key", "value", "up", "down"] if decoder else ["query", "value"]


def check(s):
    """Refuse settings that cannot work; raises UserError with one line that names the flag."""
    def flag(name):
        return f"--{name.replace('_', '-')} {getattr(s, name)}".removesuffix(" True")

    may_be_0 = ("weight_decay", "warmup", "clip", "dropout", "seed", "limit_train", "limit_eval", "eval_every",
                "save_every", "adalora_t_init", "adalora_t_final", "adalora_beta1", "adalora_beta2", "adalora_orth",
                "lalora_gamma", "weightlora_keep", "weightlora_steps", "lelora_reward_alpha")
    for f in dataclasses.fields(s):
        value, top = getattr(s, f.name), 1 if f.name in ("dropout", "adalora_beta1", "adalora_beta2") else 2**63
        if f.type in (int, float) and value is not None and not (0 <= value < top and (value or f.name in may_be_0)):
            least = "from 0 on" if f.name in may_be_0 else "above 0"
            raise UserError(f"{flag(f.name)}: must be a number {least} and below {top:g}")
    if not 0 < len(s.targets) == len(set(s.targets)):
        raise UserError(f"--targets {','.join(s.targets)}: name each projection once")
    if s.r_min > s.r_max:
        raise UserError(f"{flag('r_min')} is above {flag('r_max')}")
    for name in allocators.METHODS[s.method].refuses:
        if getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag(name)}: has no meaning with --method {s.method}; leave it out")
    if s.freeze_a and (s.lora_plus_ratio != 1 or s.method == "lalora" and s.lalora_score == "fisher"):
        raise UserError("--freeze-a: --lora-plus-ratio and --lalora-score fisher need a trained A; leave them out")
    evaluation.check_device(s.device)
    if s.shard and not dist.is_initialized():
        raise UserError("--shard spreads the model over several devices: torchrun --nproc-per-node N train.py ...")
    if s.shard and s.method in ("full", "bitfit"):
        raise UserError(f"{flag('method')} trains the model's own weights, which --shard spreads: leave --shard out")
    if s.shard and s.method.startswith("weightlora") and (s.dora or s.init != "lora"):
        raise UserError(f"{flag('method')} --shard: survivors would start at weights that are spread by then: leave "
                           "out --init and --dora")
    taken = Path(s.out).exists() and (not Path(s.out).is_dir() or any(Path(s.out).iterdir()))
    if taken and not s.resume and rank_and_world()[0] == 0:
        raise UserError(f"{flag('out')}: exists and is not empty; choose another folder or remove it")


# ---------------------------------------------------------------------------------------------- more than one device
#
# Every process computes the same step on its share of each batch: gradients are added up before policies see them, so
# all hold the same adapters and policy state, and decide alike. Process 0 alone prints and writes.


def rank_and_world():
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
    name = torch.zeros(4096, dtype=torch.uint8)
    if dist.get_rank() == 0:
        name[:len(os.fsencode(s.out))] = torch.tensor(list(os.fsencode(s.out)), dtype=torch.uint8)
    dist.broadcast(name, 0)
    s.out = os.fsdecode(bytes(name.tolist()).rstrip(b"\0"))


def add_up(tensors):
    """Replace each tensor by its sum over the processes: one message for all."""
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


def start_alike(s, step, moving):
    """Give all processes the parameters of process 0, which draws as if it were alone; dropout differs."""
    rank, world = rank_and_world()
    if world > 1:
        for p in moving:
            dist.broadcast(p.data, 0)
    if rank:
        torch.manual_seed(int(np.random.SeedSequence((s.seed, step, rank)).generate_state(1)[0]))


def compare(step, moving, allocator):
    """Raise RunError unless all processes hold the same parameters, gates and policy state, by their sums."""
    state = [*moving, *allocator.state_dict().values()]
    sums = torch.stack([t.detach().sum(dtype=torch.float64).to(allocator.device) for t in state])
    extremes = torch.stack([sums, -sums])  # the largest, and minus the smallest
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if not torch.equal(extremes[0], -extremes[1]):
        raise RunError(f"step {step}: the processes no longer hold the same adapters and ranks")


def shard(model, device):
    """Spread the frozen weights over the processes (FSDP2), block by block from the CPU; what is trained stays whole.

    So policies and checkpoints see plain tensors, and only the weights of a block at work are on a device whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, not above: a second that other runs need not wait for
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    whole = {p for layer in lora.adapters(model).values() for p in layer.parameters(recurse=False)}
    whole |= set(model.head.parameters()) if model.head_kind == "classify" else set()
    for p in whole:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)


# ---------------------------------------------------------------------------------------------- the loop


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


def optimizer_for(s, params):
    """AdamW over the run's parameters; the masked one where a policy holds components still."""
    groups = by_ratio(params)
    if any(hasattr(p, "active") for p in params):
        return lora.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay)
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


def by_ratio(params):
    """Parameter groups by `lr_ratio`, the learning rate over the run's (LoRA+): 1 first, and where there is none."""
    groups = {1: []}
    for p in params:
        groups.setdefault(getattr(p, "lr_ratio", 1), []).append(p)
    return [{"params": group, "lr_ratio": ratio} for ratio, group in groups.items()]


def follow(optimizer, params):
    """Make the optimizer hold exactly `params`: state of parameters that vanished is dropped, new ones start afresh."""
    kept = {p: optimizer.state[p] for p in params if p in optimizer.state}
    optimizer.state.clear()
    optimizer.state.update(kept)
    for group, now in zip(optimizer.param_groups, by_ratio(params)):
        group["params"] = now["params"]


class Budget:
    """Trainable adapter parameters now, mean over steps, peak; on the device, for which only `report` waits."""

    def __init__(self, allocator):
        self.allocator, self.steps = allocator, 0
        self.total, self.peak = (torch.zeros((), dtype=torch.float64, device=allocator.device) for _ in range(2))

    def add(self):
        """Count the allocation in force for one more step."""
        now = self.allocator.budget()
        self.total += now
        self.peak = torch.maximum(self.peak, now)
        self.steps += 1

    def report(self):
        """{"now", "mean", "peak"} as whole numbers."""
        now = self.allocator.budget()
        mean = self.total / self.steps if self.steps else now
        return {"now": round(now.item()), "mean": round(mean.item()), "peak": round(max(self.peak, now).item())}


class RunError(RuntimeError):
    """A run that cannot go on, though its settings are right; the message is one line for the user, exit status 1."""


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


class BadSteps:
    """Counts the steps whose loss or gradient was not finite; in such a step nothing moves.

    Whether a step was bad is known on the device only, and asking would make the host wait at every step. So all that
    follows is computed in either case, and a bad step made harmless: its gradients become zeros, the optimizer's
    `found_inf` holds weights and moments still (as torch.amp's GradScaler does it), and policies see `allocator.ok`.
    The counts stay on the device until `check` reads them, which waits for it.
    """

    def __init__(self, device):
        self.counts = torch.zeros(4, dtype=torch.long, device=device)  # in all, in a row now, at most, the last step

    def guard(self, step, loss, grads, optimizer, allocator):
        """Make the gradients harmless if one or the loss is not finite; returns whether all are (0-d, bool)."""
        ok = torch.nn.utils.get_total_norm(grads).isfinite() & loss.isfinite()
        bad = ~ok
        for grad in grads:
            grad.masked_fill_(bad, 0)
        optimizer.found_inf, allocator.ok = bad.float(), ok
        total, row, most, last = self.counts.unbind()
        total += bad
        row += 1
        row *= bad
        torch.maximum(most, row, out=most)
        last.copy_(torch.where(bad, step, last))
        return ok

    def check(self, s, task, split):
        """The number of bad steps so far; raises RunError when too many came in a row."""
        total, _, most, last = self.counts.tolist()
        if most < min(s.max_bad_steps, total_steps(s, split)):
            return total
        batch = sorted(i for indices in next(stream(s, split, last - 1)) for i in indices)
        newest = next(iter(checkpoints(s.out)), "none yet")
        raise RunError(f"step {last}: loss or gradient not finite for {most} steps in a row, here with the rows "
                       f"{origin(s, task, split, batch)}; last good checkpoint: {newest}; lower --lr or mend the rows")


def origin(s, task, split, indices):
    """Where the user finds these examples of the training split: "train.tsv line 18, 20"."""
    places, found = [place for place, _ in task.reader(task, s.data, "train")], {}
    for i in indices:
        name, _, number = places[split.numbers[i] if split.numbers else i].rpartition(" ")
        found.setdefault(name, []).append(number)
    return "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in found.items())


def update(step, loss, grads, params, optimizer, allocator, budget, bad, clip):
    """Move the weights and the policy by the gradients that backward has left; bench.py times the same.

    `grads` are those of `params`, the optimizer's, and of gates that a policy moves itself. Returns whether loss and
    gradients were finite (0-d, bool), the norm before clipping (0-d), and whether the policy rebuilt its parameters.
    """
    ok = bad.guard(step, loss, grads, optimizer, allocator)
    allocator.after_backward(step)
    norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf)
    optimizer.step()
    budget.add()
    rebuilt = allocator.after_step(step)
    optimizer.zero_grad(set_to_none=True)
    return ok, norm, rebuilt


def train(s, task, model, allocator, split, held_out, log, evaluate):
    """Run the optimizer over `split`; returns {"steps", "seconds", "trainable_params", ...}.

    `held_out` is a Split of rows kept aside for a policy's validation loss, or None. `log(file, dict)` appends a JSON
    line to the run folder, `evaluate(step, budget)` measures the model as it stands.
    """
    device, steps, (rank, world) = torch.device(s.device), total_steps(s, split), rank_and_world()
    params = allocator.parameters() + trained_head(model, task)
    optimizer, rate_at, budget = optimizer_for(s, params), schedule(s, steps), Budget(allocator)
    running = torch.zeros(2, device=device)  # loss since the last line in the log, and its number of steps
    bad = BadSteps(device)
    steps_per_epoch = epoch_steps(s, split)
    eval_every = s.eval_every or max(steps_per_epoch, math.ceil(steps / 10))
    save_every = s.save_every or eval_every
    done, seconds = 0, 0.0  # steps and training time before a restart
    if s.resume:
        done, seconds = load_checkpoint(s, model, task, allocator, optimizer, budget, running, bad)
        params = allocator.parameters() + trained_head(model, task)
    moving = drawn_or_moving(model, allocator)
    start_alike(s, done, moving)
    started = time.time() - seconds
    if held_out is not None:
        allocator.validation_loss = validation(model, task, held_out, device)

    model.train()
    batches, seen, came = stream(s, split, done), 0, []
    widths = [2 ** k * f // 2 for k in range(3, 16) for f in (2, 3)]  # 8, 12, 16, 24, 32 ...
    widths = [w for w in widths if w <= (s.max_length or 0)] if s.compile else None

    def stop_after_this_step(number):
        if came and world == 1:  # the second signal; torchrun passes on one, and kills 30 s later
            raise Interrupted(number)
        came.append(number)

    with on_signal(stop_after_this_step), tqdm(
            total=steps, initial=done, desc=f"{s.method} {s.task}", unit="step", dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30) as bar:  # a log file needs no animation
        for step in range(done + 1, steps + 1):
            if (step - 1) % eval_every == 0 and (step > 1 or s.eval_before):
                began = time.time()
                evaluate(step - 1, budget.report())  # after the checkpoint: killed here, a run loses no step
                started += time.time() - began
            for group in optimizer.param_groups:
                group["lr"] = s.lr * rate_at(step - 1) * group["lr_ratio"]
            chosen = next(batches)
            count = sum(data.count_labels(split, indices) for indices in chosen)  # each label weighs the same
            loss = torch.zeros((), device=device)
            for indices in chosen:
                mine = indices[rank::world]  # if there are none, take part with weight 0
                inputs, labels = data.collate(split, mine or indices[:1], widths)
                labels = labels.to(device, non_blocking=True)
                part = criterion(task.kind, evaluation.logits(model, inputs), labels) / count
                part = part if mine else 0 * part
                loss += part.detach()
                (part + allocator.penalty() / (len(chosen) * world)).backward()
            seen += sum(len(indices) for indices in chosen)
            grads = [p.grad for p in moving if p.grad is not None]
            if world > 1:
                add_up([loss, *grads])
            ok, norm, rebuilt = update(step, loss, grads, params, optimizer, allocator, budget, bad, s.clip)
            running += torch.where(ok, torch.stack((loss, torch.ones_like(loss))), 0)
            if rebuilt:
                params = allocator.parameters() + trained_head(model, task)
                moving = drawn_or_moving(model, allocator)
                follow(optimizer, params)
                start_alike(s, step, moving)

            bar.update()
            logged = step % s.log_every == 0 or step == steps
            stopping = agree_on(came[0] if came else 0)
            saved = step % save_every == 0 or step == steps or stopping
            if logged or saved:
                skipped = bad.check(s, task, split)
                if world > 1:
                    compare(step, moving, allocator)
            if logged or step <= 10:  # warm-up phases are short
                numbers = allocator.log()
                log("ranks.jsonl", {"step": step, "ranks": allocator.ranks()}
                    | {k: v for k, v in numbers.items() if isinstance(v, dict)})
            if logged:
                size, (total, good) = budget.report(), running.tolist()
                running.zero_()
                mean_loss, rate = total / good if good else math.nan, seen / (time.time() - started - seconds)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, budget {size['now']:,}, {rate:.0f} examples/s",
                                    refresh=False)
                log("metrics.jsonl", {"step": step, "epoch": round(step / steps_per_epoch, 3), "loss": mean_loss,
                                      "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
                                      "skipped_steps": skipped, "examples_per_second": rate, "trainable_params": size}
                    | {k: v for k, v in numbers.items() if not isinstance(v, dict)})
            if saved and rank == 0:
                save_checkpoint(s, model, task, allocator, optimizer, budget, running, bad, step, time.time() - started)
            if stopping:
                raise Interrupted(stopping)
    if came:  # in the last step
        raise Interrupted(came[0])
    model.eval()
    if allocator.dynamic and not allocator.allocations:
        raise UserError(f"{s.method} never allocated in {steps} steps, so this was plain LoRA: train longer")
    spent = time.time() - started
    return {"steps": steps, "seconds": round(spent, 2), "trainable_params": budget.report(),
            "held_params": sum(p.numel() for p in allocator.parameters()), "skipped_steps": bad.check(s, task, split),
            "examples_per_second": round(seen / max(spent - seconds, 1e-9), 2)}


def stream(s, split, done=0):
    """Endless lists of `accumulate` batches of row indices, from step `done` on, ordered by seed and epoch."""
    epoch, skip = divmod(done, epoch_steps(s, split))
    while True:
        order = data.batches(split, s.batch_size, s.seed, epoch)
        for i in range(skip * s.accumulate, len(order), s.accumulate):
            yield order[i:i + s.accumulate]
        epoch, skip = epoch + 1, 0


def epoch_steps(s, split):
    """Optimizer steps that one pass over the split takes."""
    return math.ceil(math.ceil(len(split) / s.batch_size) / s.accumulate)


def total_steps(s, split):
    """Optimizer steps of the whole run."""
    return s.steps or max(1, math.ceil(s.epochs * epoch_steps(s, split)))


def trained_head(model, task):
    """Parameters of a classification or regression head, which every method trains; none for language modelling."""
    return [] if task.kind == "lm" else list(model.head.parameters())


def drawn_or_moving(model, allocator):
    """What differs from the base model: the trained, gates that a policy moves itself, and LoRA-FA's frozen A."""
    frozen = [layer.A for layer in allocator.layers.values() if not layer.A.requires_grad]
    return [p for p in model.parameters() if p.requires_grad] + frozen


def start_at_mean(model, split):
    """Start a new regression head at the mean training label, where it has a bias (decoders' heads have none).

    From 0, the adapters push the features along the head until the mean is reached, faster than the head itself gets
    there, and the pooler's tanh saturates: with STS-B's labels (mean 2.7) at learning rate 2e-3 nothing is learned
    after that, here as in transformers + PEFT.
    """
    for name in model.fresh:
        if name.startswith("head.") and name.endswith("bias") and model.get_parameter(name).numel() == 1:
            model.get_parameter(name).data.fill_(split.labels.mean())


def validation(model, task, split, device):
    """A call that gives the mean loss on `split` as a 0-d tensor, without gradients and without dropout."""
    inputs, labels = data.collate(split, list(range(len(split))))
    inputs, labels = {name: value.to(device) for name, value in inputs.items()}, labels.to(device)

    @torch.no_grad()
    def loss():
        model.eval()
        value = criterion(task.kind, evaluation.logits(model, inputs), labels) / labels.numel()
        model.train()
        if dist.is_initialized():  # all compute it, but one rounding apart they would part ways
            dist.broadcast(value, 0)
        return value

    return loss


def compile_blocks(model):
    """Compile each block on its own: blocks of one kind share a graph, and policies' work is outside."""
    torch._dynamo.config.recompile_limit = 64  # 8 are too few where adapters differ from block to block
    for block in model.blocks:
        block.compile()


# ---------------------------------------------------------------------------------------------- checkpoints


def run_state(model, task, allocator, optimizer, budget, running, bad):
    """Everything that changes while a run goes on, besides the step: {name: tensor}, the live tensors themselves."""
    params = allocator.parameters() + trained_head(model, task)
    state = {f"parameter.{i}": p.data for i, p in enumerate(params)}
    state |= {f"optimizer.{i}.{key}": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    state |= {f"gate.{name}": layer.gate.data for name, layer in allocator.layers.items()}
    state |= {f"frozen.{name}": layer.A.data for name, layer in allocator.layers.items() if not layer.A.requires_grad}
    return state | {"budget.total": budget.total, "budget.peak": budget.peak, "running": running, "bad": bad.counts}


def save_checkpoint(s, model, task, allocator, optimizer, budget, running, bad, step, seconds):
    """Write checkpoints/step-N into the run folder: beside, synced, then renamed; only the newest `keep` stay.

    Raises RunError when it cannot be written; those that are there stay.
    """
    folder = Path(s.out) / "checkpoints" / f"step-{step}"
    state = run_state(model, task, allocator, optimizer, budget, running, bad)
    state |= {f"allocator.{name}": value for name, value in allocator.state_dict().items()}
    state["random.cpu"] = torch.get_rng_state()
    if s.device.startswith("cuda"):
        state["random.cuda"] = torch.cuda.get_rng_state(s.device)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    state |= {name: gate.clone() for name, gate in state.items() if name.startswith("gate.")}  # may be views of one
    try:
        for old in folder.parent.glob("*.part"):  # left by a run that was killed here
            shutil.rmtree(old)
        with models.whole_folder(folder) as part:
            save_file(state, part / "state.safetensors")
            about = {"step": step, "seconds": seconds, "sha256": digest(part / "state.safetensors")}
            (part / "state.json").write_text(json.dumps(about))
        models.sync(s.out)  # the name checkpoints/ itself
        for old in checkpoints(s.out)[s.keep:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: cannot be written ({error}): make room") from None


def digest(path):
    """SHA-256 of a file, in hexadecimal; it is not read into memory."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def checkpoints(out):
    """Checkpoint folders of a run folder, the newest first."""
    found = [path for path in (Path(out) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def load_checkpoint(s, model, task, allocator, optimizer, budget, running, bad):
    """Put a run back to where its newest whole checkpoint left it; returns its (step, seconds), (0, 0) without any.

    A damaged checkpoint is reported and the one before it is taken. Raises UserError when all are damaged.
    """
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
    allocator.load_state_dict({name[10:]: value for name, value in state.items() if name.startswith("allocator.")})
    params = allocator.parameters() + trained_head(model, task)
    follow(optimizer, params)  # the policy may have rebuilt them
    for i, p in enumerate(params):
        prefix = f"optimizer.{i}."
        optimizer.state[p] = {name[len(prefix):]: value.to(p.device) for name, value in state.items()
                              if name.startswith(prefix)}
    with torch.no_grad():
        for name, tensor in run_state(model, task, allocator, optimizer, budget, running, bad).items():
            tensor.copy_(state[name])
    budget.steps = about["step"]
    torch.set_rng_state(state["random.cpu"])
    if s.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["random.cuda"], s.device)
    cut_logs(s.out, about["step"])
    say(f"resuming {s.out} after step {about['step']}")
    return about["step"], about["seconds"]


def cut_logs(out, step):
    """Remove what was logged after the checkpoint of `step`, its evaluation included: it happens again."""
    if rank_and_world()[0]:
        return
    for file in (Path(out) / "metrics.jsonl", Path(out) / "ranks.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        logged = [(json.loads(line), line) for line in lines if line.endswith("\n")]  # the last may be half a line
        models.whole_file(file, "".join(line for about, line in logged if about["step"] < step + ("eval" not in about)))


# ---------------------------------------------------------------------------------------------- a whole run


def run(s):
    """Do what the settings say, from reading the model to the final evaluation; returns the result as a dict.

    Leaves the run folder: run.json, metrics.jsonl, ranks.jsonl, result.json and adapter/ (model/ for full and bitfit).
    The final numbers are those of a freshly loaded model with the saved adapter: what eval.py gives for the folder.
    Of several processes, all call this and process 0 gets the result.
    """
    with contextlib.ExitStack() as held:  # the lock on the run folder
        return fine_tune(s, held)


def fine_tune(s, held):
    """`run`, with a place for what has to be closed however it ends."""
    rank, world = rank_and_world()
    if s.resume and rank == 0:
        claim(s, held)
    if rank:
        after_process_0(s)
    warmup_is_ours = s.warmup is None
    task = settle(s, models.find_config(s.model, s.init_weights)[0])
    torch.manual_seed(s.seed)
    # whatever can be wrong with model or data is found before the run folder exists
    rows = data.read(task, s.data, "train", s.limit_train)
    held_rows = allocators.METHODS[s.method].held_out
    if held_rows:  # taken out of the training set for good
        order = np.random.default_rng(s.seed).permutation(len(rows)).tolist()
        if len(rows) <= held_rows:
            raise UserError(f"--method {s.method} keeps {held_rows} training rows for validation, but there are "
                               f"only {len(rows)}: use more rows")
        kept, rest = sorted(order[held_rows:]), sorted(order[:held_rows])
        rows, held_out = [rows[i] for i in kept], [rows[i] for i in rest]
    evaluation.scoring(s, task)
    processor = evaluation.processor_for(s, task)
    model = evaluation.load_model(s, task, adapted=s.adapter is not None)
    split = processor.training(rows, s.max_length)
    held_out = processor.training(held_out, s.max_length) if held_rows else None
    if held_rows:
        split.numbers = [kept[i] for i in split.numbers or range(len(split))]
    splits = processor.evaluation(s)
    if warmup_is_ours and s.warmup >= 1:  # the papers' number of steps is meant for runs longer than this may be
        s.warmup = min(s.warmup, math.ceil(0.1 * total_steps(s, split)))
    if task.kind == "regress":
        start_at_mean(model, split)
    allocator = allocators.METHODS[s.method](model, s, total_steps(s, split))
    trained = allocator.parameters() + trained_head(model, task)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.checkpointing = s.checkpointing
    if s.compile:
        compile_blocks(model)

    if world > 1 and rank == 0:
        after_process_0(s)
    if s.shard:
        shard(model, s.device)
    out = Path(s.out)
    if not s.resume and rank == 0:
        file = claim(s, held)
        about = {"settings": dataclasses.asdict(s), "labels": list(task.labels), "versions": versions(),
                 "device": device_name(s.device)}
        file.write(evaluation.to_json(about, indent=2) + "\n")
        file.flush()
        models.sync(out / "run.json")
        models.sync(out)
    say(f"{s.method} on {s.model}, {task.name}: {len(split):,} training rows, {total_steps(s, split):,} steps, "
        f"{sum(p.numel() for p in trained):,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{s.dtype} on {device_name(s.device)}; run folder {out}")

    def log(file, line):
        if rank:
            return
        try:
            with open(out / file, "a", encoding="utf-8") as f:
                f.write(evaluation.to_json(line) + "\n")
        except OSError as error:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(out / file)) from None

    def evaluate(step, size):  # generating the answers takes long: only at the end
        if rank and not s.shard:
            return
        metrics = evaluation.evaluate_splits(model, task, splits, s.batch_size, processor.tokenizer, generate=False)
        log("metrics.jsonl", {"step": step, "eval": metrics, "trainable_params": size})
        if step == 0:
            say("before training: " + evaluation.summary(metrics))

    result = train(s, task, model, allocator, split, held_out, log, evaluate)
    if rank and not s.shard:
        return None
    if s.method in ("full", "bitfit"):
        evaluation.save_model(model, processor, out / "model")
    elif rank == 0:
        task_type = {"lm": "CAUSAL_LM", "image": None}.get(task.kind, "SEQ_CLS")  # PEFT's names
        lora.save_adapter(model, out / "adapter", models.HUB.get(s.model, s.model), task_type, head=task.kind != "lm")
    warning = allocator.warning()
    del model, allocator, trained  # the saved adapter is loaded onto a fresh base: make room for it
    if s.shard:
        agree_on(0)  # wait until the adapter is there
    after = evaluation.evaluate_run(out, splits=splits, shard=shard if s.shard else None, device=s.device)
    if rank:
        return None
    first = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    log("metrics.jsonl", {"step": result["steps"], "eval": after, "trainable_params": result["trainable_params"]})
    say("after training: " + evaluation.summary(after))
    result = {"task": task.name, "method": s.method, "model": s.model, "seed": s.seed, **after, **result,
              "peak_memory_mb": round(peak_memory(s.device) / 2**20),
              "before": first["eval"] if first["step"] == 0 else None, "out": str(out)}
    if warning:
        result["warning"] = warning
        say("warning: " + warning)
    evaluation.write_cards(out)
    models.whole_file(out / "result.json", evaluation.to_json(result, indent=2) + "\n")  # the last: the run is finished
    return result


def claim(s, held):
    """Make the run folder this run's until `held` closes; returns its run.json, open for writing at the end.

    The lock is the system's on that file: it goes with the process, however that ends. Raises UserError when the
    folder cannot be made, another run is at work in it, or this one has finished.
    """
    out = Path(s.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}): choose another folder") from None
    file = held.enter_context(open(out / "run.json", "a", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another run is at work in this folder; wait, or choose another --out") from None
    except OSError as error:
        say(f"warning: {out}: cannot be locked here ({error.strerror}); start no second run in it")
    if not s.resume and file.tell():
        raise UserError(f"{out}: another run has begun in this folder; choose another --out")
    if s.resume and (out / "result.json").exists():
        raise UserError(f"--resume {out}: this run has finished; see its result.json")
    return file


def versions():
    """Versions of what a run's numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def device_name(device):
    """What the device is called: the GPU's name, or the CPU's architecture and number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Most bytes that this process has held so far: of a GPU's memory, or resident."""
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
    for name in ("data", "adapter"):
        if getattr(s, name) is not None:  # the run folder must find it from anywhere
            setattr(s, name, os.path.abspath(os.path.expanduser(getattr(s, name))))
    if os.path.isdir(os.path.expanduser(s.model)):
        s.model = os.path.abspath(os.path.expanduser(s.model))
    try:
        with on_signal(stop_at_once), processes():
            print(evaluation.to_json(run(s)))
    except (Interrupted, RunError, OSError, SafetensorError) as error:
        began = s.out and (Path(s.out) / "run.json").exists()
        if isinstance(error, OSError) and not began:
            raise
        rank, world = rank_and_world()
        reason, status = f"error: {error}", 1
        if isinstance(error, Interrupted):
            reason, status = f"stopped by {signal.Signals(error.args[0]).name}", 128 + error.args[0]
        program = "python" if world == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        command = f"{program} {shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(s.out)}" if began else ""
        if rank == 0 or isinstance(error, OSError):  # of the others, all processes know
            say(" ".join(reason.split()) + (f"; go on with: {command}" if began else " before the run began"))
        raise SystemExit(status) from None


if __name__ == "__main__":
    evaluation.command(main)
