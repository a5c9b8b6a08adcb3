"""Attention of several queries a row over ragged spans: a prompt's later chunk, a new turn, speculated tokens.

A program serves a block of queries of one span, all heads of its group together, and reads the tokens that the block
sees tile by tile, with a running softmax. What tokens receive is summed by a second kernel, a program a tile of them.

The twin in plain torch: ``reasonalloc.cache.attention.rows``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.kernels.decode_attention import LOG2_E, most_of, tile_for
from reasonalloc.kernels.launch import device_of, padded
from reasonalloc.kernels.tiles import load_tile, widens

_WARPS, _STAGES = 4, 2


@dataclass(frozen=True)
class Blocks:
    """How the kernels cut queries and tokens.

    Attributes:
        block: queries of one program, each head of a group counted.
        tile: tokens of one step.
    """

    block: int
    tile: int


def blocks_for(queries: int, dim: int, value_dim: int, element_size: int) -> Blocks:
    """The largest blocks of these queries and of tokens that fit into shared memory.

    Raises:
        ValueError: heads so wide that not even a small tile of them fits.
    """
    block = min(most_of(element_size), padded(queries))
    while block > 16:
        try:
            return Blocks(block, tile_for(block, _STAGES, dim, value_dim, element_size)[0])
        except ValueError:
            block //= 2
    return Blocks(block, tile_for(block, _STAGES, dim, value_dim, element_size)[0])


def attend_chunk(
    query: Float[Tensor, "rows query_heads queries dim"],
    keys: Float[Tensor, "slots dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Int[Tensor, "rows heads"],
    lengths: Int[Tensor, "rows heads"],
    hidden: Int[Tensor, "rows queries"],
    blocks: Blocks,
    scaling: float,
) -> Float[Tensor, "rows query_heads queries value_dim"]:
    """Attention of each query over its spans but their newest ``hidden`` tokens; of one token at least.

    Args:
        query: float32, float16 or bfloat16, as keys and values.
        keys, values: of all slots.
        starts, lengths: int64, first slot and tokens of each span.
        hidden: int64; -1 marks padding, whose output has no meaning.
        blocks: see ``blocks_for``.
        scaling: factor of the logits.
    """
    out = torch.empty(*query.shape[:3], values.shape[-1], dtype=query.dtype, device=query.device)
    log_sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _attend(query, keys, values, starts, lengths, hidden, blocks, scaling, out, log_sums)
    return out


def receive_chunk(
    query: Float[Tensor, "rows query_heads queries dim"],
    keys: Float[Tensor, "slots dim"],
    starts: Int[Tensor, "rows heads"],
    lengths: Int[Tensor, "rows heads"],
    hidden: Int[Tensor, "rows queries"],
    blocks: Blocks,
    scaling: float,
    received: Float[Tensor, "places"],
    received_starts: Int[Tensor, "rows heads"],
    longest: int,
) -> None:
    """Add to each token's place in ``received`` the attention that it gets from these queries, summed over query heads.

    Arguments as those of ``attend_chunk``; padding gives nothing.

    Args:
        received: float32.
        received_starts: int64, the place of each span's first token.
        longest: no span is longer.
    """
    log_sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    query, keys, hidden = query.contiguous(), keys.contiguous(), hidden.contiguous()
    starts, lengths = starts.contiguous(), lengths.contiguous()
    _attend(query, keys, None, starts, lengths, hidden, blocks, scaling, None, log_sums)
    tiles = triton.cdiv(longest, blocks.tile)
    if not tiles * lengths.numel():
        return
    with device_of(query):
        _receive_tile[(tiles * lengths.numel(),)](
            query, keys, starts, lengths, hidden, log_sums, received, received_starts.contiguous(), scaling * LOG2_E,
            query.shape[2], tiles, **_sizes(query, lengths, blocks),
        )  # fmt: skip


def _attend(
    query: Tensor, keys: Tensor, values: Tensor | None, starts: Tensor, lengths: Tensor, hidden: Tensor, blocks: Blocks,
    scaling: float, out: Tensor | None, log_sums: Tensor,
) -> None:  # fmt: skip
    """Without values only the logarithms of the sums of weights are computed."""
    sizes, spans, queries = _sizes(query, lengths, blocks), lengths.numel(), query.shape[2]
    cuts = triton.cdiv(sizes["group"] * queries, blocks.block)
    if not spans * cuts:
        return
    value_dim = 1 if values is None else values.shape[-1]
    with device_of(query):
        _attend_block[(spans * cuts,)](
            query.contiguous(), keys.contiguous(), keys if values is None else values.contiguous(), starts.contiguous(),
            lengths.contiguous(), hidden.contiguous(), log_sums if out is None else out, log_sums, scaling * LOG2_E,
            queries, cuts, **sizes, value_dim=value_dim, VALUE_DIM=padded(value_dim), MIXES=values is not None,
        )  # fmt: skip


def _sizes(query: Tensor, lengths: Tensor, blocks: Blocks) -> dict[str, Any]:
    heads, dim = lengths.shape[1], query.shape[-1]
    return {
        "heads": heads,
        "group": query.shape[1] // heads,
        "dim": dim,
        "DIM": padded(dim),
        "BLOCK": blocks.block,
        "TILE": blocks.tile,
        "WIDEN": widens(query.dtype),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }


@triton.jit
def _block(hidden, span, length, queries, at, heads: tl.constexpr, group: tl.constexpr, BLOCK: tl.constexpr):
    """Queries ``at`` onwards of a span, a group's heads side by side.

    Returns where each lies, how many tokens it sees, whether it is there, and whether it is not padding. Padding, and
    what is not there, sees one token, for the sums to be defined.
    """
    m = at + tl.arange(0, BLOCK)
    q = (m // group).to(tl.int64)
    there = q < queries
    unseen = tl.load(hidden + (span // heads) * queries + q, mask=there, other=-1).to(tl.int32)
    real = unseen >= 0
    sees = tl.minimum(tl.where(real, tl.maximum(length - unseen, 1), 1), length)
    return (span * group + m % group) * queries + q, sees, there, real


@triton.jit(do_not_specialize=["queries", "cuts"])
def _attend_block(
    query, keys, values, starts, lengths, hidden, out, log_sums, scaling, queries, cuts,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
    MIXES: tl.constexpr,
):  # fmt: skip
    """One block of queries against the tokens that any of them sees."""
    program = tl.program_id(0)
    span = (program // cuts).to(tl.int64)
    length = tl.load(lengths + span).to(tl.int32)
    at, sees, there, _ = _block(hidden, span, length, queries, program % cuts * BLOCK, heads, group, BLOCK)
    asked = load_tile(query, at, there, dim, DIM, WIDEN)
    slot = tl.load(starts + span)
    span_keys, span_values = keys + slot * dim, values + slot * value_dim  # from here on 32 bits are enough
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, VALUE_DIM], tl.float32)
    for token in range(0, tl.max(sees, 0), TILE):
        t = token + tl.arange(0, TILE)
        live = t < length
        key = load_tile(span_keys, t, live, dim, DIM, WIDEN)
        logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        logits = tl.where(t[None, :] < sees[:, None], logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, 1))  # finite: everyone sees the first token
        shrink = tl.exp2(highest - now)
        weights = tl.exp2(logits - now[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        if MIXES:
            value = load_tile(span_values, t, live, value_dim, VALUE_DIM, WIDEN)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = now
    tl.store(log_sums + at, highest + tl.log2(weight_sum), mask=there)
    if MIXES:
        v = tl.arange(0, VALUE_DIM)
        mixed = mixed / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
        in_row = there[:, None] & (v < value_dim)[None, :]
        tl.store(out + at[:, None] * value_dim + v[None, :], mixed.to(out.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["queries", "tiles"])
def _receive_tile(
    query, keys, starts, lengths, hidden, log_sums, received, places, scaling, queries, tiles,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add to a tile of one span's tokens what all queries give them. A place has one owner: no atomics."""
    program = tl.program_id(0)
    span = (program // tiles).to(tl.int64)
    token = program % tiles * TILE
    length = tl.load(lengths + span).to(tl.int32)
    if token >= length:
        return
    t = token + tl.arange(0, TILE)
    live = t < length
    key = load_tile(keys + tl.load(starts + span) * dim, t, live, dim, DIM, WIDEN)
    given = tl.zeros([TILE], tl.float32)
    for begin in range(0, group * queries, BLOCK):
        at, sees, there, real = _block(hidden, span, length, queries, begin, heads, group, BLOCK)
        if tl.max(sees, 0) > token:
            asked = load_tile(query, at, there, dim, DIM, WIDEN)
            log_sum = tl.load(log_sums + at, mask=there, other=0.0)
            logits = tl.dot(key, tl.trans(asked), input_precision="ieee") * scaling
            gives = (t[:, None] < sees[None, :]) & real[None, :]
            given += tl.sum(tl.exp2(tl.where(gives, logits - log_sum[None, :], float("-inf"))), 1)
    place = received + tl.load(places + span) + t
    tl.store(place, tl.load(place, mask=live, other=0.0) + given, mask=live)
