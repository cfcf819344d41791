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

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import allocators
import eval as evaluation
import train
from test_train import checkpoints, texts  # noqa: F401: fixtures
from model import UserError

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.device_mesh"])
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
# 65 rows in batches of 8: the last one has a single row, so one of two processes has none
VIT = ["--model", "vit-b16", "--init-weights", "random", "--task", "digits", "--limit-train", "65", "--limit-eval", "20",
       "--batch-size", "8", "--steps", "30", "--log-every", "1", "--rank", "2", "--dropout", "0", "--lr", "3e-3", "--r-min", "1",
       "--save-every", "8", "--eval-every", "100", "--no-eval-before", "--weightlora-steps", "6",
       "--weightlora-examples", "0", "--adalora-delta-t", "3"]


def main(argv):
    return train.run(train.Settings(**vars(train.parser_of(train.Settings, "").parse_args([str(a) for a in argv]))))


def resume(out, shard=False):
    saved, _ = evaluation.read_run(out)
    return train.run(train.Settings(**vars(saved) | {"resume": str(out), "out": str(out), "shard": shard}))


def stop_after(steps):
    """Budget.add, made to break off the run after so many steps, saying how many parameters this process holds."""
    add = train.Budget.add

    def stop(budget):
        add(budget)
        if budget.steps == steps:
            held = [getattr(p, "to_local", lambda p=p: p)().numel() for p in budget.allocator.model.parameters()]
            raise KeyboardInterrupt(sum(held))
    return stop


def part_ways(rank):
    """Budget.add, made to move one parameter of process 1 by a little at step 4."""
    add = train.Budget.add

    def move(budget):
        add(budget)
        if budget.steps == 4 and rank == 1:
            next(iter(budget.allocator.layers.values())).A.data[0, 0] += 1e-4
    return move


