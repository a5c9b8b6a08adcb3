"""Eviction: which tokens stay, the layers' totals over the rounds, and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reasonalloc import (
    Compression,
    DemandProfile,
    DynamicLayers,
    HeadAllocator,
    ModelShape,
    PyramidLayers,
)
from reasonalloc.cache.selection import Candidates, rank_candidates, route_heads, select
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.files import write_atomically
from reasonalloc.policies.allocation import HEAD_ALLOCATORS, HeadSplit

HEADS = ("uniform", "threshold", "adakv")
SEEDS = range(30)
INFINITY = float("inf")
LARGEST = torch.finfo(torch.float32).max


class Layer:
    """One layer's tokens before an eviction, ragged: raw scores, lengths, protected tokens, a window."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=rng))

        self.batch, self.heads, width = number(1, 4), number(1, 6), number(8, 50)
        self.window = number(0, 6)
        self.protected = torch.randint(0, 5, (self.batch,), generator=rng) * (seed % 3 > 0)
        least = int(self.protected.max()) + 1
        self.lengths = torch.randint(least, width + 1, (self.batch, self.heads), generator=rng)
        self.scores = torch.randn(self.batch, self.heads, width, generator=rng)
        if seed % 2:
            self.scores = self.scores.round()  # many ties
        index = torch.arange(width)
        self.valid = index < self.lengths[..., None]
        self.newest = self.valid & (index >= self.lengths[..., None] - self.window)
        self.budgets = self._budgets(rng)

    def _budgets(self, rng: torch.Generator) -> Tensor:
        """Any budgets that hold the window, some of them more than the head has."""
        extra = torch.randint(0, self.scores.shape[-1], self.lengths.shape, generator=rng)
        return torch.minimum(self.own, torch.tensor(self.window)) + extra

    @property
    def own(self) -> Tensor:
        """Tokens of each head that count against its budget."""
        return self.lengths - self.protected[:, None]

    def candidates(self) -> Candidates:
        return rank_candidates(self.scores, self.valid, self.newest, self.protected)

    def rows(self) -> list[tuple[int, int]]:
        return [(row, head) for row in range(self.batch) for head in range(self.heads)]

    def survivors(self, row: int, head: int) -> tuple[list[int], list[int], list[int]]:
        """Protected tokens, the window, and the others from best to worst."""
        length, first = int(self.lengths[row, head]), int(self.protected[row])
        recent = max(first, length - self.window)
        others = sorted(range(first, recent), key=lambda i: (-self.scores[row, head, i].item(), i))
        return list(range(first)), list(range(recent, length)), others


def chosen(candidates: Candidates, budgets: Tensor, by_score: bool = False) -> list[list[list[int]]]:
    """``[row][head]``: which tokens stay, in the order of storage."""
    index, kept = select(candidates, budgets, by_score)
    assert index.shape == candidates.scores.shape
    assert kept.shape == budgets.shape
    return [
        [head[:count].tolist() for head, count in zip(*of_row, strict=True)]
        for of_row in zip(index, kept.tolist(), strict=True)
    ]


def kept_tokens(layer: Layer, by_score: bool = False) -> dict[tuple[int, int], list[int]]:
    found = chosen(layer.candidates(), layer.budgets, by_score)
    return {(row, head): found[row][head] for row, head in layer.rows()}


# ---- ranking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_ranking_marks_window_absent_and_protected(seed: int) -> None:
    layer = Layer(seed)
    ranked = layer.candidates()
    index = torch.arange(layer.scores.shape[-1])
    protected = (index < layer.protected[:, None, None]).expand_as(layer.valid)
    assert ranked.lengths.equal(layer.own)
    assert ranked.protected.equal(layer.protected)
    assert ranked.scores.dtype == torch.float32
    assert torch.isneginf(ranked.scores).equal(~layer.valid | protected)
    assert torch.isposinf(ranked.scores).equal(layer.newest & ~protected)
    usual = torch.isfinite(ranked.scores)
    assert ranked.scores[usual].equal(layer.scores[usual])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranking_takes_any_float_dtype(dtype: torch.dtype) -> None:
    layer = Layer(1)  # small whole numbers as scores: exact in every dtype
    wanted = layer.candidates().scores
    layer.scores = layer.scores.to(dtype)
    assert layer.candidates().scores.equal(wanted)


