"""One-query attention over ragged spans: split-K flash decoding, whatever the spans' lengths.

Every span is cut into chunks (``chunks.py``), and every chunk is a program. Chunks cover a span's *capacity*; those
behind its last token end at once. So the launch is the same at every step and needs nothing from the host, as a CUDA
graph asks for. A span's chunks are joined by the one of them that is done last, or by a second kernel.

The twin in plain torch: ``reasonalloc.cache.attention.rows``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.kernels.chunks import LayerChunks
from reasonalloc.kernels.launch import LEAST_WIDTH, device_of, padded
from reasonalloc.kernels.tiles import load_tile, widens

LOG2_E = log2(e)  # logits are in base 2
SHARED = 96 * 1024  # bytes of shared memory that tiles may take: what every GPU since Ampere has
_FEW, _MANY = 64, 512  # spans
_PIECES = 16  # chunks that are joined at once
_NUMBERS = ["starts", "lengths", "rows", "offsets", "first", "arrived"]  # read one by one: layers differ in alignment


@dataclass(frozen=True)
class Tuning:
    """How the kernels run.

    Attributes:
        chunk: slots of one program.
        tile: slots of one step of its loop.
        warps: warps of one program.
        stages: tiles in flight.
        fused: whether the chunk that is done last joins its span's chunks, or a kernel of its own.
    """

    chunk: int
    tile: int
    warps: int
    stages: int
    fused: bool


def chunk_for(spans: int) -> int:
    """Slots of one chunk, as ``tuning_for`` chooses them."""
    return 512 if spans >= _MANY else 256


def tuning_for(spans: int, dim: int, value_dim: int, element_size: int) -> Tuning:
    """What is fastest for so many spans.

    Few spans leave multiprocessors idle: small programs, and each of a span's heads joined by itself. Many spans are
    limited by memory alone: long chunks have few partial results.

    Raises:
        ValueError: heads so wide that not even a small tile of them fits into shared memory.
    """
    warps, stages = (2, 3) if spans <= _FEW else (4, 2)
    tile, stages = tile_for(LEAST_WIDTH, stages, dim, value_dim, element_size)
    return Tuning(chunk_for(spans), tile, warps, stages, fused=spans > _FEW)


def most_of(element_size: int) -> int:
    """Queries or slots of one product at most: float32 is multiplied in registers, where little has room."""
    return 128 // element_size


def tile_for(queries: int, stages: int, dim: int, value_dim: int, element_size: int) -> tuple[int, int]:
    """The most slots whose keys and values fit into shared memory beside the queries; and the stages then.

    Of the tiles in flight one is in registers. (On Hopper larger products read it from shared memory, of which
    there is twice as much.)

    Raises:
        ValueError: not even 16 fit.
    """
    widths = padded(dim) + padded(value_dim)
    for some in range(stages, 1, -1):
        for tile in (64, 32, 16):
            if tile <= most_of(element_size) and ((some - 1) * tile + queries) * widths * element_size <= SHARED:
                return tile, some
    raise ValueError(f"heads of {dim} and {value_dim} channels are too wide for the triton backend")


def attend(
    query: Float[Tensor, "rows query_heads 1 dim"],
    keys: Float[Tensor, "slots dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Int[Tensor, "rows heads"],
    lengths: Int[Tensor, "rows heads"],
    chunks: LayerChunks,
    tuning: Tuning,
    scaling: float,
    received: Float[Tensor, "places"] | None = None,
    received_starts: Int[Tensor, "rows heads"] | None = None,
) -> Float[Tensor, "rows query_heads 1 value_dim"]:
    """Attention of one query per row over all tokens of its spans. An empty span gives zeros.

    Nothing is read by the host, and the grids depend on shapes alone.

    Args:
        query: float32, float16 or bfloat16, as keys and values.
        keys, values: contiguous.
        starts, lengths: int64, first slot and tokens of each span.
        chunks: the spans' chunks, of ``tuning.chunk`` slots.
        tuning: see ``tuning_for``.
        scaling: factor of the logits.
        received: float32; to each token's place is added the attention that it gets, summed over query heads.
        received_starts: int64, the place of each span's first token.

    Raises:
        ValueError: the chunks have another size than the tuning says.
    """
    if chunks.chunk != tuning.chunk:
        raise ValueError(f"chunks of {chunks.chunk} slots, and kernels for chunks of {tuning.chunk}")
    spans, most = lengths.numel(), len(chunks.rows)
    group, dim, value_dim = query.shape[1] * query.shape[0] // spans, query.shape[-1], values.shape[-1]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty(most, group, value_dim, **float32)
    largest, total = torch.empty(2, most, group, **float32)
    log_sums = torch.empty(spans, group, **float32)
    out = torch.empty(*query.shape[:3], value_dim, dtype=query.dtype, device=query.device)
    query, starts, lengths = query.contiguous(), starts.contiguous(), lengths.contiguous()
    of_query = {"group": group, "dim": dim, "GROUP": padded(group), "DIM": padded(dim)}
    of_value = {"value_dim": value_dim, "VALUE_DIM": padded(value_dim)}
    sizes = {"CHUNK": tuning.chunk, "TILE": min(tuning.tile, tuning.chunk), "WIDEN": widens(query.dtype)}
    options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
    with device_of(query):
        _attend_chunk[(most,)](
            query, keys, values, starts, lengths, chunks.rows, chunks.offsets, chunks.first, chunks.arrived,
            partial, largest, total, out, log_sums, scaling * LOG2_E,
            **of_query, **of_value, **sizes, FUSED=tuning.fused, PIECES=_PIECES, **options,
        )  # fmt: skip
        if not tuning.fused:
            _join_chunks[(spans, group)](
                lengths, chunks.first, partial, largest, total, out, log_sums,
                group=group, **of_value, CHUNK=tuning.chunk, PIECES=_PIECES,
            )  # fmt: skip
        if received is not None:
            assert received_starts is not None
            _receive_chunk[(most,)](
                query, keys, starts, lengths, chunks.rows, chunks.offsets, log_sums, received,
                received_starts.contiguous(), scaling * LOG2_E, **of_query, **sizes, **options,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=_NUMBERS)
def _attend_chunk(
    query, keys, values, starts, lengths, rows, offsets, first, arrived, partial, largest, total, out, log_sums,
    scaling,
    group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr, FUSED: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One chunk's attention for all query heads of its span: unnormalised output, largest logit, sum of weights.

    Fused: the chunk of a span that is done last joins them all, and a span's only chunk needs no joining.
    An empty span's output is written here.
    """
    chunk = tl.program_id(0).to(tl.int64)
    span = tl.load(rows + chunk).to(tl.int64)
    offset = tl.load(offsets + chunk)
    length = tl.load(lengths + span).to(tl.int32)
    count = tl.minimum(length - offset, CHUNK)
    g, v, tile = tl.arange(0, GROUP), tl.arange(0, VALUE_DIM), tl.arange(0, TILE)
    in_group = g < group
    in_row = in_group[:, None] & (v < value_dim)[None, :]
    at_out = span * group + g
    if count <= 0:
        if offset == 0:
            nothing = tl.zeros([GROUP, VALUE_DIM], out.dtype.element_ty)
            tl.store(out + at_out[:, None] * value_dim + v[None, :], nothing, mask=in_row)
        return
    slot = tl.load(starts + span) + offset
    asked = load_tile(query, at_out, in_group, dim, DIM, WIDEN)
    chunk_keys, chunk_values = keys + slot * dim, values + slot * value_dim  # from here on 32 bits are enough
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, VALUE_DIM], tl.float32)
    for at in range(0, count, TILE):
        t = at + tile
        live = t < count
        key = load_tile(chunk_keys, t, live, dim, DIM, WIDEN)
        value = load_tile(chunk_values, t, live, value_dim, VALUE_DIM, WIDEN)
        logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        logits = tl.where(live[None, :], logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp2(highest - now)
        weights = tl.exp2(logits - now[:, None])
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        highest = now
    if FUSED:
        pieces = tl.cdiv(length, CHUNK)
        if pieces == 1:
            joined = (mixed / weight_sum[:, None]).to(out.dtype.element_ty)
            tl.store(out + at_out[:, None] * value_dim + v[None, :], joined, mask=in_row)
            tl.store(log_sums + at_out, highest + tl.log2(weight_sum), mask=in_group)
        else:
            _store_part(partial, largest, total, chunk, highest, weight_sum, mixed, group, value_dim, GROUP, VALUE_DIM)
            tl.debug_barrier()  # all of the program's stores come before its arrival
            before = tl.atomic_add(arrived + span, 1, sem="acq_rel", scope="gpu")
            if before == pieces - 1:
                tl.store(arrived + span, 0)
                for head in range(group):
                    _join(
                        span, head, pieces, first, partial, largest, total, out, log_sums, group, value_dim, VALUE_DIM,
                        PIECES,
                    )  # fmt: skip
    else:
        _store_part(partial, largest, total, chunk, highest, weight_sum, mixed, group, value_dim, GROUP, VALUE_DIM)


@triton.jit
def _store_part(
    partial, largest, total, chunk, highest, weight_sum, mixed,
    group: tl.constexpr, value_dim: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    g, v = tl.arange(0, GROUP), tl.arange(0, VALUE_DIM)
    at = chunk * group + g
    in_row = (g < group)[:, None] & (v < value_dim)[None, :]
    tl.store(largest + at, highest, mask=g < group)
    tl.store(total + at, weight_sum, mask=g < group)
    tl.store(partial + at[:, None] * value_dim + v[None, :], mixed, mask=in_row)


@triton.jit
def _join(
    span, head, pieces, first, partial, largest, total, out, log_sums,
    group: tl.constexpr, value_dim: tl.constexpr, VALUE_DIM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One query head's output from its span's chunks, and the logarithm of its sum of weights, in base 2."""
    piece, v = tl.arange(0, PIECES), tl.arange(0, VALUE_DIM)
    begin = tl.load(first + span).to(tl.int64)
    highest = float("-inf")
    weight_sum = 0.0
    mixed = tl.zeros([VALUE_DIM], tl.float32)
    for at in range(0, pieces, PIECES):
        there = at + piece < pieces
        part = (begin + at + piece) * group + head
        # Past the first-level cache: other programs wrote them.
        mine = tl.load(largest + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(total + part, mask=there, other=0.0, cache_modifier=".cg")
        in_row = there[:, None] & (v < value_dim)[None, :]
        parts = tl.load(partial + part[:, None] * value_dim + v[None, :], mask=in_row, other=0.0, cache_modifier=".cg")
        now = tl.maximum(highest, tl.max(mine, 0))
        shrink = tl.exp2(highest - now)
        grow = tl.exp2(mine - now)
        mixed = mixed * shrink + tl.sum(parts * grow[:, None], 0)
        weight_sum = weight_sum * shrink + tl.sum(sums * grow, 0)
        highest = now
    at_out = span * group + head
    tl.store(out + at_out * value_dim + v, (mixed / weight_sum).to(out.dtype.element_ty), mask=v < value_dim)
    tl.store(log_sums + at_out, highest + tl.log2(weight_sum))


@triton.jit(do_not_specialize_on_alignment=["lengths", "first"])
def _join_chunks(
    lengths, first, partial, largest, total, out, log_sums,
    group: tl.constexpr, value_dim: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One query head of one span."""
    span, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pieces = tl.cdiv(tl.load(lengths + span).to(tl.int32), CHUNK)
    if pieces > 0:
        _join(
            span, head, pieces, first, partial, largest, total, out, log_sums, group, value_dim, VALUE_DIM, PIECES
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["starts", "lengths", "rows", "offsets", "places"])
def _receive_chunk(
    query, keys, starts, lengths, rows, offsets, log_sums, received, places, scaling,
    group: tl.constexpr, dim: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add to each token the attention it got from its span's query heads. A slot has one owner: no atomics."""
    chunk = tl.program_id(0)
    span = tl.load(rows + chunk).to(tl.int64)
    offset = tl.load(offsets + chunk)
    count = tl.minimum(tl.load(lengths + span).to(tl.int32) - offset, CHUNK)
    if count <= 0:
        return
    g, tile = tl.arange(0, GROUP), tl.arange(0, TILE)
    in_group = g < group
    asked = load_tile(query, span * group + g, in_group, dim, DIM, WIDEN)
    log_sum = tl.load(log_sums + span * group + g, mask=in_group, other=0.0)
    chunk_keys = keys + (tl.load(starts + span) + offset) * dim
    chunk_places = received + tl.load(places + span) + offset
    for at in range(0, count, TILE):
        t = at + tile
        live = t < count
        key = load_tile(chunk_keys, t, live, dim, DIM, WIDEN)
        logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        weights = tl.exp2(tl.where(in_group[:, None] & live[None, :], logits - log_sum[:, None], float("-inf")))
        old = tl.load(chunk_places + t, mask=live, other=0.0)
        tl.store(chunk_places + t, old + tl.sum(weights, 0), mask=live)
