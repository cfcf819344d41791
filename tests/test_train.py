"""Whole runs from the command line: the embedded default, every kind of task, a step against plain torch, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
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
    transformers.BertForSequenceClassification(transformers.BertConfig(
        **SMALL, vocab_size=tokenizer_into(root / "bert", *BERT), max_position_embeddings=32, pad_token_id=0,
        num_labels=2)).save_pretrained(root / "bert")
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
        classes, scores, answers = ["sentence\tlabel"], ["sentence\tscore"], []
        for _ in range(n):
            words = random.choice(WORDS, size=random.integers(3, 9))
            y, text = int(random.integers(2)), " ".join(words)
            text += " good" if y else " bad"
            right = str(bool(y)).lower()
            classes.append(f"{text}\t{'yes' if y else 'no'}")
            scores.append(f"{text}\t{y}")
            answers.append({"instruction": f"this is {text} ?", "input": "", "answer": right,
                            "output": f"the {'very ' * (len(text) % 3)}correct answer is {right}"})
        (root / "classes" / f"{name}.tsv").write_text("\n".join(classes) + "\n")
        (root / "scores" / f"{name}.tsv").write_text("\n".join(scores) + "\n")
        (root / "boolq" / f"{'test' if name == 'dev' else name}.json").write_text(json.dumps(answers))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def classes(checkpoints, texts):
    """Flags of the tiny BERT on texts of two classes."""
    return ["--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes",
            "--max-length", 32, "--batch-size", 8]


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


def adapter_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------------------------------------- whole runs


def test_embedded_default_from_the_command_line(tmp_path):
    """No flags, no network: the frozen model is poor on turned digits, LoRA makes it good; eval.py agrees exactly."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    shell = dict(cwd=tmp_path, capture_output=True, text=True, env=environment)
    done = subprocess.run([sys.executable, ROOT / "train.py"], **shell)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["before"]["accuracy"] < 0.5 and result["accuracy"] > 0.9
    assert result["trainable_params"] == dict.fromkeys(("now", "mean", "peak"), 12 * 8 * (64 + 64))
    assert "before training: accuracy 0." in done.stderr and "after training: accuracy 0.9" in done.stderr
    assert "examples/s" in done.stderr and "loss" in done.stderr
    out = tmp_path / result["out"]
    assert {p.name for p in out.iterdir()} == {"run.json", "metrics.jsonl", "ranks.jsonl", "result.json", "adapter",
                                               "checkpoints", "README.md"}
    assert json.loads((out / "result.json").read_text()) == result
    logged = lines(out / "metrics.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < 0.2 * losses[0] and logged[-1]["eval"]["accuracy"] == result["accuracy"]
    ranks = lines(out / "ranks.jsonl")[-1]["ranks"]
    assert ranks == {f"blocks.{i}.{k}": 8 for i in range(6) for k in ("query", "value")}
    again = subprocess.run([sys.executable, ROOT / "eval.py", result["out"]], **shell)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["accuracy"] == result["accuracy"]


@pytest.mark.parametrize("model, task, folder, method", [
    ("bert", "text-classification", "classes", "lora"), ("bert", "text-classification", "classes", "full"),
    ("bert", "text-regression", "scores", "lora"), ("bert", "text-classification", "classes", "bitfit"),
    ("llama", "boolq", "", "lora"), ("llama", "text-classification", "classes", "lora")])
def test_runs_learn_and_are_evaluated_again_identically(model, task, folder, method, checkpoints, texts, tmp_path):
    out = tmp_path / "run"
    result = main("--model", checkpoints / model, "--task", task, "--data", texts / folder, "--method", method,
                  "--out", out, "--epochs", 3, "--batch-size", 8, "--lr", 5e-3, "--rank", 4, "--warmup", 0.1,
                  "--max-length", 32 if model == "bert" else 64)
    headline = data.find_task(task, str(texts / folder)).metrics[0]
    assert result[headline] == evaluation.evaluate_run(out)[headline]
    losses = [line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-2:]) < losses[0]


