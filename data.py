"""Tasks: reading files, prompts and templates, tokenizing, batching, fetching.

    task = find_task("cola")                                # a row of TASKS with its label set; a new task = a new row
    rows = read(task, folder, "train")                      # list of dicts; fetched into a cache where folder is None
    split = encode(task, rows, Tokenizer.from_folder(model_folder), max_length=128)
    for indices in batches(split, 32, seed=0, epoch=0):
        inputs, labels = collate(split, indices)            # model(**inputs)
"""

import csv
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import UserError, cache_folder


note = functools.cache(logging.getLogger("data").warning)  # to stderr, each distinct message once per process


# -------------------------------------------------------------------------------------------------- text, tables, JSON

def read_text(path):
    """Return a file's text without byte-order mark, a .gz file's unpacked. UserError: missing, empty, not UTF-8."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check --data") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a broken archive ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: byte {error.start} is not UTF-8: convert the file") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: fetch or write it again")
    return text


def read_table(path, header=None, skip_short=False):
    """Yield (where, {column: text}) for the rows of a tab-separated (quotes are text) or .csv file (quotes quote).

    header: column names of a file without such a line. skip_short: skip rows with too few columns, note their number.
    """
    text, skipped = read_text(path), 0
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = text.removesuffix("\n").split("\n")  # not splitlines: Unicode's other separators are text
    rows = (((reader.line_num, cells) for cells in reader if cells) if path.suffix == ".csv" else
            enumerate((line.removesuffix("\r").split("\t") for line in lines), 1))
    try:
        for number, cells in rows:
            if header is None:
                header = [name.strip() for name in cells]
            elif len(cells) == len(header):
                yield f"{path} line {number}", dict(zip(header, cells))
            elif len(cells) < len(header) and skip_short:
                skipped += 1
            else:
                raise UserError(f"{path} line {number}: {len(cells)} columns, expected {len(header)}: mend the row")
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}: mend the CSV quoting") from None
    if skipped:
        note(f"{path}: skipped {skipped} short row{'s' * (skipped > 1)}")


def read_json(path):
    """Yield (where, dict) for a JSON object, for each object of a JSON list, or for each line of JSON lines."""
    text = read_text(path)
    one_a_line = re.match(r"\s*\{.*\}\s*?(\n|$)", text)
    for number, part in enumerate(text.split("\n") if one_a_line else [text], 1):
        try:
            value = json.loads(part) if part.strip() else []
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            line = number + getattr(error, "lineno", 1) - 1
            raise UserError(f"{path} line {line}: not JSON ({error}): mend the file") from None
        for row, item in enumerate(value if isinstance(value, list) else [value], 1):
            where = f"{path} {f'row {row}' if isinstance(value, list) else f'line {number}'}"
            if not isinstance(item, dict):
                raise UserError(f"{where}: {type(item).__name__}, expected an object with named values: mend the file")
            yield where, item


def read_settings(path):
    """Return the object in a JSON file, {} where there is no such file."""
    return next((value for _, value in read_json(path)), {}) if path.is_file() else {}


def get(row, key, where, kinds=str):
    """Return row[key]. UserError: missing, of another type, half a surrogate pair (which no tokenizer takes)."""
    if key not in row:
        raise UserError(f"{where}: no column {key!r} (there are {str([*row])[:200]}): add or rename it")
    if not isinstance(row[key], kinds) or isinstance(row[key], str) and re.search("[\ud800-\udfff]", row[key]):
        raise UserError(f"{where}: {key!r} is {type(row[key]).__name__} {str(row[key])[:40]!a}, no valid text: mend it")
    return row[key]


# -------------------------------------------------------------------------------------------- where files are, fetching

def find_files(task, data, split):
    """Return a split's files in data/<task.folder> or data, or data itself if one file can hold all splits."""
    data, names = Path(data), task.files.get(split, ())
    shared = set.intersection(*map(set, task.files.values())) if names else ()
    if data.is_file() and data.suffix[:5] in {Path(name).suffix[:5] for name in shared}:    # .json is as good as .jsonl
        return [data]
    found = (sorted(folder.glob(name)) for folder in (data / task.folder, data) for name in names)
    return next(filter(None, found), [])


def locate(task, data, split):
    """Return the paths of a split's files, fetched into the cache where data is None and they are not there."""
    if data is None and not task.sources:
        raise UserError(f"--task {task.name} needs --data: a file, or a folder with {task.files[split][0]}")
    if data is None:
        fetch(task, split)
    paths = find_files(task, data or cache_folder(), split)
    if not paths:
        known = any(wanted in ("", split) for wanted, _, _ in task.sources)
        remedy = ", or leave it out to fetch the file" if known else " to name a file or its folder"
        path = Path(data or cache_folder(), task.folder, task.files[split][0])
        raise UserError(f"{path}: no such file: correct --data{remedy}")
    return paths


def held_out(task, data, split, rows):
    """Return a split's rows; where one file is both training and dev file, 10 % (at most 1,000 rows) are dev.

    These are the last rows of instructions, otherwise evenly spread ones: files are often sorted by label.
    """
    if find_files(task, data or cache_folder(), "train") != find_files(task, data or cache_folder(), "dev"):
        return rows
    rows, last = list(rows), task.kind == "lm"
    count = min(math.ceil(len(rows) / 10), 1000)
    dev = {len(rows) - 1 - i if last else (2 * i + 1) * len(rows) // (2 * count) for i in range(count)}
    note(f"{data or task.name}: no dev file: {count} of {len(rows)} rows are dev "
         f"({'the last' if last else 'evenly spread'})")
    return [row for i, row in enumerate(rows) if (i in dev) == (split != "train")]


def fetch(task, split):
    """Fetch what a split needs into the cache: checksums verified, archives unpacked, files renamed into place."""
    for wanted, address, sha256 in task.sources:
        path = cache_folder() / task.folder / address.rpartition("/")[2]
        verb = "unpack" if path.name.endswith((".zip", ".tar.gz")) else "put"
        there = find_files(task, cache_folder(), split) if verb == "unpack" else path.is_file()
        if wanted not in ("", split) or there:
            continue
        try:
            download(address, path, sha256)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot fetch {address} ({error or type(error).__name__}): download it elsewhere and "
                            f"{verb} it into {path.parent}, or name a folder with its files by --data") from None
        if verb == "unpack":
            unpack(path, {f"{task.folder}/{file}": path.with_name(file) for file in sum(task.files.values(), ())})


