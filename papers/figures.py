"""Pictures: of a run (eval.py --plot), and the papers' figures, over methods, tasks and seeds, of which they are means.

    python papers/figures.py runs/quality/*      # drawn into runs/quality/

quality.png    the headline metric over trainable parameters
ranks.png      the final ranks
sparsity.png   La-LoRA's ranks and sparsity (its Fig. 4)
selection.png  how alike the seeds' choices of matrices are (WeightLoRA's Fig. 5)
memory.png     memory and time over adapters kept (WeightLoRA's Figs. 6 to 8)
omega.png      WeightLoRA's omega over the warm-up, for each run
choices.png    LeLoRA's windows and dimensions (its Fig. 3), and the reward

Error bars are standard deviations over seeds. A picture is drawn where there are runs that have its data. The last line
on stdout is one JSON object.
"""

import importlib.util
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import lora
from eval import Parser, command, grid, read_log, read_run, to_json
from model import UserError


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
            data.note(f"left out, no {'finished ' * finished}run: {folder.name} ({error})")
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
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return [folder / name for name in figures]


def alike(runs, *ignored):
    """{(task, label): runs}; a label is a method and the settings, but `ignored`, in which its runs on a task vary."""
    ignored = {"seed", "out", "resume", "log_every", "eval_every", "save_every", "keep", "eval_before", "max_bad_steps",
               *ignored}
    first, varied, groups = {}, set(), {}
    for run in runs:
        other = first.setdefault((run.s.task, run.s.method), run.s)
        varied |= {(run.s.method, key) for key, value in vars(run.s).items() if value != getattr(other, key, value)}
    for run in runs:
        label = run.s.method
        for key, value in vars(run.s).items():
            if (run.s.method, key) in varied and key not in ignored:
                name = re.sub("^(adalora|lalora|weightlora|lelora)_", "", key).replace("_", " ")
                value = ",".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name
                label += f", {name} {value}"
        groups.setdefault((run.s.task, label.replace("$", r"\$")), []).append(run)  # alone, it would start a formula

    def by_size(key):  # 2 before 12
        return [re.sub("[0-9]+", lambda digits: digits[0].zfill(20), part) for part in key]

    return {key: groups[key] for key in sorted(groups, key=by_size)}


def draw(folders):
    """Draw all figures there are data for into the innermost folder that holds all the runs; returns their paths."""
    plt, runs = pyplot(), read_runs(folders, finished=True)

    def of(*methods):
        return [run for run in runs if run.s.method in methods]

    figures = {"quality.png": plot_points(
        plt, alike(runs, "rank", "alpha", "weightlora_keep"), lambda run: run.size,
        "trainable parameters, mean over steps", lambda run: run.quality, log=True)}
    selecting = [run for run in of("weightlora", "weightlora+", "random") if run.kept]
    several_seeds = {key: group for key, group in alike(selecting).items() if len(group) > 1}
    for name, figure, groups in (
            ("ranks.png", plot_final_ranks, alike([run for run in runs if run.final])),
            ("sparsity.png", plot_sparsity, alike([run for run in of("lalora") if (run.folder / "adapter").is_dir()])),
            ("selection.png", plot_selection, several_seeds),
            ("omega.png", plot_omega, alike([run for run in runs if "omega" in run.ranks[-1]])),
            ("choices.png", plot_choices, alike(of("lelora")))):
        if groups:
            figures[name] = figure(plt, groups)
    if selecting:
        figures["memory.png"] = plot_points(
            plt, alike(selecting + of("lora"), "weightlora_keep"), lambda run: sum(map(bool, run.final.values())),
            "adapters kept", lambda run: run.costs)
    return save_figures(plt, runs, figures)


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


def plot(folders):
    """Draw one run's curves.png and ranks.png into its folder, or several runs' curves.png into the one that holds all.

    Returns the paths. Raises UserError without matplotlib or without a run.
    """
    plt, runs = pyplot(), read_runs(folders)
    figures = {"curves.png": plot_curves(plt, runs)}
    if len(folders) == 1 and runs[0].ranks[-1]["ranks"]:
        figures["ranks.png"] = plot_ranks(plt, runs[0].ranks)
    return save_figures(plt, runs, figures)


