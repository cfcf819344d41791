"""Merged checkpoints and model cards: what transformers, PEFT and the Hub's tools make of a run's folder."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_lora import batch
from test_train import LLAMA, ROOT, checkpoints, main, texts, tokenizer_into  # noqa: F401 (two of them are fixtures)

import eval as evaluation
import model as models
from extras import cards

transformers = pytest.importorskip("transformers")

RUNS = [("bert", "text-regression", "scores", "adalora"),
        ("bert", "text-classification", "classes", "lelora"), ("llama", "boolq", "", "weightlora+"),
        ("llama", "text-classification", "classes", "lalora"), ("vit", "digits-rot90", None, "empirical"),
        ("bert", "text-classification", "classes", "lora --dora --init pissa"), ("vit", "digits", None, "full"),
        ("bert", "text-classification", "classes", "bitfit"), ("llama", "boolq", "", "full")]
AUTO = {"boolq": "CausalLM", "digits": "ImageClassification", "digits-rot90": "ImageClassification"}


def trained(model, task, folder, method, out, request):
    """A short run's folder, with settings that move the weights far."""
    length, own = 64 if model == "llama" else 32, []
    if model != "vit":
        base, texts = request.getfixturevalue("checkpoints") / model, request.getfixturevalue("texts")
        own = ["--model", base, "--data", texts / folder]
    if method not in ("full", "bitfit"):
        own += ["--rank", 4]
    main(*own, "--task", task, "--method", *method.split(), "--out", out, "--steps", 12, "--batch-size", 8,
         "--lr", 2e-2, "--limit-train", 64, "--limit-eval", 30, "--max-length", length, "--no-eval-before")
    return out


