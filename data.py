"""Tasks: reading files, prompts and templates, encoding, batching, the papers' hyperparameters.

    task = find_task("cola")                                # a row of TASKS with its label set
    rows = read(task, folder, "train")                      # list of dicts; fetched into a cache where folder is None
    split = encode(task, rows, Tokenizer.from_folder(model_folder), max_length=128)
    for indices in batches(split.lengths, 32, seed=0, epoch=0):
        inputs, labels = collate(split, indices)            # model(**inputs)

A new task is a new row of TASKS, or a Task in a file of your own for --task my_tasks.py:MY_TASK, as papers/tasks.py
and, with its own encoding and metrics, papers/squad.py:

    from data import Task, own, read_texts
    MY_TASK = Task("mine", "classify", ("accuracy",), read_texts, files=own(".csv"), columns=("said", None, "mood"))

Columns and files of the user's that are not read are named in one line on stderr, but for columns in IRRELEVANT.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import math
import re
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extras.fetch import fetch
from extras.images import channels_first, fit, image_settings, read_image
from extras.source import own_module
from extras.tokenizer import Tokenizer
from model import UserError, cache_folder, distinct, note

# columns that hold text which no task learns from: names and places of rows, what other columns say in another form
IRRELEVANT = set("""
    id idx index guid uid uuid pid qid qid1 qid2 pairid promptid captionid prompt_id example_id task_id unique_id url
    link source source1 source2 source_file dataset filename file genre year old_index mark language lang license author
    date created_at timestamp type level topic category resource tags metadata meta model models generator annotator
    annotators annotator_labels annotations label_text label_name label1 label2 label3 label4 label5 sentence1_parse
    sentence2_parse sentence1_binary_parse sentence2_binary_parse original_question correct_answers incorrect_answers
    rejected score_chosen score_rejected entry_point test test_list test_imports test_setup_code challenge_test_list
""".split())
# what stands where a label is missing
MISSING = {"", "-", "-1", "?", "nan", "NaN", "NAN", "NA", "N/A", "<NA>", "None", "null", "NULL"}


# -------------------------------------------------------------------------------------------------- text, tables, JSON

def read_bytes(path):
    """Return a file's content, a .gz file's unpacked. UserError: missing, broken."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check --data") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a broken archive ({error}): fetch it again") from None


def read_text(path):
    """Return a file's text without byte-order mark. UserError: missing, empty, not UTF-8."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: byte {error.start} is not UTF-8: convert the file") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: fetch or write it again")
    return text if "\n" in text else text.replace("\r", "\n")  # as old Macs, and Excel's "Text (Macintosh)", end lines


def suffix(path):
    """Return what a file's name ends with, without .gz."""
    return Path(Path(path).name.removesuffix(".gz")).suffix


def read_table(path, header=None, skip_short=False, quoted=False):
    """Yield (where, {column: text}) for the rows of a tab-separated or .csv file.

    header: column names of a file without such a line. quoted: quotes in a tab-separated file may be CSV's, not text.
    """
    text, skipped = read_text(path).rstrip("\r\n"), 0
    comma = suffix(path) == ".csv"
    lines = text.split("\n")    # not splitlines: Unicode's other separators are text
    rows = enumerate((line.removesuffix("\r").split("\t") for line in lines), 1)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), "excel" if comma else "excel-tab", strict=True)
    try:
        if comma or quoted and '"' in text:
            parsed = [(reader.line_num, cells) for cells in reader if cells]
            alike = len({len(cells) for _, cells in parsed}) == 1
            tabs = [line.count("\t") for line in lines if line.strip("\r")]
            joined = len({*tabs}) == 1 and len(parsed) != len(tabs)     # lines that are rows as they stand
            if comma or alike and not joined:
                rows = parsed
    except csv.Error as error:
        if comma:
            raise UserError(f"{path} line {reader.line_num}: {error}: mend the CSV quoting") from None
    for number, cells in rows:
        if header is None:
            header = [name.strip() or f"column {i}" for i, name in enumerate(cells, 1)]
            distinct([(name, None) for name in header], f"{path} line {number}: ")
        elif len(cells) == len(header):
            yield f"{path} line {number}", dict(zip(header, cells))
        elif len(cells) < len(header) and skip_short:
            skipped += 1
        else:
            raise UserError(f"{path} line {number}: {len(cells)} columns, expected {len(header)}: mend the row")
    if skipped:
        note(f"{path}: skipped {skipped} short row{'s' * (skipped > 1)}")


def json_rows(path):
    """Yield (where, dict) for a JSON object, for each object of a JSON list, or for each line of JSON lines."""
    text = read_text(path)
    one_a_line = re.match(r"\s*\{.*\}\s*?(\n|$)", text)
    for number, part in enumerate(text.split("\n") if one_a_line else [text], 1):
        try:
            value = json.loads(part, object_pairs_hook=distinct) if part.strip() else []
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            known = one_a_line or hasattr(error, "lineno")
            line = f"line {number + getattr(error, 'lineno', 1) - 1}" if known else "in some row"
            raise UserError(f"{path} {line}: not JSON ({error}): mend the file") from None
        for row, item in enumerate(value if isinstance(value, list) else [value], 1):
            where = f"{path} {f'row {row}' if isinstance(value, list) else f'line {number}'}"
            if not isinstance(item, dict):
                raise UserError(f"{where}: {type(item).__name__}, expected an object with named values: mend the file")
            yield where, item


