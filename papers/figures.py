"""The papers' figures, over methods, tasks and seeds, of which they are means (pictures of a run: eval.py --plot).

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

import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras.adapter_files import read_adapter
from extras.cards import grid
from extras.flags import Parser, run_program, to_json
from extras.pictures import alike, heat, panels, plot_points, pyplot, read_runs, save_figures


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
    config, tensors = read_adapter(folder)
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
    run_program(main)
