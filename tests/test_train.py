"""Whole runs from the command line: the embedded default, every kind of task, a step against plain torch, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

import data
import eval as evaluation
import lora
import train
from extras import adapter_files

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ("the a cat dog likes hates fish and or very much not good bad this is film plot correct answer true "
         "false").split()
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1"), dict(
    pad_token="[PAD]", unk_token="[UNK]")
LLAMA = ["<s>", "<unk>", "</s>"], dict(single="<s> $A"), dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tokenizer_into(folder, special, template, roles):
    """A word-level tokenizer with BERT's or LLaMA's special tokens; its size."""
    folder.mkdir(exist_ok=True)
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"#:.,?!\n'bcdefghijklmnopqrstuvwxyz0123456789"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    used = [(name, number) for name, number in vocabulary.items() if name in template["single"].split()]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template, special_tokens=used)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return len(vocabulary)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of a tiny random BERT and a tiny random LLaMA with tokenizers."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, max_position_embeddings=32,
        vocab_size=tokenizer_into(root / "bert", *BERT))).save_pretrained(root / "bert")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SMALL, vocab_size=tokenizer_into(root / "llama", *LLAMA), num_key_value_heads=2, bos_token_id=0,
        eos_token_id=2)).save_pretrained(root / "llama")
    return root


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of small data sets: texts (two classes by one word), scores, and questions with answers."""
    root, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for kind in ("classes", "scores", "boolq"):
        (root / kind).mkdir()
    for name, n in (("train", 120), ("dev", 40)):
        classes, scores, answers = "sentence\tlabel\n", "sentence\tscore\n", []
        for _ in range(n):
            words = random.choice(WORDS, size=random.integers(3, 9))
            y = int(random.integers(2))
            text, right = " ".join([*words, "good" if y else "bad"]), str(bool(y)).lower()
            classes += f"{text}\t{'yes' if y else 'no'}\n"
            scores += f"{text}\t{y}\n"
            answers.append({"instruction": f"this is {text} ?", "input": "", "answer": right,
                            "output": f"the {'very ' * (len(text) % 3)}correct answer is {right}"})
        (root / "classes" / f"{name}.tsv").write_text(classes)
        (root / "scores" / f"{name}.tsv").write_text(scores)
        (root / "boolq" / f"{'test' if name == 'dev' else name}.json").write_text(json.dumps(answers))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))


def parse(*argv):
    """The settings that train.py makes of its flags."""
    return train.Settings(**vars(train.parser_of(train.Settings, "").parse_args([str(a) for a in argv])))


def main(*argv):
    """Run train.py in this process; the result as a dict."""
    return train.run(parse(*argv))


