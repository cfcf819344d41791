"""The variable-rank LoRA layer: attaching it to a model, stacks, optimizer, state.

A rank that changes during training is a vector g that changes *in place*: shapes, graph and optimizer state stay as
they are, so nothing is recompiled or copied and the device is never waited for.
"""

import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UserError, dropout

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")  # canonical names, the same in every model family
INITS = ("lora", "pissa", "milora")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a low-rank update of variable rank: y = x W^T + b + s ((drop(x) A^T) * g) B^T.

    W (out, in) and b (out) are those of `linear`, the frozen layer, left where FSDP looks for them. A (R, in) and
    B (out, R), trainable, are float32 on `device` (default: W's) and computed in x's dtype. g, (R,) or (1,), is what
    policies change: it scales or switches off components; None is all ones. `start` holds the (A, B) that were split
    off W, for methods that train W's own components, else None.
    """

    weight, bias = property(lambda self: self.linear.weight), property(lambda self: self.linear.bias)

    def __init__(self, linear, rank, scale, dropout=0.0, device=None):
        super().__init__()
        self.linear = linear
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.rank, self.scale, self.dropout = rank, scale, dropout
        options = dict(dtype=torch.float32, device=device or linear.weight.device)
        self.A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.B = nn.Parameter(torch.empty(self.out_features, rank, **options))
        self.g = self.magnitude = self.start = None
        self.merged, self.enabled = False, True
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as in nn.Linear; B zero (Hu et al. 2021, section 4.1)
        nn.init.zeros_(self.B)

    @torch.no_grad()
    def split_off(self, A, B):
        """Make the part B A of W the adapter, B (out, R) and A (R, in), both over sqrt(s): it leaves the frozen weight.

        A and s B are rounded to W's dtype, in which they are computed: the layer adds what left W, without dropout.
        """
        if hasattr(self.linear, "dequantised"):
            raise UserError("--weights int8: LeLoRA, PiSSA and MiLoRA take components off W itself; leave it out")
        W = self.weight.to(A.device)  # it may wait on the CPU to be sharded
        A, B = ((t * c).to(W.dtype).float() for t, c in ((A, self.scale ** -0.5), (B, self.scale ** 0.5)))
        self.weight.data.copy_(W.float() - B @ A)
        B /= self.scale
        self.A.copy_(A)
        self.B.copy_(B)
        self.start, self.dropout = (A.cpu(), B.cpu()), 0.0
        self.A.decays = self.B.decays = False  # weight decay would pull W's own components to zero

    def scaled_B(self):
        """s B diag(g), (out, R) float32."""
        if self.g is None:
            return self.B if self.scale == 1 else self.B * self.scale
        return self.B * (self.scale * self.g)

    def forward(self, x):  # (..., in) -> (..., out)
        flat = x.flatten(0, -2)  # (N, in)
        y = self.linear.forward(flat)
        if self.enabled and not self.merged:
            h = F.linear(dropout(flat, self.dropout * self.training), self.A.to(x.dtype))  # (N, R)
            y.addmm_(h, transposed(self.scaled_B(), x.dtype))  # in place: y is read once
        elif self.start is not None and not self.merged:  # switched off: give W back what was split off it
            A, B = (t.to(x.device, x.dtype) for t in self.start)
            y = y + self.scale * (flat @ A.T @ B.T)
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def delta(self):
        """The update s B diag(g) A that the layer adds to W, (out, in) float32."""
        return self.scaled_B() @ self.A

    def let_through(self):
        """Which components g lets through, (R,) bool."""
        g = torch.ones(1, device=self.A.device) if self.g is None else self.g
        return (g != 0).expand(self.rank)

    @torch.no_grad()
    def factors(self):
        """The difference to the original W as (A (r, in), B (out, r)) float32 with `scale` B A = difference.

        Components that g switches off are left out. Where W's own components are trained (`start` is set) it is
        B A - B0 A0 over those that have moved: twice as many factors, at most the matrix's own rank.
        """
        A, B = self.A.detach(), self.B.detach() * (1 if self.g is None else self.g)
        if self.start is None:
            kept = self.let_through()
            return A[kept], B[:, kept]
        A0, B0 = (t.to(A.device) for t in self.start)
        moved = (A != A0).any(1) | (B != B0).any(0)
        A, B = torch.cat([A[moved], A0[moved]]), torch.cat([B[:, moved], -B0[:, moved]], 1)
        full = min(self.out_features, self.in_features)
        if len(A) <= full:
            return A, B
        identity = torch.eye(full, device=A.device)  # the difference itself is smaller
        return (B @ A, identity) if self.out_features < self.in_features else (identity, B @ A)

    def mask_updates(self, active):
        """Let the optimizer move only the components where `active` (R,) is 1; it is read anew at every step."""
        self.A.active, self.B.active = active[:, None], active[None]

    def merge(self):
        """Add the update into W, so that the layer costs what the plain one does; errors are one rounding of W."""
        if not self.merged:
            delta = self.delta()
            if hasattr(self.linear, "dequantised"):
                self.linear = self.linear.dequantised()
            self.weight.data.copy_(self.weight.float() + delta)
            self.merged = True


def transposed(B, dtype):
    """B^T in `dtype`; on a CPU contiguous, as the backward pass's products are 3 times as fast with it there."""
    B = B.T.to(dtype)
    return B.contiguous() if B.device.type == "cpu" else B


class DoraLinear(LoraLinear):
    """DoRA (Liu et al. 2024, Eq. 5): the rows of W + s B diag(g) A, scaled to trainable lengths `magnitude` (out,).

    The lengths that are divided by are constants for the gradient (section 4.3). Dropout is PEFT's: with z = drop(x)
    and c = magnitude / length, (c - 1) W z + c s B diag(g) A z comes on top of W x + b.
    """

    def __init__(self, linear, rank, scale, dropout=0.0, device=None):
        super().__init__(linear, rank, scale, dropout, device)
        self.square = self.row_squares()
        self.magnitude = nn.Parameter(self.lengths(self.A, self.B))

    def split_off(self, A, B):
        super().split_off(A, B)
        self.square = self.row_squares()

    def forward(self, x):  # (..., in) -> (..., out)
        if self.merged or not self.enabled:
            return super().forward(x)
        flat = x.flatten(0, -2)
        kept = dropout(flat, self.dropout * self.training)
        A, B = self.A.to(x.dtype), self.scaled_B()
        y = self.linear.forward(kept)  # (N, out)
        y.addmm_(F.linear(kept, A), transposed(B, x.dtype))
        factor = self.magnitude / self.lengths(A, B)  # c, float32: near 1, where bfloat16 would round training away
        y = y * factor  # c (W z + b + s B A z); missing: W (x - z) + b - c b, and without dropout z = x
        if self.training and self.dropout:
            y = y + self.linear.forward(flat - kept)
        elif self.bias is not None:
            y = y + self.bias
        if self.bias is not None:
            y = y - factor * self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def row_squares(self):
        """Squared length of every row of W, (out,) float32: constant while W is."""
        W = self.weight.to(self.A.device)  # it may wait on the CPU to be sharded
        return torch.linalg.vector_norm(W, dim=1, dtype=torch.float32) ** 2

    @torch.no_grad()
    def lengths(self, A, scaled_B):
        """Length of every row of W + s B diag(g) A, (out,) float32, without building that matrix."""
        W, wide = self.weight.to(A.device), A.float()
        mixed = torch.addmm(F.linear(W, A.to(W.dtype)).float(), scaled_B, wide @ wide.T, beta=2)  # (out, R)
        square = self.square + (scaled_B * mixed).sum(1)
        return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros stays one

    @torch.no_grad()
    def delta(self):
        """The difference between the layer's matrix and W, (out, in) float32."""
        factor = (self.magnitude / self.lengths(self.A.to(self.weight.dtype), self.scaled_B()))[:, None]
        return factor * (self.weight.float() + super().delta()) - self.weight.float()

    def factors(self):
        """As LoraLinear's, before rows are scaled; never empty, since the lengths are trained in any case."""
        A, B = super().factors()
        return (A, B) if len(A) else (torch.zeros_like(self.A[:1]), torch.zeros_like(self.B[:, :1]))


# ---------------------------------------------------------------------------------------------- attaching


def sites(model, targets):
    """[(name, block index, kind)] of the projections of these kinds (TARGETS), in model order; UserError if missing."""
    there = [kind for kind in TARGETS if hasattr(model.blocks[0], kind)]
    missing = [kind for kind in targets if kind not in there]
    if missing or not targets:
        raise UserError(f"--targets {','.join(missing)}: a {model.family} model has {','.join(there)}")
    return [(f"blocks.{i}.{kind}", i, kind) for i in range(len(model.blocks)) for kind in there if kind in targets]


def attach(model, ranks, alpha, dropout=0.0, nominal=None, scaling="nominal", device=None, dora=False):
    """Put a LoraLinear (with `dora` a DoraLinear) in place of each projection in `ranks`; returns {name: layer}.

    `ranks` is name -> capacity; a projection of rank 0 stays plain. The scale s is alpha / nominal (La-LoRA Eq. 4), or
    with scaling="own" alpha / r_i, or with "rslora" alpha / sqrt(nominal). Raises UserError for an impossible rank.
    """
    layers = {}
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        if isinstance(linear, LoraLinear):
            raise UserError(f"{name} has an adapter already: drop it, or lora.detach it, first")
        most = min(linear.out_features, linear.in_features)
        if not 0 <= rank <= most:
            raise UserError(f"--rank: {rank} components for {name}, which has {most}; lower the rank")
        if rank == 0:
            continue
        scale = {"nominal": alpha / (nominal or rank), "own": alpha / rank,
                 "rslora": alpha / math.sqrt(nominal or rank)}[scaling]
        layers[name] = (DoraLinear if dora else LoraLinear)(linear, rank, scale, dropout, device)
        model.set_submodule(name, layers[name].train(model.training))
    return layers


def detach(model, name):
    """Give the projection `name` its plain frozen layer back; the adapter on it is gone."""
    layer = model.get_submodule(name)
    if layer.start is not None and not layer.merged:  # what was split off W goes back, up to rounding
        A, B = (t.to(layer.weight.device) for t in layer.start)
        layer.weight.data.copy_(layer.weight.float() + layer.scale * B @ A)
    model.set_submodule(name, layer.linear)


def adapters(model):
    """All LoraLinear layers of `model` as {name: layer}, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merge_adapters(model):
    """Add all adapters of `model` into its weights, in place and one matrix at a time."""
    for layer in adapters(model).values():
        layer.merge()


@contextlib.contextmanager
def disabled(model):
    """Inside this context the model computes what its base model does, without adapters (but for merged ones)."""
    before = {layer: layer.enabled for layer in adapters(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


# ---------------------------------------------------------------------------------------------- stacks
#
# With hundreds of matrices, an optimizer or a policy that goes through them one by one spends its time starting
# kernels. So the adapters of one shape are one parameter, (n, R, in) and (n, out, R), of which the layers hold views:
# forward and backward passes know nothing of it, all that follows is a few operations on the stacks. Parameters carry
# what it needs: a stack `parts`, a part `place` (its stack, index), `active` (mask_updates), `lr_ratio` and `decays`.


def stacked(parameters):
    """One parameter (n, ...) that holds the n given ones of one shape, from now on views of it: its `parts`."""
    whole = nn.Parameter(torch.stack([p.data for p in parameters]), requires_grad=parameters[0].requires_grad)
    whole.parts = parameters
    for i, (p, view) in enumerate(zip(parameters, whole.data)):
        p.data, p.place = view, (whole, i)
    return whole


class Stack:
    """Adapters of one shape, {name: layer}; its parameters: A (n, R, in), B (n, out, R) and DoRA's lengths (n, out)."""

    def __init__(self, layers):
        self.layers = layers
        parts = [[getattr(layer, key) for layer in layers.values()] for key in ("A", "B", "magnitude")]
        self.parameters = [stacked(alike) for alike in parts if alike[0] is not None]
        self.A, self.B = self.parameters[:2]


@torch.no_grad()
def gather_gradients(params):
    """Collect the gradients that a backward pass left at the parts of stacks; what may not move gets none."""
    for p in params:
        parts = getattr(p, "parts", ())
        if parts:
            grads = torch.stack([torch.zeros_like(q) if q.grad is None else q.grad for q in parts])
            p.grad = grads if p.grad is None else p.grad + grads  # a penalty may use the stack itself
            for q in parts:
                q.grad = None
        mask = may_move(p)
        if p.grad is not None and mask is not None:
            p.grad.mul_(mask)


def may_move(p):
    """The tensor of 0 and 1, broadcastable to the parameter, that says which of its components may move; None: all."""
    if not hasattr(p, "parts"):
        return getattr(p, "active", None)
    masks = [getattr(part, "active", None) for part in p.parts]
    some = next((mask for mask in masks if mask is not None), None)
    return None if some is None else torch.stack([torch.ones_like(some) if mask is None else mask for mask in masks])


# ---------------------------------------------------------------------------------------------- optimizer


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, Alg. 2) whose masked components do not move by one bit (La-LoRA, LeLoRA).

    Where `may_move` is 0, its value and moments stand still, and its own step count, so that the bias correction is
    right when it comes back. Without masks the steps are torch.optim.AdamW's.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            masks = [may_move(p) for p in params]
            active = [torch.ones((), device=p.device) if mask is None else mask for p, mask in zip(params, masks)]
            if hasattr(self, "found_inf"):  # as torch's fused AdamW: 1 = this step's gradients are bad, nothing moves
                active = torch._foreach_mul(active, 1 - self.found_inf)
            for p, a in zip(params, active):
                if not self.state[p]:
                    moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"steps": torch.zeros_like(a)} | moments
            beta1, beta2 = group["betas"]
            grads = [p.grad for p in params]
            counts, m, v = ([self.state[p][k] for p in params] for k in ("steps", "exp_avg", "exp_avg_sq"))
            steps = torch._foreach_add(counts, active)  # a = 0 leaves steps, m, v and p as they are
            for p, count in zip(params, steps):
                self.state[p]["steps"] = count  # one number, until the parameter has a mask
            torch._foreach_lerp_(m, grads, torch._foreach_mul(active, 1 - beta1))
            torch._foreach_lerp_(v, torch._foreach_mul(grads, grads), torch._foreach_mul(active, 1 - beta2))
            clock = torch._foreach_clamp_min(steps, 1)  # a component that never moved: 0 / 0 otherwise
            correct1, correct2 = ([1 - c for c in torch._foreach_pow(beta, clock)] for beta in (beta1, beta2))
            size = torch._foreach_sqrt(v)
            torch._foreach_div_(size, torch._foreach_sqrt(correct2))
            torch._foreach_add_(size, group["eps"])
            update, rate = torch._foreach_div(m, size), torch._foreach_mul(active, group["lr"])
            torch._foreach_mul_(update, torch._foreach_div(rate, correct1))
            torch._foreach_mul_(params, [1 - r for r in torch._foreach_mul(rate, group["weight_decay"])])
            torch._foreach_sub_(params, update)


