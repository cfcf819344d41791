"""Tables of what bench.py measured, as Markdown and as CSV, and the test of their differences."""

import csv
import json
import math
from pathlib import Path

import numpy as np

from model import UserError, note, publish

LEVEL = 0.1  # of the sign-flip test: with 5 seeds its least p is 1/16
LOSSES = ("loss", "perplexity")  # metrics of which less is better; all others are shares, shown as percent


def markdown(head, rows):
    """Lines of a Markdown table, the last one empty."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def table(rows):
    """A Markdown table of rows as dicts: three significant digits, nothing where a row has no such number."""
    def text(value):
        if isinstance(value, float) and abs(value) < 100:
            return f"{value:.3g}"
        return "" if value is None else f"{value:,.0f}" if isinstance(value, (int, float)) else value

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return "\n".join(markdown(columns, [[text(row.get(column)) for column in columns] for row in rows]))


def comparison(about):
    """The table that `summarise` describes: losses as they are, other metrics in percent; arrows mark p <= LEVEL."""
    metrics, chosen, cells, tests = about["metrics"], about.get("chosen", {}), [], 0
    for name, row in about["rows"].items():
        cell = {"method": name}
        for column, metric in metrics.items():
            means = [other[column]["mean"] for other in about["rows"].values() if column in other]
            less = (metric or next(iter(metrics.values()))) in LOSSES  # an average is of its columns' kind
            text = score_text(row[column], means, less) if column in row else ""
            cell[f"{column}, {metric}" if metric else column] = text
            tests += column in row and row[column]["p"] is not None
        sizes = [f"{n:,.0f}" for n in row.get("trainable_params", {}).values()]
        against = row["against"]
        cell |= {"trainable: last / mean / peak": " / ".join(sizes if len(set(sizes)) > 1 else sizes[:1]),
                 "s": f"{row['seconds']:,.1f}" if sizes else "", "MB": row.get("peak_memory_mb"),
                 "compared with": against and against + more_parameters(row, about["rows"][against])}
        if chosen:
            cell["chosen"] = "; ".join(f"{task}: {text}" for task, text in chosen.get(name, {}).items())
        cells.append(cell)
    text = table(cells)
    if tests:
        text += (f"\n± standard deviation over seeds. ↑ ↓: differs from the row it is compared with by a paired "
                 f"sign-flip test over seeds, p ≤ {LEVEL}; of {tests} comparisons chance alone would mark "
                 f"up to {LEVEL * tests:.1f}.\n")
    return text


def more_parameters(row, baseline):
    """What to say of a row that trains on average over 5 % more or fewer parameters than its baseline."""
    mine, theirs = (other.get("trainable_params", {}).get("mean", 0) for other in (row, baseline))
    more = mine / theirs - 1 if mine and theirs else 0
    return f" ({more:+.0%} parameters)" if abs(more) > 0.05 else ""


def score_text(score, means, less):
    """One cell: mean ± standard deviation, the best of `means` (the least if `less`) bold, an arrow if p <= LEVEL."""
    scale, digits = (1, 3) if less else (100, 1)
    text = f"{scale * score['mean']:.{digits}f}"
    best = (min if less else max)((mean for mean in means if not math.isnan(mean)), default=None)
    if score["mean"] == best and len(means) > 1:
        text = f"**{text}**"
    if score["std"] is not None:
        text += f" ± {scale * score['std']:.{digits}f}"
    if score["seeds"] < score["asked"]:
        text += f" ({score['seeds']} of {score['asked']} seeds)"
    if score["p"] is not None and score["p"] <= LEVEL:
        text += " ↑" if score["difference"] > 0 else " ↓"
    return text


def read_results(file):
    """The lines of a file of finished runs by bench.Run's keys and by the settings alone: the last of several.

    What is no such line, as half of one that a killed process left, is named and skipped.
    """
    lines, file = {}, Path(file)
    texts = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            told = json.dumps(line["settings"], sort_keys=True)
            numbers = [*line["trainable_params"].values(), line["seconds"], line["peak_memory_mb"]]
            if not all(type(value) in (int, float) for value in numbers):
                raise TypeError("a number is none")
            device = line["settled"]["device"].partition(":")[0]
            lines[told, line["source"], device] = lines[told] = line
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            note(f"{file} line {number}: no finished run, left out ({error!r})")
    return lines


def write_csv(path, runs):
    """Write a line per finished run: its place, its settings as they were filled in, and the numbers of its result."""
    rows = []
    for run in runs:
        plain = {key: value for key, value in run.line.items() if isinstance(value, (int, float, str))}
        sizes = {f"trainable_{key}": value for key, value in run.line["trainable_params"].items()}
        rows.append(run.line["settled"] | plain | sizes | {"row": run.row})
    with publish(Path(path), folder=False) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def sign_flip(differences):
    """Two-sided p of the paired permutation test: the share of all choices of signs whose sum is as far from 0.

    Exact for up to 40 pairs: the sums of either half, 2^20 at most, are matched in order.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) > 40:
        raise UserError(f"{len(d)} pairs of seeds: the sign-flip test is exact, for 40 at most")
    halves = [np.zeros(1), np.zeros(1)]
    for i, value in enumerate(d):
        halves[i % 2] = np.concatenate((halves[i % 2] - value, halves[i % 2] + value))
    first, second = halves[0], np.sort(halves[1])
    far = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # sums that differ by rounding are equal
    inside = np.searchsorted(second, far - first) - np.searchsorted(second, -far - first, side="right")
    return float(1 - np.maximum(inside, 0).sum() / 2.0 ** len(d))