def get(row, key, where, kinds=str):
    """Return row[key]. UserError: missing, of another type, half a surrogate pair (which no tokenizer takes)."""
    if key not in row:
        raise UserError(f"{where}: no column {key!r} (there are {str([*row])[:200]}): add or rename it")
    if not isinstance(row[key], kinds) or isinstance(row[key], str) and re.search("[\ud800-\udfff]", row[key]):
        raise UserError(f"{where}: {key!r} is {type(row[key]).__name__} {str(row[key])[:40]!a}, no valid text: mend it")
    return row[key]


def name_unread(where, row, read):
    """Note the columns of a row that are not among those read: those in NAMES or, if not IRRELEVANT, with a letter."""
    names = []
    for name, value in row.items():
        if name in read or value in (None, "", []):
            continue
        letter = isinstance(value, (str, list, dict)) and re.search(r"[^\W\d_]", str(value))
        if name in NAMES or letter and name.lower() not in IRRELEVANT:
            names.append(name)
    if names:
        file, columns = where.rsplit(" ", 2)[0], ", ".join(map(ascii, names))[:200]
        note(f"{file}: not read: column{'s' * (len(names) > 1)} {columns}")


# ----------------------------------------------------------------------------------------------------- where files are

def find_files(task, data, split):
    """Return a split's files in data (None: the cache) or its task.folder, or data if one file can hold all splits."""
    data, names = Path(data or cache_folder()), task.files.get(split, ())
    shared = set.intersection(*map(set, task.files.values())) if names else ()
    if data.is_file() and suffix(data)[:5] in {suffix(name)[:5] for name in shared}:    # .json is as good as .jsonl
        return [data]
    found = (sorted(folder.glob(name + end)) for folder in (data / task.folder, data) for name in names
             for end in ("", ".gz"))
    return next(filter(None, found), [])


def name_others(task, data):
    """Note what else in a folder has an ending that the task reads; of a published set only a read file's .gz."""
    read = {path for split in task.files for path in find_files(task, data, split)}
    names, endings = {path.name for path in read}, {suffix(name) for name in sum(task.files.values(), ())}
    for folder in {path.parent for path in read} if Path(data or cache_folder()).is_dir() else ():
        others = [path.name for path in sorted(folder.glob("[!.]*")) if path not in read and suffix(path) in endings
                  and (suffix(path) or path.is_dir()) and (not task.sources or path.with_suffix("") in read)]
        if others:
            note(f"{folder}: rows are read from {', '.join(sorted(names))[:200]}, not {', '.join(others)[:200]!a}")


def locate(task, data, split):
    """Return the paths of a split's files, fetched into the cache where data is None and they are not there."""
    if split not in task.files:
        raise UserError(f"{task.name} has no {split} rows, only {', '.join(task.files)}: name another task for them")
    if data is None and not task.sources:
        raise UserError(f"--task {task.name} needs --data: a file, or a folder with {task.files[split][0]}")
    if data is None:
        fetch(task, split, there=bool(find_files(task, None, split)))
    paths = find_files(task, data, split)
    if not paths:
        folder, several = Path(data or cache_folder()), ' or '.join(task.files[split])[:200]
        if folder.is_file():
            raise UserError(f"--data {folder}: {task.name} reads {several}: rename the file, or name its folder")
        there = ", ".join(ascii(path.name) for path in sorted(folder.glob("[!.]*")))[:200] or "no files"
        raise UserError(f"{folder / task.folder / task.files[split][0]}: no such file, in {folder} there are {there}: "
                        f"correct --data to name a file or its folder, with {several}")
    return paths


