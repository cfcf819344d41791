"""The ranks that uniform LoRA is told, for each matrix, and chance's share in them."""

import json
from pathlib import Path

import torch

from model import UserError, distinct


def given_ranks(s, names, cost):
    """{name: rank} for uniform LoRA: --rank, or those of --ranks, --ranks-shuffled among matrices of the same cost.

    --ranks is a run's folder, whose last ranks are taken, or a JSON file of {name: rank}; raises UserError for others.
    """
    if not s.ranks:
        return dict.fromkeys(names, s.rank)
    path = Path(s.ranks)
    of_run = path.is_dir()
    file = path / "ranks.jsonl" if of_run else path
    try:
        if of_run and not (path / "result.json").exists():
            raise ValueError("that run has not finished")
        text = file.read_text(encoding="utf-8")
        ranks = json.loads(text.splitlines()[-1] if of_run else text, object_pairs_hook=distinct)
        ranks = ranks["ranks"] if of_run else ranks
        wrong = [name for name, rank in ranks.items() if name not in names or type(rank) is not int or rank < 0]
        if wrong or not any(ranks.values()):
            raise ValueError(f"{', '.join(wrong)} is no target or has no whole rank from 0, or all ranks are 0")
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"--ranks {file}: no ranks in it for this run ({error!r}): name a run's folder or a file of "
                        '{"blocks.0.query": 4, ...}, and --targets to fit') from None
    size, order = dict(zip(names, cost)), shuffled(len(names), s.seed) if s.ranks_shuffled else range(len(names))
    giver = dict(zip(sorted(names, key=size.get), sorted([names[i] for i in order], key=size.get)))  # of the same cost
    return {name: ranks.get(giver[name], 0) for name in names}


def shuffled(n, seed):
    """The numbers 0 to n - 1 in an order that the seed draws."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
