"""Whole runs from the command line: the embedded default, every kind of task, bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import eval as evaluation
import lora
import train
from tiny import interrupted_after

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "the a cat dog likes hates fish and or very much not good bad this is film plot correct answer true false".split()


def tokenizer_into(folder, special):
    """A word-level tokenizer with BERT's or LLaMA's special tokens."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if special == "bert" else ["<unk>", "<s>", "</s>"]
    characters = list("#:.,?!\n'") + list("abcdefghijklmnopqrstuvwxyz0123456789")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(names + WORDS + characters))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names[special == "bert"]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1") if special == "bert" else dict(single="<s> $A")
    tokens = [(name, vocabulary[name]) for name in (("[CLS]", "[SEP]") if special == "bert" else ("<s>",))]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template, special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = (dict(pad_token="[PAD]", unk_token="[UNK]") if special == "bert"
             else dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return len(vocabulary)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of a tiny random BERT and a tiny random LLaMA with tokenizers."""
    root = tmp_path_factory.mktemp("checkpoints")
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    torch.manual_seed(0)
    for name in ("bert", "llama"):
        (root / name).mkdir()
        size = tokenizer_into(root / name, name)
        if name == "bert":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(
                **small, vocab_size=size, max_position_embeddings=32, pad_token_id=0, num_labels=2))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                **small, vocab_size=size, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of small data sets: texts (two classes by one word), scores, and questions with answers."""
    root, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)

    def sentence():
        return " ".join(random.choice(WORDS, size=random.integers(3, 9)))

    for name, n in (("train", 120), ("dev", 40)):
        rows = [(sentence(), int(random.integers(2))) for _ in range(n)]
        for kind in ("classes", "scores"):
            (root / kind).mkdir(exist_ok=True)
            lines = [f"{text} {'good' if y else 'bad'}\t{'yes' if kind == 'classes' and y else 'no' if kind == 'classes' else y}"
                     for text, y in rows]
            header = "sentence\tlabel" if kind == "classes" else "sentence\tscore"
            (root / kind / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n")
        (root / "boolq").mkdir(exist_ok=True)
        answers = [{"instruction": f"this is {text} {'good' if y else 'bad'} ?", "input": "", "answer": "true" if y else "false",
                    "output": f"the {'very ' * (len(text) % 3)}correct answer is {'true' if y else 'false'}"} for text, y in rows]
        (root / "boolq" / f"{'test' if name == 'dev' else name}.json").write_text(json.dumps(answers))
    return root


def main(*argv):
    """Run train.py in this process; the result as a dict."""
    return train.run(parse(*argv))


def parse(*argv):
    return train.Settings(**vars(train.parser_of(train.Settings, "").parse_args([str(a) for a in argv])))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- the embedded default


def test_embedded_default_from_the_command_line(tmp_path):
    """No flags, no network: the frozen model is poor on turned digits, LoRA makes it good; eval.py agrees exactly."""
    shell = dict(cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1",
                                                                    "HOME": str(tmp_path)})
    done = subprocess.run([sys.executable, ROOT / "train.py"], **shell)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["before"]["accuracy"] < 0.5 and result["accuracy"] > 0.9
    assert result["trainable_params"] == dict.fromkeys(("now", "mean", "peak"), 12 * 8 * (64 + 64))
    assert "before training: accuracy 0." in done.stderr and "after training: accuracy 0.9" in done.stderr
    assert "examples/s" in done.stderr and "loss" in done.stderr
    out = tmp_path / result["out"]
    assert {p.name for p in out.iterdir()} == {"run.json", "metrics.jsonl", "ranks.jsonl", "result.json", "adapter", "checkpoints",
                                            "README.md"}
    assert json.loads((out / "result.json").read_text()) == result
    logged = lines(out / "metrics.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < 0.2 * losses[0] and logged[-1]["eval"]["accuracy"] == result["accuracy"]
    assert lines(out / "ranks.jsonl")[-1]["ranks"] == {f"blocks.{i}.{k}": 8 for i in range(6) for k in ("query", "value")}
    again = subprocess.run([sys.executable, ROOT / "eval.py", result["out"]], **shell)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["accuracy"] == result["accuracy"]


def test_help_is_complete_and_grouped():
    for program in ("train.py", "eval.py"):
        done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        if program == "train.py":
            assert all("--" + f.replace("_", "-") in done.stdout for f in train.Settings.__dataclass_fields__)


# ---------------------------------------------------------------------------------------------- every kind of task

RUNS = [("bert", "text-classification", "classes", "lora"), ("bert", "text-classification", "classes", "full"),
        ("bert", "text-regression", "scores", "lora"), ("bert", "text-classification", "classes", "bitfit"),
        ("llama", "boolq", "", "lora"), ("llama", "text-classification", "classes", "lora"),
        ("llama", "instructions", "boolq/train.json", "full")]


@pytest.mark.parametrize("model, task, folder, method", RUNS)
def test_runs_learn_and_are_evaluated_again_identically(model, task, folder, method, checkpoints, texts, tmp_path):
    result = main("--model", checkpoints / model, "--task", task, "--data", texts / folder, "--method", method, "--out",
                  tmp_path / "run", "--epochs", 3, "--batch-size", 8, "--lr", 5e-3, "--rank", 4, "--max-length", 32
                  if model == "bert" else 64, "--warmup", 0.1)
    headline = data.find_task(task, str(texts / folder)).metrics[0]
    assert result[headline] == evaluation.evaluate_run(tmp_path / "run")[headline]
    losses = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-2:]) < losses[0]
    assert (tmp_path / "run" / ("adapter" if method == "lora" else "model")).is_dir()
    if method != "lora":  # a complete checkpoint, for transformers and for here
        loaded = transformers.AutoModelForSequenceClassification if model == "bert" else transformers.AutoModelForCausalLM
        assert loaded.from_pretrained(tmp_path / "run" / "model").num_parameters() > 0
        encoding = tokenizers.Tokenizer.from_file(str(tmp_path / "run" / "model" / "tokenizer.json")).encode("the cat")
        assert len(encoding.ids) > 2