def held_out(task, data, split, rows):
    """Return a split's rows; where one file is both training and dev file, 10 % (at most 1,000 rows) are dev.

    One of each tenth (files are often sorted), in changing places (labels may alternate); the last of instructions.
    """
    if find_files(task, data, "train") != find_files(task, data, "dev" if split == "train" else split):
        return rows
    rows = list(rows)
    count = min(math.ceil(len(rows) / 10), 1000)
    ends = [i * len(rows) // max(count, 1) for i in range(count + 1)]
    how, dev = "evenly spread", {start + 7 * i % (end - start) for i, (start, end) in enumerate(zip(ends, ends[1:]))}
    if task.kind == "lm":
        how, dev = "the last", set(range(len(rows) - count, len(rows)))
    note(f"{data or task.name}: no dev file: {count} of {len(rows)} rows are dev ({how})")
    return [row for i, row in enumerate(rows) if (i in dev) == (split != "train")]


# -------------------- readers: reader(task, data, split) yields (where, row); labels stay text until read() checks them

# names of a pair's texts, then of a single one; the first that a file's first row has are read
TEXTS = [names.split("+") for names in """
    sentence1+sentence2 sentence_1+sentence_2 sentence_a+sentence_b text1+text2 text_1+text_2 text_a+text_b
    question1+question2 premise+hypothesis text+pair text+text_pair question+sentence question+passage question+context
    question+answer query+passage query+document claim+evidence sentence+context text+context
    sentence text content review tweet comment""".split()]
LABELS = ["label", "gold_label", "score"]
NAMES = {*sum(TEXTS, LABELS)}


def read_texts(task, data, split):
    """GLUE's files (MRPC's are Microsoft's with GLUE's list of dev pairs), and the user's own with names in TEXTS."""
    path, columns, unlabelled = locate(task, data, split)[0], task.columns, 0
    if suffix(path).startswith(".json"):
        rows = json_rows(path)
    else:
        rows = read_table(path, task.header, skip_short=task.skip_short, quoted=not task.sources)
    if path.name == "msr_paraphrase_train.txt":
        ids = ("#1 ID", "#2 ID")
        dev = {tuple(row.values()) for _, row in read_table(path.with_name("mrpc_dev_ids.tsv"), ids)}
        rows = (row for row in rows if (tuple(get(row[1], name, row[0]) for name in ids) in dev) == (split == "dev"))
    else:
        rows = held_out(task, data, split, rows)
    for where, row in rows:
        if not columns:
            text, *pair = next((names for names in TEXTS if {*names} <= {*row}), ["text"])
            label = next((name for name in LABELS if name in row), "label")
            columns = (text, pair[0] if pair else None, label)
        text, pair, label = columns
        name_unread(where, row, columns)
        value = str(get(row, label, where, (str, int, float)))
        if label == "gold_label" and value.strip() == "-":  # SNLI's and MNLI's pairs without a majority
            unlabelled += 1
            continue
        texts = {"text": get(row, text, where)} | ({"pair": get(row, pair, where)} if pair else {})
        yield where, texts | {"label": value}
    if unlabelled:
        note(f"{path}: left out {unlabelled} row{'s' * (unlabelled > 1)} without a gold label")


def read_instructions(task, data, split, change=lambda where, row: row):
    """Rows of COLUMNS' layouts; change(where, row) returns what a row is read as, None to leave it out."""
    rows, skipped = [], 0
    for path in locate(task, data, split):
        for where, row in json_rows(path):
            row = change(where, row)
            if row is None:
                continue
            row = instruction(task, where, row)
            if row["answer"].strip():
                rows.append((where, row))
            else:
                skipped += 1    # Alpaca and UltraFeedback were published with some
    if skipped:
        note(f"{data or task.name}: skipped {skipped} row{'s' * (skipped > 1)} without an answer")
    return held_out(task, data, split, rows)


def read_commonsense(task, data, split):
    """Train: commonsense_170k.json, or else every train.json there is; the other splits are tasks, their tests."""
    if split != "train":
        yield from read_instructions(TASKS[split], data, "dev")
        return
    parts = [task]
    if data is not None and not find_files(task, data, split):
        parts = [TASKS[name] for name in COMMONSENSE if find_files(TASKS[name], data, split)] or parts
        note(f"{data}: no commonsense_170k.json: training on train.json of {', '.join(part.name for part in parts)}")
    for part in parts:
        yield from read_instructions(replace(part, answers=None), data, split)


def read_arrays(task, data, split):
    """.npz with x_train y_train x_test y_test, or images labels [split: 0 train, 1 test]."""
    path, keys = locate(task, data, split)[0], ("images", "labels")
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, AttributeError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: no .npz of plain arrays ({error}): write it with np.savez_compressed") from None
    if "x_train" in arrays:
        keys = ("x_train", "y_train") if split == "train" else ("x_test", "y_test")
    images, labels = (get(arrays, key, path, np.ndarray) for key in keys)
    part = arrays.get("split", np.zeros(labels.size))
    if (images.ndim not in (3, 4) or not len(images) == labels.size == part.size or labels.dtype.kind not in "iuU"
            or part.dtype.kind not in "biuf" or not np.isin(part, (0, 1)).all()):
        raise UserError(f"{path}: {keys[0]} {images.shape}, {keys[1]} {labels.shape} {labels.dtype} and split "
                        f"{part.shape}: expected (N, H, W[, C]), N integers or names, N times 0 or 1: write it again")
    for name in sorted(arrays.keys() - {"x_train", "y_train", "x_test", "y_test", *keys, "split"}):
        note(f"{path}: not read: array {name[:40]!a}")
    alone = find_files(task, data, "dev") in ([], find_files(task, data, "train"))
    if not alone and {"x_train", "split"} & arrays.keys():
        note(f"{path}: only its {split} rows are read: there is another file for the others")
    chosen = range(len(images))
    if "split" in arrays:
        chosen = np.flatnonzero((part != 0) == (split != "train"))
    elif "x_train" not in arrays:
        chosen = held_out(task, data, split, chosen)
    for i in chosen:
        where = f"{path} {keys[0]}[{i}]"
        yield where, {"pixels": channels_first(images[i], where), "label": str(labels.flat[i])}


def read_digits(task, data, split, turn=0):
    """As `read_arrays`, turned to the left so many times; without data the digits that are embedded."""
    for where, row in read_arrays(task, data or Path(__file__).parent / "assets" / "digits.npz", split):
        yield where, row | {"pixels": np.rot90(row["pixels"], turn, axes=(1, 2))}


def read_image_folder(task, data, split):
    """data/train/<class>/* and data/{dev,val,valid,validation,test}/<class>/*: .npy, or whatever Pillow opens."""
    root = locate(task, data, split)[0]
    for path in sorted(map(Path, glob.iglob(f"{glob.escape(str(root))}/**", recursive=True))):  # follows links, too
        parts = path.relative_to(root).parts
        hidden = path.name.lower() in ("thumbs.db", "desktop.ini")
        if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()) or path.is_fifo():
            raise UserError(f"{path}: a link to a folder that it is in, or a pipe: remove it")
        if not path.is_dir() and not hidden and len(parts) > 1:  # a link to nowhere is an error
            yield str(path), {"pixels": path, "label": parts[0]}
        elif not path.is_dir() and not hidden:
            note(f"{root}: not read: *{path.suffix} in no class's folder")