def hold_still(optimizer):
    """Make any torch optimizer leave alone what may not move (`may_move`), and everything in a bad step (`found_inf`).

    State of another shape than the parameter's is one for all components. Muon mixes in those that stand still.
    """
    before, bad = {}, torch.zeros(())

    def tensors(p):
        return {"value": p.detach()} | {key: t for key, t in optimizer.state[p].items() if torch.is_tensor(t)}

    def remember(optimizer, *_):
        nonlocal bad
        bad = vars(optimizer).pop("found_inf", bad)  # some optimizers refuse to see it
        before.clear()
        for p in held(optimizer):
            if p.grad is not None:
                before[p] = {key: t.clone() for key, t in tensors(p).items()}

    @torch.no_grad()
    def restore(optimizer, *_):
        fine = 1 - bad
        for p, old in before.items():
            mask = may_move(p)
            moves = (fine.to(p.device) * (1 if mask is None else mask)).bool()
            for key, now in tensors(p).items():
                where = moves if now.shape == p.shape else fine.to(now.device).bool()
                now.copy_(torch.where(where, now, old[key] if key in old else 0))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)
    return optimizer


def follow(optimizer, groups):
    """Make the optimizer hold `groups`: what was there keeps its state, also in another stack; what is new has none."""
    kept = dict(optimizer.state)
    for p, state in optimizer.state.items():
        for i, part in enumerate(getattr(p, "parts", ())):
            kept[part] = {key: value[i] if value.dim() else value for key, value in state.items()}
    optimizer.state.clear()
    optimizer.param_groups[:] = [optimizer.defaults | group for group in groups]
    for p in held(optimizer):
        states = [kept.get(part) for part in getattr(p, "parts", ())]
        if p in kept:
            optimizer.state[p] = kept[p]
        elif states and None not in states:
            optimizer.state[p] = {key: torch.stack([state[key] for state in states]) if value.dim() else value
                                  for key, value in states[0].items()}


