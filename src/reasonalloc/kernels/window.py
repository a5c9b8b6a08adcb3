"""Attention of the last queries over ragged keys, pooled over neighbours: the importance of SnapKV and R-KV.

A span is the tokens of one (entry of the batch, head); its keys are read where they lie, twice: once for each query's
largest logit and sum of weights, once for the weights themselves. Numbers of tokens are padded: ``[spans, stride]``.

Twin: ``policies.scoring.window_attention.pooled_importance``.
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
from reasonalloc.kernels.tiles import load_tile, widens

_ROUND = 128  # scratch is padded to a multiple of it: whole lines of memory
_QUERY_BYTES = 16 * 1024  # of shared memory that the queries of a program take
_POOL_TILE = 1024


def pooled_importance(
    keys: Float[Tensor, "slots dim"],
    starts: Int[Tensor, "batch heads"],
    lengths: Int[Tensor, "batch heads"],
    width: int,
    queries: Float[Tensor, "batch query_heads observed dim"],
    real: Bool[Tensor, "batch observed"] | None,
    window: int,
    scaling: float,
    kernel: int,
) -> Float[Tensor, "batch heads width"]:
    """Attention of the observed queries over the tokens outside the window, float32; 0 elsewhere.

    The maximum over a group's query heads is taken on the logits, then the softmax, the mean over the real queries, and
    the maximum of ``kernel`` neighbours. Launches three kernels and waits for nothing.

    Args:
        keys: contiguous; bfloat16, float16 or float32, at most 256 channels.
        starts: first slot of each span, int64.
        lengths: its tokens, int64, at most ``width``.
        width: tokens of the result.
        queries: oldest first, in the dtype of the keys.
        real: which of them exist; None: all.
        window: newest tokens that count for nothing.
        scaling: factor of the logits.
        kernel: odd.
    """
    batch, heads = lengths.shape
    pooled = torch.zeros(batch, heads, width, dtype=torch.float32, device=keys.device)
    if not pooled.numel():
        return pooled
    spans, stride = batch * heads, stride_of(width)
    attention = WindowAttention.of(queries, real, heads)
    sizes, tile = key_sizes(keys), tile_of(keys)
    starts, lengths = starts.contiguous(), lengths.contiguous()
    weights = torch.empty(spans, stride, dtype=torch.float32, device=keys.device)
    numbers = (attention.states, attention.largest, attention.totals)
    with launch.device_of(keys):
        _statistics[(spans, attention.blocks)](
            keys, starts, lengths, *numbers, float(scaling), window,
            **attention.sizes, **sizes, **tile, num_stages=2,
        )  # fmt: skip
        tiles = triton.cdiv(width, tile["TILE"])
        _weigh[(spans * tiles,)](
            keys, starts, lengths, *numbers, attention.shares, weights, float(scaling), window, heads, stride, tiles,
            **attention.sizes, **sizes, BLOCKS=attention.blocks, **tile,
        )  # fmt: skip
        tiles = triton.cdiv(width, _POOL_TILE)
        _pool[(spans * tiles,)](
            weights, lengths, pooled, window, width, stride, tiles, KERNEL=kernel, TILE=_POOL_TILE, num_warps=4
        )
    return pooled


@dataclass(frozen=True)
class WindowAttention:
    """Observed queries, and what the first read of the keys finds out of each.

    A program holds a block of queries, each beside the same query of the group's other heads. All fit one block, but
    for wide heads or large groups.

    Attributes:
        states: the queries, contiguous.
        shares: ``[batch, observed]`` float32, weight of each query in the mean; 0 where there is none.
        largest, totals: ``[spans, blocks * ASKED]`` float32, the largest logit and the sum of weights: scratch.
        blocks: of queries.
        sizes: what all kernels must be told of the shape.
    """

    states: Tensor
    shares: Tensor
    largest: Tensor
    totals: Tensor
    blocks: int
    sizes: dict[str, int]

    @classmethod
    def of(
        cls,
        queries: Float[Tensor, "batch query_heads observed dim"],
        real: Bool[Tensor, "batch observed"] | None,
        heads: int,
    ) -> WindowAttention:
        """For the queries of a batch, each key head serving ``query_heads / heads`` of them."""
        batch, query_heads, observed, dim = queries.shape
        group = query_heads // heads
        most = max(launch.LEAST_WIDTH, _QUERY_BYTES // (launch.padded(dim) * queries.element_size()))
        together = triton.next_power_of_2(group)
        asked = min(triton.next_power_of_2(observed), max(1, most // together))
        together = max(together, launch.LEAST_WIDTH // asked)
        blocks = triton.cdiv(observed, asked)
        scratch = torch.empty(2, batch * heads, blocks * asked, dtype=torch.float32, device=queries.device)
        if real is None:
            shares = torch.full((batch, observed), 1 / observed, dtype=torch.float32, device=queries.device)
        else:
            shares = real.float() / real.sum(-1, keepdim=True).clamp(min=1)
        sizes = {"group": group, "observed": observed, "GROUP": together, "ASKED": asked}
        return cls(queries.contiguous(), shares, scratch[0], scratch[1], blocks, sizes)


def stride_of(width: int) -> int:
    """From one span's scratch to the next one's."""
    return -(-width // _ROUND) * _ROUND


def key_sizes(keys: Float[Tensor, "slots dim"]) -> dict[str, Any]:
    """What a kernel must be told of the keys."""
    return {
        "dim": keys.shape[1],
        "DIM": launch.padded(keys.shape[1]),
        "WIDEN": widens(keys.dtype),
        "PRECISION": "ieee",
    }


def tile_of(keys: Float[Tensor, "slots dim"]) -> dict[str, int]:
    """Keys of one step, and the warps that share them.

    32 KiB of keys for tensor cores. Exact float32 products are not made there: a thread holds whole rows of both sides.
    """
    dim = launch.padded(keys.shape[1])
    if keys.dtype == torch.float32:
        return {"TILE": max(16, min(64, 4096 // dim)), "num_warps": 8}
    return {"TILE": min(128, 16384 // dim), "num_warps": 4}


# ---- device functions, also R-KV's ----


@triton.jit
def load_queries(
    queries, span, block, group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of a span's queries, ``[DIM, ASKED * GROUP]``, the heads of one query side by side.

    The last head fills up the group: it changes no maximum, and hides no logit that is not a number.
    """
    column = tl.arange(0, ASKED * GROUP)
    query, head = block * ASKED + column // GROUP, tl.minimum(column % GROUP, group - 1)
    d = tl.arange(0, DIM)
    there = (query < observed)[None, :] & (d < dim)[:, None]
    first = queries + span.to(tl.int64) * (group * observed * dim)
    asked = tl.load(first + ((head * observed + query) * dim)[None, :] + d[:, None], mask=there, other=0.0)
    return asked.to(tl.float32) if WIDEN else asked


