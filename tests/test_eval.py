"""Metrics against scikit-learn and scipy; evaluation of models and runs."""

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
import tiny
import train
from model import UserError
from papers import figures

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


class Bigram(torch.nn.Module):
    """A language model that looks at the last token only; its logits are a fixed random table."""

    def __init__(self, vocabulary):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(2 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, tokens, mask, positions):
        return self.table[tokens].flatten(0, 1)[positions]


def test_perplexity_is_that_of_the_answer_tokens_alone():
    random, rows = np.random.default_rng(3), []
    for _ in range(23):
        n = int(random.integers(3, 12))
        rows.append((random.integers(50, size=n).astype(np.int32), int(random.integers(1, n))))
    task = data.find_task("instructions")
    split = data.Split("lm", rows, [len(t) for t, _ in rows], tokens=[t for t, _ in rows], starts=[s for _, s in rows])
    model = Bigram(50)
    nll = [-torch.log_softmax(model.table[t[i - 1]], 0)[t[i]].item() for t, s in rows for i in range(s, len(t))]
    for batch_size in (1, 5, 23):
        result = evaluation.evaluate(model, task, split, batch_size)
        assert result["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


def test_several_splits_are_named_and_averaged(monkeypatch):
    scores = {"boolq": 0.5, "piqa": 0.8, "dev": 0.6, "dev_mismatched": 0.2}
    monkeypatch.setattr(evaluation, "evaluate", lambda model, task, split, *rest: {"accuracy": scores[split]})
    assert evaluation.evaluate_splits(None, None, {"boolq": "boolq", "piqa": "piqa"}, 1) == pytest.approx(
        {"accuracy": 0.65, "accuracy_boolq": 0.5, "accuracy_piqa": 0.8, "eval_rows": 9})
    assert evaluation.evaluate_splits(None, None, {"dev": "dev", "dev_mismatched": "dev_mismatched"}, 1) == pytest.approx(
        {"accuracy": 0.6, "accuracy_dev_mismatched": 0.2, "eval_rows": 17})
    assert evaluation.evaluate_splits(None, None, {"dev": "dev"}, 1) == {"accuracy": 0.6, "eval_rows": 3}


def test_json_has_no_word_for_nan():
    assert json.loads(evaluation.to_json({"a": math.nan, "b": [1.5, math.inf], "c": {"d": 2}})) == {
        "a": None, "b": [1.5, None], "c": {"d": 2}}


# ---------------------------------------------------------------------------------------------- pictures


def test_sparsity_is_equation_1_of_the_increments_block_by_block(tmp_path):
    model, random = tiny.Tiny(), torch.Generator().manual_seed(0)
    layers = lora.attach(model, {"blocks.0.query": 2, "blocks.0.up": 3, "blocks.2.value": 4}, 6, nominal=4)
    for layer in layers.values():
        layer.B.data.normal_(std=3e-4, generator=random)
    lora.save_adapter(model, tmp_path / "adapter", "tiny", head=False)
    for epsilon in (1e-4, 2e-5):
        expected = [0, math.log(1 / epsilon), 0]  # an increment of zeros
        for block, names in ((0, ("blocks.0.query", "blocks.0.up")), (2, ("blocks.2.value",))):
            near, entries = 0, 0
            for name in names:
                A, B = (x.detach().numpy().astype(np.float64) for x in (layers[name].A, layers[name].B))
                P = 6 / 4 * B @ A
                near, entries = near + np.count_nonzero((-epsilon < P) & (P < epsilon)), entries + P.size
            assert 0 < near < entries
            expected[block] = math.log(near / (epsilon * entries))
        assert figures.sparsity(tmp_path / "adapter", 3, epsilon) == pytest.approx(expected)
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
    assert list(curves(drawn["training.png"])) == ["training loss", "evaluation", "trainable adapter parameters"]
    evaluation.plot(runs / "lelora-0")
    assert curves(drawn["training.png"])["the policy's own numbers"][0] == [2, 4, 6]
    with pytest.raises(UserError, match="no run among 2 paths"):
        evaluation.plot(runs / "notes", runs / "notes.txt")
    with pytest.raises(UserError, match="run.json"):
        evaluation.plot(runs / "notes")
    with pytest.raises(UserError, match="no finished run among 1"):
        figures.draw([runs / "unfinished"])
