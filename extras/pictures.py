"""Pictures of runs and of comparisons: what `eval.py --plot` and `bench.py quality --picture` draw, by matplotlib.

curves.png     loss, metric and budget over steps, of one run or of several
ranks.png      one run's ranks over steps

The core needs none of it: this folder is what wants packages beyond requirements.txt.
"""

import importlib.util
import json
import math
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
from eval import read_log, read_run
from extras.cards import grid
from model import UserError, note, publish

LOGGED = {"step", "eval", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "examples_per_second",
          "trainable_params"}  # by the loop itself; what else is in metrics.jsonl is the policy's
BUDGET = "trainable adapter parameters"


def pyplot():
    """matplotlib's pyplot, drawing into files; raises UserError where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("pictures need matplotlib: pip install -r requirements-dev.txt")
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    return plt


def read_runs(folders, finished=False):
    """The runs among `folders`, each with folder, s (its settings), metrics and ranks (lines of its logs).

    `finished`: each with what the figures show of its result, too. What is no such run is left out and named. Raises
    UserError if none is one.
    """
    runs = []
    for folder in dict.fromkeys(Path(os.path.abspath(name)) for name in folders):
        if folder.is_file():  # a picture, where runs/* was typed
            continue
        try:
            run = SimpleNamespace(folder=folder, s=read_run(folder)[0], metrics=read_log(folder / "metrics.jsonl"),
                                  ranks=read_log(folder / "ranks.jsonl"))
            if finished:
                add_result(run)
            runs.append(run)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            note(f"left out, no {'finished ' * finished}run: {folder.name} ({error})")
    if not runs:
        raise UserError(f"no {'finished ' * finished}run among {len(folders)} paths; name folders that train.py wrote")
    return runs


def add_result(run):
    """Add to a run of `read_runs` what the figures show of its result and its ranks."""
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    metric, last = data.task_row(run.s.task).metrics[0], run.ranks[-1]
    metric = metric if metric in result else "loss"
    kept = last["ranks"]
    if "omega" in last:
        kept = last.get("selected", {})  # empty before the end of the warm-up
    run.final, run.kept = last["ranks"], {name for name in kept if kept[name]}
    run.point = run.s.rank, run.s.alpha, run.s.weightlora_keep
    run.size, run.quality = result["trainable_params"]["mean"], {metric: result[metric]}
    run.costs = {"peak memory (MB)": result.get("peak_memory_mb"), "training time (s)": result["seconds"]}


def save_figures(plt, runs, figures):
    """Write {file name: figure} into the one run's folder, or the innermost that holds all runs; returns the paths."""
    folder = runs[0].folder if len(runs) == 1 else Path(os.path.commonpath([run.folder.parent for run in runs]))
    for name, figure in figures.items():
        with publish(folder / name, folder=False) as part:
            figure.savefig(part, dpi=120, format="png")
        plt.close(figure)
    return [folder / name for name in figures]


def plot(folders):
    """Draw one run's curves.png and ranks.png into its folder, or several runs' curves.png into the one that holds all.

    Returns the paths. Raises UserError without matplotlib or without a run.
    """
    plt, runs = pyplot(), read_runs(folders)
    figures = {"curves.png": plot_curves(plt, runs)}
    if len(runs) == 1 and runs[0].ranks[-1]["ranks"]:
        figures["ranks.png"] = plot_ranks(plt, runs[0].ranks)
    return save_figures(plt, runs, figures)


