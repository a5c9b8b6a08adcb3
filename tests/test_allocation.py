"""Budgets: the operator R(.), attention demand, and the layer and head allocators built on them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reasonalloc as ra
from reasonalloc import (
    AdaKVHeads,
    DemandProfile,
    DynamicLayers,
    HeadAllocator,
    ModelShape,
    PyramidLayers,
    ThresholdHeads,
    UniformHeads,
    UniformLayers,
    WaveLayers,
    robustify,
)
from reasonalloc.policies.allocation import HEAD_ALLOCATORS, LAYER_ALLOCATORS, attention_demand
from reasonalloc.policies.allocation.heads import pooled_counts

LAYERS = ("uniform", "pyramid", "wave", "dynamic")
HEADS = ("uniform", "threshold", "adakv")


def quick(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- an independent reference in exact arithmetic --------------------------------------------------------


def rounded_bounds(low: list[Fraction], high: list[Fraction], total: int) -> tuple[list[int], list[int]]:
    """Inwards where that leaves a solution, otherwise outwards."""
    lows, highs = [math.ceil(x) for x in low], [math.floor(x) for x in high]
    lows = lows if sum(lows) <= total else [math.floor(x) for x in low]
    highs = highs if sum(highs) >= total else [math.ceil(x) for x in high]
    return lows, [max(pair) for pair in zip(lows, highs, strict=True)]


def clip_and_redistribute(weights: list[Fraction], total: int, low: list[int], high: list[int]) -> list[Fraction]:
    """Fix the items over their bound at the bound, share the rest anew, until nobody is over a bound."""
    if not any(weights):
        weights = [Fraction(1)] * len(weights)
    items = range(len(weights))
    full = sum(high[i] if weights[i] else low[i] for i in items) <= total
    if full:  # only once all others are full do items without demand get more than their floor
        fixed = {i: Fraction(high[i]) for i in items if weights[i]}
        weights = [Fraction(1)] * len(weights)
    else:
        fixed = {i: Fraction(low[i]) for i in items if not weights[i]}
    while free := [i for i in items if i not in fixed]:
        level = (total - sum(fixed.values())) / sum(weights[i] for i in free)
        wish = {i: level * weights[i] for i in free}
        under = {i: low[i] - wish[i] for i in free if wish[i] < low[i]}
        over = {i: wish[i] - high[i] for i in free if wish[i] > high[i]}
        if not under and not over:
            fixed |= wish
            break
        given, taken = sum(under.values()), sum(over.values())
        fixed |= {i: Fraction(low[i]) for i in under if given >= taken}
        fixed |= {i: Fraction(high[i]) for i in over if taken >= given}
    return [fixed[i] for i in items]


def exact_split(weights: list[Any], total: int, low: list[Any], high: list[Any]) -> list[int]:
    """The split in proportion to ``weights``; of equal remainders the lower index."""
    exact = [[Fraction(x) for x in values] for values in (weights, low, high)]
    lows, highs = rounded_bounds(exact[1], exact[2], total)
    shares = clip_and_redistribute(exact[0], total, lows, highs)
    whole = [math.floor(share) for share in shares]
    order = sorted(range(len(whole)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    assert sum(whole) == total
    return whole


def exact_robustify(demand: list[int], total: int, lower: float, upper: float) -> list[int]:
    mean = Fraction(total, len(demand))
    low, high = Fraction(lower) * mean, Fraction(upper) * mean
    return exact_split(demand, total, [low] * len(demand), [high] * len(demand))


def test_the_reference_solves_a_case_done_by_hand() -> None:
    # Mean 10, bounds 3 and 20; in proportion 34, 3.4, 1.7, 0.85. The first is held at 20, the others share
    # 20 as 4:2:1, where 2.86 puts the last at its floor 3; 17 as 2:1 are 11.33 and 5.67.
    assert exact_robustify([40, 4, 2, 1], 40, 0.25, 2.0) == [20, 11, 6, 3]


@pytest.mark.parametrize("seed", range(10))
def test_robustify_equals_exact_arithmetic(seed: int) -> None:
    rng = generator(seed)
    for _ in range(40):
        items, total = number(1, 12, rng), number(0, 300, rng)
        lower = (0.0, 0.25, 0.5, 1.0)[number(0, 3, rng)]
        upper = (1.0, 1.5, 2.0, 20.0)[number(0, 3, rng)]
        demand = torch.randint(0, (4, 50, 1000)[number(0, 2, rng)], (items,), generator=rng)
        budgets = robustify(demand, total, exponent=1.0, lower=lower, upper=upper)
        expected = exact_robustify(demand.tolist(), total, lower, upper)
        assert budgets.tolist() == expected, (demand.tolist(), total, lower, upper)


# ---- R(.): properties ------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, dict[str, float]]:
    demand = draw(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=20))
    total = draw(st.integers(0, 4000))
    exponent = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    lower, upper = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), draw(st.sampled_from([1.0, 1.5, 2.0, 50.0]))
    return demand, total, {"exponent": exponent, "lower": lower, "upper": upper}


def even_split(total: int, items: int) -> list[int]:
    return [total // items + (i < total % items) for i in range(items)]


def integer_bounds(total: int, items: int, lower: float, upper: float) -> tuple[int, int]:
    mean = Fraction(total, items)
    low, high = rounded_bounds([Fraction(lower) * mean] * items, [Fraction(upper) * mean] * items, total)
    return low[0], high[0]


@quick(1000)
@given(problems())
def test_total_and_bounds_hold(problem: tuple[list[int], int, dict[str, float]]) -> None:
    demand, total, settings_ = problem
    budgets = robustify(floats(demand), total, **settings_).tolist()
    low, high = integer_bounds(total, len(demand), settings_["lower"], settings_["upper"])
    assert sum(budgets) == total
    assert low <= min(budgets)
    assert max(budgets) <= high


@quick(1000)
@given(problems())
def test_monotone_and_equal_demands_differ_by_one_at_most(
    problem: tuple[list[int], int, dict[str, float]],
) -> None:
    demand, total, settings_ = problem
    budgets = robustify(floats(demand), total, **settings_).tolist()
    for i, (d, b) in enumerate(zip(demand, budgets, strict=True)):
        for e, c in zip(demand[i + 1 :], budgets[i + 1 :], strict=True):
            if settings_["exponent"] == 0 or d == e:
                assert 0 <= b - c <= 1
            else:
                assert (b >= c) if d > e else (b <= c)


@quick(500)
@given(problems(), st.integers(-900, 900))
def test_scale_by_a_power_of_two_changes_nothing(problem: tuple[list[int], int, dict[str, float]], power: int) -> None:
    demand, total, settings_ = problem
    scaled = robustify(floats(demand) * 2.0**power, total, **settings_)
    assert scaled.tolist() == robustify(floats(demand), total, **settings_).tolist()


@quick(500)
@given(problems(), st.integers(0, 2**31))
def test_permuted_demands_get_permuted_budgets(problem: tuple[list[int], int, dict[str, float]], seed: int) -> None:
    whole, total, settings_ = problem
    settings_ = settings_ | {"exponent": settings_["exponent"] or 0.5}  # exponent 0 makes all demands equal
    rng = generator(seed)
    # Random fractions: ties, also between the remainders of different shares, go by index and are not equivariant.
    demand = floats(whole) + torch.rand(len(whole), dtype=torch.float64, generator=rng)
    order = torch.randperm(len(whole), generator=rng)
    assert robustify(demand[order], total, **settings_).equal(robustify(demand, total, **settings_)[order])


def test_equal_remainders_go_to_the_lower_index() -> None:
    """algorithm.md, section 2, step 5: shares 0.5 and 1.5."""
    bounds = {"exponent": 1.0, "lower": 0.0, "upper": 2.0}
    assert robustify(floats([1, 3]), 2, **bounds).tolist() == [1, 1]
    assert robustify(floats([3, 1]), 2, **bounds).tolist() == [2, 0]


@quick(300)
@given(st.integers(1, 40), st.integers(0, 4000), st.floats(1e-3, 1e6), st.sampled_from([0.0, 0.5, 1.0]))
def test_uniform_demand_is_split_evenly_and_again_the_same(
    items: int, total: int, demand: float, exponent: float
) -> None:
    once = robustify(floats([demand] * items), total, exponent=exponent)
    assert once.tolist() == even_split(total, items)
    assert robustify(once, total, exponent=exponent).tolist() == once.tolist()


def sweep_rows(seed: int, zeros: float) -> tuple[Tensor, int]:
    """500 heavy-tailed rows, over some six orders of magnitude."""
    rng = generator(seed)
    items, total = number(2, 40, rng), number(0, 50_000, rng)
    demand = (2.5 * torch.randn(500, items, dtype=torch.float64, generator=rng)).exp()
    return demand * (torch.rand(demand.shape, generator=rng) >= zeros), total


@pytest.mark.parametrize("seed", range(20))
def test_sweep_conserves_within_bounds_in_order(seed: int) -> None:
    demand, total = sweep_rows(seed, zeros=0.1)
    budgets = robustify(demand, total)
    low, high = integer_bounds(total, demand.shape[1], 0.25, 2.0)
    assert budgets.dtype == torch.int64
    assert (budgets.sum(-1) == total).all()
    assert low <= int(budgets.min()) <= int(budgets.max()) <= high
    ranked = budgets.gather(-1, demand.argsort(dim=-1, descending=True, stable=True))
    assert (ranked.diff(dim=-1) <= 0).all()  # stable: also of equal demands the lower index is not worse off


@pytest.mark.parametrize("seed", range(20, 40))
def test_sweep_ignores_scale_and_order(seed: int) -> None:
    demand, total = sweep_rows(seed, zeros=0.0)
    rng = generator(1000 + seed)
    budgets = robustify(demand, total)
    scale = 10 ** (12 * torch.rand(500, 1, dtype=torch.float64, generator=rng) - 6)
    order = torch.rand(demand.shape, generator=rng).argsort(-1)
    assert robustify(demand * scale, total).equal(budgets)
    assert robustify(demand.gather(-1, order), total).equal(budgets.gather(-1, order))


def test_rows_of_a_batch_are_independent() -> None:
    demand, total = sweep_rows(7, zeros=0.2)
    rows = torch.stack([robustify(row, total) for row in demand])
    assert robustify(demand, total).equal(rows)
    assert robustify(demand.reshape(5, 100, -1), total).equal(rows.reshape(5, 100, -1))


def test_smoothing_is_a_power() -> None:
    assert robustify(floats([1, 4, 9, 16]), 100, lower=0, upper=4).tolist() == [10, 20, 30, 40]
    assert robustify(floats([1, 4, 9, 16]), 300, exponent=1.0, lower=0, upper=4).tolist() == [10, 40, 90, 160]
    assert robustify(floats([1, 4, 9, 16]), 100, exponent=0.0).tolist() == [25] * 4


def test_defaults_are_the_papers() -> None:
    demand, total = sweep_rows(3, zeros=0.0)
    assert robustify(demand, total).equal(robustify(demand, total, exponent=0.5, lower=0.25, upper=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_any_dtype_of_demand(dtype: torch.dtype) -> None:
    demand = torch.tensor([0, 1, 4, 9], dtype=dtype)
    budgets = robustify(demand, 60, lower=0, upper=4)
    assert budgets.dtype == torch.int64
    assert budgets.tolist() == [0, 10, 20, 30]
    assert demand.tolist() == [0, 1, 4, 9]


def test_items_without_demand() -> None:
    assert robustify(floats([0, 0, 0]), 10).tolist() == [4, 3, 3]
    assert robustify(floats([0, 5, 0, 5]), 40).tolist() == [3, 17, 3, 17]
    assert robustify(floats([0, 5, 0, 5]), 40, lower=0).tolist() == [0, 20, 0, 20]
    assert robustify(floats([0, 5, 0, 5]), 40, lower=0, upper=1.5).tolist() == [5, 15, 5, 15]


def test_one_huge_demand_stops_at_the_upper_bound() -> None:
    assert robustify(floats([3, 3, 1e300, 3]), 40).tolist() == [7, 7, 20, 6]
    assert robustify(floats([0, 1e300]), 40).tolist() == [5, 35]


@pytest.mark.parametrize(
    ("demand", "total"),
    [([1, 2, 1e300], 8), ([1, 2, 1e30], 8), ([0, 1e-30, 1], 14), ([0, 1e-300, 1e300], 14)],
)
def test_monotone_beside_a_demand_of_another_magnitude(demand: list[float], total: int) -> None:
    """algorithm.md, section 2: monotone for every input."""
    budgets = robustify(floats(demand), total).tolist()
    assert sum(budgets) == total
    assert budgets == sorted(budgets)


@pytest.mark.parametrize("seed", range(20))
def test_monotone_between_demands_a_hair_apart(seed: int) -> None:
    """Differences down to the last bit, far below what a share in tokens resolves."""
    rng = generator(seed)
    items, total = number(2, 9, rng), number(1, 60, rng)
    hair = torch.randint(0, 4, (500, items), generator=rng) * 10.0 ** -number(9, 15, rng)
    demand = torch.randint(1, 4, (500, items), generator=rng) * (1 + hair.double())
    for exponent in (0.5, 1.0):
        budgets = robustify(demand, total, exponent=exponent)
        assert (budgets.sum(-1) == total).all()
        ranked = budgets.gather(-1, demand.argsort(dim=-1, descending=True, stable=True))
        assert (ranked.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("demand", [0.0, 1e-300, 7.0, 1e300])
def test_one_item_gets_everything(demand: float) -> None:
    assert robustify(floats([demand]), 123).tolist() == [123]


@pytest.mark.parametrize("items", [1, 2, 9])
def test_nothing_to_give(items: int) -> None:
    assert robustify(torch.arange(items), 0).tolist() == [0] * items


def test_less_than_one_token_each() -> None:
    assert robustify(floats([1, 1, 1, 1, 1]), 3).tolist() == [1, 1, 1, 0, 0]
    assert robustify(floats([1, 2, 3, 4, 5]), 3).tolist() == [0, 0, 1, 1, 1]
    assert robustify(floats([0, 0, 0, 0, 9]), 1).tolist() == [0, 0, 0, 0, 1]


def test_large_totals_stay_exact() -> None:
    demand, _ = sweep_rows(5, zeros=0.1)
    for total in (10**6 + 1, 10**9 + 7, 10**12 + 39):
        assert (robustify(demand, total).sum(-1) == total).all()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_bad_demand_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        robustify(floats([[1.0, 2.0], [3.0, bad]]), 10)


def test_negative_total_is_an_error() -> None:
    with pytest.raises(ValueError, match="total"):
        robustify(floats([1.0, 2.0]), -1)


@pytest.mark.parametrize(("lower", "upper"), [(1.1, 2), (-0.1, 2), (0.25, 0.9), (float("nan"), 2), (0, float("nan"))])
def test_bounds_that_no_split_meets_are_an_error(lower: float, upper: float) -> None:
    with pytest.raises(ValueError, match="bounds"):
        robustify(floats([1.0, 2.0]), 10, lower=lower, upper=upper)


def conserves_or_refuses(split: Any, total: int) -> bool:
    try:
        budgets = split()
    except ValueError:
        return True
    return int(budgets.sum()) == total and bool((budgets >= 0).all())


@pytest.mark.parametrize("exponent", [-0.5, float("nan"), float("inf")])
def test_an_odd_exponent_is_refused_or_harmless(exponent: float) -> None:
    assert conserves_or_refuses(lambda: robustify(floats([0.0, 1.0, 2.0]), 10, exponent=exponent), 10)


@pytest.mark.parametrize("total", [0, 10])
@pytest.mark.parametrize("demand", [[1.0, 2.0], [0.0, 1.0, 2.0]])
def test_no_upper_bound_is_refused_or_conserves(demand: list[float], total: int) -> None:
    assert conserves_or_refuses(lambda: robustify(floats(demand), total, upper=float("inf")), total)


# ---- attention demand ------------------------------------------------------------------------------------


def brute_demand(row: list[float], rho: float) -> int:
    mass = Fraction(0)
    for k, weight in enumerate(sorted(row, reverse=True), start=1):
        mass += Fraction(weight)
        if mass >= Fraction(rho):
            return k
    return len(row)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 0.93, 0.99])
def test_attention_demand_equals_brute_force(rho: float) -> None:
    rng = generator(1)
    logits = torch.randn(4, 25, 30, generator=rng, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10])[:, None, None]
    rows = logits.masked_fill(torch.rand(logits.shape, generator=rng) < 0.3, float("-inf")).softmax(-1)
    demand = attention_demand(rows, rho)
    assert demand.shape == rows.shape[:-1]
    assert demand.flatten().tolist() == [brute_demand(row, rho) for row in rows.flatten(0, 1).tolist()]


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_demand_at_exact_sums(rho: float, dtype: torch.dtype) -> None:
    """Sixty-fourths sum without rounding: "at least rho" is tested at equality, and rho = 1 as well."""
    balls = torch.randint(0, 40, (50, 64), generator=generator(2))
    rows = torch.zeros(50, 40, dtype=dtype).scatter_add_(1, balls, torch.full((50, 64), 1 / 64, dtype=dtype))
    assert (rows == 0).any()
    demand = attention_demand(rows, rho)
    assert demand.dtype == dtype
    assert demand.tolist() == [brute_demand(row, rho) for row in rows.tolist()]


def test_attention_demand_of_simple_rows() -> None:
    assert attention_demand(torch.full((64,), 1 / 64), 0.75).item() == 48
    assert attention_demand(torch.eye(5), 0.93).tolist() == [1] * 5
    assert attention_demand(torch.eye(5), 1.0).tolist() == [1] * 5
    assert attention_demand(torch.tensor([0.1, 0.6, 0.3]), 0.85).item() == 2


@pytest.mark.parametrize("rho", [0.5, 0.93, 0.999, 1.0])
def test_absent_tokens_are_never_in_demand(rho: float) -> None:
    """A row's demand depends on its own tokens: not on how far the batch is padded."""
    logits = torch.randn(200, 64, generator=generator(3))
    present = torch.arange(64) < torch.arange(1, 201)[:, None].clamp(max=40)
    rows = logits.masked_fill(~present, float("-inf")).softmax(-1)
    demand = attention_demand(rows, rho)
    assert (demand <= present.sum(-1)).all()
    assert demand.equal(attention_demand(rows[:, :40], rho))


