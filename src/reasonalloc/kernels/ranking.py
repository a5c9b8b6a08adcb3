"""From scores to the tokens that stay: no sort, but the k-th largest score, one bit of it after the other.

Scores are ``[batch, heads, width]``; a view whose rows are equally far apart is read as it is. Any width: the first
tile of scores stays in registers, the others are read again for each of the 32 bits, from the device's cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.kernels import launch

_TILE = 1024  # tokens of one step
_SELECT_TILE = 2048
_COUNT_ENTRIES = 16384  # scores of one step of all heads together: 32 of a thread's registers
_LARGEST = tl.constexpr(1.7014117331926443e38)  # half of the largest float32
_LEAST = tl.constexpr(-2147483648)


def rank(
    scores: Float[Tensor, "batch heads width"],
    lengths: Int[Tensor, "batch heads"],
    protected: Int[Tensor, "batch"],
    window: int,
) -> tuple[Float[Tensor, "batch heads width"], Bool[Tensor, ""]]:
    """A scorer's numbers as allocators and ``select`` read them, float32, and whether a token's score is NaN.

    +inf in the window; -inf what is absent, or among a row's first ``protected`` tokens. Twin:
    ``cache.selection.rank_candidates``.

    Args:
        scores: of any type of numbers.
        lengths: tokens of each head, int64.
        protected: int64.
        window: newest tokens of each head that stay.
    """
    batch, heads, width = scores.shape
    ranked = torch.empty(batch, heads, width, dtype=torch.float32, device=scores.device)
    wrong = torch.zeros((), dtype=torch.int32, device=scores.device)
    if ranked.numel():
        rows = _rows(scores.float() if scores.dtype == torch.bool else scores)
        tiles = triton.cdiv(width, _TILE)
        with launch.device_of(scores):
            _rank[(batch * heads * tiles,)](
                rows, lengths.contiguous(), protected.contiguous(), ranked, wrong,
                window, heads, width, rows.stride(0), tiles, TILE=_TILE, num_warps=4,
            )  # fmt: skip
    return ranked, wrong.bool()


def pooled_counts(
    scores: Float[Tensor, "batch heads width"], k: Int[Tensor, "batch"]
) -> tuple[Int[Tensor, "batch heads"], Float[Tensor, "batch"]]:
    """Per head, how many of its tokens reach its row's ``k``-th largest score, and that score.

    Twin: ``policies.allocation.heads.pooled_counts``.

    Args:
        scores: float32, no NaN.
        k: int64, all heads counted; below 1 or above the number of scores: the nearest of these.
    """
    batch, heads, width = scores.shape
    counts = torch.zeros(batch, heads, dtype=torch.int64, device=scores.device)
    thresholds = torch.empty(batch, dtype=torch.float32, device=scores.device)
    if counts.numel():
        rows = _rows(scores)
        together = triton.next_power_of_2(heads)
        tile = min(triton.next_power_of_2(width), max(1, _COUNT_ENTRIES // together))
        with launch.device_of(scores):
            _count[(batch,)](
                rows, k.contiguous(), counts, thresholds, heads, width, rows.stride(0),
                HEADS=together, TILE=tile, num_warps=16 if together * tile >= 8192 else 4,
            )  # fmt: skip
    return counts, thresholds


def select(
    scores: Float[Tensor, "batch heads width"], protected: Int[Tensor, "batch"], kept: Int[Tensor, "batch heads"]
) -> Int[Tensor, "batch heads width"]:
    """The tokens of each head that stay, in storage order, int32; 0 at and past ``kept``.

    A row's first ``protected`` tokens come before all others, then those of the highest scores; of equal scores the
    earlier stored one. Twin: ``cache.selection.select``.

    Args:
        scores: float32, no NaN.
        protected: int64.
        kept: int64, how many tokens of each head, at most ``width``.
    """
    batch, heads, width = scores.shape
    index = torch.empty(batch, heads, width, dtype=torch.int32, device=scores.device)
    if index.numel():
        rows = _rows(scores)
        with launch.device_of(scores):
            _select[(batch * heads,)](
                rows, protected.contiguous(), kept.contiguous(), index, heads, width, rows.stride(0),
                TILE=min(triton.next_power_of_2(width), _SELECT_TILE), num_warps=4,
            )  # fmt: skip
    return index


def _rows(scores: Float[Tensor, "batch heads width"]) -> Float[Tensor, "rows width"]:
    """One row for each head, a view where there is one."""
    rows = scores.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit(do_not_specialize=["window", "heads", "width", "stride", "tiles"])
def _rank(
    scores, lengths, protected, ranked, wrong, window, heads, width, stride, tiles, TILE: tl.constexpr
):  # fmt: skip
    """A tile of a head's scores."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + row)
    outside = tl.load(protected + row // heads)
    t = tile * TILE + tl.arange(0, TILE)
    score = tl.load(scores + row.to(tl.int64) * stride + t, mask=t < width, other=0.0).to(tl.float32)
    is_nan = score != score
    if tl.max((is_nan & (t < n)).to(tl.int32), 0) > 0:
        tl.store(wrong, 1)
    score = tl.minimum(tl.maximum(tl.where(is_nan, -_LARGEST, score), -_LARGEST), _LARGEST)
    score = tl.where(t >= n - window, float("inf"), score)
    score = tl.where((t < n) & (t >= outside), score, float("-inf"))
    tl.store(ranked + row.to(tl.int64) * width + t, score, mask=t < width)


@triton.jit
def _order(score):
    """Scores as whole numbers of the same order."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # one zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_heads(scores, at, heads, width, stride, HEADS: tl.constexpr, TILE: tl.constexpr):
    """``[HEADS, TILE]``: a tile of all heads' scores as whole numbers, and which of them exist."""
    head, t = tl.arange(0, HEADS)[:, None], at + tl.arange(0, TILE)[None, :]
    there = (head < heads) & (t < width)
    return _order(tl.load(scores + head.to(tl.int64) * stride + t, mask=there, other=0.0)), there


@triton.jit(do_not_specialize=["heads", "width", "stride"])
def _count(scores, k, counts, thresholds, heads, width, stride, HEADS: tl.constexpr, TILE: tl.constexpr):
    """One row of the batch: its k-th largest score, and how many tokens of each head reach it."""
    entry = tl.program_id(0)
    scores += entry.to(tl.int64) * heads * stride
    wanted = tl.minimum(tl.maximum(tl.load(k + entry), 1), heads.to(tl.int64) * width)
    first, in_first = _load_heads(scores, 0, heads, width, stride, HEADS, TILE)
    low = tl.full((), _LEAST, tl.int32)
    bit = tl.full((), _LEAST, tl.int32)
    for _ in range(32):
        attempt = low ^ bit
        reach = ((first >= attempt) & in_first).to(tl.int32)
        for at in range(TILE, width, TILE):
            order, there = _load_heads(scores, at, heads, width, stride, HEADS, TILE)
            reach += ((order >= attempt) & there).to(tl.int32)
        low = tl.where(tl.sum(reach) >= wanted, attempt, low)
        bit = (bit >> 1) & 0x7FFFFFFF
    reach = ((first >= low) & in_first).to(tl.int32)
    for at in range(TILE, width, TILE):
        order, there = _load_heads(scores, at, heads, width, stride, HEADS, TILE)
        reach += ((order >= low) & there).to(tl.int32)
    head = tl.arange(0, HEADS)
    tl.store(counts + entry * heads + head, tl.sum(reach, 1).to(tl.int64), mask=head < heads)
    tl.store(thresholds + entry, (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _load_row(scores, at, outside, width, TILE: tl.constexpr):
    """A tile of one head's scores as whole numbers, protected tokens above all, and which of them exist."""
    t = at + tl.arange(0, TILE)
    score = tl.load(scores + t, mask=t < width, other=0.0)
    return _order(tl.where(t < outside, float("inf"), score)), t < width


@triton.jit(do_not_specialize=["heads", "width", "stride"])
def _select(scores, protected, kept, index, heads, width, stride, TILE: tl.constexpr):
    """One head: its k-th largest score, then all above it and as many equal ones as there is room for."""
    row = tl.program_id(0)
    scores += row.to(tl.int64) * stride
    index += row.to(tl.int64) * width
    k = tl.load(kept + row).to(tl.int32)
    outside = tl.load(protected + row // heads)
    first, in_first = _load_row(scores, 0, outside, width, TILE)
    low = tl.full((), _LEAST, tl.int32)
    bit = tl.full((), _LEAST, tl.int32)
    for _ in range(32):
        attempt = low ^ bit
        reach = ((first >= attempt) & in_first).to(tl.int32)
        for at in range(TILE, width, TILE):
            order, there = _load_row(scores, at, outside, width, TILE)
            reach += ((order >= attempt) & there).to(tl.int32)
        low = tl.where(tl.sum(reach, 0) >= k, attempt, low)
        bit = (bit >> 1) & 0x7FFFFFFF
    above = ((first > low) & in_first).to(tl.int32)
    for at in range(TILE, width, TILE):
        order, there = _load_row(scores, at, outside, width, TILE)
        above += ((order > low) & there).to(tl.int32)
    room = k - tl.sum(above, 0)  # for scores that equal the k-th largest
    done = tl.full((), 0, tl.int32)
    for at in range(0, width, TILE):
        order, there = _load_row(scores, at, outside, width, TILE)
        equal = ((order == low) & there).to(tl.int32)
        stays = (((order > low) & there) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))).to(tl.int32)
        t = at + tl.arange(0, TILE)
        tl.store(index + done + tl.cumsum(stays, 0) - 1, t, mask=stays > 0)
        tl.store(index + t, 0, mask=(t >= k) & there)
        done += tl.sum(stays, 0)
        room -= tl.sum(equal, 0)
