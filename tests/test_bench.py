"""bench.py's commands on tiny models, its counts against what autograd and torch say, and the fast paths it led to."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench  # noqa: E402
import lora  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from papers import tables  # noqa: E402

SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=90,
             initializer_range=0.2)  # so that the loss depends on everything
CONFIGS = {"roberta": dict(model_type="roberta", max_position_embeddings=70, type_vocab_size=1, **SHAPE),
           "llama": dict(model_type="llama", max_position_embeddings=64, num_key_value_heads=2, **SHAPE),
           "vit": dict(model_type="vit", image_size=16, patch_size=8, num_channels=3, **SHAPE)}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return tmp_path


@pytest.fixture
def roberta(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["roberta"]))
    return tmp_path


def bench_run(capsys, tmp_path, *flags):
    """The result of one command: its last line on stdout; its lines in the file hold the same rows."""
    bench.main([*map(str, flags), "--out", str(tmp_path / "out.jsonl"), "--rank", "4", "--length", "12", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: line[k] for k in row} for line, row in zip(lines, result["rows"], strict=True)] == result["rows"]
    return result


def make(folder, method="lora", **changes):
    """(settings, contender, batches) of one method on the tiny model."""
    b = bench.Bench(**dict(model=str(folder), rank=4, length=12, batch_size=4, device="cpu", methods=[method]) | changes)
    bench.settle(b, "speed")
    with bench.folder_for(b) as changed:
        base, kind = bench.base_model(b, changed)
    return b, bench.contender(b, base, kind, method), bench.batches_for(b, base, kind)


def test_speed(folder, tmp_path, capsys):
    """All kinds of model; with the same weights and batches, PEFT's first loss is ours."""
    methods = ["lora", "lalora", "adalora", "weightlora", "lelora", "dora"]
    result = bench_run(capsys, tmp_path, "speed", "--model", folder, "--methods", ",".join(methods), "--batch-size", 2,
                       "--rounds", 1, "--no-memory", "--fill", 0.7)
    rows = {row["contender"]: row for row in result["rows"]}
    assert [*rows][:8] == ["floor", *methods, "uniform+validation"]
    n = len(rows["floor"]) and rows["lora"]["trainable"]
    for name, row in rows.items():
        assert row["step_ms"] > 0 and row["tokens_per_second"] > 0 and row["mfu"] > 0, name
        if name in methods:
            assert row["policy_percent"] >= 0 and row["to_floor"] > 0
    assert rows["weightlora"]["to_lora"] > 0 and n > rows["floor"]["trainable"]
    if "peft/lora" in rows:
        for name in ("lora", "dora"):
            assert rows[name]["first_loss"] == pytest.approx(rows[f"peft/{name}"]["first_loss"], rel=1e-4)
            assert rows[name]["trainable"] == rows[f"peft/{name}"]["trainable"] and rows[name]["to_peft"] > 0


def test_all_methods_are_known(roberta, tmp_path, capsys):
    result = bench_run(capsys, tmp_path, "speed", "--model", roberta, "--methods", "all", "--rounds", 1, "--no-memory",
                       "--no-peft", "--batch-size", 2)
    assert {*bench.allocators.METHODS} <= {row["contender"] for row in result["rows"]}


def test_a_process_of_its_own(roberta):
    """The memory of one contender is measured in a fresh process: at least the weights, and no imports."""
    b, _, _ = make(roberta, rounds=1)
    row = bench.measure_alone(b, "lora", rank=2)
    assert row["step_ms"] > 0 and row["policy_ms"] >= 0 and 0.1 < row["weights_mb"] < row["peak_mb"] < 200