def download(address, path, sha256=None):
    """Fetch one file beside `path` and rename it there once its size and SHA-256 are right.

    $RANKS_MIRROR, if set, replaces "https://" in every address: http://localhost:8000 keeps files under /<host>/<path>.
    Without a known SHA-256 the one first seen is kept in the cache's checksums.json, and another one is refused.
    """
    mirror = os.environ.get("RANKS_MIRROR")
    url = mirror.rstrip("/") + "/" + address.removeprefix("https://") if mirror else address
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = path.with_name(f"{path.name}.{os.getpid()}.part"), hashlib.sha256()
    book = cache_folder() / "checksums.json"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(reply, "read", size or None, desc=path.name, leave=False) as source:
                while block := source.read(1 << 20):
                    file.write(block)
                    digest.update(block)
        if size and part.stat().st_size != size:
            raise UserError(f"{url}: the connection ended at {part.stat().st_size} of {size} bytes: run this again")
        known, found = read_settings(book), digest.hexdigest()
        expected = sha256 or known.get(address, found)
        if found != expected:
            remedy = "fetch it again" if sha256 else f"if you trust it, remove its line from {book}"
            raise UserError(f"{url}: SHA-256 is {found}, not {expected}: the file is damaged or has changed: {remedy}")
        os.replace(part, path)
        if not sha256:
            part.write_text(json.dumps({**known, address: found}, indent=1))
            os.replace(part, book)
    finally:
        part.unlink(missing_ok=True)


def unpack(archive, wanted, limit=4 << 30):
    """Write the members of a .zip or .tar.gz named in wanted {member: path}, then remove it; it decides no path.

    Refused: a member that would leave its folder, a wanted one that is no plain file, more than `limit` bytes.
    """
    tar = archive.suffix == ".gz"
    try:
        with (tarfile.open if tar else zipfile.ZipFile)(archive) as file:
            found = {}
            for member in file if tar else file.infolist():
                name = (member.name if tar else member.filename).replace("\\", "/")
                plain = member.isfile() if tar else stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
                if name.startswith("/") or ".." in name.split("/") or ":" in name or (name in wanted and not plain):
                    raise UserError(f"{archive}: refused: member {name[:80]!r} is a link or leaves its folder")
                if name in wanted:
                    found[name] = member
            if sum(member.size if tar else member.file_size for member in found.values()) > limit:
                raise UserError(f"{archive}: refused: it unpacks to more than {limit} bytes")
            for name, member in found.items():
                part = archive.with_name(f"{archive.name}.{os.getpid()}.part")
                with (file.extractfile if tar else file.open)(member) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(part, wanted[name])
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: a broken archive ({error}): run the command again") from None
    finally:
        archive.unlink()


# -------------------- readers: reader(task, data, split) yields (where, row); labels stay text until read() checks them

def read_texts(task, data, split):
    """GLUE's files, and the user's own: text, sentence, sentence1 + sentence2 or text + pair, and label or score.

    MRPC also comes as Microsoft's original file with GLUE's list of the pairs that are dev.
    """
    (path, *_), columns = locate(task, data, split), task.columns
    original = path.name == "msr_paraphrase_train.txt"
    if original:
        dev_ids = {tuple(row.values()) for _, row in read_table(path.with_name("mrpc_dev_ids.tsv"), ("id1", "id2"))}
    rows = read_json(path) if path.suffix.startswith(".json") else read_table(path, task.header, task.name == "qqp")
    for where, row in rows if original else held_out(task, data, split, rows):
        if original and ((get(row, "#1 ID", where), get(row, "#2 ID", where)) in dev_ids) != (split == "dev"):
            continue
        if not columns:
            texts = (("sentence1", "sentence2"), ("text", "pair"), ("sentence", None), ("text", None))
            columns = (*next((pair for pair in texts if {*pair} <= {*row, None}), texts[-1]),
                       "score" if "score" in row and "label" not in row else "label")
        text, pair, label = columns
        yield where, {"text": get(row, text, where), **({"pair": get(row, pair, where)} if pair else {}),
                      "label": str(get(row, label, where, (str, int, float)))}


def read_instructions(task, data, split):
    """Rows of a question and its answer, in one of the layouts that COLUMNS lists."""
    def rows(paths, skipped=0):
        for where, row in (pair for path in paths for pair in read_json(path)):
            row = instruction(task, where, row)
            if row["answer"].strip():
                yield where, row
            elif not task.sources:
                raise UserError(f"{where}: the answer is empty, there is nothing to learn from: fill or remove the row")
            else:
                skipped += 1    # Alpaca and UltraFeedback were published with some
        if skipped:
            note(f"{data or task.name}: skipped {skipped} row{'s' * (skipped > 1)} without an answer")

    return held_out(task, data, split, rows(locate(task, data, split)))


def read_mbpp(task, data, split):
    """Task ids 11 to 510 are the test set, says google-research/mbpp's README."""
    rows = read_instructions(task, data, split)
    return ((where, row) for where, row in rows if 11 <= get(row["sample"], "task_id", where, int) <= 510)


def read_commonsense(task, data, split):
    """Train: commonsense_170k.json, or else every train.json there is; dev: all tasks' tests, or one by its name."""
    if split != "train":
        for name in task.eval_splits if split == "dev" else [split]:
            yield from read_instructions(TASKS[name], data, "dev")
        return
    parts = [task]
    if data is not None and not find_files(task, data, split):
        parts = [TASKS[name] for name in COMMONSENSE if find_files(TASKS[name], data, split)] or parts
        note(f"{data}: no commonsense_170k.json: training on train.json of {', '.join(part.name for part in parts)}")
    for part in parts:
        yield from read_instructions(replace(part, answers=None), data, split)


def read_arrays(task, data, split):
    """CIFAR-100's binary files; .npz with x_train y_train x_test y_test, or images labels [split: 0 train, 1 test]."""
    embedded = Path(__file__).parent / "assets" / "digits.npz"
    path = locate(task, embedded if data is None and task.name.startswith("digits") else data, split)[0]
    keys = ("images", "labels")
    if path.suffix == ".bin":
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % 3074:
            raise UserError(f"{path}: {raw.size} bytes, no multiple of 3074: fetch the binary version again")
        raw = raw.reshape(-1, 3074)  # coarse label, fine label (which we use), 3 x 32 x 32 pixels
        arrays = {"images": raw[:, 2:].reshape(-1, 3, 32, 32), "labels": raw[:, 1]}
    else:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: no .npz of plain arrays ({error}): write it with np.savez_compressed") from None
        if "x_train" in arrays:
            keys = ("x_train", "y_train") if split == "train" else ("x_test", "y_test")
    images, labels = (get(arrays, key, path, np.ndarray) for key in keys)
    if images.ndim not in (3, 4) or len(images) != labels.size or labels.dtype.kind not in "iuU":
        raise UserError(f"{path}: {keys[0]} {images.shape} and {keys[1]} {labels.shape} {labels.dtype}: expected "
                        "(N, H, W) or (N, H, W, C), and N whole numbers or names: write the file again")
    chosen = range(len(images))
    if keys[0] == "images" and "split" in arrays:
        if arrays["split"].shape != labels.shape:
            raise UserError(f"{path}: split has shape {arrays['split'].shape}, expected {labels.shape}: write it again")
        chosen = np.flatnonzero((arrays["split"] != 0) == (split != "train"))
    elif keys[0] == "images":
        chosen = held_out(task, data, split, chosen)
    for i in chosen:
        where = f"{path} {keys[0]}[{i}]"
        pixels = channels_first(images[i], where)
        pixels = np.rot90(pixels, axes=(1, 2)) if task.name == "digits-rot90" else pixels
        yield where, {"pixels": pixels, "label": str(labels.flat[i])}