METHODS = ["linear-decay", "attention-heavy", "empirical", "adalora", "lalora", "weightlora", "weightlora+", "random",
           "lelora", "credit"]
PLACES = {"encoder": ("bert", "text-regression", "scores"), "decoder": ("llama", "boolq", ""), "vit": (None, "digits-rot90", None)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_every_policy_runs_on_every_kind_of_model(method, place, checkpoints, texts, tmp_path, monkeypatch):
    """The saved adapter on a fresh model gives the number that the trained model itself gave, and the budget adds up."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    model, task, folder = PLACES[place]
    own = ["--model", checkpoints / model, "--data", texts / folder] if model else ["--limit-train", 200, "--limit-eval", 100]
    trained = {}
    save = lora.save_adapter

    def measure_and_save(model, *args, **options):
        loaded = data.read(data.find_task(task, s.data), s.data, data.find_task(task, s.data).eval_splits[0], s.limit_eval)
        _, encoder = evaluation.load(s, data.find_task(task, s.data))
        split = data.encode(encoder.task, loaded, encoder.tokenizer, None, encoder.image)
        inputs, _ = data.collate(split, list(range(16)))
        with torch.no_grad():
            trained["logits"], trained["inputs"] = evaluation.logits(model, inputs), inputs
        save(model, *args, **options)

    monkeypatch.setattr(lora, "save_adapter", measure_and_save)
    s = parse(*own, "--task", task, "--method", method, "--out", tmp_path / "run", "--steps", 24, "--batch-size", 8, "--rank", 4,
              "--lr", 5e-3, "--max-length", 32 if model == "bert" else 64, "--r-min", 1, "--no-eval-before", "--dropout", 0.1)
    result = train.run(s)
    ranks = lines(tmp_path / "run" / "ranks.jsonl")
    base, _ = evaluation.load(s, data.find_task(task, s.data))
    shapes = {name: base.get_submodule(name).weight.shape for name in ranks[-1]["ranks"]}
    assert result["trainable_params"]["now"] == sum(r * sum(shapes[n]) for n, r in ranks[-1]["ranks"].items())
    assert result["trainable_params"]["mean"] <= result["trainable_params"]["peak"] <= result["held_params"] * 3
    lora.load_adapter(base, tmp_path / "run" / "adapter")
    with torch.no_grad():
        again = evaluation.logits(base, trained["inputs"])
    torch.testing.assert_close(again, trained["logits"], rtol=1e-3, atol=1e-3)
    if method != "lelora":  # whose saved adapter is the difference to W, of twice the rank of what moved
        assert {n: layer.rank for n, layer in lora.adapters(base).items()} == {n: r for n, r in ranks[-1]["ranks"].items() if r}
    headline = data.find_task(task, s.data).metrics[0]
    assert evaluation.evaluate_run(tmp_path / "run")[headline] == pytest.approx(result[headline], nan_ok=True)


class Waits(TorchDispatchMode):
    """Counts the operations that make a GPU's host wait: reading a number, or sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found, self.watching = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
                                       torch.ops.aten.masked_select, torch.ops.aten.equal, torch.ops.aten._unique2):
            self.found.append(str(function))
        if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            self.found += [str(function) for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "linear-decay", "adalora", "lalora", "weightlora", "lelora"])