# ---- layer allocators ------------------------------------------------------------------------------------


def shape_of(layers: int, heads: int) -> ModelShape:
    return ModelShape(layers, heads, 2 * heads, 8)


def profile_of(demand: list[float], heads: int) -> DemandProfile:
    return DemandProfile.of_layers(demand, shape_of(len(demand), heads), "llama")


@st.composite
def models(draw: st.DrawFn) -> tuple[DemandProfile, int, int]:
    """A profile, and with it a shape; a budget and a window."""
    demand = draw(st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=1, max_size=40))
    window = draw(st.integers(0, 32))
    budget = draw(st.integers(window + 1, window + 600))
    return profile_of(demand, draw(st.integers(1, 16))), budget, window


@pytest.mark.parametrize("name", LAYERS)
@quick(150)
@given(model=models())
def test_layer_totals_are_exact_and_afford_the_window(name: str, model: tuple[DemandProfile, int, int]) -> None:
    profile, budget, window = model
    shape = profile.shape
    totals = LAYER_ALLOCATORS.create(name).allocate(shape, budget, window, profile)
    assert totals.dtype == torch.int64
    assert totals.shape == (shape.layers,)
    assert int(totals.sum()) == shape.layers * shape.kv_heads * budget
    assert int(totals.min()) >= shape.kv_heads * window


