"""Merged checkpoints and model cards: what transformers, PEFT and the Hub's tools make of a run's folder."""

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
from test_train import LLAMA, ROOT, cache, checkpoints, main, refused, texts, tokenizer_into  # noqa: F401 (fixtures)

import eval as evaluation

transformers = pytest.importorskip("transformers")

@pytest.mark.parametrize("model, task, folder, method", [
    ("bert", "text-regression", "scores", "adalora"), ("bert", "text-classification", "classes", "lelora"),
    ("bert", "text-classification", "classes", "lora --dora --init pissa"), ("llama", "boolq", "", "weightlora+"),
    ("llama", "text-classification", "classes", "lalora"), ("vit", "digits-rot90", None, "empirical"),
    ("vit", "digits", None, "full"), ("llama", "boolq", "", "full")])
def test_merged_checkpoints_and_cards(model, task, folder, method, checkpoints, texts, tmp_path,  # noqa: F811
                                      monkeypatch, capsys):
    """The run, the merged checkpoint and what the card's code loads give the same logits."""
    run, own = tmp_path / "run", ["--max-length", 32 if model == "bert" else 64]
    own += [] if model == "vit" else ["--model", checkpoints / model, "--data", texts / folder]
    own += [] if method == "full" else ["--rank", 4]
    main(*own, "--task", task, "--method", *method.split(), "--out", run, "--steps", 12, "--batch-size", 8,
         "--lr", 2e-2, "--limit-train", 64, "--limit-eval", 30, "--no-eval-before")  # which moves the weights far
    capsys.readouterr()
    evaluation.main(["merge", str(run), str(tmp_path / "merged")])
    merged = Path(json.loads(capsys.readouterr().out)["merged"])
    _, _, encoder, ours = evaluation.load_run(run, {})
    their_inputs, inputs, _ = batch(model, torch.Generator().manual_seed(3), image=(1, 8, 8))
    real = inputs["mask"] if task == "boolq" else slice(None)
    with torch.no_grad():
        expected = ours(**inputs)[real]
    kind = transformers.AutoConfig.from_pretrained(merged).architectures[0]
    theirs = getattr(transformers, kind).from_pretrained(merged)
    if "input_ids" in their_inputs:  # transformers' decoders find a row's last token by the padding after it
        their_inputs["input_ids"][their_inputs["attention_mask"] == 0] = theirs.config.pad_token_id or 0
    labels = json.loads((run / "run.json").read_text())["labels"]
    assert not labels or theirs.config.id2label == dict(enumerate(labels))
    card = (run / "README.md").read_text()
    assert ("| dora | True |" in card and "| init | pissa |" in card) == ("--dora" in method)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    scope = {}
    monkeypatch.chdir(run)
    exec(code, scope)
    for loaded in (theirs, scope["model"].eval()):
        logits = loaded(**their_inputs).logits.detach()
        torch.testing.assert_close(logits[real], expected, rtol=0, atol=1e-4)
    if model != "vit":
        words = ["the cat is very good", "a film"]
        assert transformers.PreTrainedTokenizerFast.from_pretrained(merged)(words)["input_ids"] == [
            ids.tolist() for ids in encoder.tokenizer.encode(words)[0]]
        assert scope["model"].config.pad_token_id is not None and scope["tokenizer"].pad_token
    part = run / ("model" if method == "full" else "adapter")
    assert (part / "README.md").read_text() == card.replace(f'"{part.name}"', '"."')


MEASURE = """
import sys, threading, time
import eval as evaluation
def watch():
    while True:
        sizes.append(int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) * 1024)
        time.sleep(0.001)
evaluation.models.load(sys.argv[1])  # imports what torch imports late
sizes = []
threading.Thread(target=watch, daemon=True).start()
evaluation.main(["merge", *sys.argv[2:]])
print(max(sizes) - sizes[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory not measured")
def test_memory_holds_the_weights_once(checkpoints, texts, tmp_path):  # noqa: F811
    """Anonymous memory at its peak: one copy of the weights and a few of the largest matrix."""
    base, run = tmp_path / "base", tmp_path / "run"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8, bos_token_id=1,
        vocab_size=tokenizer_into(base, *LLAMA), eos_token_id=2)).save_pretrained(base, max_shard_size="20MB")
    main("--model", base, "--task", "instructions", "--data", texts / "boolq" / "train.json", "--steps", 1,
         "--batch-size", 1, "--rank", 4, "--max-length", 128, "--no-eval-before", "--limit-eval", 1, "--out", run)
    evaluation.main(["merge", str(run), str(tmp_path / "half"), "--dtype", "bfloat16"])
    done = subprocess.run([sys.executable, "-c", MEASURE, checkpoints / "llama", run, tmp_path / "merged"], cwd=ROOT,
                          check=True, stdout=subprocess.PIPE, text=True)
    peak = int(done.stdout.split()[-1])
    weights, half = (sum(file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors"))
                     for folder in ("base", "half"))
    assert weights > 150e6 and 0.49 < half / weights < 0.51
    assert 0.9 * weights < peak < weights + 4 * 4 * 512 * 1024 + 10e6, (peak, weights)


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    main("--limit-train", 64, "--limit-eval", 20, "--steps", 12, "--method", "adalora", "--rank", 2, "--out", out)
    return out


@pytest.mark.parametrize("argv, expected", [
    ("merge {run} full", "not empty"), ("merge {run} file", "not empty"), ("merge {run}", "RUN and OUT"),
    ("merge none out", "run.json"), ("merge unfinished out", "did the run finish"), ("merge damaged out", "damaged"),
    ("merge {run} out --limit-eval 3", "no flags but"), ("merge {run} file/out", "file"), ("{run} out", "unexpected"),
    ("{run} --random-head", "its own adapter"), ("merge odd out", "the dtype is missing")])
def test_what_cannot_be_merged_leaves_nothing(argv, expected, tmp_path, capsys, short, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("unfinished", "damaged", "odd"):
        shutil.copytree(short, name)
    Path("odd/run.json").write_text(Path("odd/run.json").read_text().replace('"float32"', '"float31"'))
    shutil.rmtree("unfinished/adapter")
    Path("damaged/adapter/adapter_model.safetensors").write_bytes(b"\xff" * 40)
    Path("full/mine").mkdir(parents=True)
    Path("file").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    assert expected in refused(evaluation, argv.format(run=short).split(), capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_card_says_what_the_run_was(short):
    _, front, body = (short / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert pytest.importorskip("huggingface_hub").ModelCard.load(short / "adapter/README.md").data.to_dict() == front
    assert front == {"library_name": "peft", "pipeline_tag": "image-classification",
                     "tags": ["lora", "adalora", "digits-rot90"]}
    result = json.loads((short / "result.json").read_text())
    ranks = json.loads((short / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    for line in [f"| accuracy | {result['before']['accuracy']:.4f} | {result['accuracy']:.4f} |",
                 f"besides the head: {result['trainable_params']['now']:,} ",
                 "Trained on 64 rows; evaluated on 20 rows.", "| targets | query, value |", "| limit_train | 64 |",
                 *(f"| {i} | {ranks[f'blocks.{i}.query']} | {ranks[f'blocks.{i}.value']} |" for i in range(6))]:
        assert line in body
