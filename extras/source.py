"""What ran: this program's source, and policies and tasks in files of the user's own."""

import functools
import hashlib
import importlib.util
import modulefinder
import os
import subprocess
import sys
from pathlib import Path

from model import UserError, digest, note, read_settings


@functools.cache
def own_module(flag, place):
    """(module, name) of `file.py:Name`, a place in a Python file of the user's own, which runs; UserError: no file."""
    file, _, name = os.path.expanduser(place).rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError(f"{flag} {place}: there is no file {file}; name it as in my_file.py:Name")
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # after ours: what the file imports from beside it
    spec = importlib.util.spec_from_file_location(file, file)  # a name that hides no other module
    module = sys.modules[file] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module, name


def with_imports(file):
    """A Python file and what it imports from beside it, found without running anything."""
    finder = modulefinder.ModuleFinder(path=[str(file.resolve().parent)])
    finder.run_script(str(file))
    return [Path(module.__file__) for module in finder.modules.values() if module.__file__]


def files_behind(ranks, adapter, task, data, model):
    """Paths that a run's flags --ranks, --adapter, --data and --model name: of files, or of folders of images."""
    from data import find_files, task_row  # it imports this module

    files = [Path(ranks) / "ranks.jsonl" if Path(ranks).is_dir() else Path(ranks)] if ranks else []
    if model:  # a folder, or a name that there is none of
        files += sorted(f for f in Path(model).expanduser().glob("*") if f.suffix in (".json", ".safetensors", ".txt"))
    if adapter:
        files += sorted(Path(adapter).glob("adapter*"))
    for split in task_row(task).files if data and task else ():  # unset, the task is the default
        files += find_files(task_row(task), data, split)
    return [file.resolve() for file in files if file.exists()]


@functools.cache
def weights_digest(path, changed):
    """SHA-256 of weights, of many GB perhaps, as they were when they last `changed`."""
    return digest(path)


def content(path):
    """A file's bytes, of weights a digest; of a folder the names and sizes of its files, as images may be many."""
    if path.suffix == ".safetensors" and path.stat().st_size:  # an empty file cannot be mapped
        return weights_digest(path, path.stat().st_mtime_ns).encode()
    if path.is_dir():
        return repr([(str(file.relative_to(path)), file.stat().st_size) for file in sorted(path.rglob("*"))]).encode()
    return path.read_bytes()


def source_of(s):
    """`source_hash` of a run with these settings."""
    return source_hash(s.method, s.task, s.ranks, s.adapter, s.data, s.model)


def warn_if_changed(s):
    """Say so if a run that goes on is not with the program and the files that it began with."""
    began = read_settings(Path(s.out) / "run.json").get("source")
    if began and began != source_of(s):
        note(f"{s.out}: the program, or a file behind --data, --model, --adapter or --ranks, has changed since")


@functools.cache
def source_hash(method, task=None, ranks=None, adapter=None, data=None, model=None):
    """SHA-256 of the program's source, of the method's and task's own `file.py:Name`, and of the files behind flags.

    The source is that at the top and in extras/, and what an own file imports from beside it.
    """
    own = [Path(place.rpartition(":")[0]).expanduser() for place in (method, task or "") if ":" in place]
    here, whole = Path(__file__).parents[1], hashlib.sha256()
    for file in [*sorted([*here.glob("*.py"), *here.glob("extras/*.py")]),
                 *sum(map(with_imports, filter(Path.is_file, own)), []),
                 *files_behind(ranks, adapter, task, data, model)]:
        whole.update(file.name.encode() + b"\0" + content(file))
    return whole.hexdigest()


def commit():
    """The git commit of this program, with "+" if files have changed since; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1]), "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run([*git, "--dirty=+"], capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None