def test_steps_between_logs_never_wait_for_the_device(method, tmp_path, monkeypatch):
    """Steps 11 to 19 log nothing; batches are made on the host, and the optimizer keeps its own count there on a CPU."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    waits, add, step_of = Waits(), train.Budget.add, torch.optim.AdamW.step
    collate = data.collate

    def watched(budget):
        add(budget)
        if budget.steps == 11:
            waits.__enter__()
        if budget.steps == 19:
            waits.__exit__(None, None, None)
        waits.watching = 11 <= budget.steps < 19

    def on_the_host(function):
        def call(*args, **options):
            before, waits.watching = waits.watching, False
            with torch._C._DisableTorchDispatch():
                result = function(*args, **options)
            waits.watching = before
            return result
        return call

    def reading(name, plain):  # these are not dispatched on a CPU
        def call(tensor, *args, **options):
            if waits.watching:
                waits.found.append(name)
            return plain(tensor, *args, **options)
        return call

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, reading(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(train.Budget, "add", watched)
    monkeypatch.setattr(data, "collate", on_the_host(collate))
    monkeypatch.setattr(torch.optim.AdamW, "step", on_the_host(step_of))
    main("--method", method, "--limit-train", 160, "--limit-eval", 20, "--steps", 22, "--batch-size", 8, "--no-eval-before",
         "--eval-every", 100, "--out", tmp_path / "run", "--adalora-delta-t", 2)
    assert waits.found == []


def test_a_policy_that_never_allocates_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.allocators.LaLora, "after_step", lambda self, step: False)
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main(["--method", "lalora", "--steps", "3", "--no-eval-before", "--out",
                                               str(tmp_path / "run"), "--limit-eval", "20"]))
    assert stop.value.code == 2 and "never allocated" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "adapter").exists()


def test_lelora_never_trains_on_its_validation_rows(checkpoints, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    splits, trained, collate, encode = [], set(), data.collate, data.Processor.training

    def remember(self, rows, max_length):
        splits.append(encode(self, rows, max_length))
        return splits[-1]

    def watch(split, indices, *rest, **options):
        if split is splits[0]:
            trained.update(indices)
        return collate(split, indices, *rest, **options)

    monkeypatch.setattr(data.Processor, "training", remember)
    monkeypatch.setattr(data, "collate", watch)
    main("--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes", "--method", "lelora",
         "--out", tmp_path / "run", "--epochs", 2, "--batch-size", 8, "--rank", 4, "--max-length", 32, "--no-eval-before")
    training, held = ([(row["text"], row["label"]) for row in split.rows] for split in splits)
    everything = data.read(data.find_task("text-classification", str(texts / "classes")), str(texts / "classes"))
    assert sorted(training + held) == sorted((row["text"], row["label"]) for row in everything)
    assert len(held) == 32 and trained == set(range(len(everything) - 32))


def test_runs_repeat_to_the_bit_and_depend_on_the_seed(checkpoints, texts, tmp_path):
    files = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        main("--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes", "--out",
             tmp_path / out, "--steps", 12, "--batch-size", 8, "--rank", 2, "--seed", seed, "--max-length", 32)
        files.append(load_file(tmp_path / out / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not all(torch.equal(files[0][key], files[2][key]) for key in files[0])


@pytest.mark.parametrize("method", ["lora", "linear-decay", "attention-heavy", "empirical"])
def test_bfloat16_trains_with_float32_adapters(method, checkpoints, texts, tmp_path):
    main("--model", checkpoints / "llama", "--task", "text-classification", "--data", texts / "classes", "--dtype", "bfloat16",
         "--out", tmp_path / "run", "--steps", 20, "--batch-size", 8, "--rank", 4, "--method", method, "--checkpointing")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in saved.values())


@pytest.mark.parametrize("warmup, steps, kind", [(0.1, 50, "linear"), (7, 40, "linear"), (0, 30, "linear"), (5, 40, "cosine"),
                                                 (3, 20, "constant")])
def test_schedules_equal_transformers(warmup, steps, kind):
    name = "constant_with_warmup" if kind == "constant" else kind
    parameter = torch.nn.Parameter(torch.zeros(1))
    count = int(warmup) if warmup >= 1 else int(np.ceil(warmup * steps))
    theirs = transformers.get_scheduler(name, torch.optim.SGD([parameter], lr=1.0), count, steps)
    factor = train.schedule(SimpleNamespace(warmup=warmup, schedule=kind), steps)
    for step in range(steps):
        assert factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.optimizer.step()
        theirs.step()


def test_accumulation_gives_every_label_the_same_weight(checkpoints, texts, monkeypatch, tmp_path):
    """One step on 12 rows is the same in one batch of 12 and in batches of 5, 5 and 2 (answers of unequal length)."""
    saved = []
    for parts in ([list(range(12))], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]):
        monkeypatch.setattr(train, "stream", lambda s, split, done=0, parts=parts: iter([parts] * 3))
        main("--model", checkpoints / "llama", "--task", "instructions", "--data", texts / "boolq" / "train.json", "--out",
             tmp_path / str(len(parts)), "--steps", 3, "--batch-size", 12, "--rank", 2, "--lr", 1e-3, "--warmup", 0,
             "--dropout", 0, "--no-eval-before")
        saved.append(load_file(tmp_path / str(len(parts)) / "adapter" / "adapter_model.safetensors"))
    for key in saved[0]:
        torch.testing.assert_close(saved[0][key], saved[1][key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_loop_is_the_plain_one(method, checkpoints, texts, tmp_path):
    """Schedule, decay, clipping and the policy's penalty: the same weights as a loop written out in plain torch."""
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")  # without dropout: its draws depend on the order of calls
    config = tmp_path / "bert" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}))
    flags = ["--model", tmp_path / "bert", "--task", "text-regression", "--data", texts / "scores", "--method", method,
             "--rank", 4, "--steps", 9, "--batch-size", 16, "--lr", 3e-3, "--warmup", 3, "--weight-decay", 0.2, "--clip", 0.5,
             "--dropout", 0, "--max-length", 32, "--no-eval-before", "--adalora-t-init", 1, "--adalora-t-final", 2]
    main(*flags, "--out", tmp_path / "run")
    s = parse(*flags, "--out", tmp_path / "plain")
    task = train.settle(s, train.models.find_config(s.model)[0])
    torch.manual_seed(s.seed)
    model, processor = evaluation.load(s, task)
    model.train()
    split = processor.training(data.read(task, s.data), s.max_length)
    model.head.bias.data.fill_(split.labels.mean())  # a new regression head starts at the mean label
    allocator = train.allocators.METHODS[method](model, s, s.steps)
    params = allocator.parameters() + list(model.head.requires_grad_().parameters())
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.2)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 3, 9)
    order = data.batches(split, 16, s.seed, 0) + data.batches(split, 16, s.seed, 1)
    for step in range(1, 10):
        inputs, labels = data.collate(split, order[step - 1])
        loss = torch.nn.functional.mse_loss(model(**inputs)[:, 0], labels)
        if method == "adalora":
            for layer in allocator.layers.values():
                for factor in (layer.A, layer.B.T):
                    norm = torch.linalg.norm(factor @ factor.T - torch.eye(len(factor)))
                    loss = loss + s.adalora_orth * norm / (2 * len(allocator.layers))
        optimizer.zero_grad()
        loss.backward()
        lora.gather_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        scheduler.step()
        allocator.after_step(step)
    lora.save_adapter(model, tmp_path / "plain" / "adapter", "base")
    expected, found = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("plain", "run"))
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=2e-5)


