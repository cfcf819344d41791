"""The tables and figures of the four papers: their commands, their numbers, and ours where there are any.

    python papers/tables.py                              # all that there are
    python papers/tables.py lalora-table5                # the commands, the paper's numbers, and ours
    python papers/tables.py lalora-table5 --small --run  # the same comparison on a small model and few rows

papers/tables.json holds what the papers compare, what they leave open and what this project lacks. All flags besides
are train.py's and hold for every run. The table goes to stdout, whose last line is one JSON object.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
from extras import report  # noqa: E402
from extras.flags import parser_of, run_program, setting  # noqa: E402
import data  # noqa: E402
from model import UserError  # noqa: E402

TABLES = ROOT / "papers" / "tables.json"


@dataclass
class Published:
    """What to do about a table of a paper."""

    run: bool = setting(False, "table", "make the runs that are not made yet")
    small: bool = setting(False, "table", "the same comparison on a small model and few rows, for 2 cores")
    metric: str = setting(None, "table", "the number to compare; default: the table's")
    seeds: int = setting(0, "table", "0 = the paper's number")
    jobs: int = setting(1, "table", "runs at a time; they share out the GPUs or the CPU's cores", low=1)
    keep_old: bool = setting(False, "table", "take results of another version of the program, input or device")
    results: str = setting("runs/tables.jsonl", "table", "file of finished runs, a line each")
    runs: str = setting("runs/tables", "table", "folder of their run folders")


class Run(bench.Run):
    """A run that has numbers for `columns`: its own task, parts of it, or others that eval.py evaluates it on."""

    def __init__(self, row, task, seed, flags, folder, columns=None):
        super().__init__(row, task, seed, flags, folder)
        self.columns = columns or [task]

    def evaluate_on(self, task):
        """The command line that evaluates the finished run on another task than its own."""
        row = data.task_row(task)
        columns = row.sample  # of a completion that another program scores: AlpacaEval reads a list
        samples = ["--samples", str(self.out / (row.name + (".json" if "generator" in columns else ".jsonl")))]
        return ["eval.py", str(self.out), "--task", task, *samples * bool(columns)]

    def perform(self, env):
        line = super().perform(env)
        for task in self.columns:
            if not self.numbers(line)[task]:
                printed = bench.start(self.evaluate_on(task), env).splitlines()[-1]
                line.setdefault("evaluated", {})[task] = json.loads(printed)
        return line

    def numbers(self, line):
        found = {self.task: line}
        for task in self.columns:
            part = {key.removesuffix(f"_{task}"): value for key, value in line.items() if key.endswith(f"_{task}")}
            found.setdefault(task, part or line.get("evaluated", {}).get(task, {}))
        return {task: found[task] for task in self.columns}


def overview(tables):
    """A line for each table: its name, what it shows, and what it lacks here."""
    lines = []
    for name, table in tables.items():
        small = " [--small]" if "small" in table else ""
        lacks = f"; lacks {table['lacks']}" if "lacks" in table else ""
        lines.append(f"{name:19}{table['title']}{small}{lacks}\n")
    return "".join(lines)


def find(tables, name, small):
    """One table of the file; `small` lays its small version over it."""
    if name not in tables:
        raise UserError(f"table {name}: there is no such one; there are {', '.join(tables)}")
    table = tables[name]
    if small and "small" not in table:
        raise UserError(f"table {name} has no small version; leave out --small")
    table = table | ({"task_flags": {}} | table["small"] if small else {})

    def place(task):  # from here, too
        return os.path.relpath(ROOT / task) if ":" in task else task

    table["task_flags"] = {place(task): flags for task, flags in table.get("task_flags", {}).items()}
    for key in ("tasks", "evaluate"):
        table[key] = [place(task) for task in table.get(key, ())]
    return table


def runs_of(table, flags, q):
    """The table's runs, those of a row and task over all seeds together; none where bench.py measures it."""
    runs = []
    for row in table["rows"] if "command" not in table else ():
        own = row.get("small", row.get("flags")) if q.small else row.get("flags")
        if row.get("method") is None or own is False:
            continue
        model = table["model"] if isinstance(table["model"], str) else row["model"]
        for task in table["tasks"]:
            words = ["--model", model, *shlex.split(f"{table['flags']} {table['task_flags'].get(task, '')}"),
                     "--method", row["method"], *shlex.split(own), *flags]
            columns = None if q.small else table["evaluate"]
            for seed in range(q.seeds or table.get("seeds", 5)):
                runs.append(Run(row["row"], task, seed, words, q.runs, columns))
    return runs


def commands(runs):
    """What to type for the runs: a line for each row and task, and one for each other task that it is evaluated on."""
    text, groups = "", {}
    for run in runs:
        groups.setdefault((run.row, run.task), []).append(run)
    for same in groups.values():
        seeds, last = " ".join(str(run.seed) for run in same), same[-1]
        text += f"for seed in {seeds}; do python train.py {shlex.join(last.words[:-1])} $seed; done\n"
        for column in last.columns:
            if last.task not in (column, "commonsense"):  # which has its parts' numbers in its own result
                text += f"python {shlex.join(last.evaluate_on(column))}\n"
    return text


def published(name, q, flags):
    """A paper's table: its commands, its numbers and ours; returns (text, JSON object)."""
    table = find(json.loads(TABLES.read_text(encoding="utf-8"), parse_float=str), name, q.small)  # numbers as printed
    text = f"{table['paper']}: {table['title']}\n"
    text += "".join(f"{table[key]}\n" for key in ("note", "lacks", "command") if key in table)
    runs, about = runs_of(table, flags, q), {}
    text += commands(runs)
    rows = [{"the paper's": row["row"]} | row.get("paper", {}) for row in table["rows"]]
    if rows:
        text += f"\n{report.table(rows)}\n"
    if runs:
        failed = bench.make(runs, q)
        free = table.get("free", ())  # settings of which each row has its own
        about = bench.summarise(runs, q.metric or table.get("metric"), free) | {"failed": failed}
        text += f"\n{report.comparison(about)}"
    return text, about | {"table": name}


def main(argv=None):
    """Parse the command line, make the runs if --run, print the table and one line of JSON."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(Published, __doc__.split("\n\n")[0])
    parser.usage = "%(prog)s [NAME] [flags] [train.py's flags]"
    named = bool(argv) and not argv[0].startswith("-")
    own, flags = parser.parse_known_args(argv[named:])
    q = Published(**vars(own))
    if named:
        bench.answer("table", *published(argv[0], q, flags))
    else:
        tables = json.loads(TABLES.read_text(encoding="utf-8"))
        bench.answer("table", overview(tables), {"tables": list(tables)})


if __name__ == "__main__":
    run_program(main)
