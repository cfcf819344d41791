"""More than one process: the same numbers as with one, for every method, sharded or not; nobody is left waiting."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import ROOT, checkpoints, lines, main, parse, texts  # noqa: F401: two are fixtures
from tiny import interrupted_after, refused

import allocators
import eval as evaluation
import train
from model import UserError

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.device_mesh"])
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
             patch_size=4)
LONG = 3600  # seconds, for what takes minutes on a machine that is not busy
# 65 rows in batches of 8: the last one has a single row, so one of two processes has none
VIT = ("--model vit-b16 --init-weights random --task digits --limit-train 65 --limit-eval 20 --batch-size 8 --steps 30 "
       "--log-every 1 --rank 2 --dropout 0 --lr 3e-3 --r-min 1 --save-every 8 --eval-every 100 --no-eval-before "
       "--weightlora-steps 6 --weightlora-examples 0 --credit-examples 0 --adalora-delta-t 3").split()


def again(out, **changes):
    """The settings of a run that goes on."""
    saved, _ = evaluation.read_run(out)
    return train.Settings(**vars(saved) | {"resume": str(out), "out": str(out)} | changes)


def disturbed(count, rank, what, at):
    """Training.count of this process, with what happens in step `at`."""
    def call(training, *args):
        count(training, *args)
        if training.steps == at and what == "stop":  # saying how many parameters this process holds
            held = [getattr(p, "to_local", lambda p=p: p)().numel() for p in training.allocator.model.parameters()]
            raise KeyboardInterrupt(sum(held))
        if training.steps == at and rank == 1 and what == "crash":
            raise OSError(5, "Input/output error", "/data/shard-1")
        if training.steps == at and rank == 1 and what == "part ways":
            next(iter(training.allocator.layers.values())).A.data[0, 0] += 1e-4
    return call


def join(rank, port, cache):
    """Make this fresh process number `rank` of the two that torchrun would start."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1", RANKS_CACHE=str(cache), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    train.models.CONFIGS["vit-b16"].update(SMALL)


def jobs_of(rank, port, cache, jobs):
    """Do the jobs one after the other: (settings of a run, what disturbs it and when)."""
    join(rank, port, cache)
    count = train.Training.count
    with train.processes():
        for s, what, at in jobs:
            train.Training.count = disturbed(count, rank, what, at)
            try:
                train.run(s)
            except (KeyboardInterrupt, UserError) as error:
                Path(f"{s.out}.{rank}.error").write_text(str(error))


