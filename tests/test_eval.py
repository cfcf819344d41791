"""Metrics against scikit-learn and scipy; losses, heads and labels against transformers; pictures of runs."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_train import BERT, WORDS, tokenizer_into

import data
import eval as evaluation
import lora
import model as models
import train
from extras import pictures
from extras import adapter_files, devices
from papers import figures

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
transformers = pytest.importorskip("transformers")


random = np.random.default_rng(0)
MIXED, ONES, ZEROS, X = np.arange(20) % 2, np.ones(20, int), np.zeros(20, int), random.normal(size=400)
CLASSES = [random.integers(classes, size=(2, n)) for n in (1, 7, 300) for classes in (2, 5)]
CLASSES += [(ONES, ONES), (ZEROS, ZEROS), (ONES, ZEROS), (ZEROS, ONES), (ONES, MIXED), (MIXED, ZEROS)]
NUMBERS = [(X[:n], 0.5 * X[:n] + random.normal(size=n)) for n in (2, 10, 400)]
NUMBERS += [(np.round(2 * x), np.round(y)) for x, y in NUMBERS]  # ties
NUMBERS += [(X, -3 * X), (1e6 + 1e-3 * X, X), (np.full(9, 2.5), X[:9]), (X[:9], np.zeros(9))]


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_scikit_learns_and_scipys():
    """For random values of several sizes, and every degenerate kind."""
    for x, y in CLASSES:
        assert evaluation.accuracy(x, y) == pytest.approx(sklearn_metrics.accuracy_score(y, x))
        assert evaluation.matthews(x, y) == pytest.approx(sklearn_metrics.matthews_corrcoef(y, x), abs=1e-12)
        if max(x.max(), y.max()) < 2:
            assert evaluation.f1(x, y) == pytest.approx(sklearn_metrics.f1_score(y, x, zero_division=0))
    for x, y in NUMBERS:
        assert evaluation.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, nan_ok=True, abs=1e-8)
        assert evaluation.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, nan_ok=True, abs=1e-10)
    assert math.isnan(evaluation.pearson(X[:1], X[:1]))  # one row has none


# ---------------------------------------------------------------------------------------------- losses and batches


@pytest.fixture
def language_model():
    """A tiny random Llama whose outputs are far from uniform, and a Split of 23 rows."""
    random = np.random.default_rng(3)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=50, num_attention_heads=2,
                 num_key_value_heads=2)
    torch.manual_seed(0)
    model = models.Decoder(models.normalise(models.CONFIGS["llama2-7b"] | sizes, ""), "lm").eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = [random.integers(50, size=random.integers(3, 12)).astype(np.int32) for _ in range(23)]
    starts = [int(random.integers(1, len(t))) for t in tokens]
    return model, data.Split("lm", tokens, [len(t) for t in tokens], tokens=tokens, starts=starts)


def test_perplexity_is_that_of_the_answer_tokens_alone(language_model):
    (model, split), nll = language_model, []
    for tokens, start in zip(split.tokens, split.starts):
        tokens = torch.from_numpy(tokens).long()
        logits = model(tokens[None])[0, start - 1:-1].detach()
        nll += F.cross_entropy(logits, tokens[start:], reduction="none").tolist()
    for batch_size in (1, 5, 23):
        result = evaluation.evaluate(model, data.find_task("instructions"), split, batch_size)
        assert result == pytest.approx({"loss": np.mean(nll), "perplexity": np.exp(np.mean(nll))}, rel=1e-5)


@pytest.mark.parametrize("chunk", [50, 333, 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_token_loss_in_chunks_is_the_cross_entropy_and_has_its_gradients(language_model, monkeypatch, chunk, tied):
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
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names, expected", [
    (["boolq", "piqa"], {"accuracy": 0.65, "accuracy_boolq": 0.5, "accuracy_piqa": 0.8, "eval_rows": 9}),
    (["dev", "dev_mismatched"], {"accuracy": 0.6, "accuracy_dev_mismatched": 0.2, "eval_rows": 17}),
    (["dev"], {"accuracy": 0.6, "eval_rows": 3})])
def test_several_splits_are_named_and_averaged(names, expected, monkeypatch):
    scores = {"boolq": 0.5, "piqa": 0.8, "dev": 0.6, "dev_mismatched": 0.2}
    monkeypatch.setattr(evaluation, "evaluate", lambda model, task, split, *rest: {"accuracy": scores[split.kind]})
    splits = {name: data.Split(name, [], name) for name in names}
    assert evaluation.evaluate_splits(None, None, splits, 1) == pytest.approx(expected)


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


def test_json_has_no_word_for_nan():
    assert json.loads(evaluation.to_json({"a": math.nan, "b": [1.5, math.inf]})) == {"a": None, "b": [1.5, None]}


# ---------------------------------------------------------------------------------------------- heads


MOOD, UNNAMED, DIGITS = ["negative", "neutral", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "3"]


@pytest.mark.parametrize("names, labels, expected, said", [
    (MOOD, ["POSITIVE", "Neutral ", "negative"], [2, 1, 0], None), (MOOD, ["good", "bad", "neutral"], [], None),
    (MOOD, ["2", "0", "1"], [2, 0, 1], "the data's 0, 1, 2 are taken as the numbers of its outputs negative,"),
    (MOOD, ["0", "2"], [], None), (UNNAMED[::-1], ["0", "1", "2"], [2, 1, 0], None),
    (UNNAMED, ["label_2", "LABEL_1"], [2, 1], None), (UNNAMED, ["a", "b"], [], None),
    (UNNAMED, ["b", "c", "a"], [0, 1, 2], "to be b, c, a in this"), (UNNAMED, DIGITS, [0, 1, 2], "to be 1, 2, 3 in"),
    (DIGITS, ["3", "1"], [2, 0], None), (DIGITS, ["0", "1", "2"], [], None)])
def test_outputs_of_a_trained_head_are_matched_to_the_datas_labels(names, labels, expected, said):
    outputs, remark = evaluation.match_labels(names, labels)
    assert outputs == expected and (said in remark if said else remark is None)


def bert(folder, labels, names):
    """transformers' tiny BERT with a head of these labels, saved in `folder`; a file of 60 texts labelled `names`."""
    torch.manual_seed(5)
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
        vocab_size=tokenizer_into(folder, *BERT), max_position_embeddings=40, id2label=dict(enumerate(labels)))).eval()
    theirs.save_pretrained(folder)
    random, file = np.random.default_rng(0), folder / "data.tsv"
    rows = [f"{' '.join(random.choice(WORDS, size=5))}\t{names[i % len(names)]}\n" for i in range(60)]
    file.write_text("text\tlabel\n" + "".join(rows))
    return theirs, str(file)


