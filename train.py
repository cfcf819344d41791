"""Fine-tune a frozen transformer with LoRA whose ranks a policy allocates: the command line, the loop, the run folder.

    python train.py                                              # the embedded default: a small ViT, offline
    python train.py --method lelora --model llama2-7b            # any method, any model
    python train.py --method lora --model roberta-base --task cola --data glue/
    python train.py --method mine.py:Policy --task mine.py:TASK  # a policy and a task (data.Task) of your own
    torchrun --nproc-per-node 8 train.py --model llama3-8b       # the same numbers on 8 GPUs; --shard: FSDP

Progress goes to stderr; the last line on stdout is one JSON object with the result.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import allocators
import data
import eval as evaluation
import lora
import model as models
from eval import criterion, validation
from extras import devices, source
from extras.adapter_files import load_adapter, save_adapter
from extras.cards import write_cards
from extras.flags import check_bounds, parser_of, run_program, say, setting, to_json, told
from extras.processes import add_up, after_process_0, compare, largest, process_and_count, processes, shard, start_alike
from model import UserError


@dataclasses.dataclass
class Settings:
    """Everything that defines a run; a field is a flag (`--batch-size`), None the task's or the paper's value."""

    method: str = setting("lora", "what", f"{', '.join(allocators.METHODS)}, or my_policy.py:MyPolicy")
    model: str = setting("vit-digits", "what", "short name, Hub id or folder with config.json and *.safetensors")
    task: str = setting(None, "what", "name or my_tasks.py:MY_TASK; default by family digits-rot90, cola, commonsense")
    data: str = setting(None, "what", "folder or file with the task's data; default: the cache, fetched if absent")
    out: str = setting(None, "what", "run folder; default runs/METHOD-MODEL-TASK-SEED")
    seed: int = setting(0, "what", "seed of initialisation, data order, dropout and policies")

    rank: int = setting(None, "adapter", "nominal rank r; capacity of each adapter for most methods", low=1)
    alpha: float = setting(None, "adapter", "LoRA alpha; adalora: 16 x triplets; lelora: none", low=1e-9, high=1e9)
    dropout: float = setting(None, "adapter", "on the adapter's input; none on W's own components", high=1)
    targets: list = setting(None, "adapter", "projections, of query,key,value,out,gate,up,down; default by family")
    scaling: str = setting("nominal", "adapter", "alpha / r, own R or sqrt(r) (rsLoRA)", ("nominal", "own", "rslora"))
    ranks: str = setting(None, "adapter", "for --method lora: the last ranks of a run folder, or {name: rank} in JSON")
    ranks_shuffled: bool = setting(False, "adapter", "deal the ranks of --ranks to other matrices of the same cost")
    adapter: str = setting(None, "adapter", "folder of a PEFT adapter for --method lora to start from, as it is")
    init: str = setting("lora", "adapter", "start at W's r largest or smallest components", lora.INITS)
    dora: bool = setting(False, "adapter", "DoRA: trainable lengths of the rows of W + s B A")
    lora_plus_ratio: float = setting(1.0, "adapter", "LoRA+: learning rate of B over A's; its paper: 16", low=1e-9)
    freeze_a: bool = setting(False, "adapter", "LoRA-FA: train B alone")

    epochs: float = setting(None, "optimization", "passes over the training set", low=1e-9)
    steps: int = setting(None, "optimization", "optimizer steps; overrides --epochs", low=1)
    batch_size: int = setting(None, "optimization", "examples per batch, of all processes together", low=1)
    accumulate: int = setting(1, "optimization", "batches per optimizer step", low=1)
    optimizer: str = setting("adamw", "optimization", "muon: for A and B, AdamW for the rest", ("adamw", "sgd", "muon"))
    lr: float = setting(None, "optimization", "peak learning rate; adalora: its authors', or twice LoRA's", low=1e-9)
    weight_decay: float = setting(None, "optimization", "decoupled (sgd: L2); none on A, B of W's components")
    warmup: float = setting(None, "optimization", "below 1 a share of all steps, else steps; weightlora, random: 0")
    schedule: str = setting("linear", "optimization", "learning rate after warm-up", ("linear", "cosine", "constant"))
    clip: float = setting(1.0, "optimization", "clip the gradient's norm to this; 0 = never")

    max_length: int = setting(None, "data", "longest input in tokens; the rest is cut", low=1)
    limit_train: int = setting(0, "data", "use only the first N training rows; 0 = all")
    limit_eval: int = setting(0, "data", "use only the first N evaluation rows; 0 = all")
    eval_batch_size: int = setting(0, "data", "examples at a time in evaluation; 0 = batch size, or what a GPU holds")
    sample_train: bool = setting(False, "data", "draw the rows of --limit-train by the seed")
    eval_half: str = setting("all", "data", "evaluate all rows or one of two fixed halves", ("all", "tune", "report"))
    score: str = setting("generation", "data", "of generated or of likeliest answers", ("generation", "likelihood"))

    device: str = setting("auto", "machine", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    dtype: str = setting("auto", "machine", "auto = bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16"))
    weights: str = setting("float", "machine", "int8 = the frozen matrices of the blocks in 8 bits", ("float", "int8"))
    compile: str = setting("auto", "machine", "of blocks; auto = 1,000 steps on a GPU", ("auto", "on", "graphs", "off"))
    checkpointing: bool = setting(False, "machine", "recompute activations in the backward pass to save memory")
    forward_rows: int = setting(0, "machine", "rows of a forward pass at most; 0 = all, or what fits a GPU's memory")
    shard: bool = setting(False, "machine", "under torchrun: spread the frozen weights over the devices (FSDP)")
    init_weights: str = setting("checkpoint", "machine", "random = no weights are read", ("checkpoint", "random"))
    log_every: int = setting(10, "machine", "steps between lines in metrics.jsonl and ranks.jsonl", low=1)
    eval_every: int = setting(0, "machine", "steps between evaluations; 0 = each epoch, at most 10 in all")
    save_every: int = setting(0, "machine", "steps between checkpoints; 0 = with each evaluation")
    keep: int = setting(2, "machine", "checkpoints to keep", low=1)
    max_bad_steps: int = setting(10, "machine", "steps in a row with loss or gradient not finite that end a run", low=1)
    resume: str = setting(None, "machine", "run folder to go on with from its newest checkpoint, with its own settings")
    eval_before: bool = setting(True, "machine", "evaluate before training, too")

    r_min: int = setting(4, "static shapes", "smallest rank r_min; a lower --rank is raised to it", low=1)
    r_max: int = setting(32, "static shapes", "largest rank; a higher --rank is cut to it", low=1)
    empirical_depth: str = setting("text", "empirical", "block i's depth: i / L, or i / (L - 1)", ("text", "code"))
    adalora_init_ratio: float = setting(1.5, "AdaLoRA", "capacity over --rank: the first budget over the last", low=1)
    adalora_t_init: int = setting(None, "AdaLoRA", "t_i, steps before the first pruning; default 10 %% of the run")
    adalora_t_final: int = setting(None, "AdaLoRA", "t_f, steps with the final budget; default 50 %% of the run")
    adalora_delta_t: int = setting(10, "AdaLoRA", "Delta_T, steps between allocations", low=1)
    adalora_beta1: float = setting(0.85, "AdaLoRA", "beta_1, smoothing of the sensitivity", high=1)
    adalora_beta2: float = setting(0.85, "AdaLoRA", "beta_2, smoothing of its uncertainty", high=1)
    adalora_orth: float = setting(0.1, "AdaLoRA", "gamma, of the penalty; RTE, STS-B: 0.3; PEFT: 0.5")
    lalora_gamma: float = setting(None, "La-LoRA", "gamma, how fast the budget grows (Eq. 5); default by --rank")
    lalora_budget: str = setting("grow", "La-LoRA", "Eq. 5, or full = r L from the start (w/o CAR)", ("grow", "full"))
    lalora_fidelity: str = setting("step", "La-LoRA", "f: Eq. 10, section 3.3's, 5.2's, or 1",
                                   ("step", "truncation", "initial", "off"))
    lalora_score: str = setting("norm", "La-LoRA", "contribution c: Eq. 9, or section 5.7's Fisher", ("norm", "fisher"))
    lalora_softmax: str = setting("relative", "La-LoRA", "Eq. 8 over c over its mean, or over c", ("relative", "raw"))
    weightlora_keep: int = setting(0, "WeightLoRA", "K, matrices that keep an adapter; 0 = half")
    weightlora_steps: int = setting(0, "WeightLoRA", "T, warm-up steps; 0 = 0.5 %% of the run, at least 5")
    weightlora_examples: int = setting(192, "WeightLoRA", "rows that a warm-up step sees at least, in several batches")
    weightlora_lr: float = setting(5.0, "WeightLoRA", "eta, step size of omega, times the schedule's rate", low=1e-9)
    weightlora_threshold: str = setting("every", "WeightLoRA", "threshold at every step, or the end", ("every", "end"))
    weightlora_rank_by: str = setting("value", "WeightLoRA", "keep the largest omega (its code), |omega| (its text) or "
                                                             "|omega - 1|", ("value", "magnitude", "moved"))
    credit_steps: int = setting(0, "credit", "T, warm-up steps; 0 = 10, or one less than the run has")
    credit_examples: int = setting(192, "credit", "rows that a warm-up step sees at least, in several batches")
    credit_power: float = setting(0.5, "credit", "power of the credit: 0 deals alike to all, above 1 to few")
    credit_cap: float = setting(4.0, "credit", "most rank of one matrix, over --rank", low=1)
    credit_floor: float = setting(0.0, "credit", "share of the rank that every matrix has whatever its credit", high=1)
    credit_budget: str = setting("parameters", "credit", "deal out parameters, or rank units", ("parameters", "ranks"))
    credit_share: float = setting(1.0, "credit", "how much of that is dealt out, to go below rank 1", low=1e-9)
    lelora_dims: list = setting(None, "LeLoRA", "candidate dimensions; default 0, powers of 2 up to --rank")
    lelora_locations: list = setting(None, "LeLoRA", "candidate windows; default first,middle,last")
    lelora_reward_alpha: float = setting(0.8, "LeLoRA", "alpha of the reward, the weight of the loss's change (Eq. 4)")
    lelora_every: int = setting(1, "LeLoRA", "iterations between actions", low=1)
    lelora_ablate: str = setting("none", "LeLoRA", "ablations, as in Fig. 5a", ("none", "rank", "location", "random"))
    lelora_start: str = setting("uniform", "LeLoRA", "first actions alike, or as in Appendix B", ("uniform", "kaiming"))
    lelora_baseline: str = setting("mean", "LeLoRA", "of the reward: its mean, or the loss's trend", ("mean", "trend"))
    lelora_policy_lr: float = setting(1e-3, "LeLoRA", "eta_2, the policy network's learning rate (Eq. 10)")
    lelora_policy_optimizer: str = setting("sgd", "LeLoRA", "Eq. 10's plain steps, or Adam", ("sgd", "adam"))
    lelora_inputs: str = setting("standardised", "LeLoRA", "norms and singular values seen", ("standardised", "raw"))


DEFAULTS = {  # by kind of model: the projections that the papers adapt, a task, the kinds of task that it does
    "encoder": (["query", "value"], "cola", ("classify", "regress", "span")),
    "decoder": (["query", "key", "value", "up", "down"], "commonsense", ("lm", "classify", "regress")),
    "vit": (["query", "value"], "digits-rot90", ("image",))}
READERS = {  # groups of settings that are policies' own
    "static shapes": ("linear-decay", "attention-heavy", "empirical"), "empirical": ("empirical",),
    "WeightLoRA": ("weightlora", "weightlora+", "random"), "AdaLoRA": ("adalora",), "La-LoRA": ("lalora",),
    "credit": ("credit",), "LeLoRA": ("lelora",)}
BROUGHT = ("method", "rank", "alpha", "dropout", "targets", "scaling", "init", "dora", "ranks")  # by an --adapter


def settle(s, config):
    """Fill the settings that are None: from the task's table row and the papers' values for the model's family."""
    policy, foreign = allocators.policy(s.method), [group for group in READERS if s.method not in READERS[group]]
    others = [f.name for f in dataclasses.fields(s) if f.metadata["group"] in foreign or f.name in policy.unread]
    if told(s, others) and s.method in allocators.METHODS and not s.resume:
        say(f"note: --method {s.method} does not read {told(s, others)}")
    targets, default, takes = DEFAULTS[config.kind]
    s.task = s.task or default
    task = data.find_task(s.task, s.data)
    if task.kind not in takes:
        raise UserError(f"--task {s.task}: {s.model} does {', '.join(takes)}, not '{task.kind}': choose another")
    chosen, reasons = data.hyperparameters(task, config.family, config.hidden_size, allocators.base_method(s.method),
                                           s.rank, s.adalora_init_ratio)
    chosen["targets"] = targets
    settled = {"epochs", "steps"} if s.epochs or s.steps else set()
    settled |= {*BROUGHT} if s.adapter else set()
    unset = {name: chosen[name] for name in chosen.keys() - settled if getattr(s, name) is None}
    vars(s).update(unset)
    taken = [f"{name} {unset[name]:g} ({reason})" for name, reason in reasons.items() if name in unset]
    if taken:
        say(f"{s.method}: " + ", ".join(taken))
    devices.settle(s, adapters=allocators.base_method(s.method) not in ("full", "bitfit"))
    if not s.out:
        s.out = evaluation.free_folder(f"runs/{evaluation.variant(s)}-{Path(s.model).name}-{task.name}-{s.seed}")
    check(s, policy)
    return task


