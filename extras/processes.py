"""Several processes, started by torchrun, that compute the same run.

Every process computes the same step on its share of each batch: gradients are added up before policies see them, so
all hold the same adapters and policy state, and decide alike. Process 0 alone prints and writes.
"""

import contextlib
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from lora import adapters
from model import UserError


def process_and_count():
    """This process's number and how many there are: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes():
    """Join the processes that torchrun started, if any, of which 0 alone is heard."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))  # the others wait while 0 evaluates
    nowhere = open(os.devnull, "w") if dist.get_rank() else None
    with contextlib.redirect_stdout(nowhere or sys.stdout), contextlib.redirect_stderr(nowhere or sys.stderr):
        yield
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


def largest(tensor):
    """A tensor, replaced by the largest of the processes' values; on the CPU no device is waited for."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def start_alike(s, step, tensors):
    """Give all processes the parameters of process 0, which draws as if it were alone; dropout differs."""
    process, count = process_and_count()
    for p in tensors if count > 1 else ():
        dist.broadcast(p, 0)
    if process:
        torch.manual_seed(int(np.random.SeedSequence((s.seed, step, process)).generate_state(1)[0]))


def compare(step, training):
    """Raise UserError unless all processes hold the same parameters, vectors and policy state, by their sums."""
    if process_and_count()[1] == 1:
        return
    state = {name: t for name, t in training.state().items() if not name.endswith("generator")}
    sums = torch.stack([t.sum(dtype=torch.float64).nan_to_num(nan=1e300).to(training.device) for t in state.values()])
    extremes = largest(torch.stack([sums, -sums]))  # the largest, and minus the smallest
    different = [name for name, most, least in zip(state, *extremes.tolist()) if most != -least]
    if different:
        raise UserError(f"step {step}: the processes no longer hold the same {different[0]}: start again")


def shard(model, device):
    """Spread the frozen weights over the processes (FSDP2), block by block; what is trained stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, not above: a second that other runs need not wait for
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    whole = {p for layer in adapters(model).values() for p in layer.parameters(recurse=False)}
    whole |= set(model.head.parameters()) if model.head_kind != "lm" else set()
    for p in whole:
        p.data = p.data.to(device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