# -------------------------------------------------------------------------------------------------- prompts and answers

def prompt(text, extra=""):
    """Return Alpaca's instruction template, which LLM-Adapters and so the papers use; joined, never formatted."""
    context = ", paired with an input that provides further context" if extra else ""
    lead = f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the"
    extra = "\n\n### Input:\n" + extra if extra else ""
    return lead + " request.\n\n### Instruction:\n" + text + extra + "\n\n### Response:\n"


# what asks and what answers: Alpaca, LLM-Adapters, AlpacaEval; GSM8K; MetaMathQA; CodeFeedback; MATH; UltraFeedback,
# binarized; HumanEval; MBPP and its sanitized half; Dolly; OpenOrca
COLUMNS = [names.split("+") for names in """
    instruction+output question+answer query+response query+answer problem+solution prompt+chosen
    prompt+canonical_solution text+code prompt+code instruction+response question+response prompt+response
    prompt+completion""".split()]


def instruction(task, where, row):
    """Return {prompt, answer} of a row, {target, answers} where answers are scored, {sample} for another program."""
    asks, says = next((pair for pair in COLUMNS if {*pair} <= {*row}), COLUMNS[0])
    extra = next((name for name in ("input", "context") if row.get(name) not in (None, "", [])), None)
    system = next((name for name in ("system", "system_prompt") if row.get(name)), None)
    name_unread(where, row, (asks, says, extra, system, "answer" if task.answers or task.sources else None,
                            "subject" if task.sources else None))   # MATH's
    answer = last_message(row, says, where) if isinstance(row.get(says), list) else get(row, says, where)
    text = task.template(get(row, asks, where), get(row, extra, where) if extra else "")
    result = {"prompt": f"{get(row, system, where)}\n\n{text}" if system else text, "answer": answer}
    if task.sample:
        result["sample"] = {name: get(row, name, where, (str, int)) for name in task.sample}
    if not task.answers:
        return result
    words = () if callable(task.answers) else task.answers
    target = get(row, "answer", where) if words else task.answers(answer, True)
    if not target or words and target not in words:
        expected = " or ".join(words) or f"one marked as {task.name}'s are"
        raise UserError(f"{where}: answer {target[:40]!r}, expected {expected}: mend the row")
    if words and extract_answer(answer, words) != target:
        raise UserError(f"{where}: answer {target!r}, but {says} says {answer[:60]!r}: mend the row")
    return {**result, "target": target, "answers": task.answers}


def last_message(row, says, where):
    """Return what the last message of a conversation says, "" if there is none or it is the user's."""
    parts = [get({says: part}, says, where, dict) for part in row[says]]
    if len(parts) > 2 or parts and parts[0].get("role") == "system":
        note(f"{where.rsplit(' ', 2)[0]}: a system's or more than two messages: only prompt and last one are read")
    return get(parts[-1], "content", where) if parts and parts[-1].get("role") not in ("user", "system") else ""


def extract_answer(text, answers):
    """Return the answer in a text, "" where there is none: the first of the words (LLM-Adapters), or by a function."""
    if callable(answers):
        return answers(text)
    found = re.search("|".join(map(re.escape, sorted(answers, key=len, reverse=True))), text)   # answer1 in answer10
    return found.group() if found else ""


def allowed(row):
    """Return the words that a row allows as its answer, those that its prompt lists, and the answer with each."""
    words = [word for word in row["answers"] if word in row["prompt"]]
    words = words if row["target"] in words and len(words) > 1 else list(row["answers"])
    return words, [row["answer"].rpartition(row["target"])[0] + word for word in words]


# a minus sign after a digit subtracts; commas belong to a number where they group three digits
NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text, reference=False):
    """Return the last number of a text as GSM8K writes it; in its own solutions (reference) it stands after ####."""
    text = text.partition("####")[2] if reference else text
    found = NUMBER.findall(text.replace("$", "")) or [""]
    number = found[-1].replace(",", "") if len(found) == 1 or not reference else ""
    return number.rstrip("0").rstrip(".") or "0" if "." in number else number


# --------------------------------------------------------------------------------------------------- the table of tasks

@dataclass(frozen=True)
class Task:
    """One row of TASKS, or of a file of your own; base, large and steps default to values of ours."""
    name: str
    kind: str                        # "classify", "regress", "span", "lm" (an instruction and its answer) or "image"
    metrics: tuple                   # the first is the headline; only of "loss" and "perplexity" less is better
    reader: object                   # reader(task, data, split) yields (where, row)
    labels: tuple = ()               # class names in order; () = find_task finds them in the training rows
    files: dict = field(default_factory=dict)   # split -> names or patterns, the first that is there is read
    folder: str = ""                 # the files' folder in an archive and under --data
    sources: tuple = ()              # (split it is for or "", address, SHA-256 or None where it is not known)
    columns: tuple = ()              # text, pair or None, label
    header: tuple | None = None      # column names of files without a header line
    skip_short: bool = False         # rows of too few cells are left out, as of QQP, which has some
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
    settings: dict = field(default_factory=dict)    # what its paper sets besides, see hyperparameters
    max_length: int = 512
    encode: object = None            # its own encode(task, rows, tokenizer, max_length) that returns a Split
    evaluate: object = None          # its own evaluate(model, task, split, batches) that returns {metric: number}