@pytest.mark.parametrize("model, task, folder, method", RUNS, ids=[f"{m}-{t}-{k}" for m, t, _, k in RUNS])
def test_merged_checkpoints_and_cards(model, task, folder, method, tmp_path, monkeypatch, capsys, request):
    """The run, the merged checkpoint in transformers, and the model that the card's code loads give the same logits."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    run = trained(model, task, folder, method, tmp_path / "run", request)
    capsys.readouterr()
    evaluation.main(["merge", str(run), str(tmp_path / "merged")])
    merged = Path(json.loads(capsys.readouterr().out)["merged"])
    _, _, encoder, ours = evaluation.load_run(run, {})
    their_inputs, inputs, _ = batch(model, torch.Generator().manual_seed(3), image=(1, 8, 8))
    real = inputs["mask"] if model == "llama" and AUTO.get(task) else slice(None)
    with torch.no_grad():
        expected = ours(**inputs)[real]
        auto = getattr(transformers, "AutoModelFor" + AUTO.get(task, "SequenceClassification"))
        theirs = auto.from_pretrained(merged)
        if "input_ids" in their_inputs:  # transformers' decoders find a row's last token by the padding after it
            their_inputs["input_ids"][their_inputs["attention_mask"] == 0] = theirs.config.pad_token_id or 0
        torch.testing.assert_close(theirs(**their_inputs).logits[real], expected, rtol=0, atol=1e-4)
    labels = json.loads((run / "run.json").read_text())["labels"]
    assert not labels or theirs.config.id2label == dict(enumerate(labels))
    if model != "vit":
        texts = ["the cat is very good", "a film"]
        assert transformers.PreTrainedTokenizerFast.from_pretrained(merged)(texts)["input_ids"] == [
            ids.tolist() for ids in encoder.tokenizer.encode(texts)[0]]
    if AUTO.get(task) != "CausalLM":  # also here, as an untouched model, from the merged folder alone
        again = models.load(merged, "classify")
        torch.testing.assert_close(again(**inputs), expected, rtol=0, atol=1e-4)

    card = (run / "README.md").read_text()
    assert ("| dora | True |" in card and "| init | pissa |" in card) == ("--dora" in method)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    scope = {}
    monkeypatch.chdir(run)
    exec(code, scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(**their_inputs).logits[real], expected, rtol=0, atol=1e-4)
    if model != "vit":
        assert scope["model"].config.pad_token_id is not None and scope["tokenizer"].pad_token
    part = run / ("adapter" if (run / "adapter").is_dir() else "model")
    assert (part / "README.md").read_text() == card.replace(f'"{part.name}"', '"."')


MEASURE = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import eval as evaluation
def resident():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) * 1024
evaluation.models.load(sys.argv[2])  # imports what torch imports late
peak, start = [0], resident()
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
evaluation.main(["merge", *sys.argv[3:]])
print(peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory not measured")
def test_memory_holds_the_weights_once(checkpoints, tmp_path):
    """Anonymous memory at its peak while merging: one copy of the weights and a few of the largest matrix."""
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8, bos_token_id=1,
        vocab_size=tokenizer_into(base, *LLAMA), eos_token_id=2)).save_pretrained(base, max_shard_size="20MB")
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": "the cat", "output": "is good"}] * 20))
    main("--model", base, "--task", "instructions", "--data", tmp_path, "--steps", 1, "--batch-size", 1, "--rank", 4,
         "--max-length", 128, "--no-eval-before", "--limit-eval", 1, "--out", run)
    done = subprocess.run([sys.executable, "-c", MEASURE, ROOT, checkpoints / "llama", run, tmp_path / "merged"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    peak, largest = int(done.stdout.split()[-1]), 4 * 512 * 1024
    assert weights > 150e6
    assert 0.9 * weights < peak < weights + 4 * largest + 10e6, (peak, weights)


def test_merge_takes_the_dtype_that_is_asked_for(short, tmp_path):
    evaluation.main(["merge", str(short), str(tmp_path / "half"), "--dtype", "bfloat16"])
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "half")
    assert theirs.vit.layers[0].attention.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("argv, expected", [
    ("merge {run} full", "not empty"), ("merge {run} file", "not empty"), ("merge {run}", "RUN and OUT"),
    ("merge none out", "run.json"), ("merge unfinished out", "did the run finish"), ("merge damaged out", "damaged"),
    ("merge {run} out --limit-eval 3", "no flags but"), ("merge {run} file/out", "file"), ("{run} out", "unexpected"),
    ("{run} --adapter {run}/adapter", "its own adapter"), ("{run} --random-head", "its own adapter"),
    ("{run} --batch-size 0", "must be from 1")])
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(argv, expected, tmp_path, capsys, short, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("unfinished", "damaged"):
        shutil.copytree(short, name)
    shutil.rmtree("unfinished/adapter")
    weights = Path("damaged/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    Path("full/mine").mkdir(parents=True)
    Path("file").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: evaluation.main(argv.format(run=short).split()))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert re.search(expected, printed.err.strip().splitlines()[-1]), printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    main("--limit-train", 64, "--limit-eval", 20, "--steps", 12, "--method", "adalora", "--rank", 2, "--out", out)
    return out


def front_matter(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_says_what_the_run_was(short):
    hub = pytest.importorskip("huggingface_hub")
    front, body = front_matter((short / "README.md").read_text())
    assert hub.ModelCard.load(short / "adapter" / "README.md").data.to_dict() == front
    assert front == {"library_name": "peft", "pipeline_tag": "image-classification",
                     "tags": ["lora", "adalora", "digits-rot90"]}
    result = json.loads((short / "result.json").read_text())
    assert f"| accuracy | {result['before']['accuracy']:.4f} | {result['accuracy']:.4f} |" in body
    assert f"besides the head: {result['trainable_params']['now']:,} " in body
    assert "Trained on 64 rows; evaluated on 20 rows." in body
    for line in ("targets | query, value", "clip | 1.0", "limit_train | 64", "limit_eval | 20"):
        assert f"| {line} |" in body
    ranks = json.loads((short / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    for block in range(6):
        assert f"| {block} | {ranks[f'blocks.{block}.query']} | {ranks[f'blocks.{block}.value']} |" in body


NAMES = ["a`b``c", "pipe | and *star*", "quote \" and 'quote'", "new\nline\n---\n# title", "<script>alert(1)</script>",
         "{0.__class__} %s", "```\nimport os", "back\\slash", "köln 模型", "- list: [1, {2}]", "undecodable \udcff"]


def card_of(short, tmp_path, name, labels=None):
    """(front matter, text) of the card of a run on a model of this name, with labels of these names."""
    for file in ("metrics.jsonl", "ranks.jsonl"):
        shutil.copy(short / file, tmp_path)
    run = json.loads((short / "run.json").read_text())
    run["settings"]["model"], run["labels"] = name, labels or run["labels"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "adapter").mkdir(exist_ok=True)
    cards.write_cards(tmp_path, 64)
    return front_matter((tmp_path / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_the_card(name, short, tmp_path):
    """Model folders and labels with any characters: front matter parses, code stays code, tables keep their columns."""
    front, body = card_of(short, tmp_path, f"/models/{name}", [name, "other", *map(str, range(8))])
    assert "base_model" not in front and front["library_name"] == "peft"
    assert [line for line in body.splitlines() if line.startswith("#")] == [body.splitlines()[1]]
    assert len(re.findall("^```", body, re.M)) == 2 and body.rstrip().endswith("```")
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.S | re.M)
    values = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f"/models/{name}" in values and name in values  # Python that says what was meant
    for table in re.findall(r"(?:^\|.*\|\n)+", body, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name, expected", [
    ("roberta-base", "FacebookAI/roberta-base"), ("some-one/a.model_2", "some-one/a.model_2"), ("../x", None),
    ("a/b/c", None), ("modèle/x", None)])
def test_hub_names_are_the_cards_base_model(name, expected, short, tmp_path):
    assert card_of(short, tmp_path, name)[0].get("base_model") == expected
