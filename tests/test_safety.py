"""What a file from elsewhere cannot do: run code, fill the memory, write outside its folder, reach a shell."""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import eval as evaluation
import lora
import model as models
import train
from model import UserError

SOURCES = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("papers/*.py"))


# ---------------------------------------------------------------------------------------------- what the source never does

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml", "pandas"}
NAMES = ("torch.load", "torch.save", "torch.jit.load", "torch.hub", "torch.package", "torch.serialization", "os.system", "os.popen",
         "os.exec", "os.spawn", "os.posix_spawn", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn",
         "numpy.lib.npyio", "numpy.ctypeslib", "importlib.import_module", "code.interact")
BUILTINS = {"builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"}


def dangers(source):
    """Every use, called or not and under any imported name, of what runs code from data: [(line, what)]."""
    tree, named, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                named[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            named |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node):
        if isinstance(node, ast.Attribute):
            parent = dotted(node.value)
            return parent and f"{parent}.{node.attr}"
        return named.get(node.id, f"builtins.{node.id}") if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [(node.lineno, m) for m in modules if m.split(".")[0] in MODULES or m.startswith(NAMES)]
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            name = dotted(node) or ""
            found += [(node.lineno, name)] if name in BUILTINS or name.startswith(NAMES) else []
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            safe = isinstance(keywords.get("allow_pickle"), ast.Constant) and keywords["allow_pickle"].value is False
            if ("allow_pickle" in keywords or dotted(node.func) == "numpy.load") and not safe:
                found.append((node.lineno, "numpy with pickle"))
            if "shell" in keywords or "trust_remote_code" in keywords:
                found.append((node.lineno, "shell or remote code"))
    return found


BAD = ["import pickle", "from pickle import loads", "import joblib as j", "import torch\ntorch.load(f)", "import torch as t\nt.load(f)",
       "from torch import load", "import torch\nf = torch.save", "import torch\ntorch.load(f, weights_only=True)",
       "import numpy as np\nnp.load(f)", "import numpy as np\nnp.load(f, allow_pickle=True)", "import numpy\nnumpy.load(f, allow_pickle=x)",
       "from numpy import load\nload(f)", "eval(text)", "exec(code)", "run = eval", "import os\nos.system(text)", "from os import popen",
       "import subprocess\nsubprocess.run(text, shell=True)", "import marshal", "import shelve", "__import__(name)", "import torch.hub",
       "import importlib\nimportlib.import_module(x)", "x = compile(text, '', 'exec')", "np.savez(f, allow_pickle=True)", "import yaml"]
GOOD = ["import torch\nx.load(f)", "import eval as evaluation\nevaluation.run(x)", "import re\nre.compile(p)", "block.compile()", "model.eval()",
        "import numpy as np\nnp.load(f, allow_pickle=False)", "import json\njson.load(f)", "from safetensors.torch import load\nload(b)",
        "import torch\ntorch.compile(f)", "import subprocess\nsubprocess.run([a, b])", "import os\nos.replace(a, b)"]


@pytest.mark.parametrize("source", BAD)
def test_the_check_finds(source):
    assert dangers(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_check_lets_pass(source):
    assert not dangers(source)


@pytest.mark.parametrize("path", SOURCES, ids=[path.name for path in SOURCES])
def test_no_source_runs_code_from_data(path):
    assert not dangers(path.read_text(encoding="utf-8"))


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
        "adapter": lambda folder: lora.load_adapter(models.load(folder / "model"), folder / "adapter"),
        "checkpoint": lambda folder: train.main(["--resume", str(folder / "run")]),
        "image": lambda folder: data.image_settings(folder / "model", (1, 8, 8)),
        "tokenizer": lambda folder: data.Tokenizer(folder / "model")}


def pickled(path, kind):
    """Bytes of a file that makes the folder `path` when it is unpickled."""
    if kind == "pickle":
        return pickle.dumps({"weight": Payload(path)})
    buffer = io.BytesIO()
    payload = np.array([Payload(path)], dtype=object)
    if kind == "torch":
        torch.save({"weight": Payload(path)}, buffer)
    elif kind == "arrays":
        np.savez(buffer, images=payload, labels=np.zeros(1, int))
    else:
        np.save(buffer, payload, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_the_payload_is_real(kind, tmp_path):
    loads = {"pickle": pickle.load, "torch": lambda f: torch.load(f, weights_only=False),
             "numpy": lambda f: np.load(f, allow_pickle=True)}
    loads[kind](io.BytesIO(pickled(tmp_path / "canary", kind)))
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
    with pytest.raises(UserError) as caught:
        LOAD.get(what, read(what))(folder)
    assert "\n" not in str(caught.value) and not (folder / "canary").exists()


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
    "sparse": None}  # 64 GiB without blocks on the disk, whose header names 8 bytes


def try_headers(kind, folder):
    """Runs in its own process: load every file of HEADERS as `kind`; prints {case: [error, message, bytes, CPU seconds]}."""
    import contextlib
    import hashlib
    import time
    folder, results = Path(folder), {}
    places = {"model": "model/model.safetensors", "adapter": "adapter/adapter_model.safetensors",
              "checkpoint": "run/checkpoints/step-2/state.safetensors"}
    file, model = folder / places[kind], models.load(folder / "model")
    load = (lambda folder: lora.load_adapter(model, folder / "adapter")) if kind == "adapter" else LOAD[kind]
    for case in ("empty", *HEADERS):  # the first one warms up
        file.write_bytes(HEADERS[case] or header({"a": tensor()}))
        if HEADERS[case] is None:
            os.truncate(file, 64 << 30)
        elif kind == "checkpoint":  # whoever can write the file can write its checksum
            about = json.loads((file.parent / "state.json").read_text())
            about["sha256"] = hashlib.sha256(HEADERS[case]).hexdigest()
            (file.parent / "state.json").write_text(json.dumps(about))
        before, began, error = train.resident("VmHWM"), time.process_time(), None
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                load(folder)
        except Exception as caught:
            error = caught
        results[case] = [type(error).__name__, str(error), train.resident("VmHWM") - before, time.process_time() - began]
    print(json.dumps(results))


@pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint"])
def test_lying_headers_cost_neither_memory_nor_time(kind, folder):
    """Each is refused in one line, by a process that may not allocate more than 4 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc: memory not measured")
    program = (f"import resource, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
               "resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
               f"import test_safety; test_safety.try_headers({kind!r}, {str(folder)!r})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for case, (error, message, memory, seconds) in json.loads(done.stdout.splitlines()[-1]).items():
        assert error == "UserError" and "\n" not in message, (case, error, message)
        assert "safetensors" in message or "checkpoint" in message, message
        assert memory < 32e6 and seconds < 20, (case, memory, seconds)


def test_a_tensor_as_large_as_the_disk_is_not_read(folder):
    """A true header for 64 GiB: refused for its shape, or because so much cannot even be mapped, and nothing is read."""
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    text = json.dumps({name: tensor(0, 64 << 30, (1 << 17, 1 << 17))}).encode()
    for file in (folder / "model" / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"):
        before = file.read_bytes()
        file.write_bytes(header(text, 0))
        os.truncate(file, 8 + len(text) + (64 << 30))
        with pytest.raises(UserError, match="131072|cannot be mapped|fits nothing|mmap"):
            LOAD[file.parent.name](folder)
        file.write_bytes(before)


# ---------------------------------------------------------------------------------------------- archives and text


def entry(name, kind=tarfile.REGTYPE, target="", content=b"x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content) if kind == tarfile.REGTYPE else 0
    return info, io.BytesIO(content)


@pytest.mark.parametrize("name, kind, target", [
    ("../evil", tarfile.REGTYPE, ""), ("a/../../evil", tarfile.REGTYPE, ""), ("in/file", tarfile.SYMTYPE, "../../evil"),
    ("in/file", tarfile.LNKTYPE, "../../evil"), ("in/file", tarfile.FIFOTYPE, ""), ("in/file", tarfile.CHRTYPE, "")])
def test_tar_members_stay_in_their_folder(name, kind, target, tmp_path):
    """test_data.py has the zip archives."""
    archive = tmp_path / "temporary" / "a.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(*entry("in/other"))
        file.addfile(*entry(name, kind, target))
    with pytest.raises(tarfile.FilterError):
        data.unpack(archive, tmp_path / "in")
    assert list(tmp_path.iterdir()) == [archive.parent] and "evil" not in [path.name for path in tmp_path.rglob("*")]


HOSTILE = ["{0.__class__.__init__.__globals__}", "%s %(name)s %n", "$(touch canary) `touch canary`; touch canary", "{}{instruction}{{", "${HOME} ~ *",
           "\\x41 \\n \\u0041", "__import__('os').mkdir('canary')", "'; DROP TABLE rows; --", "<script>alert(1)</script>", "\x1b[2Jx", "### Response:\n42"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text(text, tmp_path, monkeypatch, capsys):
    """From the file through template and tokenizer to the messages, every character stays what it was, and nothing runs."""
    import tokenizers
    monkeypatch.chdir(tmp_path)
    row = {"instruction": text, "input": text, "output": text}
    (tmp_path / "train.json").write_text(json.dumps([row] * 12))
    rows = data.read(data.find_task("instructions"), str(tmp_path))
    assert rows[0]["answer"] == text and rows[0]["prompt"] == data.prompt("<1>", "<2>").replace("<1>", text).replace("<2>", text)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text, "label": label}) for label in (text, "other", "x")))
    task = data.find_task("text-classification", str(tmp_path / "train.jsonl"))
    assert text in task.labels and data.read(task, str(tmp_path / "train.jsonl"))[0]["text"] == text
    if "\n" not in text:
        (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + f"{text}\t0\n{text}\t1\n" * 6)
        rows = data.read(data.find_task("text-classification", str(tmp_path / "train.tsv")), str(tmp_path / "train.tsv"))
        assert rows[0]["text"] == text

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(128)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode([text])[0][0]) == text

    (tmp_path / "scores.tsv").write_text("sentence\tscore\n" + f"x\t{text.splitlines()[0]}\n" * 12)
    with pytest.raises(SystemExit) as stop:
        evaluation.command(lambda: data.read(data.find_task("text-regression"), str(tmp_path / "scores.tsv")))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and repr(text.splitlines()[0][:40]) in line and line.count("\n") == 1
    assert evaluation.to_json({"a": text}) == json.dumps({"a": text}) and not (tmp_path / "canary").exists()


def test_a_model_named_like_a_command_or_a_format(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (*HOSTILE, "a/b; touch canary", "../../etc/passwd", "-rf", "a/$(touch canary)"):
        with pytest.raises(SystemExit) as stop:
            evaluation.command(lambda: evaluation.main(["--task", "digits", f"./{name}" if name.startswith("-") else name]))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (tmp_path / "canary").exists()


def test_names_with_dollar_signs_can_be_plotted(folder):
    pytest.importorskip("matplotlib")
    settings = json.loads((folder / "run" / "run.json").read_text())
    settings["settings"]["model"] = "/x/a$\\frac{$b"
    (folder / "run" / "run.json").write_text(json.dumps(settings))
    assert all(path.exists() for path in evaluation.plot(folder / "run"))