def odd_scores(odd: float) -> Candidates:
    """Six tokens, the last absent, the two before it the window; token 1 has the odd score."""
    scores = torch.tensor([[[0.5, odd, -0.5, 0.1, 0.2, 9.0]]], dtype=torch.float64)
    valid = torch.tensor([[[True] * 5 + [False]]])
    newest = torch.tensor([[[False] * 3 + [True] * 2 + [False]]])
    return rank_candidates(scores, valid, newest, torch.tensor([0]))


@pytest.mark.parametrize("odd", [INFINITY, -INFINITY, float("nan"), LARGEST, -LARGEST, 1e300, -1e300])
def test_odd_scores_never_displace_the_window(odd: float) -> None:
    candidates = odd_scores(odd)
    assert torch.isfinite(candidates.scores[0, 0, :3]).all()
    assert candidates.scores[0, 0, 3:].tolist() == [INFINITY, INFINITY, -INFINITY]
    assert chosen(candidates, torch.tensor([[2]])) == [[[3, 4]]]
    best = 1 if odd > 0 else 0
    assert chosen(candidates, torch.tensor([[3]])) == [[[best, 3, 4]]]
    assert chosen(candidates, torch.tensor([[4]])) == [[[0, 1 if odd > 0 else 2, 3, 4]]]


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("odd", [INFINITY, -INFINITY, float("nan")])
def test_scores_that_say_nothing_keep_the_earlier_tokens(odd: float, by_score: bool) -> None:
    layer = Layer(0)
    layer.scores = torch.full_like(layer.scores, odd)
    for (row, head), kept in kept_tokens(layer, by_score).items():
        recent = min(layer.window, int(layer.own[row, head]))
        length = int(layer.lengths[row, head])
        assert kept == [*range(len(kept) - recent), *range(length - recent, length)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(20))
def test_odd_scores_do_not_break_the_routing(name: str, seed: int) -> None:
    layer = Layer(seed)
    odd = torch.tensor([float("nan"), INFINITY, -INFINITY, LARGEST])
    layer.scores[..., ::2] = odd[torch.arange(layer.scores[..., ::2].shape[-1]) % 4]
    total = (layer.own.sum(-1) * 3 // 4).clamp(min=layer.heads * layer.window)
    split = route_heads(HEAD_ALLOCATORS.create(name), layer.candidates(), total, layer.window)
    assert split.budgets.sum(-1).equal(total)
    layer.budgets = split.budgets
    for (row, head), kept in kept_tokens(layer).items():
        protected, window, _ = layer.survivors(row, head)
        assert {*protected, *window} <= {*kept}


# ---- selection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_counts_are_the_budget_or_all_and_the_protected(seed: int, by_score: bool) -> None:
    layer = Layer(seed)
    _, kept = select(layer.candidates(), layer.budgets, by_score)
    assert kept.equal(torch.minimum(layer.budgets, layer.own) + layer.protected[:, None])


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_protected_and_window_always_stay(seed: int, by_score: bool) -> None:
    layer = Layer(seed)
    for (row, head), kept in kept_tokens(layer, by_score).items():
        protected, window, _ = layer.survivors(row, head)
        assert {*protected, *window} <= {*kept}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_others_stay_in_the_texts_order(seed: int) -> None:
    layer = Layer(seed)
    for (row, head), kept in kept_tokens(layer).items():
        protected, window, others = layer.survivors(row, head)
        best = others[: int(layer.budgets[row, head]) - len(window)]
        assert kept == sorted([*protected, *best, *window])


@pytest.mark.parametrize("seed", SEEDS)
def test_by_score_is_protected_then_descending_then_window(seed: int) -> None:
    layer = Layer(seed)
    for (row, head), kept in kept_tokens(layer, by_score=True).items():
        protected, window, others = layer.survivors(row, head)
        assert kept == [*protected, *others[: int(layer.budgets[row, head]) - len(window)], *window]


def test_the_problems_cover_what_matters() -> None:
    layers = [Layer(seed) for seed in SEEDS]
    assert any((layer.budgets < layer.own).any() and (layer.protected > 0).any() for layer in layers)
    assert any((layer.budgets > layer.own).any() for layer in layers)
    assert any((layer.own < layer.window).any() for layer in layers)
    assert any(layer.window == 0 for layer in layers)


@pytest.mark.parametrize("by_score", [False, True])
def test_of_equal_scores_the_lower_index_wins(by_score: bool) -> None:
    scores = torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0]]])
    newest = torch.arange(7) == 6
    candidates = rank_candidates(scores, torch.ones(1, 1, 7, dtype=torch.bool), newest[None, None], torch.tensor([0]))
    kept = [chosen(candidates, torch.tensor([[budget]]), by_score)[0][0] for budget in (2, 3, 5, 6)]
    if by_score:
        assert kept == [[1, 6], [1, 3, 6], [1, 3, 5, 0, 6], [1, 3, 5, 0, 2, 6]]
    else:
        assert kept == [[1, 6], [1, 3, 6], [0, 1, 3, 5, 6], [0, 1, 2, 3, 5, 6]]


