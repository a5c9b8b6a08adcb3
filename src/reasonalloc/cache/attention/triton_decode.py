"""One-query attention over ragged spans on CUDA, by Triton kernels of our own: split-K flash decoding, any lengths.

A (sequence, KV head) row is cut into chunks of equally many slots, and every chunk is a program: rows of very unequal
length keep all multiprocessors busy. Chunks cover a span's *capacity*, so their table changes only when a routing moves
the spans; those beyond the live tokens end at once. Between compressions the launch is the same at every step and
needs nothing from the host, which is what a CUDA graph asks for. A second kernel joins the chunks of a row.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.spans import Spans
from reasonalloc.cache.table import on_device

_CHUNK = 256  # slots of one program
_STAGES = 2  # tiles in flight
_SHARED = 96 * 1024  # bytes of shared memory that tiles may take: what every GPU since Ampere has
_LEAST_ROWS = 16  # of a matrix product on tensor cores
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU; its matrix product cannot read bfloat16


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of all rows, on the device.

    Attributes:
        rows: the row that each chunk belongs to.
        offsets: its first slot, counted from the row's first one.
        first: the first chunk of each row, and the number of chunks at the end.
        chunk: slots of one chunk.
    """

    rows: Int[Tensor, "chunks"]
    offsets: Int[Tensor, "chunks"]
    first: Int[Tensor, "rows_and_end"]
    chunk: int

    @classmethod
    def of(cls, spans: Spans, chunk: int) -> ChunkTable:
        """From the host's mirror of the spans; copied to the device without waiting for it."""
        counts = np.maximum(-(-spans.capacities.reshape(-1) // chunk), 1)
        first = np.concatenate([[0], counts.cumsum()])
        rows = np.repeat(np.arange(len(counts)), counts)
        offsets = (np.arange(first[-1]) - first[rows]) * chunk
        on_rows, at, firsts = (on_device(x.astype(np.int32), spans.keys.device) for x in (rows, offsets, first))
        return cls(on_rows, at, firsts, chunk)


class TritonDecode:
    """The backend; remembers the chunk table of every layer's spans for as long as these stay where they are."""

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Spans, ChunkTable] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        """A copy remembers nothing: it has spans of its own."""
        return TritonDecode, ()

    def __call__(
        self, query: Float[Tensor, "batch query_heads 1 dim"], spans: Spans, scaling: float
    ) -> Float[Tensor, "batch query_heads 1 value_dim"]:
        """Attention of one query per sequence over all tokens of its rows; adds to ``spans.received`` if tracked."""
        table = self._tables.get(spans)
        if table is None:
            table = self._tables[spans] = ChunkTable.of(spans, _CHUNK)
        return attend_chunks(query, spans, scaling, table)


def attend_chunks(
    query: Float[Tensor, "batch query_heads 1 dim"], spans: Spans, scaling: float, table: ChunkTable
) -> Float[Tensor, "batch query_heads 1 value_dim"]:
    """As ``TritonDecode``, with a table at hand.

    Raises:
        ValueError: heads so wide that not even a small tile of them fits into shared memory.
    """
    rows, chunks = spans.rows * spans.heads, len(table.rows)
    group, dim, value_dim = query.shape[1] // spans.heads, query.shape[-1], spans.values.shape[-1]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty(chunks, group, value_dim, **float32)
    largest, total = torch.empty(2, chunks, group, **float32)
    log_sums = torch.empty(rows, group, **float32)
    out = torch.empty(*query.shape[:3], value_dim, dtype=query.dtype, device=query.device)
    query = query.contiguous()
    starts, lengths = spans.starts_device.flatten(), spans.lengths_device.flatten()
    sizes = {
        "group": group,
        "dim": dim,
        "value_dim": value_dim,
        "GROUP": max(_LEAST_ROWS, triton.next_power_of_2(group)),
        "DIM": max(16, triton.next_power_of_2(dim)),
        "WIDEN": _INTERPRETED and query.dtype == torch.bfloat16,
    }
    wide = {"VALUE_DIM": max(16, triton.next_power_of_2(value_dim))}
    tiles = {
        "CHUNK": table.chunk,
        "TILE": min(tile_of(dim, value_dim, query.element_size()), table.chunk),
        "num_stages": _STAGES,
    }
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        _attend_chunk[(chunks,)](
            query, spans.keys, spans.values, starts, lengths, table.rows, table.offsets, partial, largest, total,
            scaling, **sizes, **wide, **tiles,
        )  # fmt: skip
        _join_chunks[(rows, group)](
            partial, largest, total, table.first, out, log_sums, group=group, value_dim=value_dim, **wide
        )
        if spans.received is not None:
            _receive_chunk[(chunks,)](
                query, spans.keys, starts, lengths, table.rows, table.offsets, log_sums, spans.received,
                spans.received_starts_device.flatten(), scaling,
                **{name: size for name, size in sizes.items() if name != "value_dim"}, **tiles,
            )  # fmt: skip
    return out


def tile_of(dim: int, value_dim: int, element_size: int) -> int:
    """Slots of one step of a program's loop: the most whose keys and values fit into shared memory, up to 64.

    Raises:
        ValueError: not even 16 fit.
    """
    widths = max(16, triton.next_power_of_2(dim)) + max(16, triton.next_power_of_2(value_dim))
    queries = _LEAST_ROWS * widths * element_size  # room for a group's queries and its weights
    for tile in (64, 32, 16):
        if _STAGES * tile * widths * element_size + queries <= _SHARED:
            return tile
    raise ValueError(f"heads of {dim} and {value_dim} channels are too wide for the triton backend: use 'rows'")


@triton.jit
def _chunk(chunk, starts, lengths, rows, offsets, CHUNK: tl.constexpr):
    """A chunk's row, the row's first slot, and the chunk's first token and the one behind its last live one."""
    row = tl.load(rows + chunk)
    offset = tl.load(offsets + chunk)
    return row, tl.load(starts + row), offset, tl.minimum(tl.load(lengths + row), offset + CHUNK)


@triton.jit
def _queries(
    query, row, group: tl.constexpr, dim: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """The queries of a row's group, zeros beyond its heads and channels."""
    g, d = tl.arange(0, GROUP)[:, None], tl.arange(0, DIM)[None, :]
    asked = tl.load(query + (row * group + g) * dim + d, mask=(g < group) & (d < dim), other=0.0)
    return asked.to(tl.float32) if WIDEN else asked


@triton.jit
def _logits(asked, keys, slot, live, scaling, dim: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr):
    """Scaled products of a group's queries with the keys in these slots; those that are not live mean nothing."""
    d = tl.arange(0, DIM)[None, :]
    key = tl.load(keys + slot[:, None] * dim + d, mask=live[:, None] & (d < dim), other=0.0)
    if WIDEN:
        key = key.to(tl.float32)
    return tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling


@triton.jit
def _attend_chunk(
    query, keys, values, starts, lengths, rows, offsets, partial, largest, total, scaling,
    group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One chunk's attention for all query heads of its row: unnormalised output, largest logit, sum of weights."""
    chunk = tl.program_id(0)
    row, start, offset, last = _chunk(chunk, starts, lengths, rows, offsets, CHUNK)
    g, v = tl.arange(0, GROUP), tl.arange(0, VALUE_DIM)
    in_group = g < group
    asked = _queries(query, row, group, dim, GROUP, DIM, WIDEN)
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, VALUE_DIM], tl.float32)
    for at in range(offset, last, TILE):
        t = at + tl.arange(0, TILE)
        live = t < last
        slot = start + t
        logits = _logits(asked, keys, slot, live, scaling, dim, DIM, WIDEN)
        logits = tl.where(live[None, :], logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp(highest - now)
        weights = tl.exp(logits - now[:, None])
        has_value = live[:, None] & (v[None, :] < value_dim)
        value = tl.load(values + slot[:, None] * value_dim + v[None, :], mask=has_value, other=0.0)
        if WIDEN:
            value = value.to(tl.float32)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        highest = now
    at_group = chunk * group + g
    tl.store(largest + at_group, highest, mask=in_group)
    tl.store(total + at_group, weight_sum, mask=in_group)
    tl.store(
        partial + at_group[:, None] * value_dim + v[None, :], mixed, mask=in_group[:, None] & (v[None, :] < value_dim)
    )


@triton.jit
def _join_chunks(
    partial, largest, total, first, out, log_sums, group: tl.constexpr, value_dim: tl.constexpr, VALUE_DIM: tl.constexpr
):  # fmt: skip
    """One query head's output from its row's chunks, and the logarithm of its sum of weights. Empty chunks add 0."""
    row, g = tl.program_id(0), tl.program_id(1)
    v = tl.arange(0, VALUE_DIM)
    highest = float("-inf")
    weight_sum = 0.0
    mixed = tl.zeros([VALUE_DIM], tl.float32)
    for chunk in range(tl.load(first + row), tl.load(first + row + 1)):
        mine = tl.load(largest + chunk * group + g)
        if mine > float("-inf"):
            now = tl.maximum(highest, mine)
            shrink, grow = tl.exp(highest - now), tl.exp(mine - now)
            part = tl.load(partial + (chunk * group + g) * value_dim + v, mask=v < value_dim, other=0.0)
            mixed = mixed * shrink + part * grow
            weight_sum = weight_sum * shrink + tl.load(total + chunk * group + g) * grow
            highest = now
    at = row * group + g
    tl.store(out + at * value_dim + v, (mixed / weight_sum).to(out.dtype.element_ty), mask=v < value_dim)
    tl.store(log_sums + at, highest + tl.log(weight_sum))


@triton.jit
def _receive_chunk(
    query, keys, starts, lengths, rows, offsets, log_sums, received, places, scaling,
    group: tl.constexpr, dim: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add to each token the attention it got from its row's query heads. A slot has one owner: no atomics."""
    chunk = tl.program_id(0)
    row, start, offset, last = _chunk(chunk, starts, lengths, rows, offsets, CHUNK)
    g = tl.arange(0, GROUP)
    in_group = g < group
    asked = _queries(query, row, group, dim, GROUP, DIM, WIDEN)
    log_sum = tl.load(log_sums + row * group + g, mask=in_group, other=0.0)
    for at in range(offset, last, TILE):
        t = at + tl.arange(0, TILE)
        live = t < last
        slot = start + t
        logits = _logits(asked, keys, slot, live, scaling, dim, DIM, WIDEN)
        weights = tl.where(in_group[:, None], tl.exp(logits - log_sum[:, None]), 0.0)
        place = tl.load(places + row) + t
        old = tl.load(received + place, mask=live, other=0.0)
        tl.store(received + place, old + tl.sum(weights, 0), mask=live)
