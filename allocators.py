"""Rank-allocation policies behind one interface: static shapes, AdaLoRA, La-LoRA, WeightLoRA(+), credit, LeLoRA.

A policy attaches the adapters and then decides, while training runs, how much rank each matrix gets. The training loop
drives every policy in the same way and does not know which one it is:

    allocator = policy(name)(model, settings, steps)
    loss + allocator.penalty(inputs, labels, outputs)  ->  backward  ->  allocator.after_backward(step)
    optimizer.step()                                   ->  allocator.after_step(step)  # True: adapters came or went
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import lora
from extras import singular
from extras.ranks_file import given_ranks, shuffled
from extras.source import own_module
from model import UserError, note

# a progress bar over layers whose matrices are decomposed, which takes minutes for a model of 7B
decomposing = functools.partial(tqdm, desc="singular values", unit="matrix", leave=False, disable=None)


class Allocator:
    """Uniform LoRA, and what every policy starts from: one adapter of the nominal rank per target matrix.

    `model` is a frozen model from model.py, `settings` the run's settings (train.Settings), `steps` the number of
    optimizer steps of the whole run. Adapters that are on the model already are taken over (train.py --adapter).
    In model order: `sites` are the target matrices (name, block index, kind), `names` their names, `layers` the
    adapters that there are, {name: LoraLinear}, `current` the rank of every matrix, (n,) float64 on the device.
    `stacks` hold the adapters by shape (lora.Stack); `in_model_order` sorts what is computed on them.
    """

    refuses = ()  # settings of init, dora, lora_plus_ratio, freeze_a, scaling that mean nothing with this policy
    unread = ()  # settings that it does not read, besides those in another policy's group of --help
    dynamic = False  # True: a run that ends before `allocations` > 0 is an error, not a result
    validation_rows = 0  # training rows kept aside; the loop then sets `validation_loss` (a call, 0-d tensor)
    validation_loss = None
    saved = ("allocations", "current", "made", "calls")  # what a restart needs, each class adding its own: names of
    # tensors (restored in place: views stay views), lists that keep their length, numbers, modules, optimizers ...
    own = ()  # parameters that the policy moves itself
    summed = ()  # names of the tensors that `watch` fills: added up over the processes, zeroed by the loop after a step
    ok = torch.ones((), dtype=torch.bool)  # the loop sets it, on the device: False where a step's gradients were not
    # finite; they are then zeros and no weight moves, and a policy learns nothing from the step
    rate = 1.0  # the loop sets it: the learning rate of this step over its peak
    real = None  # the loop sets it: which tokens of the batch are no padding, (B, T) bool, or None
    watching = True  # and this: False for a row that fills a process without any, and in the backward pass

    def __init__(self, model, settings, steps):
        self.model, self.settings, self.steps = model, settings, steps
        self.device = torch.device(settings.device)  # under --shard the weights are still on the CPU
        self.sites = lora.sites(model, settings.targets)
        self.names = [name for name, _, _ in self.sites]
        self.blocks = 1 + max(block for _, block, _ in self.sites)
        linears = [model.get_submodule(name) for name in self.names]
        self.sizes = [(linear.out_features, linear.in_features) for linear in linears]
        cost = [n_out + n_in * (not settings.freeze_a) for n_out, n_in in self.sizes]
        self.cost = torch.tensor(cost, dtype=torch.float64, device=self.device)
        self.allocations, self.nominal = 0, settings.rank
        self.current = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        self.made = {name: [0, 0, 0] for name in self.names}  # an adapter's R, which call of `add` made it, its init
        self.layers, self.stacks, self.calls = {}, [], 0
        self.setup()
        lora.state_of(self, "policy")  # what cannot be kept over a restart is said now, not at the first checkpoint

    # ------------------------------------------------------------------ what policies override

    def setup(self):
        """Attach the adapters by `add`, then prepare the policy's own state."""
        there = lora.adapters(self.model)
        if there:
            self.take_over(there)
        else:
            self.add(given_ranks(self.settings, self.names, self.cost.tolist()))

    def watch(self, name, x, real):
        """See the input x (B, T, in) of the matrix `name` in a training pass; real (B, T): no padding, None = all.

        Add to tensors named in `summed`, whose sums over all rows of the step `after_backward` then finds. Runs inside
        compiled code, without gradients, once for a pass.
        """

    def penalty(self, inputs, labels, outputs):
        """Extra loss term of one forward pass, a 0-d tensor or 0; `inputs` are the model's, `outputs` its logits.

        It counts by the pass's share of the step's labels: a mean over rows is the step's, however that is split.
        """
        return 0

    def reads_outputs(self):
        """Whether `penalty` may want the outputs: not the ones below. Else a language model's are never all kept."""
        return type(self).penalty not in (Allocator.penalty, AdaLora.penalty)

    def after_backward(self, step):
        """The gradients of step `step` (from 1) are there, unclipped: `self.gradients(name)`; nothing has moved yet."""

    def after_step(self, step):
        """The optimizer has moved the weights; returns True when adapters came or went, which it then must follow."""
        return False

    def examples(self, step):
        """How many rows this step has to see at least, whatever the batch size."""
        return 0

    def log(self):
        """The policy's own numbers for metrics.jsonl and ranks.jsonl: {name: number, tensor or {name: number}}."""
        return {}

    def warning(self):
        """One line about a failure of the policy itself, for the run's result, or None."""

    def restored(self):
        """After a restart all of `saved` is back, the adapters are there, their weights not yet: make what follows."""

    # ------------------------------------------------------------------ adapters

    def add(self, ranks, init=None):
        """Give matrices an adapter, {name: rank}; it starts as the settings say, or as `init`.

        PiSSA (Meng et al. 2024, Eqs. 2-4): at the r largest singular components of W; MiLoRA (Wang et al. 2024): at the
        r smallest; LoRA-FA (Zhang et al. 2023): with A frozen; LoRA+ (Hayou et al. 2024): with a learning rate of its
        own for B and, as in the authors' code, for DoRA's lengths.
        """
        s, init = self.settings, init or self.settings.init
        layers = lora.attach(self.model, ranks, s.alpha, s.dropout, self.nominal, s.scaling, self.device, s.dora)
        for layer in decomposing(layers.values() if init != "lora" else ()):
            part = slice(layer.rank) if init == "pissa" else slice(-layer.rank, None)
            _, A, B = singular.windows(layer.weight.data.to(self.device), layer.rank)
            layer.split_off(A[part], B[:, part])
        self.take_over(layers, init)

    def take_over(self, layers, init="lora"):
        """Make adapters that are on the model, {name: layer}, this policy's."""
        s, start = self.settings, lora.INITS.index(init)
        self.calls += 1
        for name, layer in layers.items():
            layer.A.requires_grad_(not s.freeze_a)
            layer.B.lr_ratio = s.lora_plus_ratio
            if layer.magnitude is not None:
                layer.magnitude.lr_ratio = s.lora_plus_ratio
            if type(self).watch is not Allocator.watch:
                layer.register_forward_pre_hook(functools.partial(self.see, name))
            layer.generation = self.calls
            self.current[self.names.index(name)], self.made[name] = layer.rank, [layer.rank, self.calls, start]
        self.restack(self.layers | layers)

    def see(self, name, layer, inputs):
        """A hook that calls `watch` in training passes."""
        if layer.training and layer.enabled and self.watching:
            with torch.no_grad():
                self.watch(name, inputs[0], self.real)

    def drop(self, names):
        """Give the matrices `names` their plain frozen layers back, at no cost left."""
        for name in names:
            lora.detach(self.model, name)
            self.current[self.names.index(name)], self.made[name] = 0, [0, 0, 0]
        self.restack({name: layer for name, layer in self.layers.items() if name not in names})

    def restack(self, layers):
        """Stack the adapters of one shape anew; those of different generations, and so age, stay apart."""
        self.layers, alike = {name: layers[name] for name in self.names if name in layers}, {}
        for name, layer in self.layers.items():
            alike.setdefault((layer.generation, layer.A.shape, layer.B.shape), {})[name] = layer
        self.stacks = [lora.Stack(alike[key]) for key in sorted(alike, key=lambda key: key[0])]
        order = [self.names.index(name) for stack in self.stacks for name in stack.layers]
        self.order = torch.tensor(order, device=self.device).argsort()

    def match_adapters(self, state):
        """After a restart: have the adapters that `made` names, and each g and mask that came after `setup`."""
        now = {name: [layer.rank, layer.generation] for name, layer in self.layers.items()}
        wrong = {name: made for name, made in self.made.items() if made[:2] != now.get(name, [0, 0])}
        current, calls = self.current.clone(), self.calls
        if wrong:  # else the stacks stay those that the policy may hold
            self.drop([name for name in wrong if name in self.layers])
        for call, init in sorted({(call, init) for rank, call, init in wrong.values() if rank}):
            self.calls = call - 1  # `add` counts one more
            self.add({name: rank for name, (rank, by, _) in wrong.items() if by == call}, lora.INITS[init])
        self.current.copy_(current)
        self.calls = calls
        for name, layer in self.layers.items():
            g, mask = (state.get(f"run.vectors.{name}.{vector}") for vector in ("g", "mask"))
            if layer.g is None and g is not None:
                layer.g = g.to(self.device, copy=True)
            if getattr(layer.A, "active", None) is None and mask is not None:
                layer.mask_updates(mask[:, 0].to(self.device, copy=True))

    def in_model_order(self, parts):
        """The rows of `parts`, one tensor (n_i, ...) for each of `stacks`, as one (n, ...) in the order of `layers`."""
        return torch.cat(parts)[self.order]

    def gradients(self, name):
        """Gradients of the matrix's A (R, in) and B (out, R), live parts of the stacks'; None for a frozen A."""
        layer = self.layers[name]
        return tuple(None if whole.grad is None else whole.grad[i] for whole, i in (layer.A.place, layer.B.place))

    # ------------------------------------------------------------------ what the loop asks

    def parameters(self):
        """Adapter parameters for the run's optimizer, stacked, in a fixed order."""
        return [p for stack in self.stacks for p in stack.parameters if p.requires_grad]

    def vectors(self):
        """Every g and every mask of updates that the layers hold, {name: live tensor}, for checkpoints."""
        held = {f"{name}.g": layer.g for name, layer in self.layers.items()}
        held |= {f"{name}.mask": getattr(layer.A, "active", None) for name, layer in self.layers.items()}
        return {name: t.data for name, t in held.items() if t is not None}

    @torch.no_grad()
    def squared_norms(self, key):
        """Squared norms of the rows of every A and the columns of every B, (2, n, R) float64; key: "data" or "grad"."""
        rows = self.in_model_order([getattr(stack.A, key).square().sum(2) for stack in self.stacks])
        columns = self.in_model_order([getattr(stack.B, key).square().sum(1) for stack in self.stacks])
        return torch.stack([rows, columns]).double()

    def ranks(self):
        """Current rank of every matrix: {name: int}."""
        return {name: int(rank) for name, rank in zip(self.names, self.current.tolist())}

    def check_ranks(self):
        """Raise UserError unless the ranks that are logged are those that the layers have, and so the adapter file."""
        for name, rank in self.ranks().items():
            layer = self.layers.get(name)
            held = int(layer.let_through().sum()) if layer else 0
            if held != rank and not (layer and layer.start):  # W's own components are all in use
                raise UserError(f"{type(self).__name__}: `current` says that {name} has rank {rank}, but its g lets "
                                f"{held} components through: change both together, and name in `saved` what g views")

    def budget(self):
        """Trainable parameters in force, 0-d float64: rank_i (in_i + out_i), of A only if trained, and DoRA's out_i."""
        lengths = sum(layer.out_features for layer in self.layers.values()) if self.settings.dora else 0
        return (self.current * self.cost).sum() + lengths