def check(s, policy):
    """Refuse settings that cannot work; raises UserError with one line that names the flag."""
    check_bounds(s)
    method, base = f"--method {s.method}", allocators.base_method(s.method)
    itself = base in ("full", "bitfit")  # the model's own weights are trained
    foreign, brought = told(s, policy.refuses), told(s, BROUGHT) if s.adapter and not s.resume else ""
    rules = [
        (brought, f"--adapter {s.adapter}: for --method lora, with ranks of its own: leave out {brought}"),
        (s.r_min > s.r_max, f"--r-min {s.r_min} is above --r-max {s.r_max}"),
        (foreign, f"{foreign}: has no meaning with {method}; leave it out"),
        (s.freeze_a and (s.lora_plus_ratio != 1 or base == "lalora" and s.lalora_score == "fisher"),
         "--freeze-a: --lora-plus-ratio and --lalora-score fisher need a trained A; leave them out"),
        (s.ranks and s.method != "lora" or s.ranks_shuffled and not s.ranks,
         "--ranks goes with --method lora, --ranks-shuffled with --ranks"),
        (s.sample_train and not s.limit_train, "--sample-train: how many rows? say --limit-train, too"),
        (s.optimizer == "muon" and itself, f"--optimizer muon: is for adapters' A and B, which {method} has not"),
        (s.weights == "int8" and (s.shard or itself or base == "lelora" or s.init != "lora"),
         "--weights int8: is for adapters beside W, on one device: not for --shard, --init, full, bitfit or lelora"),
        (s.shard and (itself or not dist.is_initialized()),
         "--shard spreads frozen weights over processes: torchrun --nproc-per-node N ..., not for full or bitfit"),
        (s.shard and issubclass(policy, allocators.WeightLora) and (s.dora or s.init != "lora"),
         f"{method} --shard: survivors would start at weights that are spread by then: leave out --init and --dora"),
        (s.compile == "graphs" and (s.shard or s.checkpointing or itself or not s.device.startswith("cuda")),
         "--compile graphs: is for adapters on a GPU, without --shard or --checkpointing: choose --compile on"),
        (not s.resume and process_and_count()[0] == 0 and Path(s.out).exists() and os.listdir(s.out),
         f"--out {s.out}: exists and is not empty; choose another folder or remove it")]
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