@pytest.mark.parametrize("allocator", [UniformLayers(), DynamicLayers()])
def test_uniform_and_the_first_dynamic_round_are_even(allocator: Any) -> None:
    assert allocator.allocate(shape_of(5, 3), 20, 4, None).tolist() == [60] * 5


def pyramid_schedule(layers: int, budget: int, window: int, beta: int) -> list[int]:
    rest = budget - window
    smallest = rest // beta
    largest = 2 * rest - smallest
    step = (largest - smallest) // (layers - 1) if layers > 1 else 0
    return [largest - layer * step + window for layer in range(layers)]


@quick(200)
@given(
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(0, 32),
    st.integers(1, 600),
    st.sampled_from([1, 7, 20]),
)
def test_pyramid_is_the_schedule_renormalised(layers: int, heads: int, window: int, rest: int, beta: int) -> None:
    budget, allocator = window + rest, PyramidLayers(beta)
    schedule = pyramid_schedule(layers, budget, window, beta)
    assert allocator.schedule(layers, budget, window) == schedule
    total = layers * heads * budget
    totals = allocator.allocate(shape_of(layers, heads), budget, window, None).tolist()
    assert totals == sorted(totals, reverse=True)
    assert totals == exact_split(schedule, total, [heads * window] * layers, [total] * layers)


