"""Runs that are killed, interrupted, out of disk or fed with NaN end with the bits of a run that was not."""

import functools
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval as evaluation
import lora
import train
from model import UserError
from test_train import cache, lines, refused  # noqa: F401: one is a fixture
from tiny import interrupted_after

METHODS = ["lora", "adalora", "lalora", "weightlora+", "lelora"]
SHORT = ["--limit-train", "160", "--limit-eval", "20", "--steps", "40", "--batch-size", "8", "--log-every", "3",
         "--save-every", "4", "--eval-every", "9", "--dropout", "0.1", "--rank", "4", "--weightlora-steps", "9",
         "--weightlora-examples", "0", "--adalora-delta-t", "4"]
LONG = 1800  # seconds, for what takes a few on a machine that is not busy
server = multiprocessing.get_context("forkserver")  # real processes, that need not import torch each time
server.set_forkserver_preload(["train", "torch._dynamo"])


def at_call(number, function, instead):
    """A stand-in for `function` that does `instead` at call `number` (from 1)."""
    calls = itertools.count(1)
    return lambda *args, **options: (instead if next(calls) == number else function)(*args, **options)


def act_at(name, number, act, *args):
    """Call `number` of a function of train.py's, such as "models.sync", does `act(*args)` first."""
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, train)
    function = getattr(owner, name)

    def acting(*given, **options):
        act(*args)
        return function(*given, **options)

    setattr(owner, name, at_call(number, function, acting))


def child(argv, stderr, acts):
    """Run train.py's main in this process, a fresh one, in which `act_at(*acts)` changes a function."""
    log = open(stderr, "a")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    torch.set_num_threads(1)
    if acts:
        act_at(*acts)
    evaluation.command(lambda: train.main([str(a) for a in argv]))


def start(*argv, stderr, acts=()):
    process = server.Process(target=child, args=(argv, stderr, acts))
    process.start()
    return process


def end(process):
    """Wait for a process; its exit status, negative for a signal."""
    process.join(LONG)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def wait_for(condition, process):
    """Poll until the condition holds or the process has ended."""
    began = time.time()
    while not condition() and process.is_alive():
        assert time.time() - began < LONG
        time.sleep(0.01)


def hang(mark):
    Path(mark).touch()
    time.sleep(2 * LONG)


def last_line(text):
    assert "Traceback" not in text, text[-3000:]
    return text.strip().splitlines()[-1]


def outcome(out):
    """Everything a run leaves that does not depend on clock or memory: adapter or model, metrics, ranks, result."""
    clock = ("examples_per_second", "seconds", "peak_memory_mb", "out")
    (file,) = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    metrics = [{k: v for k, v in line.items() if k not in clock} for line in lines(out / "metrics.jsonl")]
    result = {k: v for k, v in json.loads((out / "result.json").read_text()).items() if k not in clock}
    return load_file(file), metrics, lines(out / "ranks.jsonl"), result


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][k], expected[0][k]) for k in expected[0])
    assert found[1:] == expected[1:]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """outcome(method) of an uninterrupted run, made once."""
    @functools.cache
    def run(method):
        out = tmp_path_factory.mktemp("whole") / "run"
        process = start("--method", method, *SHORT, "--out", out, stderr=f"{out}.err")
        assert end(process) == 0, Path(f"{out}.err").read_text()
        return outcome(out)

    return run


# ---------------------------------------------------------------------------------------------- resume

