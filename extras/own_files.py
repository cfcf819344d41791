"""Policies and tasks in files of the user's own."""

import functools
import importlib.util
import sys
from pathlib import Path

from model import UserError


@functools.cache
def own_module(flag, place):
    """(module, name) of `file.py:Name`, a place in a Python file of the user's own, which runs; UserError: no file."""
    file, _, name = place.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError(f"{flag} {place}: there is no file {file}; name it as in my_file.py:Name")
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # after ours: what the file imports from beside it
    spec = importlib.util.spec_from_file_location(file, file)  # a name that hides no other module
    module = sys.modules[file] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module, name
