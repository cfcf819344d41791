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
import tiny
import torch
from safetensors.torch import load_file
from test_readme import code
from test_train import cache, lines, refused  # noqa: F401: one is a fixture
from tiny import ROOT, interrupted_after

import eval as evaluation
import train
from model import UserError

METHODS = ["lora", "adalora", "lalora", "weightlora+", "lelora"]
SHORT = ("--limit-train 160 --limit-eval 20 --steps 40 --batch-size 8 --log-every 3 --save-every 4 --eval-every 9 "
         "--dropout 0.1 --rank 4 --weightlora-steps 9 --weightlora-examples 0 --adalora-delta-t 4").split()
LONG = 1800  # seconds, for what takes a few on a machine that is not busy
server = multiprocessing.get_context("forkserver")  # real processes, that need not import torch each time
server.set_forkserver_preload(["train", "torch._dynamo"])


def act_at(name, number, act, *args):
    """Call `number`, from 1, of a function of train.py's, such as "models.sync", does `act(*args)` first."""
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, train)
    function, calls = getattr(owner, name), itertools.count(1)

    def acting(*given, **options):
        if next(calls) == number:
            act(*args)
        return function(*given, **options)
    setattr(owner, name, acting)


def child(argv, stderr, acts):
    """Run train.py's main in this process, a fresh one, in which `act_at(*acts)` changes a function."""
    log = open(stderr, "a")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    torch.set_num_threads(1)
    if acts:
        act_at(*acts)
    evaluation.run_program(lambda: train.main([str(a) for a in argv]))


def start(*argv, stderr, acts=()):
    process = server.Process(target=child, args=(argv, stderr, acts))
    process.start()
    return process


def end(process):
    """Wait for a process; its exit status, negative for a signal."""
    process.join(LONG)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def wait_for(mark, process):
    """Poll until the file is there; fails if the process ends before."""
    began = time.time()
    while not mark.exists():
        assert process.is_alive() and time.time() - began < LONG
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
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
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


RESUMED = [f"--method {method}" for method in (*METHODS, "bitfit", "credit", "thaw.py:Thaw")] + [
    "--optimizer sgd", "--method adalora --optimizer muon", "--method lalora --optimizer sgd --dora",
    "--method lalora --optimizer muon --lora-plus-ratio 4", "--method lalora --lalora-score fisher --forward-rows 3",
    "--method lelora --optimizer muon", "--method lelora --lelora-policy-optimizer adam --lelora-every 2",
    "--method weightlora --optimizer sgd --freeze-a", "--method weightlora+ --init pissa --dropout 0"]


@pytest.mark.parametrize("own", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_bits(own, tmp_path, monkeypatch, capsys):
    """Broken off in steps 3, 14 and 23, the last time with a damaged checkpoint, a run ends as the one that was not."""
    monkeypatch.chdir(tmp_path)
    Path("thaw.py").write_text(code("class Thaw"))
    flags = ("--limit-train 150 --limit-eval 60 --steps 26 --batch-size 8 --rank 4 --dropout 0.1 --save-every 2 "
             f"--eval-every 9 --log-every 4 --accumulate 2 {own}").split()
    train.main([*flags, "--out", str(tmp_path / "whole")])
    with interrupted_after(3):
        train.main([*flags, "--out", str(tmp_path / "parts")])
    for step in (14, 23):
        with interrupted_after(step):
            train.main(["--resume", str(tmp_path / "parts")])
    newest = train.checkpoints(tmp_path / "parts")[0] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "parts")])
    said = capsys.readouterr().err
    assert "step-22: damaged" in said and "after step 20" in said
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    assert all(t.any() for key, t in outcome(tmp_path / "parts")[0].items() if "lora_B" in key)  # and B, once 0, moved
    assert len(train.checkpoints(tmp_path / "parts")) == 2