class Static(Allocator):
    """Fixed shapes of the Adaptive LoRA paper, section 3.1, floored and clamped to [r_min, r_max]; r_base is --rank."""

    def setup(self):
        s = self.settings
        ranks = {name: int(self.shape(i, kind, self.blocks, s.rank)) for name, i, kind in self.sites}
        self.add({name: min(max(rank, s.r_min), s.r_max) for name, rank in ranks.items()})
        if min(ranks.values()) < s.r_min or max(ranks.values()) > s.r_max or len({*ranks.values()}) == 1:
            note(f"{s.method}: its ranks are not the paper's shape here: see --rank, --r-min, --r-max, --targets")

    def shape(self, i, kind, L, r_base):
        """Rank of the projection `kind` in block i of L, before it is floored and clamped."""
        if base_method(self.settings.method) == "linear-decay":  # falls linearly with depth (section 3.1.1)
            return r_base - (r_base - self.settings.r_min) * i / (L - 1) if L > 1 else r_base
        if base_method(self.settings.method) == "attention-heavy":  # half for feed-forward matrices (section 3.1.2)
            return r_base if kind in ("query", "key", "value", "out") else r_base / 2
        # empirical: middle blocks get the most rank, early ones the least (section 3.1.3)
        whole = L if self.settings.empirical_depth == "text" else L - 1
        if 10 * i < 3 * whole:
            return r_base * 6 / 10
        return r_base * 12 / 10 if 10 * i < 7 * whole else r_base


