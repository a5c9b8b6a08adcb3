"""Head budgets of several layers in one batch are those of one layer after another, for every allocator."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reasonalloc as ra
from reasonalloc.policies.allocation import (
    HEAD_ALLOCATORS,
    FixedHeads,
    HeadAllocator,
    HeadSplit,
    MissGrid,
    PromptDemand,
)
from reasonalloc.policies.allocation.heads import LayeredHeads
from reasonalloc.policies.allocation.ranks import GatheredHeads

BUDGET, WINDOW = 24, 3
SHAPE = ra.ModelShape(layers=4, kv_heads=3, query_heads=6, head_dim=8)
_RNG = np.random.default_rng(0)
_CURVES = np.sort(_RNG.random((3, 4, 3)), axis=0)[::-1]
PROFILE = ra.DemandProfile(
    SHAPE,
    (0.93,),
    (
        PromptDemand(
            "a",
            1,
            np.ones((1, 4, 6)),
            {"rkv": _CURVES},
            tokens=1,
            sensitivity=_RNG.random((4, 3)),
            losses={"rkv": _CURVES**2},
        ),
    ),
    {"model_type": "llama"},
    grids={"rkv": MissGrid((16, 32, 64), 16)},
)


@dataclass(frozen=True)
class OddLayers(HeadAllocator):
    """What a user's allocator may do: layers treated differently, some of them by allocators with a threshold."""

    def for_layer(self, layer, shape, budget, window, profile):
        return [ra.UniformHeads(), ra.ThresholdHeads(), ra.ThresholdHeads(upper=3.0), FixedHeads((1.0, 2.0, 5.0))][
            layer
        ]

    def allocate(self, scores, lengths, total, window):
        raise AssertionError("this one is of no layer")


class TwoThresholds(OddLayers):
    """Thresholds in every layer."""

    def for_layer(self, layer, shape, budget, window, profile):
        return ra.ThresholdHeads(upper=2.0 + layer)


def gather(x):
    """One rank's own tensor is that of all ranks."""
    return x


ALLOCATORS = {
    **{name: HEAD_ALLOCATORS.create(name) for name in HEAD_ALLOCATORS.names()},
    "miss-curve": ra.MissCurveHeads(scorer="rkv"),
    "loss-curve": ra.LossCurveHeads(scorer="rkv"),
    "odd": OddLayers(),
    "thresholds": TwoThresholds(),
    "gathered": GatheredHeads(ra.ThresholdHeads(), gather, 0),
    "gathered fixed": GatheredHeads(ra.SensitivityHeads(), gather, 0),
}


def problem(seed, layers, rows):
    """Scores, lengths and totals of a batch: ragged, no ties, less than is held."""
    rng = torch.Generator().manual_seed(seed)
    shape = (layers * rows, SHAPE.kv_heads)
    lengths = torch.randint(WINDOW + 2, 60, shape, generator=rng)
    index = torch.arange(60)
    scores = torch.randn(*shape, 60, generator=rng) + 2 * torch.randn(*shape, 1, generator=rng)
    scores = scores.masked_fill(index >= lengths[..., None] - WINDOW, float("inf"))
    scores = scores.masked_fill(index >= lengths[..., None], float("-inf"))
    least, held = SHAPE.kv_heads * WINDOW, lengths.sum(-1)
    return scores, lengths, least + (torch.rand(len(held), generator=rng) * (held - least - 1)).long()


def for_layers(allocator, layers):
    return allocator.for_layers(layers, SHAPE, BUDGET, WINDOW, PROFILE)


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 20), layers=st.lists(st.integers(0, 3), min_size=1, max_size=5), rows=st.integers(1, 3))
def test_a_batch_of_layers_is_split_as_layer_by_layer(name, seed, layers, rows):
    allocator = ALLOCATORS[name]
    scores, lengths, total = problem(seed, len(layers), rows)
    together = for_layers(allocator, layers).allocate(scores, lengths, total, WINDOW)
    assert together.budgets.sum(-1).equal(total)
    thresholds = []
    for i, layer in enumerate(layers):
        at = slice(i * rows, (i + 1) * rows)
        own = allocator.for_layer(layer, SHAPE, BUDGET, WINDOW, PROFILE)
        alone = own.allocate(scores[at], lengths[at], total[at], WINDOW)
        assert alone.budgets.equal(together.budgets[at]), f"layer {layer}"
        thresholds.append(alone.threshold)
    if any(threshold is None for threshold in thresholds):
        assert together.threshold is None
    else:
        assert together.threshold.equal(torch.cat(thresholds))


@pytest.mark.parametrize("name", ["uniform", "threshold", "adakv"])
def test_an_allocator_that_is_one_for_all_layers_is_not_split(name):
    allocator = ALLOCATORS[name]
    assert for_layers(allocator, [0, 1, 2]) is allocator


def test_fixed_budgets_of_all_layers_are_one_allocation():
    assert isinstance(for_layers(ra.SensitivityHeads(), [0, 2]), FixedHeads)
    assert isinstance(for_layers(ALLOCATORS["gathered fixed"], [0, 2]).inner, FixedHeads)
    assert isinstance(for_layers(OddLayers(), [0, 2]), LayeredHeads)


def test_a_batch_that_is_not_of_the_layers_is_refused():
    scores, lengths, total = problem(0, 5, 1)
    for allocator in (FixedHeads(((1.0, 2.0, 3.0), (3.0, 2.0, 1.0))), for_layers(OddLayers(), [0, 2])):
        with pytest.raises(ValueError, match="a batch of 5 entries cannot be of 2 layers"):
            allocator.allocate(scores, lengths, total, WINDOW)


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"gathered", "gathered fixed"}))
def test_an_empty_batch_has_no_budgets(name):
    scores, lengths, total = (x[:0] for x in problem(0, 2, 1))
    split = for_layers(ALLOCATORS[name], [1, 2]).allocate(scores, lengths, total, WINDOW)
    assert isinstance(split, HeadSplit)
    assert split.budgets.shape == (0, SHAPE.kv_heads)