# ---------------------------------------------------------------------------------------------- a step and the loop


class Training:
    """What changes while a run goes on, and the step that changes it; bench.py takes the same steps.

    `kind` is the task's, `allocator` the policy, `params` what the optimizers move: adapters' stacks, a trained head.
    """

    saved = ("moving", "vectors", "optimizers", "steps", "total", "peak", "bad", "loss")

    def __init__(self, s, model, kind, allocator):
        self.s, self.model, self.kind, self.allocator = s, model, kind, allocator
        self.device = torch.device(s.device)
        self.head = [] if kind == "lm" else list(model.head.parameters())
        self.stacks, self.params = allocator.stacks, allocator.parameters() + self.head
        for p in self.params:
            p.requires_grad_(True)
        self.optimizers, self.steps = lora.optimizers_for(s, self.params), 0
        self.total, self.peak = (torch.zeros_like(allocator.budget()) for _ in range(2))  # of the steps' budgets
        self.bad = torch.zeros(3, dtype=torch.long, device=self.device)  # bad steps: in all, in a row now, at most
        self.loss = torch.zeros(2, device=self.device)  # since the last line in the log: its sum, steps

    @property
    def moving(self):
        """What differs from the base model: the trained, a policy's own, and LoRA-FA's frozen A."""
        stacks = [p for stack in self.allocator.stacks for p in stack.parameters]
        return [p.data for p in dict.fromkeys([*self.params, *self.allocator.own, *stacks])]

    vectors = property(lambda self: self.allocator.vectors())

    def follow(self):
        """Make the optimizers hold the parameters that there are now, after adapters came or went."""
        self.stacks, self.params = self.allocator.stacks, self.allocator.parameters() + self.head
        for optimizer, groups in zip(self.optimizers, lora.groups_for(self.s, self.params)):
            lora.follow(optimizer, groups)

    def state(self):
        """The policy's state and this one's, {name: live tensor}."""
        return lora.state_of(self.allocator, "policy") | lora.state_of(self)

    def restore(self, state):
        """Put back what `state` gave: the policy first, which says what adapters there are."""
        lora.restore(self.allocator, state, "policy")
        self.allocator.match_adapters(state)
        self.allocator.restored()
        self.follow()
        lora.restore(self, state)

    def forward_backward(self, passes):
        """Leave the gradients of the loss at the parameters; returns it, a 0-d tensor."""
        loss = torch.zeros((), device=self.device)
        for inputs, labels, weight in passes:
            if self.s.compile == "graphs":  # what the last pass left in them may be overwritten now
                torch.compiler.cudagraph_mark_step_begin()
            self.allocator.real, self.allocator.watching = inputs.get("mask"), weight > 0
            if self.kind == "lm" and not self.allocator.reads_outputs():
                outputs, part = None, evaluation.token_loss(self.model, inputs, labels) * weight
            else:
                outputs = evaluation.logits(self.model, inputs)
                part = criterion(self.kind, outputs, labels) * weight
            penalty = self.allocator.penalty(inputs, labels, outputs) * (labels.numel() * weight)
            self.allocator.watching = False  # --checkpointing computes a pass again in its backward pass
            (part + penalty).backward()
            lora.gather_gradients([*self.params, *self.allocator.own])
            loss += part.detach()
        return loss

    def step(self, step, passes, rate=1.0):
        """Take optimizer step `step` at `rate` times the peak learning rate; returns its loss and gradient norm, 0-d.

        `passes` are the forward passes of this process, (inputs, labels, weight) each: weight is 1 over the number of
        labels of the whole step, or 0. The host does not wait to know whether loss and gradients are finite: if not,
        gradients become 0, `found_inf` holds the optimizers still (as torch.amp's GradScaler does), policies see `ok`.
        """
        s, allocator = self.s, self.allocator
        allocator.rate = rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * rate * group["lr_ratio"]
        loss = self.forward_backward(passes)
        moved = [*self.params, *allocator.own]
        grads = [p.grad for p in moved if p.grad is not None]
        add_up([loss, *grads, *(getattr(allocator, name) for name in allocator.summed)])
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        allocator.ok = ok = norm.isfinite() & loss.isfinite()
        bad = ~ok
        for grad in grads:
            grad.masked_fill_(bad, 0)
        allocator.after_backward(step)

        nn.utils.clip_grads_with_norm_(self.params, s.clip or math.inf, norm.where(ok, 0))
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()
            optimizer.step()
        self.count(ok, loss)

        if allocator.after_step(step) or allocator.stacks is not self.stacks:
            self.follow()
            start_alike(s, step, self.moving)
        for p in moved:
            p.grad = None
        for name in allocator.summed:
            getattr(allocator, name).zero_()
        return loss, norm

    def count(self, ok, loss):
        """Count a step, with the allocation in force, on the device: only who reads the numbers waits."""
        now, bad = self.allocator.budget(), ~ok
        self.total += now
        torch.maximum(self.peak, now, out=self.peak)
        self.steps += 1
        total, row, most = self.bad.unbind()
        total += bad
        row.add_(1).mul_(bad)
        torch.maximum(most, row, out=most)
        self.loss += torch.where(ok, torch.stack((loss, torch.ones_like(loss))), 0)

    def budget(self):
        """Trainable adapter parameters {"now", "mean", "peak"} as whole numbers."""
        now = self.allocator.budget()
        mean = self.total / self.steps if self.steps else now
        return {"now": round(now.item()), "mean": round(mean.item()), "peak": round(max(self.peak, now).item())}


