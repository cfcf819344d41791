"""Static shapes: ranks against the Adaptive LoRA paper's formulas in exact fractions, and exact parameter counts."""

from fractions import Fraction
from math import floor

import pytest
from tiny import Tiny, settings

import allocators
import lora

SHAPES = ["linear-decay", "attention-heavy", "empirical"]


def paper(method, i, L, attention, r_base, r_min, r_max, depth="text"):
    """Section 3.1 of the Adaptive LoRA paper in exact arithmetic, floored, then clamped to [r_min, r_max].

    depth: block i's is i / L in the text, i / (L - 1) in the authors' program.
    """
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


@pytest.mark.parametrize("method, depth", [*((method, "text") for method in SHAPES), ("empirical", "code")])
@pytest.mark.parametrize("r_base,r_min,r_max",
                         [(16, 4, 32), (8, 4, 32), (5, 1, 32), (30, 4, 32), (7, 2, 6), (3, 4, 32)])
def test_ranks_are_the_papers_at_every_depth(method, depth, r_base, r_min, r_max, monkeypatch):
    monkeypatch.setattr(lora.nn.init, "kaiming_uniform_", lambda *_, **__: None)  # the shapes are what is looked at
    deep, model = Tiny(blocks=48, dim=38, hidden=38), Tiny(blocks=0)
    s = settings(method=method, targets=["query", "up"], rank=r_base, r_min=r_min, r_max=r_max,
                 empirical_depth=depth)
    for L in range(1, 49):
        model.blocks = deep.blocks[:L]
        allocator = allocators.METHODS[method](model, s, steps=10)
        ranks = {f"blocks.{i}.{kind}": paper(method, i, L, kind == "query", r_base, r_min, r_max, depth)
                 for i in range(L) for kind in s.targets}
        assert {name: layer.A.shape[0] for name, layer in allocator.layers.items()} == ranks == allocator.ranks()
        expected = sum(ranks.values()) * 2 * 38
        assert sum(p.numel() for p in allocator.parameters()) == allocator.budget() == expected
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected and not allocator.dynamic
        for name in ranks:
            lora.detach(model, name)


@pytest.mark.parametrize("scaling,scale", [("nominal", lambda r: 8 / 12), ("own", lambda r: 8 / r),
                                           ("rslora", lambda r: 8 / 12 ** 0.5)])
def test_scale_is_alpha_over_the_nominal_rank_unless_asked_otherwise(scaling, scale):
    s = settings(method="linear-decay", rank=12, r_min=3, alpha=8.0, scaling=scaling)
    layers = allocators.METHODS["linear-decay"](Tiny(blocks=4), s, 10).layers
    assert len({layer.rank for layer in layers.values()}) == 4
    for layer in layers.values():
        assert layer.scale == pytest.approx(scale(layer.rank))