def test_many_ties_are_still_by_index() -> None:
    """Long enough for a sort that is not stable to show."""
    tokens = 5000
    scores, valid = torch.zeros(1, 2, tokens), torch.ones(1, 2, tokens, dtype=torch.bool)
    newest = (torch.arange(tokens) >= tokens - 8).expand_as(valid)
    candidates = rank_candidates(scores, valid, newest, torch.tensor([3]))
    expected = [*range(1003 - 8), *range(tokens - 8, tokens)]
    for by_score in (False, True):
        assert len(expected) == 1003
        assert chosen(candidates, torch.tensor([[1000, 1000]]), by_score) == [[expected, expected]]


@pytest.mark.parametrize("by_score", [False, True])
def test_indices_can_be_gathered_even_past_the_kept(by_score: bool) -> None:
    for seed in SEEDS:
        layer = Layer(seed)
        index, _ = select(layer.candidates(), layer.budgets, by_score)
        assert ((index >= 0) & (index < layer.scores.shape[-1])).all()


@pytest.mark.parametrize("by_score", [False, True])
def test_a_sequences_selection_does_not_depend_on_the_batch(by_score: bool) -> None:
    for seed in range(20):
        layer = Layer(seed)
        together = kept_tokens(layer, by_score)
        for row in range(layer.batch):
            one = slice(row, row + 1)
            own = rank_candidates(layer.scores[one], layer.valid[one], layer.newest[one], layer.protected[one])
            alone = chosen(own, layer.budgets[one], by_score)[0]
            assert alone == [together[row, head] for head in range(layer.heads)]


# ---- routing ---------------------------------------------------------------------------------------------


def layer_total(layer: Layer, share: float) -> Tensor:
    """A total that holds the windows, at ``share`` of what the sequences hold."""
    windows = layer.own.clamp(max=layer.window).sum(-1)
    return torch.maximum((layer.own.sum(-1) * share).long(), windows)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(20))
def test_routed_budgets_sum_to_the_total_and_cover_the_window(name: str, seed: int) -> None:
    layer = Layer(seed)
    for share in (0.0, 0.3, 0.9):
        total = layer_total(layer, share)
        budgets = route_heads(HEAD_ALLOCATORS.create(name), layer.candidates(), total, layer.window).budgets
        assert budgets.sum(-1).equal(total)
        assert (budgets >= layer.own.clamp(max=layer.window)).all()
        over = layer.own.sum(-1) > total
        assert (budgets <= layer.own)[over].all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(20))
def test_a_sequence_within_its_total_keeps_all(name: str, seed: int) -> None:
    layer = Layer(seed)
    held = layer.own.sum(-1)
    for spare in (0, 1, 7, 1000):
        budgets = route_heads(HEAD_ALLOCATORS.create(name), layer.candidates(), held + spare, layer.window).budgets
        assert budgets.sum(-1).equal(held + spare)
        assert (budgets >= layer.own).all()
        room = budgets - layer.own
        assert (room.max(-1).values - room.min(-1).values <= 1).all()
        layer.budgets = budgets
        for (row, head), kept in kept_tokens(layer).items():
            assert kept == list(range(int(layer.lengths[row, head])))


@pytest.mark.parametrize("name", HEADS)
def test_full_and_filling_sequences_share_a_batch(name: str) -> None:
    allocator = HEAD_ALLOCATORS.create(name)
    mixed = 0
    for seed in range(40):
        layer = Layer(seed)
        over = torch.arange(layer.batch) % 2 == 0
        total = torch.where(over, layer_total(layer, 0.5), layer.own.sum(-1) + 5)
        over = layer.own.sum(-1) > total
        mixed += bool(over.any() and not over.all())
        candidates = layer.candidates()
        split = route_heads(allocator, candidates, total, layer.window)
        assert split.budgets.sum(-1).equal(total)
        assert (split.budgets >= layer.own)[~over].all()
        direct = allocator.allocate(candidates.scores, candidates.lengths, total, layer.window)
        assert split.budgets[over].equal(direct.budgets[over])
        if split.threshold is not None:
            assert split.threshold[over].equal(direct.threshold[over])
    assert mixed > 10