def plot_curves(plt, runs):
    """Loss, metric, budget and, of one run, the policy's own numbers over steps; a colour for each label of `alike`."""
    curves = {}  # (task, title of a panel) -> [(label, [(step, number)])]

    def add(title, label, run, number):
        points = [(line["step"], number(line)) for line in run.metrics if number(line) is not None]
        curves.setdefault((data.task_row(run.s.task).name, title), []).append((label, points))

    for (task, label), group in alike(runs).items():
        metric = data.task_row(task).metrics[0]
        if any(metric not in line.get("eval", metric) for run in group for line in run.metrics):
            metric = "loss"  # answers are generated and scored at the end only
        for run in group:
            add("training loss", label, run, lambda line: line.get("loss"))
            add(metric, label, run, lambda line: line.get("eval", {}).get(metric))
            add(BUDGET, label, run, lambda line: line["trainable_params"]["now"])
    for key in dict.fromkeys(key for line in runs[0].metrics for key in line if key not in LOGGED and len(runs) == 1):
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
    figure.set_figwidth(figure.get_figwidth() + 1.8)
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


def mean_ranks(runs):
    """Mean final rank of each matrix over runs, which have theirs as `final`: {name: number}."""
    return {name: float(np.mean([run.final[name] for run in runs])) for name in runs[0].final}


def plot_final_ranks(plt, groups):
    grids = [grid(mean_ranks(runs)) for runs in groups.values()]
    top = max(1, *(np.nanmax(image) for image, _ in grids))
    blocks, kinds = np.max([image.shape for image, _ in grids], 0)
    figure, axes = panels(plt, list(groups), max(2, 0.45 * kinds), max(3.2, 0.17 * blocks + 1))
    for axis, (image, kinds) in zip(axes, grids):
        shown = heat(axis, image.round(1), "", top, kinds)
    figure.colorbar(shown, ax=axes, label="mean final rank", fraction=0.02)
    return figure


def sparsity(folder, blocks, epsilon=1e-4):
    """La-LoRA's Eq. 1, log(share of near-zero entries / epsilon), for each block of an adapter folder; array (blocks,).

    P is the increment s B A (Fig. 1) of all matrices of a block together; near zero is |P| < epsilon (as the text says,
    the formula has no bars), the logarithm the natural one. A block without adapters has the increment 0.
    DoRA's lengths, which need W, are left out.
    """
    config, tensors = lora.read_adapter(folder)
    small, size = np.zeros(blocks), np.zeros(blocks)
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            path, B = key[len("base_model.model."):-len(".lora_A.weight")], tensors[key.replace("lora_A", "lora_B")]
            P = config["alpha_pattern"].get(path, config["lora_alpha"]) / len(A) * B @ A
            block = int(re.search(r"\.(\d+)\.", path)[1])
            small[block] += (P.abs() < epsilon).sum().item()
            size[block] += P.numel()
    with np.errstate(divide="ignore"):  # no entry near zero: -inf
        return np.log(np.where(size, small / np.maximum(size, 1), 1) / epsilon)


