"""Data sets that single tables of the papers train or evaluate on, named as in --task papers/tasks.py:flowers102."""

import io
import re
from functools import partial

import numpy as np

from data import GITHUB, NEXT, Task, get, locate, read_bytes, read_instructions, read_text
from model import UserError

HUB = "https://huggingface.co/datasets/"


# --------------------------------------------------------------------------------------------- La-LoRA, Table 8: images

def read_cifar(task, data, split):
    """CIFAR-100's binary files: coarse label, fine label (which is read), 3 x 32 x 32 pixels."""
    path = locate(task, data, split)[0]
    if path.name in ("train", "test"):
        raise UserError(f"{path}: CIFAR's python version is pickled, which can run code: fetch the binary version")
    raw = np.frombuffer(read_bytes(path), np.uint8)
    if raw.size == 0 or raw.size % 3074:
        raise UserError(f"{path}: {raw.size} bytes, no multiple of 3074: fetch the binary version again")
    for i, image in enumerate(raw.reshape(-1, 3074)):
        yield f"{path} image {i}", {"pixels": image[2:].reshape(3, 32, 32), "label": str(image[1])}


def read_food101(task, data, split):
    """meta/train.txt lists <class>/<number>, whose photo is images/<class>/<number>.jpg."""
    path = locate(task, data, split)[0]
    for number, line in enumerate(read_text(path).split(), 1):
        photo = path.parents[1] / "images" / f"{line}.jpg"
        yield f"{path} line {number}", {"pixels": photo, "label": line.rpartition("/")[0]}


def read_resisc45(task, data, split):
    """resisc45-train.txt (Neumann et al.'s split) lists <class>_<number>.jpg, in NWPU-RESISC45/<class>."""
    path = locate(task, data, split)[0]
    for number, line in enumerate(read_text(path).split(), 1):
        label = line.rpartition("_")[0]
        yield f"{path} line {number}", {"pixels": path.parent / "NWPU-RESISC45" / label / line, "label": label}


def read_flowers102(task, data, split):
    """Oxford's jpg/image_<number>.jpg, imagelabels.mat and setid.mat; train is trnid, dev the test images, tstid."""
    root = locate(task, data, split)[0].parents[1]
    labels = read_mat(root / "imagelabels.mat", "labels")
    chosen = read_mat(root / "setid.mat", "trnid" if split == "train" else "tstid")
    if chosen.dtype.kind not in "iu" or chosen.min(initial=1) < 1 or chosen.max(initial=1) > len(labels):
        raise UserError(f"{root / 'setid.mat'}: not numbers from 1 to {len(labels)}: fetch the .mat files again")
    for number in chosen.tolist():
        path = root / "jpg" / f"image_{number:05}.jpg"
        yield str(path), {"pixels": path, "label": str(labels[number - 1])}


def read_mat(path, name):
    """Return an array of a MATLAB file, flat."""
    try:
        from scipy.io import loadmat    # the only need for SciPy
    except ImportError:
        raise UserError(f"{path}: reading MATLAB files needs SciPy: pip install scipy") from None
    try:
        arrays = loadmat(io.BytesIO(read_bytes(path)))
    except Exception as error:  # SciPy raises nearly anything for broken files
        raise UserError(f"{path}: no MATLAB file ({' '.join(str(error).split())[:200]}): fetch it again") from None
    return get(arrays, name, path, np.ndarray).ravel()


def photos(name, reader, files, folder, *sources, labels=()):
    """Return the row of a set of images; sources: (address, SHA-256 or None), all for both splits."""
    sources = tuple(("", *source) for source in sources)
    return Task(name, "image", ("accuracy",), reader, labels, dict(zip(("train", "dev"), files)), folder, sources)


FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
RESISC = "https://storage.googleapis.com/remote_sensing_representations/"

cifar100 = photos(
    "cifar100", read_cifar, (("train.bin", "train"), ("test.bin", "test")), "cifar-100-binary",
    ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
     "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"), labels=tuple(map(str, range(100))))
food101 = photos(
    "food101", read_food101, (("meta/train.txt",), ("meta/test.txt",)), "food-101",
    ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
     "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4"))
flowers102 = photos(
    "flowers102", read_flowers102, [("jpg/image_*.jpg",)] * 2, "flowers-102",
    (FLOWERS + "imagelabels.mat", "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d"),
    (FLOWERS + "setid.mat", "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd"),
    (FLOWERS + "102flowers.tgz", "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"),
    labels=tuple(map(str, range(1, 103))))
resisc45 = photos(
    "resisc45", read_resisc45, (("resisc45-train.txt",), ("resisc45-test.txt",)), "resisc45",
    (HUB + "isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e/NWPU-RESISC45.zip", None),
    (RESISC + "resisc45-train.txt", None), (RESISC + "resisc45-test.txt", None))


