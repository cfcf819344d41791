"""Metrics against scikit-learn and scipy; evaluation of models and runs."""

import contextlib
import io
import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import eval as evaluation
import lora
import model as models
import tiny
import train
from model import UserError
from papers import figures
from test_train import WORDS, tokenizer_into

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def class_pairs():
    """Predictions and labels: random ones of several sizes, and every degenerate kind."""
    random = np.random.default_rng(0)
    for n in (1, 2, 7, 300):
        yield random.integers(2, size=n), random.integers(2, size=n)
        yield random.integers(5, size=n), random.integers(5, size=n)
    noisy = random.integers(2, size=200)
    yield noisy, np.where(random.random(200) < 0.2, 1 - noisy, noisy)
    ones, zeros = np.ones(20, int), np.zeros(20, int)
    yield from [(ones, ones), (zeros, zeros), (ones, zeros), (zeros, ones), (ones, noisy[:20]), (noisy[:20], zeros)]


@pytest.mark.parametrize("predictions, labels", list(class_pairs()))
def test_class_metrics_equal_scikit_learns(predictions, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert evaluation.accuracy(predictions, labels) == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))
        assert evaluation.matthews(predictions, labels) == pytest.approx(
            sklearn_metrics.matthews_corrcoef(labels, predictions), abs=1e-12)
        if max(predictions.max(), labels.max()) < 2:
            assert evaluation.f1(predictions, labels) == pytest.approx(
                sklearn_metrics.f1_score(labels, predictions, zero_division=0))


def number_pairs():
    random = np.random.default_rng(1)
    for n in (2, 3, 10, 400):
        x = random.normal(size=n)
        yield x, 0.5 * x + random.normal(size=n)
        yield np.round(2 * x), np.round(random.normal(size=n))  # ties
    yield x, -3 * x
    yield 1e6 + 1e-3 * x, x  # far from zero
    yield np.full(9, 2.5), random.normal(size=9)
    yield random.normal(size=9), np.zeros(9)
    yield np.array([1.0]), np.array([2.0])