def plot_sparsity(plt, groups):
    figure, axes = panels(plt, list(groups), 3.8, 3.4)
    for axis, runs in zip(axes, groups.values()):
        ranks = np.nanmean(grid(mean_ranks(runs))[0], 1)  # (blocks,)
        axis.bar(range(len(ranks)), ranks, color="0.75")
        axis.set(xlabel="block", ylabel="final rank (bars)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        line = axis.twinx()
        line.plot(np.mean([sparsity(run.folder / "adapter", len(ranks)) for run in runs], 0), "C3o-", markersize=4)
        line.set_ylabel("sparsity, Eq. 1 (line)", color="C3")
    return figure


def jaccard(sets):
    """Pairwise Jaccard similarity |a & b| / |a | b| of n sets that are not empty; array (n, n)."""
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def plot_selection(plt, groups):
    figure, axes = panels(plt, list(groups), 2.6, 3)
    for axis, runs in zip(axes, groups.values()):
        image, seeds = jaccard([run.kept for run in runs]), [run.s.seed for run in runs]
        shown = heat(axis, image, "seed", 1, seeds)
        axis.set(yticks=range(len(seeds)), yticklabels=seeds, ylabel="seed")
    figure.colorbar(shown, ax=axes, label="Jaccard similarity", fraction=0.02)
    return figure


def plot_omega(plt, groups):
    """WeightLoRA: each run's omega over the warm-up, the matrices that are kept in orange."""
    runs = [(f"{label}, {task}", run) for (task, label), group in groups.items() for run in group]
    figure, axes = panels(plt, [(title, f"seed {run.s.seed}") for title, run in runs], 4, 3.4)
    for axis, (_, run) in zip(axes, runs):
        chosen = [line for line in run.ranks if "selected" in line][:1]
        warmup = [line for line in run.ranks if "selected" not in line] + chosen
        for name in run.ranks[-1]["omega"]:
            kept = name in run.kept
            axis.plot([line["step"] for line in warmup], [line["omega"][name] for line in warmup],
                      color="C1" if kept else "0.6", zorder=2 if kept else 1)
        axis.set(xlabel="step", ylabel="omega")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_choices(plt, groups):
    columns = ("windows by depth", "windows by kind", "dimension by depth", "dimension by kind", "reward")
    figure, axes = panels(plt, [(f"{label}, {task}", title) for task, label in groups for title in columns], 4, 3.2)
    for row, runs in zip(np.reshape(axes, (-1, 5)), groups.values()):
        lines = [line for run in runs for line in run.ranks]
        blocks = len(grid(lines[-1]["ranks"])[0])

        def depth(name):
            return ("front", "middle", "back")[3 * int(name.split(".")[1]) // blocks]

        def kind(name):
            return name.split(".")[2]

        for i, label, group in ((0, "blocks", depth), (1, "matrix", kind)):
            plot_shares(row[i], lines, group, label)
            dimensions = [(group(name), line["step"], rank) for line in lines for name, rank in line["ranks"].items()]
            mean_curves(row[2 + i], dimensions, 10)
            row[2 + i].set(xlabel="step (means of tenths of the run)", ylabel="mean dimension")
            row[2 + i].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        rewards = [("", line["step"], line["reward"])
                   for run in runs for line in run.metrics if line.get("reward") is not None]
        mean_curves(row[4], rewards, 200)
        row[4].set(xlabel="step", ylabel="reward")
    return figure


def plot_shares(axis, ranks, group, label):
    """LeLoRA's Fig. 3 (a, b): how often each window was chosen (with a dimension above 0), by group(matrix name)."""
    counts, bottom = {}, 0
    for line in ranks:
        for name, window in sorted(line["location"].items(), key=lambda item: int(item[0].split(".")[1])):
            counts.setdefault(group(name), np.zeros(3))[window] += bool(line["ranks"][name])
    shares = np.stack([c / max(1, c.sum()) for c in counts.values()])
    for window, share in zip(("first", "middle", "last"), shares.T):
        axis.bar(list(counts), share, bottom=bottom, label=window)
        bottom = bottom + share
    axis.set(xlabel=label, ylabel="share of logged steps", ylim=(0, 1.4), yticks=np.linspace(0, 1, 6))
    axis.legend(title="singular components", loc="upper center", ncols=3, fontsize="small")


def mean_curves(axis, points, parts):
    """A curve for each label of the (label, step, value) in `points`: means over `parts` equal parts of the steps."""
    curves, last = {}, max([1, *(step for _, step, _ in points)])
    for label, step, value in points:
        curves.setdefault(label, {}).setdefault(math.ceil(parts * step / last), []).append((step, value))
    for label, curve in curves.items():
        axis.plot(*np.transpose([np.mean(curve[part], 0) for part in sorted(curve)]), label=label)
    axis.grid(alpha=0.3)


def main(argv=None):
    """Parse the command line, draw, print the paths as one line of JSON."""
    parser = Parser(__doc__.split("\n\n")[0], "RUN ...")
    parser.add_argument("runs", metavar="RUN", nargs="+",
                        help="folders that train.py wrote; what is no run is left out")
    args = parser.parse_args(argv)
    print(to_json({"figures": [str(path) for path in draw(args.runs)]}))


if __name__ == "__main__":
    command(main)