class LastHeads(HeadAllocator):
    """Windows, and all the rest to the last heads: what a user's allocator may do."""

    def allocate(self, scores: Tensor, lengths: Tensor, total: Tensor, window: int) -> HeadSplit:
        assert (lengths.sum(-1) >= total).all()
        budgets = lengths.clamp(max=window)
        for head in reversed(range(lengths.shape[1])):
            more = torch.minimum(lengths[:, head] - budgets[:, head], total - budgets.sum(-1))
            budgets[:, head] += more
        return HeadSplit(budgets)


def test_a_users_allocator_is_asked_solvable_questions_only() -> None:
    for seed in range(40):
        layer = Layer(seed)
        for share in (0.5, 1.0, 1.5):
            total = layer_total(layer, share)
            split = route_heads(LastHeads(), layer.candidates(), total, layer.window)
            assert split.threshold is None
            assert split.budgets.sum(-1).equal(total)


def test_protected_tokens_do_not_compete() -> None:
    """Scores of protected tokens change neither the budgets nor what else stays."""
    for seed in SEEDS:
        layer = Layer(seed)
        total = layer_total(layer, 0.5)
        index = torch.arange(layer.scores.shape[-1])
        results = []
        for value in (-50.0, 50.0):
            layer.scores = layer.scores.masked_fill(index < layer.protected[:, None, None], value)
            split = route_heads(HEAD_ALLOCATORS.create("threshold"), layer.candidates(), total, layer.window)
            layer.budgets = split.budgets
            results.append((split.budgets.tolist(), kept_tokens(layer)))
        assert results[0] == results[1]


# ---- the layers' totals ----------------------------------------------------------------------------------


SHAPE = ModelShape(5, 3, 6, 8)
BUDGET, WINDOW = 20, 4
ALL = SHAPE.layers * SHAPE.kv_heads * BUDGET


def layer_totals(layers: Any = None, profile: DemandProfile | None = None) -> LayerTotals:
    layers = DynamicLayers() if layers is None else layers
    return LayerTotals(Compression(BUDGET, layers=layers, profile=profile, window=WINDOW), SHAPE)


def table(totals: LayerTotals, batch: int) -> np.ndarray[Any, Any]:
    """``[rows, layers]``."""
    return totals.of(np.arange(SHAPE.layers), np.arange(batch)).T


def report(totals: LayerTotals, layer: int, demand: Tensor) -> None:
    """One layer's demand, ``[rows]``."""
    totals.report(np.array([layer]), demand[None].double().numpy())


def report_all(totals: LayerTotals, demand: Tensor) -> None:
    totals.report(np.arange(SHAPE.layers), demand.T.double().numpy())


def random_demand(batch: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, SHAPE.layers, generator=rng)).exp().ceil()


@pytest.mark.parametrize("layers", ["uniform", "pyramid", "wave", "dynamic", PyramidLayers(3)])
def test_first_totals_are_the_allocators(layers: Any) -> None:
    profile = DemandProfile.of_layers((9.0, 1.0, 2.0, 3.0, 40.0), SHAPE)
    totals = layer_totals(layers, profile)
    allocator = totals.compression.layer_allocator
    wanted = allocator.allocate(SHAPE, BUDGET, WINDOW, profile).tolist()
    split = table(totals, 3)
    assert split.tolist() == [wanted] * 3
    assert split.sum(1).tolist() == [ALL] * 3
    assert (totals.dynamic is not None) == (layers == "dynamic")


@pytest.mark.parametrize("layers", ["uniform", "pyramid", "wave"])
def test_fixed_totals_stay(layers: str) -> None:
    totals = layer_totals(layers, DemandProfile.of_layers((9.0, 1.0, 2.0, 3.0, 40.0), SHAPE))
    before = table(totals, 2)
    totals.open_round()
    totals.select([1, 1, 0])
    assert table(totals, 3).tolist() == [before[0].tolist()] * 3


