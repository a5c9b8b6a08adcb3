"""R-KV's scores from ragged keys: near duplicates are searched with tensor cores, and no matrix is ever stored.

    scan        one read of a span's keys: their norms, their sum, the softmax of the observed queries
    ask_newest  every token asks the newest keys whether one is its near duplicate; most tokens of a model find one
    ask_on      where few are left: they ask the next keys, then the rest, and a program ends when all have found theirs
    ask_all     where many are left: they ask all keys, in a loop without a way out, which keeps loads in flight
    score       softmax of the mean similarities, pooled importance, the weighted difference

A column of the similarity matrix sums to a key's product with the sum of all keys: only what is spared needs pairs.
What few and many are is decided for each span on the device.

Twins: ``policies.scoring.rkv.RKV.score`` and ``counted_over_all_pairs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.kernels import launch
from reasonalloc.kernels.tiles import load_tile
from reasonalloc.kernels.window import (
    WindowAttention,
    add_to_softmax,
    group_logits,
    key_sizes,
    largest_nearby,
    load_queries,
    mean_weight,
    pooled_importance,
    seen_by,
    stride_of,
    tile_of,
)

_FIRST = 128  # newest keys that all tokens ask
_SECOND = 512  # keys that the few ask which found none among them
_EVERYTHING = 1 << 30
_SCORE_TILE = 1024
_FEW = tl.constexpr(4)  # a quarter of a span's tokens: measured, between 2 in 100 (lists win) and all (the loop wins)
# A similarity s is added up as the whole number s * 2^22, so that the sum is the same in any order.
_UNIT = tl.constexpr(1.0 / 4194304.0)


@dataclass(frozen=True)
class SearchTile:
    """How many tokens ask how many keys at once, and by how many warps."""

    asking: int
    asked: int
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"ASKING": self.asking, "KEYS": self.asked, "num_warps": self.warps, "num_stages": self.stages}

    @classmethod
    def of(cls, keys: Float[Tensor, "slots dim"]) -> SearchTile:
        """What fits 99 KiB of shared memory and a thread's registers; for float32 see ``window.tile_of``."""
        dim = launch.padded(keys.shape[1])
        if keys.dtype == torch.float32:
            return cls(32, 32, warps=8) if dim <= 128 else cls(16, 16, warps=8)
        return cls(128, 64) if dim <= 128 else cls(64, 32)

    @classmethod
    def of_few(cls, keys: Float[Tensor, "slots dim"]) -> SearchTile:
        """As ``of``, where a span has a few tokens that ask: one in fifty, in many models."""
        dim = launch.padded(keys.shape[1])
        if keys.dtype == torch.float32:
            return cls.of(keys)
        return cls(64, 64) if dim <= 128 else cls(32, 32)