def schedule(s, step, steps):
    """Learning rate over its peak after `step` of `steps`: linear warm-up, then linear, cosine or constant."""
    warmup = int(s.warmup) if s.warmup >= 1 else math.ceil(s.warmup * steps)
    if step < warmup:
        return step / warmup
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[s.schedule]


def train(training, batches, task, alive, evaluate):
    """Run the optimizer over `batches`; returns {"steps", "seconds", "trainable_params", ...}."""
    s, allocator, steps = training.s, training.allocator, batches.total_steps
    eval_every = s.eval_every or max(batches.steps_per_epoch, math.ceil(steps / 10))
    done, seconds = alive.resume(training, batches)
    seen, started = 0, time.time() - seconds
    devices.forget_peak_memory(s.device)
    training.model.train()
    with tqdm(total=steps, initial=done, desc=f"{s.method} {task.name}", unit="step", dynamic_ncols=True,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:  # a log file needs no animation
        for step in range(done + 1, steps + 1):
            alive.in_step = True
            start_alike(s, step, training.moving if step == done + 1 else ())  # each step has dropout of its own
            if (step - 1) % eval_every == 0 and (step > 1 or s.eval_before):
                began = time.time()
                evaluate(step - 1)  # after the checkpoint: killed here, a run loses no step
                started += time.time() - began
            passes, rows = batches.take(allocator.examples(step))
            rate = schedule(s, step - 1, steps)
            _, norm = training.step(step, passes, rate)
            seen += rows
            bar.update()

            logged = step % s.log_every == 0 or step == steps
            alive.in_step = step < steps
            stopping = largest(torch.tensor(alive.came)).item()
            saved = step % (s.save_every or eval_every) == 0 or step == steps or stopping
            if logged or saved:
                skipped, _, most = training.bad.tolist()
                if most >= min(s.max_bad_steps, steps):
                    raise RunError(f"step {step}: loss or gradient not finite for {most} steps in a row: lower --lr or "
                                   "look at the rows")
                compare(step, training)
            if logged or step <= 10:  # warm-up phases are short
                own = allocator.log()
                by_matrix = {name: value for name, value in own.items() if isinstance(value, dict)}
                alive.log("ranks.jsonl", by_matrix | {"step": step, "ranks": allocator.ranks()})
            if logged:
                total, good = training.loss.tolist()
                training.loss.zero_()
                loss, size = total / good if good else math.nan, training.budget()
                speed = seen / (time.time() - started - seconds)
                bar.set_postfix_str(f"loss {loss:.3f}, budget {size['now']:,}, {speed:.0f} examples/s", refresh=False)
                numbers = {"step": step, "epoch": round(step / batches.steps_per_epoch, 3), "loss": loss,
                           "lr": s.lr * rate, "grad_norm": norm.item(), "skipped_steps": skipped,
                           "examples_per_second": speed, "trainable_params": size}
                alive.log("metrics.jsonl", {k: v for k, v in own.items() if k not in by_matrix} | numbers)
            if saved:
                alive.save(training, batches, step, time.time() - started)
            if stopping:
                raise Interrupted(stopping)
    if allocator.dynamic and not allocator.allocations:
        raise UserError(f"{s.method} never allocated in {steps} steps, so this was plain LoRA: train longer")
    spent = time.time() - started
    return {"steps": steps, "seconds": round(spent, 2), "trainable_params": training.budget(),
            "held_params": sum(p.numel() for p in allocator.parameters()), "skipped_steps": int(training.bad[0]),
            "examples_per_second": round(seen / max(spent - seconds, 1e-9), 2),
            "peak_memory_mb": round(devices.peak_memory(s.device) / 2**20)}


# ---------------------------------------------------------------------------------------------- keeping a run alive


class RunError(Exception):
    """A run that cannot go on, though its settings are right; the message is one line for the user, exit status 1."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; args[0] is its number."""


class Survival(contextlib.ExitStack):
    """What keeps a run alive: signals, the lock on its folder, its logs, checkpoints and going on from them.

    A signal stops at once, but in training's steps (`in_step`) the first one only leaves its number in `came`.
    """

    def __init__(self, s):
        super().__init__()
        self.s, self.came, self.in_step = s, 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self.signalled))  # at the end, as it was

    def signalled(self, number, _):
        if not self.in_step or self.came and process_and_count()[1] == 1:  # torchrun passes on one, kills 30 s later
            raise Interrupted(number)
        self.came = number

    def claim(self, about=None):
        """Make the run folder this run's until the end, by a lock that goes with the process, however that ends.

        A new run's `about` goes into run.json, from which it is resumed. UserError: the folder is taken, or finished.
        """
        out = Path(self.s.out)
        out.mkdir(parents=True, exist_ok=True)
        file = self.enter_context(open(out / "run.json", "a", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is at work in this folder; wait, or choose another --out") from None
        except OSError as error:
            say(f"warning: {out}: cannot be locked here ({error.strerror}); start no second run in it")
        if (out / "result.json").exists():
            raise UserError(f"{out}: this run has finished; see its result.json")
        if about is None:
            return
        if file.tell():
            raise UserError(f"{out}: another run has begun in this folder; choose another --out")
        file.write(to_json(about, indent=2) + "\n")
        file.flush()
        models.sync(out / "run.json")
        models.sync(out)

    def log(self, name, line):
        """Append a dict to a file of JSON lines."""
        if process_and_count()[0] == 0:
            with open(Path(self.s.out) / name, "a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def save(self, training, batches, step, seconds):
        """Write checkpoints/step-N: beside, synced, then renamed; the newest `keep` stay."""
        if process_and_count()[0]:
            return
        s, folder = self.s, Path(self.s.out) / "checkpoints" / f"step-{step}"
        state = training.state() | lora.state_of(batches, "batches") | {"random.cpu": torch.get_rng_state()}
        if s.device.startswith("cuda"):
            state["random.cuda"] = torch.cuda.get_rng_state(s.device)
        for old in folder.parent.glob("*.part"):  # left by a run that was killed here
            shutil.rmtree(old)
        with models.publish(folder) as part:
            save_file({name: value.cpu().clone().contiguous() for name, value in state.items()},  # views, of one
                      part / "state.safetensors")
            about = {"step": step, "seconds": seconds, "sha256": models.digest(part / "state.safetensors")}
            (part / "state.json").write_text(json.dumps(about))
        models.sync(s.out)  # the name checkpoints/ itself
        for old in checkpoints(s.out)[s.keep:]:
            shutil.rmtree(old)

    def resume(self, training, batches):
        """Put a run back to where its newest whole checkpoint left it; returns its (step, seconds), or (0, 0).

        A damaged one is reported, and UserError raised if all are. What was logged since goes: it happens again.
        """
        s, out = self.s, Path(self.s.out)
        if not s.resume:
            return 0, 0.0
        about, state = {"step": 0, "seconds": 0.0}, None
        for folder in checkpoints(out):
            file = folder / "state.safetensors"
            try:
                about = json.loads((folder / "state.json").read_text())
                with safe_open(file, framework="pt"):  # a lying header costs nothing
                    if models.digest(file) != about["sha256"]:
                        raise ValueError("checksum differs")
                state = {name: value.clone() for name, value in load_file(file).items()}
                break
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
                say(f"warning: {folder}: damaged ({error}); trying the checkpoint before it")
        if state:
            say(f"resuming {out} after step {about['step']}")
            try:
                training.restore(state)
                lora.restore(batches, state, "batches")
            except KeyError as error:
                raise UserError(f"{out}: its checkpoints, of another version, lack {error}: start it again") from None
            except TypeError as error:
                raise UserError(f"{out}: its checkpoints do not fit: {error}") from None
            torch.set_rng_state(state["random.cpu"])
            if s.device.startswith("cuda"):
                torch.cuda.set_rng_state(state["random.cuda"], s.device)
        elif checkpoints(out):
            raise UserError(f"{out}: no whole checkpoint in checkpoints/; start the run again without --resume")
        else:
            say(f"{out} has no checkpoint yet: starting from the beginning")
        for file in (out / "metrics.jsonl", out / "ranks.jsonl") if process_and_count()[0] == 0 else ():
            evaluation.rewind_log(file, about["step"])
        return about["step"], about["seconds"]


def checkpoints(out):
    """Checkpoint folders of a run folder, the newest first."""
    found = [path for path in Path(out).glob("checkpoints/step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


# ---------------------------------------------------------------------------------------------- a whole run


def run(s):
    """Do what the settings say, from reading the model to the final evaluation; returns the result as a dict.

    Leaves the run folder: run.json, metrics.jsonl, ranks.jsonl, result.json and adapter/ (model/ for full and bitfit).
    The final numbers are what eval.py gives for it. All processes call this; process 0 gets the result.
    """
    with Survival(s) as alive, processes():
        training, batches, task, splits, processor = set_up(s, alive)
        out, process, model, allocator = Path(s.out), process_and_count()[0], training.model, training.allocator

        def evaluate(step):  # generating the answers takes long: only at the end
            if process and not s.shard:
                return
            rows = devices.rows_at_once(s, task, model, splits)
            with models.without_graphs(s):
                metrics = evaluation.evaluate_splits(model, task, splits, rows, processor.tokenizer, generate=False)
            alive.log("metrics.jsonl", {"step": step, "eval": metrics, "trainable_params": training.budget()})
            if step == 0:
                say("before training: " + evaluation.summary(metrics))

        result = train(training, batches, task, alive, evaluate)
        if process and not s.shard:
            return None
        if allocator.layers:
            allocator.check_ranks()
            task_type = {"lm": "CAUSAL_LM", "image": None, "span": "QUESTION_ANS"}.get(task.kind, "SEQ_CLS")  # PEFT's
            if process == 0:
                save_adapter(model, out / "adapter", models.HUB.get(s.model, s.model), task_type, task.kind != "lm")
        else:
            evaluation.save_model(model, processor, out / "model")
        warning, train_rows = allocator.warning(), len(batches.split)
        if s.compile != "off":
            torch._dynamo.reset()  # it holds on to the model
        del model, allocator, training, batches  # room for a fresh base with the saved adapter
        if s.shard:
            largest(torch.tensor(0))  # wait until the adapter is there
        after = evaluation.evaluate_run(out, splits=splits, shard=shard if s.shard else None, device=s.device)
        if process:
            return None
        size = result["trainable_params"]
        alive.log("metrics.jsonl", {"step": result["steps"], "eval": after, "trainable_params": size})
        say("after training: " + evaluation.summary(after))
        first = evaluation.read_log(out / "metrics.jsonl")[0]
        result = {"task": task.name, "method": s.method, "model": s.model, "seed": s.seed, **after, **result,
                  "train_rows": train_rows, "before": first["eval"] if first["step"] == 0 else None, "out": str(out)}
        if warning:
            result["warning"] = warning
            say("warning: " + warning)
        write_cards(out, train_rows)
        with models.publish(out / "result.json", folder=False) as part:  # the last: it is finished
            part.write_text(to_json(result, indent=2) + "\n", encoding="utf-8")
        return result


def set_up(s, alive):
    """Read data and model, attach the policy, begin the run folder: (Training, Batches, task, splits, Processor).

    Whatever can be wrong with settings, model or data is found before the run folder exists.
    """
    process, count = process_and_count()
    if process:
        after_process_0(s)
    elif s.resume:
        alive.claim()
        source.warn_if_changed(s)
    warmup_is_ours, name_is_ours = s.warmup is None, s.out is None
    task = settle(s, models.find_config(s.model, s.init_weights)[0])
    torch.manual_seed(s.seed)
    policy = allocators.policy(s.method)
    rows = data.read(task, s.data, "train", 0 if s.sample_train else s.limit_train)
    if s.sample_train:
        rows = data.drawn(rows, s.limit_train, s.seed)[0]
    if len(rows) <= policy.validation_rows:
        raise UserError(f"--method {s.method} keeps {policy.validation_rows} of {len(rows)} rows aside: use more")
    aside, rows = data.drawn(rows, policy.validation_rows, s.seed)
    model, processor = evaluation.load(s, task, adapted=s.adapter is not None)
    split = processor.encoded(rows, s.max_length)
    splits, batches = processor.evaluation(s), data.Batches(s, split, process, count)
    if s.compile == "auto":  # that takes 15 to 60 s, which few steps do not win back (RESULTS.md)
        s.compile = "on" if s.device.startswith("cuda") and batches.total_steps >= 1000 else "off"
    if warmup_is_ours and s.warmup >= 1:  # the papers' number of steps is for longer runs
        s.warmup = min(s.warmup, math.ceil(0.1 * batches.total_steps))
    # a regression head starts at the mean label: from 0 STS-B (mean 2.7) is not learned at rate 2e-3 (RESULTS.md)
    for name in model.fresh if task.kind == "regress" else ():
        if name.startswith("head.") and name.endswith("bias") and model.get_parameter(name).numel() == 1:
            model.get_parameter(name).data.fill_(split.labels.mean())
    if s.adapter:
        layers = load_adapter(model, s.adapter, s.model)
        if not layers:
            raise UserError(f"--adapter {s.adapter}: there is no matrix with an adapter in it to train")
        s.targets = sorted({name.split(".")[-1] for name in layers}, key=lora.TARGETS.index)
        s.dora = any(layer.magnitude is not None for layer in layers.values())
    allocator = policy(model, s, batches.total_steps)
    if aside:
        allocator.validation_loss = validation(model, task.kind, processor.encoded(aside, s.max_length), s.device)
    training = Training(s, model, task.kind, allocator)
    model.checkpointing = s.checkpointing
    if s.compile != "off":
        say("the first steps compile the blocks, which may take a minute (--compile off)")
        models.compile_blocks(model.blocks, s.compile == "graphs")
    if process == 0 and name_is_ours:
        s.out = evaluation.free_folder(s.out)  # another run of that name may have begun since
    if count > 1 and process == 0:
        after_process_0(s)
    if s.shard:
        shard(model, s.device)
    devices.fit_memory(training, batches)
    if not s.resume and process == 0:
        alive.claim({"settings": dataclasses.asdict(s), "labels": list(task.labels), "versions": devices.VERSIONS,
                     "device": devices.device_name(s.device), "command": shlex.join(sys.argv),
                     "commit": source.commit(), "source": source.source_of(s)})
    trainable, everything = (sum(p.numel() for p in some) for some in (training.params, model.parameters()))
    say(f"{s.method} on {s.model}, {task.name}: {len(split):,} training rows, {batches.total_steps:,} steps, "
        f"{trainable:,} of {everything:,} parameters, {s.dtype} on {devices.device_name(s.device)}; "
        f"run folder {s.out}")
    return training, batches, task, splits, processor


def main(argv=None):
    """Parse the command line, run, print the result as one line of JSON."""
    parser = parser_of(Settings, __doc__.split("\n\n")[0] + " Unset: the papers' values for model, task and method.")
    s = Settings(**vars(parser.parse_args(argv)))
    if s.resume:
        if s != Settings(resume=s.resume):
            parser.error("--resume takes the run's own settings: leave the other flags out")
        saved, _ = evaluation.read_run(s.resume)
        try:
            s = Settings(**vars(saved) | {"resume": s.resume, "out": s.resume})
        except TypeError as error:
            raise UserError(f"{s.resume}/run.json: of another version ({error}); start again") from None
    local = {"data": s.data, "adapter": s.adapter, "ranks": s.ranks, "method": ":" in s.method,
             "task": ":" in (s.task or ""), "model": os.path.isdir(s.model)}
    for name in filter(local.get, local):  # the run folder must find them from anywhere
        setattr(s, name, os.path.abspath(getattr(s, name)))
    try:
        result = run(s)
    except (Interrupted, RunError, RuntimeError, OSError, SafetensorError) as error:
        began = s.out and (Path(s.out) / "run.json").exists()
        reason, status = f"error: {error}", 1
        if isinstance(error, Interrupted):
            reason, status = f"stopped by {signal.Signals(error.args[0]).name}", 128 + error.args[0]
        elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            reason = (f"error: out of memory ({str(error).splitlines()[0]}); try --checkpointing, a lower "
                      f"--max-length or --forward-rows {max(1, (s.forward_rows or s.batch_size) // 2)}")
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = "error: another process of this run has ended"
        elif isinstance(error, RuntimeError) or isinstance(error, OSError) and not began:
            raise
        reason, (process, count) = " ".join(reason.split()), process_and_count()
        if began:
            program = "python" if count == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            reason += (f"; last checkpoint: {next(iter(checkpoints(s.out)), 'none yet')}; go on with: {program} "
                       f"{shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(s.out)}")
        if process == 0 or isinstance(error, OSError):  # of the others, all processes know
            say(reason)
        raise SystemExit(status) from None
    if result:
        print(to_json(result))


if __name__ == "__main__":
    run_program(main)
