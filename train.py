"""Fine-tune a frozen transformer with LoRA whose ranks a policy allocates: the command line, the loop, the run folder.

    python train.py                                              # the embedded default: a small ViT, offline
    python train.py --method lelora --model llama2-7b            # any method, any model
    python train.py --method lora --model roberta-base --task cola --data glue/

Progress goes to stderr; the last line on stdout is one JSON object with the result.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from tqdm import tqdm

import allocators
import data
import eval as evaluation
import lora
import model as models
from eval import SettingError


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
    init: str = setting("lora", "adapter", "start at W's r largest (pissa) or smallest (milora) singular components; "
                                           "then without --dropout", ("lora", "pissa", "milora"))
    dora: bool = setting(False, "adapter", "DoRA: trainable lengths of the rows of W + s B A")
    lora_plus_ratio: float = setting(1.0, "adapter", "LoRA+: learning rate of B over that of A; the paper suggests 16")
    freeze_a: bool = setting(False, "adapter", "LoRA-FA: train B alone")

    epochs: float = setting(None, "optimization", "passes over the training set")
    steps: int = setting(None, "optimization", "optimizer steps; overrides --epochs")
    batch_size: int = setting(None, "optimization", "examples per forward pass")
    accumulate: int = setting(None, "optimization", "forward passes per optimizer step")
    lr: float = setting(None, "optimization", "peak learning rate (AdamW)")
    weight_decay: float = setting(None, "optimization", "AdamW's decoupled weight decay")
    warmup: float = setting(None, "optimization", "warm-up: below 1 a share of all steps (0.06 = 6 %%), else steps")
    schedule: str = setting("linear", "optimization", "learning rate after warm-up", ("linear", "cosine", "constant"))
    clip: float = setting(1.0, "optimization", "clip the gradient's norm to this; 0 = never")

    max_length: int = setting(None, "data", "longest input in tokens; the rest is cut")
    limit_train: int = setting(0, "data", "use only the first N training rows; 0 = all")
    limit_eval: int = setting(0, "data", "use only the first N evaluation rows; 0 = all")

    device: str = setting("auto", "machine", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "the model's; auto = bfloat16 on a GPU, else float32",
                         ("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "machine", "compile each block with torch.compile")
    checkpointing: bool = setting(False, "machine", "recompute activations in the backward pass to save memory")
    init_weights: str = setting("checkpoint", "machine", "random = build the architecture without weights",
                                ("checkpoint", "random"))
    log_every: int = setting(10, "machine", "steps between lines in metrics.jsonl and ranks.jsonl")
    eval_every: int = setting(0, "machine", "steps between evaluations; 0 = each epoch, at most 10 in all")
    save_every: int = setting(0, "machine", "steps between checkpoints; 0 = with each evaluation")
    keep: int = setting(2, "machine", "checkpoints to keep")
    resume: str = setting(None, "machine", "run folder to go on with from its newest checkpoint, with its own settings")
    eval_before: bool = setting(True, "machine", "evaluate before training, too")

    r_min: int = setting(4, "static", "smallest rank r_min; a lower --rank is raised to it")
    r_max: int = setting(32, "static", "largest rank; a higher --rank is cut to it")
    adalora_init_ratio: float = setting(1.5, "adalora", "capacity over --rank, the budget at the start over that at the end")
    adalora_t_init: int = setting(0, "adalora", "t_i, steps before the first pruning; 0 = 10 %% of the run")
    adalora_t_final: int = setting(0, "adalora", "t_f, steps with the final budget; 0 = 50 %% of the run")
    adalora_delta_t: int = setting(10, "adalora", "Delta_T, steps between allocations")
    adalora_beta1: float = setting(0.85, "adalora", "beta_1, smoothing of the sensitivity")
    adalora_beta2: float = setting(0.85, "adalora", "beta_2, smoothing of its uncertainty")
    adalora_orth: float = setting(0.5, "adalora", "gamma, weight of the orthogonality penalty")
    lalora_gamma: float = setting(1.0, "lalora", "gamma, how fast the budget grows (Eq. 5)")
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
    kind = {"bert": "encoder", "roberta": "encoder", "vit": "vit"}.get(config.family, "decoder")
    if s.targets is None:
        s.targets = ["query", "key", "value", "up", "down"] if kind == "decoder" else ["query", "value"]
    s.task = s.task or {"decoder": "commonsense", "encoder": "cola", "vit": "digits-rot90"}[kind]
    task = data.find_task(s.task, s.data)
    takes = {"encoder": ("classify", "regress"), "decoder": ("lm", "classify", "regress"), "vit": ("image",)}[kind]
    if task.kind not in takes:
        raise SettingError(f"--task {s.task} is of the kind '{task.kind}', but {s.model} ({config.family}) does "
                           f"{', '.join(takes)}: choose another model or task")
    for name, value in data.hyperparameters(task, config.family, config.hidden_size, s.method).items():
        length_is_set = name in ("epochs", "steps") and (s.epochs, s.steps) != (None, None)
        if hasattr(s, name) and getattr(s, name) is None and not length_is_set:
            setattr(s, name, value)
    s.accumulate = 1 if s.accumulate is None else s.accumulate
    s.device = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
    if s.dtype == "auto":  # a model that is trained itself, not through adapters, needs float32's small steps
        s.dtype = "bfloat16" if s.device.startswith("cuda") and s.method not in ("full", "bitfit") else "float32"
    s.out = s.out or free_folder(f"runs/{s.method}-{Path(s.model).name}-{s.task}-{s.seed}")
    check(s)
    return task


def check(s):
    """Refuse settings that cannot work; raises SettingError with one line that names the flag."""
    def flag(name):
        return f"--{name.replace('_', '-')} {getattr(s, name)}".removesuffix(" True")

    numbers = [f.name for f in dataclasses.fields(s) if f.type in (int, float) and getattr(s, f.name) is not None]
    may_be_0 = ("weight_decay", "warmup", "clip", "dropout", "seed", "limit_train", "limit_eval", "eval_every", "save_every",
                "adalora_t_init", "adalora_t_final", "adalora_beta1", "adalora_beta2", "adalora_orth", "lalora_gamma",
                "weightlora_keep", "weightlora_steps", "lelora_reward_alpha")
    for name in numbers:
        if not 0 <= getattr(s, name) < 2**63:  # not nan, not infinite
            raise SettingError(f"{flag(name)}: must be a number from 0 up")
        if getattr(s, name) == 0 and name not in may_be_0:
            raise SettingError(f"{flag(name)}: must be above 0")
    for name in ("dropout", "adalora_beta1", "adalora_beta2"):
        if getattr(s, name) >= 1:
            raise SettingError(f"{flag(name)}: must be below 1")
    if not 0 < len(s.targets) == len(set(s.targets)):
        raise SettingError(f"--targets {','.join(s.targets)}: name each projection once")
    if s.r_min > s.r_max:
        raise SettingError(f"{flag('r_min')} is above {flag('r_max')}")
    for name in allocators.METHODS[s.method].refuses:
        if getattr(s, name) != getattr(Settings, name):
            raise SettingError(f"{flag(name)}: has no meaning with --method {s.method}; leave it out")
    if s.freeze_a and (s.lora_plus_ratio != 1 or s.method == "lalora" and s.lalora_score == "fisher"):
        raise SettingError("--freeze-a: --lora-plus-ratio and --lalora-score fisher need a trained A; leave them out")
    evaluation.check_device(s.device)
    if not s.resume and Path(s.out).exists() and (not Path(s.out).is_dir() or any(Path(s.out).iterdir())):
        raise SettingError(f"{flag('out')}: exists and is not empty; choose another folder or remove it")


def free_folder(stem):
    """`stem`, or the first of stem-2, stem-3 ... that does not exist."""
    names = [stem] + [f"{stem}-{n}" for n in range(2, 10_000)]
    return next(name for name in names if not Path(name).exists())


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
    """Trainable adapter parameters, sum over matrices of rank_i (in_i + out_i): now, mean over steps, peak.

    Kept on the device; reading `report` waits for it.
    """

    def __init__(self, allocator):
        self.allocator, self.steps = allocator, 0
        self.total = torch.zeros((), dtype=torch.float64, device=allocator.device)
        self.peak = torch.zeros((), dtype=torch.float64, device=allocator.device)

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


def train(s, task, model, allocator, split, held_out, log, evaluate):
    """Run the optimizer over `split`; returns {"steps", "seconds", "trainable_params", ...}.

    `held_out` is a Split of rows kept aside for a policy's validation loss, or None. `log(file, dict)` appends a JSON
    line to the run folder, `evaluate(step)` measures the model as it stands.
    """
    device, steps = torch.device(s.device), total_steps(s, split)
    params = allocator.parameters() + trained_head(model, task)
    optimizer, rate_at, budget = optimizer_for(s, params), schedule(s, steps), Budget(allocator)
    running = torch.zeros((), device=device)  # loss since the last line in the log
    steps_per_epoch = epoch_steps(s, split)
    eval_every = s.eval_every or max(steps_per_epoch, math.ceil(steps / 10))
    save_every = s.save_every or eval_every
    done, seconds = 0, 0.0  # steps and training time before a restart
    if s.resume:
        done, seconds = load_checkpoint(s, model, task, allocator, optimizer, budget, running)
        params = allocator.parameters() + trained_head(model, task)
    started = time.time() - seconds
    if held_out is not None:
        allocator.validation_loss = validation(model, task, held_out, device)

    model.train()
    bar = tqdm(total=steps, initial=done, desc=f"{s.method} {s.task}", unit="step", file=sys.stderr, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file needs no animation
    batches, seen = stream(s, split, done), 0
    for step in range(done + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * rate_at(step - 1) * group["lr_ratio"]
        chosen = next(batches)
        micro = [data.collate(split, indices) for indices in chosen]
        count = sum(labels.numel() for _, labels in micro)  # every label weighs the same, however it was batched
        for inputs, labels in micro:
            labels = labels.to(device, non_blocking=True)
            loss = criterion(task.kind, evaluation.logits(model, inputs), labels) / count
            running += loss.detach()
            (loss + allocator.penalty() / len(micro)).backward()
        seen += sum(len(indices) for indices in chosen)
        allocator.after_backward(step)
        norm = torch.nn.utils.clip_grad_norm_(params, s.clip or math.inf)
        optimizer.step()
        budget.add()
        if allocator.after_step(step):
            params = allocator.parameters() + trained_head(model, task)
            follow(optimizer, params)
        optimizer.zero_grad(set_to_none=True)

        bar.update()
        logged = step % s.log_every == 0 or step == steps
        if logged or step <= 10:  # warm-up phases are short
            numbers = plain(allocator.log())
            log("ranks.jsonl", {"step": step, "ranks": allocator.ranks()}
                | {k: v for k, v in numbers.items() if isinstance(v, dict)})
        if logged:
            size, mean_loss = budget.report(), running.item() / ((step - 1) % s.log_every + 1)
            running.zero_()
            rate = seen / (time.time() - started - seconds)
            bar.set_postfix_str(f"loss {mean_loss:.3f}, budget {size['now']:,}, {rate:.0f} examples/s", refresh=False)
            log("metrics.jsonl", {"step": step, "epoch": round(step / steps_per_epoch, 3), "loss": mean_loss,
                                  "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
                                  "examples_per_second": rate, "trainable_params": size}
                | {k: v for k, v in numbers.items() if not isinstance(v, dict)})
        if step % eval_every == 0 and step < steps:
            began = time.time()
            evaluate(step, budget.report())
            model.train()
            started += time.time() - began
        if step % save_every == 0 or step == steps:
            save_checkpoint(s, model, task, allocator, optimizer, budget, running, step, time.time() - started)
    bar.close()
    model.eval()
    if allocator.dynamic and not allocator.allocations:
        raise SettingError(f"{s.method} never allocated in {steps} steps, so this was plain LoRA: train longer")
    spent = time.time() - started
    return {"steps": steps, "seconds": round(spent, 2), "trainable_params": budget.report(),
            "held_params": sum(p.numel() for p in allocator.parameters()),
            "examples_per_second": round(seen / max(spent - seconds, 1e-9), 2)}


def stream(s, split, done=0):
    """Endless lists of `accumulate` batches of row indices, from optimizer step `done` on, ordered by seed and epoch."""
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
        return value

    return loss


def plain(value):
    """Tensors and dicts of tensors as Python numbers, for JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


