"""What a file from elsewhere cannot do: run code, fill the memory, write outside its folder, reach a shell."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tokenizers
import torch
from tiny import ROOT, refused

import data
import eval as evaluation
import lora
import model as models
import train
from extras import adapter_files, devices, fetch

# ---------------------------------------------------------------------------------------------- what the source never does

FORBIDDEN = re.compile(r"""
      \b(import|from)\s+(_?pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve|jsonpickle|yaml|pandas|pty|code)\b
    | \btorch\.(load|save|hub|package|serialization|jit\.load)\b | \bfrom\s+torch\s+import\s+(load|save)\b
    | \b(np|numpy)\.load\((?!.*allow_pickle=False) | allow_pickle=(?!False) | \bfrom\s+numpy\s+import\s+load\b
    | (?<![\w.])(eval|exec|compile|__import__)\( | \bimport_module\b
    | \bos\.(system|popen|exec|spawn|posix_spawn) | \bgetoutput\b | \bshell\s*= | \btrust_remote_code\b""", re.VERBOSE)
BAD = ["import pickle", "from pickle import loads", "import joblib as j", "torch.load(f)", "from torch import load",
       "f = torch.save", "torch.load(f, weights_only=True)", "np.load(f)", "np.load(f, allow_pickle=True)",
       "numpy.load(f, allow_pickle=x)", "eval(text)", "x = compile(text, '', 'exec')", "os.system(text)",
       "subprocess.run(text, shell=True)", "__import__(name)", "import torch.hub; torch.hub.load(x)"]
GOOD = ["x.load(f)", "evaluation.run(x)", "re.compile(p)", "block.compile()", "model.eval()", "json.load(f)",
        "np.load(f, allow_pickle=False)", "torch.compile(f)", "subprocess.run([a, b])", "os.replace(a, b)"]


class WithoutTexts(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


def test_no_source_runs_code_from_data():
    assert all(FORBIDDEN.search(line) for line in BAD) and not any(FORBIDDEN.search(line) for line in GOOD)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("papers/*.py"), *ROOT.glob("extras/*.py")]:
        source = WithoutTexts().visit(ast.parse(path.read_text(encoding="utf-8")))
        for line in ast.unparse(source).splitlines():
            assert not FORBIDDEN.search(line), f"{path.name}: {line}"


def test_installed_packages_do_not_hide_its_folders(tmp_path):
    """There is an `extras` on the package index; a folder without __init__.py would give way to it."""
    for name in ("extras", "papers"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
    program = "import extras, papers; print(extras.__file__, papers.__file__)"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
                          capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(ROOT / name / "__init__.py") for name in ("extras", "papers")]


# ---------------------------------------------------------------------------------------------- pickles


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
    (tmp_path / "data").mkdir()
    return tmp_path


def read(task):
    """A call that reads and encodes the training rows of folder/data."""
    def call(folder):
        reader = data.find_task(task, str(folder / "data")).reader
        rows = [row for _, row in reader(data.TASKS[task], str(folder / "data"), "train")]
        data.encode(data.TASKS[task], rows, image=data.image_settings(None, (3, 4, 4)))
    return call


LOAD = {"model": lambda folder: models.load(folder / "model"),
        "adapter": lambda folder: adapter_files.load_adapter(models.load(folder / "model"), folder / "adapter"),
        "checkpoint": lambda folder: train.main(["--resume", str(folder / "run")]),
        "image": lambda folder: data.image_settings(folder / "model", (1, 8, 8)),
        "tokenizer": lambda folder: data.Tokenizer.from_folder(folder / "model")}


def pickled(path, kind):
    """Bytes of a file that makes the folder `path` when it is unpickled."""
    if kind == "pickle":
        return pickle.dumps({"weight": Payload(path)})
    buffer, payload = io.BytesIO(), np.array([Payload(path)], dtype=object)
    if kind == "torch":
        torch.save({"weight": Payload(path)}, buffer)
    elif kind == "arrays":
        np.savez(buffer, images=payload, labels=np.zeros(1, int))
    else:
        np.save(buffer, payload, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind, load", [("pickle", pickle.load), ("torch", lambda f: torch.load(f, weights_only=False)),
                                        ("numpy", lambda f: np.load(f, allow_pickle=True))])
def test_the_payload_is_real(kind, load, tmp_path):
    load(io.BytesIO(pickled(tmp_path / "canary", kind)))
    assert (tmp_path / "canary").exists()


PICKLED = [  # what is loaded, the file that is a pickle of this kind, a file that is missing instead
    ("model", "model/pytorch_model.bin", "torch", "model/model.safetensors"),
    ("model", "model/model.pt", "torch", "model/model.safetensors"),
    ("model", "model/weights.ckpt", "pickle", "model/model.safetensors"),
    ("model", "model/model.safetensors", "torch", ""), ("model", "model/model.safetensors", "pickle", ""),
    ("adapter", "adapter/adapter_model.bin", "torch", "adapter/adapter_model.safetensors"),
    ("adapter", "adapter/adapter_model.safetensors", "torch", ""),
    ("checkpoint", "run/checkpoints/step-2/state.safetensors", "torch", ""),
    ("npz", "data/train.npz", "arrays", ""), ("digits", "data/train.npz", "numpy", ""),
    ("image-folder", "data/train/a/1.npy", "numpy", ""), ("image-folder", "data/train/a/1.png", "pickle", ""),
    ("text-classification", "data/train.tsv", "pickle", ""), ("instructions", "data/train.jsonl", "pickle", ""),
    ("model", "model/config.json", "pickle", ""), ("tokenizer", "model/tokenizer.json", "pickle", ""),
    ("image", "model/preprocessor_config.json", "pickle", "")]


@pytest.mark.parametrize("what, file, kind, missing", PICKLED, ids=[f"{file} {kind}" for _, file, kind, _ in PICKLED])
def test_pickles_are_refused_unread(what, file, kind, missing, folder):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickled(folder / "canary", kind))
    if missing:
        (folder / missing).unlink()
    with refused("."):
        LOAD.get(what, read(what))(folder)
    assert not (folder / "canary").exists()


# ---------------------------------------------------------------------------------------------- headers that lie


def header(tensors, size=8, length=None):
    """A safetensors file: the header's length (`length`, or the truth), the header, `size` bytes of data."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def tensor(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS = {
    "empty": b"", "short": b"\x05\x00", "no header": header(b"", 0), "length 2^63": header({}, length=2**63), "length -1": header({}, length=2**64 - 1),
    "length beyond the end": header({"a": tensor()}, length=2**40), "length 99 MB": header({"a": tensor()}, length=99_000_000),
    "not JSON": header(b"{'a': 1}"), "not UTF-8": header(b'{"\xff": 1}'), "a list": header(b"[]"), "deep": header(b'{"a":' * 10_000, 0),
    "overlapping": header({"a": tensor(), "b": tensor(4, 12)}, 12), "a gap": header({"a": tensor(), "b": tensor(16, 24)}, 24),
    "beyond the end": header({"a": tensor(0, 800, (200,))}), "far beyond": header({"a": tensor(0, 2**50, (2**48,))}),
    "offsets 2^64": header({"a": tensor(2**64 - 8, 2**64 - 1)}), "backwards": header({"a": tensor(8, 0)}), "negative": header({"a": tensor(-8, 0)}),
    "shape too large": header({"a": tensor(0, 8, (2**40, 2**40))}), "shape overflows to the right size": header({"a": tensor(0, 8, (2**63, 2, 2))}),
    "negative shape": header({"a": tensor(0, 8, (-2, -1))}), "unknown dtype": header({"a": tensor(dtype="F999")}),
    "data left over": header({"a": tensor()}, 4096), "twice": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 2 + b'"b":1}'),
    "sparse": header({"a": tensor()}),  # then 64 GiB without blocks on the disk; of "huge" a tensor claims all of them
    "huge": header({"vit.encoder.layer.0.attention.attention.query.weight": tensor(0, 64 << 30, (1 << 17, 1 << 17))}, 0)}