class Direct(Allocator):
    """No adapters: `full` trains every weight, `bitfit` every bias (Zaken et al. 2022)."""

    refuses = ("init", "dora", "lora_plus_ratio", "freeze_a", "scaling")
    unread = ("rank", "alpha", "dropout", "targets")

    def setup(self):
        method, head = self.settings.method, self.model.head_kind != "lm"  # every method trains a new head, apart
        self.sites, self.names, self.current = [], [], self.current[:0]
        self.trained = [p for name, p in self.model.named_parameters() if not (head and name.startswith("head."))
                        and (method != "bitfit" or name.endswith("bias"))]
        if not self.trained:
            raise UserError(f"--method {method}: a {self.model.family} model has no biases to train")
        for p in self.trained:
            p.decays = p.dim() > 1  # biases and norms do not, as in transformers' Trainer
        self.size = torch.tensor(sum(p.numel() for p in self.trained), dtype=torch.float64, device=self.device)

    def parameters(self):
        return self.trained

    def budget(self):
        return self.size


class AdaLora(Allocator):
    """AdaLoRA (Zhang et al. 2023): W + s P diag(lambda) Q, and lambda of the least sensitive triplets is set to zero.

    A is Q, B is P and g is the trainable lambda. A pruned lambda goes on receiving gradients, so that its triplet may
    return at a later allocation; after the last one it is held at zero. Where the authors' code and PEFT's differ from
    the paper, whose equation numbers these are, this is their way: norms in `penalty` not squared, sensitivity taken
    after the optimizer's step, scale alpha over the triplets that a matrix starts with.
    """

    refuses = ("init", "lora_plus_ratio", "freeze_a", "scaling")  # own start and scale; reads A's gradient
    dynamic = True
    saved = ("kept", "last", "sensitivity", "uncertainty")

    def setup(self):
        s = self.settings
        half = min(round(0.5 * self.steps), max(0, self.steps - 2))
        self.t_init = round(0.1 * self.steps) if s.adalora_t_init is None else s.adalora_t_init
        self.end = self.steps - (half if s.adalora_t_final is None else s.adalora_t_final)
        if not 0 <= self.t_init < self.end <= self.steps or self.end < 2:
            raise UserError(f"--adalora-t-init {self.t_init} and --adalora-t-final {self.steps - self.end} leave "
                            f"no time to allocate in a run of {self.steps} steps; lower them or train longer")
        R = self.nominal = round(s.adalora_init_ratio * s.rank)
        self.add(dict.fromkeys(self.names, R))
        for stack in self.stacks:
            stack.A.data.normal_(std=0.02)
            stack.B.data.normal_(std=0.02)
        for layer in self.layers.values():
            layer.g = nn.Parameter(torch.zeros(R, device=self.device))
        self.g = lora.stacked([layer.g for layer in self.layers.values()])  # (n, R), in model order
        self.weights = [self.g, *(stack.A for stack in self.stacks), *(stack.B for stack in self.stacks)]
        self.sensitivity, self.uncertainty = ([torch.zeros_like(w.data) for w in self.weights] for _ in range(2))
        self.kept = torch.ones_like(self.g.data)  # (n, R): 1, or 0 where pruned
        self.last = 0  # step of the last allocation

    def parameters(self):
        return super().parameters() + [self.g]

    def penalty(self, inputs, labels, outputs):
        """Orthogonality of P and Q (Eq. 4): the mean over all of them of ||Q Q^T - I||_F and ||P^T P - I||_F."""
        gram = torch.cat([gram for stack in self.stacks for gram in (stack.A @ stack.A.mT, stack.B.mT @ stack.B)])
        norms = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[1], device=gram.device))  # (2 n,)
        return self.settings.adalora_orth * norms.mean()

    @torch.no_grad()
    def after_step(self, step):
        allocate = self.last < self.end  # once more at the end
        if step < self.end:
            self.observe()
            allocate = step > self.t_init and step % self.settings.adalora_delta_t == 0
        if allocate:
            scores = self.scores()
            pruned = scores.numel() - self.triplets(step)
            if pruned:
                self.kept.copy_(scores > scores.flatten().sort().values[pruned - 1])
            self.current.copy_(self.kept.sum(1))
            self.last, self.allocations = step, self.allocations + 1
        if allocate or step >= self.end:
            self.g.data.mul_(self.kept)  # Eq. 6
        return False

    def observe(self):
        """Smooth the sensitivity of every entry of lambda, Q and P, and its uncertainty; not after a bad step."""
        for w, sensitivity, uncertainty in zip(self.weights, self.sensitivity, self.uncertainty):
            now = (w * w.grad).abs_()  # Eq. 8
            sensitivity.lerp_(now, (1 - self.settings.adalora_beta1) * self.ok)  # Eq. 9
            uncertainty.lerp_((now - sensitivity).abs_(), (1 - self.settings.adalora_beta2) * self.ok)  # Eq. 10

    def scores(self):
        """Importance of each triplet, (n, R): lambda's plus the means over its row of Q, column of P (Eqs. 7, 11)."""
        lambdas, *rest = [mean * spread for mean, spread in zip(self.sensitivity, self.uncertainty)]  # Eq. 11
        Q, P = rest[:len(self.stacks)], rest[len(self.stacks):]
        return lambdas + self.in_model_order([q.mean(2) + p.mean(1) for q, p in zip(Q, P)])

    def triplets(self, step):
        """How many triplets to keep at `step`: from n R down to n r along a cubic (Eq. 12)."""
        full, target = self.kept.numel(), len(self.names) * self.settings.rank
        left = 1 - (min(step, self.end) - self.t_init) / (self.end - self.t_init)
        return int((full - target) * left ** 3 + target)