def command_line(rank, port, cache, argv, stderr):
    """train.py as it is started, but for a crash of process 1."""
    os.dup2(os.open(f"{stderr}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    join(rank, port, cache)
    train.Training.count = disturbed(train.Training.count, rank, "crash", 11)
    evaluation.run_program(lambda: train.main(argv))


def two_processes(target, cache, *args):
    """Exit statuses of two processes that call target(rank, port, cache, *args)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [server.Process(target=target, args=(rank, port, cache, *args)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(LONG)
        process.kill()  # one that hangs ends with -9
        process.join()
    return [process.exitcode for process in both]


def assert_same(found, expected):
    """Losses, gradient norms and budgets nearly, ranks and choices exactly, over all steps; and the final metrics."""
    finished = (found / "result.json").exists()  # else it was stopped on purpose
    pairs = list(zip(lines(found / "metrics.jsonl"), lines(expected / "metrics.jsonl"), strict=finished))
    assert len(pairs) >= 7
    for a, b in pairs:
        assert a["step"] == b["step"] and a["trainable_params"] == b["trainable_params"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
    for a, b in zip(lines(found / "ranks.jsonl"), lines(expected / "ranks.jsonl"), strict=finished):
        assert all(a.get(key) == b.get(key) for key in ("ranks", "location", "selected"))
        assert a.get("omega", {}) == pytest.approx(b.get("omega", {}), rel=1e-4)
    assert not finished or pairs[-1][0]["eval"] == pytest.approx(pairs[-1][1]["eval"], rel=1e-4)


VARIANTS = {"pissa-dora": "--init pissa --dora", "lalora-dora": "--method lalora --dora --lora-plus-ratio 4",
            "lalora-muon": "--method lalora --optimizer muon",
            "adalora-sgd": "--method adalora --optimizer sgd --forward-rows 3",
            "weightlora-fa": "--method weightlora --freeze-a",  # A is drawn anew after the warm-up
            "weightlora+-pissa": "--method weightlora+ --init pissa", "dropout": "--dropout 0.3"}
RUNS = {method: f"--method {method}" for method in allocators.METHODS} | VARIANTS
SHARDED = [name for name in RUNS if name not in ("full", "bitfit", "weightlora+-pissa", "dropout")]
KEPT = ["adalora", "lalora", "weightlora+", "lelora"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, checkpoints, texts):  # noqa: F811
    """Finished runs: one/, two/ and shard/ METHOD, and what became of those that were stopped or disturbed."""
    root = tmp_path_factory.mktemp("runs")
    answers = ["--model", checkpoints / "llama", "--task", "boolq", "--data", texts]
    answers += ("--steps 12 --batch-size 3 --accumulate 2 --rank 2 --max-length 64 --dropout 0 --log-every 1 "
                "--warmup 2 --limit-train 40 --limit-eval 6 --no-eval-before").split()

    def job(place, name, argv, what="", at=0):
        return parse(*argv, "--out", root / place / name), what, at

    whole = {name: [*VIT, *flags.split()] for name, flags in RUNS.items()} | {"answers": answers}
    jobs = [job("two", name, argv) for name, argv in whole.items()]
    for name in [*SHARDED, "answers"]:
        to_the_end = name not in allocators.METHODS or allocators.METHODS[name].dynamic
        jobs.append(job("shard", name, [*whole[name], "--shard"], "" if to_the_end else "stop", 8))
    jobs.append(job("disturbed", "lora", VIT, "part ways", 4))
    jobs += [job("two then one", method, whole[method], "stop", 17) for method in KEPT]
    jobs.append(job("two then two", "dropout", whole["dropout"], "stop", 17))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKS_CACHE", str(root / "cache"))
        patch.setitem(train.models.CONFIGS, "vit-b16", train.models.CONFIGS["vit-b16"] | SMALL)
        for name, argv in whole.items():
            main(*argv, "--out", root / "one" / name)
        for method in KEPT:
            with interrupted_after(17):
                main(*whole[method], "--out", root / "one then two" / method)
            jobs.append((again(root / "one then two" / method, shard=method == "lalora"), "", 0))
        assert two_processes(jobs_of, root / "cache", jobs) == [0, 0]
        assert two_processes(jobs_of, root / "cache", [(again(root / "two then two" / "dropout"), "", 0)]) == [0, 0]
        for method in KEPT:
            train.run(again(root / "two then one" / method))
    return root


PLACES = {"two": [*RUNS, "answers"], "shard": [*SHARDED, "answers"], "one then two": KEPT, "two then one": KEPT,
          "two then two": ["dropout"]}  # which each process draws for itself


@pytest.mark.parametrize("place, method", [(place, method) for place in PLACES for method in PLACES[place]])
def test_two_processes_do_what_one_does(place, method, runs):
    """With sharded weights, too, and when the number of processes changes at a checkpoint."""
    assert_same(runs / place / method, runs / ("two" if method == "dropout" else "one") / method)


def test_each_process_holds_its_share(runs, monkeypatch):
    monkeypatch.setitem(train.models.CONFIGS, "vit-b16", train.models.CONFIGS["vit-b16"] | SMALL)
    held = [int((runs / "shard" / f"lora.{rank}.error").read_text()) for rank in range(2)]
    model = train.models.load("vit-b16", num_labels=10, weights="random")
    frozen = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    trained = sum(p.numel() for p in model.head.parameters()) + 2 * 2 * 2 * (16 + 16)
    assert sum(held) == frozen + 2 * trained and max(held) < 0.55 * frozen + trained


def test_processes_that_part_ways_are_noticed(runs):
    """All say which tensor differs; to go on from a checkpoint is not offered."""
    said = [(runs / "disturbed" / f"lora.{rank}.error").read_text() for rank in range(2)]
    assert said == ["step 4: the processes no longer hold the same run.moving.0: start again"] * 2
    assert not (runs / "disturbed" / "lora" / "adapter").exists()


def test_a_crash_of_one_process_ends_the_run(tmp_path):
    """The one that crashes says why; the other does not wait for it."""
    argv = [*VIT, "--out", str(tmp_path / "run")]
    assert two_processes(command_line, tmp_path / "cache", argv, tmp_path / "err") == [1, 1]
    other, crashed = ((tmp_path / f"err{rank}").read_text().strip().splitlines()[-1] for rank in range(2))
    assert crashed.startswith("error: ") and "/data/shard-1" in crashed
    assert other.startswith("error: another process of this run has ended; ")
    assert "; go on with: torchrun --nproc-per-node 2 " in other
    assert [path.name for path in train.checkpoints(tmp_path / "run")] == ["step-8"]


def test_torchrun_from_the_command_line_and_an_interruption(tmp_path):
    """One result on stdout; SIGTERM to torchrun ends in a checkpoint of one step, and --resume goes on."""
    flags = "--limit-train 64 --limit-eval 10 --batch-size 4 --no-eval-before --rank 2 --steps 1000000".split()
    program = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(), f"{ROOT}/train.py"]
    environment, out = dict(os.environ, OMP_NUM_THREADS="1"), tmp_path / "run"
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*program, *flags, "--out", str(out)], stderr=err, env=environment)
    began = time.time()
    while not (out / "ranks.jsonl").exists():
        assert process.poll() is None and time.time() < began + LONG, (tmp_path / "err").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) != 0
    (checkpoint,) = train.checkpoints(out)
    said = (tmp_path / "err").read_text()
    assert said.count(f"by SIGTERM; last checkpoint: {checkpoint}; go on with: torchrun --nproc-per-node 2 ") == 1
    run = json.loads((out / "run.json").read_text())
    run["settings"]["steps"] = int(checkpoint.name[5:]) + 3  # enough is enough
    (out / "run.json").write_text(json.dumps(run))
    done = subprocess.run([*program, "--resume", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert json.loads(line) == json.loads((out / "result.json").read_text())


def test_survivors_cannot_start_from_sharded_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "process_and_count", lambda: (0, 2))
    s = parse("--method", "weightlora+", "--shard", "--dora", "--out", tmp_path / "run")
    with refused("leave out --init and --dora"):
        train.check(s, allocators.policy(s.method))
