"""What the README says works when it is typed."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from test_train import ROOT, checkpoints, lines, texts  # noqa: F401 (two are fixtures)

import train

README = (ROOT / "README.md").read_text()
SHORT = ["--limit-train", "160", "--limit-eval", "40", "--epochs", "1", "--no-eval-before", "--log-every", "1"]


def code(mark):
    """The README's code block that contains `mark`."""
    (found,) = [text for text in re.findall(r"```(?:python)?\n(.*?)```", README, re.S) if mark in text]
    return found


def test_the_penalty_keeps_near_the_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("near.py").write_text("import lora\nimport torch\nimport torch.nn.functional as F\nfrom allocators import "
                               "Allocator\n\nclass Near(Allocator):\n" + textwrap.indent(code("def penalty"), "    "))
    norms = []
    for method in ("near.py:Near", "lora"):
        train.main([*SHORT, "--method", method, "--out", method[:4]])
        norms.append([line["grad_norm"] for line in lines(Path(method[:4]) / "metrics.jsonl") if "loss" in line])
    near, plain = norms
    assert near[0] == pytest.approx(plain[0], rel=1e-5)  # B = 0: the model is its base
    assert near[-1] != pytest.approx(plain[-1], rel=1e-3)


def test_the_library_example_trains_an_adapter_for_peft(checkpoints, tmp_path, monkeypatch):  # noqa: F811
    import peft
    import transformers
    monkeypatch.chdir(tmp_path)
    tokens, mask = torch.arange(40).view(4, 10), torch.ones(4, 10, dtype=torch.bool)
    names = {"batches": [(tokens, mask, torch.tensor([0, 1, 1, 0]))] * 5}
    exec(code("lora.attach").replace('"minilm"', repr(str(checkpoints / "bert"))), names)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert")
    loaded = peft.PeftModel.from_pretrained(base, "adapter").eval()
    with torch.no_grad():
        ours = names["model"].eval()(tokens, mask)
        torch.testing.assert_close(ours, loaded(input_ids=tokens, attention_mask=mask.long()).logits, rtol=1e-4,
                                   atol=1e-4)


def test_files_and_flags_named_in_the_readme_exist():
    programs = ("train.py", "eval.py", "bench.py", "bench.py quality", "papers/tables.py")
    helps = [subprocess.run([sys.executable, *program.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
             for program in programs]
    assert not any(done.returncode for done in helps)
    for name in set(re.findall(r"`([\w/-]+\.(?:py|txt))`", README)):
        assert (ROOT / name).exists(), name
    flags = set(re.findall(r"--[a-z0-9-]+", "".join(done.stdout for done in helps)))
    assert all("--" + name.replace("_", "-") in flags for name in train.Settings.__dataclass_fields__)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - {"--nproc-per-node"}  # of torchrun
    assert len(named) > 15 and not named - flags, named - flags