def read_image_folder(task, data, split):
    """data/train/<class>/* and data/{dev,val,valid,test}/<class>/*: .npy arrays, or whatever Pillow opens."""
    names = ("train",) if split == "train" else ("dev", "val", "valid", "test")
    root = next((Path(data, name) for name in names if data and Path(data, name).is_dir()), None)
    if root is None:
        raise UserError(f"{data}: no folder {' or '.join(names)}: --data must name one with train/<class>/<images>, "
                        "dev/<class>/<images>")
    for path in sorted(path for path in root.glob("*/*") if not path.name.startswith(".")):
        try:
            if path.suffix == ".npy":
                pixels = np.load(path, allow_pickle=False)
            else:
                from PIL import Image   # the only need for Pillow
                with Image.open(path) as image:
                    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
        except ImportError:
            raise UserError(f"{path}: reading images needs Pillow: pip install pillow, or store .npy arrays") from None
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise UserError(f"{path}: not an image ({error}): remove or convert it") from None
        yield str(path), {"pixels": channels_first(pixels, path), "label": path.parent.name}


def channels_first(pixels, where):
    """Return uint8 pixels (H, W), (H, W, C) or (C, H, W) as (C, H, W); C is 1 or 3."""
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        return pixels[None]
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and {1, 3} & {pixels.shape[0], pixels.shape[2]}:
        return pixels.transpose(2, 0, 1) if pixels.shape[2] in (1, 3) else pixels
    raise UserError(f"{where}: {pixels.dtype} {pixels.shape}, expected uint8 (H, W) or (H, W, C) with 1 or 3 channels")


# -------------------------------------------------------------------------------------------------- prompts and answers

def prompt(text, extra=""):
    """Return Alpaca's instruction template, which LLM-Adapters and so the papers use; joined, never formatted."""
    context = ", paired with an input that provides further context" if extra else ""
    lead = f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the"
    extra = "\n\n### Input:\n" + extra if extra else ""
    return lead + " request.\n\n### Instruction:\n" + text + extra + "\n\n### Response:\n"


def docstring(text, test):
    """Return MBPP's prompt as bigcode-evaluation-harness and InCoder write it: a docstring with the first test."""
    return f'"""\n{text}\n{test}\n"""\n'


# what asks and what answers: Alpaca, LLM-Adapters, AlpacaEval; GSM8K; MetaMathQA; CodeFeedback; MATH; UltraFeedback as
# published and binarized; HumanEval; MBPP and its sanitized half
COLUMNS = (("instruction", "output"), ("question", "answer"), ("query", "response"), ("query", "answer"),
           ("problem", "solution"), ("instruction", "completions"), ("prompt", "chosen"),
           ("prompt", "canonical_solution"), ("text", "code"), ("prompt", "code"))


def instruction(task, where, row):
    """Return {prompt, answer} of a row with instructions; also {target, answers} where generated answers are scored.

    {sample} where another program scores them: the columns that it wants beside the completion.
    """
    asks, says = next((pair for pair in COLUMNS if {*pair} <= {*row}), (None, None))
    if asks is None:
        expected = " or ".join(f"{asks}, {says}" for asks, says in COLUMNS)
        raise UserError(f"{where}: {str([*row])[:200]}: expected {expected}: rename the columns")
    extra = row.get("input") and get(row, "input", where)
    if "test_list" in row:
        extra = get(dict(enumerate(get(row, "test_list", where, list))), 0, where)
    answer = best(row, says, where) if isinstance(row[says], list) else get(row, says, where)
    result = {"prompt": task.template(get(row, asks, where), extra), "answer": answer}
    if task.sample:
        result["sample"] = {name: get(row, name, where, (str, int)) for name in task.sample}
    if task.answers is None:
        return result
    words = task.answers
    target = words(answer, True) if callable(words) else get(row, "answer", where)
    if not target or not callable(words) and target not in words:
        expected = ("a number after ####" if words is last_number else "one in \\boxed{}" if words is final_answer else
                    " or ".join(words))
        raise UserError(f"{where}: answer {target[:40]!r}, expected {expected}: mend the row")
    return {**result, "target": target, "answers": words}


def best(row, says, where):
    """Return the best rated of UltraFeedback's completions ("" of none), or what a conversation's last message says."""
    parts = [get({says: part}, says, where, dict) for part in row[says]]
    if says != "completions":
        return get(parts[-1], "content", where) if parts else ""
    top = max(parts, key=lambda part: get(part, "overall_score", where, (int, float)), default={})
    return str(top.get("response", "")).encode(errors="replace").decode()  # a few have half a surrogate pair


def extract_answer(text, answers):
    """Return the answer in a generated text, "" where there is none.

    answers: words, of which the first that occurs is it, as in LLM-Adapters' evaluation; or a function of the text.
    """
    if callable(answers):
        return answers(text)
    found = re.search("|".join(map(re.escape, answers)), text)
    return found.group() if found else ""


def allowed(row):
    """Return the words that a row allows as its answer, those that its prompt lists, and the answer with each."""
    words = [word for word in row["answers"] if word in row["prompt"]]
    words = words if row["target"] in words and len(words) > 1 else list(row["answers"])
    return words, [row["answer"].rpartition(row["target"])[0] + word for word in words]