def settled(*argv):
    """(settings with nothing left open, task)."""
    s = parse(*argv)
    return s, train.settle(s, train.models.find_config(s.model)[0])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_adapters(*runs):
    found, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_embedded_default_from_the_command_line(tmp_path):
    """No flags, no network: the frozen model is poor on turned digits, LoRA makes it good; eval.py agrees exactly."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def program(*argv):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    result, said = program(ROOT / "train.py")
    assert result["before"]["accuracy"] < 0.5 and result["accuracy"] > 0.9
    assert result["trainable_params"] == dict.fromkeys(("now", "mean", "peak"), 12 * 8 * (64 + 64))
    assert "before training: accuracy 0." in said and "examples/s" in said
    out = tmp_path / result["out"]
    assert {p.name for p in out.iterdir()} == {"run.json", "metrics.jsonl", "ranks.jsonl", "result.json", "adapter",
                                               "checkpoints", "README.md"}
    assert json.loads((out / "result.json").read_text()) == result
    logged = lines(out / "metrics.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < 0.2 * losses[0] and logged[-1]["eval"]["accuracy"] == result["accuracy"]
    assert program(ROOT / "eval.py", result["out"])[0]["accuracy"] == result["accuracy"]
    assert program(ROOT / "eval.py", "vit-digits", "--task", "digits")[0]["accuracy"] > 0.95  # not turned, not trained


PLACES = {"encoder": ("bert", "text-regression", "scores"), "decoder": ("llama", "boolq", ""),
          "vit": (None, "digits-rot90", None), "classes": ("bert", "text-classification", "classes"),
          "decoder's classes": ("llama", "text-classification", "classes"), "8 bits": (None, "digits-rot90", None)}
RUNS = [(method, place) for place in PLACES for method in train.allocators.METHODS
        if place in ("encoder", "decoder", "vit") or method in ("lora", "weightlora")]
RUNS.remove(("bitfit", "decoder"))  # has no biases


@pytest.mark.parametrize("method, place", RUNS)
def test_runs_learn_and_what_they_save_is_what_they_trained(method, place, checkpoints, texts, tmp_path, monkeypatch,
                                                            capsys):
    """The saved adapter on a fresh model, or the saved model, computes what was evaluated, and the budget adds up."""
    model, task, folder = PLACES[place]
    own = ["--limit-train", 200, "--limit-eval", 100, "--weights", "int8" if place == "8 bits" else "float"]
    if model:
        own = ["--model", checkpoints / model, "--data", texts / folder, "--max-length", 32 if model == "bert" else 64]
    trained, loop, out = [], train.train, tmp_path / "run"
    monkeypatch.setattr(train, "train", lambda training, *rest: trained.append(training.model) or loop(training, *rest))
    flags = ("--steps 45 --batch-size 8 --rank 4 --lr 5e-3 --warmup 0.1 --r-min 1 --no-eval-before --dropout 0.1 "
             "--lalora-gamma 0.01").split()
    result = main(*own, *flags, "--task", task, "--method", method, "--out", out)
    unread = capsys.readouterr().err.partition("does not read ")[2].partition("\n")[0]
    assert ("--r-min" in unread) != (method in train.READERS["static shapes"])
    assert ("--dropout" in unread) == (method in ("full", "bitfit", "lelora"))
    still = {p.dim() for p in trained[0].parameters() if not getattr(p, "decays", True)}
    assert method not in ("full", "bitfit") or still == {1}  # biases and norms
    losses = [line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-2:]) < losses[0] and ("raise --lalora-gamma" in str(result)) == (method == "lalora")
    *_, task, _, again = evaluation.load_run(out, {})
    assert result[task.metrics[0]] == evaluation.evaluate_run(out)[task.metrics[0]]
    inputs = {"pixels": torch.randn(8, 1, 8, 8)} if not model else {"tokens": torch.arange(40).view(4, 10)}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs), trained[0].eval()(**inputs), rtol=1e-3, atol=1e-3)
    ranks, size = lines(out / "ranks.jsonl")[-1]["ranks"], result["trainable_params"]
    if ranks:  # else all or all biases are trained
        assert size["now"] == sum(r * sum(again.get_submodule(name).weight.shape) for name, r in ranks.items())
    assert size["mean"] <= size["peak"] <= result["held_params"] * 3
    if method != "lelora":  # whose saved adapter is the difference to W, of twice the rank of what moved
        held = {name: layer.rank for name, layer in lora.adapters(again).items()}
        assert held == {name: rank for name, rank in ranks.items() if rank}


@pytest.mark.parametrize("warmup, steps, kind", [(0.1, 50, "linear"), (7, 40, "linear"), (0, 30, "cosine"),
                                                 (3, 20, "constant")])
def test_schedules_equal_transformers(warmup, steps, kind):
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    count = int(warmup) if warmup >= 1 else int(np.ceil(warmup * steps))
    theirs = transformers.get_scheduler(name, optimizer, count, steps)
    s = train.Settings(warmup=warmup, schedule=kind)
    for step in range(steps):
        assert train.schedule(s, step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_papers_warm_up_does_not_outlast_a_short_run(checkpoints, texts, tmp_path):
    main("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--steps", 20, "--batch-size", 4,
         "--rank", 2, "--log-every", 1, "--no-eval-before", "--limit-eval", 4, "--out", tmp_path / "run")
    rates = [line["lr"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert max(rates) == pytest.approx(3e-4) and rates.index(max(rates)) == 2 and rates[-1] < 1e-4


def test_however_a_step_is_split_every_label_weighs_the_same(checkpoints, texts, tmp_path, monkeypatch):
    """Steps on 12 rows are the same in one batch, in batches of 5, 5 and 2 and in passes of 5 rows; answers differ in
    length, a penalty is their mean, and La-LoRA's Fisher information is of the whole step."""
    monkeypatch.setattr(train.allocators.LaLora, "penalty", lambda self, inputs, labels, outputs: outputs.abs().mean())
    flags = ["--model", checkpoints / "llama", "--task", "instructions", "--data", texts / "boolq" / "train.json",
             "--limit-train", 12, "--steps", 4, "--rank", 2, "--lr", 1e-3, "--warmup", 0, "--dropout", 0,
             "--no-eval-before", "--method", "lalora", "--lalora-score", "fisher"]
    ways = {"one": ["--batch-size", 12], "batches": ["--batch-size", 5, "--accumulate", 3],
            "passes": ["--batch-size", 12, "--forward-rows", 5]}
    for name, own in ways.items():
        main(*flags, *own, "--out", tmp_path / name)
    for name in ("batches", "passes"):
        same_adapters(tmp_path / name, tmp_path / "one")