def test_validation_loss_is_without_dropout_and_leaves_the_mode(checkpoints, texts):
    s = parse("--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes", "--max-length", 32)
    task = train.settle(s, train.models.find_config(s.model)[0])
    model, processor = evaluation.load(s, task)
    split = processor.training(data.read(task, s.data, limit=32), s.max_length)
    inputs, labels = data.collate(split, list(range(32)))
    expected = torch.nn.functional.cross_entropy(model(**inputs), labels)
    loss = train.validation(model.train(), task, split, torch.device("cpu"))
    assert torch.equal(loss(), loss()) and loss().item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.training and not loss().requires_grad


def test_generated_answers_are_scored_row_by_row(checkpoints, texts, monkeypatch):
    """The share of right answers, whatever order the rows are generated in; every third is answered wrongly."""
    s = parse("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--max-length", 64)
    task = train.settle(s, train.models.find_config(s.model)[0])
    model, encoder = evaluation.load(s, task)
    (split,) = encoder.evaluation(s).values()
    prompts = {tuple(ids[:start].tolist()): i for i, (ids, start) in enumerate(zip(split.tokens, split.starts))}

    def answer(model, tokens, mask, new_tokens, eos_ids, pad_id, stop):
        rows = [prompts[tuple(ids[keep].tolist())] for ids, keep in zip(tokens, mask)]
        wrong = {"true": "false", "false": "true"}
        texts = [f"the answer is {split.rows[i]['target'] if i % 3 else wrong[split.rows[i]['target']]}" for i in rows]
        ids = encoder.tokenizer.encode(texts, special=False)[0]
        return torch.stack([torch.tensor(row, dtype=torch.long) for row in ids])

    monkeypatch.setattr(evaluation.models, "generate", answer)
    right = sum(i % 3 != 0 for i in range(len(split)))
    for batch_size in (1, 7, 40):
        result = evaluation.evaluate(model, task, split, batch_size, encoder.tokenizer)
        assert result["accuracy"] == pytest.approx(right / len(split))