@pytest.mark.parametrize("kind, place", [("model", "model/model.safetensors"), ("adapter", "adapter/adapter_model.safetensors"),
                                         ("checkpoint", "run/checkpoints/step-2/state.safetensors")])
def test_lying_headers_cost_neither_memory_nor_time(kind, place, folder):
    """Each is refused in one line."""
    file = folder / place
    for case, content in {"warm-up": b"", **HEADERS}.items():
        file.write_bytes(content)
        if case in ("sparse", "huge"):
            os.truncate(file, len(content) + (64 << 30))
        elif kind == "checkpoint":  # whoever can write the file can write its checksum
            about = json.loads((file.parent / "state.json").read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
            (file.parent / "state.json").write_text(json.dumps(about))
        if (kind, case) == ("checkpoint", "huge"):  # a true header: all is hashed, which takes minutes
            continue
        devices.forget_peak_memory("cpu")
        before, began = devices.peak_memory("cpu"), time.process_time()
        with refused("safetensors|checkpoint"):
            LOAD[kind](folder)
        memory, seconds = devices.peak_memory("cpu") - before, time.process_time() - began
        assert case == "warm-up" or memory < 32e6 and seconds < 20, (case, memory, seconds)


# ---------------------------------------------------------------------------------------------- archives and text


@pytest.mark.parametrize("name, kind, target", [
    ("../evil", tarfile.REGTYPE, ""), ("a/../../evil", tarfile.REGTYPE, ""), ("in/file", tarfile.SYMTYPE, "../../evil"),
    ("in/file", tarfile.LNKTYPE, "../../evil"), ("in/file", tarfile.FIFOTYPE, ""), ("in/file", tarfile.CHRTYPE, "")])
def test_tar_members_stay_in_their_folder(name, kind, target, tmp_path):
    """test_data.py has the zip archives."""
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


HOSTILE = ["{0.__class__.__init__.__globals__}", "%s %(name)s %n", "$(touch canary) `touch canary`; touch canary", "{}{instruction}{{", "${HOME} ~ *",
           "\\x41 \\n \\u0041", "__import__('os').mkdir('canary')", "'; DROP TABLE rows; --", "<script>alert(1)</script>", "\x1b[2Jx", "### Response:\n42"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text(text, tmp_path, monkeypatch, capsys):
    """From the file through template and tokenizer to the messages, every character stays, and nothing runs."""
    monkeypatch.chdir(tmp_path)

    def read(task, file, content):
        (tmp_path / file).write_text(content)
        return data.read(data.find_task(task, file), file)

    row = read("instructions", "train.json", json.dumps([{"instruction": text, "input": text, "output": text}] * 12))[0]
    assert row["answer"] == text and row["prompt"] == data.prompt("<1>", "<1>").replace("<1>", text)
    labels = "\n".join(json.dumps({"text": text, "label": label}) for label in (text, "other", "x"))
    assert read("text-classification", "train.jsonl", labels)[0]["text"] == text
    assert text in data.find_task("text-classification", "train.jsonl").labels
    if "\n" not in text:
        rows = read("text-classification", "train.tsv", "sentence\tlabel\n" + f"{text}\t0\n{text}\t1\n" * 6)
        assert rows[0]["text"] == text

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(128)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode([text])[0][0]) == text

    first = text.splitlines()[0]
    with pytest.raises(SystemExit, match="2"):
        evaluation.command(lambda: read("text-regression", "scores.tsv", "sentence\tscore\n" + f"x\t{first}\n" * 12))
    line = capsys.readouterr().err
    assert repr(first[:40]) in line and line.count("\n") == 1
    assert not (tmp_path / "canary").exists()


def test_names_with_dollar_signs_can_be_plotted(folder):
    pytest.importorskip("matplotlib")
    from extras import pictures
    settings = json.loads((folder / "run" / "run.json").read_text())
    settings["settings"]["model"] = "/x/a$\\frac{$b"
    (folder / "run" / "run.json").write_text(json.dumps(settings))
    assert all(path.exists() for path in pictures.plot([folder / "run"]))
