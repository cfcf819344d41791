"""What the README says works when it is typed."""

import re
import subprocess
import sys

import torch
from test_train import checkpoints  # noqa: F401: a fixture
from tiny import ROOT

import train

README = (ROOT / "README.md").read_text()


def code(mark):
    """The README's code block that contains `mark`."""
    (found,) = [text for text in re.findall(r"```(?:python)?\n(.*?)```", README, re.S) if mark in text]
    return found


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
    helps = [subprocess.check_output([sys.executable, *program.split(), "--help"], cwd=ROOT, text=True)
             for program in programs]
    assert not [name for name in re.findall(r"`([\w/-]+\.(?:py|txt))`", README) if not (ROOT / name).exists()]
    flags = set(re.findall(r"--[a-z0-9-]+", "".join(helps)))
    assert all("--" + name.replace("_", "-") in flags for name in train.Settings.__dataclass_fields__)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - {"--nproc-per-node"}  # of torchrun
    assert len(named) > 15 and not named - flags, named - flags