def plot_curves(plt, runs):
    """Loss, metric, budget and, of one run, the policy's own numbers over steps; a colour for each label of `alike`."""
    curves = {}  # (task, title of a panel) -> [(label, [(step, number)])]

    def add(title, label, run, number):
        points = [(line["step"], number(line)) for line in run.metrics if number(line) is not None]
        curves.setdefault((data.task_row(run.s.task).name, title), []).append((label, points))

    for (task, label), group in alike(runs).items():
        metric = next(iter(data.task_row(task).metrics), "loss")
        if any(metric not in line.get("eval", metric) for run in group for line in run.metrics):
            metric = "loss"  # answers are generated and scored at the end only
        for run in group:
            add("training loss", label, run, lambda line: line.get("loss"))
            add(metric, label, run, lambda line: line.get("eval", {}).get(metric))
            add(BUDGET, label, run, lambda line: line["trainable_params"]["now"])
    own = [(key, value) for line in runs[0].metrics for key, value in line.items() if key not in LOGGED]
    for key in dict.fromkeys(key for key, value in own if len(runs) == 1 and isinstance(value, (int, float))):
        add("the policy's own numbers", key, runs[0], lambda line: line.get(key))
    figure, axes = panels(plt, list(curves), 4.6, 3.8)
    labels, shown = list(dict.fromkeys(label for panel in curves.values() for label, _ in panel)), {}
    for axis, ((_, title), panel) in zip(axes, curves.items()):
        for label, points in panel:
            x, y = np.reshape(points, (-1, 2)).T
            i, few = labels.index(label), len(points) < 15
            style = ("-", "--", ":")[i // 10 % 3]
            (shown[label],) = axis.plot(x, y, f"C{i}", linestyle=style, marker="o" * few, markersize=3)
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        if title == BUDGET:
            axis.set_ylim(bottom=0)  # after the last curve, since it ends autoscaling
    legend(figure, shown)
    return figure


def plot_ranks(plt, ranks):
    """The rank of each kind of matrix over blocks and steps, and the final ranks."""
    kinds, steps = grid(ranks[-1]["ranks"])[1], [line["step"] for line in ranks]
    history = np.stack([grid(line["ranks"])[0] for line in ranks])  # (times, blocks, kinds)
    top = max(1, np.nanmax(history))
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(4.2 * (len(kinds) + 1), 4), layout="constrained")
    for axis, kind, image in zip(axes, kinds, history.T):
        axis.set_title(kind)
        heat(axis, image, "step", top, edges=[0, *steps])
    axes[-1].set_title(f"final ranks (step {steps[-1]})")
    shown = heat(axes[-1], history[-1], "matrix", top, kinds)
    figure.colorbar(shown, ax=axes, label="rank", fraction=0.02)
    return figure


def legend(figure, shown):
    """One legend beside all panels, of {label: curve}."""
    figure.set_figwidth(figure.get_figwidth() + 1 + 0.07 * max(map(len, shown), default=0))
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small", ncols=1 + len(shown) // 20)


def plot_points(plt, groups, x, xlabel, values, log=False):
    """The numbers values(run) over x(run): a panel per task and number, a curve per label, a point per rank and K."""
    curves = {}  # (task, name of the number) -> label -> the run's point -> [(x, value)]
    for (task, label), group in groups.items():
        for run in group:
            for name, value in values(run).items():
                if value is not None:
                    curve = curves.setdefault((task, name), {}).setdefault(label, {})
                    curve.setdefault(run.point, []).append((x(run), value))
    figure, axes = panels(plt, list(curves), 4.4, 3.8)
    labels, shown = list(dict.fromkeys(label for panel in curves.values() for label in panel)), {}
    for axis, ((_, name), panel) in zip(axes, curves.items()):
        for label, points in panel.items():
            rows = sorted((*np.mean(p, 0), np.std(p, 0, ddof=len(p) > 1)[1]) for p in points.values())
            i = labels.index(label)
            shown[label] = axis.errorbar(*np.transpose(rows), color=f"C{i}", marker="osD^v<>PX*p"[i % 11], markersize=5,
                                         capsize=3)
        xs = [a for points in panel.values() for p in points.values() for a, _ in p]
        if log and max(xs) > 10 * min(xs) > 0:
            axis.set_xscale("log")
        axis.set(xlabel=xlabel, ylabel=name)
        axis.grid(alpha=0.3)
    legend(figure, shown)
    return figure