def held(optimizer):
    """The parameters of all of an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizers_for(s, params):
    """The optimizers of `--optimizer`; masked components (`may_move`) and everything in a bad step stay as they are."""
    groups, masked = groups_for(s, params), any(may_move(p) is not None for p in params)
    adamw = AdamW if masked else functools.partial(torch.optim.AdamW, fused=True)
    if s.optimizer == "sgd":
        return [hold_still(torch.optim.SGD(groups[0], momentum=0.9))]
    if s.optimizer == "muon":
        muon = torch.optim.Muon(groups[0], adjust_lr_fn="match_rms_adamw")  # learning rates as AdamW's
        return [hold_still(on_parts(muon)), *(adamw(some) for some in groups[1:] if some)]
    optimizer = adamw(groups[0])
    if not masked:
        optimizer.register_step_pre_hook(refuse_masks)
    return [optimizer]


def groups_for(s, params):
    """For each optimizer its parameter groups, by learning rate (LoRA+) and weight decay."""
    sets = [params]
    if s.optimizer == "muon":  # which takes matrices: the stacks' parts
        sets = [[part for p in params if p.dim() == 3 for part in p.parts], [p for p in params if p.dim() != 3]]
    result = []
    for some in sets:
        groups = {}
        for p in some:
            first = getattr(p, "parts", [p])[0]  # the others are like it
            groups.setdefault((getattr(first, "lr_ratio", 1), getattr(first, "decays", True)), []).append(p)
        result.append([{"params": group, "lr": s.lr, "lr_ratio": ratio, "weight_decay": s.weight_decay * decays}
                       for (ratio, decays), group in groups.items()])
    return result


def refuse_masks(optimizer, *_):
    """A hook for torch's AdamW, which does not know the masks that came after it was chosen."""
    if any(may_move(p) is not None for p in held(optimizer)):
        raise UserError("mask_updates: AdamW was chosen when there were no masks: call it in setup, too")