# ---------------------------------------------------------------------------------------------- checkpoints


def run_state(model, task, allocator, optimizer, budget, running):
    """Everything that changes while a run goes on, besides the step: {name: tensor}, the live tensors themselves."""
    params = allocator.parameters() + trained_head(model, task)
    state = {f"parameter.{i}": p.data for i, p in enumerate(params)}
    state |= {f"optimizer.{i}.{key}": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    state |= {f"gate.{name}": layer.gate.data for name, layer in allocator.layers.items()}
    state |= {f"frozen.{name}": layer.A.data for name, layer in allocator.layers.items() if not layer.A.requires_grad}
    return state | {"budget.total": budget.total, "budget.peak": budget.peak, "running": running}


def save_checkpoint(s, model, task, allocator, optimizer, budget, running, step, seconds):
    """Write checkpoints/step-N into the run folder: beside, synced, then renamed; only the newest `keep` stay."""
    folder = Path(s.out) / "checkpoints" / f"step-{step}"
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    state = run_state(model, task, allocator, optimizer, budget, running)
    state |= {f"allocator.{name}": value for name, value in allocator.state_dict().items()}
    state["random.cpu"] = torch.get_rng_state()
    if s.device.startswith("cuda"):
        state["random.cuda"] = torch.cuda.get_rng_state(s.device)
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(copies, part / "state.safetensors")
    digest = hashlib.sha256((part / "state.safetensors").read_bytes()).hexdigest()
    (part / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "sha256": digest}))
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    for old in checkpoints(s.out)[s.keep:]:
        shutil.rmtree(old)