def test_pyramid_by_hand() -> None:
    assert PyramidLayers().schedule(5, 108, 8) == [203, 156, 109, 62, 15]  # B' = 100: 195 down to 5, step 47
    assert PyramidLayers().allocate(shape_of(1, 4), 108, 8, None).tolist() == [432]
    assert sum(PyramidLayers().schedule(28, 128, 8)) > 28 * 128  # the floor division overspends


def test_the_pyramids_defaults() -> None:
    assert PyramidLayers().beta == 20
    with pytest.raises(ValueError, match="beta"):
        PyramidLayers(0)


@quick(300)
@given(models())
def test_wave_stays_within_its_bounds(model: tuple[DemandProfile, int, int]) -> None:
    profile, budget, window = model
    mean = profile.shape.kv_heads * budget
    totals = WaveLayers().allocate(profile.shape, budget, window, profile)
    assert int(totals.max()) <= 2 * mean
    assert int(totals.min()) >= max(mean / 4, profile.shape.kv_heads * window)


@quick(200)
@given(models())
def test_wave_is_the_operator_on_the_profile(model: tuple[DemandProfile, int, int]) -> None:
    profile, budget, _ = model
    shape = profile.shape
    expected = robustify(torch.from_numpy(profile.layer_demand()), shape.layers * shape.kv_heads * budget)
    assert WaveLayers().allocate(shape, budget, 0, profile).equal(expected)