class LaLora(Allocator):
    """La-LoRA (Gu et al. 2025, Algorithm 1): a rank for every transformer block, from the norms of its adapters.

    All adapters of block i use the first r_i of their `rank` components; the others are switched off and stand still.
    Both steps that Eqs. 6 and 10 compare are truncated at the current r_i. `lalora_budget` "full" holds D = r L, where
    every block has rank r; `lalora_fidelity` "truncation" is section 3.3's text (truncated over full norm), "initial"
    section 5.2's: Eq. 10 with the norms at the start, of which B's are 0; `lalora_score` "fisher" is section 5.7's.
    Eq. 8 is over contributions over their mean: as they are ("raw") it gives all to one block where norms are large.
    """

    refuses = ("init",)  # components switched off would be missing from W, and the norms it reads be W's
    dynamic = True
    saved = ("block_ranks", "budget_rank", "norms", "initial", "fisher")

    def setup(self):
        super().setup()
        L, r, full = self.blocks, self.settings.rank, self.settings.lalora_budget == "full"
        self.block = torch.tensor([block for _, block, _ in self.sites], device=self.device)  # (n,)
        self.member = F.one_hot(self.block, L).T.double()  # (L, n): sums over a block's matrices
        self.block_ranks = torch.full((L,), r if full else 1, device=self.device)
        self.budget_rank = torch.tensor(r * L if full else L, dtype=torch.float64, device=self.device)  # D of Eq. 5
        self.mask = torch.zeros(L, r, device=self.device)
        for name, block, _ in self.sites:
            self.layers[name].g = self.mask[block]  # a view: one write changes every layer
            self.layers[name].mask_updates(self.mask[block])
        self.truncate()
        self.norms = self.squared_norms("data").cumsum(2).sqrt()  # (2, n, r): of A and B, their first 1..r components
        self.initial = self.norms.clone()
        self.fisher = torch.zeros_like(self.norms[:1])

    def truncate(self):
        """Make `block_ranks` the ranks in use (Eq. 3)."""
        self.mask.copy_(torch.arange(self.mask.shape[1], device=self.device) < self.block_ranks[:, None])
        self.current.copy_(self.block_ranks[self.block])

    @torch.no_grad()
    def after_backward(self, step):
        """Empirical Fisher information: running mean of the squared gradients (inactive components have none)."""
        if self.settings.lalora_score == "fisher":
            grads = self.squared_norms("grad").sum(0, keepdim=True)
            self.fisher.lerp_(grads.nan_to_num(posinf=0.0), 0.1 * self.ok.double())

    @torch.no_grad()
    def after_step(self, step):
        s, L, r = self.settings, *self.mask.shape
        norms = self.squared_norms("data").cumsum(2).sqrt()
        new, old, initial = self.at_ranks(norms, self.norms, self.initial)
        if s.lalora_budget == "grow":
            s_new, s_old = self.member @ new.sum(0), self.member @ old.sum(0)  # Eq. 7; both at r_i: 1 / r_i cancels
            growth = ((s_new - s_old) / s_old).mean()  # Eq. 6
            self.budget_rank.mul_(1 + s.lalora_gamma * growth).clamp_(L, r * L)  # Eq. 5
        c = self.contribution(new, old, initial, norms[:, :, -1])
        if s.lalora_softmax == "relative" or s.lalora_score == "fisher":  # which has no natural scale
            c = c / c.mean().clamp_min(1e-300)
        ranks = whole_ranks(c.softmax(0) * self.budget_rank, self.budget_rank, r)  # Eq. 8
        self.block_ranks.copy_(torch.where(self.ok, ranks, self.block_ranks))
        self.norms.copy_(norms)
        self.truncate()
        self.allocations += 1
        return False

    def at_ranks(self, *sums):
        """Each of `sums` (m, n, r), over the first 1..r components, at the ranks in use: (m, n)."""
        last = self.block_ranks[self.block][:, None] - 1  # (n, 1)
        return [every.gather(2, last.expand(len(every), -1, 1)).squeeze(2) for every in sums]

    def contribution(self, new, old, initial, full):
        """c of every block, (L,), from norms (2, n) of A and B: at r_i now, before the step, at the start, and full."""
        if self.settings.lalora_score == "fisher":
            (fisher,) = self.at_ranks(self.fisher.cumsum(2))
            return self.member @ fisher[0]
        above, below = {"step": (old, new), "truncation": (new, full), "initial": (initial, new),
                        "off": (new, new)}[self.settings.lalora_fidelity]
        f = torch.where(below > 0, above / below, 1)  # Eq. 10; 0 / 0 counts as 1
        return self.member @ (f[0] * new[1] + f[1] * new[0])  # Eq. 9: A is W_dw, B is W_up

    def log(self):
        return {"lalora_budget": self.budget_rank}

    def warning(self):
        share = float(self.budget_rank) / self.mask.numel()
        if share < 0.3:
            return f"La-LoRA's budget ended at {share:.0%} of r L: raise --lalora-gamma, {self.settings.lalora_gamma:g}"


