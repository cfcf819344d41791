"""A tiny stand-in for a model, settings and the training loop, so that tests of the policies take no time."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train as program


class Block(nn.Module):
    """One block with the canonical projections; every one of them matters for the output."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):  # (B, D) -> (B, D)
        x = x + self.out(torch.tanh(self.query(x)) * torch.sigmoid(self.key(x)) + self.value(x))
        return x + self.down(F.gelu(self.up(x)))


class Tiny(nn.Module):
    """A frozen network with the attributes that lora.py and allocators.py read: blocks, head, family, hf_name."""

    family, fresh, head_kind = "tiny", (), "classify"

    def __init__(self, blocks=3, dim=12, hidden=20, labels=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(blocks))
            self.head = nn.Linear(dim, labels)
        self.requires_grad_(False)

    def hf_name(self, name, module=False):
        return name

    def forward(self, x):  # (B, D) -> (B, labels)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def settings(**changes):
    """The run's settings that every policy reads; a test adds its policy's flags."""
    common = dict(method="lora", targets=["query", "value"], rank=4, alpha=8.0, dropout=0.0, scaling="nominal", adapter=None,
                  r_min=1, r_max=32, seed=0, lr=1e-2, weight_decay=0.0, init="lora", dora=False, freeze_a=False,
                  lora_plus_ratio=1.0, device="cpu")
    return SimpleNamespace(**{**common, **changes})


def batches(steps, size=16, dim=12, labels=3, seed=0, dtype=torch.float32):
    """`steps` random batches (x, labels) of a task that can be learned: the labels are a linear map of x."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(dim, labels, generator=generator, dtype=dtype)
    for _ in range(steps):
        x = torch.randn(size, dim, generator=generator, dtype=dtype)
        yield x, (x @ teacher).argmax(1)


def optimizer_for(allocator, s):
    """The optimizer that train.py uses for these adapters."""
    return program.optimizer_for(s, allocator.parameters())


def train(model, allocator, s, data, first=1, optimizer=None, watch=None, clip=None):
    """train.py's loop without its trimmings, from step `first`; `watch(step, loss)` runs after every step.

    Returns the optimizer. As in train.py, a rebuild drops vanished parameters with their state and adds the new ones.
    """
    optimizer = optimizer or optimizer_for(allocator, s)
    for step, (x, labels) in enumerate(data, start=first):
        loss = F.cross_entropy(model(x), labels)
        (loss + allocator.penalty()).backward()
        allocator.after_backward(step)
        if clip:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        if allocator.after_step(step):
            program.follow(optimizer, allocator.parameters())
        optimizer.zero_grad(set_to_none=True)
        if watch:
            watch(step, loss.detach())
    return optimizer


@contextlib.contextmanager
def interrupted_after(step):
    """A place for a run that Ctrl-C stops at once in its optimizer step `step`; fails if it gets by."""
    add = program.Budget.add

    def interrupted(budget):
        add(budget)
        if budget.steps == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program.Budget, "add", interrupted)
        yield
