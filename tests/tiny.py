"""A tiny stand-in for a model, settings and the training loop, so that tests of the policies take no time."""

import contextlib
import hashlib
import http.server
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load, save

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests compare with the CPU's numbers, bit by bit
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train as program
from model import UserError


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

    family, prefix, fresh, labels, head_kind, head_names, tied = "tiny", "tiny", (), (), "classify", {"head": "head"}, 0

    def __init__(self, blocks=3, dim=12, hidden=20, labels=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(blocks))
            self.head = nn.Linear(dim, labels)
        self.requires_grad_(False)
        self.plain_names = [name for name, _ in self.named_parameters()]

    def hf_name(self, name, module=False):
        return name

    def forward(self, x, labels=None):  # (B, D) -> (B, labels), or the sum of their cross-entropies as Decoder's
        for block in self.blocks:
            x = block(x)
        return self.head(x) if labels is None else F.cross_entropy(self.head(x), labels, reduction="sum")


ALL = ["query", "key", "value", "out", "up", "down"]  # a Tiny's projections
# a schedule for each policy in which all that it does happens within 12 steps
POLICIES = dict(adalora_t_init=3, adalora_t_final=8, adalora_delta_t=4, lalora_gamma=1.0, weightlora_steps=5,
                lelora_dims=["0", "2"])


def settings(**changes):
    """Real settings of a run, small; a test adds its policy's flags."""
    common = dict(targets=["query", "value"], rank=4, alpha=8.0, dropout=0.0, r_min=1, lr=1e-2, clip=0.0)
    return program.Settings(**{**common, "weight_decay": 0.0, "device": "cpu", **changes})


@contextlib.contextmanager
def refused(message):
    """A place for what ends with a UserError of one line that `message`, a regular expression, finds."""
    with pytest.raises(UserError, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def batches(steps, size=16, dim=12, labels=3, seed=0, dtype=torch.float32):
    """`steps` random batches (x, labels) of a task that can be learned: the labels are a linear map of x."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(dim, labels, generator=generator, dtype=dtype)
    for _ in range(steps):
        x = torch.randn(size, dim, generator=generator, dtype=dtype)
        yield x, (x @ teacher).argmax(1)


def training_of(allocator, kind="lm"):
    """train.py's Training of the policy's model; a Tiny's head stays frozen, as a language model's does."""
    return program.Training(allocator.settings, allocator.model, kind, allocator)


def train(training, data, first=1, watch=None):
    """Take train.py's steps on `data`, from step `first`; `watch(step, loss)` runs after every step."""
    for step, (x, labels) in enumerate(data, start=first):
        loss, _ = training.step(step, [({"x": x}, labels, 1 / len(labels))])
        if watch:
            watch(step, loss)
    return training


def components(allocator, optimizer):
    """Sums over what belongs to each component, (n, R) in model order: of A, B, their moments and step counts."""
    found = []
    for key in ("data", "exp_avg", "exp_avg_sq", "steps"):
        for name, dim in (("A", 2), ("B", 1)):
            held = [getattr(stack, name) for stack in allocator.stacks]
            parts = [p.data if key == "data" else optimizer.state[p].get(key, torch.zeros_like(p)) for p in held]
            found.append(allocator.in_model_order([part.double().sum(dim) for part in parts]))
    return found


def checkpoint(training):
    """What train.py writes into a checkpoint and finds there again."""
    state = training.state()
    state["random.cpu"] = torch.get_rng_state()
    return load(save({name: t.clone().contiguous() for name, t in state.items()}))


def resumed(allocator, state):
    """The Training of a newly built policy that goes on from `state`."""
    training = training_of(allocator)
    training.restore(state)
    torch.set_rng_state(state["random.cpu"])
    return training


def resumes_to_the_same_bits(build, data, stop):
    """Train the policy that `build()` returns at once, and with a restart after `stop` steps."""
    torch.manual_seed(0)
    whole = train(training_of(build()), data)
    expected = checkpoint(whole)
    torch.manual_seed(0)
    state = checkpoint(train(training_of(build()), data[:stop]))
    torch.manual_seed(99)
    parts = train(resumed(build(), state), data[stop:], first=stop + 1)
    found = checkpoint(parts)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    a, b = (training.model.state_dict() for training in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole.allocator.ranks() == parts.allocator.ranks() and whole.budget() == parts.budget()


@contextlib.contextmanager
def interrupted_after(step):
    """A place for a run that Ctrl-C stops at once in its optimizer step `step`; fails if it gets by."""
    count = program.Training.count

    def interrupted(training, *args):
        count(training, *args)
        if training.steps == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program.Training, "count", interrupted)
        yield


COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of every repository on the Mirror


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves files {path: bytes} with the Hub's headers; a path in `cut` is announced whole and sent by half."""

    def do_GET(self):
        files, path = self.server.files, self.path.split("?")[0]
        self.server.asked.append(path)
        body = files.get(self.path, files.get(path))
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.path in self.server.cut else body)

    do_HEAD = do_GET

    def end_headers(self):
        tag = hashlib.sha1(self.path.encode()).hexdigest()
        for key, value in {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "X-Error-Code": "RepoNotFound"}.items():
            self.send_header(key, value)
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.cut, server.asked = {}, set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RANKS_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()