# a minus sign after a digit subtracts; commas belong to a number where they group three digits
NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text, reference=False):
    """Return the last number of a text, without commas, currency and trailing zeros after the point (GSM8K).

    reference: GSM8K's own solution, where it stands after ####.
    """
    text = text.partition("####")[2] if reference else text
    number = (NUMBER.findall(text.replace("$", "")) or [""])[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") or "0" if "." in number else number


def final_answer(text, reference=False):
    """Return the final answer of a solution to a MATH problem, normalised, "" where there is none.

    It follows the last "The answer is: ", up to a full stop that ends a line, as in MetaMath's eval_math.py; without
    that phrase, and in MATH's own solutions (reference), it is in the last \\boxed{} or else \\fbox{}, as in the data
    set's own evaluation, github.com/hendrycks/math.
    """
    _, phrase, found = text.rpartition("The answer is: ")
    if phrase and not reference:
        return normalise(found.partition(".\n")[0].strip().removesuffix("."))
    _, box, found = text.rpartition("\\boxed" if "\\boxed" in text else "\\fbox")
    if box and found.startswith(" "):   # \boxed 2
        return normalise(found.partition("$")[0])
    depth = 0
    for i, character in enumerate(found if box else ""):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return normalise(found[:i].partition("{")[2])
    return ""


def normalise(answer):
    """Return LaTeX as math_equivalence.py (github.com/hendrycks/math) compares it: the same answers become equal."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
                     ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):
        answer = answer.replace(old, new)
    answer = answer.partition("\\text{ ")[0].replace("\\%", "").replace("%", "")   # a unit, a percentage
    answer = re.sub(r"(^|[ {])\.", r"\g<1>0.", answer)
    name, equals, value = answer.partition("=")
    if equals and len(name) <= 2 and "=" not in value:
        answer = value
    answer = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", answer).replace(" ", "")
    if not re.search(r"\\frac[^{]?(\\frac|$)", answer):     # \frac12, \frac1{2}; what is no fraction stays as it is
        answer = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", answer))
    fraction = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", "1/2" if answer == "0.5" else answer)
    return "\\frac{%s}{%s}" % fraction.groups() if fraction else answer


# --------------------------------------------------------------------------------------------------- the table of tasks

@dataclass(frozen=True)
class Task:
    """One row of TASKS; base, large and steps default to values of ours, for tasks that no paper has."""
    name: str
    kind: str                        # "classify", "regress", "lm" (an instruction and its answer) or "image"
    metrics: tuple                   # the first is the headline
    reader: object                   # reader(task, data, split) yields (where, row)
    labels: tuple = ()               # class names in order; () = find_task finds them in the training rows
    files: dict = field(default_factory=dict)   # split -> names or patterns, the first that is there is read
    folder: str = ""                 # the files' folder in an archive and under --data
    sources: tuple = ()              # (split it is for or "", address, SHA-256 or None = the one first seen)
    columns: tuple = ()              # text, pair or None, label
    header: tuple | None = None      # column names of files without a header line
    span: tuple = (-math.inf, math.inf)         # what a regression's scores lie in
    template: object = prompt        # lm: template(question, more) returns the prompt
    answers: object = None           # lm: what a generated text is searched for: words, or by a function of the text
    sample: tuple = ()               # lm: columns that belong to a completion which another program scores,
    output: str = "completion"       # ... and what it calls the completion
    new_tokens: int = 0              # lm: how long a generated answer may get; 0 = nothing is generated
    stop: tuple = ()                 # lm: strings that end a generated answer
    eval_splits: tuple = ("dev",)
    base: tuple = (4e-4, 32, 10)     # learning rate, batch size, epochs for hidden size < 1024 (lelora Table 5)
    large: tuple = (3e-4, 16, 10)    # ... from 1024 on (lelora Table 6)
    steps: int = 512                 # of decoders that classify (weightlora Table 10)
    max_length: int = 512


FACEBOOK, GITHUB = "https://dl.fbaipublicfiles.com/", "https://raw.githubusercontent.com/"
HUB = "https://huggingface.co/datasets/"
ADAPTERS = GITHUB + "AGI-Edgerunners/LLM-Adapters/main/"
GSM8K = GITHUB + "openai/grade-school-math/master/grade_school_math/data/"
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa")
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
BINARY, ENTAIL, DIGITS = ("0", "1"), ("entailment", "not_entailment"), tuple("0123456789")
TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",)}
NEXT = ("### Instruction",)          # a model that has answered and goes on with the prompt's template
CODE = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what ends a function (Chen et al. 2021, section 3)


def own(*suffixes):
    """Return the file names of the user's own data; dev falls back to the training file, see held_out."""
    train, *dev = (tuple(name + suffix for suffix in suffixes)
                   for name in ("train", "dev", "valid", "validation", "val", "test"))
    return {"train": train, "dev": sum(dev, ()) + train}


def glue(name, folder, metrics, columns, labels, file, sha256, base, large, steps, kind="classify", files=TSV, also=(),
         **more):
    """Return the row of a GLUE task, whose TSV files come from FACEBOOK, most in one archive."""
    sources = (("", FACEBOOK + "glue/data/" + file, sha256), *also)
    return Task(name, kind, metrics, read_texts, labels, files, folder, sources, columns, base=base, large=large,
                steps=steps, **more)


def choose(name, folder, *answers):
    """Return the row of a commonsense task of LLM-Adapters, where the answer is one of a few words."""
    files = {"train": ("train.json",), "dev": ("test.json",)}
    sources = tuple((split, f"{ADAPTERS}dataset/{folder}/{file}", None) for split, (file,) in files.items())
    return Task(name, "lm", ("accuracy",), read_instructions, (), files, folder, sources, answers=answers,
                new_tokens=32, max_length=256)


def tune(name, file, *sources):
    """Return the row of an instruction tuning set, whose last rows are held out; sources: (address, SHA-256)."""
    return Task(name, "lm", ("perplexity",), read_instructions, (), {"train": (file,), "dev": (file,)}, name,
                tuple(("", *source) for source in sources))


def complete(name, file, address, sample, reader=read_instructions, **more):
    """Return the row of a set to generate completions for (eval.py --samples), which another program scores."""
    return Task(name, "lm", ("perplexity",), reader, (), {"dev": (file, file + ".gz")}, name, (("dev", address, None),),
                sample=sample, **more)


TASKS = {task.name: task for task in (
    glue("cola", "CoLA", ("matthews",), ("sentence", None, "label"), BINARY, "CoLA.zip",
         "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff", (4e-4, 64, 80), (4e-4, 16, 20), 1024,
         header=("source", "label", "mark", "sentence")),
    glue("sst2", "SST-2", ("accuracy",), ("sentence", None, "label"), BINARY, "SST-2.zip",
         "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", (5e-4, 128, 60), (2e-4, 32, 10), 128),
    glue("mrpc", "MRPC", ("accuracy", "f1"), ("#1 String", "#2 String", "Quality"), BINARY, "mrpc_dev_ids.tsv",
         "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7", (4e-4, 128, 30), (6e-4, 16, 20), 512,
         files={"train": ("train.tsv", "msr_paraphrase_train.txt"), "dev": ("dev.tsv", "msr_paraphrase_train.txt")},
         also=(("", FACEBOOK + "senteval/senteval_data/msr_paraphrase_train.txt",
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),)),
    glue("stsb", "STS-B", ("pearson", "spearman"), ("sentence1", "sentence2", "score"), (), "STS-B.zip",
         "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85", (4e-4, 128, 40), (3e-4, 16, 30), 256,
         kind="regress", span=(0, 5)),
    glue("qqp", "QQP", ("accuracy", "f1"), ("question1", "question2", "is_duplicate"), BINARY, "QQP-clean.zip",
         "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", (4e-4, 128, 25), (3e-4, 32, 20), 1024),
    glue("mnli", "MNLI", ("accuracy",), ("sentence1", "sentence2", "gold_label"),
         ("entailment", "neutral", "contradiction"), "MNLI.zip",
         "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633", (5e-4, 128, 30), (1e-4, 32, 10), 256,
         files={"train": ("train.tsv",), "dev": ("dev_matched.tsv",), "dev_mismatched": ("dev_mismatched.tsv",)},
         eval_splits=("dev", "dev_mismatched")),
    glue("qnli", "QNLI", ("accuracy",), ("question", "sentence", "label"), ENTAIL, "QNLIv2.zip",
         "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", (4e-4, 128, 25), (1e-4, 6, 10), 256),
    glue("rte", "RTE", ("accuracy",), ("sentence1", "sentence2", "label"), ENTAIL, "RTE.zip",
         "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee", (4e-4, 128, 80), (3e-4, 16, 20), 256),
    choose("boolq", "boolq", "true", "false"),
    choose("piqa", "piqa", "solution1", "solution2"),
    choose("siqa", "social_i_qa", *ANSWERS),
    choose("hellaswag", "hellaswag", "ending1", "ending2", "ending3", "ending4"),
    choose("winogrande", "winogrande", "option1", "option2"),
    choose("arc-e", "ARC-Easy", *ANSWERS),
    choose("arc-c", "ARC-Challenge", *ANSWERS),
    choose("obqa", "openbookqa", *ANSWERS),
    Task("commonsense", "lm", ("accuracy",), read_commonsense, (), {"train": ("commonsense_170k.json",)},
         "ft-training_set", (("train", ADAPTERS + "ft-training_set/commonsense_170k.json", None),), new_tokens=32,
         max_length=256),
    Task("gsm8k", "lm", ("exact_match",), read_instructions, (), {"train": ("train.jsonl",), "dev": ("test.jsonl",)},
         "gsm8k", (("train", GSM8K + "train.jsonl", None), ("dev", GSM8K + "test.jsonl", None)), answers=last_number,
         new_tokens=400, stop=NEXT),
    Task("math", "lm", ("exact_match",), read_instructions, (),     # MetaMath's file, PRM800K's names, or MATH.tar's
         {"train": ("train.jsonl", "train/*/*.json"), "dev": ("MATH_test.jsonl", "test.jsonl", "test/*/*.json")},
         "MATH", (("dev", GITHUB + "meta-math/MetaMath/main/data/test/MATH_test.jsonl", None),), answers=final_answer,
         new_tokens=1024, stop=NEXT),
    complete("humaneval", "HumanEval.jsonl", GITHUB + "openai/human-eval/master/data/HumanEval.jsonl.gz", ("task_id",),
             template=lambda text, more: text.rstrip(), new_tokens=512, stop=CODE),  # "\n    " is one token
    complete("mbpp", "mbpp.jsonl", GITHUB + "google-research/google-research/master/mbpp/mbpp.jsonl", ("task_id",),
             reader=read_mbpp, template=docstring, new_tokens=512,
             stop=("\nclass", "\nassert", '\n"""', "\nprint", "\nif")),
    complete("alpacaeval", "alpaca_eval.json", HUB + "tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json",
             ("dataset", "instruction", "generator"), output="output", new_tokens=2048, stop=NEXT),
    tune("metamathqa", "MetaMathQA-395K.json", (
        HUB + "meta-math/MetaMathQA/resolve/aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18/MetaMathQA-395K.json",
        "fb39a5d8c05c042ece92eae37dfd5ea414a5979df2bf3ad3b86411bef8205725")),
    tune("codefeedback", "CodeFeedback-Filtered-Instruction.jsonl", (
        HUB + "m-a-p/CodeFeedback-Filtered-Instruction/resolve/e24e63942ad4450639e16ba318130ab841946916/"
        "CodeFeedback-Filtered-Instruction.jsonl",
        "6dd3f7797cd86a7e437de660ad259c50835812f8e309d893f09de77b2ee80063")),
    tune("ultrafeedback", "*.jsonl", *(     # the revision with the ratings corrected
        (f"{HUB}openbmb/UltraFeedback/resolve/40b436560ca83a8dba36114c22ab3c66e43f6d5e/{name}.jsonl", None)
        for name in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat"))),
    tune("alpaca", "alpaca_data.json", (GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json", None)),
    Task("instructions", "lm", ("perplexity",), read_instructions, (), own(".jsonl", ".json")),
    Task("text-classification", "classify", ("accuracy",), read_texts, (), own(".tsv", ".csv", ".jsonl", ".json")),
    Task("text-regression", "regress", ("pearson", "spearman"), read_texts, (), own(".tsv", ".csv", ".jsonl", ".json")),
    Task("image-folder", "image", ("accuracy",), read_image_folder),
    Task("npz", "image", ("accuracy",), read_arrays, (), own(".npz")),
    Task("cifar100", "image", ("accuracy",), read_arrays, tuple(map(str, range(100))),
         {"train": ("train.bin",), "dev": ("test.bin",)}, "cifar-100-binary",
         (("", "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", None),)),
    Task("digits", "image", ("accuracy",), read_arrays, DIGITS, own(".npz"), base=(2e-3, 32, 10)),
    Task("digits-rot90", "image", ("accuracy",), read_arrays, DIGITS, own(".npz"), base=(5e-3, 32, 15)),
)}


def find_task(name, data=None, labels=None):
    """Return the task with what depends on its files filled in.

    labels: an earlier run's Task.labels; without them a task of the user's own gets its training rows' labels, sorted.
    `commonsense` gets the tests that are there as eval_splits. UserError: unknown name, unreadable training file.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
        raise UserError(f"no task {name!r}: choose from {', '.join(dict.fromkeys([*close, *TASKS]))}")
    task = TASKS[name]
    if name == "commonsense":
        there = tuple(other for other in COMMONSENSE if data and find_files(TASKS[other], data, "dev"))
        return replace(task, eval_splits=there or COMMONSENSE)
    if task.kind in ("classify", "image") and not (labels or task.labels):
        found = {row["label"] for _, row in task.reader(task, data, "train")}
        if task.files and find_files(task, data, "train") == find_files(task, data, "dev"):
            found |= {row["label"] for _, row in task.reader(task, data, "dev")}  # a rare class may be there alone
        labels = sorted(found, key=int if all(re.fullmatch(r"-?\d{1,18}", label) for label in found) else str)
    return replace(task, labels=tuple(labels)) if labels else task


def read(task, data=None, split="train", limit=0):
    """Return the rows of a split ("train" or one of task.eval_splits), the first `limit` of them unless that is 0.

    classify: {text, [pair], label: int}; regress: the same with a float; lm: {prompt, answer} and, where generated
    answers are scored, {target, answers} for extract_answer; image: {pixels: uint8 (C, H, W), label: int}.
    data: the folder with the task's files, its parent, or a file; None: the cache, fetched into if need be.
    """
    if limit < 0:
        raise UserError(f"limit {limit}: a number of rows cannot be negative: use 0 for all of them")
    if split == "train" and "train" not in (task.files or ["train"]):
        raise UserError(f"{task.name} has no training set: train on another task, then eval.py RUN --task {task.name}")
    if split not in ("train", "dev", *task.eval_splits):
        raise UserError(f"{task.name} has no split {split!r}: choose from train, {', '.join(task.eval_splits)}")
    index, (low, high), rows = {label: i for i, label in enumerate(task.labels)}, task.span, []
    for where, row in task.reader(task, data, split):
        if task.kind in ("classify", "image"):
            if row["label"] not in index:
                known = str([*task.labels])[:200]
                raise UserError(f"{where}: label {row['label'][:40]!r} is none of {known}: mend or remove the row")
            row["label"] = index[row["label"]]
        elif task.kind == "regress":
            try:
                score = float(row["label"])
            except ValueError:
                score = math.nan
            if not (low <= score <= high and math.isfinite(score)):
                raise UserError(f"{where}: score {row['label'][:40]!r} is no number in [{low}, {high}]: mend the row")
            row["label"] = score
        if task.kind == "image" and rows and row["pixels"].shape != rows[0]["pixels"].shape:
            raise UserError(f"{where}: shape {row['pixels'].shape} after {rows[0]['pixels'].shape}: make all alike")
        rows.append(row)
    if not rows:
        raise UserError(f"{data or task.name}: no {split} rows: check the files")
    if split == "train" and task.kind in ("classify", "image") and len({row["label"] for row in rows}) < 2:
        raise UserError(f"{data or task.name}: all labels are {task.labels[rows[0]['label']]!r}: add another class")
    return rows[:limit or None]


# ----------------------------------------------------------------------------------------------- tokenizing and batches

class Tokenizer:
    """A checkpoint's tokenizer.json (backend: the tokenizers.Tokenizer) and the ids of its special tokens.

    pad_id falls back to eos, unk, 0; eos_ids: all tokens that end a generation; types: the model tells a pair's texts apart.
    """

    @classmethod
    def from_folder(cls, folder):
        """Read tokenizer.json and the JSON files that name special tokens. UserError: missing or broken."""
        self, path = cls(), Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file: make it with transformers: AutoTokenizer.from_pretrained"
                            f"({str(folder)!r}).save_pretrained({str(folder)!r})")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise UserError(f"{path}: not a tokenizer ({error}): fetch or make it again") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        names, config, generation = (read_settings(path.with_name(name)) for name in (
            "tokenizer_config.json", "config.json", "generation_config.json"))
        names = {**read_settings(path.with_name("special_tokens_map.json")), **names}

        def listed(settings, key):  # an id, or a list of them; some configs say -1 for none
            value = settings.get(key)
            return [n for n in (value if isinstance(value, list) else [value]) if type(n) is int and 0 <= n < 2**31]

        ids = {}
        for kind in ("pad", "bos", "eos", "unk"):
            name = names.get(f"{kind}_token")
            name = name.get("content") if isinstance(name, dict) else name
            found = listed(config, f"{kind}_token_id")
            if isinstance(name, str):  # no half surrogate pairs, which tokenizers do not take
                found.insert(0, self.backend.token_to_id(name.encode("utf-8", "replace").decode()))
            ids[kind] = next((n for n in found if n is not None), None)
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        family, kinds = config.get("model_type"), config.get("type_vocab_size")
        self.types = family == "bert" or family == "deberta-v2" and bool(kinds)
        self.pad_id = next((ids[kind] for kind in ("pad", "eos", "unk") if ids[kind] is not None), 0)
        ends = {self.eos_id, *listed(config, "eos_token_id"), *listed(generation, "eos_token_id")}
        self.eos_ids = sorted(ends - {None})
        # bos where the post-processor begins with it; what it may put at the end would stop a generation there
        self.prefix = [self.bos_id] if self.bos_id in self.backend.encode("").ids[:1] else []
        return self

    def encode(self, texts, pairs=None, max_length=None, special=True):
        """Return (ids, types): an int32 array for each text (or pair), truncated to max_length longest first.

        special: add the post-processor's tokens, as transformers' tokenizers do by default.
        """
        if max_length is not None:
            if max_length <= self.backend.num_special_tokens_to_add(pairs is not None):
                raise UserError(f"max length {max_length} leaves no room for text: use at least 8")
            self.backend.enable_truncation(max_length)
        ids, types = [], []
        for start in tqdm(range(0, len(texts), 4096), "tokenizing", leave=False, disable=len(texts) < 10_000):
            part = slice(start, start + 4096)       # encodings hold much besides ids: not all at once
            chunk = texts[part] if pairs is None else list(zip(texts[part], pairs[part]))
            for encoding in self.backend.encode_batch(chunk, add_special_tokens=special):
                ids.append(np.array(encoding.ids, np.int32))
                types.append(np.array(encoding.type_ids, np.int32))
        self.backend.no_truncation()
        return ids, types

    def decode(self, ids, prompt=()):
        """Return the text of ids generated after a prompt's ids, without special tokens.

        Decoded together: SentencePiece's decoder drops a space at the start, which indents Python.
        """
        before, whole = (self.backend.decode([int(i) for i in part]) for part in (prompt, [*prompt, *ids]))
        return whole[len(before):]


@dataclass
class Split:
    """Encoded examples; rows: what they were made of (not kept for images); lengths: tokens, or pixels, of each."""
    kind: str
    rows: list
    lengths: list
    labels: torch.Tensor | None = None          # long or float (N,), None for lm
    tokens: list | None = None                  # N int32 arrays
    types: list | None = None
    starts: list | None = None                  # lm: where the answers begin
    numbers: list | None = None                 # lm: which of the encoded rows these are, from 0; None = all
    pixels: torch.Tensor | None = None          # uint8 (N, C, H, W)
    image: dict | None = None                   # image_settings
    pad_id: int = 0

    def __len__(self):
        return len(self.lengths)


class Processor:
    """Turns rows into Splits with a model's own preprocessing: its tokenizer, or its image settings.

    `folder` holds the model's files; None, for images only, is a model without any, of `image_size` (channels, height,
    width).
    """

    def __init__(self, task, folder, image_size):
        self.task, self.folder, self.tokenizer, self.image = task, folder, None, None
        if task.kind != "image":
            self.tokenizer = Tokenizer.from_folder(folder)
        elif folder:
            self.image = image_settings(folder)
        else:
            channels, *size = image_size
            self.image = {"size": tuple(size), "channels": channels, "mean": 0.5, "std": 0.5}

    def training(self, rows, max_length):
        """Split of training rows, cut to `max_length`."""
        return encode(self.task, rows, self.tokenizer, max_length, self.image)

    def evaluation(self, s):
        """{name: Split} of the task's evaluation splits; prompts that answers are generated for stay whole."""
        length = None if self.task.new_tokens else s.max_length
        splits = {}
        for name in self.task.eval_splits:
            rows = half(read(self.task, s.data, name, s.limit_eval), getattr(s, "eval_half", "all"))
            splits[name] = encode(self.task, rows, self.tokenizer, length, self.image)
        return splits


def drawn(rows, count, seed):
    """`count` of the rows, or all if there are fewer, drawn by the seed and in their order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in sorted(order[:count].tolist())]


def half(rows, which):
    """All rows, or one of two halves that are the same in every run: "tune" to choose settings on, "report" the rest."""
    if which == "all":
        return rows
    if len(rows) < 2:
        raise UserError(f"--eval-half {which}: there are no two evaluation rows to part")
    tune = set(np.random.default_rng(0).permutation(len(rows))[:len(rows) // 2].tolist())
    return [row for i, row in enumerate(rows) if (i in tune) == (which == "tune")]


def image_settings(folder):
    """Return a ViT checkpoint's size, channels (config.json), mean and std (preprocessor_config.json, default 0.5)."""
    config, processor = (read_settings(Path(folder) / name) for name in ("config.json", "preprocessor_config.json"))
    size, channels = config.get("image_size", 224), config.get("num_channels", 3)
    mean, std = (processor.get("image_" + key) or 0.5 for key in ("mean", "std"))
    mean, std = (values if isinstance(values, list) else [values] for values in (mean, std))
    numbers = all(type(n) in (int, float) and abs(n) < 1e6 for n in mean + std)
    if not numbers or not {len(mean), len(std)} <= {1, channels} or min(std) <= 0:
        raise UserError(f"{folder}/preprocessor_config.json: image_mean and image_std do not fit {channels} channels")
    mean, std = (torch.tensor(values).float().view(-1, 1, 1) for values in (mean, std))
    return dict(size=tuple(size) if isinstance(size, list) else (size, size), channels=channels, mean=mean, std=std)


def encode(task, rows, tokenizer=None, max_length=None, image=None):
    """Return the Split of rows; images need image_settings(model folder) instead of a tokenizer.

    lm: prompt and answer are encoded apart, joined and ended with eos: so the prompt's ids are those that generation
    starts from, where encoding the joined text may merge characters across the boundary. Sequences over max_length
    lose their tail, as in LLM-Adapters; rows that lose the whole answer are dropped and noted. To generate answers,
    encode with max_length=None: no row is dropped, no prompt cut.
    """
    if task.kind == "image":
        pixels = torch.from_numpy(np.stack([row["pixels"] for row in rows]))
        labels = torch.tensor([row["label"] for row in rows])
        return Split(task.kind, [], [pixels[0].numel()] * len(rows), labels, pixels=pixels, image=image)
    if task.kind != "lm":
        pairs = [row["pair"] for row in rows] if "pair" in rows[0] else None
        tokens, types = tokenizer.encode([row["text"] for row in rows], pairs, max_length)
        labels = torch.tensor([row["label"] for row in rows])   # float or long, as the labels are
        return Split(task.kind, rows, [len(ids) for ids in tokens], labels, tokens, types if tokenizer.types else None,
                     pad_id=tokenizer.pad_id)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no eos token: name an eos_token in tokenizer_config.json")
    asked, answers = (tokenizer.encode([row[key] for row in rows], special=False)[0] for key in ("prompt", "answer"))
    starts = [len(tokenizer.prefix) + len(ids) for ids in asked]
    keep = [i for i, start in enumerate(starts) if max_length is None or start < max_length]
    if not keep:
        raise UserError(f"{task.name}: no row has its answer within max length {max_length}: raise it")
    if len(keep) < len(rows):
        note(f"{task.name}: dropped {len(rows) - len(keep)} of {len(rows)} rows, no answer within length {max_length}")
    tokens = [np.concatenate((tokenizer.prefix, asked[i], answers[i], [tokenizer.eos_id])).astype(np.int32)[:max_length]
              for i in keep]
    return Split(task.kind, [rows[i] for i in keep], [len(ids) for ids in tokens], tokens=tokens,
                 starts=[starts[i] for i in keep], numbers=keep, pad_id=tokenizer.pad_id)


def batches(split, batch_size, seed=0, epoch=0, shuffle=True):
    """Return lists of indices, each index once; lengths within a batch are close. Depends on (seed, epoch) only.

    shuffle: sort by length within random groups of 50 batches, then shuffle the batches; the smaller last batch stays
    last. Otherwise longest first, so that running out of memory happens at once.
    """
    lengths, random = np.asarray(split.lengths), np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    group = 50 * batch_size if shuffle else len(lengths)
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")]
                            for part in (order[i:i + group] for i in range(0, len(order), group))])
    result = [order[i:i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    full = len(order) // batch_size
    return [result[i] for i in random.permutation(full)] + result[full:] if shuffle else result


def pad(sequences, value, left=False, pad_to=None):
    """Return (tokens (B, T) long, mask (B, T) bool, True = real token); T: the longest, or the bucket it fits in."""
    longest = max(map(len, sequences))
    width = min((size for size in pad_to or () if size >= longest), default=longest)
    tokens, mask = np.full((len(sequences), width), value, np.int64), np.zeros((len(sequences), width), bool)
    for row, ids in enumerate(sequences):
        part = slice(width - len(ids), width) if left else slice(0, len(ids))
        tokens[row, part], mask[row, part] = ids, True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def collate(split, indices, pad_to=None):
    """Return (inputs, labels) for model(**inputs); pad_to: widths to round up to, for compiled code to see few shapes.

    classify, regress: tokens, mask, [types] (B, T); labels (B,) long or float. image: pixels (B, C, H, W) float.
    lm: tokens, mask and positions (N,), the flat indices into B * T whose next token is part of an answer; labels (N,)
    those next tokens: the loss is on answers only.
    """
    if split.kind == "image":
        pixels, image = split.pixels[indices].float() / 255, split.image    # (B, C, H, W)
        if pixels.shape[2:] != image["size"]:
            pixels = F.interpolate(pixels, image["size"], mode="bilinear", antialias=True)
        if pixels.shape[1] != image["channels"]:
            pixels = pixels.mean(1, keepdim=True).expand(-1, image["channels"], -1, -1)
        return {"pixels": (pixels - image["mean"]) / image["std"]}, split.labels[indices]
    tokens, mask = pad([split.tokens[i] for i in indices], split.pad_id, pad_to=pad_to)
    inputs = {"tokens": tokens, "mask": mask}
    if split.kind == "lm":
        answers = torch.cat([torch.arange(max(split.starts[i], 1), split.lengths[i]) + row * tokens.shape[1]
                             for row, i in enumerate(indices)])
        return {**inputs, "positions": answers - 1}, tokens.view(-1)[answers]
    if split.types is not None:
        inputs["types"] = pad([split.types[i] for i in indices], 0, pad_to=pad_to)[0]
    return inputs, split.labels[indices]


def count_labels(split, indices):
    """Return how many labels `collate` gives for these examples."""
    return len(indices) if split.kind != "lm" else sum(split.lengths[i] - max(split.starts[i], 1) for i in indices)


def prompts(split, indices):
    """Return (tokens, mask) (B, T) of the prompts alone, padded on the left, for generate."""
    return pad([split.tokens[i][:split.starts[i]] for i in indices], split.pad_id, left=True)


class Batches:
    """The training rows, epoch after epoch in an order that seed and epoch decide, as the forward passes of a step.

    Of several processes each takes its share of every batch.
    """

    saved = ("drawn",)  # batches so far

    def __init__(self, s, split, process=0, processes=1):
        self.s, self.split, self.drawn, self.epoch = s, split, 0, None
        self.process, self.processes = process, processes
        self.per_epoch = math.ceil(len(split) / s.batch_size)
        self.steps_per_epoch = math.ceil(self.per_epoch / s.accumulate)
        self.total_steps = s.steps or max(1, math.ceil(s.epochs * self.steps_per_epoch))
        widths = [2 ** k * f // 2 for k in range(3, 16) for f in (2, 3)]  # 8, 12, 16, 24, 32 ...
        self.widths = [w for w in widths if w <= (s.max_length or 0)] if s.compile == "on" else None

    def take(self, least_rows=0):
        """The passes of the next step, see train.Training.step, and its number of rows.

        A step has `accumulate` batches, fewer at the end of an epoch, or as many as hold `least_rows` rows.
        """
        taken, rows = [], 0
        while not taken or len(taken) < self.s.accumulate and self.drawn % self.per_epoch or rows < least_rows:
            epoch, i = divmod(self.drawn, self.per_epoch)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, batches(self.split, self.s.batch_size, self.s.seed, epoch)
            taken.append(self.order[i])
            rows += len(taken[-1])
            self.drawn += 1
        labels = sum(count_labels(self.split, indices) for indices in taken)
        passes = []
        for indices in taken:
            mine = indices[self.process::self.processes]  # if there are none, take part with weight 0
            weight, mine = (1 / labels, mine) if mine else (0.0, indices[:1])
            most = self.s.forward_rows or len(mine)
            passes += [(*collate(self.split, mine[i:i + most], self.widths), weight)
                       for i in range(0, len(mine), most)]
        return passes, rows


# ------------------------------------------------------------------------------------------------------ hyperparameters

ADALORA_RATES = {"mnli": 5e-4, "qnli": 5e-4, "cola": 8e-4, "qqp": 8e-4, "sst2": 8e-4, "mrpc": 1e-3, "rte": 1.2e-3,
                 "stsb": 2.2e-3}  # QingruZhang/AdaLoRA, NLU/scripts


def hyperparameters(task, family, size, method="lora", rank=None, adalora_init_ratio=1.5):
    """Return the papers' settings for flags that are not set, and {name: reason} for those that the method decides.

    size is the model's hidden size, rank the one that is set, or None.

    Encoders on GLUE: lelora Tables 5 and 6, with rank, alpha, dropout and length, which they leave open, of weightlora
    Table 9. Decoders on GLUE: weightlora Table 10, learning rate and warmup from the middle of its grids. Instructions:
    lelora Table 7 with DoRA's rank 32 and alpha 64; weightlora Table 11 for qwen3. Ours: images, the user's own tables,
    full fine-tuning's and bitfit's learning rates. warmup: a share of all steps, or a number of steps from 1 on.
    """
    lr, batch_size, epochs = task.base if size < 1024 else task.large
    chosen = dict(lr=lr, batch_size=batch_size, epochs=epochs, steps=None, warmup=0.06, weight_decay=0.1, rank=8,
                  alpha=16, dropout=0.1, max_length=task.max_length, schedule="linear")
    llama_glue = dict(lr=3e-4, batch_size=32, epochs=None, weight_decay=1e-4, max_length=512, alpha=32, dropout=0.05)
    if task.kind == "image":
        chosen.update(weight_decay=0.01, dropout=0.0)
    elif task.kind == "lm" and family == "qwen3":
        chosen.update(llama_glue, steps=5000, warmup=500)
    elif task.kind == "lm":
        chosen.update(lr=3e-4, batch_size=64, epochs=3, warmup=100, weight_decay=0.0, rank=32, alpha=64, dropout=0.05)
    elif family not in ("bert", "roberta", "deberta-v2"):
        chosen.update(llama_glue, steps=task.steps, warmup=30)
    elif size >= 1024:
        chosen.update(warmup=0.03, weight_decay=0.0)
    reasons, rank = {}, rank or chosen["rank"]
    if method in ("full", "bitfit"):
        chosen["lr"] = (1e-3 if task.kind == "image" else 2e-5) if method == "full" else 1e-3
    elif method == "adalora":
        triplets = round(adalora_init_ratio * rank)
        chosen.update(lr=ADALORA_RATES.get(task.name, 2 * chosen["lr"]), alpha=16 * triplets)
        reasons["lr"] = "its authors' script" if task.name in ADALORA_RATES else "twice LoRA's"
        reasons["alpha"] = f"16 x the {triplets} triplets that a matrix starts with, as in its authors' scripts"
    elif method == "lalora":
        chosen["lalora_gamma"] = round(1.1 * math.log(max(2, rank)) / math.log(8), 3)
        reasons["lalora_gamma"] = f"for rank {rank}: the budget's ceiling is {rank} times its start"
    elif method in ("weightlora", "weightlora+"):
        chosen["warmup"] = 0.0
        reasons["warmup"] = "none, as in its authors' GLUE scripts"
    return chosen, reasons