def test_a_trained_head_gives_transformers_logits_for_the_datas_labels(tmp_path):
    theirs, file = bert(tmp_path, MOOD, ["positive", "negative"])
    task = data.find_task("text-classification", file)
    s = SimpleNamespace(model=str(tmp_path), init_weights="checkpoint", dtype="float32", device="cpu", seed=0,
                        max_length=32)
    model, processor = evaluation.load(s, task)
    rows = data.read(task, file)[:9]
    inputs, _ = data.collate(processor.training(rows, 32), list(range(9)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    their_inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs(**their_inputs).logits[:, [0, 2]]
        torch.testing.assert_close(evaluation.logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert model.fresh == [] and model.config.num_labels == 2


@pytest.mark.parametrize("labels", [MOOD[::2], MOOD])
def test_a_head_of_other_labels_is_named_and_not_evaluated(labels, tmp_path, caplog):
    _, file = bert(tmp_path, labels, ["good", "bad"])
    flags = [str(tmp_path), "--task", "text-classification", "--data", file, "--device", "cpu"]
    data.note.cache_clear()
    with tiny.refused("no head trained for text-classification"):
        evaluation.main(flags)
    assert f"its {len(labels)} outputs ({', '.join(labels)}) are not this task's (bad, good)" in caplog.text
    evaluation.main([*flags, "--random-head"])  # asked for


# ---------------------------------------------------------------------------------------------- pictures


def test_sparsity_is_equation_1_of_the_increments_block_by_block(tmp_path):
    model, random = tiny.Tiny(), torch.Generator().manual_seed(0)
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


def test_runs_are_labelled_by_what_differs_between_runs_of_their_method_on_a_task():
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
def test_a_set_of_runs_gets_the_figures_it_has_the_data_for(runs, chosen, expected, capsys, caplog):
    data.note.cache_clear()
    figures.main([str(path) for path in runs.glob(chosen)])
    pictures = [runs / f"{name}.png" for name in expected.split()]
    assert json.loads(capsys.readouterr().out) == {"figures": list(map(str, pictures))}
    assert all(path.exists() for path in pictures)
    left_out = sorted(message.split(" (")[0] for message in caplog.messages)
    assert left_out == ["left out, no finished run: notes", "left out, no finished run: unfinished"] * (chosen == "*")
    with tiny.refused("no finished run among 2"):
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
    with tiny.refused("no run among 1"):
        pictures.plot([runs / "notes"])
