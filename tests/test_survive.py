"""Runs that are killed, interrupted, out of disk or fed with NaN: they end with the bits of a run that was not."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import eval as evaluation
import lora
import train
from tiny import interrupted_after
from model import UserError

METHODS = ["lora", "adalora", "lalora", "weightlora+", "lelora"]
SHORT = ["--limit-train", "160", "--limit-eval", "20", "--steps", "40", "--batch-size", "8", "--log-every", "3",
         "--save-every", "4", "--eval-every", "9", "--dropout", "0.1", "--rank", "4", "--weightlora-steps", "9",
         "--weightlora-examples", "0", "--adalora-delta-t", "4"]
server = multiprocessing.get_context("forkserver")  # real processes, that need not import torch each time
server.set_forkserver_preload(["train", "torch._dynamo"])


def child(argv, stderr, patch):
    """Run train.py's main in this process, a fresh one; `patch(train)` may change it first."""
    log = open(stderr, "a")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    torch.set_num_threads(1)
    if patch:
        patch(train)
    evaluation.command(lambda: train.main([str(a) for a in argv]))


def start(*argv, stderr, patch=None):
    process = server.Process(target=child, args=(argv, stderr, patch))
    process.start()
    return process


def end(process, timeout=60):
    """Wait for a process; its exit status, negative for a signal."""
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def wait_for(condition, process, timeout=60):
    """Poll until the condition holds or the process has ended."""
    began = time.time()
    while not condition() and process.is_alive():
        assert time.time() - began < timeout
        time.sleep(0.001)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def last_line(path):
    text = Path(path).read_text()
    assert "Traceback" not in text, text[-3000:]
    return text.strip().splitlines()[-1]


def outcome(out):
    """Everything a run leaves that does not depend on clock or memory: adapter, metrics, ranks, result."""
    clock = ("examples_per_second", "seconds", "peak_memory_mb", "out")
    (file,) = out.glob("adapter/*.safetensors")
    return (load_file(file), [{k: v for k, v in line.items() if k not in clock} for line in lines(out / "metrics.jsonl")],
            lines(out / "ranks.jsonl"), {k: v for k, v in json.loads((out / "result.json").read_text()).items() if k not in clock})


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys() and all(torch.equal(found[0][k], expected[0][k]) for k in expected[0])
    assert found[1:] == expected[1:]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """outcome(method) of an uninterrupted run, made once."""
    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert end(start("--method", method, *SHORT, "--out", out, stderr=f"{out}.err")) == 0, Path(f"{out}.err").read_text()
            made[method] = outcome(out)
        return made[method]

    return run


# ---------------------------------------------------------------------------------------------- killed


def slow_disk(train):
    """A checkpoint takes long enough to be killed in the middle."""
    sync = train.models.sync
    train.models.sync = lambda path: (time.sleep(0.03), sync(path))


def kill_until_done(method, out, kills):
    """Start, kill and resume a run at each of `kills`, then let it end; how often it was killed while writing."""
    first = ["--method", method, *SHORT, "--out", out]
    parts, killed = 0, 0
    for kind, value in kills:
        argv = ["--resume", out] if (out / "run.json").exists() and (out / "run.json").stat().st_size else first
        if argv is first:
            shutil.rmtree(out, ignore_errors=True)
        process = start(*argv, stderr=f"{out}.err", patch=slow_disk)
        if kind == "line":
            had = len(lines(out / "ranks.jsonl"))
            wait_for(lambda: len(lines(out / "ranks.jsonl")) > had + value, process)
        elif kind == "part":
            seen = set(out.glob("checkpoints/*.part"))
            wait_for(lambda: set(out.glob("checkpoints/*.part")) - seen, process)
            time.sleep(value)
        else:
            process.join(value)
        process.kill()
        killed += end(process) == -signal.SIGKILL
        parts += kind == "part" and any(out.glob("checkpoints/*.part"))
        if (out / "result.json").exists():  # too late: once more from the start
            shutil.rmtree(out)
    argv = ["--resume", out] if (out / "run.json").exists() else first
    assert end(start(*argv, stderr=f"{out}.err")) == 0, Path(f"{out}.err").read_text()[-2000:]
    assert not any(out.glob("**/*.part")) and len(list(out.glob("checkpoints/*"))) == 2
    return killed, parts


