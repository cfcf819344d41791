"""Static shapes: ranks against the Adaptive LoRA paper's formulas in exact fractions, and exact parameter counts."""

from fractions import Fraction
from math import floor, sqrt

import pytest
from tiny import Tiny, settings

import allocators
import lora


def paper(method, i, L, attention, r_base, r_min, r_max, depth="text"):
    """The paper's section 3.1, exact, floored, then clamped; depth of block i: i / L, in its code i / (L - 1)."""
    L -= depth == "code" and method == "empirical"
    if method == "linear-decay":
        rank = max(Fraction(r_min), r_base - Fraction(r_base - r_min) * i / max(L - 1, 1))
    elif method == "attention-heavy":
        rank = Fraction(r_base) if attention else max(Fraction(r_min), Fraction(r_base, 2))
    elif i < Fraction(3, 10) * L:
        rank = r_base * Fraction(6, 10)
    elif Fraction(3, 10) * L <= i < Fraction(7, 10) * L:
        rank = r_base * Fraction(12, 10)
    else:
        rank = Fraction(r_base)
    return min(max(floor(rank), r_min), r_max)


@pytest.mark.parametrize("method, depth, scaling", [
    ("linear-decay", "text", "nominal"), ("attention-heavy", "text", "own"), ("empirical", "text", "rslora"),
    ("empirical", "code", "nominal")])
@pytest.mark.parametrize("r_base,r_min,r_max", [(16, 4, 32), (5, 1, 32), (7, 2, 6), (3, 4, 32)])
def test_ranks_and_scales_are_the_papers_at_every_depth(method, depth, scaling, r_base, r_min, r_max, monkeypatch):
    monkeypatch.setattr(lora.nn.init, "kaiming_uniform_", lambda *_, **__: None)  # the shapes are what is looked at
    deep, model = Tiny(blocks=48, dim=38, hidden=38), Tiny(blocks=0)
    s = settings(method=method, targets=["query", "up"], rank=r_base, r_min=r_min, r_max=r_max,
                 empirical_depth=depth, alpha=8.0, scaling=scaling)
    for L in range(1, 49):
        model.blocks = deep.blocks[:L]
        allocator = allocators.METHODS[method](model, s, steps=10)
        ranks = {f"blocks.{i}.{kind}": paper(method, i, L, kind == "query", r_base, r_min, r_max, depth)
                 for i in range(L) for kind in s.targets}
        assert {name: layer.A.shape[0] for name, layer in allocator.layers.items()} == ranks == allocator.ranks()
        expected = sum(ranks.values()) * 2 * 38
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == allocator.budget() == expected
        assert sum(p.numel() for p in allocator.parameters()) == expected and not allocator.dynamic
        for name, rank in ranks.items():
            over = {"nominal": r_base, "own": rank, "rslora": sqrt(r_base)}[scaling]
            assert allocator.layers[name].scale == pytest.approx(8 / over)
            lora.detach(model, name)