RESUMED = {method: ["--method", method] for method in (*METHODS, "bitfit")} | {
    "lora sgd": ["--optimizer", "sgd"], "adalora muon": ["--method", "adalora", "--optimizer", "muon"],
    "lalora sgd dora": ["--method", "lalora", "--optimizer", "sgd", "--dora"],
    "lalora muon": ["--method", "lalora", "--optimizer", "muon", "--lora-plus-ratio", "4"],
    "lelora muon": ["--method", "lelora", "--optimizer", "muon"],
    "credit": ["--method", "credit"],
    "lelora adam": ["--method", "lelora", "--lelora-policy-optimizer", "adam", "--lelora-every", "2"],
    "weightlora sgd": ["--method", "weightlora", "--optimizer", "sgd", "--freeze-a"],
    "weightlora+ pissa": ["--method", "weightlora+", "--init", "pissa", "--dropout", "0"],
    "weightlora+ muon": ["--method", "weightlora+", "--optimizer", "muon"],
    "fisher": ["--method", "lalora", "--lalora-score", "fisher", "--forward-rows", "3"],
    "the README's": ["--method", "thaw.py:Thaw"]}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_bits(name, tmp_path, monkeypatch, capsys):
    """Broken off in steps 3, 14 and 23, the last time with a damaged checkpoint, a run ends as the one that was not."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    Path("thaw.py").write_text(next(block for block in blocks if "class Thaw" in block))
    flags = ["--limit-train", "150", "--limit-eval", "60", "--steps", "26", "--batch-size", "8", "--rank", "4",
             "--dropout", "0.1", "--save-every", "2", "--eval-every", "9", "--log-every", "4", "--accumulate", "2",
             *RESUMED[name]]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    with interrupted_after(3):
        train.main([*flags, "--out", str(tmp_path / "parts")])
    for step in (14, 23):
        with interrupted_after(step):
            train.main(["--resume", str(tmp_path / "parts")])
    newest = train.checkpoints(tmp_path / "parts")[0] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    assert "damaged" not in capsys.readouterr().err
    train.main(["--resume", str(tmp_path / "parts")])
    said = capsys.readouterr().err
    assert "step-22: damaged" in said and "after step 20" in said
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    assert all(t.any() for key, t in outcome(tmp_path / "parts")[0].items() if "lora_B" in key)  # and B, once 0, moved
    assert len(train.checkpoints(tmp_path / "parts")) == 2


def test_what_a_run_starts_from_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    """--adapter, --ranks and --data were given relative to a folder that is no longer the working one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "assets" / "digits.npz", "mine.npz")
    own = ["--limit-train", "60", "--limit-eval", "20", "--steps", "12", "--batch-size", "8", "--save-every", "4",
           "--task", "npz", "--data", "mine.npz"]
    flags = [*own, "--rank", "4", "--dropout", "0.1"]
    train.main([*flags, "--method", "empirical", "--r-min", "1", "--out", "first"])
    ranks = lines(Path("first/ranks.jsonl"))[-1]["ranks"]
    runs = {"same ranks": [*flags, "--ranks", "first"], "dealt": [*flags, "--ranks", "first", "--ranks-shuffled"],
            "onward": [*own, "--adapter", "first/adapter"]}
    for name, argv in runs.items():
        train.main([*argv, "--out", f"{name} whole"])
        with interrupted_after(7):
            train.main([*argv, "--out", name])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("../mine.npz").rename("mine.npz")
    capsys.readouterr()
    assert "mine.npz" in refused(train, ["--resume", "../dealt"], capsys)
    Path("mine.npz").rename("../mine.npz")
    for name in runs:
        train.main(["--resume", f"../{name}"])
        assert_same(outcome(tmp_path / name), outcome(tmp_path / f"{name} whole"))
        assert evaluation.evaluate_run(f"../{name}") == evaluation.evaluate_run(tmp_path / f"{name} whole")
    same, dealt, onward = (lines(tmp_path / name / "ranks.jsonl")[-1]["ranks"] for name in runs)
    assert same == ranks != dealt and sorted(dealt.values()) == sorted(ranks.values())
    assert onward == ranks


def test_what_cannot_be_resumed_is_one_line(tmp_path, capsys):
    run, damaged = tmp_path / "run", tmp_path / "damaged"
    train.main([*SHORT, "--steps", "5", "--no-eval-before", "--out", str(run)])
    shutil.copytree(run, damaged)
    for file in damaged.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (damaged / "result.json").unlink()
    capsys.readouterr()
    assert "no whole checkpoint" in refused(train, ["--resume", damaged], capsys)
    assert "finished" in refused(train, ["--resume", run], capsys)
    assert "run.json" in refused(train, ["--resume", tmp_path / "none"], capsys)
    assert "leave the other flags out" in refused(train, ["--resume", run, "--lr", "1"], capsys)


# ---------------------------------------------------------------------------------------------- killed

# before the run folder, in the warm-up, at a checkpoint's names on disk and its file, an old one's removal, a line of
# the log, the very end
KILLS = {"evaluation.load": 1, "Training.count": 7, "models.sync": 6, "save_file": 2, "shutil.rmtree": 11,
         "evaluation.to_json": 9, "save_adapter": 1}
many = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: set SLOW=1 to run it")