def test_the_loop_is_the_plain_one(checkpoints, texts, tmp_path, monkeypatch):
    """Seed, order, schedule, decay, clipping and a policy's penalty: the same weights as a loop in plain torch."""
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")
    config = tmp_path / "bert" / "config.json"
    config.write_text(config.read_text().replace("0.1", "0.0"))  # no dropout, which depends on the order of calls
    flags = ["--model", tmp_path / "bert", "--task", "text-regression", "--data", texts / "scores", "--seed", 3,
             "--rank", 4, "--steps", 9, "--batch-size", 16, "--lr", 3e-3, "--warmup", 3, "--weight-decay", 0.2,
             "--clip", 0.5, "--dropout", 0, "--max-length", 32, "--no-eval-before"]
    monkeypatch.setattr(train.allocators.Allocator, "penalty", lambda self, *_: sum(
        layer.B.square().sum() for layer in self.layers.values()))
    main(*flags, "--out", tmp_path / "run")
    s, task = settled(*flags, "--out", tmp_path / "plain")
    torch.manual_seed(3)
    model, processor = evaluation.load(s, task)
    split = processor.encoded(data.read(task, s.data), s.max_length)
    model.head.bias.data.fill_(split.labels.mean())  # a new regression head starts at the mean label
    layers = lora.attach(model, {name: 4 for name, _, _ in lora.sites(model, s.targets)}, s.alpha)
    params = [p for layer in layers.values() for p in (layer.A, layer.B)]
    params += model.head.requires_grad_().parameters()
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.2)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 3, 9)
    order = data.batches(split.lengths, 16, 3, 0) + data.batches(split.lengths, 16, 3, 1)
    for indices in order[:9]:
        inputs, labels = data.collate(split, indices)
        loss = torch.nn.functional.mse_loss(model.train()(**inputs)[:, 0], labels)
        for layer in layers.values():
            loss = loss + layer.B.square().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        scheduler.step()
    adapter_files.save_adapter(model, tmp_path / "plain" / "adapter", "base")
    same_adapters(tmp_path / "run", tmp_path / "plain")


def test_a_policy_that_never_allocates_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.allocators.LaLora, "after_step", lambda self, step: False)
    assert "never allocated" in refused(train, ["--method", "lalora", "--steps", "3", "--no-eval-before", "--out",
                                                tmp_path / "run", "--limit-eval", "20"], capsys)
    assert not (tmp_path / "run" / "adapter").exists()


def test_lelora_never_trains_on_its_validation_rows(checkpoints, texts, tmp_path, monkeypatch):
    splits, validation = [], train.validation
    monkeypatch.setattr(train, "validation", lambda *args: splits.append(args[2]) or validation(*args))
    flags = ["--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes",
             "--max-length", 32]
    with train.Survival(parse(*flags, "--method", "lelora", "--out", tmp_path / "run")) as alive:
        _, batches, task, *_ = train.set_up(alive.s, alive)
    used, aside = ([(row["text"], row["label"]) for row in split.rows] for split in (batches.split, *splits))
    assert sorted(used + aside) == sorted((row["text"], row["label"]) for row in data.read(task, str(flags[5])))
    assert len(aside) == 32


