"""Attention over ragged spans on CUDA, by the Triton kernels of ``reasonalloc.kernels``."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.spans import Spans
from reasonalloc.kernels import chunk_attention, decode_attention
from reasonalloc.kernels.chunks import ChunkTable, LayerChunks


def make_table(layers: int, rows: int, heads: int, slots: int, device: torch.device) -> ChunkTable:
    """As ``AttentionBackend.table``."""
    spans = rows * heads
    return ChunkTable(layers, spans, decode_attention.chunk_for(spans), slots, device)


def attend(
    query: Float[Tensor, "rows query_heads 1 dim"], spans: Spans, scaling: float
) -> Float[Tensor, "rows query_heads 1 value_dim"]:
    """As ``AttentionBackend.attend``. Spans without a chunk table get one for this call."""
    widths = (query.shape[-1], spans.values.shape[-1], query.element_size())
    tuning = decode_attention.tuning_for(spans.rows * spans.heads, *widths)
    if spans.chunks is not None:  # made for a server's most requests, of which fewer may decode
        tuning = replace(tuning, chunk=spans.chunks.chunk)
    return decode_attention.attend(
        query, spans.keys, spans.values, spans.starts_device, spans.lengths_device,
        spans.chunks or _chunks(spans, tuning.chunk), tuning, scaling, spans.received, spans.received_starts_device,
    )  # fmt: skip


def attend_chunk(
    query: Float[Tensor, "rows query_heads queries dim"],
    spans: Spans,
    scaling: float,
    hidden: Int[Tensor, "rows queries"],
) -> Float[Tensor, "rows query_heads queries value_dim"]:
    """As ``AttentionBackend.attend_chunk``."""
    return chunk_attention.attend_chunk(
        query, spans.keys, spans.values, spans.starts_device, spans.lengths_device, hidden, _blocks(query, spans),
        scaling,
    )  # fmt: skip


def receive_chunk(
    query: Float[Tensor, "rows query_heads queries dim"],
    spans: Spans,
    scaling: float,
    hidden: Int[Tensor, "rows queries"],
) -> None:
    """As ``AttentionBackend.receive_chunk``."""
    assert spans.received is not None
    chunk_attention.receive_chunk(
        query, spans.keys, spans.starts_device, spans.lengths_device, hidden, _blocks(query, spans), scaling,
        spans.received, spans.received_starts_device, longest=spans.longest,
    )  # fmt: skip


def _chunks(spans: Spans, chunk: int) -> LayerChunks:
    count = spans.rows * spans.heads
    return ChunkTable.of(spans.lengths_device, chunk, count * spans.longest).layer(0)


def _blocks(query: Tensor, spans: Spans) -> chunk_attention.Blocks:
    queries = query.shape[1] // spans.heads * query.shape[2]
    return chunk_attention.blocks_for(queries, query.shape[-1], spans.values.shape[-1], query.element_size())