@quick(100)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 50),
)
def test_wave_equals_exact_arithmetic(demand: list[int], heads: int, window: int, rest: int) -> None:
    profile, budget = profile_of([float(d) for d in demand], heads), window + rest
    mean, layers = heads * budget, len(demand)
    low = max(Fraction(mean, 4), Fraction(heads * window))
    totals = WaveLayers(exponent=1.0).allocate(profile.shape, budget, window, profile)
    assert totals.tolist() == exact_split(demand, layers * mean, [low] * layers, [2 * mean] * layers)


def test_wave_without_a_profile_says_what_to_do() -> None:
    assert WaveLayers.needs_profile
    with pytest.raises(ValueError, match=r"profile.*dynamic"):
        WaveLayers().allocate(shape_of(4, 2), 20, 4, None)


@quick(150)
@given(models(), st.integers(1, 5), st.integers(0, 2**31))
def test_dynamic_split_conserves_every_sequence(model: tuple[DemandProfile, int, int], batch: int, seed: int) -> None:
    profile, budget, window = model
    shape, mean = profile.shape, profile.shape.kv_heads * budget
    demand = 300 * torch.rand(batch, shape.layers, generator=generator(seed), dtype=torch.float64)
    demand[-1] = torch.from_numpy(profile.layer_demand())
    totals = DynamicLayers().split(demand, shape, budget, window)
    assert totals.sum(-1).tolist() == [shape.layers * mean] * batch
    assert int(totals.min()) >= max(mean / 4, shape.kv_heads * window)
    assert int(totals.max()) <= 2 * mean
    assert totals[-1].equal(WaveLayers().allocate(shape, budget, window, profile))
    assert totals[:1].equal(DynamicLayers().split(demand[:1], shape, budget, window))


@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        (policy, bad)
        for policy in (WaveLayers, DynamicLayers, ThresholdHeads)
        for bad in ({"exponent": -0.5}, {"lower": 1.5}, {"lower": -0.1}, {"upper": 0.5})
    ]
    + [(DynamicLayers, bad) for bad in ({"rho": 0.0}, {"rho": 1.1}, {"decay": 1.0}, {"decay": -0.1}, {"queries": 0})]
    + [(AdaKVHeads, bad) for bad in ({"safeguard": -0.1}, {"safeguard": 1.1})],
)
def test_settings_out_of_range_are_errors(policy: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        policy(**bad)


def test_wave_without_an_upper_bound_is_refused_or_conserves() -> None:
    profile = profile_of([1.0, 2.0], 2)
    assert conserves_or_refuses(
        lambda: WaveLayers(upper=float("inf")).allocate(profile.shape, 10, 2, profile), total=40
    )


# ---- the demand profile ----------------------------------------------------------------------------------


PROFILE = DemandProfile.of_layers((1.5, 0.0, 300.25), ModelShape(3, 2, 8, 64), "qwen2", 0.9)


def with_prompt(**changes: Any) -> dict[str, Any]:
    return {"prompts": [PROFILE.to_dict()["prompts"][0] | changes]}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_profile_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "wave.json", PROFILE.to_dict())
    assert DemandProfile.load(path).to_dict() == PROFILE.to_dict()
    assert DemandProfile.load(str(path)).to_dict() == PROFILE.to_dict()
    (tmp_path / "own.json").write_bytes(PROFILE.to_json())
    assert DemandProfile.load(tmp_path / "own.json").to_json() == PROFILE.to_json()
    assert PROFILE.layer_demand(0.9).dtype == np.float64
    assert PROFILE.layer_demand(0.9).tolist() == [1.5, 0.0, 300.25]
    with pytest.raises(ValueError, match=r"rho=0\.93; measured: 0\.9$"):
        PROFILE.layer_demand()


def test_profile_file_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        DemandProfile.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        DemandProfile.load(tmp_path)  # a folder


@pytest.mark.parametrize("text", ["", "{", "layers: 3", "\x00\x01"])
def test_profile_not_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"wave\.json is not a demand profile"):
        DemandProfile.load(write(tmp_path / "wave.json", text))


def test_profile_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "wave.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"wave\.json is not a demand profile"):
        DemandProfile.load(tmp_path / "wave.json")


