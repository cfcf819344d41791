"""Data sets from the network into the cache: verified, unpacked, renamed into place."""

import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from model import UserError, cache_folder, digest


def fetch(task, split, there):
    """Fetch what a split needs into the cache; there: its files are, so that no archive is needed.

    $RANKS_MIRROR, if set, replaces "https://" in every address: http://localhost:8000 keeps files under /<host>/<path>.
    """
    folder, mirror = cache_folder() / task.folder, os.environ.get("RANKS_MIRROR")
    for wanted, address, sha256 in task.sources:
        path = folder / address.rpartition("/")[2]
        archive = path.name.endswith((".zip", ".tar.gz", ".tgz"))
        if (there if archive else path.is_file()) or wanted not in ("", split):
            continue
        url = mirror.rstrip("/") + "/" + address.partition("://")[2] if mirror else address
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                part = Path(temporary, path.name)
                download(url, part, sha256)
                if archive:
                    unpack(part, folder)
                else:
                    os.replace(part, path)
        except (OSError, ValueError, HTTPException, zipfile.BadZipFile, tarfile.TarError, zlib.error,
                EOFError) as error:
            raise UserError(f"cannot fetch {address} ({error or type(error).__name__}): run this again, or download it "
                            f"elsewhere and {'unpack' if archive else 'put'} it into {folder}, or name a folder with "
                            "its files by --data") from None


def download(url, path, sha256):
    """Fetch a file. OSError: another size than announced, another SHA-256 than known, a web page instead."""
    with urllib.request.urlopen(url, timeout=30) as reply, open(path, "wb") as file:
        size = int(reply.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(reply, "read", size or None, desc=path.name, leave=False) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    got = path.stat().st_size
    if got == 0 or size not in (0, got):
        raise OSError(f"the connection ended at {got} of {size} bytes")
    with open(path, "rb") as file:
        if file.read(200).lstrip().lower().startswith((b"<!doctype html", b"<html")):   # of a proxy that wants a log-in
            raise OSError("it is a web page instead")
    if sha256 not in (None, digest(path)):
        raise OSError(f"it is damaged: its SHA-256 is {digest(path)}, not {sha256}")


def unpack(archive, folder):
    """Unpack a .zip or .tar.gz beside itself, then move all into `folder`, whose own name members may begin with."""
    # what leads out of the folder is left out of a .zip; in a .tar.gz that and special files raise tarfile.FilterError
    part = archive.with_name("unpacked")
    shutil.unpack_archive(archive, part, **({} if archive.suffix == ".zip" else {"filter": "data"}))
    inner = part / folder.name
    for path in sorted((inner if inner.is_dir() else part).iterdir()):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)