def child(rank, port, jobs, cache):
    """Process `rank` of 2: do the jobs one after the other, (what, argv or folder, patch of Budget.add or None)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test", RANKS_CACHE=str(cache))
    torch.set_num_threads(1)
    train.models.CONFIGS["vit-b16"].update(SMALL)
    add = train.Budget.add
    with train.processes():
        for what, argv, patch in jobs:
            train.Budget.add = patch[0](*patch[1:]) if patch and patch[0] is stop_after else part_ways(rank) if patch else add
            try:
                resume(*argv) if what == "resume" else main(argv)
            except (KeyboardInterrupt, train.RunError) as error:
                Path(f"{argv[-1]}.{rank}.error").write_text(str(error))


def two_processes(jobs, cache, timeout=900):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [server.Process(target=child, args=(rank, port, jobs, cache)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in both] == [0, 0]  # one that hangs is killed: -9


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(found, expected, rel=1e-5):
    """Losses, gradient norms and budgets to `rel`, ranks and choices exactly, over all steps; and the final metrics."""
    finished = (found / "result.json").exists()  # else it was stopped on purpose
    pairs = list(zip(lines(found / "metrics.jsonl"), lines(expected / "metrics.jsonl"), strict=finished))
    assert len(pairs) >= 7
    for a, b in pairs:
        assert a["step"] == b["step"] and a["trainable_params"] == b["trainable_params"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=rel), a["step"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
    for a, b in zip(lines(found / "ranks.jsonl"), lines(expected / "ranks.jsonl"), strict=finished):
        assert a["ranks"] == b["ranks"] and a.get("location") == b.get("location") and a.get("selected") == b.get("selected")
        assert a.get("omega", {}) == pytest.approx(b.get("omega", {}), rel=1e-4)
    assert not finished or pairs[-1][0]["eval"] == pytest.approx(pairs[-1][1]["eval"], rel=1e-4)


METHODS = list(allocators.METHODS)
VARIANTS = {"pissa-dora": ["--init", "pissa", "--dora"], "lalora-dora": ["--method", "lalora", "--dora", "--lora-plus-ratio", "4"],
            "weightlora-fa": ["--method", "weightlora", "--freeze-a"]}  # A is drawn anew after the warm-up
RUNS = {method: ["--method", method] for method in METHODS} | VARIANTS
SHARDED = [name for name in RUNS if name not in ("full", "bitfit")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, checkpoints, texts):  # noqa: F811
    """A folder of finished runs: one/, two/ and shard/ METHOD, and what became of those that were stopped or disturbed."""
    root = tmp_path_factory.mktemp("runs")
    answers = ["--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--steps", "12", "--batch-size", "3",
               "--accumulate", "2", "--rank", "2", "--max-length", "64", "--dropout", "0", "--log-every", "1", "--warmup", "2",
               "--limit-train", "40", "--limit-eval", "6", "--no-eval-before"]
    answers = [str(a) for a in answers]
    jobs = [("run", [*VIT, *flags, "--out", str(root / "two" / name)], None) for name, flags in RUNS.items()]
    jobs += [("run", [*VIT, *RUNS[name], "--shard", "--out", str(root / "shard" / name)],
              None if name in VARIANTS or allocators.METHODS[name].dynamic else (stop_after, 8)) for name in SHARDED]
    jobs += [("run", [*answers, "--out", str(root / "two" / "answers")], None),
             ("run", [*answers, "--shard", "--out", str(root / "shard" / "answers")], None),
             ("run", [*VIT, "--method", "lora", "--out", str(root / "disturbed")], (part_ways,))]
    kept = [method for method in ("adalora", "lalora", "weightlora+", "lelora")]
    jobs += [("run", [*VIT, "--method", method, "--out", str(root / "two then one" / method)], (stop_after, 17)) for method in kept]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKS_CACHE", str(root / "cache"))
        patch.setattr(train.models, "CONFIGS", train.models.CONFIGS | {"vit-b16": train.models.CONFIGS["vit-b16"] | SMALL})
        for name, flags in RUNS.items():
            main([*VIT, *flags, "--out", root / "one" / name])
        main([*answers, "--out", root / "one" / "answers"])
        for method in kept:
            with pytest.MonkeyPatch.context() as stop, pytest.raises(KeyboardInterrupt):
                stop.setattr(train.Budget, "add", stop_after(17))
                main([*VIT, "--method", method, "--out", root / "one then two" / method])
        jobs += [("resume", [root / "one then two" / method, method == "lalora"], None) for method in kept]
        two_processes(jobs, root / "cache")
        for method in kept:
            resume(root / "two then one" / method)
    return root


@pytest.mark.parametrize("method", [*RUNS, "answers"])
def test_two_processes_do_what_one_does(method, runs):
    assert_same(runs / "two" / method, runs / "one" / method)


@pytest.mark.parametrize("method", SHARDED + ["answers"])
def test_so_do_two_with_sharded_weights(method, runs):
    assert_same(runs / "shard" / method, runs / "one" / method)


def test_each_process_holds_its_share(runs):
    """Of the frozen weights half, of adapters and head all."""
    held = [int((runs / "shard" / f"lora.{rank}.error").read_text()) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.models, "CONFIGS", train.models.CONFIGS | {"vit-b16": train.models.CONFIGS["vit-b16"] | SMALL})
        model = train.models.load("vit-b16", num_labels=10, weights="random")
    frozen = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    trained = sum(p.numel() for p in model.head.parameters()) + 2 * 2 * 2 * (16 + 16)
    assert sum(held) == frozen + 2 * trained and max(held) < 0.55 * frozen + trained


@pytest.mark.parametrize("place", ["one then two", "two then one"])
@pytest.mark.parametrize("method", ["adalora", "lalora", "weightlora+", "lelora"])
def test_checkpoints_go_on_with_another_number_of_processes(method, place, runs):
    assert_same(runs / place / method, runs / "one" / method)


def test_processes_that_part_ways_are_noticed(runs):
    for rank in range(2):
        assert "step 4: the processes no longer hold the same" in (runs / f"disturbed.{rank}.error").read_text()
    assert not (runs / "disturbed" / "adapter").exists()


def crashing_child(rank, port, out, stderr):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    train.models.CONFIGS["vit-b16"].update(SMALL)
    add = train.Budget.add

    def crash(budget):
        add(budget)
        if budget.steps == 11 and rank == 1:
            raise OSError(5, "Input/output error", "/data/shard-1")

    train.Budget.add = crash
    evaluation.command(lambda: train.main([*VIT, "--out", out]))


def test_a_crash_of_one_process_ends_the_run(tmp_path):
    """The one that crashes says why; the other does not wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [server.Process(target=crashing_child, args=(rank, port, str(tmp_path / "run"), str(tmp_path / f"err{rank}")))
            for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [1, 1]
    said = [(tmp_path / f"err{rank}").read_text().strip().splitlines()[-1] for rank in range(2)]
    assert said[1].startswith("error: ") and "/data/shard-1" in said[1]
    assert said[0].startswith("error: another process of this run has ended; go on with: torchrun --nproc-per-node 2 ")
    assert not any("Traceback" in (tmp_path / f"err{rank}").read_text() for rank in range(2))
    assert [path.name for path in train.checkpoints(tmp_path / "run")] == ["step-8"]


def test_torchrun_from_the_command_line_and_an_interruption(tmp_path):
    """One result on stdout; SIGTERM to torchrun ends in a checkpoint of one step, and --resume goes on."""
    flags = ["--limit-train", "64", "--limit-eval", "10", "--batch-size", "4", "--no-eval-before", "--rank", "2"]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    out = tmp_path / "run"
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*program, *flags, "--steps", "3000", "--out", str(out)], stderr=err, env=environment)
    began = time.time()
    while not (out / "ranks.jsonl").exists():
        assert process.poll() is None and time.time() < began + 300, (tmp_path / "err").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    (checkpoint,) = train.checkpoints(out)
    assert (tmp_path / "err").read_text().count("stopped by SIGTERM; go on with: torchrun --nproc-per-node 2 ") == 1
    run = json.loads((out / "run.json").read_text())
    run["settings"]["steps"] = int(checkpoint.name[5:]) + 3  # enough is enough
    (out / "run.json").write_text(json.dumps(run))
    done = subprocess.run([*program, "--resume", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert json.loads(line) == json.loads((out / "result.json").read_text())


def test_sharding_needs_processes_and_adapters(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main(["--shard", "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2 and "torchrun" in capsys.readouterr().err.strip().splitlines()[-1]


def test_survivors_cannot_start_from_sharded_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    for flags in (["--init", "pissa"], ["--dora"]):
        s = train.Settings(**vars(train.parser_of(train.Settings, "").parse_args(
            ["--method", "weightlora+", "--shard", "--targets", "query", "--device", "cpu", "--out", str(tmp_path / "run"), *flags])))
        with pytest.raises(UserError, match="leave out --init and --dora"):
            train.check(s, train.allocators.policy(s.method))


def test_labels_are_counted_as_collated():
    split = evaluation.data.Split("lm", [], [5, 9, 4], tokens=[np.arange(n, dtype=np.int32) for n in (5, 9, 4)], starts=[2, 0, 3])
    for indices in ([0], [0, 1, 2], [2, 1]):
        assert evaluation.data.count_labels(split, indices) == len(evaluation.data.collate(split, indices)[1])