METHODS = [method for method in train.allocators.METHODS if method not in ("lora", "full", "bitfit")]
PLACES = {"encoder": ("bert", "text-regression", "scores"), "decoder": ("llama", "boolq", ""),
          "vit": (None, "digits-rot90", None)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_every_policy_runs_on_every_kind_of_model(method, place, checkpoints, texts, tmp_path, monkeypatch):
    """The saved adapter on a fresh model computes what the trained model did, and the budget adds up."""
    model, task, folder = PLACES[place]
    own = ["--limit-train", 200, "--limit-eval", 100]
    if model:
        own = ["--model", checkpoints / model, "--data", texts / folder, "--max-length", 32 if model == "bert" else 64]
    trained, save = [], adapter_files.save_adapter
    monkeypatch.setattr(train, "save_adapter", lambda model, *args, **options: (
        trained.append(model), save(model, *args, **options)))
    s = parse(*own, "--task", task, "--method", method, "--out", tmp_path / "run", "--steps", 24, "--batch-size", 8,
              "--rank", 4, "--lr", 5e-3, "--r-min", 1, "--no-eval-before", "--dropout", 0.1)
    result = train.run(s)
    ranks = lines(tmp_path / "run" / "ranks.jsonl")[-1]["ranks"]
    base, _ = evaluation.load(s, data.find_task(task, s.data))
    shapes = {name: base.get_submodule(name).weight.shape for name in ranks}
    assert result["trainable_params"]["now"] == sum(r * sum(shapes[name]) for name, r in ranks.items())
    assert result["trainable_params"]["mean"] <= result["trainable_params"]["peak"] <= result["held_params"] * 3
    adapter_files.load_adapter(base, tmp_path / "run" / "adapter")
    inputs = {"pixels": torch.randn(8, 1, 8, 8)} if place == "vit" else {"tokens": torch.arange(40).view(4, 10)}
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs), trained[0].eval()(**inputs), rtol=1e-3, atol=1e-3)
    if method != "lelora":  # whose saved adapter is the difference to W, of twice the rank of what moved
        held = {name: layer.rank for name, layer in lora.adapters(base).items()}
        assert held == {name: rank for name, rank in ranks.items() if rank}


def test_runs_depend_on_the_seed(classes, tmp_path):
    """That those of one seed are the same is in test_survive.py."""
    for seed in "12":
        main(*classes, "--out", tmp_path / seed, "--steps", 12, "--rank", 2, "--seed", seed)
    one, two = (adapter_of(tmp_path / seed) for seed in "12")
    assert not any(torch.equal(one[key], two[key]) for key in one)


# ---------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("warmup, steps, kind", [(0.1, 50, "linear"), (7, 40, "linear"), (0, 30, "linear"),
                                                 (5, 40, "cosine"), (3, 20, "constant")])
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


def test_however_a_step_is_split_every_label_weighs_the_same(checkpoints, texts, tmp_path):
    """Steps on 12 rows are the same in one batch, in batches of 5, 5 and 2 and in passes of 5 rows; answers differ in
    length, and La-LoRA's Fisher information is of the whole step."""
    flags = ["--model", checkpoints / "llama", "--task", "instructions", "--data", texts / "boolq" / "train.json",
             "--limit-train", 12, "--steps", 4, "--rank", 2, "--lr", 1e-3, "--warmup", 0, "--dropout", 0,
             "--no-eval-before", "--method", "lalora", "--lalora-score", "fisher"]
    ways = {"one": ["--batch-size", 12], "batches": ["--batch-size", 5, "--accumulate", 3],
            "passes": ["--batch-size", 12, "--forward-rows", 5]}
    for name, own in ways.items():
        main(*flags, *own, "--out", tmp_path / name)
    for name in ("batches", "passes"):
        assert_close(adapter_of(tmp_path / name), adapter_of(tmp_path / "one"))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_loop_is_the_plain_one(method, checkpoints, texts, tmp_path):
    """Schedule, decay, clipping and the policy's penalty: the same weights as a loop written out in plain torch."""
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")  # without dropout: its draws depend on the order of calls
    config = tmp_path / "bert" / "config.json"
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config.write_text(json.dumps(json.loads(config.read_text()) | no_dropout))
    flags = ["--model", tmp_path / "bert", "--task", "text-regression", "--data", texts / "scores", "--method", method,
             "--rank", 4, "--steps", 9, "--batch-size", 16, "--lr", 3e-3, "--warmup", 3, "--weight-decay", 0.2,
             "--clip", 0.5, "--dropout", 0, "--max-length", 32, "--no-eval-before", "--adalora-t-init", 1,
             "--adalora-t-final", 2]
    main(*flags, "--out", tmp_path / "run")
    s, task = settled(*flags, "--out", tmp_path / "plain")
    torch.manual_seed(s.seed)
    model, processor = evaluation.load(s, task)
    model.train()
    split = processor.training(data.read(task, s.data), s.max_length)
    model.head.bias.data.fill_(split.labels.mean())  # a new regression head starts at the mean label
    allocator = train.allocators.METHODS[method](model, s, s.steps)
    stacked = allocator.parameters()
    params = [part for p in stacked for part in p.parts]  # every layer's A, B and, of AdaLoRA, g
    params += model.head.requires_grad_().parameters()
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.2)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 3, 9)
    order = data.batches(split.lengths, 16, s.seed, 0) + data.batches(split.lengths, 16, s.seed, 1)
    for step in range(1, 10):
        inputs, labels = data.collate(split, order[step - 1])
        loss = torch.nn.functional.mse_loss(model(**inputs)[:, 0], labels)
        for layer in allocator.layers.values() if method == "adalora" else ():
            for factor in (layer.A, layer.B.T):
                norm = torch.linalg.norm(factor @ factor.T - torch.eye(len(factor)))
                loss = loss + s.adalora_orth * norm / (2 * len(allocator.layers))
        loss.backward()
        lora.gather_gradients(stacked)  # where policies look for them
        allocator.after_backward(step)
        for p in stacked:
            for part, grad in zip(p.parts, p.grad):
                part.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        scheduler.step()
        allocator.after_step(step)
        for p in (*params, *stacked):
            p.grad = None
    adapter_files.save_adapter(model, tmp_path / "plain" / "adapter", "base")
    assert_close(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "plain"))


