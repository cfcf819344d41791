"""bench.py's commands on tiny models, the fast paths they led to, statistics, and the papers' tables."""

import csv
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import tiny  # noqa: F401 (which finds the program)
import torch

import bench
import data
import model as models
import train
from extras import report
from papers import inference, tables

SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=90,
             initializer_range=0.2)  # so that the loss depends on everything
CONFIGS = {"roberta": dict(model_type="roberta", max_position_embeddings=70, type_vocab_size=1, **SHAPE),
           "llama": dict(model_type="llama", max_position_embeddings=64, num_key_value_heads=2, **SHAPE),
           "vit": dict(model_type="vit", image_size=16, patch_size=8, num_channels=3, **SHAPE)}


@pytest.fixture
def folder(request, tmp_path):
    """A model's folder with its config.json alone; RoBERTa's unless a test names a family."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[getattr(request, "param", "roberta")]))
    return tmp_path


def bench_run(capsys, main, *flags):
    """The rows of one command: its last line on stdout; the table above has a line for each of them."""
    main([*map(str, flags), "--rank", "4", "--length", "12", "--device", "cpu", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 2
    return rows


@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_speed(folder, capsys):
    """All methods, and one in a file with a penalty of the outputs, on all models; PEFT's first loss is ours."""
    (folder / "mine.py").write_text("from allocators import LeLora\n\n\nclass Mine(LeLora):\n    "
                                    "def penalty(self, inputs, labels, outputs):\n        return outputs.sum()\n")
    methods = [*bench.allocators.METHODS.keys() - {"bitfit"}, "dora", f"{folder}/mine.py:Mine"]  # no biases in a LLaMA
    rows = bench_run(capsys, bench.main, "speed", "--model", folder, "--methods", ",".join(methods), "--batch-size", 2)
    rows = {row["contender"]: row for row in rows}
    assert [*rows][:len(methods) + 2] == ["floor", *methods, "uniform+validation"]
    assert all(row["step_ms"] > 0 and row["tokens_per_second"] > 0 for row in rows.values())
    assert all(rows[name]["policy_percent"] >= 0 and rows[name]["to_floor"] > 0 for name in methods)
    assert rows["weightlora"]["to_lora"] > 0 and rows["lora"]["trainable"] > rows["floor"]["trainable"]
    for name in ("lora", "dora") if "peft/lora" in rows else ():
        assert rows[name]["first_loss"] == pytest.approx(rows[f"peft/{name}"]["first_loss"], rel=1e-4)
        assert rows[name]["trainable"] == rows[f"peft/{name}"]["trainable"] and rows[name]["to_peft"] > 0


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_inference(folder, capsys):
    rows = bench_run(capsys, inference.main, "--model", folder, "--new-tokens", 4)
    assert [row["variant"] for row in rows] == list(inference.VARIANTS)
    assert all(row["ttft_ms"] > 0 and row["itl_ms"] > 0 for row in rows)


def test_memory(folder, capsys):
    """A row per shape and method, measured in a fresh process: at least the weights, and no imports."""
    rows = bench_run(capsys, bench.main, *f"memory --model {folder} --methods lora --no-peft --batch-size 1".split())
    assert [(row["contender"], row["batch"], row["length"]) for row in rows] == [
        (name, 1, length) for length in (12, 6) for name in ("floor", "lora")]
    assert all(row["step_ms"] > 0 and 0.1 < row["weights_mb"] < row["peak_mb"] < 200 for row in rows)


def trained(folder, method="lora", **changes):
    """(losses of 20 steps, contender)."""
    torch.manual_seed(3)
    b = bench.Bench(model=str(folder), rank=4, length=12, batch_size=4, device="cpu", **changes)
    bench.settle(b)
    base, kind = bench.base_model(b)
    runner, batches = bench.contender(b, base, kind, method), bench.batches_for(b, base, kind)
    for i in range(20):
        runner.timed_step(batches[i % 4])
    return torch.tensor(runner.losses), runner


@pytest.mark.parametrize("method", ["floor", "lora", "lalora", "adalora", "weightlora", "lelora", "dora", "peft/lora"])
def test_compiled_equals_eager(method, folder, monkeypatch):
    """20 steps agree, nothing breaks the graph, only WeightLoRA's rebuild compiles again."""
    pytest.importorskip("peft" if "peft" in method else "torch")
    plain, modes = torch.nn.Module.compile, set()  # aot_eager needs no C++
    monkeypatch.setattr(torch.nn.Module, "compile", lambda it, mode: modes.add(mode) or plain(it, backend="aot_eager"))
    torch._dynamo.reset()
    losses, _ = trained(folder, method)
    compiled, runner = trained(folder, method + ("/graphs" if method in ("floor", "lora") else "/compiled"))
    assert ((losses - compiled).abs() <= 1e-5 * losses.abs()).all()
    assert losses[0] != losses[4] and modes == {"reduce-overhead" if method in ("floor", "lora") else None}  # it trains
    graphs, breaks = np.transpose(runner.compiled)
    assert not breaks.any() and np.count_nonzero(graphs[2:]) == (method == "weightlora")
    torch._dynamo.reset()


