"""What a file from elsewhere cannot do: run code, fill the memory, write outside its folder, reach a shell."""

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from tiny import ROOT, refused

import data
import model as models
import train
from extras import adapter_files, devices, fetch

FORBIDDEN = re.compile(r"""
      \b(import|from)\s+(_?pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve|jsonpickle|yaml|pandas|pty|code)\b
    | \btorch\.(load|save|hub|package|serialization|jit\.load)\b | \bfrom\s+torch\s+import\s+(load|save)\b
    | \b(np|numpy)\.load\((?!.*allow_pickle=False) | allow_pickle=(?!False) | \bfrom\s+numpy\s+import\s+load\b
    | (?<![\w.])(eval|exec|compile|__import__)\( | \bimport_module\b
    | \bos\.(system|popen|exec|spawn|posix_spawn) | \bgetoutput\b | \bshell\s*= | \btrust_remote_code\b""", re.VERBOSE)
BAD = ["from pickle import loads", "import joblib as j", "torch.load(f, weights_only=True)", "from torch import load",
       "np.load(f)", "numpy.load(f, allow_pickle=x)", "x = compile(text, '', 'exec')", "os.system(text)",
       "subprocess.run(text, shell=True)", "__import__(name)"]
GOOD = ["x.load(f)", "re.compile(p)", "model.eval()", "np.load(f, allow_pickle=False)", "subprocess.run([a, b])"]


def test_no_source_runs_code_from_data():
    assert all(FORBIDDEN.search(line) for line in BAD) and not any(FORBIDDEN.search(line) for line in GOOD)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("papers/*.py"), *ROOT.glob("extras/*.py")]:
        source = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(source):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""  # of texts nothing runs
        for line in ast.unparse(source).splitlines():
            assert not FORBIDDEN.search(line), f"{path.name}: {line}"


class Payload(str):
    """Unpickling this path makes a folder there."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a short run, as if it had been killed before its result was written."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.run(train.Settings(steps=2, limit_train=40, limit_eval=20, batch_size=8, eval_before=False, out=str(out)))
    (out / "result.json").unlink()
    return out


@pytest.fixture
def folder(run, tmp_path):
    """A folder with copies of the run, of an adapter and of a checkpoint to spoil."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copytree(ROOT / "assets" / "vit-digits", tmp_path / "model")
    return tmp_path


LOAD = {"model": lambda folder: models.load(folder / "model"),
        "adapter": lambda folder: adapter_files.load_adapter(models.load(folder / "model"), folder / "adapter"),
        "checkpoint": lambda folder: train.main(["--resume", str(folder / "run")]),
        "npz": lambda folder: data.read(data.TASKS["npz"], str(folder / "model")),
        "image": lambda folder: data.read_image(folder / "model" / "1.npy"),
        "tokenizer": lambda folder: data.Tokenizer.from_folder(folder / "model")}
KINDS = {  # of pickles: what writes them, what reads them
    "pickle": (pickle.dump, pickle.load), "torch": (torch.save, lambda file: torch.load(file, weights_only=False)),
    "npy": (lambda array, file: np.save(file, array), lambda file: np.load(file, allow_pickle=True)),
    "npz": (lambda array, file: np.savez(file, images=array, labels=np.zeros(1, int)),
            lambda file: np.load(file, allow_pickle=True)["images"])}
PICKLED = [  # what is loaded, the file that is a pickle of this kind
    ("model", "model/pytorch_model.bin", "torch"), ("model", "model/model.safetensors", "torch"),
    ("adapter", "adapter/adapter_model.bin", "torch"), ("adapter", "adapter/adapter_model.safetensors", "pickle"),
    ("checkpoint", "run/checkpoints/step-2/state.safetensors", "torch"), ("npz", "model/train.npz", "npz"),
    ("image", "model/1.npy", "npy"), ("model", "model/config.json", "pickle"),
    ("tokenizer", "model/tokenizer.json", "pickle")]


