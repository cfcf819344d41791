"""What the README says works when it is typed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_policy_is_one_class_and_one_line(tmp_path):
    """The README's code, appended to allocators.py, trains from the command line and allocates as it says."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    with open(tmp_path / "allocators.py", "a") as file:
        file.write("\n\n" + example)
    done = subprocess.run([sys.executable, "train.py", "--method", "thaw", "--epochs", "2", "--out", "run"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["accuracy"] > result["before"]["accuracy"]
    history = [json.loads(line)["ranks"] for line in (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()]
    assert [history[0][f"blocks.{i}.query"] for i in range(6)] == [0, 0, 0, 0, 0, 8]
    assert set(history[-1].values()) == {8}
    totals = [sum(ranks.values()) for ranks in history]
    assert totals == sorted(totals) and len(set(totals)) >= 4


def test_files_and_flags_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    programs = ("train.py", "eval.py", "bench.py", "bench.py quality", "papers/tables.py")
    help_text = "".join(subprocess.run([sys.executable, *program.split(), "--help"], cwd=ROOT, capture_output=True,
                                       text=True).stdout for program in programs)
    for name in set(re.findall(r"`([\w-]+\.(?:py|txt))`", text)):
        assert (ROOT / name).exists(), name
    flags = set(re.findall(r"--[a-z0-9-]+", help_text))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - {"--nproc-per-node"}  # of torchrun
    assert len(named) > 15 and not named - flags, named - flags