def test_a_policy_that_never_allocates_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.allocators.LaLora, "after_step", lambda self, step: False)
    assert "never allocated" in refused(train, ["--method", "lalora", "--steps", "3", "--no-eval-before", "--out",
                                                tmp_path / "run", "--limit-eval", "20"], capsys)
    assert not (tmp_path / "run" / "adapter").exists()


def test_lelora_never_trains_on_its_validation_rows(classes, tmp_path, monkeypatch):
    splits, validation = [], train.validation
    monkeypatch.setattr(train, "validation", lambda *args: splits.append(args[2]) or validation(*args))
    with train.Survival(parse(*classes, "--method", "lelora", "--out", tmp_path / "run")) as alive:
        _, batches, task, *_ = train.set_up(alive.s, alive)
    used, aside = ([(row["text"], row["label"]) for row in split.rows] for split in (batches.split, *splits))
    everything = data.read(task, str(classes[5]))
    assert sorted(used + aside) == sorted((row["text"], row["label"]) for row in everything)
    assert len(aside) == 32


@pytest.mark.parametrize("method", ["lora", "adalora", "lalora", "weightlora"])
def test_training_on_8_bit_weights(method, tmp_path):
    """The loss stays near the unquantised model's, and the run's number can be had again."""
    losses = []
    for weights in ("float", "int8"):
        result = main("--method", method, "--limit-train", 200, "--limit-eval", 100, "--steps", 12, "--log-every", 1,
                      "--weights", weights, "--out", tmp_path / weights)
        logged = lines(tmp_path / weights / "metrics.jsonl")
        losses.append(np.mean([line["loss"] for line in logged if "loss" in line]))
    assert abs(losses[1] - losses[0]) < 0.01 * losses[0]
    assert evaluation.evaluate_run(tmp_path / "int8")["accuracy"] == result["accuracy"]
    assert (result["train_rows"], result["eval_rows"]) == (200, 100)


# ---------------------------------------------------------------------------------------------- evaluation


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


def test_untouched_models_are_evaluated(capsys):
    evaluation.main(["vit-digits", "--task", "digits"])
    upright = json.loads(capsys.readouterr().out)["accuracy"]
    evaluation.main(["vit-digits", "--task", "digits-rot90"])
    assert upright > 0.95 and json.loads(capsys.readouterr().out)["accuracy"] < 0.3


# ---------------------------------------------------------------------------------------------- input, good and bad


def test_texts_longer_than_the_models_positions_are_cut(classes, tmp_path, caplog):
    rows = "".join(f"{'the cat ' * n}\t{n % 2}\n" for n in range(1, 60))
    (tmp_path / "long.tsv").write_text("text\tlabel\n" + rows)
    main(*classes[:4], "--data", tmp_path / "long.tsv", "--steps", 3, "--out", tmp_path / "run", "--no-eval-before")
    assert "32 positions" in caplog.text