def test_a_trained_head_is_put_into_the_tasks_order_of_labels(checkpoints, texts, tmp_path):
    """The same head, its rows and label names in another order, gives the same logits; trained heads stay float32."""
    s = parse("--model", checkpoints / "bert", "--task", "text-classification", "--data", texts / "classes", "--max-length", 32)
    task = train.settle(s, train.models.find_config(s.model)[0])
    model, processor = evaluation.load(s, task)
    model.config.raw |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    evaluation.save_model(model, processor, tmp_path / "same")
    model.head.weight.data, model.head.bias.data = model.head.weight.data.flip(0), model.head.bias.data.flip(0)
    model.config.raw |= {"id2label": {"0": "YES", "1": "NO"}, "label2id": {"YES": 0, "NO": 1}}
    evaluation.save_model(model, processor, tmp_path / "turned")
    heads = []
    for name in ("same", "turned"):
        s.model, s.dtype = str(tmp_path / name), "bfloat16"
        heads.append(evaluation.load(s, task)[0].head)
    assert torch.equal(heads[0].weight, heads[1].weight) and torch.equal(heads[0].bias, heads[1].bias)
    assert heads[0].weight.dtype == torch.float32 and torch.equal(heads[0].weight, model.head.weight.flip(0))


def test_texts_longer_than_the_models_positions_are_cut(checkpoints, texts, tmp_path, caplog):
    (tmp_path / "long.tsv").write_text("text\tlabel\n" + "".join(f"{'the cat ' * n}\t{n % 2}\n" for n in range(1, 60)))
    main("--model", checkpoints / "bert", "--task", "text-classification", "--data", tmp_path / "long.tsv", "--steps", 3,
         "--out", tmp_path / "run", "--no-eval-before")
    assert "32 positions" in caplog.text