def plot_quality(file, over_steps, runs, metrics):
    """Draw bench.py's finished runs: {task: metric} over steps, or else over trained parameters, a panel per task."""
    axis, xlabel = ("steps", "steps") if over_steps else ("rank", "trained parameters, mean over training")
    groups = {}
    for run in runs:
        if run.line.get(metrics[run.task]) is not None:
            groups.setdefault((run.task, re.sub(rf" @ {axis} \d+", "", run.row)), []).append(run)

    def x(run):
        return run.s.steps if over_steps else run.line["trainable_params"]["mean"]

    def quality(run):
        return {metrics[run.task]: run.line[metrics[run.task]]}

    if groups:
        figure = plot_points(pyplot(), groups, x, xlabel, quality, log=True)
        with publish(Path(file), folder=False) as part:
            figure.savefig(part, dpi=120, format=Path(file).suffix[1:])


def alike(runs, *ignored):
    """{(task, label): runs}; a label is a method and the settings, but `ignored`, in which its runs on a task vary."""
    ignored = {"seed", "out", "resume", "log_every", "eval_every", "save_every", "keep", "eval_before", "max_bad_steps",
               *ignored}
    first, varied, groups = {}, set(), {}
    for run in runs:
        other = first.setdefault((run.s.task, run.s.method), run.s)
        varied |= {(run.s.method, key) for key, value in vars(run.s).items() if value != getattr(other, key, value)}
    for run in runs:
        label = run.s.method.rpartition(":")[2]
        for key, value in vars(run.s).items():
            if (run.s.method, key) in varied and key not in ignored:
                name = re.sub("^(adalora|lalora|weightlora|lelora)_", "", key).replace("_", " ")
                value = ",".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name
                label += f", {name} {value}"
        groups.setdefault((run.s.task, label.replace("$", r"\$")), []).append(run)  # alone, it would start a formula

    def by_size(key):  # 2 before 12
        return [re.sub("[0-9]+", lambda digits: digits[0].zfill(20), part) for part in key]

    return {key: groups[key] for key in sorted(groups, key=by_size)}


def panels(plt, keys, width, height):
    """A figure, and its axes for the (row, title) in `keys`: a row's side by side, at most 8 before the next line."""
    rows = [row for row, _ in keys]
    if len(set(rows)) == len(rows):
        rows = [""] * len(rows)  # one panel each: all in one row
    columns = max(math.ceil(n / math.ceil(n / 8)) for n in map(rows.count, rows))
    tops, lines = {}, 0
    for row in dict.fromkeys(rows):
        tops[row] = lines
        lines += math.ceil(rows.count(row) / columns)
    figure = plt.figure(figsize=(width * columns, height * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    if len({row for row, _ in keys}) == 1:
        figure.suptitle(keys[0][0])
        keys = [key[1:] for key in keys]
    axes = []
    for i, (row, key) in enumerate(zip(rows, keys)):
        line, column = divmod(rows[:i].count(row), columns)
        axes.append(figure.add_subplot(lines, columns, (tops[row] + line) * columns + column + 1))
        axes[-1].set_title("\n".join(textwrap.wrap(": ".join(key), int(10 * width))), fontsize="medium")
    return figure, axes


def heat(axis, image, x, top, names=(), edges=None):
    """A heat map of numbers (blocks, columns) from 0 to `top`, which it returns for a colour bar.

    Columns have `names`, and their numbers are written in unless they are many; or else `edges`, on a scale.
    """
    blocks, columns = image.shape
    edges = np.arange(columns + 1) - 0.5 if edges is None else edges
    shown = axis.pcolormesh(edges, np.arange(blocks + 1) - 0.5, image, vmin=0, vmax=top)
    axis.set(xlabel=x, ylabel="block")
    axis.invert_yaxis()
    axis.yaxis.get_major_locator().set_params(integer=True)
    if names:
        axis.set_xticks(range(columns), names, rotation=45 * (len("".join(map(str, names))) > 16))
    for row, column in np.argwhere(~np.isnan(image)) if names and image.size <= 120 else ():
        number = image[row, column]
        axis.text(column, row, f"{number.round(2):g}", ha="center", va="center", fontsize="small",
                  color="white" if number < 0.6 * top else "black")
    return shown