@pytest.mark.parametrize("what, file, kind", PICKLED, ids=str)
def test_pickles_are_refused_unread(what, file, kind, folder):
    (write, read), canary, path = KINDS[kind], folder / "canary", folder / file
    if path.suffix == ".bin":  # instead of
        next(path.parent.glob("*.safetensors")).unlink()
    with open(path, "wb") as opened:
        write(np.array([Payload(canary)], dtype=object), opened)
    with refused("."):
        LOAD[what](folder)
    assert not canary.exists()
    with open(path, "rb") as opened:
        read(opened)
    assert canary.exists()  # it was a real one


def header(tensors, size=8, length=None):
    """A safetensors file: the header's length (`length`, or the truth), the header, `size` bytes of data."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def tensor(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
HEADERS = {"short": b"\x05\x00", "length 2^63": header({}, length=2**63), "a list": header(b"[]"),
    "length 99 MB": header({"a": tensor()}, length=99_000_000), "deep": header(b'{"a":' * 10_000, 0),
    "not UTF-8": header(b'{"\xff": 1}'), "overlapping": header({"a": tensor(), "b": tensor(4, 12)}, 12),
    "a gap": header({"a": tensor(), "b": tensor(16, 24)}, 24), "backwards": header({"a": tensor(8, 0)}),
    "far beyond": header({"a": tensor(0, 2**50, (2**48,))}), "offsets": header({"a": tensor(2**64 - 8, 2**64 - 1)}),
    "shape overflows": header({"a": tensor(0, 8, (2**63, 2, 2))}), "unknown dtype": header({"a": tensor(dtype="F9")}),
    "data left over": header({"a": tensor()}, 4096), "sparse": header({"a": tensor()}),  # then 64 GiB without blocks on
    "huge": header({QUERY: tensor(0, 64 << 30, (1 << 17, 1 << 17))}, 0)}  # the disk; here a tensor claims all of them


@pytest.mark.parametrize("kind, place", [
    ("model", "model/model.safetensors"), ("adapter", "adapter/adapter_model.safetensors"),
    ("checkpoint", "run/checkpoints/step-2/state.safetensors")])
def test_lying_headers_cost_neither_memory_nor_time(kind, place, folder):
    file, about = folder / place, folder / "run" / "checkpoints" / "step-2" / "state.json"
    for case, content in {"warm-up": b"", **HEADERS}.items():
        if (kind, case) == ("checkpoint", "huge"):  # a true header: all is hashed, which takes minutes
            continue
        file.write_bytes(content)
        if case in ("sparse", "huge"):
            os.truncate(file, len(content) + (64 << 30))
        checksum = {"sha256": hashlib.sha256(content).hexdigest()}  # whoever can write the file can write it
        about.write_text(json.dumps(json.loads(about.read_text()) | checksum))
        devices.forget_peak_memory("cpu")
        before, began = devices.peak_memory("cpu"), time.process_time()
        with refused("safetensors|checkpoint"):
            LOAD[kind](folder)
        memory, seconds = devices.peak_memory("cpu") - before, time.process_time() - began
        assert case == "warm-up" or memory < 32e6 and seconds < 20, (case, memory, seconds)


@pytest.mark.parametrize("name, kind, target", [("a/../../evil", tarfile.REGTYPE, ""), ("in/file", tarfile.CHRTYPE, ""),
                                                ("in/file", tarfile.SYMTYPE, "../../evil")])
def test_tar_members_stay_in_their_folder(name, kind, target, tmp_path):
    archive = tmp_path / "temporary" / "a.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("in/other"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        file.addfile(info)
    with pytest.raises(tarfile.FilterError):
        fetch.unpack(archive, tmp_path / "in")
    assert list(tmp_path.iterdir()) == [archive.parent] and "evil" not in [path.name for path in tmp_path.rglob("*")]


HOSTILE = ["{0.__class__.__init__.__globals__}", "%s %(name)s %n {}{instruction}{{", "\x1b[2Jx", "'; DROP TABLE --",
           "$(touch canary) `touch canary`; touch canary", "\\x41 \\n \\u0041", "### Response:\n42"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text(text, tmp_path, monkeypatch):
    """From the file through the template every character stays, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": text, "input": text, "output": text}] * 12))
    row = data.read(data.TASKS["instructions"], "train.json")[0]
    assert row["answer"] == text and row["prompt"] == data.prompt("<1>", "<1>").replace("<1>", text)
    assert not (tmp_path / "canary").exists()