def test_the_papers_warm_up_does_not_outlast_a_short_run(checkpoints, texts, tmp_path):
    main("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--steps", 20, "--batch-size", 4, "--rank", 2,
         "--log-every", 1, "--no-eval-before", "--limit-eval", 4, "--out", tmp_path / "run")
    rates = [line["lr"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert max(rates) == pytest.approx(3e-4) and rates.index(max(rates)) == 2 and rates[-1] < 1e-4


def test_random_architectures_need_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    small = dict(train.models.CONFIGS["vit-b16"], hidden_size=32, intermediate_size=32, num_hidden_layers=1, image_size=32,
                 num_attention_heads=2)
    monkeypatch.setitem(train.models.CONFIGS, "vit-b16", small)
    for method in ("lora", "full"):
        result = main("--model", "vit-b16", "--init-weights", "random", "--task", "digits", "--limit-train", 40,
                      "--limit-eval", 20, "--steps", 2, "--method", method, "--out", tmp_path / method)
        assert result["accuracy"] == evaluation.evaluate_run(tmp_path / method)["accuracy"]


def test_optimizer_follows_rebuilt_parameters():
    old, kept, new = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW([old, kept], lr=0.1)
    for p in (old, kept):
        p.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state[kept]
    train.follow(optimizer, [kept, new])
    assert optimizer.param_groups[0]["params"] == [kept, new] and dict(optimizer.state) == {kept: state}


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop, damaged", [(3, False), (14, False), (23, True)])
@pytest.mark.parametrize("method", ["lora", "bitfit", "adalora", "lalora", "weightlora+", "lelora"])
def test_an_interrupted_run_resumes_to_the_same_bits(method, stop, damaged, tmp_path, monkeypatch, capsys):
    """Stopped after step `stop` and resumed: adapter, ranks, losses and metrics are those of the uninterrupted run."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    flags = ["--method", method, "--limit-train", 150, "--limit-eval", 60, "--steps", 26, "--batch-size", 8, "--rank", 4,
             "--dropout", 0.1, "--save-every", 2, "--eval-every", 9, "--log-every", 4, "--accumulate", 2]
    main(*flags, "--out", tmp_path / "whole")
    with interrupted_after(stop):
        main(*flags, "--out", tmp_path / "parts")
    if damaged:
        newest = train.checkpoints(tmp_path / "parts")[0] / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:-7])
    train.main(["--resume", str(tmp_path / "parts")])
    assert ("damaged" in capsys.readouterr().err) == damaged
    folder = "adapter" if method != "bitfit" else "model"
    (file,) = (tmp_path / "whole" / folder).glob("*.safetensors")
    expected, found = load_file(file), load_file(tmp_path / "parts" / folder / file.name)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert lines(tmp_path / "whole" / "ranks.jsonl") == lines(tmp_path / "parts" / "ranks.jsonl")
    timeless = [[{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines(tmp_path / run / "metrics.jsonl")]
                for run in ("whole", "parts")]
    assert timeless[0] == timeless[1]
    assert len(train.checkpoints(tmp_path / "parts")) == 2


@pytest.mark.parametrize("argv, expected", [(["--resume", "{run}"], "finished"), (["--resume", "{none}"], "run.json"),
                                            (["--resume", "{run}", "--lr", "1"], "leave the other flags out"),
                                            (["--resume", "{empty}"], "no whole checkpoint")])
def test_what_cannot_be_resumed_is_one_line(argv, expected, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "empty")
    for file in tmp_path.glob("empty/checkpoints/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "empty" / "result.json").unlink()
    places = {"run": finished, "none": tmp_path / "none", "empty": tmp_path / "empty"}
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main([part.format(**places) for part in argv]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and expected in last, last


# ---------------------------------------------------------------------------------------------- bad input


def damage(folder, copy, how):
    """A copy of a checkpoint with one thing wrong."""
    shutil.copytree(folder, copy)
    config, weights = copy / "config.json", copy / "model.safetensors"
    raw, tensors = json.loads(config.read_text()), load_file(weights)
    name = next(key for key in tensors if "layer.1.attention.self.query.weight" in key)
    if how == "no config":
        config.unlink()
    elif how == "config not JSON":
        config.write_text("{'model_type': bert}")
    elif how == "unsupported family":
        config.write_text(json.dumps({**raw, "model_type": "t5"}))
    elif how == "heads do not divide":
        config.write_text(json.dumps({**raw, "num_attention_heads": 5}))
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled weights":
        weights.rename(copy / "pytorch_model.bin")
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "mislabelled weights":
        weights.write_bytes(b"PK\x03\x04" + bytes(500))
    elif how == "missing tensor":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
    elif how == "wrong shape":
        save_file({**tensors, name: torch.zeros(3, 3)}, weights)
    elif how == "unknown tensor":
        save_file({**tensors, name.replace("layer.1", "layer.9"): torch.zeros(3, 3)}, weights)
    elif how == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif how == "tokenizer not JSON":
        (copy / "tokenizer.json").write_text("tokens: a b c")
    return copy


MODELS = {"no config": "config.json", "config not JSON": "JSON", "unsupported family": "t5",
          "heads do not divide": "num_attention_heads", "no weights": "no such file", "pickled weights": "refused",
          "truncated weights": "truncated", "mislabelled weights": "safetensors", "missing tensor": "is missing",
          "wrong shape": r"\[3, 3\]", "unknown tensor": "layer.9", "no tokenizer": "tokenizer.json",
          "tokenizer not JSON": "tokenizer.json"}
FILES = {"no data": (None, "no"), "empty file": ("", "empty"), "header only": ("sentence\tlabel\n", "no"),
         "a column too few": ("sentence\tlabel\na cat\tno\na dog\n", "line 3"),
         "a column too many": ("sentence\tlabel\na cat\tno\tx\n", "line 2"),
         "no text column": ("words\tlabel\na\tno\n", "words"), "no label column": ("sentence\tclass\na\tno\n", "label"),
         "one class only": ("sentence\tlabel\na\tno\nb\tno\n", "another class")}
FLAGS = {
    "unknown flag": (["--lerning-rate", "1"], "--lerning-rate"), "unknown method": (["--method", "lorra"], "lorra"),
    "not a number": (["--lr", "fast"], "fast"), "rank 0": (["--rank", "0"], "--rank"),
    "rank above the matrix": (["--rank", "65"], "65"), "negative lr": (["--lr", "-1"], "--lr"),
    "lr nan": (["--lr", "nan"], "--lr"), "batch size 0": (["--batch-size", "0"], "--batch-size"),
    "no epochs": (["--epochs", "0"], "--epochs"), "negative steps": (["--steps", "-5"], "--steps"), "no steps": (["--steps", "0"], "--steps"),
    "epochs nan": (["--epochs", "nan"], "--epochs"), "warm-up infinite": (["--warmup", "inf"], "--warmup"),
    "seed too large": (["--seed", "9" * 20], "--seed"), "device meta": (["--device", "meta"], "meta"),
    "accumulate 0": (["--accumulate", "0"], "--accumulate"), "alpha nan": (["--alpha", "nan"], "--alpha"),
    "no room for AdaLoRA's ratio": (["--method", "adalora", "--rank", "48"], "--rank"),
    "dropout 1": (["--dropout", "1"], "--dropout"), "warm-up below 0": (["--warmup", "-0.1"], "--warmup"),
    "unknown target": (["--targets", "query,wvalue"], "wvalue"), "a target vits lack": (["--targets", "gate"], "gate"),
    "no targets": (["--targets", ","], "--targets"), "a target twice": (["--targets", "query,query"], "once"),
    "unknown dtype": (["--dtype", "int3"], "int3"), "no such device": (["--device", "cuda:99"], "cuda:99"),
    "device is no device": (["--device", "toaster"], "toaster"), "negative limit": (["--limit-train", "-1"], "--limit-train"),
    "r_min above r_max": (["--r-min", "9", "--r-max", "8"], "--r-min"), "unknown task": (["--task", "digit"], "digits"),
    "text task for a vit": (["--task", "boolq"], "boolq"), "unknown model": (["--model", "no-such-model"], "no-such-model"),
    "no random form of it": (["--model", "some/where", "--init-weights", "random"], "some/where"),
    "out is a file": (["--out", "{file}"], "--out"), "out under a file": (["--out", "{file}/run"], "--out"),
    "out is not empty": (["--out", "{full}"], "--out"), "not an npz": (["--task", "npz", "--data", "{file}"], "npz"),
    "scheduler unknown": (["--schedule", "wavy"], "wavy"),
}
BAD = ([("model", *item) for item in MODELS.items()] + [("file", *item) for item in FILES.items()]
       + [("flags", *item) for item in FLAGS.items()])


@pytest.mark.parametrize("what, name, expected", BAD, ids=[f"{what}: {name}" for what, name, _ in BAD])
def test_bad_input_is_one_line_and_status_2(what, name, expected, checkpoints, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not what you think\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    model, own, out = checkpoints / "bert", texts / "classes", ["--out", str(tmp_path / "run")]
    if what == "model":
        model = damage(model, tmp_path / "model", name)
    elif what == "file":
        own = tmp_path / "own"
        own.mkdir()
        text, expected = expected
        if text is not None:
            (own / "train.tsv").write_text(text)
    argv = ["--model", str(model), "--task", "text-classification", "--data", str(own)]
    if what == "flags":
        argv, expected = expected
        argv = [part.replace("{file}", str(tmp_path / "file")).replace("{full}", str(tmp_path / "full")) for part in argv]
        out = [] if "--out" in argv else out
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: train.main([*argv, *out]))
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert stop.value.code == 2 and printed.out == ""
    assert last.startswith("error: ") and "Traceback" not in printed.err
    assert re.search(expected, last), last
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("argv, expected", [
    (["nowhere"], "--task"), (["nowhere", "--task", "digits"], "nowhere"), (["{run}", "--task", "cola"], "digits"),
    (["{run}", "--batch-size", "0"], "--batch-size"), (["{run}", "--device", "toaster"], "toaster"), (["{run}", "--seed", "5"], "--seed"),
    (["vit-digits", "--task", "digits", "--device", "cuda:77"], "cuda:77"), (["{headless}"], "head"), (["{old}"], "run.json"), (["{broken}"], "run.json"), (["{unfinished}"], "adapter"),
    (["{damaged}"], "damaged"), (["{rankless}"], "lora_A"), ([], "required"), (["vit-digits", "--task", "digits", "--dtype", "int3"], "int3")])
def test_bad_input_to_eval(argv, expected, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("broken", "unfinished", "damaged", "rankless", "headless", "old"):
        shutil.copytree(finished, tmp_path / name)
    (tmp_path / "broken" / "run.json").write_text('{"settings": 3}')
    shutil.rmtree(tmp_path / "unfinished" / "adapter")
    file = tmp_path / "damaged" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    file = tmp_path / "rankless" / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora_A" not in k}, file)
    file = tmp_path / "headless" / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file)
    run = json.loads((tmp_path / "headless" / "run.json").read_text())
    headless = {"settings": run["settings"] | {"init_weights": "random"}, "labels": run["labels"]}
    (tmp_path / "headless" / "run.json").write_text(json.dumps(headless))
    run["settings"].pop("max_length")
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    places = {"run": finished, **{path.name: path for path in tmp_path.iterdir()}}
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: evaluation.main([part.format(**places) for part in argv]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and expected in last, last


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a short finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    main("--steps", 5, "--no-eval-before", "--out", out, "--limit-eval", 50)
    return out


def test_untouched_models_are_evaluated(capsys):
    evaluation.main(["vit-digits", "--task", "digits"])
    upright = json.loads(capsys.readouterr().out)["accuracy"]
    evaluation.main(["vit-digits", "--task", "digits-rot90"])
    assert upright > 0.95 and json.loads(capsys.readouterr().out)["accuracy"] < 0.3


def test_limits_and_data_of_a_run_can_be_changed(finished):
    assert 0 <= evaluation.evaluate_run(finished, limit_eval=7)["accuracy"] <= 1
    assert (evaluation.evaluate_run(finished, limit_eval=7)["accuracy"] * 7) % 1 == pytest.approx(0)


@pytest.mark.parametrize("method", ["lora", "adalora", "lalora", "weightlora"])
def test_training_on_8_bit_weights(method, tmp_path):
    """The loss stays near the unquantised model's, the adapter file is as ever, and the run's number can be had again."""
    argv = ["--method", method, "--limit-train", 200, "--limit-eval", 100, "--steps", 12, "--log-every", 1]
    losses, results = [], []
    for weights in ("float", "int8"):
        out = tmp_path / weights
        results.append(main(*argv, "--weights", weights, "--out", out))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append(np.mean([line["loss"] for line in lines if "loss" in line]))
    assert abs(losses[1] - losses[0]) < 0.01 * losses[0]
    assert evaluation.evaluate_run(tmp_path / "int8")["accuracy"] == results[1]["accuracy"]


@pytest.mark.parametrize("argv", [["--method", "lelora"], ["--init", "pissa"], ["--method", "full"], ["--shard"]])
def test_8_bit_weights_are_not_for_what_trains_them(argv, tmp_path):
    with pytest.raises(train.UserError, match="--weights int8"):
        main(*argv, "--weights", "int8", "--out", tmp_path / "run")