@pytest.mark.parametrize("x, y", list(number_pairs()))
def test_correlations_equal_scipys(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(x) < 2:
            expected = (math.nan, math.nan)
        else:
            expected = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
    assert evaluation.pearson(x, y) == pytest.approx(expected[0], nan_ok=True, abs=1e-8)
    assert evaluation.spearman(x, y) == pytest.approx(expected[1], nan_ok=True, abs=1e-10)


def decoder(vocabulary=50):
    """A tiny random Llama whose outputs are far from uniform."""
    config = models.normalise({**models.CONFIGS["llama2-7b"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                               "num_key_value_heads": 2, "vocab_size": vocabulary}, "test")
    torch.manual_seed(0)
    model = models.Decoder(config, "lm").eval()
    model.head.weight.data.normal_(0, 1)
    return model


def lm_split(random, rows, vocabulary=50):
    tokens = [random.integers(vocabulary, size=random.integers(3, 12)).astype(np.int32) for _ in range(rows)]
    starts = [int(random.integers(1, len(t))) for t in tokens]
    return data.Split("lm", tokens, [len(t) for t in tokens], tokens=tokens, starts=starts)


def test_perplexity_is_that_of_the_answer_tokens_alone():
    split, model, task = lm_split(np.random.default_rng(3), 23), decoder(), data.find_task("instructions")
    nll = []
    for tokens, start in zip(split.tokens, split.starts):
        logits = model(torch.from_numpy(tokens)[None].long())[0].detach()
        nll += [-torch.log_softmax(logits[i - 1], 0)[tokens[i]].item() for i in range(start, len(tokens))]
    for batch_size in (1, 5, 23):
        result = evaluation.evaluate(model, task, split, batch_size)
        assert result["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


@pytest.mark.parametrize("chunk", [50, 333, 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_token_loss_in_chunks_is_the_cross_entropy_and_has_its_gradients(monkeypatch, chunk, tied):
    """With the frozen head of LoRA and with the trained one of full fine-tuning, here also the embedding."""
    model, split = decoder(), lm_split(np.random.default_rng(4), 9)
    if tied:
        model.head.weight = model.embed.weight
    inputs, labels = data.collate(split, list(range(9)))
    chunked = models.TokenLoss.apply
    monkeypatch.setattr(models.TokenLoss, "apply", lambda *args: chunked(*args, chunk))
    for trained in (["blocks.0.query.weight"], [name for name, _ in model.named_parameters()]):
        grads = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        whole = torch.nn.functional.cross_entropy(evaluation.logits(model, inputs), labels, reduction="sum")
        for loss in (whole, evaluation.token_loss(model, inputs, labels)):
            (loss / len(labels)).backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        assert set(grads[0]) == set(trained)


def test_several_splits_are_named_and_averaged(monkeypatch):
    scores = {"boolq": 0.5, "piqa": 0.8, "dev": 0.6, "dev_mismatched": 0.2}
    monkeypatch.setattr(evaluation, "evaluate", lambda model, task, split, *rest: {"accuracy": scores[split]})
    for names, expected in [
            (["boolq", "piqa"], {"accuracy": 0.65, "accuracy_boolq": 0.5, "accuracy_piqa": 0.8, "eval_rows": 9}),
            (["dev", "dev_mismatched"], {"accuracy": 0.6, "accuracy_dev_mismatched": 0.2, "eval_rows": 17}),
            (["dev"], {"accuracy": 0.6, "eval_rows": 3})]:
        assert evaluation.evaluate_splits(None, None, {name: name for name in names}, 1) == pytest.approx(expected)


def test_json_has_no_word_for_nan():
    assert json.loads(evaluation.to_json({"a": math.nan, "b": [1.5, math.inf]})) == {"a": None, "b": [1.5, None]}


@pytest.mark.parametrize("new_tokens, expected", [(0, 128), (256, 64), (20_000, 2)])
def test_rows_at_a_time_on_a_gpu_leave_room_for_the_longest(monkeypatch, new_tokens, expected):
    """LLaMA2-7B in bfloat16 on an 80 GB card; prompts of 256 tokens."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    with torch.device("meta"):
        model = models.Decoder(models.find_config("llama2-7b", "random")[0], "lm").bfloat16()
    splits, task = {"dev": data.Split("lm", [], [9, 256])}, SimpleNamespace(kind="lm", new_tokens=new_tokens)
    s = SimpleNamespace(eval_batch_size=0, batch_size=7, device="cuda:0", dtype="bfloat16")
    rows = evaluation.rows_at_once(s, task, model, splits)
    cache = rows * (256 + new_tokens) * 2 * 32 * 4096 * 2  # bytes of keys and values
    assert rows == expected and cache < 40 << 30
    s.device = "cpu"
    assert evaluation.rows_at_once(s, task, model, splits) == 7
    s.eval_batch_size = 3
    assert evaluation.rows_at_once(s, task, model, splits) == 3


# ---------------------------------------------------------------------------------------------- pictures


def test_sparsity_is_equation_1_of_the_increments_block_by_block(tmp_path):
    model, random = tiny.Tiny(), torch.Generator().manual_seed(0)
    layers = lora.attach(model, {"blocks.0.query": 2, "blocks.0.up": 3, "blocks.2.value": 4}, 6, nominal=4)
    for layer in layers.values():
        layer.B.data.normal_(std=3e-4, generator=random)
    lora.save_adapter(model, tmp_path / "adapter", "tiny", head=False)
    P = {name: (6 / 4 * layer.B @ layer.A).detach().flatten() for name, layer in layers.items()}
    increments = [torch.cat((P["blocks.0.query"], P["blocks.0.up"])), torch.zeros(1), P["blocks.2.value"]]
    for epsilon in (1e-4, 2e-5):
        near = [((-epsilon < p) & (p < epsilon)).double().mean() for p in increments]
        assert 0 < near[0] < 1 and 0 < near[2] < 1
        assert figures.sparsity(tmp_path / "adapter", 3, epsilon) == pytest.approx([math.log(share / epsilon) for share in near])
    assert figures.sparsity(tmp_path / "adapter", 3, 1e-30)[0] == -math.inf


def test_jaccard_similarity_equals_scikit_learns():
    chosen = np.random.default_rng(0).integers(2, size=(4, 12))
    expected = [[sklearn_metrics.jaccard_score(a, b) for b in chosen] for a in chosen]
    np.testing.assert_allclose(figures.jaccard([set(np.flatnonzero(row)) for row in chosen]), expected)


def test_runs_are_labelled_by_what_differs_between_runs_of_their_method_on_a_task():
    shared = {"out": "x", "rank": 4, "lr": 1.0, "lalora_fidelity": "step", "model": "a/$b"}
    runs = [SimpleNamespace(s=SimpleNamespace(method=method, task=task, seed=seed, **shared | other))
            for seed in (0, 1) for method, task, other in (
                ("lora", "b", {"rank": 16, "out": "y"}), ("lora", "b", {}), ("lora", "a", {"lr": 2.0}),
                ("lalora", "a", {"lalora_fidelity": "off", "model": "c"}), ("lalora", "a", {}))]
    alike = {key: len(group) for key, group in evaluation.alike(runs).items()}
    assert alike == {("a", "lalora, fidelity off, model c"): 2, ("a", r"lalora, fidelity step, model \$b"): 2,
                     ("a", "lora, rank 4"): 2, ("b", "lora, rank 4"): 2, ("b", "lora, rank 16"): 2}
    assert list(alike)[-1] == ("b", "lora, rank 16")
    assert len(evaluation.alike(runs, "rank")["b", "lora"]) == 4


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of short runs: six methods, two seeds each, one of them unfinished."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "full", "lalora", "weightlora", "random", "lelora"):
        for seed in (0, 1):
            train.run(train.Settings(method=method, seed=seed, steps=6, rank=2, limit_train=48, limit_eval=20,
                                     batch_size=8, eval_before=False, log_every=2, out=str(folder / f"{method}-{seed}")))
    shutil.copytree(folder / "full-0", folder / "unfinished")
    (folder / "unfinished" / "result.json").unlink()
    (folder / "notes").mkdir()
    (folder / "notes.txt").write_text("no run, either")
    return folder


@pytest.mark.parametrize("chosen, expected", [
    ("*", "quality ranks sparsity selection omega choices memory"), ("full-*", "quality")])
def test_a_set_of_runs_gets_the_figures_it_has_the_data_for(runs, chosen, expected, capsys, caplog):
    pytest.importorskip("matplotlib")
    data.note.cache_clear()
    figures.main([str(path) for path in runs.glob(chosen)])
    pictures = [runs / f"{name}.png" for name in expected.split()]
    assert json.loads(capsys.readouterr().out) == {"figures": list(map(str, pictures))}
    assert all(path.exists() for path in pictures)
    left_out = ["left out, not a run's folder: notes", "left out, not a finished run: unfinished"]
    assert caplog.messages == (left_out if chosen == "*" else [])


def curves(figure):
    """{title of a panel: the steps of each of its curves}."""
    return {axis.get_title(): [line.get_xdata().tolist() for line in axis.get_lines()] for axis in figure.axes}


def test_pictures_of_runs_show_what_their_logs_hold(runs, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(evaluation, "save_figures", lambda plt, folder, found: drawn.update(found) or [])
    evaluation.plot(*runs.glob("l*-*"))
    shown = curves(drawn["curves.png"])
    assert shown["digits-rot90: training loss"] == [[2, 4, 6]] * 6
    assert len(shown["digits-rot90: accuracy"]) == 6 and all(steps[-1] == 6 for steps in shown["digits-rot90: accuracy"])
    assert [text.get_text() for text in drawn["curves.png"].legends[0].get_texts()] == ["lalora", "lelora", "lora"]
    evaluation.plot(runs / "lora-0")  # which has no numbers of its own
    titles = ["digits-rot90: training loss", "digits-rot90: accuracy", "trainable adapter parameters"]
    assert list(curves(drawn["curves.png"])) == titles and "ranks.png" in drawn
    evaluation.plot(runs / "lelora-0")
    assert curves(drawn["curves.png"])["the policy's own numbers"][0] == [2, 4, 6]
    with pytest.raises(UserError, match="no run among 2 paths"):
        evaluation.plot(runs / "notes", runs / "notes.txt")
    with pytest.raises(UserError, match="run.json"):
        evaluation.plot(runs / "notes")
    with pytest.raises(UserError, match="no finished run among 1"):
        figures.draw([runs / "unfinished"])


# ---------------------------------------------------------------------------------------------- heads and numbers


def test_outputs_of_a_trained_head_are_matched_to_the_datas_labels():
    mood, unnamed = ["negative", "neutral", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"]
    for names, labels, expected, said in [
            (mood, ["negative", "positive"], [0, 2], None), (mood, ["POSITIVE", "Neutral ", "negative"], [2, 1, 0], None),
            (unnamed, ["0", "2"], [0, 2], None), (unnamed[::-1], ["0", "1", "2"], [2, 1, 0], None),
            (unnamed, ["label_2", "LABEL_1"], [2, 1], None), (unnamed, ["b", "c", "a"], [0, 1, 2], "to be b, c, a in this"),
            (unnamed, ["a", "b"], None, None), (unnamed, ["1", "2", "3"], [0, 1, 2], "to be 1, 2, 3 in this"),
            (mood, ["2", "0", "1"], [2, 0, 1], "the data's 0, 1, 2 are taken as the numbers of its outputs negative,"),
            (mood, ["0", "2"], None, None), (mood, ["good", "bad", "neutral"], None, None),
            (["1", "2", "3"], ["3", "1"], [2, 0], None), (["1", "2", "3"], ["0", "1", "2"], None, None)]:
        outputs, remark = evaluation.match_labels(names, labels)
        assert outputs == expected and (said in remark if said else remark is None), (names, labels)


@pytest.fixture
def mood(tmp_path):
    """A function that saves transformers' tiny BERT with a head of these labels; returns its folder and the model."""
    transformers = pytest.importorskip("transformers")

    def build(labels, head=True, **changes):
        folder = tmp_path / f"bert-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        torch.manual_seed(5)
        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
            vocab_size=tokenizer_into(folder, "bert"), max_position_embeddings=40, id2label=dict(enumerate(labels)), **changes)
        theirs = (transformers.BertForSequenceClassification if head else transformers.BertModel)(config).eval()
        theirs.save_pretrained(folder)
        return folder, theirs

    return build


def table(folder, name, labels, n=60):
    """A file of texts, whose labels go round."""
    random = np.random.default_rng(0)
    rows = [f"{' '.join(random.choice(WORDS, size=5))}\t{labels[i % len(labels)]}" for i in range(n)]
    (folder / name).write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return folder / name


def shell(*argv):
    """eval.py's result with these arguments."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation.main([str(a) for a in argv])
    return json.loads(printed.getvalue())


@pytest.mark.parametrize("there, names", [
    (["negative", "neutral", "positive"], ["positive", "negative"]), (["b", "a"], ["A", "B"]),
    (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "2"]), (["no", "maybe", "yes"], ["0", "1", "2"])])
def test_a_trained_head_gives_transformers_logits_for_the_datas_labels(mood, tmp_path, there, names):
    transformers = pytest.importorskip("transformers")
    folder, theirs = mood(there)
    file = table(tmp_path, "data.tsv", names)
    task = data.find_task("text-classification", str(file))
    s = SimpleNamespace(model=str(folder), init_weights="checkpoint", dtype="float32", device="cpu", seed=0, max_length=32)
    model, processor = evaluation.load(s, task)
    rows = data.read(task, str(file))
    inputs, _ = data.collate(processor.training(rows, 32), list(range(9)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([row["text"] for row in rows[:9]], return_tensors="pt", padding=True)
    lower = [name.lower() for name in there]
    outputs = [lower.index(label.lower()) if label.lower() in lower else int(label) for label in task.labels]
    with torch.no_grad():
        expected = theirs(**encoded).logits[:, outputs]
        torch.testing.assert_close(evaluation.logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert model.fresh == [] and model.config.num_labels == len(names)


def test_a_head_of_other_labels_is_named_and_a_random_one_is_not_evaluated(mood, tmp_path, caplog):
    file = table(tmp_path, "data.tsv", ["good", "bad"])
    evaluate = ("--task", "text-classification", "--data", file, "--device", "cpu")
    for labels in (["negative", "positive"], ["negative", "neutral", "positive"]):
        folder, _ = mood(labels)
        with pytest.raises(UserError, match="no head trained for text-classification.*--random-head"):
            shell(folder, *evaluate)
        assert f"its {len(labels)} outputs ({', '.join(labels)}) are not this task's (bad, good)" in caplog.text
    result = shell(folder, *evaluate, "--random-head")
    assert 0 <= result["accuracy"] <= 1 and result["eval_rows"] == 6  # a tenth of the file
    train.main(["--model", str(folder), "--task", "text-classification", "--data", str(file), "--steps", "2", "--out",
                str(tmp_path / "run"), "--max-length", "16", "--device", "cpu"])  # with an evaluation before
    with pytest.raises(UserError, match="leave out --random-head"):
        shell(tmp_path / "run", "--random-head")