def on_parts(optimizer):
    """Let an optimizer that holds the parts of stacks, since it takes matrices, see their gradients in its steps."""
    def scatter(optimizer, *_):
        for part in held(optimizer):
            whole, i = part.place
            part.grad = None if whole.grad is None else whole.grad[i]

    optimizer.register_step_pre_hook(scatter)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    return optimizer


# ---------------------------------------------------------------------------------------------- state
#
# What a run must save is named where it is made, in `saved`, which `state_of` and `restore` read through `children`.


def children(thing, name):
    """{name: part} of what has state: entries of dicts and lists, tensors of modules and optimizers, else `saved`."""
    if isinstance(thing, dict):
        return thing
    if isinstance(thing, list):
        return dict(enumerate(thing))
    if isinstance(thing, nn.Module):
        return thing.state_dict()
    if isinstance(thing, torch.optim.Optimizer):
        state = thing.state_dict()
        numbers = [{key: n for key, n in group.items() if type(n) in (int, float)} for group in state["param_groups"]]
        return state["state"] | {f"group{i}": group for i, group in enumerate(numbers)}
    names = [child for part in reversed(type(thing).__mro__) for child in vars(part).get("saved", ())]
    if not names:
        raise TypeError(f"{name}: a {type(thing).__name__} cannot be kept over a restart")
    return {child: getattr(thing, child) for child in dict.fromkeys(names)}