@pytest.mark.parametrize("method", ["weightlora+", *(pytest.param(method, marks=many) for method in METHODS
                                                     if method != "weightlora+")])
def test_kills_change_nothing(method, whole, tmp_path):
    """A run that is started, or resumed, and killed at each of `KILLS`, {function: number of the call}."""
    out, first, half = tmp_path / "run", ["--method", method, *SHORT, "--out", tmp_path / "run"], 0
    for name, number in KILLS.items():
        mark = tmp_path / name
        process = start(*(["--resume", out] if out.exists() else first), stderr=f"{out}.err",
                        acts=(name, number, hang, mark))
        wait_for(mark.exists, process)
        assert mark.exists(), Path(f"{out}.err").read_text()[-2000:]
        process.kill()
        end(process)
        half += any(out.glob("checkpoints/*.part"))
    assert half >= 2 and end(start("--resume", out, stderr=f"{out}.err")) == 0
    assert not any(out.glob("**/*.part")) and len(list(out.glob("checkpoints/*"))) == 2
    assert_same(outcome(out), whole(method))


# ---------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_says_how_to_go_on(number, status, whole, tmp_path):
    out, err = tmp_path / "a run", tmp_path / "err"
    flags = ["--method", "lalora", *SHORT, "--save-every", "100", "--out", out]
    assert end(start(*flags, stderr=err, acts=("Training.count", 17, signal.raise_signal, number))) == status
    assert [path.name for path in train.checkpoints(out)] == ["step-17"]  # of the step that was under way
    said, command = last_line(err.read_text()).split("; go on with: ")
    assert said == f"stopped by {number.name}; last checkpoint: {out / 'checkpoints' / 'step-17'}"
    if number == signal.SIGTERM:  # the command as it stands
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(command, shell=True, env=dict(os.environ, OMP_NUM_THREADS="1", PATH=path),
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_same(outcome(out), whole("lalora"))


@pytest.mark.parametrize("where", ["criterion", "evaluation.load"])
def test_a_second_signal_stops_at_once_as_does_the_first_while_loading(where, tmp_path):
    mark, err = tmp_path / "mark", tmp_path / "err"
    process = start(*SHORT, "--no-eval-before", "--out", tmp_path / "run", stderr=err, acts=(where, 1, hang, mark))
    wait_for(mark.exists, process)
    os.kill(process.pid, signal.SIGINT)
    if where == "criterion":
        process.join(2)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
    assert end(process) == 130
    began = (tmp_path / "run").exists()
    assert began == (where == "criterion")
    assert ("--resume" if began else "stopped by SIGINT") in last_line(err.read_text())


# ---------------------------------------------------------------------------------------------- two at a time


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    out = tmp_path / "run"
    process = start(*SHORT, "--steps", "1000000", "--out", out, stderr=tmp_path / "err")
    wait_for((out / "ranks.jsonl").exists, process)
    before = (out / "run.json").read_bytes()
    assert "another run" in refused(train, ["--resume", out], capsys)
    assert "not empty" in refused(train, [*SHORT, "--out", out], capsys)
    process.kill()
    end(process)
    assert (out / "run.json").read_bytes() == before


def test_of_two_runs_that_start_together_one_gives_way(tmp_path):
    """Both found the folder absent; the second comes when the first has claimed it, or has written to it and gone."""
    s = train.Settings(out=str(tmp_path / "run"))
    with train.Survival(s) as first, train.Survival(s) as second:
        first.claim({})
        with pytest.raises(UserError, match="another run is at work"):
            second.claim({})
    with train.Survival(s) as third, pytest.raises(UserError, match="another run has begun"):
        third.claim({})


# ---------------------------------------------------------------------------------------------- disk, files


def fail(error):
    raise error


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")
REMEDIES = ["error: out of memory (", "--forward-rows 4", "--checkpointing"]
GIVEN_UP = {"disk": ("Training.count", 14, limit_files, 50_000), "log": ("Training.count", 14, limit_files, 2500),
            "GPU": ("Training.forward_backward", 14, fail, GPU), "CPU": ("Training.forward_backward", 14, fail, CPU)}


@pytest.mark.parametrize("what", GIVEN_UP)
def test_a_full_disk_or_memory_is_one_line_and_the_run_resumes(what, whole, tmp_path):
    """It happens in step 14."""
    out, err = tmp_path / "run", tmp_path / "err"
    assert end(start("--method", "lora", *SHORT, "--out", out, stderr=err, acts=GIVEN_UP[what])) == 1
    expected = ["File too large"] if what in ("disk", "log") else [str(GIVEN_UP[what][-1])[:40], *REMEDIES]
    line = last_line(err.read_text())
    assert line.startswith("error: ") and all(part in line for part in [*expected, "step-12", "--resume"]), line
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-8", "step-12"}
    assert end(start("--resume", out, stderr=err)) == 0, err.read_text()[-2000:]
    assert_same(outcome(out), whole("lora"))


# ---------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("method, kind", [*((method, "adamw") for method in METHODS), ("lora", "sgd"),
                                          ("lalora", "muon")])