def whole_ranks(shares, total, r):
    """Integers in [1, r] that sum to round(total): after 1 for all, unit k of block i has priority share_i - k + 1."""
    unmet = shares[:, None] - torch.arange(1, r, device=shares.device)  # (L, r - 1): units 2 to r
    order = unmet.flatten().argsort(descending=True, stable=True)
    given = torch.arange(len(order), device=shares.device) < total.round() - len(shares)
    return 1 + torch.zeros_like(order).scatter_(0, order, given.long()).view_as(unmet).sum(1)


class WeightLora(Allocator):
    """WeightLoRA and WeightLoRA+: W + omega_i s B A; a short warm-up finds the K matrices worth adapting (Eqs. 1-2).

    For T steps omega, one number per matrix, follows StoIHT (Appendix B): a plain gradient step, scaled by the learning
    rate's schedule (unclipped; theirs clips it); then only the K largest stay, those tied with the K-th included; with
    `weightlora_threshold` "end" only after step T. What is not the largest by "moved", |omega - 1|, goes back to 1.
    Then the K survivors start afresh as standard LoRA of rank r, or 2r with `weightlora+` (section 2.2), and all others
    are plain frozen layers again. Ties that step T leaves go to the matrix that comes first in the model.
    """

    dynamic = True
    saved = ("omega",)
    group = "weightlora"  # of flags: --weightlora-steps, --weightlora-examples
    own = property(lambda self: [] if self.allocations else [self.gates])  # until the warm-up is over

    def setup(self):
        s = self.settings
        self.keep = matrices_to_keep(s, len(self.names))
        self.final_rank = 2 * s.rank if s.method == "weightlora+" else s.rank
        most = min(min(size) for size in self.sizes)
        if self.final_rank > most:
            raise UserError(f"--rank {s.rank}: {s.method} may give a matrix of rank {most} rank {self.final_rank}: "
                            "choose a lower one")
        self.start(s.weightlora_steps or min(max(5, round(0.005 * self.steps)), self.steps - 1))

    def start(self, warmup):
        """Begin a warm-up of so many steps, with a gate omega on every matrix's adapter."""
        least = 2 + bool(self.settings.warmup)  # while B = 0 every gradient of omega is 0; step 1 may have rate 0
        if not least <= warmup < self.steps:
            raise UserError(f"--{self.group}-steps {warmup}: the warm-up takes at least {least} steps and has to end "
                            f"before the run does, which has {self.steps}")
        self.warmup = warmup
        self.add(dict.fromkeys(self.names, self.settings.rank), init="lora")  # omega must not scale components of W
        self.omega = torch.ones(len(self.names), dtype=torch.float64, device=self.device)  # early steps are tiny
        for layer in self.layers.values():
            layer.g = nn.Parameter(torch.ones(1, device=self.device))
        self.gates = lora.stacked([layer.g for layer in self.layers.values()])  # omega as the layers see it, (n, 1)

    def examples(self, step):
        """Enough rows in the warm-up: in small batches' noise the choice is a lottery."""
        return getattr(self.settings, f"{self.group}_examples") if step <= self.warmup else 0

    @torch.no_grad()
    def after_step(self, step):
        if self.allocations:
            return False
        self.learn(self.gates.grad[:, 0].double(), last=step >= self.warmup)
        if step < self.warmup:
            return False
        ranks = self.final_ranks()
        self.drop(self.names)
        self.add(ranks)
        self.allocations = 1
        return True

    def learn(self, gradient, last):
        """Take a step of the warm-up by the gradients of the gates, (n,) float64."""
        s = self.settings
        self.omega -= s.weightlora_lr * self.rate * gradient
        score = self.score()
        self.best = score.argsort(descending=True, stable=True)[:self.keep]  # now: what becomes 0 may pass a negative
        if last or s.weightlora_threshold == "every":
            self.omega.masked_fill_(score < score[self.best].min(), float(s.weightlora_rank_by == "moved"))
        self.gates.data.copy_(self.omega[:, None])

    def score(self):
        """What the matrices are ranked by, (n,)."""
        return {"value": self.omega, "magnitude": self.omega.abs(),
                "moved": (self.omega - 1).abs()}[self.settings.weightlora_rank_by]

    def final_ranks(self):
        """{name: rank} after the warm-up; a matrix of rank 0 gets its plain layer back."""
        return dict.fromkeys(self.names, 0) | {self.names[i]: self.final_rank for i in self.best.tolist()}

    def log(self):
        selected = {} if self.own else {"selected": {name: int(name in self.layers) for name in self.names}}
        return {"omega": dict(zip(self.names, self.omega.tolist()))} | selected