def state_of(thing, name="run"):
    """Everything that `thing` must keep over a restart as {dotted name: tensor}: tensors are the live ones."""
    if isinstance(thing, torch.Tensor):
        return {name: thing.detach()}
    if isinstance(thing, torch.Generator):
        return {name: thing.get_state()}
    if isinstance(thing, (bool, int, float)):
        return {name: torch.tensor(thing, dtype=torch.float64)}
    if thing is None:
        return {}
    return {key: value for child, part in children(thing, name).items()
            for key, value in state_of(part, f"{name}.{child}").items()}


def number_like(old, value):
    """The number in the type of `old` if that can hold it: what began as 0 may have become 0.5."""
    return type(old)(value) if math.isfinite(value) and type(old)(value) == value else value


def restore(thing, state, name="run"):
    """Put back what `state_of` gave, in place: whoever holds a view of a tensor goes on seeing it."""
    if isinstance(thing, torch.Tensor):
        if state[name].is_floating_point() > thing.is_floating_point():
            raise TypeError(f"{name}: was saved with fractions, but begins as a tensor of whole numbers")
        thing.detach().copy_(state[name])
    elif isinstance(thing, torch.Generator):
        thing.set_state(state[name].cpu())
    elif isinstance(thing, torch.optim.Optimizer):
        entries, groups = {}, thing.state_dict()["param_groups"]  # keys: {name}.3.exp_avg, {name}.group0.lr
        for key, value in state.items():
            if key.startswith(f"{name}."):
                i, entry = key[len(name) + 1:].split(".")
                if i.startswith("group"):
                    group = groups[int(i[5:])]
                    group[entry] = number_like(group[entry], value.item())
                else:
                    entries.setdefault(int(i), {})[entry] = value
        thing.load_state_dict({"state": entries, "param_groups": groups})
    else:
        parts = children(thing, name)
        for child, part in parts.items():
            at = f"{name}.{child}"
            if isinstance(part, (bool, int, float)):
                put = thing.__setitem__ if isinstance(thing, (dict, list)) else functools.partial(setattr, thing)
                put(child, number_like(part, state[at].item()))
            elif part is not None:
                restore(part, state, at)
            elif any(key == at or key.startswith(f"{at}.") for key in state):
                raise TypeError(f"{at}: was saved, but is None before the restart's first step: make it in setup")
        known = tuple(f"{name}.{child}." for child in parts)
        late = [key for key in state if key.startswith(f"{name}.") and not f"{key}.".startswith(known)]
        if late:
            raise TypeError(f"{late[0]}: was saved, but is not there before the restart's first step: make it in setup")