def test_a_bad_batch_moves_nothing(method, kind, poison, tmp_path, monkeypatch):
    """The same bits as a run told to leave step 7 out: optimizer, La-LoRA's and AdaLoRA's statistics, omega, averages.

    LeLoRA's network takes no lesson from it, but draws the next action; so there the reference does that, too.
    """
    criterion, seen = train.criterion, []
    ours = lora.AdamW if method in ("lalora", "lelora") else torch.optim.AdamW
    optimizers = {"adamw": [ours], "sgd": [torch.optim.SGD], "muon": [ours, torch.optim.Muon]}[kind]
    policy = train.allocators.METHODS[method]
    flags = ["--method", method, *SHORT, "--steps", "20", "--no-eval-before", "--optimizer", kind]

    def bad(*args):
        loss = criterion(*args)
        return loss * float("nan") if poison == "loss" else loss + (args[1].flatten()[0] * 0).sqrt()  # gradient 0 / 0

    with monkeypatch.context() as patch:
        patch.setattr(train, "criterion", at_call(7, criterion, bad))
        train.main([*flags, "--out", str(tmp_path / "bad")])
    with monkeypatch.context() as patch:
        patch.setattr(train, "criterion", at_call(7, criterion, lambda *args: criterion(*args) * 0))
        for optimizer in optimizers:
            patch.setattr(optimizer, "step", at_call(7, optimizer.step, lambda self: seen.append(self)))
        if method == "lelora":
            patch.setattr(policy, "after_step", at_call(7, policy.after_step, lambda self, step: self.act(step)))
        else:
            patch.setattr(policy, "after_backward", at_call(7, policy.after_backward, lambda self, step: None))
            patch.setattr(policy, "after_step", at_call(7, policy.after_step, lambda self, step: False))
        train.main([*flags, "--out", str(tmp_path / "left out")])
    assert len(seen) == len(optimizers)
    found, expected = outcome(tmp_path / "bad"), outcome(tmp_path / "left out")
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][k], expected[0][k]) for k in expected[0])
    assert [line["ranks"] for line in found[2]] == [line["ranks"] for line in expected[2]]
    assert found[3]["skipped_steps"] == 1 and expected[3]["skipped_steps"] == 0
    assert [line["skipped_steps"] for line in found[1] if "loss" in line] == [0, 0, 1, 1, 1, 1, 1]
    assert all(line["loss"] < 20 for line in found[1] if "loss" in line)


@pytest.mark.parametrize("method, log_every", [("lora", 1), ("lelora", 7)])
def test_a_run_that_stays_bad_stops_at_a_good_checkpoint(method, log_every, tmp_path, monkeypatch, capsys):
    """From the ninth loss on every one is NaN: status 1, one line with step and checkpoint; it is intact."""
    criterion, calls, out = train.criterion, itertools.count(1), tmp_path / "run"
    monkeypatch.setattr(train, "criterion", lambda *args: criterion(*args) * (float("nan") if next(calls) > 8 else 1))
    line = refused(train, ["--method", method, *SHORT, "--no-eval-before", "--log-every", log_every, "--save-every", "4",
                    "--eval-every", "100", "--max-bad-steps", "4", "--out", out], capsys, status=1)
    newest = train.checkpoints(out)[0]
    assert line.startswith("error: step ") and "4 steps in a row" in line and str(newest) in line, line
    state = load_file(newest / "state.safetensors")
    assert all(t.isfinite().all() for name, t in state.items() if t.is_floating_point() and "mean" not in name)
    monkeypatch.setattr(train, "criterion", criterion)
    train.main(["--resume", str(out)])
