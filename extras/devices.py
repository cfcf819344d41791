"""Devices: which there is, its name, the memory that was used, and how much of a batch fits it."""

import contextlib
import itertools
import math
import os
import platform
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from extras.processes import largest, process_and_count
from model import UserError, note, without_graphs

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def environments(jobs):
    """The environment of each of `jobs` processes: they share out the cores, and the GPUs that this one may use."""
    cores = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    here = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", here).split(",")
    shares = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if len(gpus) > 1 else {} for i in range(jobs)]
    return [cores | os.environ | share for share in shares]


def find_device(device):
    """The device, where auto is a GPU if there is one, else the CPU; raises UserError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None
    return device


def device_name(device):
    """What the device is called: the GPU's name, or the CPU's architecture and number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def own_device():
    """Take this process's own GPU; returns its name."""
    there, started = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if there < started:
        raise UserError(f"torchrun --nproc-per-node {started}: there are {there} GPUs here: start no more")
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    return device


def settle(s, adapters=True):
    """Fill a program's `device` and `dtype` where they are "auto", and a process's own GPU; returns whether on a GPU.

    A model that is trained itself, not through `adapters`, needs float32's small steps; in float32 a GPU gets TF32.
    """
    if s.device == "auto":
        s.device = find_device("auto")
    cuda = s.device.startswith("cuda")
    if dist.is_initialized() and cuda:
        s.device = own_device()
    if s.dtype == "auto":
        s.dtype = "bfloat16" if cuda and adapters and torch.cuda.is_bf16_supported() else "float32"
    if cuda and s.dtype == "float32":
        torch.set_float32_matmul_precision("high")  # TF32: several times as fast
    return cuda


def forget_peak_memory(device):
    """Start measuring `peak_memory` anew, where the system can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most bytes that this process has held since `forget_peak_memory`: of a GPU's memory, or resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:  # the system's own peak (getrusage) would begin with what the starting process held
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):  # not there, or without that line, as in gVisor
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows_at_once(s, task, model, splits):
    """How many rows evaluation takes at a time: s.eval_batch_size; where that is 0, s.batch_size on a CPU.

    On a GPU the largest power of two up to 256 for which half of the memory beside the weights holds the longest row's
    activations of a block and its keys and values of all layers: of the card's memory, not of what happens to be free.
    """
    chosen = getattr(s, "eval_batch_size", 0)
    if chosen or not s.device.startswith("cuda"):
        return chosen or s.batch_size
    c = model.config
    tokens = max(max(split.lengths) for split in splits.values()) + task.new_tokens
    width = 12 * c.hidden_size + 4 * c.intermediate_size  # numbers per token
    if task.kind == "image":
        tokens = model.positions.shape[1]
    if task.kind == "lm":
        width += 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    room = torch.cuda.get_device_properties(s.device).total_memory - sum(p.nbytes for p in model.parameters())
    rows = max(1, room // 2 // (tokens * width * getattr(torch, s.dtype).itemsize))
    return min(256, 2 ** (rows.bit_length() - 1))


def fit_memory(training, batches):
    """On a GPU, find by trials how many of the longest rows a pass can take; if none, activations are recomputed."""
    s, model, device = training.s, training.model, training.device
    if device.type != "cuda" or s.forward_rows:
        return
    rows = math.ceil(min(s.batch_size, len(batches.split)) / process_and_count()[1])
    halved = [math.ceil(rows / 2**k) for k in range(1 + (rows - 1).bit_length())]  # rows ... 1
    longest = np.argsort(batches.split.lengths)[::-1][:rows].tolist()
    held = [torch.empty_like(p) for p in training.params for _ in range(3)]  # gradients, moments  # noqa: F841
    model.train()
    for recompute, n in itertools.product(sorted({s.checkpointing, s.compile != "graphs"}), halved):
        s.checkpointing = model.checkpointing = recompute
        before = torch.cuda.get_rng_state(device)
        try:
            batch = data.collate(batches.split, longest[:n], batches.widths, s.device)
            with without_graphs(s):
                training.forward_backward([(*batch, 0.0)])
            break
        except torch.OutOfMemoryError:
            continue
        finally:
            torch.cuda.set_rng_state(before, device)
            for p in [*model.parameters(), *training.params, *training.allocator.own]:
                p.grad = None
            torch.cuda.empty_cache()
    else:
        raise UserError(f"--max-length {s.max_length}: one row does not fit the memory of {s.device}: lower it")
    for name in training.allocator.summed:
        getattr(training.allocator, name).zero_()
    s.forward_rows = -largest(torch.tensor(-n)).item()
    if s.forward_rows < rows or recompute:
        note(f"memory: forward passes of {s.forward_rows} rows" + ", activations recomputed" * recompute)