FACEBOOK, GITHUB = "https://dl.fbaipublicfiles.com/", "https://raw.githubusercontent.com/"
ADAPTERS = GITHUB + "AGI-Edgerunners/LLM-Adapters/main/"
GSM8K = GITHUB + "openai/grade-school-math/master/grade_school_math/data/"
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa")
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
BINARY, ENTAIL, DIGITS = ("0", "1"), ("entailment", "not_entailment"), tuple("0123456789")
TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",)}
NEXT = ("### Instruction",)          # a model that has answered and goes on with the prompt's template


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
         "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", (4e-4, 128, 25), (3e-4, 32, 20), 1024,
         skip_short=True),
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
         eval_splits=COMMONSENSE, max_length=256),
    Task("gsm8k", "lm", ("exact_match",), read_instructions, (), {"train": ("train.jsonl",), "dev": ("test.jsonl",)},
         "gsm8k", (("train", GSM8K + "train.jsonl", None), ("dev", GSM8K + "test.jsonl", None)), answers=last_number,
         new_tokens=400, stop=NEXT),
    Task("alpaca", "lm", ("perplexity",), read_instructions, (), dict.fromkeys(("train", "dev"), ("alpaca_data.json",)),
         "alpaca", (("", GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json", None),)),
    Task("instructions", "lm", ("perplexity",), read_instructions, (), own(".jsonl", ".json")),
    Task("text-classification", "classify", ("accuracy",), read_texts, (), own(".tsv", ".csv", ".jsonl", ".json")),
    Task("text-regression", "regress", ("pearson", "spearman"), read_texts, (), own(".tsv", ".csv", ".jsonl", ".json")),
    Task("image-folder", "image", ("accuracy",), read_image_folder, (),
         {"train": ("train",), "dev": ("dev", "val", "valid", "validation", "test")}),
    Task("npz", "image", ("accuracy",), read_arrays, (), own(".npz")),
    Task("digits", "image", ("accuracy",), read_digits, DIGITS, own(".npz"), base=(2e-3, 32, 10)),
    Task("digits-rot90", "image", ("accuracy",), partial(read_digits, turn=1), DIGITS, own(".npz"), base=(5e-3, 32, 15))
)}


def task_row(name):
    """Return the Task of that name in TASKS, or of `my_tasks.py:NAME`: a Task in a file of your own, by either name."""
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise UserError(f"no task {name!r}: choose from {', '.join(TASKS)}, papers/squad.py:squad or :squad2, "
                        "papers/tasks.py:math or another there, my_tasks.py:MY_TASK")
    module, wanted = own_module("--task", name)
    there = {key: value for key, value in vars(module).items() if isinstance(value, Task)}
    for key, task in there.items():
        if wanted in (key, task.name):
            return task
    raise UserError(f"--task {name}: the file has no data.Task {wanted}: define it, or name one of {[*there]}")


def find_task(name, data=None, labels=None):
    """Return task_row(name) with what depends on its files filled in: labels, and eval_splits of `commonsense`.

    labels: an earlier run's; without them a task of the user's own gets its training file's, sorted.
    """
    task = task_row(name)
    if task.reader is read_commonsense:
        there = tuple(other for other in task.eval_splits if data and find_files(TASKS[other], data, "dev"))
        if 0 < len(there) < len(task.eval_splits):
            note(f"{data}: evaluating on {', '.join(there)} alone: of the others there is no test.json")
        return replace(task, eval_splits=there or task.eval_splits)
    if task.kind in ("classify", "image") and not (labels or task.labels):
        whole = replace(task, files={"train": task.files.get("train", ())})     # nothing held out: a rare class may be
        found = {row["label"] for _, row in labelled(whole, data, "train")}
        labels = sorted(found, key=int if all(re.fullmatch(r"-?\d{1,18}", label) for label in found) else str)
    return replace(task, labels=tuple(labels)) if labels else task


def labelled(task, data, split):
    """Yield a reader's (where, row); class labels lose stray spaces and a number's .0. UserError: no text or label."""
    for where, row in task.reader(task, data, split):
        row = {**row}   # the reader's own stays as it is: it may give it again
        for name in () if task.encode else {"lm": ("prompt", "answer"), "image": ()}.get(task.kind, ("text",)):
            get(row, name, where)
        if task.kind in ("classify", "regress", "image"):
            row["label"] = re.sub(r"^(-?\d+)\.0+$", r"\1", str(get(row, "label", where, object)).strip())
            if row["label"] in MISSING and task.kind != "regress":
                raise UserError(f"{where}: label {row['label']!r} stands for a missing one: remove the row or name it")
        yield where, row


def read(task, data=None, split="train", limit=0):
    """Return the rows of a split ("train" or one of task.eval_splits), the first `limit` of them unless that is 0.

    classify: {text, [pair], label: int}; regress: the same with a float; lm: {prompt, answer, [target, answers,
    sample]}; image: {pixels: uint8 (C, H, W) or a file's path, label: int}.
    data: the folder with the task's files, its parent, or a file; None: the cache, fetched into if need be.
    """
    place, index, rows = data or task.name, {label: i for i, label in enumerate(task.labels)}, []
    name_others(task, data)
    for where, row in itertools.islice(labelled(task, data, split), limit or None):
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
            if not (task.span[0] <= score <= task.span[1] and abs(score) < 1e38):  # in float32
                raise UserError(f"{where}: score {row['label'][:40]!r} is no number in {[*task.span]}: mend the row")
            row["label"] = score
        rows.append(row)
    if not rows:
        raise UserError(f"{place}: no {split} rows: check the files")
    if task.kind in ("classify", "image"):
        counts = np.bincount([row["label"] for row in rows], minlength=len(task.labels))
        if split == "train" and np.count_nonzero(counts) < 2:
            remedy = "raise the limit or shuffle the rows" if limit else "add another class"
            label = task.labels[rows[0]["label"]]
            raise UserError(f"{place}: all labels are {label!r} in the {len(rows)} rows: {remedy}")
        shown = ", ".join(f"{count} {label[:40]!a}" for label, count in zip(task.labels[:10], counts))
        note(f"{place}: {len(rows)} {split} rows: {shown}{' ...' * (len(counts) > 10)}")
    return rows


# ------------------------------------------------------------------------------------------------ encoding and batches

@dataclass
class Split:
    """Encoded examples; rows: what they were made of (not kept for images); lengths: tokens, or pixels, of each."""
    kind: str
    rows: list
    lengths: list
    labels: torch.Tensor | None = None          # long or float (N,), span: long (N, 2), None for lm
    tokens: list | None = None                  # N int32 arrays
    types: list | None = None
    starts: list | None = None                  # lm: where the answers begin
    pixels: torch.Tensor | None = None          # uint8 (N, C, H, W), of the model's size
    image: dict | None = None                   # image_settings
    pad_id: int = 0

    def __len__(self):
        return len(self.lengths)

    def count_rows(self):
        return len(set(map(id, self.rows)) or self)  # of one row there may be several examples, as SQuAD's windows


class Processor:
    """Turns rows into Splits with a model's own preprocessing: its tokenizer, or its image settings.

    folder: the model's files, None for a model of images without any. config: the model's, whose tables ids must fit.
    """

    def __init__(self, task, folder, config):
        self.task, self.folder, self.config, self.tokenizer, self.image = task, folder, config, None, None
        self.first = None  # row of all splits
        if task.kind == "image":
            self.image = image_settings(folder, config.image_size)
            return
        self.tokenizer = Tokenizer.from_folder(folder)
        size, rows, pad = self.tokenizer.backend.get_vocab_size(), config.vocab_size, self.tokenizer.pad_id
        if size < rows / 2:
            raise UserError(f"{folder}: the tokenizer has {size} tokens, the model {rows}: it is not this model's, or "
                            "part of it is missing: fetch the tokenizer's files again")
        if pad >= rows:
            eos = self.tokenizer.eos_id
            self.tokenizer.pad_id = 0 if eos is None or eos >= rows else eos
            note(f"{folder}: pad token {self.tokenizer.backend.id_to_token(pad)!a} has id {pad}, the model only {rows} "
                 f"embeddings: padding with id {self.tokenizer.pad_id} instead, which is masked anyway")

    def evaluation(self, s):
        """{name: Split} of the task's evaluation splits; prompts that answers are generated for stay whole."""
        length, which = None if self.task.new_tokens else s.max_length, getattr(s, "eval_half", "all")
        return {name: self.encoded(half(read(self.task, s.data, name, s.limit_eval), which), length)
                for name in self.task.eval_splits}

    def encoded(self, rows, max_length):
        """Split of rows, cut to `max_length`. UserError: no token, ids without embedding, only some rows are pairs."""
        self.first = self.first or rows[0]
        odd = [row for row in rows if (row.get("pair") is None) != (self.first.get("pair") is None)]
        if odd and not self.task.encode:
            raise UserError(f"{self.task.name}, row {str(odd[0])[:60]!a}: only some rows are pairs: mend the files")
        split = encode(self.task, rows, self.tokenizer, max_length, self.image)
        full = 0 if self.task.encode else sum(len(ids) == max_length for ids in split.tokens or ())
        if full:
            note(f"{self.task.name}: {full} of {len(rows)} rows have {max_length} tokens or more: cut to --max-length")
        longest = self.tokenizer and self.tokenizer.longest
        if isinstance(longest, int) and max_length and max_length > longest:
            note(f"{self.folder}: --max-length {max_length} is above its model_max_length, {longest}")
        for row, ids in zip(split.rows, split.tokens or ()):
            where = f"{self.task.name}, row {row.get('text', row.get('prompt', ''))[:60]!a}"
            if len(ids) == 0:
                raise UserError(f"{where}: no token: remove the row, or name a bos_token in tokenizer_config.json")
            if ids.max() >= self.config.vocab_size:
                token = self.tokenizer.backend.id_to_token(int(ids.max()))
                raise UserError(f"{where}: token {token!a} has id {ids.max()}, the model only {self.config.vocab_size} "
                                "embeddings: fetch the model's own tokenizer")
        kinds = 1 + max((types.max() for types in split.types or ()), default=0)
        if split.types and kinds > self.config.type_vocab_size:
            raise UserError(f"{self.folder}: a pair's texts have {kinds} types, the model only "
                            f"{self.config.type_vocab_size} type embeddings: use another model, or join the texts")
        return split


def drawn(rows, count, seed):
    """(`count` of the rows, or all if there are fewer, drawn by the seed, the others), both in their order."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]


def half(rows, which):
    """All rows, or one of two halves, the same in every run: "tune" to choose settings on, "report" the rest."""
    if which == "all":
        return rows
    if len(rows) < 2:
        raise UserError(f"--eval-half {which}: there are no two evaluation rows to part")
    tune, report = drawn(rows, len(rows) // 2, seed=0)
    return tune if which == "tune" else report


def encode(task, rows, tokenizer=None, max_length=None, image=None):
    """Return the Split of rows; images need image_settings instead of a tokenizer.

    lm: prompt and answer (see encode_answers), then eos. What is over max_length is cut off, as in LLM-Adapters; rows
    that lose the whole answer are dropped and noted.
    """
    if task.encode:
        return task.encode(task, rows, tokenizer, max_length)
    if task.kind == "image":
        pixels = np.empty((len(rows), image["channels"], *image["size"]), np.uint8)
        for i, row in enumerate(tqdm(rows, "reading images", unit="image", leave=False, delay=1)):
            if isinstance(row["pixels"], Path):     # decoded here: the rows of a large folder stay small
                pixels[i] = fit(read_image(row["pixels"]), image, row["pixels"])
            else:
                pixels[i] = fit(row["pixels"], image, f"{task.name} image {i}")
        labels = torch.tensor([row["label"] for row in rows])
        return Split(task.kind, [], [pixels[0].size] * len(rows), labels, pixels=torch.from_numpy(pixels), image=image)
    if task.kind != "lm":
        pairs = [row["pair"] for row in rows] if rows[0].get("pair") is not None else None
        tokens, types = tokenizer.encode([row["text"] for row in rows], pairs, max_length)
        labels = torch.tensor([row["label"] for row in rows])   # float or long, as the labels are
        return Split(task.kind, rows, [len(ids) for ids in tokens], labels, tokens, types if tokenizer.types else None,
                     pad_id=tokenizer.pad_id)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no eos token: name an eos_token in tokenizer_config.json")
    pairs = [(row["prompt"], row["answer"]) for row in rows]
    split = Split(task.kind, [], [], tokens=[], starts=[], pad_id=tokenizer.pad_id)
    for row, ids, start in zip(rows, *join_answers(task, tokenizer, pairs, [tokenizer.eos_id])):
        ids = ids[:max_length]
        if start < len(ids):
            split.rows.append(row)
            split.tokens.append(ids)
            split.lengths.append(len(ids))
            split.starts.append(start)
    if not split.rows:
        raise UserError(f"{task.name}: no row has its answer within max length {max_length}: raise it")
    if len(split) < len(rows):
        note(f"{task.name}: dropped {len(rows) - len(split)} of {len(rows)} rows, no answer within length {max_length}")
    return split


def join_answers(task, tokenizer, pairs, end=()):
    """Return (ids of each prompt, its answer and `end`, int32 arrays; where the answers begin) of pairs of texts."""
    asked, said, apart = tokenizer.encode_answers(*map(list, zip(*pairs)))
    if apart:
        note(f"{task.name}: {apart} of {len(pairs)} answers were encoded apart from their prompts: they would merge")
    tokens = [np.concatenate((tokenizer.prefix, *ids, end)).astype(np.int32) for ids in zip(asked, said)]
    return tokens, [len(tokenizer.prefix) + len(ids) for ids in asked]


def batches(lengths, batch_size, seed=0, epoch=0, shuffle=True):
    """Return lists of indices, each index once; lengths within a batch are close. Depends on (seed, epoch) only.

    Sorted by length within random groups of 50 batches, then shuffled but for the smaller last one; else longest first.
    """
    lengths, random = np.asarray(lengths), np.random.default_rng((seed, epoch))
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


def collate(split, indices, pad_to=None, device="cpu"):
    """Return (inputs, labels) on the device for model(**inputs); pad_to: widths to round T up to, for compiled code.

    classify, regress, span: tokens, mask, [types] (B, T); labels (B,) long or float, span: (B, 2) long.
    image: pixels (B, C, H, W) float. lm: tokens, mask and positions (N,), the flat indices into B * T whose next token
    is part of an answer; labels (N,) those next tokens.
    """
    def send(tensor):   # from pinned memory, so that the host does not wait for a GPU and collates the next batch
        tensor = tensor.pin_memory() if str(device).startswith("cuda") else tensor
        return tensor.to(device, non_blocking=True)

    if split.kind == "image":
        mean, std = (send(torch.tensor(split.image[key]).view(-1, 1, 1)) for key in ("mean", "std"))
        pixels = send(split.pixels[indices]) * split.image["scale"]
        return {"pixels": (pixels - mean) / std}, send(split.labels[indices])
    tokens, mask = pad([split.tokens[i] for i in indices], split.pad_id, pad_to=pad_to)
    inputs = {"tokens": tokens, "mask": mask}
    if split.kind == "lm":
        answers = torch.cat([torch.arange(max(split.starts[i], 1), split.lengths[i]) + row * tokens.shape[1]
                             for row, i in enumerate(indices)])
        inputs["positions"], labels = answers - 1, tokens.view(-1)[answers]
    else:
        labels = split.labels[indices]
    if split.types is not None:
        inputs["types"] = pad([split.types[i] for i in indices], 0, pad_to=pad_to)[0]
    return {name: send(tensor) for name, tensor in inputs.items()}, send(labels)


def count_labels(split, indices):
    """Return how many labels `collate` gives for these examples."""
    if split.kind != "lm":
        return split.labels[indices].numel()
    return sum(split.lengths[i] - max(split.starts[i], 1) for i in indices)


class Batches:
    """The training rows, epoch after epoch, as the passes of a step; of several processes each takes its share."""

    saved = ("drawn",)  # batches so far

    def __init__(self, s, split, process=0, processes=1):
        self.s, self.split, self.drawn, self.epoch = s, split, 0, None
        self.process, self.processes = process, processes
        self.per_epoch = math.ceil(len(split) / s.batch_size)
        self.steps_per_epoch = math.ceil(self.per_epoch / s.accumulate)
        self.total_steps = s.steps or max(1, math.ceil(s.epochs * self.steps_per_epoch))

    @property
    def widths(self):
        """Widths to pad to, 8, 12, 16, 24, 32 ..., so that compiled code sees few shapes; None: each batch its own."""
        widths = [2 ** k * f // 2 for k in range(3, 16) for f in (2, 3)]
        return [w for w in widths if w <= (self.s.max_length or 0)] if self.s.compile != "off" else None

    def take(self, least_rows=0):
        """The next step's (passes, rows): `accumulate` batches, fewer at an epoch's end, more up to `least_rows`."""
        taken, rows = [], 0
        while not taken or rows < least_rows or (len(taken) < self.s.accumulate and self.drawn % self.per_epoch):
            epoch, i = divmod(self.drawn, self.per_epoch)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = batches(self.split.lengths, self.s.batch_size, self.s.seed, epoch)
            taken.append(self.order[i])
            rows += len(taken[-1])
            self.drawn += 1
        labels = sum(count_labels(self.split, indices) for indices in taken)
        passes = []
        for indices in taken:
            mine = indices[self.process::self.processes]  # if there are none, take part with weight 0
            weight, mine = (1 / labels, mine) if mine else (0.0, indices[:1])
            most = self.s.forward_rows or len(mine)
            passes += [(*collate(self.split, mine[i:i + most], self.widths, self.s.device), weight)
                       for i in range(0, len(mine), most)]
        return passes, rows


# ------------------------------------------------------------------------------------------------------ hyperparameters

ADALORA = {"mnli": (5e-4, 0.0), "qnli": (5e-4, 0.01), "cola": (8e-4, 0.0), "qqp": (8e-4, 0.01), "sst2": (8e-4, 0.01),
           "mrpc": (1e-3, 0.01), "rte": (1.2e-3, 0.01), "stsb": (2.2e-3, 0.1)}  # QingruZhang/AdaLoRA, NLU/scripts


def hyperparameters(task, family, size, method="lora", rank=None, adalora_init_ratio=1.5):
    """Return the papers' settings for flags that are not set, and {name: reason} for those that the method decides.

    Encoders on GLUE: lelora Tables 5 and 6, with what they leave open of weightlora Table 9. Decoders on GLUE: its
    Table 10, lr and warmup from the middle of the grids. Instructions: lelora Table 7 with DoRA's rank 32 and alpha 64;
    weightlora Table 11 for qwen3. Others: the task's `settings`. Ours: the rest. warmup: a share of the steps, or >= 1.
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
    chosen.update(task.settings)
    reasons, given, rank = {}, rank, rank or chosen["rank"]
    if method in ("full", "bitfit"):
        chosen["lr"] = (1e-3 if task.kind == "image" else 2e-5) if method == "full" else 1e-3
        reasons["lr"] = "usual without adapters"
    elif method == "adalora":
        triplets = round(adalora_init_ratio * rank)
        chosen.update(lr=2 * chosen["lr"], alpha=16 * triplets)
        reasons["lr"] = "twice LoRA's"
        if task.name in ADALORA:
            chosen["lr"], chosen["weight_decay"] = ADALORA[task.name]
            reasons["lr"] = reasons["weight_decay"] = "its authors' script"
        reasons["alpha"] = f"16 x the {triplets} triplets that a matrix starts with, as in its authors' scripts"
    elif method == "lalora":
        chosen["lalora_gamma"] = round(1.1 * math.log(max(2, rank)) / math.log(8), 3)
        reasons["lalora_gamma"] = f"for rank {rank}: the budget's ceiling is {rank} times its start"
    elif method in ("weightlora", "weightlora+", "random"):
        chosen["warmup"], reasons["warmup"] = 0.0, "none: it would slow omega, and WeightLoRA's GLUE script has none"
    elif method in ("linear-decay", "attention-heavy", "empirical") and task.kind == "lm" and not given:
        chosen.update(rank=16, alpha=16 * chosen["alpha"] / chosen["rank"])
        reasons.update(rank="its paper's", alpha="LoRA's scale")
    return chosen, reasons