def test_generated_answers_are_scored_row_by_row(checkpoints, texts, monkeypatch):
    """The share of right answers, whatever the size of a batch, of a model that always says the same."""
    s, task = settled("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--max-length", 64)
    model, processor = evaluation.load(s, task)
    (split,) = processor.evaluation(s).values()
    said = torch.tensor(processor.tokenizer.encode(["the answer is true"], special=False)[0][0])
    monkeypatch.setattr(evaluation.models, "generate", lambda model, tokens, *rest: said.expand(len(tokens), -1))
    right = np.mean([row["target"] == "true" for row in split.rows])
    assert 0.2 < right < 0.8
    for batch_size in (1, 7, 40):
        result = evaluation.evaluate(model, task, split, batch_size, processor.tokenizer)
        assert result["accuracy"] == pytest.approx(right)


def test_texts_longer_than_the_models_positions_are_cut(checkpoints, tmp_path, caplog):
    rows = "".join(f"{'the cat ' * n}\t{n % 2}\n" for n in range(1, 60))
    (tmp_path / "long.tsv").write_text("text\tlabel\n" + rows)
    main("--model", checkpoints / "bert", "--task", "text-classification", "--data", tmp_path / "long.tsv",
         "--steps", 3, "--out", tmp_path / "run", "--no-eval-before")
    assert "32 positions" in caplog.text


def refused(program, argv, capsys, status=2):
    """The line in which the main of train.py or eval.py ends, with this status."""
    with pytest.raises(SystemExit) as stop:
        evaluation.run_program(lambda: program.main([str(a) for a in argv]))
    printed = capsys.readouterr()
    line = printed.err.strip().splitlines()[-1]
    assert "Traceback" not in printed.err and stop.value.code == status, printed.err[-3000:]
    assert line.startswith("error: ") and printed.out == "", line
    return line


# flags and a part of the line that refuses them; malformed models are test_model.py's, malformed data test_data.py's
BAD = """
--method lorra                              | lorra
--method no_such.py:Policy                  | no_such.py
--rank 65                                   | 65
--lr nan                                    | --lr: nan: must be from
--r-min 9 --r-max 8                         | --r-min
--targets query,wvalue                      | wvalue
--targets ,                                 | --targets
--shard                                     | torchrun
--compile graphs                            | on a GPU
--device cuda:99                            | cuda:99
--method full --optimizer muon              | muon
--method lelora --weights int8              | --weights int8
--sample-train                              | how many rows
--ranks full                                | ranks.jsonl
--ranks file                                | no ranks in it
--ranks up.json                             | blocks.0.up is no target
--ranks zero.json                           | all ranks are 0
--ranks full --method lalora                | goes with --method lora
--adapter full --init pissa --rank 4 --dora | its own: leave out --rank, --init, --dora
--adapter full --targets key --dropout 0    | its own: leave out --dropout, --targets
--adapter full --method full --ranks x       | own: leave out --method, --ranks
--task digit                                | digits
--task boolq                                | boolq
--task npz --data file                      | npz
--model some/where --init-weights random    | some/where
--out file                                  | 'file'
--out full                                  | --out
eval.py nowhere                             | --task
eval.py vit-digits --task digits --device x | device x
eval.py vit-digits --task digits --seed 5   | --seed
eval.py                                     | required
""".strip().splitlines()


@pytest.mark.parametrize("flag, value", [("lr", float("nan")), ("lr", -1.0), ("batch_size", 0), ("dropout", 1.0)])
def test_bounds_hold_for_settings_made_in_python(flag, value, tmp_path):
    with pytest.raises(train.UserError, match=f"--{flag.replace('_', '-')} .*must be from"):
        train.run(train.Settings(**{flag: value}, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", BAD, ids=[" ".join(row.split("|")[0].split()) for row in BAD])
def test_bad_input_is_one_line_and_status_2(row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not what you think\n")
    Path("up.json").write_text('{"blocks.0.up": 4}')
    Path("zero.json").write_text('{"blocks.0.query": 0}')
    Path("full").mkdir()
    Path("full/keep.txt").write_text("mine")
    flags, expected = (part.strip() for part in row.split("|"))
    argv = flags.split()
    program, argv = (evaluation, argv[1:]) if "eval.py" in argv else (train, ["--out", "run", *argv])
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(program, argv, capsys)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