def rkv_scores(
    keys: Float[Tensor, "slots dim"],
    starts: Int[Tensor, "batch heads"],
    lengths: Int[Tensor, "batch heads"],
    width: int,
    queries: Float[Tensor, "batch query_heads observed dim"] | None,
    real: Bool[Tensor, "batch observed"] | None,
    window: int,
    scaling: float,
    weight: float,
    threshold: float,
    kernel: int,
    per_token: bool,
) -> Float[Tensor, "batch heads width"]:
    """``weight * importance - (1 - weight) * redundancy`` of each token, float32; 0 at and past ``lengths``.

    Waits for nothing. Scratch: 28 bytes a token, beside the result.

    Args:
        keys, starts, lengths, width, queries, real, window, scaling, kernel: as for ``window.pooled_importance``;
            ``queries`` may be None where ``weight`` is 0.
        weight: in [0, 1].
        threshold: cosine above which two keys are near duplicates, not negative.
        per_token: multiply by the span's length.
    """
    batch, heads = lengths.shape
    if weight == 1:
        assert queries is not None
        pooled = pooled_importance(keys, starts, lengths, width, queries, real, window, scaling, kernel)
        return pooled * lengths[..., None] if per_token else pooled
    scores = torch.empty(batch, heads, width, dtype=torch.float32, device=keys.device)
    if not scores.numel():
        return scores
    spans, stride = batch * heads, stride_of(width)
    starts, lengths = starts.contiguous(), lengths.contiguous()
    sizes, tile = key_sizes(keys), tile_of(keys)
    search, few = SearchTile.of(keys), SearchTile.of_few(keys)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    reciprocals, importance, counted = scratch(3, spans, stride)
    spared = scratch(spans, stride, dtype=torch.int64)
    sums = scratch(spans, sizes["DIM"])
    lists, counts = scratch(2, spans, stride, dtype=torch.int32), scratch(2, spans, dtype=torch.int32)
    attention, blocks = None, 1
    window_sizes = {"group": 1, "observed": 1, "GROUP": launch.LEAST_WIDTH, "ASKED": 1}
    numbers = (sums,) * 4  # not read
    if weight > 0:
        assert queries is not None
        attention = WindowAttention.of(queries, real, heads)
        blocks, window_sizes = attention.blocks, attention.sizes
        numbers = (attention.states, attention.largest, attention.totals, attention.shares)
    sizes_of_window: dict[str, Any] = {**window_sizes, "WEIGH": attention is not None}
    tiles, few_tiles = triton.cdiv(width, search.asking), max(1, triton.cdiv(width // _FEW.value, few.asking))
    common = (keys, starts, lengths, reciprocals, spared)
    grid, of_few = (spans * tiles,), (spans * few_tiles,)
    how, how_few = ({**sizes, **x.options} for x in (search, few))
    with launch.device_of(keys):
        _scan[(spans, blocks)](
            *common, sums, counts, *numbers[:3], float(scaling), window, stride, spans,
            **sizes_of_window, **sizes, **tile, num_stages=2,
        )  # fmt: skip
        _ask_newest[grid](
            *common, sums, counted, importance, lists[0], counts[0], *numbers, float(threshold), float(scaling), window,
            heads, stride, tiles, LIMIT=_FIRST, BLOCKS=blocks, **sizes_of_window, **how,
        )  # fmt: skip
        _ask_all[grid](*common, lists[0], counts[0], float(threshold), stride, tiles, SKIP=_FIRST, **how)
        _ask_on[of_few](
            *common, lists[0], counts[0], lists[1], counts[1], float(threshold), stride, few_tiles,
            SKIP=_FIRST, LIMIT=_SECOND, **how_few,
        )  # fmt: skip
        _ask_on[of_few](
            *common, lists[1], counts[1], lists[0], counts[0], float(threshold), stride, few_tiles,
            SKIP=_FIRST + _SECOND, LIMIT=_EVERYTHING, **how_few,
        )  # fmt: skip
        _score[(spans,)](
            importance, counted, spared, lengths, scores, float(weight), window, width, stride,
            KERNEL=kernel, PER_TOKEN=per_token, WEIGH=attention is not None, TILE=_SCORE_TILE, num_warps=4,
        )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["window", "stride", "spans"], do_not_specialize_on_alignment=["largest", "totals"])
def _scan(
    keys, starts, lengths, reciprocals, spared, sums, counts, queries, largest, totals, scaling, window, stride, spans,
    group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr, WEIGH: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One read of a span's keys: reciprocal norms, the sum of the normalised keys, each query's softmax.

    Clears what later kernels add to. Programs of one span, each with its block of queries, write the same otherwise.
    """
    span, block = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + span).to(tl.int32)
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    row = span.to(tl.int64) * stride
    d = tl.arange(0, DIM)
    key_sum = tl.zeros([DIM], tl.float32)
    top = tl.full([ASKED], float("-inf"), tl.float32)
    total = tl.zeros([ASKED], tl.float32)
    if WEIGH:
        asked = load_queries(queries, span, block, group, observed, GROUP, ASKED, dim, DIM, WIDEN)
        limit = seen_by(block, n, window, observed, ASKED)
    for at in range(0, n, TILE):
        t = at + tl.arange(0, TILE)
        live = t < n
        key = load_tile(first, t, live, dim, DIM, WIDEN)
        wide = key.to(tl.float32)
        reciprocal = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-8)
        tl.store(reciprocals + row + t, reciprocal, mask=live)
        tl.store(spared + row + t, tl.zeros([TILE], tl.int64), mask=live)
        key_sum += tl.sum(wide * reciprocal[:, None], 0)
        if WEIGH:
            logits = group_logits(key, asked, scaling, GROUP, ASKED, TILE, PRECISION)
            top, total = add_to_softmax(tl.where(t[:, None] < limit[None, :], logits, float("-inf")), top, total)
    tl.store(sums + span.to(tl.int64) * DIM + d, key_sum)
    tl.store(counts + span, 0)
    tl.store(counts + spans + span, 0)
    if WEIGH:
        query = (span * tl.num_programs(1) + block) * ASKED + tl.arange(0, ASKED)
        tl.store(largest + query, top)
        tl.store(totals + query, total)


@triton.jit
def _compare(
    q, i, floor, half, keys, reciprocals, first, best, similar,
    KEYS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tokens ``i`` against ``KEYS`` keys from ``first``: the newest near duplicate of each that has none yet.

    A match is one whole number: its column above 23 bits of ``1 + similarity / 2``. The largest is the newest.
    """
    column = tl.arange(0, KEYS)
    j = first + column
    there = j >= 0
    key = load_tile(keys, j, there, dim, DIM, WIDEN)
    reciprocal = tl.load(reciprocals + j, mask=there, other=0.0)
    product = tl.dot(q, tl.trans(key), input_precision=PRECISION) * reciprocal[None, :]
    matches = (product > floor[:, None]) & (i[:, None] != j[None, :])
    bits = (product * half[:, None] + 1.0).to(tl.int32, bitcast=True) + ((column << 23) - 0x3F800000)[None, :]
    found = tl.max(tl.where(matches, bits, -1), 1)
    is_new = (found >= 0) & (best < 0)
    best = tl.where(is_new, first + (found >> 23), best)
    return best, tl.where(is_new, found & 0x7FFFFF, similar)


@triton.jit
def _spare(spared, best, similar):
    """Add each similarity to its key's."""
    tl.atomic_add(spared + tl.maximum(best, 0), similar.to(tl.int64), mask=best >= 0, sem="relaxed")


@triton.jit
def _append(asking, count, i, is_left):
    """Tokens that ask on, behind those that other programs have put into a span's list."""
    left = is_left.to(tl.int32)
    number = tl.sum(left)
    if number > 0:
        first = tl.atomic_add(count, number, sem="relaxed")
        tl.store(asking + first + tl.cumsum(left, 0) - 1, i, mask=is_left)


@triton.jit(
    do_not_specialize=["window", "heads", "stride", "tiles"],
    do_not_specialize_on_alignment=["largest", "totals", "rest_counts"],
)
def _ask_newest(
    keys, starts, lengths, reciprocals, spared, sums, counted, importance, rest, rest_counts,
    queries, largest, totals, shares, threshold, scaling, window, heads, stride, tiles,
    group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr, WEIGH: tl.constexpr,
    BLOCKS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ASKING: tl.constexpr, KEYS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A tile of a span's tokens asks the newest ``LIMIT`` keys; those that find no near duplicate go to ``rest``.

    On the way, as their keys are at hand: the sum of each token's similarities with all others, and its attention.
    """
    span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + span).to(tl.int32)
    if tile * ASKING >= n:
        return
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    row = span.to(tl.int64) * stride
    d = tl.arange(0, DIM)
    i = tile * ASKING + tl.arange(0, ASKING)
    asks = i < n
    q = load_tile(first, i, asks, dim, DIM, WIDEN)
    own = tl.load(reciprocals + row + i, mask=asks, other=1.0)
    wide = q.to(tl.float32)
    similarity = tl.sum(wide * tl.load(sums + span.to(tl.int64) * DIM + d)[None, :], 1) * own
    tl.store(counted + row + i, similarity - tl.sum(wide * wide, 1) * own * own, mask=asks)
    if WEIGH:
        mean = mean_weight(
            q, i, n, span, queries, largest, totals, shares, scaling, window, heads,
            group, observed, GROUP, ASKED, BLOCKS, dim, DIM, WIDEN, PRECISION, ASKING,
        )  # fmt: skip
        tl.store(importance + row + i, mean, mask=asks)
    floor = tl.where(asks, threshold / own, float("inf"))
    best = tl.full([ASKING], -1, tl.int32)
    similar = tl.zeros([ASKING], tl.int32)
    bottom = tl.maximum(n - LIMIT, 0)
    for gone in range(0, n - bottom, KEYS):
        best, similar = _compare(
            q, i, floor, own * 0.5, first, reciprocals + row, n - gone - KEYS, best, similar,
            KEYS, dim, DIM, WIDEN, PRECISION,
        )  # fmt: skip
    _spare(spared + row, best, similar)
    if bottom > 0:
        _append(rest + row, rest_counts + span, i, asks & (best < 0))


@triton.jit
def _load_asking(
    keys, reciprocals, asking, tile, count, threshold,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, ASKING: tl.constexpr,
):  # fmt: skip
    """A tile of a span's list: tokens, which of them there are, their keys, reciprocal norms, and least products."""
    at = tile * ASKING + tl.arange(0, ASKING)
    asks = at < count
    i = tl.load(asking + at, mask=asks, other=0)
    own = tl.load(reciprocals + i, mask=asks, other=1.0)
    return i, asks, load_tile(keys, i, asks, dim, DIM, WIDEN), own, tl.where(asks, threshold / own, float("inf"))


@triton.jit(do_not_specialize=["stride", "tiles"], do_not_specialize_on_alignment=["asking_counts"])
def _ask_all(
    keys, starts, lengths, reciprocals, spared, asking, asking_counts, threshold, stride, tiles,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ASKING: tl.constexpr, KEYS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Where many of a span's tokens ask on: a tile of them asks all keys but the newest ``SKIP``."""
    span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + span).to(tl.int32)
    count = tl.load(asking_counts + span)
    if (tile * ASKING >= count) | (count * _FEW <= n):
        return
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    row = span.to(tl.int64) * stride
    i, _, q, own, floor = _load_asking(
        first, reciprocals + row, asking + row, tile, count, threshold, dim, DIM, WIDEN, ASKING
    )
    best = tl.full([ASKING], -1, tl.int32)
    similar = tl.zeros([ASKING], tl.int32)
    for gone in range(SKIP, n, KEYS):
        best, similar = _compare(
            q, i, floor, own * 0.5, first, reciprocals + row, n - gone - KEYS, best, similar,
            KEYS, dim, DIM, WIDEN, PRECISION,
        )  # fmt: skip
    _spare(spared + row, best, similar)


@triton.jit(do_not_specialize=["stride", "tiles"], do_not_specialize_on_alignment=["asking_counts", "rest_counts"])
def _ask_on(
    keys, starts, lengths, reciprocals, spared, asking, asking_counts, rest, rest_counts, threshold, stride, tiles,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ASKING: tl.constexpr, KEYS: tl.constexpr, SKIP: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Where few ask on: a tile of them asks the next ``LIMIT`` keys behind the newest ``SKIP``, until all have found.

    Those that find none go to ``rest``, if there are keys left to ask.
    """
    span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + span).to(tl.int32)
    count = tl.load(asking_counts + span)
    if (tile * ASKING >= count) | (count * _FEW > n):
        return
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    row = span.to(tl.int64) * stride
    i, asks, q, own, floor = _load_asking(
        first, reciprocals + row, asking + row, tile, count, threshold, dim, DIM, WIDEN, ASKING
    )
    best = tl.full([ASKING], -1, tl.int32)
    similar = tl.zeros([ASKING], tl.int32)
    top = n - SKIP
    bottom = tl.maximum(top - LIMIT, 0)
    left = tl.minimum(count - tile * ASKING, ASKING)
    while (top > bottom) & (left > 0):
        top -= KEYS
        best, similar = _compare(
            q, i, floor, own * 0.5, first, reciprocals + row, top, best, similar, KEYS, dim, DIM, WIDEN, PRECISION
        )
        left = tl.sum((asks & (best < 0)).to(tl.int32))
    _spare(spared + row, best, similar)
    if bottom > 0:
        _append(rest + row, rest_counts + span, i, asks & (best < 0))


@triton.jit
def _redundancy(counted, spared, t, n):
    """Mean similarity of tokens ``t`` with the others of their span, but for those that spare them; -inf past it."""
    live = t < n
    taken = tl.load(spared + t, mask=live, other=0).to(tl.float32) * _UNIT
    return tl.where(live, (tl.load(counted + t, mask=live, other=0.0) - taken) / n, float("-inf"))


@triton.jit(do_not_specialize=["window", "width", "stride"])
def _score(
    importance, counted, spared, lengths, scores, weight, window, width, stride,
    KERNEL: tl.constexpr, PER_TOKEN: tl.constexpr, WEIGH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A span's scores: twice over its tokens, once for the softmax's maximum and sum."""
    span = tl.program_id(0)
    n = tl.load(lengths + span).to(tl.int32)
    row = span.to(tl.int64) * stride
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for at in range(0, n, TILE):
        mean = _redundancy(counted + row, spared + row, at + tl.arange(0, TILE), n)
        now = tl.maximum(largest, tl.max(mean, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(mean - now), 0)
        largest = now
    for at in range(0, width, TILE):
        t = at + tl.arange(0, TILE)
        score = tl.zeros([TILE], tl.float32)
        if at < n:
            mean = _redundancy(counted + row, spared + row, t, n)
            score = (weight - 1.0) * (tl.exp(mean - largest) / total)
            if WEIGH:
                pooled = largest_nearby(importance + row, t, n, KERNEL, TILE)
                score += weight * tl.where(t < n - window, pooled, 0.0)
            if PER_TOKEN:
                score *= n.to(tl.float32)
        tl.store(scores + span.to(tl.int64) * width + t, score, mask=t < width)