def refused(program, argv, capsys, status=2):
    """The line in which the main of train.py or eval.py ends, with this status."""
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: program.main([str(a) for a in argv]))
    printed = capsys.readouterr()
    line = printed.err.strip().splitlines()[-1]
    assert "Traceback" not in printed.err and stop.value.code == status, printed.err[-3000:]
    assert line.startswith("error: ") and printed.out == "", line
    return line


# flags and a part of the line that refuses them; malformed models are test_model.py's, malformed data test_data.py's
BAD = """
--lerning-rate 1                            | --lerning-rate
--method lorra                              | lorra
--method no_such.py:Policy                  | no_such.py
--lr fast                                   | fast
--lr nan                                    | --lr: nan: must be from
--dropout 1                                 | --dropout
--limit-train -1                            | --limit-train
--rank 65                                   | 65
--method adalora --rank 48                  | --rank
--r-min 9 --r-max 8                         | --r-min
--targets query,wvalue                      | wvalue
--targets ,                                 | --targets
--shard                                     | torchrun
--dtype int3                                | int3
--device cuda:99                            | cuda:99
--method full --optimizer muon              | muon
--method lelora --weights int8              | --weights int8
--init pissa --weights int8                 | --weights int8
--ranks-shuffled                            | --ranks
--sample-train                              | how many rows
--ranks full                                | ranks.jsonl
--ranks file                                | no ranks in it
--ranks up.json                             | blocks.0.up is no target
--ranks zero.json                           | all ranks are 0
--ranks full --method lalora                | goes with --method lora
--adapter full                              | full
--adapter full --rank 4                     | leave out --rank
--task digit                                | digits
--task boolq                                | boolq
--task npz --data file                      | npz
--model no-such-model                       | no-such-model
--model full                                | config.json
--model some/where --init-weights random    | some/where
--model weightless --task text-classification --data rows.tsv | safetensors
--model {bert} --task text-classification --data empty.tsv | empty
--out file                                  | 'file'
--out file/run                              | 'file/run'
--out full                                  | --out
eval.py nowhere                             | --task
eval.py nowhere --task digits               | nowhere
eval.py {runs}/whole --task cola            | digits
eval.py {runs}/whole --batch-size 0         | --batch-size
eval.py {runs}/whole --device toaster       | toaster
eval.py {runs}/whole --seed 5               | --seed
eval.py                                     | required
eval.py vit-digits --task digits --dtype x  | invalid choice: 'x'
eval.py {runs}/adapter                      | neither adapter/ nor model/
eval.py {runs}/classifier                   | head
eval.py {runs}/lora_A                       | lora_A
""".strip().splitlines()


@pytest.mark.parametrize("flag, value", [("lr", float("nan")), ("lr", -1.0), ("batch_size", 0), ("dropout", 1.0)])
def test_bounds_hold_for_settings_made_in_python(flag, value, tmp_path):
    with pytest.raises(train.UserError, match=f"--{flag.replace('_', '-')} .*must be from"):
        train.run(train.Settings(**{flag: value}, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, whole/, and what is left of it without the tensors that have a word in their names."""
    root = tmp_path_factory.mktemp("runs")
    main("--steps", 5, "--no-eval-before", "--out", root / "whole", "--limit-eval", 50)
    text = (root / "whole" / "run.json").read_text()
    for word in ("adapter", "classifier", "lora_A"):
        shutil.copytree(root / "whole", root / word)
        (root / word / "run.json").write_text(text.replace('"checkpoint"', '"random"'))  # whose head is not there, too
        file = root / word / "adapter" / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if word not in key}, file)
    shutil.rmtree(root / "adapter" / "adapter")
    return root


@pytest.mark.parametrize("row", BAD, ids=[" ".join(row.split("|")[0].split()) for row in BAD])
def test_bad_input_is_one_line_and_status_2(row, runs, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not what you think\n")
    Path("empty.tsv").write_text("")
    Path("up.json").write_text('{"blocks.0.up": 4}')
    Path("zero.json").write_text('{"blocks.0.query": 0}')
    Path("rows.tsv").write_text("text\tlabel\n" + "a cat\tno\na dog\tno\na fish\tyes\nit\tyes\n" * 10)
    for folder in ("full", "weightless"):
        Path(folder).mkdir()
    Path("full/keep.txt").write_text("mine")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoints / "bert" / file, "weightless")
    flags, expected = (part.strip() for part in row.split("|"))
    argv = flags.format(bert=checkpoints / "bert", runs=runs).split()
    program, argv = (evaluation, argv[1:]) if "eval.py" in argv else (train, ["--out", "run", *argv])
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(program, argv, capsys)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