def test_what_a_run_starts_from_is_found_from_another_folder(tmp_path, monkeypatch):
    """--adapter, --ranks and --data were given relative to a folder that is no longer the working one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "assets" / "digits.npz", "mine.npz")
    flags = "--limit-train 60 --limit-eval 20 --steps 12 --batch-size 8 --save-every 4 --task npz --data mine.npz"
    train.main([*flags.split(), *"--rank 4 --method empirical --r-min 1 --out first".split()])
    ranks = lines(Path("first/ranks.jsonl"))[-1]["ranks"]
    own = {"dealt": "--rank 4 --dropout 0.1 --ranks first --ranks-shuffled", "onward": "--adapter first/adapter"}
    for name in own:
        argv = f"{flags} {own[name]} --out {name}"
        train.main(f"{argv}-whole".split())
        with interrupted_after(7):
            train.main(argv.split())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in own:
        train.main(["--resume", f"../{name}"])
        assert_same(outcome(tmp_path / name), outcome(tmp_path / f"{name}-whole"))
        assert evaluation.evaluate_run(f"../{name}") == evaluation.evaluate_run(tmp_path / f"{name}-whole")
    dealt, onward = (lines(tmp_path / name / "ranks.jsonl")[-1]["ranks"] for name in own)
    assert onward == ranks != dealt and sorted(dealt.values()) == sorted(ranks.values())


# before the run folder, in the warm-up, at a checkpoint's names on disk and its file, an old one's removal, a line of
# the log, the very end
KILLS = {"evaluation.load": 1, "Training.count": 7, "models.sync": 6, "save_file": 2, "shutil.rmtree": 11,
         "to_json": 9, "save_adapter": 1}


@pytest.mark.parametrize("method", METHODS if "SLOW" in os.environ else ["weightlora+"])  # each takes minutes
def test_kills_change_nothing(method, whole, tmp_path):
    """A run that is started, or resumed, and killed at each of `KILLS`, {function: number of the call}."""
    out, first, half = tmp_path / "run", ["--method", method, *SHORT, "--out", tmp_path / "run"], 0
    for name, number in KILLS.items():
        mark = tmp_path / name
        process = start(*(["--resume", out] if out.exists() else first), stderr=f"{out}.err",
                        acts=(name, number, hang, mark))
        wait_for(mark, process)
        process.kill()
        end(process)
        half += any(out.glob("checkpoints/*.part"))
    assert half >= 2 and end(start("--resume", out, stderr=f"{out}.err")) == 0
    assert not any(out.glob("**/*.part")) and len(list(out.glob("checkpoints/*"))) == 2
    assert_same(outcome(out), whole(method))


@pytest.mark.parametrize("where", ["criterion", "evaluation.load"])
def test_a_second_signal_stops_at_once_as_does_the_first_while_loading(where, tmp_path):
    mark, err = tmp_path / "mark", tmp_path / "err"
    process = start(*SHORT, "--no-eval-before", "--out", tmp_path / "run", stderr=err, acts=(where, 1, hang, mark))
    wait_for(mark, process)
    os.kill(process.pid, signal.SIGINT)
    if where == "criterion":
        process.join(2)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
    assert end(process) == 130
    assert (tmp_path / "run").exists() == ("--resume" in last_line(err.read_text())) == (where == "criterion")


def test_what_cannot_be_resumed_or_started(tmp_path, monkeypatch, capsys, caplog):
    """Another run is at work there, or only damaged checkpoints are; of two that find no folder the first claims it."""
    out = tmp_path / "run"

    def intrude():
        before = (out / "run.json").read_bytes()
        with pytest.raises(UserError, match="another run is at work"):
            train.main(["--resume", str(out)])
        assert (out / "run.json").read_bytes() == before

    monkeypatch.setattr(train.Training, "count", train.Training.count)  # it is put back at the end
    act_at("Training.count", 7, intrude)
    train.main([*SHORT, "--steps", "8", "--no-eval-before", "--out", str(out)])
    capsys.readouterr()
    assert "finished" in refused(train, ["--resume", out], capsys)
    (out / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train.allocators.Allocator, "saved", (*train.allocators.Allocator.saved, "nominal"))
        assert "of another version, lack 'policy.nominal'" in refused(train, ["--resume", out], capsys)
    (out / "run.json").write_text((out / "run.json").read_text().replace('"source": "', '"source": "0'))
    shutil.copytree(next(out.glob("checkpoints/step-*")), out / "checkpoints" / "step-8 (copy)")
    for log in (b'{"note": 1}\n', b"\xff\n{}\n"):
        (out / "ranks.jsonl").write_bytes(log)
        assert "ranks.jsonl line 1: no line of" in refused(train, ["--resume", out], capsys)
    assert "--ranks, has changed since" in caplog.text
    for file in out.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    for flags, expected in (("run", "no whole checkpoint"), ("none", "run.json"), ("run --lr 1", "leave the other")):
        assert expected in refused(train, f"--resume {tmp_path}/{flags}".split(), capsys)
    s = train.Settings(out=str(tmp_path / "other"))
    with train.Survival(s) as first, train.Survival(s) as second:
        first.claim({})
        with pytest.raises(UserError, match="another run is at work"):
            second.claim({})
    with train.Survival(s) as third, pytest.raises(UserError, match="another run has begun"):
        third.claim({})


def fail(error):
    raise error


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried it")
REMEDIES = ["error: out of memory (", "--forward-rows 4", "--checkpointing"]
ENDS = {  # what happens in step 14: how the process ends, what it says, the newest checkpoint
    "SIGINT": ((signal.raise_signal, signal.SIGINT), 130, ["stopped by SIGINT; last"], "step-14"),
    "SIGTERM": ((signal.raise_signal, signal.SIGTERM), 143, ["stopped by SIGTERM; last"], "step-14"),
    "disk": ((resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, -1)), 1, ["error: ", "File too large"], "step-12"),
    "log": ((resource.setrlimit, resource.RLIMIT_FSIZE, (2500, -1)), 1, ["error: ", "File too large"], "step-12"),
    "GPU": ((fail, GPU), 1, [*REMEDIES, str(GPU)], "step-12"),
    "CPU": ((fail, CPU), 1, [*REMEDIES, str(CPU)], "step-12")}


@pytest.mark.parametrize("what", ENDS)
def test_a_signal_a_full_disk_or_memory_is_one_line_that_says_how_to_go_on(what, whole, tmp_path):
    act, status, expected, newest = ENDS[what]
    out, err = tmp_path / "a run", tmp_path / "err"
    assert end(start(*SHORT, "--out", out, stderr=err, acts=("Training.count", 14, *act))) == status
    said, command = last_line(err.read_text()).split("; go on with: ")
    assert all(part in said for part in [*expected, f"last checkpoint: {out / 'checkpoints' / newest}"]), said
    assert len(list((out / "checkpoints").iterdir())) == 2 and train.checkpoints(out)[0].name == newest
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(outcome(out), whole("lora"))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_batch_moves_nothing(method, kind):
    """Weights, moments, La-LoRA's and AdaLoRA's statistics, omega, averages; LeLoRA does draw its next action."""
    longer = {"weightlora_steps": 9, "adalora_t_final": 2}
    s = tiny.settings(**tiny.POLICIES | longer, method=method, optimizer=kind, weight_decay=0.1)
    allocator, losses = train.allocators.METHODS[method](tiny.Tiny(), s, 12), itertools.count(1)
    allocator.validation_loss = lambda: torch.tensor(1 / next(losses))
    training = tiny.train(tiny.training_of(allocator), tiny.batches(6))
    before, A = tiny.checkpoint(training), allocator.layers[allocator.names[0]].A
    for poison in (lambda: A.sum() * float("nan"), lambda: (A.sum() * 0).sqrt()):  # the loss; its gradient, 0 / 0
        allocator.penalty = lambda *_, poison=poison: poison()
        tiny.train(training, tiny.batches(1), first=7)
    after, counts = tiny.checkpoint(training), r"run\.(bad|steps|total)|policy\.allocations"
    if method == "lelora":
        counts += r"|policy\.(loss_before|reward|choice|current|generator)|run\.vectors\..*"
    assert before.keys() == after.keys() and training.bad.tolist() == [2, 2, 2]
    for name in before:
        assert torch.equal(before[name], after[name]) or re.fullmatch(counts, name), name


@pytest.mark.parametrize("method, log_every", [("lora", 1), ("lelora", 7)])
def test_a_run_that_stays_bad_stops_at_a_good_checkpoint(method, log_every, tmp_path, monkeypatch, capsys):
    """The third loss is NaN, which is skipped; from the ninth on all are: one line with step and checkpoint."""
    criterion, bad, out = train.criterion, iter([0, 0, 1] + 5 * [0] + 8 * [1]), tmp_path / "run"
    monkeypatch.setattr(train, "criterion", lambda *args: criterion(*args) * (float("nan") if next(bad) else 1))
    flags = ["--no-eval-before", "--eval-every", 100, "--log-every", log_every, "--max-bad-steps", 4, "--out", out]
    line = refused(train, ["--method", method, *SHORT, *flags], capsys, status=1)
    newest = train.checkpoints(out)[0]
    assert line.startswith("error: step ") and "4 steps in a row" in line and str(newest) in line, line
    state = load_file(newest / "state.safetensors")
    assert all(t.isfinite().all() for name, t in state.items() if t.is_floating_point() and "mean" not in name)
    monkeypatch.setattr(train, "criterion", criterion)
    train.main(["--resume", str(out)])
    (logged,) = [line for line in lines(out / "metrics.jsonl") if line["step"] == 7 and "loss" in line]
    assert logged["skipped_steps"] == outcome(out)[3]["skipped_steps"] == 1 and logged["loss"] < 20