# ----------------------------------------------------------- LeLoRA, Tables 3 and 10, Figures 2, 4 and 6: training sets

def best(where, row):
    """Return a row of UltraFeedback with its best rated completion as output, "" if it has none; or it is binarized."""
    if "completions" not in row:
        return row
    parts = [get({"completions": part}, "completions", where, dict) for part in get(row, "completions", where, list)]
    top = max(parts, key=lambda part: get(part, "overall_score", where, (int, float)), default={})
    text = str(top.get("response", "")).encode(errors="replace").decode()   # a few have half a surrogate pair
    return {**row, "completions": None, "output": text}


def tune(name, file, *sources, reader=read_instructions):
    """Return the row of an instruction tuning set, whose last rows are held out; sources: (address, SHA-256)."""
    return Task(name, "lm", ("perplexity",), reader, (), {"train": (file,), "dev": (file,)}, name,
                tuple(("", *source) for source in sources))


metamathqa = tune("metamathqa", "MetaMathQA-395K.json", (
    HUB + "meta-math/MetaMathQA/resolve/aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18/MetaMathQA-395K.json",
    "fb39a5d8c05c042ece92eae37dfd5ea414a5979df2bf3ad3b86411bef8205725"))
codefeedback = tune("codefeedback", "CodeFeedback-Filtered-Instruction.jsonl", (
    HUB + "m-a-p/CodeFeedback-Filtered-Instruction/resolve/e24e63942ad4450639e16ba318130ab841946916/"
    "CodeFeedback-Filtered-Instruction.jsonl", "6dd3f7797cd86a7e437de660ad259c50835812f8e309d893f09de77b2ee80063"))
ultrafeedback = tune("ultrafeedback", "*.jsonl", *(     # the revision with the ratings corrected
    (f"{HUB}openbmb/UltraFeedback/resolve/40b436560ca83a8dba36114c22ab3c66e43f6d5e/{name}.jsonl", None)
    for name in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat")),
    reader=partial(read_instructions, change=best))


# ------------------------------------------------------ what is asked of models trained on them: MATH, code, AlpacaEval

def final_answer(text, reference=False):
    """Return the final answer of a solution to a MATH problem, normalised, "" where there is none.

    It follows the last "The answer is: ", up to a full stop that ends a line (MetaMath's eval_math.py); without that
    phrase, and in MATH's own solutions (reference), it is in the last \\boxed{} or else \\fbox{} (hendrycks/math).
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


def first_test(where, row):
    """Return a problem of MBPP's test set, 11 to 510 (google-research/mbpp's README), with its first test as input."""
    if 11 <= get(row, "task_id", where, int) <= 510:
        tests = dict(enumerate(get(row, "test_list", where, list)))
        return {**row, "input": get(tests, 0, where)}


def docstring(text, test):
    """Return MBPP's prompt as in InCoder: a docstring with the first test."""
    return f'"""\n{text}\n{test}\n"""\n'


def complete(name, file, address, sample, reader=read_instructions, **more):
    """Return the row of a set to generate completions for (eval.py --samples), which another program scores."""
    return Task(name, "lm", ("perplexity",), reader, (), {"dev": (file,)}, name, (("dev", address, None),),
                sample=sample, **more)


math = Task(
    "math", "lm", ("exact_match",), read_instructions, (),  # MetaMath's file, PRM800K's names, or MATH.tar's
    {"train": ("train.jsonl", "train/*/*.json"), "dev": ("MATH_test.jsonl", "test.jsonl", "test/*/*.json")}, "MATH",
    (("dev", GITHUB + "meta-math/MetaMath/main/data/test/MATH_test.jsonl", None),), answers=final_answer,
    new_tokens=1024, stop=NEXT)
humaneval = complete(
    "humaneval", "HumanEval.jsonl", GITHUB + "openai/human-eval/master/data/HumanEval.jsonl.gz", ("task_id",),
    template=lambda text, more: text.rstrip(),  # "\n    " is one token
    new_tokens=512, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"))    # Chen et al. 2021, section 3
mbpp = complete(
    "mbpp", "mbpp.jsonl", GITHUB + "google-research/google-research/master/mbpp/mbpp.jsonl", ("task_id",),
    partial(read_instructions, change=first_test), template=docstring, new_tokens=512,
    stop=("\nclass", "\nassert", '\n"""', "\nprint", "\nif"))
alpacaeval = complete(
    "alpacaeval", "alpaca_eval.json", HUB + "tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json",
    ("dataset", "instruction", "generator"), output="output", new_tokens=2048, stop=NEXT)