class RandomLora(Allocator):
    """Uniform LoRA on K matrices drawn at random from the seed: WeightLoRA's control (RLoRA, Appendix D)."""

    unread = tuple(f"weightlora_{name}" for name in ("steps", "examples", "lr", "threshold", "rank_by"))

    def setup(self):  # no warm-up: adapters that are thrown away cannot change the draw
        s, n = self.settings, len(self.names)
        drawn = shuffled(n, s.seed)[:matrices_to_keep(s, n)]
        self.add({name: s.rank for i, name in enumerate(self.names) if i in drawn})


def matrices_to_keep(settings, n):
    """WeightLoRA's K, by default half of the n matrices (section 2); raises UserError if there are not so many."""
    keep = settings.weightlora_keep or max(1, n // 2)
    if not 1 <= keep <= n:
        raise UserError(f"--weightlora-keep {keep}: there are {n} target matrices; choose 1 to {n} (0 = half)")
    return keep


class Credit(WeightLora):
    """Rank in proportion to what it earns: ours, on WeightLoRA's gate; GoRA (He et al. 2025) goes by |W dL/dW|.

    For T steps every matrix has an adapter of rank r with a gate g_i that itself stays 1. To first order -dL/dg_i is
    what the loss gains from the adapter (WeightLoRA's Eq. 4), and every backward pass gives it for nothing:

        credit_i = - sum over the T steps of dL/dg_i
        share_i = max(credit_i, 0)^power / cost_i

    cost_i is what a unit of rank costs: in_i + out_i parameters, or 1 where `credit_budget` counts "ranks". What
    uniform LoRA of rank r' = `credit_share` r costs is dealt out: `credit_floor` r' units to each, then one by one to
    the largest share_i / (units_i + 1), at most `credit_cap` r (or its own) each. Then plain LoRA starts at one scale,
    or each matrix's own (`scaling`): stuck less often on text, on the ViT not told apart (RESULTS.md).
    """

    saved, group = ("credit",), "credit"

    def setup(self):
        self.start(self.settings.credit_steps or min(10, self.steps - 1))
        self.credit = torch.zeros_like(self.omega)

    def learn(self, gradient, last):
        self.credit -= gradient

    def final_ranks(self):
        s = self.settings
        costs = self.cost.tolist() if s.credit_budget == "parameters" else [1.0] * len(self.names)
        shares = [max(credit, 0.0) ** s.credit_power / cost for credit, cost in zip(self.credit.tolist(), costs)]
        if max(shares) <= 0:
            note("credit: no matrix has gained in the warm-up, so all get the same rank: lower --lr or --credit-power")
        most = [min(*size, int(s.credit_cap * s.rank)) for size in self.sizes]
        rank = s.credit_share * s.rank
        return dict(zip(self.names, dealt_units(shares, costs, most, int(s.credit_floor * rank), rank * sum(costs))))

    def log(self):
        return {"credit": dict(zip(self.names, self.credit.tolist()))}


def dealt_units(shares, costs, most, least, budget):
    """Units of rank for each matrix: `least`, then to the largest share_i / (units_i + 1); ties to who has fewest."""
    units = [min(least, limit) for limit in most]
    budget = max(budget, min(costs)) - sum(n * cost for n, cost in zip(units, costs))  # one unit at least
    while able := [i for i, cost in enumerate(costs) if units[i] < most[i] and cost <= budget]:
        best = max(able, key=lambda i: (shares[i] / (units[i] + 1), -units[i]))
        units[best] += 1
        budget -= costs[best]
    return units


WINDOWS = ("first", "middle", "last")  # locations: the largest singular components, those from m/2 on, the smallest


class LeLora(Allocator):
    """LeLoRA (Zhou et al. 2026, section 3): a policy network samples which singular components of W each step trains.

    An adapter holds three windows of r_max components of W = U S V^T as A = sqrt(S) V^T and B = U sqrt(S), which leave
    the frozen weight; scale 1. An action is a dimension r and a location per matrix: r components of that window may
    move, all others stand still. `lelora_ablate` "rank" learns the dimension alone, in the first window; "location" the
    window alone, at r_max (section 4.2.4, Fig. 5a); "random" nothing, the control. The reward follows the falling loss
    more than the action: `lelora_baseline` "trend" takes the loss's change, standardised by its running moments.
    """

    refuses = ("init", "dora", "lora_plus_ratio", "freeze_a", "scaling")  # A and B are W's own components, scale 1
    unread = ("alpha", "dropout")
    dynamic, validation_rows = True, 32
    saved = ("choice", "features", "entropy", "lowest_entropy", "reward", "baseline", "variance", "loss_before",
             "policy", "optimizer", "generator")

    def setup(self):
        s, n, ranks = self.settings, len(self.names), [min(size) for size in self.sizes]
        m, widest = min(ranks), max(ranks)
        self.dims, self.locations = candidates(s)
        R = self.dims[-1]
        if m // 2 + R > m - R:
            raise UserError(f"--lelora-dims (or --rank) {R}: the three windows overlap where a matrix has {m} singular "
                            f"components; use at most {(m - m // 2) // 2}")
        self.add(dict.fromkeys(self.names, 3 * R))
        self.spectra = torch.zeros(n, widest, device=self.device)
        self.where = torch.zeros(n, 3 * R, dtype=torch.long, device=self.device)  # the windows' columns in `spectra`
        self.active = torch.zeros(n, 3 * R, device=self.device)
        for i, layer in enumerate(decomposing(self.layers.values())):
            S, A, B = singular.windows(layer.weight.data.to(self.device), R)  # W may wait on the CPU to be sharded
            layer.scale = 1.0
            layer.split_off(A, B)  # Eq. 1
            layer.mask_updates(self.active[i])
            self.spectra[i, :len(S)], self.where[i] = S, singular.window_indices(len(S), R)
        self.masks = torch.zeros(len(self.dims), len(self.locations), 3 * R, device=self.device)
        for i, r in enumerate(self.dims):
            for j, location in enumerate(self.locations):
                first = {"first": 0, "middle": R, "last": 3 * R - r}[location]
                self.masks[i, j, first:first + r] = 1
        self.place = torch.tensor([(i, lora.TARGETS.index(kind)) for _, i, kind in self.sites], device=self.device)
        start = "uniform" if s.lelora_ablate == "random" else s.lelora_start
        self.policy = Policy(self.blocks, 1 + widest, *self.masks.shape[:2], s.seed, start).to(self.device)
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[s.lelora_policy_optimizer]
        self.optimizer = optimizer(self.policy.parameters(), lr=s.lelora_policy_lr)
        self.generator = torch.Generator(self.device).manual_seed(s.seed)
        self.reward, self.baseline, self.variance, self.loss_before = torch.zeros(4, device=self.device)
        self.heads = [(i, head) for i, head in enumerate(("rank", "location")) if self.masks.shape[i] > 1]  # that learn
        self.lowest_entropy = torch.ones(2, device=self.device)  # of the heads; 1 is uniform
        self.act(0)

    def characteristics(self):
        """What the policy sees of each matrix, (n, 1 + widest m): Frobenius norm and singular values (section 3.2)."""
        strength = self.squared_norms("data").prod(0).sqrt()  # |A_k| |B_k|, of the windows: S_k at the start
        spectra = self.spectra.scatter(1, self.where, strength.float())
        numbers = torch.cat([spectra.square().sum(1, keepdim=True).sqrt(), spectra], 1)
        if self.settings.lelora_inputs == "standardised":
            numbers = (numbers - numbers.mean(0)) / (numbers.std(0, correction=0) + 1e-6)
        return numbers

    def act(self, step):
        """Sample every matrix's action from p(a | xi; Omega), for the steps after `step`."""
        self.features = self.characteristics()
        self.log_p = self.policy(self.place, self.features)  # kept with its graph for the reward
        heads = [log_p.detach().exp() for log_p in self.log_p]  # (n, dims), (n, locations)
        self.entropy = torch.stack([torch.special.entr(p).sum(1).mean() / math.log(max(2, p.shape[1])) for p in heads])
        if step <= self.steps / 10:
            self.lowest_entropy.clamp_max_(self.entropy)
        draws = [p / torch.empty_like(p).exponential_(generator=self.generator) for p in heads]
        self.choice = torch.stack([draw.argmax(1) for draw in draws], 1)  # torch.multinomial would synchronise
        self.active.copy_(self.masks[self.choice[:, 0], self.choice[:, 1]])
        self.current.copy_(self.active.sum(1))

    def after_step(self, step):
        if step % self.settings.lelora_every == 0:
            if self.settings.lelora_ablate != "random":
                self.learn(self.validation_loss().float())
            self.allocations += 1
            self.act(step)
        return False

    def learn(self, after):
        """Reinforce or weaken the last action by the validation loss `after` it, 0-d."""
        trend = self.settings.lelora_baseline == "trend"
        change = torch.where(self.loss_before == 0, 0, after - self.loss_before)  # 0: there is none before
        reward = change if trend else after + self.settings.lelora_reward_alpha * change  # Eqs. 2-4, to be minimised
        lesson = reward.isfinite() & self.ok
        self.reward.copy_(torch.where(lesson, reward, self.baseline))
        self.baseline.copy_(torch.where(self.baseline == 0, self.reward, self.baseline))  # the first reward or change
        advantage = self.reward - self.baseline
        if trend:
            self.variance.lerp_(advantage.square(), 0.1 * lesson)
            advantage = advantage / self.variance.sqrt().clamp_min(1e-12)
        log_p = sum(head.gather(1, choice[:, None]) for head, choice in zip(self.log_p, self.choice.T))  # (n, 1)
        (advantage * log_p.mean()).backward()  # Eq. 9
        self.optimizer.step()  # Eq. 10
        self.optimizer.zero_grad()
        self.loss_before.copy_(torch.where(after.isfinite(), after, self.loss_before))
        self.baseline.lerp_(self.reward, 0.1)  # running mean of some 10 rewards

    def log(self):
        windows = [WINDOWS.index(self.locations[i]) for i in self.choice[:, 1].tolist()]
        entropies = {f"entropy_{head}": self.entropy[i] for i, head in self.heads}
        return {"reward": self.reward, **entropies, "location": dict(zip(self.names, windows))}

    def warning(self):
        fallen = " and ".join(head for i, head in self.heads if self.lowest_entropy[i] < 0.01)
        if fallen:
            return (f"LeLoRA's policy collapsed: the entropy of {fallen} fell below 1 % of its maximum before a tenth "
                    "of training, so matrices stay as they happened to be; lower --lelora-policy-lr")

    def restored(self):
        self.log_p = self.policy(self.place, self.features)


class Policy(nn.Module):
    """LeLoRA's policy network: (block, kind) and numbers of n matrices -> log-probabilities of dimension and location.

    Two embeddings of 200, hidden layers of 1024, 256 and 64, all Kaiming-uniform from `seed` (Appendix B). The heads
    start at zero, with all actions equally likely, or with `start` "kaiming" at a lottery that plain steps keep.
    """

    def __init__(self, blocks, numbers, dims, locations, seed, start):
        super().__init__()
        self.block, self.kind = nn.Embedding(blocks, 200), nn.Embedding(len(lora.TARGETS), 200)
        self.hidden = nn.Sequential(nn.Linear(400 + numbers, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(),
                                    nn.Linear(256, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, dims), nn.Linear(64, locations)])
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2 or start == "uniform" and name.startswith("heads"):
                nn.init.zeros_(p)
            else:
                nn.init.kaiming_uniform_(p, nonlinearity="relu", generator=generator)

    def forward(self, place, numbers):  # (n, 2), (n, F) -> (n, dims), (n, locations)
        h = self.hidden(torch.cat([self.block(place[:, 0]), self.kind(place[:, 1]), numbers], 1))
        return [head(h).log_softmax(1) for head in self.heads]


def candidates(s):
    """Candidate dimensions, ascending, and locations (section 3.1); unset dimensions are 0, powers of 2 and `rank`."""
    dims = s.lelora_dims or [0, s.rank, *(2 ** k for k in range(1, s.rank.bit_length()))]
    if not all(str(r).isdecimal() for r in dims) or not any(int(r) for r in dims):
        raise UserError(f"--lelora-dims {s.lelora_dims}: expected numbers from 0 up, one above 0, such as 0,2,4,8")
    dims, named = sorted({int(r) for r in dims}), s.lelora_locations or WINDOWS
    if set(named) - set(WINDOWS):
        raise UserError(f"--lelora-locations {','.join(named)}: choose from {','.join(WINDOWS)}")
    dims = dims[-1:] if s.lelora_ablate == "location" else dims
    return dims, [w for w in WINDOWS if w in (["first"] if s.lelora_ablate == "rank" else named)]


METHODS = {"lora": Allocator, "linear-decay": Static, "attention-heavy": Static, "empirical": Static, "lalora": LaLora,
           "adalora": AdaLora, "weightlora": WeightLora, "weightlora+": WeightLora, "random": RandomLora,
           "credit": Credit, "lelora": LeLora, "full": Direct, "bitfit": Direct}


def policy(method):
    """The class of a method: a name in METHODS, or `file.py:Class` for one in a file of your own; raises UserError."""
    if method in METHODS:
        return METHODS[method]
    if ":" not in method:
        raise UserError(f"--method {method}: choose from {', '.join(METHODS)}, or name my_policy.py:MyPolicy")
    module, name = own_module("--method", method)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Allocator)):
        raise UserError(f"--method {method}: the file has no class {name} that is an allocators.Allocator")
    return found


def base_method(method):
    """The name in METHODS whose settings a method takes: itself, or the first of the class that it is derived from."""
    if method in METHODS:
        return method
    return next(name for cls in policy(method).__mro__ for name, known in METHODS.items() if known is cls)