def test_inference(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    result = bench_run(capsys, tmp_path, "inference", "--model", tmp_path, "--rounds", 1, "--no-memory", "--new-tokens", 4)
    assert [row["variant"] for row in result["rows"]] == list(bench.VARIANTS)
    assert all(row["ttft_ms"] > 0 and row["itl_ms"] > 0 for row in result["rows"])
    b, runner, _ = make(tmp_path)
    base, kind = runner.model, "lm"
    for name in list(lora.adapters(base)):
        lora.detach(base, name)
    torch.manual_seed(0)
    unmerged = bench.variant(b, base, kind, "unmerged")
    torch.manual_seed(0)
    merged = bench.variant(b, base, kind, "merged")
    tokens = torch.randint(5, 90, (2, 10))
    assert not lora.adapters(merged) and (unmerged(tokens) - merged(tokens)).abs().max() < 1e-4
    assert (base.eval()(tokens) - merged(tokens)).abs().max() > 1e-3  # the base model's weights were left alone


def test_memory(roberta, tmp_path, capsys):
    """A row per shape and method; more tokens take more."""
    result = bench_run(capsys, tmp_path, "memory", "--model", roberta, "--methods", "lora", "--no-peft", "--rounds", 1,
                       "--batch-size", 8)
    peaks = {(row["contender"], row["batch"], row["length"]): row["peak_mb"] for row in result["rows"]}
    assert {*peaks} == {(name, *shape) for name in ("floor", "lora") for shape in ((8, 12), (4, 12), (8, 6))}
    assert all(peak > 0.1 for peak in peaks.values())


@pytest.mark.parametrize("flags", [["speed", "--methods", "nothing"], ["speed", "--batch-size", "0"], ["quick"],
                                   ["speed", "--fill", "0.2"], ["inference", "--model", "vit-digits", "--no-memory"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.evaluation.command(lambda: bench.main(flags))
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("method", ["lora", "lalora", "adalora", "weightlora", "lelora", "dora"])
def test_compiled_equals_eager(method, roberta, monkeypatch):
    """20 steps agree, nothing breaks the graph, and only WeightLoRA's rebuild compiles again (no C++ compiler needed)."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager"))
    torch._dynamo.reset()
    losses = []
    for name in (method, f"{method}/compiled"):
        torch.manual_seed(3)
        _, runner, batches = make(roberta, name, methods=[method])
        for i in range(20):
            runner.timed_step(batches[i % 4])
        losses.append(torch.tensor(runner.losses))
    assert ((losses[0] - losses[1]).abs() <= 1e-5 * losses[0].abs()).all()
    assert losses[0][0] != losses[0][4]  # it trains
    assert runner.breaks == 0 and sum(n > 0 for n in runner.compiles[2:]) == (method == "weightlora")
    torch._dynamo.reset()


def test_bfloat16_trains_as_float32_does(roberta):
    curves = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(3)
        _, runner, batches = make(roberta, dtype=dtype)
        for i in range(20):
            runner.timed_step(batches[i % 4])
        curves.append(torch.tensor(runner.losses))
    assert (curves[0] - curves[1]).abs().max() < 0.02 * curves[0].mean()


# ---- the fast paths of model.py


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 7), (1, 7), (2, 1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_product(shape, bias):
    layer = models.Linear(7, 11, bias=bias).requires_grad_(False)
    for x in (torch.randn(shape), torch.randn(*shape[:-2], *shape[:-3:-1]).mT):  # contiguous or not
        x.requires_grad_(True)
        y, expected = layer(x), F.linear(x, layer.weight, layer.bias)
        g = torch.randn_like(y)
        assert (y - expected).abs().max() < 1e-5
        got, wanted = (torch.autograd.grad(out, x, g)[0] for out in (y, expected))
        assert (got - wanted).abs().max() < 1e-5
    assert layer.requires_grad_(True)(x).sum().backward() is None and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    x = torch.ones(1001, 333, requires_grad=True)
    torch.manual_seed(1)
    y = models.dropout(x, p)
    torch.manual_seed(1)
    assert y.equal(models.dropout(x, p))
    zeros = (y == 0).float()
    assert abs(zeros.mean() - p) < 0.005 and (y[y != 0] - 1 / (1 - p)).abs().max() < 1e-6
    columns = zeros[:1000].flatten().view(-1, 4).mean(0)  # each of the 4 numbers that one draw holds
    assert (columns - p).abs().max() < 0.005
    y.sum().backward()
    assert x.grad.equal(y.detach())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "padding"])
def test_plain_attention_equals_the_kernel(groups, masking):
    """The formula that CPUs train with (bfloat16, dropout) and the kernel that they evaluate with."""
    q, k, v = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, groups, 6, 8), torch.randn(2, groups, 6, 8)
    mask = (torch.arange(6) < torch.tensor([[6], [4]]))[:, None, None] if masking == "padding" else None
    trained = models.attention(q, k, v, mask, masking == "causal", 1e-9)  # drops nothing
    with torch.no_grad():
        evaluated = models.attention(q, k, v, mask, masking == "causal", 0.0)
    assert (trained - evaluated).abs().max() < 1e-5


# ---- quality and table


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_sign_flip_equals_scipys_permutation_test(n):
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(n).normal(size=(2, n)) + [[0.6], [0]]
    wanted = stats.permutation_test((x, y), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples",
                                    vectorized=True, n_resamples=np.inf, alternative="two-sided").pvalue
    assert bench.sign_flip(x - y) == pytest.approx(wanted)
    assert bench.sign_flip(np.ones(5)) == 2 / 32 and bench.sign_flip([1, -1]) == 1
    assert abs(bench.sign_flip(np.tile(x - y, 20)) - min(1, wanted)) < 1  # many: drawn, not enumerated


SMALL = ["--limit-train", "64", "--limit-eval", "32", "--epochs", "2", "--eval-every", "1000", "--no-eval-before",
         "--device", "cpu"]


def compare(capsys, tmp_path, *flags):
    """What the command prints: its table's cells as {row: [text]} and its JSON object."""
    bench.main([*flags, "--results", str(tmp_path / "r.jsonl"), *SMALL])
    lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}, json.loads(lines[-1])


def test_quality(tmp_path, capsys, monkeypatch):
    """Two processes at a time; matched budgets; what is there is not made again, what was cut off is."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["quality", "--methods", "lora,weightlora,lora --rank 4 --scaling rslora", "--seeds", "2", "--jobs", "2",
             "--match-budget"]
    cells, about = compare(capsys, tmp_path, *asked)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == len({json.dumps(line["settings"]) for line in lines}) and "peak_memory_mb" in lines[0]
    n = about["rows"]["lora"]["trainable_params"]["mean"]
    assert n == about["rows"]["lora --rank 4 --scaling rslora"]["trainable_params"]["mean"]
    mean = about["rows"]["weightlora"]["trainable_params"]["mean"]
    assert abs(mean / n - 1) <= 0.05  # all matrices in the warm-up, then half of them
    mine = [line["accuracy"] for line in lines if line["settings"].get("method") == "weightlora"
            and line["trainable_params"]["mean"] == mean]
    assert len(mine) == 2 and about["rows"]["weightlora"]["digits-rot90"]["mean"] == pytest.approx(np.mean(mine))
    assert cells["weightlora"][0].startswith(f"{100 * np.mean(mine):.1f} ± {100 * np.std(mine, ddof=1):.1f}") or \
        cells["weightlora"][0].startswith("**")
    assert (tmp_path / "r.md").read_text().startswith("| method | digits-rot90, accuracy |")

    kept = (tmp_path / "r.jsonl").read_bytes()
    monkeypatch.setattr(bench.subprocess, "run", None)  # nothing may be started
    assert compare(capsys, tmp_path, *asked)[1] == about
    (tmp_path / "r.jsonl").write_bytes(kept[:-9])  # the run's folder has the result
    assert compare(capsys, tmp_path, *asked)[1] == about
    assert (tmp_path / "r.jsonl").read_bytes().splitlines()[-1] + b"\n" == kept[len(kept[:-1]) - kept[:-1][::-1].find(b"\n"):]


def test_a_failed_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare(capsys, tmp_path, "quality", "--methods", "lora,lora --rank 4000", "--seeds", "1")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stopped.value.code == 1 and "lower the rank" in next(iter(out["failed"].values()))
    assert out["rows"]["lora"]["digits-rot90"]["seeds"] == 1 and "digits-rot90" not in out["rows"]["lora --rank 4000"]


@pytest.mark.parametrize("flags, message", [
    (["quality", "--task", "cola"], "use --tasks"), (["quality", "--seeds", "0"], "at least 1"),
    (["quality", "--methods", "lora,nothing"], "invalid choice"), (["quality", "--methods", "lora", "--out", "x"], "--out"),
    (["quality", "--methods", "lalora", "--match-budget"], "add lora"), (["quality", "--nonsense", "1"], "unrecognized"),
    (["papers/tables.py", "nothing"], "lalora-table5"),
    (["papers/tables.py", "lalora-table6", "--small"], "no small version")])
def test_refused_comparisons(flags, message, capsys):
    main = (lambda: tables.main(flags[1:])) if flags[0] == "papers/tables.py" else (lambda: bench.main(flags))
    with pytest.raises(SystemExit) as stopped:
        bench.evaluation.command(main)
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in error[-1]


def fake(row, task, seed, value, method="lora", rank=8, metric="accuracy"):
    """(Run, its line in the results)."""
    run = bench.Run(row, task, seed, ["--method", method, "--rank", str(rank), "--model", "roberta-base"], "r.jsonl")
    sizes = dict.fromkeys(("now", "mean", "peak"), 100 * rank)
    return run, {"settings": run.settings, "task": task, metric: value, "trainable_params": sizes, "seconds": 2.0,
                 "peak_memory_mb": 10 + seed}


def test_summary_pairs_each_row_with_uniform_lora_of_its_rank():
    better = [0.5, 0.6, 0.7, 0.8, 0.9]
    made = [fake("LoRA 8", "sst2", i, v) for i, v in enumerate(better)]
    made += [fake("LoRA 4", "sst2", i, v - 0.2, rank=4) for i, v in enumerate(better)]
    made += [fake("ours", "sst2", i, v - 0.1, "lalora", 4) for i, v in enumerate(better)]
    made += [fake("LoRA 8", "rte", i, 0.5) for i in range(4)] + [fake("ours", "rte", 4, None, "lalora", 4)]
    runs, done = [run for run, _ in made], {run.key: line for run, line in made}
    text, about = bench.summarise(runs, done, paper={"ours": {"sst2": "95.1", "average": 90.0}})
    ours = about["rows"]["ours"]
    assert ours["sst2"] == {"mean": pytest.approx(0.6), "std": pytest.approx(np.std(better, ddof=1)), "seeds": 5,
                            "p": 2 / 32}
    assert ours["rte"]["seeds"] == 1 and ours["rte"]["p"] is None
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}
    assert rows["| ours"][:3] == ["60.0 ± 15.8 ↑ (95.1)", "nan", "nan (90.0)"]
    assert rows["| LoRA 8"][:3] == ["**70.0** ± 15.8", "**50.0** ± 0.0", "**57.5** ± 6.5"]
    assert rows["| LoRA 4"][1:3] == ["", ""] and "800" in rows["| LoRA 8"][3]
    losses = [fake("a", "gsm8k", 0, 1.5, metric="loss"), fake("b", "gsm8k", 0, 1.25, "random", metric="loss")]
    text, _ = bench.summarise([run for run, _ in losses], {run.key: line for run, line in losses})
    assert "| b | **1.250** |" in text and "| a | 1.500 |" in text  # less is better, and no percent
    assert "gsm8k, loss" in text


TABLES = json.loads(tables.TABLES.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_papers(name, capsys):
    """Each one's commands are what train.py and bench.py take, each of its rows is there."""
    for small in [[], ["--small"]][:1 + ("small" in TABLES[name])]:
        tables.main([name, *small, "--seeds", "1", "--results", "nowhere.jsonl"])
        out = capsys.readouterr().out
        assert json.loads(out.splitlines()[-1])["table"] == name
        for row in TABLES[name]["rows"]:
            assert row["row"] in out and all(str(v) in out for v in row.get("paper", {}).values()) or small
        for line in out.splitlines():
            words = shlex.split(line)[2:] if line.startswith("python bench.py ") else []
            for command in filter(None, line.removeprefix("python ").split(" && python ") if words else []):
                assert shlex.split(command)[1] in bench.COMMANDS
                train.parser_of(bench.Bench, "").parse_args(shlex.split(command)[2:])


def test_other_evaluations_of_a_run(tmp_path, monkeypatch):
    """A table's columns that the run's own result lacks come from eval.py; parts of a task are in its own result."""
    called = []

    def fake_run(command, **_):
        program, *words = [Path(command[1]).name, *command[2:]]
        called.append(words)
        line = {"task": words[words.index("--task") + 1], "exact_match": 0.25}
        if program == "train.py":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            line |= {"loss": 1.0, "accuracy_boolq": 0.75, "seconds": 1.0, "peak_memory_mb": 2,
                     "trainable_params": dict.fromkeys(("now", "mean", "peak"), 3)}
            (out / "result.json").write_text(json.dumps(line))
        return bench.subprocess.CompletedProcess(command, 0, "noise\n" + json.dumps(line), "")

    monkeypatch.setattr(bench.subprocess, "run", fake_run)
    q = tables.Published(results=str(tmp_path / "r.jsonl"))
    run = bench.Run("a", "metamathqa", 0, ["--model", "gemma-7b"], q.results, ["gsm8k", "boolq", "humaneval"])
    assert bench.make([run], q) == {}
    assert called[0][:2] == ["--model", "gemma-7b"]
    assert called[1:] == [[str(run.out), "--task", "gsm8k"],
                          [str(run.out), "--task", "humaneval", "--samples", str(run.out / "humaneval.jsonl")]]
    text, about = bench.summarise([run], bench.finished(q.results))
    assert about["rows"]["a"]["gsm8k"]["mean"] == 0.25 and about["rows"]["a"]["boolq"]["mean"] == 0.75
    assert "humaneval" not in about["rows"]["a"] and "| a | 25.0 | 75.0 |  |" in text