@pytest.mark.parametrize("content", [{}, [], 3, None, "text", {"schema": 2}, PROFILE.to_dict() | {"schema": 1}])
def test_profile_of_another_schema(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match=r"schema 2.*calibrate"):
        DemandProfile.load(write(tmp_path / "wave.json", json.dumps(content)))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("rhos", ["rhos"]),
        ("model", ["model"]),
        ("prompts", ["prompts"]),
        ("grids", ["grids"]),
        ("histogram", ["histogram"]),
        ("kv_heads", ["model", "kv_heads"]),
        ("head_dim", ["model", "head_dim"]),
        (r"prompts\.0\.sums", ["prompts", 0, "sums"]),
        (r"prompts\.0\.rows", ["prompts", 0, "rows"]),
    ],
)
def test_profile_missing_field_is_named(tmp_path: Path, name: str, path: list[Any]) -> None:
    data = json.loads(json.dumps(PROFILE.to_dict()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ValueError, match=name):
        DemandProfile.load(write(tmp_path / "x.json", data))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rhos", {"rhos": ["high"]}),
        ("rhos", {"rhos": None}),
        ("rhos", {"rhos": [1.5]}),
        ("rhos", {"rhos": []}),
        ("sums", with_prompt(sums=[[["many", 1, 2]]])),
        ("sums", with_prompt(sums=None)),
        ("sums", with_prompt(sums=[[[1.0]]])),
        ("rows", with_prompt(rows=0)),
        ("misses", with_prompt(misses=3)),
        ("misses", with_prompt(misses={"rkv": [[[0.5]]]})),
        ("prompts", {"prompts": []}),
        ("prompts counted twice", {"prompts": PROFILE.to_dict()["prompts"] * 2}),
        ("histogram", {"histogram": [[[1]]]}),
        ("model", {"model": "llama"}),
        ("kv_heads", {"model": PROFILE.to_dict()["model"] | {"kv_heads": "two"}}),
    ],
)
def test_profile_wrong_field_is_named(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """The docstring of ``load``: ValueError for a missing or wrong field; the message names it."""
    path = write(tmp_path / "x.json", PROFILE.to_dict() | change)
    with pytest.raises(ValueError, match=name):
        DemandProfile.load(path)


@pytest.mark.parametrize("layers", [[], [1.0, 2.0], [1.0] * 4])
def test_profile_wrong_number_of_layers(layers: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(layers)} layer demands .* 3 layers"):
        DemandProfile.of_layers(layers, PROFILE.shape)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_profile_bad_demand(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        DemandProfile.of_layers((1.0, bad), shape_of(2, 2))
    with pytest.raises(ValueError, match=r"sums .*finite and not negative|is no number in JSON"):
        DemandProfile.load(write(tmp_path / "x.json", PROFILE.to_dict() | with_prompt(sums=[[[1, bad] * 4] * 3])))


@pytest.mark.parametrize("rho", [0.0, -1.0, 1.01, float("nan")])
def test_profile_bad_rho(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        DemandProfile.of_layers((1.0,), shape_of(1, 2), rho=rho)


def test_profile_accepts_its_own_model() -> None:
    PROFILE.check(ModelShape(3, 2, 8, 64), {"model_type": "qwen2", "vocab_size": 9})
    DemandProfile.of_layers((1.0,) * 3, PROFILE.shape).check(
        PROFILE.shape, {"model_type": "qwen2"}
    )  # unnamed: any architecture


@pytest.mark.parametrize(
    ("shape", "model_type", "named"),
    [
        (ModelShape(3, 2, 8, 64), "llama", ["'qwen2'", "'llama'"]),
        (ModelShape(4, 2, 8, 64), "qwen2", ["layers", "3", "4"]),
        (ModelShape(3, 4, 8, 64), "qwen2", ["kv_heads", "2", "4"]),
        (ModelShape(3, 2, 16, 64), "qwen2", ["query_heads", "8", "16"]),
        (
            ModelShape(5, 1, 7, 32),
            "llama",
            ["model_type", "layers", "kv_heads", "query_heads", "head_dim", "32"],
        ),
    ],
)
def test_profile_names_every_difference(shape: ModelShape, model_type: str, named: list[str]) -> None:
    with pytest.raises(ValueError, match="another model") as caught:
        PROFILE.check(shape, {"model_type": model_type})
    assert all(word in str(caught.value) for word in named)


@pytest.mark.parametrize("model_type", ["llama", ""])
def test_unnamed_profile_of_another_shape_is_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match="kv_heads"):
        DemandProfile.of_layers((1.0,) * 3, PROFILE.shape).check(ModelShape(3, 4, 8, 64), {"model_type": model_type})


# ---- head allocators -------------------------------------------------------------------------------------


def head_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scores (+inf in the window, -inf past the length), lengths, totals below what is held, a window."""
    rng = generator(seed)
    batch, heads, tokens = number(1, 4, rng), number(1, 8, rng), number(2, 60, rng)
    window = number(0, 5, rng)
    lengths = torch.randint(0 if seed % 3 == 0 else min(window + 1, tokens), tokens + 1, (batch, heads), generator=rng)
    lengths[:, 0] = tokens
    lengths[:, 0] = torch.maximum(lengths[:, 0], torch.tensor(window + 1))
    width = int(lengths.max())
    scores = torch.randn(batch, heads, width, generator=rng)
    if seed % 2:
        scores = (2 * scores).round()  # many ties
    scores = scores + 2 * torch.randn(batch, heads, 1, generator=rng)
    index = torch.arange(width)
    scores = scores.masked_fill(index >= lengths[..., None] - window, float("inf"))
    scores = scores.masked_fill(index >= lengths[..., None], float("-inf"))
    held, least = lengths.sum(-1), lengths.clamp(max=window).sum(-1)
    share = torch.rand(batch, generator=rng)
    total = least + (share * (held - least - 1)).long()
    return scores, lengths, total.clamp(max=held - 1), window


HEAD_PROBLEMS = [pytest.param(range(start, start + 20), id=f"seeds {start}") for start in range(0, 100, 20)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_head_budgets_are_exact_and_possible(name: str, seeds: range) -> None:
    for seed in seeds:
        scores, lengths, total, window = head_problem(seed)
        budgets = HEAD_ALLOCATORS.create(name).allocate(scores, lengths, total, window).budgets
        assert budgets.dtype == torch.int64
        assert budgets.sum(-1).equal(total)
        assert (budgets <= lengths).all()
        assert (budgets >= lengths.clamp(max=window)).all()


@pytest.mark.parametrize(
    "allocator", [ThresholdHeads(), ThresholdHeads(0.5, 0.0, 8.0), AdaKVHeads(0.0), AdaKVHeads(1.0)]
)
def test_head_budgets_are_exact_at_other_settings(allocator: HeadAllocator) -> None:
    for seed in range(200, 240):
        scores, lengths, total, window = head_problem(seed)
        budgets = allocator.allocate(scores, lengths, total, window).budgets
        assert budgets.sum(-1).equal(total)
        assert (budgets <= lengths).all()
        assert (budgets >= lengths.clamp(max=window)).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_sequences_heads_do_not_depend_on_the_batch(name: str) -> None:
    allocator = HEAD_ALLOCATORS.create(name)
    for seed in range(40):
        scores, lengths, total, window = head_problem(seed)
        together = allocator.allocate(scores, lengths, total, window)
        for row in range(len(total)):
            own = scores[row : row + 1, :, : int(lengths[row].max())]
            alone = allocator.allocate(own, lengths[row : row + 1], total[row : row + 1], window)
            assert alone.budgets[0].equal(together.budgets[row])
            if together.threshold is not None:
                assert alone.threshold[0] == together.threshold[row]


def brute_counts(scores: Tensor, lengths: Tensor, total: int) -> tuple[list[int], float]:
    held = [head[:length].tolist() for head, length in zip(scores, lengths.tolist(), strict=True)]
    pooled = sorted((score for head in held for score in head), reverse=True)
    threshold = pooled[max(total, 1) - 1]
    return [sum(score >= threshold for score in head) for head in held], threshold


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_counts_over_the_threshold_equal_brute_force(seeds: range) -> None:
    for seed in seeds:
        scores, lengths, total, window = head_problem(seed)
        counts, thresholds = pooled_counts(scores, total)
        split = ThresholdHeads().allocate(scores, lengths, total, window)
        assert split.threshold is not None
        for row, k in enumerate(total.tolist()):
            expected, threshold = brute_counts(scores[row], lengths[row], k)
            assert counts[row].tolist() == expected
            assert thresholds[row].item() == split.threshold[row].item() == threshold


def threshold_bounds(lengths: list[int], total: int, window: int) -> tuple[list[Fraction], list[Fraction]]:
    mean = Fraction(total, len(lengths))
    low = [min(max(mean / 4, Fraction(window)), Fraction(n)) for n in lengths]
    return low, [max(min(2 * mean, Fraction(n)), bound) for n, bound in zip(lengths, low, strict=True)]


def threshold_rows(seeds: range, allocator: ThresholdHeads) -> Any:
    """Every row of the problems: budgets, the counts by brute force, lengths, total, and the bounds."""
    for seed in seeds:
        scores, lengths, total, window = head_problem(seed)
        budgets = allocator.allocate(scores, lengths, total, window).budgets
        for row, k in enumerate(total.tolist()):
            counts, _ = brute_counts(scores[row], lengths[row], k)
            yield budgets[row].tolist(), counts, k, *threshold_bounds(lengths[row].tolist(), k, window)


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_threshold_floor_and_cap_hold_where_lengths_allow(seeds: range) -> None:
    capped = 0
    for budgets, _, total, low, high in threshold_rows(seeds, ThresholdHeads()):
        lows, highs = rounded_bounds(low, high, total)
        assert all(b >= bound for b, bound in zip(budgets, lows, strict=True))
        if sum(high) >= total:
            capped += 1
            assert all(b <= bound for b, bound in zip(budgets, highs, strict=True))
    assert capped > 10


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_threshold_is_the_operator_on_the_counts(seeds: range) -> None:
    for budgets, counts, total, low, high in threshold_rows(seeds, ThresholdHeads(exponent=1.0)):
        if sum(high) >= total:
            assert budgets == exact_split(counts, total, low, high)


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_threshold_equals_robustify_where_no_length_or_window_binds(seeds: range) -> None:
    for seed in seeds:
        scores, lengths, total, _ = head_problem(seed)
        total = total.clamp(max=int(lengths.min()))  # twice the mean is then held by every head
        if lengths.shape[1] < 2:
            continue
        budgets = ThresholdHeads().allocate(scores, lengths, total, 0).budgets
        for row, k in enumerate(total.tolist()):
            counts, _ = brute_counts(scores[row], lengths[row], k)
            assert budgets[row].equal(robustify(floats(counts), k))


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_uniform_heads_equal_exact_arithmetic(seeds: range) -> None:
    for seed in seeds:
        scores, lengths, total, window = head_problem(seed)
        budgets = UniformHeads().allocate(scores, lengths, total, window).budgets
        for row, k in enumerate(total.tolist()):
            held = lengths[row].tolist()
            assert budgets[row].tolist() == exact_split([1] * len(held), k, [min(n, window) for n in held], held)


@pytest.mark.parametrize("seeds", HEAD_PROBLEMS)
def test_adakv_blends_counts_with_an_equal_share(seeds: range) -> None:
    for seed in seeds:
        scores, lengths, total, window = head_problem(seed)
        budgets = AdaKVHeads(0.25).allocate(scores, lengths, total, window).budgets
        for row, k in enumerate(total.tolist()):
            counts, _ = brute_counts(scores[row], lengths[row], k)
            recent = [min(n, window) for n in lengths[row].tolist()]
            rest, heads = k - sum(recent), len(recent)
            wish = [Fraction(3 * (c - r), 4) + Fraction(rest, 4 * heads) for c, r in zip(counts, recent, strict=True)]
            free = [n - r for n, r in zip(lengths[row].tolist(), recent, strict=True)]
            extra = exact_split(wish, rest, [0] * heads, free)
            assert budgets[row].tolist() == [r + e for r, e in zip(recent, extra, strict=True)]


def ample_scores(offsets: list[float], tokens: int = 100, window: int = 4) -> tuple[Tensor, Tensor]:
    scores = torch.rand(1, len(offsets), tokens, generator=generator(9)) + torch.tensor(offsets)[None, :, None]
    scores[..., tokens - window :] = float("inf")
    return scores, torch.full((1, len(offsets)), tokens)


@pytest.mark.parametrize("name", ["threshold", "adakv"])
@pytest.mark.parametrize("best", range(4))
def test_a_head_whose_scores_dominate_gets_more(name: str, best: int) -> None:
    scores, lengths = ample_scores([5.0 * (head == best) for head in range(4)])
    budgets = HEAD_ALLOCATORS.create(name).allocate(scores, lengths, torch.tensor([80]), 4).budgets[0].tolist()
    others = [b for head, b in enumerate(budgets) if head != best]
    assert budgets[best] > max(others)
    assert sum(budgets) == 80


def test_a_dominating_head_by_hand() -> None:
    scores, lengths = ample_scores([5.0, 0.0, 0.0, 0.0])
    total = torch.tensor([80])
    # Counts 4 + 64 best of head 0, and 4 of each other: sqrt 8.25 : 2 : 2 : 2, of 80: 46.3 -> at most 2 * 20.
    assert ThresholdHeads().allocate(scores, lengths, total, 4).budgets.tolist() == [[40, 14, 13, 13]]
    assert UniformHeads().allocate(scores, lengths, total, 4).budgets.tolist() == [[20, 20, 20, 20]]
    # Of 64 beside the windows, 0.8 * 64 + 0.2 * 16 = 54.4 to head 0 and 3.2 to each other.
    assert AdaKVHeads().allocate(scores, lengths, total, 4).budgets.tolist() == [[59, 7, 7, 7]]


def test_uniform_heads_pass_on_what_a_short_head_cannot_take() -> None:
    scores, lengths = torch.zeros(1, 3, 50), torch.tensor([[5, 50, 50]])
    assert UniformHeads().allocate(scores, lengths, torch.tensor([60]), 2).budgets.tolist() == [[5, 28, 27]]


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_a_layer_without_budget_get_nothing(name: str) -> None:
    scores, lengths = torch.randn(1, 3, 5, generator=generator(1)), torch.full((1, 3), 5)
    split = HEAD_ALLOCATORS.create(name).allocate(scores, lengths, torch.tensor([0]), 0)
    assert split.budgets.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("name", HEADS)
def test_windows_alone_fill_the_budget(name: str) -> None:
    scores, lengths = ample_scores([3.0, 0.0, 0.0])
    split = HEAD_ALLOCATORS.create(name).allocate(scores, lengths, torch.tensor([12]), 4)
    assert split.budgets.tolist() == [[4, 4, 4]]


# ---- random splits ----


@pytest.mark.parametrize("seed", range(8))
def test_random_splits_are_exact_uneven_and_repeat(seed):
    shape, budget, window = ra.ModelShape(6, 4, 8, 16), 96, 8
    layers = ra.RandomLayers(split_seed=seed)
    heads = ra.RandomHeads(split_seed=seed)
    split = heads.budgets(shape, budget, window, None)
    assert split.sum() == 6 * 4 * budget
    assert split.min() >= max(window + 1, budget // 8)
    assert split.max() > 1.5 * budget, "not random enough to be a control"
    assert (layers.allocate(shape, budget, window, None).numpy() == split.sum(1)).all(), "layers and heads agree"
    assert (heads.budgets(shape, budget, window, None) == split).all()
    other = ra.RandomHeads(split_seed=seed + 1).budgets(shape, budget, window, None)
    assert (other != split).any()


def test_spread_of_random_splits():
    shape = ra.ModelShape(40, 8, 8, 16)
    even = ra.RandomHeads(spread=0.0).budgets(shape, 64, 8, None)
    assert (even == 64).all()
    logs = np.log(ra.RandomHeads(spread=0.3, floor=0.0).budgets(shape, 4096, 8, None))
    assert logs.std() == pytest.approx(0.3 * 2**0.5, rel=0.15)
    with pytest.raises(ValueError, match="spread must not be negative"):
        ra.RandomHeads(spread=-1)


# ---- policies with settings ----


def test_policies_from_names_and_settings():
    made = ra.Compression(
        64, {"name": "rkv", "kernel": 5}, layers={"name": "pyramid"}, heads={"name": "adakv", "safeguard": 0.5}
    )
    assert made.describe()["scorer"]["kernel"] == 5
    assert made.describe()["heads"] == {"name": "adakv", "safeguard": 0.5}
    assert made == ra.Compression(64, ra.RKV(kernel=5), layers="pyramid", heads=ra.AdaKVHeads(0.5))
    for wrong, message in (
        ({"name": "rkv", "kernal": 5}, "unknown setting of token scorer 'rkv': 'kernal'. Did you mean 'kernel'"),
        ({"kernel": 5}, "a token scorer with settings needs its name"),
        ({"name": "rvk"}, "Did you mean 'rkv'"),
        ({"name": "rkv", "kernel": 0}, "kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            ra.Compression(64, wrong)