def test_bfloat16_trains_as_float32_does(folder):
    (exact, _), (rounded, runner) = (trained(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (exact - rounded).abs().max() < 0.02 * exact.mean()
    assert {p.dtype for p in runner.params} == {torch.float32} != {runner.model.embed.weight.dtype}


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    x = torch.ones(1001, 333, requires_grad=True)
    torch.manual_seed(1)
    y = models.dropout(x, p)
    torch.manual_seed(1)
    assert y.equal(models.dropout(x, p)) and (y[y != 0] - 1 / (1 - p)).abs().max() < 1e-6
    columns = (y == 0)[:1000].float().view(-1, 4).mean(0)  # each of the 4 numbers that one draw holds
    assert (columns - p).abs().max() < 0.005 and not models.dropout(x, 1).any()
    y.sum().backward()
    assert x.grad.equal(y.detach())


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_sign_flip_equals_scipys_permutation_test(n):
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(n).normal(size=(2, n)) + [[0.6], [0]]
    wanted = stats.permutation_test((x, y), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples",
                                    vectorized=True, n_resamples=np.inf, alternative="two-sided").pvalue
    assert bench.sign_flip(x - y) == pytest.approx(wanted)
    assert bench.sign_flip(np.ones(5)) == 2 / 32 and bench.sign_flip([.1, .2, -.3]) == 1
    assert bench.sign_flip(np.tile([1.0, -1.0], 20)) == 1 and bench.sign_flip(np.ones(20)) == 2 / 2**20


SMALL = ["--limit-train", "64", "--limit-eval", "32", "--eval-every", "1000", "--no-eval-before", "--device", "cpu"]


def compare(capsys, tmp_path, *flags):
    """The JSON object that the command prints, and what it says."""
    places = ["--results", str(tmp_path / "results" / "r.jsonl"), "--runs", str(tmp_path / "runs")]
    bench.main(["quality", *flags, *places, *SMALL])
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def results(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results" / "r.jsonl").read_text().splitlines()]


def test_quality(tmp_path, capsys, monkeypatch):
    """Two processes at a time; budgets matched at two ranks; what is there is not made again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--methods", "lora,weightlora", "--budgets", "8,16", "--seeds", "2", "--jobs", "2", "--epochs", "2",
             "--match-budget", "--csv", str(tmp_path / "runs.csv"), "--picture", str(tmp_path / "budgets.png")]
    about, said = compare(capsys, tmp_path, *asked)
    rows, lines = about["rows"], results(tmp_path)
    assert len(lines) == len({json.dumps(line["settings"]) for line in lines}) and "peak_memory_mb" in lines[0]
    uniform = ["lora @ rank 8", "lora @ rank 16"]
    assert [row["against"] for row in rows.values()] == [None, None, *uniform]  # although ranks differ
    low, high, *matched = (row["trainable_params"]["mean"] for row in rows.values())
    assert high == 2 * low and matched == pytest.approx([low, high], rel=0.05)  # all, then half of them
    written = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [line["row"] for line in written] == [row for row in rows for _ in range(2)]
    rank, mine = int(written[4]["rank"]), [float(line["accuracy"]) for line in written[4:6]]
    assert rank > 8 and f"weightlora @ rank 8, digits-rot90: rank {rank}, mean budget" in said
    assert mine == [line["accuracy"] for seed in (0, 1) for line in lines
                    if line["seed"] == seed and line["settled"].get("rank") == rank]
    assert rows["weightlora @ rank 8"]["digits-rot90"]["mean"] == pytest.approx(np.mean(mine))
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "results" / "r.jsonl"
    kept = file.read_bytes()
    monkeypatch.setattr(bench.subprocess, "run", None)  # nothing may be started
    file.write_bytes(kept[:-9])  # the run's folder has the result
    assert compare(capsys, tmp_path, *asked)[0] == about
    assert file.read_bytes().splitlines()[-1] == kept.splitlines()[-1]
    shutil.rmtree(tmp_path / "runs")
    assert compare(capsys, tmp_path, *asked, "--no-run")[0] == about  # from the results file alone


@pytest.mark.parametrize("scaling, power", [("nominal", 1), ("rslora", 0.5)])
def test_matching_budgets_takes_the_best_rank_that_works(scaling, power, monkeypatch, capsys):
    """Made-up budgets: half of uniform LoRA's, one that fails above rank 64, one that always fails."""
    budget = {"lora": lambda r: 100 * r, "random": lambda r: 50 * r, "lalora": lambda r: 8 * r if r <= 64 else None,
              "lelora": lambda r: None}
    def make_up(runs, q):
        for run in runs:
            size = budget[run.row](run.s.rank)
            run.line = {"trainable_params": {"mean": size}} if size else None
    monkeypatch.setattr(bench, "make", make_up)
    flags = {row: ["--method", row] + ["--scaling", scaling] * (row != "lelora") for row in budget}
    cells = [bench.Run(row, "digits-rot90", 0, flags.get(row, ["--method", row]), "runs") for row in (*budget, "full")]
    matched = bench.match_budget(cells, None)
    assert [run.s.rank for run in matched[:2]] == [8, 16] and 57 <= matched[2].s.rank <= 64 and matched[-1] is cells[-1]
    assert [run.s.alpha / run.s.rank ** power for run in matched[:3]] == pytest.approx([16 / 8 ** power] * 3, rel=1e-5)
    said = capsys.readouterr().err
    assert "random, digits-rot90: rank 16, mean budget +0.0 %" in said and said.count("no rank tried comes closer") == 2


def test_tuning(tmp_path, capsys):
    asked = ["--methods", "lora", "--steps", "2,12", "--seeds", "1", "--jobs", "2", "--tune", "lr=1e-9,1e-2",
             "--tune-seeds", "1", "--tune-rows", "48", "--split-eval", "--sample-train", "--picture",
             str(tmp_path / "steps.png")]
    with pytest.raises(bench.UserError, match="--metric f1: not measured on digits-rot90, only "):
        compare(capsys, tmp_path, *asked, "--metric", "f1", "--jobs", "1")
    assert len(results(tmp_path)) == 1  # after one run
    (about, _), lines = compare(capsys, tmp_path, *asked), results(tmp_path)
    assert [*about["rows"]] == [*about["chosen"]] == ["lora @ steps 2", "lora @ steps 12"]
    made = sorted((line["seed"], line["settings"]["limit_train"], line["settings"]["eval_half"], line["eval_rows"])
                  for line in lines)
    assert made == [(0, 64, "report", 16)] * 2 + [(1000, 48, "tune", 16)] * 4
    for row, chosen in about["chosen"].items():
        mine = [line for line in lines if line["row"] == row]
        accuracies = {line["settings"]["lr"]: line["accuracy"] for line in mine if line["seed"] == 1000}
        best = "1e-2" if accuracies[1e-2] > accuracies[1e-9] else "1e-9"  # the first of equals
        assert chosen == {"digits-rot90": f"--lr {best} (of 2 runs)"}
        assert [line["settings"]["lr"] for line in mine if line["seed"] == 0] == [float(best)]
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_halves_and_samples_of_rows():
    rows = [{"row": i // 2} for i in range(11)]  # some are equal
    tune, report = data.half(rows, "tune"), data.half(rows, "report")
    assert len(tune) == 5 and sorted(map(id, tune + report)) == sorted(map(id, rows))
    some = [data.drawn(rows, 6, seed)[0] for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and len(set(map(id, some[0]))) == 6
    assert some[0] == sorted(some[0], key=rows.index) and data.drawn(rows, 99, 0)[0] == rows


def test_runs_that_failed_and_results_of_other_input(tmp_path, capsys, caplog):
    asked, ranks = ["--seeds", "1", "--steps", "1", "--methods"], tmp_path / "ranks.json"
    ranks.write_text('{"blocks.0.query": 1}')
    with pytest.raises(SystemExit) as stopped:
        compare(capsys, tmp_path, *asked, f"lora --ranks {ranks},lora --rank 4000")
    out, said = capsys.readouterr()
    about = json.loads(out.splitlines()[-1])
    ((name, message),) = about["failed"].items()
    log = tmp_path / "runs" / f"{name}.stderr.txt"
    assert stopped.value.code == 1 and str(log) in message and "another version" not in said
    assert "lower the rank" in message and "lower the rank" in log.read_text()
    assert ["digits-rot90" in row for row in about["rows"].values()] == [True, False]
    ranks.write_text('{"blocks.0.query": 2}')
    bench.source.source_hash.cache_clear()
    _, said = compare(capsys, tmp_path, *asked, f"lora --ranks {ranks}", "--keep-old")
    assert "taken as they are" in said and len(results(tmp_path)) == 1
    _, said = compare(capsys, tmp_path, *asked, f"lora --ranks {ranks}")
    first, second = results(tmp_path)
    assert "1 of 1 results are of another version of the program, input or device: made again" in said
    assert first["source"] != second["source"] and first["settings"] == second["settings"]
    _, said = compare(capsys, tmp_path, *asked, f"lora --ranks {ranks}")
    assert "another version" not in said and len(results(tmp_path)) == 2
    lines = [json.dumps(line | {"settled": line["settled"] | {"device": "cuda:1"}}) for line in results(tmp_path)]
    (tmp_path / "results" / "r.jsonl").write_text("\n".join([*lines, json.dumps(second | {"seconds": "1"}), "{}"]))
    _, said = compare(capsys, tmp_path, *asked, f"lora --ranks {ranks}")
    assert "program, input or device: made" in said and all(f"line {n}: no finished" in caplog.text for n in (3, 4))


@pytest.mark.parametrize("named, shares", [("GPU-a,3", ["GPU-a", "3", "GPU-a"]), ("1", ["1"] * 3), ("", [""] * 3)])
def test_jobs_share_out_the_gpus_that_are_named(named, shares, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in bench.devices.environments(3)] == shares


@pytest.mark.parametrize("flags, message", [
    ("quality --task cola", "use --methods, --tasks"), ("quality --seeds 0", "--seeds: 0: must be"),
    ("quality --methods 'lora --seed=7'", "use --meth"), ("quality --picture c.txt", "is written"),
    ("quality --rank 2 --budgets 1,2", "leave one"), ("quality --methods lora,nothing", "choose from"),
    ("quality --methods lalora --match-budget", "add lora"), ("quality --csv no/x", "no file can"),
    ("quality --methods 'lora --lr 1' --tune lr=1,2", "'lora --lr 1': its --lr"),
    ("quality --tune lr=1,2 --first-seed 999", "--first-seed 999"), ("quality --tasks no", "no task 'no'"),
    ("quality --tune speed=1,2", "--tune speed=1,2"), ("quality --methods \"lora '\"", "close the quotation"),
    ("quality --tune 'lr=1 lr=2'", "is there twice"), ("quality --tune alpha=much", "invalid float"),
    ("quality --tune rank=1,2 --match-budget", "what --match-b"), ("quality --no-run --results no", "no such fi"),
    ("speed --methods nothing", "choose from"), ("quick", "invalid choice"), ("speed --modes fast", "eager, compiled"),
    ("inference --model vit-digits", "choose a decoder"), ("table nothing", "lalora-table5"),
    ("table weightlora-table3 --small", "no small version")])
def test_what_is_refused(flags, message, capsys):
    program, *rest = shlex.split(flags)
    own = {"inference": inference, "table": tables}.get(program)
    with pytest.raises(SystemExit) as stopped:
        bench.evaluation.run_program(lambda: own.main(rest) if own else bench.main([program, *rest]))
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in error[-1] and "Traceback" not in "".join(error)


def run_with(row, flags, metric, value, task="digits-rot90", seed=0):
    """A run with the line that the results would hold of it."""
    run = bench.Run(row, task, seed, ["--init-weights", "random", "--method", *flags.split()], "runs")
    run.line = {"settings": run.settings, "settled": bench.changed(vars(run.filled())), metric: value, "seconds": 2.0,
                "peak_memory_mb": 10, "trainable_params": dict.fromkeys(("now", "mean", "peak"), 800)}
    return run


@pytest.mark.parametrize("rows, against", [(["lora --lr 1e-3", "lora --lr 5e-3", "lalora --lr 5e-3"], [None, None, 1]),
    (["lora", "lalora --lr 5e-3", "lalora --lr 4e-3", "lora --clip 1"], [None, 0, None, None]),  # lora's lr, too
    (["lalora", "lora --rank 4", "lora --clip 0.5"], [None] * 3),
    (["lora", "lalora --lalora-gamma 2", "adalora", "random", "full", "lora --ranks x"], [None, 0, 0, 0, 0, 0]),
    (["lora --dora", "lora", "lalora --dora", "weightlora --init pissa", "lora --dora --init pissa"],
     [1, None, 0, 1, 0])])
def test_each_row_is_compared_with_the_uniform_lora_that_is_else_the_same(rows, against):
    found = bench.baselines([run_with(row, row, "accuracy", 0.5) for row in rows])
    assert found == {row: rows[i] for row, i in zip(rows, against) if i is not None}


def test_summary():
    """Differences and p are of pairs of seeds, averages of the seeds that all tasks have."""
    lora, lalora = "lora --model roberta-base", "lalora --model roberta-base"
    better = [0.5, 0.6, 0.7, 0.8, 0.9]
    runs = [run_with("LoRA", lora, "accuracy", value, "sst2", i) for i, value in enumerate(better)]
    runs += [run_with("ours", lalora, "accuracy", value - 0.1, "sst2", i) for i, value in enumerate(better)]
    runs += [run_with("LoRA", lora, "accuracy", 0.5, "rte", i) for i in range(4)]
    runs += [run_with("ours", lalora, "accuracy", None, "rte", i) for i in (3, 4)]
    about = bench.summarise(runs, "accuracy")
    about["rows"]["ours"]["trainable_params"]["mean"] = 1000
    rows, text = about["rows"], report.comparison(about)
    assert rows["ours"]["sst2"] == {"mean": pytest.approx(0.6), "std": pytest.approx(np.std(better, ddof=1)),
                                    "seeds": 5, "asked": 5, "difference": pytest.approx(-0.1), "p": 2 / 32}
    assert rows["ours"]["rte"]["seeds"] == 2 and rows["ours"]["rte"]["p"] is None and rows["ours"]["against"] == "LoRA"
    assert "↓ | nan ± nan | nan ± nan (2 of 5 seeds) | 800 / 1,000 / 800 |" in text
    assert "| LoRA (+25% parameters) |\n" in text
    assert "| LoRA | **70.0** ± 15.8 | **50.0** ± 0.0 | **57.5** ± 6.5 (4 of 5 seeds) | 800 |" in text
    runs = [run_with(method, f"{method} --model llama2-7b", name, value, task)
            for task, name, values in (("sst2", "accuracy", (0.5, 0.25)), ("gsm8k", "loss", (1.5, 1.25)))
            for method, value in zip(("lora", "random"), values)]
    text = report.comparison(bench.summarise(runs))  # of losses less is better, and they are no percent
    assert "| method | sst2, accuracy | gsm8k, loss | trainable" in text  # and no average
    assert "| lora | **50.0** | 1.500 | 800 |" in text and "| random | 25.0 | **1.250** | 800 |" in text


TABLES = json.loads(tables.TABLES.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_papers(name, capsys):
    for small in [[], ["--small"]][:1 + ("small" in TABLES[name])]:
        tables.main([name, *small, "--seeds", "1", "--results", "nowhere.jsonl"])
        out = capsys.readouterr().out
        assert json.loads(out.splitlines()[-1])["table"] == name
        for row in TABLES[name]["rows"]:
            assert row["row"] in out and all(str(v) in out for v in row.get("paper", {}).values())
        for program, flags in re.findall(r"python (bench\.py \w+|papers/inference\.py) ([^&\n]*)", out):
            settings = inference.Latency if "inference" in program else bench.Bench
            train.parser_of(settings, "").parse_args(shlex.split(flags))
            assert "inference" in program or program.split()[1] in bench.COMMANDS


def test_other_evaluations_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tables.ROOT)
    train_on, code = ("papers/tasks.py:" + name for name in ("metamathqa", "humaneval"))
    run = tables.Run("a", train_on, 0, ["--model", "gemma-7b"], tmp_path, ["gsm8k", "boolq", code])
    run.out.mkdir()
    (run.out / "run.json").write_text(json.dumps({"settings": {"rank": 8, "out": str(run.out)}}))
    (run.out / "result.json").write_text(json.dumps({
        "loss": 1.0, "accuracy_boolq": 0.75, "seconds": 1.0, "peak_memory_mb": 2,
        "trainable_params": {"now": 3, "mean": 3, "peak": 3}}))
    called, printed = [], 'noise\n{"exact_match": 0.25}'
    monkeypatch.setattr(bench, "start", lambda words, env: called.append(words) or printed)
    assert bench.make([run], tables.Published(run=True, results=str(tmp_path / "r.jsonl"), runs=str(tmp_path))) == {}
    assert called == [["eval.py", str(run.out), "--task", "gsm8k"],
                      ["eval.py", str(run.out), "--task", code, "--samples", str(run.out / "humaneval.jsonl")]]
    about = bench.summarise([run])
    assert about["rows"]["a"]["gsm8k"]["mean"] == 0.25 and about["rows"]["a"]["boolq"]["mean"] == 0.75
    assert code not in about["rows"]["a"] and "| a | 25.0 | 75.0 |  |" in report.comparison(about)