def test_three_kills_change_nothing(whole, tmp_path):
    """WeightLoRA+ killed in its warm-up, while a checkpoint is written, and somewhere."""
    kills = [("line", 6), ("part", 0.04), ("line", 5)]
    killed, parts = kill_until_done("weightlora+", tmp_path / "run", kills)
    assert killed == 3 and parts == 1
    assert_same(outcome(tmp_path / "run"), whole("weightlora+"))


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: set SLOW=1 to run it")
@pytest.mark.parametrize("method", METHODS)
def test_many_kills_change_nothing(method, whole, tmp_path):
    """24 kills at moments drawn from a seed: while loading, between steps, in a checkpoint's or the adapter's writing."""
    draw = random.Random(method)
    kills = [draw.choice([("line", draw.randrange(9)), ("part", draw.uniform(0, 0.15)), ("time", draw.uniform(0, 2.5))])
             for _ in range(24)]
    killed, parts = kill_until_done(method, tmp_path / "run", kills)
    assert killed >= 20 and parts >= 3
    assert_same(outcome(tmp_path / "run"), whole(method))


# ---------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_says_how_to_go_on(number, status, whole, tmp_path):
    process = start("--method", "lalora", *SHORT, "--save-every", "100", "--out", tmp_path / "a run", stderr=tmp_path / "err")
    wait_for(lambda: len(lines(tmp_path / "a run" / "ranks.jsonl")) >= 8, process)
    os.kill(process.pid, number)
    assert end(process) == status
    (checkpoint,) = (tmp_path / "a run" / "checkpoints").iterdir()  # of the step that was under way, and nothing later
    assert lines(tmp_path / "a run" / "ranks.jsonl")[-1]["step"] <= int(checkpoint.name[5:]) < 40
    line = last_line(tmp_path / "err")
    said, command = line.split("; go on with: ")
    assert said == f"stopped by {number.name}"
    if number == signal.SIGTERM:  # the command as it stands
        environment = dict(os.environ, OMP_NUM_THREADS="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        done = subprocess.run(command, shell=True, cwd=Path.cwd(), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_same(outcome(tmp_path / "a run"), whole("lalora"))


def hang_in_a_step(train):
    def criterion(*args):
        Path(os.environ["MARK"]).touch()
        time.sleep(60)
    train.criterion = criterion


def hang_while_loading(train):
    def load(*args, **options):
        Path(os.environ["MARK"]).touch()
        time.sleep(60)
    train.evaluation.load = load


@pytest.mark.parametrize("where, signals", [(hang_in_a_step, 2), (hang_while_loading, 1)])
def test_a_second_signal_stops_at_once_as_does_the_first_while_loading(where, signals, tmp_path):
    process = start(*SHORT, "--no-eval-before", "--out", tmp_path / "run", stderr=tmp_path / "err",
                    patch=Hang(where, str(tmp_path / "mark")))
    wait_for(lambda: (tmp_path / "mark").exists(), process)
    for _ in range(signals):
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert end(process, 10) == 130
    if where is hang_while_loading:
        assert last_line(tmp_path / "err") == "stopped by SIGINT before the run began" and not (tmp_path / "run").exists()
    else:
        assert "--resume" in last_line(tmp_path / "err")


class Hang:
    """A patch that knows where to leave its mark; a class, so that it can be sent to the other process."""

    def __init__(self, where, mark):
        self.where, self.mark = where, mark

    def __call__(self, train):
        os.environ["MARK"] = self.mark
        self.where(train)


# ---------------------------------------------------------------------------------------------- two at a time


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    process = start(*SHORT, "--steps", "100000", "--out", tmp_path / "run", stderr=tmp_path / "err")
    wait_for(lambda: lines(tmp_path / "run" / "ranks.jsonl"), process)
    before = (tmp_path / "run" / "run.json").read_bytes()
    for argv in (["--resume", str(tmp_path / "run")], [*SHORT, "--out", str(tmp_path / "run")]):
        with pytest.raises(SystemExit) as stop:
            evaluation.command(lambda: train.main(argv))
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and ("another run" in line or "not empty" in line)
    process.kill()
    end(process)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_of_two_runs_that_start_together_one_gives_way(tmp_path):
    """Both found the folder absent; the second comes when the first has claimed it, or has written to it and gone."""
    s = train.Settings(out=str(tmp_path / "run"))
    with contextlib.ExitStack() as held:
        train.claim(s, held).write("{}")
        with pytest.raises(UserError, match="another run is at work"):
            train.claim(s, held)
    with contextlib.ExitStack() as held, pytest.raises(UserError, match="another run has begun"):
        train.claim(s, held)


# ---------------------------------------------------------------------------------------------- disk, files


class FullDisk:
    """From step 14 on no file may grow beyond `size` bytes."""

    def __init__(self, size):
        self.size = size

    def __call__(self, train):
        add = train.Budget.add

        def fill(budget):
            add(budget)
            if budget.steps == 14:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

        train.Budget.add = fill


@pytest.mark.parametrize("size, expected", [(50_000, "step-16: cannot be written"), (2500, "ranks.jsonl")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(size, expected, whole, tmp_path):
    out = tmp_path / "run"
    process = start("--method", "lora", *SHORT, "--out", out, stderr=tmp_path / "err", patch=FullDisk(size))
    assert end(process) == 1
    line = last_line(tmp_path / "err")
    assert line.startswith("error: ") and expected in line and "--resume" in line
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-8", "step-12"}
    assert end(start("--resume", out, stderr=tmp_path / "err")) == 0
    assert_same(outcome(out), whole("lora"))


def test_data_that_vanished_are_named_and_a_resumed_run_waits_for_them(tmp_path, capsys):
    shutil.copy(ROOT / "assets" / "digits.npz", tmp_path / "mine.npz")
    with interrupted_after(6):
        train.main([*SHORT, "--task", "npz", "--data", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "run")])
    (tmp_path / "mine.npz").rename(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main(["--resume", str(tmp_path / "run")]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and "mine.npz" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "elsewhere").rename(tmp_path / "mine.npz")
    train.main(["--resume", str(tmp_path / "run")])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    plain = open

    def read_only(file, mode="r", *args, **options):
        if str(file).startswith(str(tmp_path / "run")) and mode != "r":
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, mode, *args, **options)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main([*SHORT, "--out", str(tmp_path / "run")]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and "run.json" in line and "denied" in line


# ---------------------------------------------------------------------------------------------- not finite


def call_number(function, number, instead):
    """A stand-in for `function` that does `instead` at call `number` (from 1)."""
    calls = []

    def call(*args, **options):
        calls.append(1)
        return (instead if len(calls) == number else function)(*args, **options)

    return call


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_batch_moves_nothing(method, poison, tmp_path, monkeypatch):
    """The same bits as a run told to leave step 7 out: optimizer, La-LoRA's and AdaLoRA's statistics, omega, averages.

    LeLoRA's network takes no lesson from it, but draws the next action; so there the reference does that, too.
    """
    criterion, step_7, seen = train.criterion, 7, {}
    loss_7 = 13 if method == "lelora" else 7  # every step of LeLoRA also computes its validation loss
    optimizer = lora.AdamW if method in ("lalora", "lelora") else torch.optim.AdamW
    policy = train.allocators.METHODS[method]
    flags = ["--method", method, *SHORT, "--steps", "20", "--no-eval-before"]

    def bad(kind, logits, labels):
        loss = criterion(kind, logits, labels)
        return loss * float("nan") if poison == "loss" else loss + (logits.flatten()[0] * 0).sqrt()  # gradient 0 / 0

    def see_nothing(self, step):
        if method == "weightlora+":  # whose gates are not the optimizer's to clear
            self.gradient = torch.zeros_like(self.omega)
            for gate in self.gates:
                gate.grad = None

    with monkeypatch.context() as patch:
        patch.setattr(train, "criterion", call_number(criterion, loss_7, bad))
        train.main([*flags, "--out", str(tmp_path / "bad")])
    with monkeypatch.context() as patch:
        patch.setattr(train, "criterion", call_number(criterion, loss_7, lambda *args: criterion(*args) * 0))
        patch.setattr(optimizer, "step", call_number(optimizer.step, step_7, lambda self: seen.setdefault("optimizer", True)))
        if method == "lelora":
            patch.setattr(policy, "after_step", call_number(policy.after_step, step_7, lambda self, step: self.act(step)))
        else:
            patch.setattr(policy, "after_backward", call_number(policy.after_backward, step_7, see_nothing))
            patch.setattr(policy, "after_step", call_number(policy.after_step, step_7, lambda self, step: False))
        train.main([*flags, "--out", str(tmp_path / "left out")])
    assert seen
    found, expected = outcome(tmp_path / "bad"), outcome(tmp_path / "left out")
    assert found[0].keys() == expected[0].keys() and all(torch.equal(found[0][k], expected[0][k]) for k in expected[0])
    assert [line["ranks"] for line in found[2]] == [line["ranks"] for line in expected[2]]
    assert found[3]["skipped_steps"] == 1 and expected[3]["skipped_steps"] == 0
    assert [line["skipped_steps"] for line in found[1] if "loss" in line] == [0, 0, 1, 1, 1, 1, 1]
    assert all(line["loss"] < 20 for line in found[1] if "loss" in line)


@pytest.mark.parametrize("method, log_every", [("lora", 1), ("lelora", 7)])
def test_a_run_that_stays_bad_stops_and_names_the_batch(method, log_every, tmp_path, monkeypatch, capsys):
    """From step 9 on, every loss is NaN: status 1, one line with step, rows of the file and checkpoint; it is intact."""
    shutil.copy(ROOT / "assets" / "digits.npz", tmp_path / "mine.npz")
    criterion, collate, batches, calls = train.criterion, data.collate, [], []

    def turned_bad(*args):
        calls.append(1)
        return criterion(*args) * (float("nan") if len(calls) >= 9 else 1)

    def watch(split, indices, *rest, **options):
        if len(split) > 100:  # not the validation rows, nor those of the evaluation
            batches.append(split.pixels[indices])
        return collate(split, indices, *rest, **options)

    monkeypatch.setattr(train, "criterion", turned_bad)
    monkeypatch.setattr(data, "collate", watch)
    argv = ["--method", method, *SHORT, "--task", "npz", "--data", str(tmp_path / "mine.npz"), "--no-eval-before",
            "--log-every", str(log_every), "--save-every", "5", "--eval-every", "100", "--max-bad-steps", "4", "--out"]
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main([*argv, str(tmp_path / "run")]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("error: step ") and "step-" in line, line
    step = int(line.split()[2].rstrip(":"))
    images = np.load(tmp_path / "mine.npz")["images"]
    named = [int(number) for number in re.findall(r"images\[(\d+)\]", line)]
    shown = {pixels.numpy().tobytes() for pixels in batches[step - 1]}
    assert {images[i].tobytes() for i in named} == shown and len(named) == 8
    saved = torch.cat([t.flatten() for t in load_file(train.checkpoints(tmp_path / "run")[0] / "state.safetensors").values()
                       if t.is_floating_point()])
    assert saved.isfinite().all()
    monkeypatch.setattr(train, "criterion", criterion)
    train.main(["--resume", str(tmp_path / "run")])
