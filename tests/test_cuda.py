"""On a GPU that does not exist (extras/fake_gpu.py): no step waits for it, few launches, the headline run fits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the fake GPU needs g++")
PROGRAM = Path(__file__).parents[1] / "extras" / "fake_gpu.py"


def fake(*words):
    done = subprocess.run([sys.executable, str(PROGRAM), *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


METHODS = ["lora", "linear-decay", "lalora", "adalora --adalora-delta-t 2", "random", "weightlora --weightlora-steps 3",
           "weightlora+ --weightlora-steps 8", "credit", "lelora", "full", "bitfit"]
FEW = [("llama", "--method lalora"), ("roberta", "--method adalora --adalora-delta-t 2"), ("vit", "--method lelora"),
       ("llama", "--method weightlora+ --weightlora-steps 3 --init pissa"), ("roberta", "--dora --lora-plus-ratio 4"),
       ("llama", "--method lelora --lelora-policy-optimizer adam --checkpointing")]
MANY = [(family, f"--method {method}") for method in METHODS for family in ("llama", "roberta", "vit")
        if (family, method) != ("llama", "bitfit")]
MANY += [("llama", words) for words in (
    "--init pissa", "--init milora", "--freeze-a", "--accumulate 2", "--clip 0", "--dtype float32", "--forward-rows 3",
    "--optimizer sgd", "--optimizer muon --method lalora", "--method lalora --lalora-score fisher",
    "--method lalora --dora", "--method lelora --lelora-ablate rank", "--method lelora --lelora-every 3")]
MANY += [("gemma", "--method lelora")]


@pytest.mark.parametrize("family, words", FEW + (MANY if os.environ.get("SLOW") else []))
def test_no_step_waits_and_a_run_resumes(family, words):
    found = fake("run", family, *words.split())
    assert found["error"] is None and not found["waits"], found


SLOW = """import torch
from allocators import Allocator
class Slow(Allocator):
    def after_step(self, step):
        {}
"""


@pytest.mark.parametrize("line, found, expected", [
    ("return bool(self.current.sum() < 0)", "waits", "item, tolist or bool at train.py"),
    ("self.current += torch.ones(len(self.current))", "error", "cuda:0")])  # as both torch 2.11 and 2.13 name it
def test_a_wait_and_a_tensor_on_the_wrong_device_are_noticed(line, found, expected, tmp_path):
    (tmp_path / "policy.py").write_text(SLOW.format(line))
    assert expected in str(fake("run", "llama", "--method", f"{tmp_path / 'policy.py'}:Slow")[found])


# launches of a step, LLaMA2-7B's shape, 8 x 512, rank 32 on five projections: in all, and of the optimizer
CEILING = {"lora": (5200, 20), "lalora": (5800, 150), "lelora": (6000, 150), "adalora": (6000, 20),
           "weightlora+": (5200, 20)}


@pytest.mark.parametrize("method", CEILING if os.environ.get("SLOW") else ["lelora"])
def test_a_step_is_few_launches(method):
    found = fake("count", method, "llama2-7b", 8, 512)
    most, optimizer = CEILING[method]
    assert found["total"] <= most and found["launches"]["optimizer"] <= optimizer, found


def test_the_headline_run_is_split_until_it_fits():
    """train.py --method lelora --model llama2-7b: 64 rows of up to 256 tokens, on 80 GB."""
    found = fake("fit", "lelora", "llama2-7b", 64, 256, 79)
    assert found["peak_gib"] < 75 and 0 < found["forward_rows"] < 64, found


def test_a_generated_token_is_few_launches():
    assert fake("decode", "llama2-7b", 8)["launches"] <= 1160