def checkpoints(out):
    """Checkpoint folders of a run folder, the newest first."""
    found = [path for path in (Path(out) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def load_checkpoint(s, model, task, allocator, optimizer, budget, running):
    """Put a run back to where its newest whole checkpoint left it; returns its (step, seconds).

    A damaged checkpoint is reported and the one before it is taken. Raises SettingError when there is none.
    """
    for folder in checkpoints(s.out):
        try:
            about = json.loads((folder / "state.json").read_text())
            raw = (folder / "state.safetensors").read_bytes()
            if hashlib.sha256(raw).hexdigest() != about["sha256"]:
                raise ValueError("checksum differs")
            state = load(raw)
            break
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            say(f"warning: {folder}: damaged ({error}); trying the checkpoint before it")
    else:
        raise SettingError(f"{s.out}: no whole checkpoint in checkpoints/; start the run again without --resume")
    allocator.load_state_dict({name[10:]: value for name, value in state.items() if name.startswith("allocator.")})
    params = allocator.parameters() + trained_head(model, task)
    follow(optimizer, params)  # the policy may have rebuilt them
    for i, p in enumerate(params):
        prefix = f"optimizer.{i}."
        optimizer.state[p] = {name[len(prefix):]: value.to(p.device) for name, value in state.items()
                              if name.startswith(prefix)}
    with torch.no_grad():
        for name, tensor in run_state(model, task, allocator, optimizer, budget, running).items():
            tensor.copy_(state[name])
    budget.steps = about["step"]
    torch.set_rng_state(state["random.cpu"])
    if s.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["random.cuda"], s.device)
    for file in ("metrics.jsonl", "ranks.jsonl"):  # what was logged after the checkpoint happens again
        kept = [line for line in (Path(s.out) / file).read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= about["step"]]
        (Path(s.out) / file).write_text("".join(kept), encoding="utf-8")
    say(f"resuming {s.out} after step {about['step']}")
    return about["step"], about["seconds"]


# ---------------------------------------------------------------------------------------------- a whole run


def run(s):
    """Do what the settings say, from reading the model to the final evaluation; returns the result as a dict.

    Leaves the run folder: run.json, metrics.jsonl, ranks.jsonl, result.json and adapter/ (model/ for full and bitfit).
    The final numbers are those of a freshly loaded model with the saved adapter: what eval.py gives for the folder.
    """
    warmup_is_ours = s.warmup is None
    task = settle(s, models.find_config(s.model, s.init_weights)[0])
    torch.manual_seed(s.seed)
    # whatever can be wrong with model or data is found before the run folder exists
    rows = data.read(task, s.data, "train", s.limit_train)
    held_rows = allocators.METHODS[s.method].held_out
    if held_rows:  # taken out of the training set for good
        order = np.random.default_rng(s.seed).permutation(len(rows)).tolist()
        if len(rows) <= held_rows:
            raise SettingError(f"--method {s.method} keeps {held_rows} training rows for validation, but there are only "
                               f"{len(rows)}: use more rows")
        rows, held = [rows[i] for i in sorted(order[held_rows:])], [rows[i] for i in sorted(order[:held_rows])]
    encoder = evaluation.Encoder(s, task)
    model = evaluation.load_model(s, task)
    split, held_out = encoder.training(rows), encoder.training(held) if held_rows else None
    splits = encoder.evaluation()
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
        for block in model.blocks:
            block.compile()

    out = Path(s.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--out {out}: cannot be made ({error.strerror}): choose another folder") from None
    if not s.resume:
        write_json(out / "run.json", {"settings": dataclasses.asdict(s), "labels": list(task.labels),
                                      "versions": versions(), "device": device_name(s.device)})
    say(f"{s.method} on {s.model}, {task.name}: {len(split):,} training rows, {total_steps(s, split):,} steps, "
        f"{sum(p.numel() for p in trained):,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{s.dtype} on {device_name(s.device)}; run folder {out}")

    def log(file, line):
        with open(out / file, "a", encoding="utf-8") as f:
            f.write(evaluation.to_json(line) + "\n")

    def evaluate(step, size):  # generating the answers takes long: only at the end
        metrics = evaluation.evaluate_splits(model, task, splits, s.batch_size, encoder.tokenizer, generate=False)
        log("metrics.jsonl", {"step": step, "eval": metrics, "trainable_params": size})
        return metrics

    if s.eval_before and not s.resume:
        say("before training: " + evaluation.summary(evaluate(0, Budget(allocator).report())))
    result = train(s, task, model, allocator, split, held_out, log, evaluate)
    if s.method in ("full", "bitfit"):
        models.save(model, out / "model")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
            if encoder.folder and (encoder.folder / name).is_file():
                shutil.copy(encoder.folder / name, out / "model")
    else:
        task_type = {"lm": "CAUSAL_LM", "image": None}.get(task.kind, "SEQ_CLS")  # PEFT's names
        lora.save_adapter(model, out / "adapter", models.HUB.get(s.model, s.model), task_type, head=task.kind != "lm")
    warning = allocator.warning()
    del model, allocator, trained  # the saved adapter is loaded onto a fresh base: make room for it
    after = evaluation.evaluate_run(out, splits=splits)
    first = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    log("metrics.jsonl", {"step": result["steps"], "eval": after, "trainable_params": result["trainable_params"]})
    say("after training: " + evaluation.summary(after))
    result = {"task": task.name, "method": s.method, "model": s.model, "seed": s.seed, **after, **result,
              "before": first["eval"] if first["step"] == 0 else None, "out": str(out)}
    if warning:
        result["warning"] = warning
        say("warning: " + warning)
    write_json(out / "result.json", result)
    return result


def write_json(path, value):
    """Write a JSON file, beside and then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(evaluation.to_json(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def versions():
    """Versions of what a run's numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def device_name(device):
    """What the device is called: the GPU's name, or the CPU's architecture and number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


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
        if (Path(s.resume) / "result.json").exists():
            raise SettingError(f"--resume {s.resume}: this run has finished; see its result.json")
        try:
            s = Settings(**vars(saved) | {"resume": s.resume, "out": s.resume})
        except TypeError as error:
            raise SettingError(f"{s.resume}/run.json: of another version of this program ({error}); start again") from None
    if s.data is not None:
        s.data = os.path.abspath(os.path.expanduser(s.data))  # the run folder must find it from anywhere
    if os.path.isdir(os.path.expanduser(s.model)):
        s.model = os.path.abspath(os.path.expanduser(s.model))
    print(evaluation.to_json(run(s)))


if __name__ == "__main__":
    evaluation.command(main)