@pytest.mark.parametrize("seed", range(10))
def test_totals_are_exact_at_every_round(seed: int) -> None:
    totals, batch, seen = layer_totals(), 1 + seed % 4, set()
    for step in range(12):
        for layer in range(SHAPE.layers):
            if layer == 0:
                totals.open_round()
            split = table(totals, batch)
            assert split.sum(1).tolist() == [ALL] * batch
            assert split.min() >= SHAPE.kv_heads * max(WINDOW, BUDGET / 4)
            assert split.max() <= 2 * SHAPE.kv_heads * BUDGET
            report(totals, layer, random_demand(batch, 100 * seed + step)[:, layer])
        seen.add(split.tobytes())
    assert len(seen) > 6  # the demands do move the totals


def test_totals_follow_the_moving_average_of_reports() -> None:
    allocator = DynamicLayers(decay=0.75)
    totals, average = layer_totals(allocator), None
    for step in range(5):
        demand = random_demand(2, step).double()
        average = demand if average is None else 0.75 * average + 0.25 * demand
        report_all(totals, demand)
        totals.open_round()
        assert table(totals, 2).tolist() == allocator.split(average, SHAPE, BUDGET, WINDOW).tolist()


def test_a_round_opens_only_after_all_layers_reported() -> None:
    totals = layer_totals()
    even = [[SHAPE.kv_heads * BUDGET] * SHAPE.layers]
    totals.open_round()
    assert table(totals, 1).tolist() == even
    for layer in range(SHAPE.layers):
        totals.open_round()
        assert table(totals, 1).tolist() == even
        report(totals, layer, torch.tensor([10.0**layer]))
    assert table(totals, 1).tolist() == even  # reports take effect with the next round, not within one
    totals.open_round()
    assert table(totals, 1).tolist() != even


def test_totals_are_the_callers_own() -> None:
    totals = layer_totals()
    report_all(totals, random_demand(2, 1))
    totals.open_round()
    before = table(totals, 2)
    totals.of(np.arange(SHAPE.layers), np.arange(2))[:] = 0
    assert table(totals, 2).tolist() == before.tolist()


def test_sequences_are_split_independently() -> None:
    demand = random_demand(3, 5)
    together = layer_totals()
    report_all(together, demand)
    together.open_round()
    for row in range(3):
        alone = layer_totals()
        report_all(alone, demand[row : row + 1])
        alone.open_round()
        assert table(alone, 1)[0].tolist() == table(together, 3)[row].tolist()


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 0, 2, 1, 1], [0, 1, 2]])
def test_select_moves_totals_and_averages(indices: list[int]) -> None:
    totals, picked = layer_totals(), layer_totals()
    first, second = random_demand(3, 1), random_demand(3, 2)
    report_all(totals, first)
    totals.open_round()
    before = table(totals, 3)
    assert len({row.tobytes() for row in before}) == 3
    totals.select(indices)
    assert table(totals, len(indices)).tolist() == before[indices].tolist()
    # From here on as if the batch had always been this one.
    report_all(picked, first[indices])
    for other in (totals, picked):
        report_all(other, second[indices])
        other.open_round()
    assert table(totals, len(indices)).tolist() == table(picked, len(indices)).tolist()


def test_select_before_any_report() -> None:
    totals = layer_totals()
    totals.select([0, 0])
    assert table(totals, 2).sum(1).tolist() == [ALL, ALL]


def test_reset_forgets_demand_and_batch() -> None:
    totals = layer_totals()
    report_all(totals, random_demand(2, 1))
    totals.open_round()
    totals.reset()
    totals.open_round()
    assert table(totals, 5).tolist() == [[SHAPE.kv_heads * BUDGET] * SHAPE.layers] * 5
    report_all(totals, random_demand(4, 2))
    totals.open_round()
    assert table(totals, 4).sum(1).tolist() == [ALL] * 4


# ---- files -----------------------------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"old and longer")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert left_in(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_replace_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")
    temporary = []

    def fail(source: str, target: Path) -> None:
        temporary.extend(left_in(tmp_path))
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert len(temporary) == 2  # the content was written beside the old file, not into it
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["run.json"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "run.json", "not bytes")  # type: ignore[arg-type]
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("layers", ["uniform", "pyramid", "dynamic", {"name": "random-split", "split_seed": 1}])
def test_totals_do_not_depend_on_the_default_device(layers: Any) -> None:
    """An engine builds a model under ``with torch.device("cuda")``; "meta" tensors have no numbers to read."""
    expected = table(layer_totals(layers), 2)
    with torch.device("meta"):
        totals = layer_totals(layers)
        if totals.dynamic is not None:
            report_all(totals, torch.ones(2, SHAPE.layers, device="cpu"))
            totals.open_round()
    np.testing.assert_array_equal(table(totals, 2), expected)