@triton.jit
def group_logits(
    key, asked, scaling, GROUP: tl.constexpr, ASKED: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``[TILE, ASKED]``: the largest scaled logit over a group's heads."""
    logits = tl.dot(key, asked, input_precision=PRECISION) * scaling
    return tl.max(tl.reshape(logits, [TILE, ASKED, GROUP]), 2)


@triton.jit
def seen_by(block, n, window, observed: tl.constexpr, ASKED: tl.constexpr):
    """``[ASKED]``: how many of a span's first tokens each query could see and the window does not hold."""
    query = block * ASKED + tl.arange(0, ASKED)
    return tl.where(query < observed, tl.minimum(n - window, n - (observed - 1 - query)), 0)


@triton.jit
def add_to_softmax(logits, largest, total):
    """Largest logit and sum of weights of each query, these logits counted in."""
    now = tl.maximum(largest, tl.max(logits, 0))
    at = tl.where(now == float("-inf"), 0.0, now)
    return now, total * tl.exp(largest - at) + tl.sum(tl.exp(logits - at[None, :]), 0)


@triton.jit
def mean_weight(
    key, t, n, span, queries, largest, totals, shares, scaling, window, heads,
    group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr, BLOCKS: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``[TILE]``: attention to tokens ``t``, averaged over the queries that exist."""
    mean = tl.zeros([TILE], tl.float32)
    for block in tl.static_range(BLOCKS):
        asked = load_queries(queries, span, block, group, observed, GROUP, ASKED, dim, DIM, WIDEN)
        logits = group_logits(key, asked, scaling, GROUP, ASKED, TILE, PRECISION)
        query = block * ASKED + tl.arange(0, ASKED)
        top = tl.load(largest + span * (BLOCKS * ASKED) + query)
        total = tl.load(totals + span * (BLOCKS * ASKED) + query)
        share = tl.load(shares + (span // heads) * observed + query, mask=query < observed, other=0.0)
        share = tl.where(total == 0.0, 0.0, share / tl.where(total == 0.0, 1.0, total))
        weights = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[None, :]) * share[None, :]
        counts = (t[:, None] < seen_by(block, n, window, observed, ASKED)[None, :]) & (share != 0.0)[None, :]
        mean += tl.sum(tl.where(counts, weights, 0.0), 1)
    return mean


@triton.jit
def largest_nearby(weights, t, n, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """Running maximum over ``KERNEL`` neighbours of a span's weights, which are not negative."""
    pooled = tl.zeros([TILE], tl.float32)
    for shift in range(KERNEL):
        near = t + shift - KERNEL // 2
        weight = tl.load(weights + near, mask=(near >= 0) & (near < n), other=0.0)
        pooled = tl.maximum(pooled, weight, propagate_nan=tl.PropagateNan.ALL)
    return pooled


# ---- kernels ----


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["largest", "totals"])
def _statistics(
    keys, starts, lengths, queries, largest, totals, scaling, window,
    group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of a span's queries: largest logit and sum of weights, in one read of the keys."""
    span, block = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + span).to(tl.int32)
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    asked = load_queries(queries, span, block, group, observed, GROUP, ASKED, dim, DIM, WIDEN)
    limit = seen_by(block, n, window, observed, ASKED)
    top = tl.full([ASKED], float("-inf"), tl.float32)
    total = tl.zeros([ASKED], tl.float32)
    for at in range(0, n, TILE):
        t = at + tl.arange(0, TILE)
        key = load_tile(first, t, t < n, dim, DIM, WIDEN)
        logits = group_logits(key, asked, scaling, GROUP, ASKED, TILE, PRECISION)
        top, total = add_to_softmax(tl.where(t[:, None] < limit[None, :], logits, float("-inf")), top, total)
    query = (span * tl.num_programs(1) + block) * ASKED + tl.arange(0, ASKED)
    tl.store(largest + query, top)
    tl.store(totals + query, total)


@triton.jit(
    do_not_specialize=["window", "heads", "stride", "tiles"], do_not_specialize_on_alignment=["largest", "totals"]
)
def _weigh(
    keys, starts, lengths, queries, largest, totals, shares, weights, scaling, window, heads, stride, tiles,
    group: tl.constexpr, observed: tl.constexpr, GROUP: tl.constexpr, ASKED: tl.constexpr, BLOCKS: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean attention of a tile of a span's tokens."""
    span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + span).to(tl.int32)
    if tile * TILE >= n:
        return
    first = keys + tl.load(starts + span).to(tl.int64) * dim
    t = tile * TILE + tl.arange(0, TILE)
    key = load_tile(first, t, t < n, dim, DIM, WIDEN)
    mean = mean_weight(
        key, t, n, span, queries, largest, totals, shares, scaling, window, heads,
        group, observed, GROUP, ASKED, BLOCKS, dim, DIM, WIDEN, PRECISION, TILE,
    )  # fmt: skip
    tl.store(weights + span.to(tl.int64) * stride + t, mean, mask=t < n)


@triton.jit(do_not_specialize=["window", "width", "stride", "tiles"])
def _pool(weights, lengths, pooled, window, width, stride, tiles, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """The running maximum of a tile's tokens; what the window holds stays as it is."""
    span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.load(lengths + span).to(tl.int32)
    if tile * TILE >= n:
        return
    t = tile * TILE + tl.arange(0, TILE)
    best = largest_nearby(weights + span.to(tl.int64) * stride, t, n, KERNEL, TILE)
    tl.store(pooled + span.to(tl.int64) * width + t, best, mask=t < n - window)
