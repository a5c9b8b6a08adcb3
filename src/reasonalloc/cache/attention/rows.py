"""Plain torch attention over ragged spans: one small call per (sequence, head), on views of its span.

Nothing is gathered, padded or copied. It is the reference for the other backends, and the only one for several
queries at once (chunks of a prompt, a new turn, speculative tokens), where each call has real work to do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.spans import Spans

_BLOCK_ENTRIES = 1 << 24  # of a mask, or of attention weights where they are needed explicitly, held at once


def attend_rows(
    query: Float[Tensor, "batch query_heads queries dim"],
    spans: Spans,
    scaling: float,
    hidden: Int[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Attention of each query over all tokens of its row but the newest ``hidden`` ones (causality in a chunk).

    A query that would see nothing (padding) sees one token; its output has no meaning. Masks are never held for more
    than a block of queries.
    """
    batch, query_heads, queries, dim = query.shape
    group = query_heads // spans.heads
    out = query.new_empty(batch, query_heads, queries, spans.values.shape[-1])
    for b, h, start, _, length in _rows(spans):
        of_head = slice(h * group, (h + 1) * group)
        keys, values = spans.keys[start : start + length], spans.values[start : start + length]
        for some in _blocks(queries, group * length):
            rows = query[b, of_head, some].reshape(1, 1, -1, dim)
            mask = None if hidden is None else _visible(length, hidden[b, some]).repeat(group, 1)
            mixed = F.scaled_dot_product_attention(
                rows, keys[None, None], values[None, None], attn_mask=mask, scale=scaling
            )
            out[b, of_head, some] = mixed.view(group, -1, values.shape[-1])
    return out


def received_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    spans: Spans,
    scaling: float,
    hidden: Int[Tensor, "batch queries"] | None = None,
) -> None:
    """Add to ``spans.received`` the attention that each token gets from these queries, summed over query heads.

    Padding queries (those that would see nothing new: ``hidden`` beyond the new tokens) must be marked by
    ``hidden`` = -1. The weights are never held for more than a block of queries.
    """
    assert spans.received is not None
    with torch.autocast(query.device.type, enabled=False):  # a scorer's numbers are not the model's
        _add_received(query, spans, scaling, hidden, spans.received)


def _add_received(
    query: Tensor, spans: Spans, scaling: float, hidden: Int[Tensor, "batch queries"] | None, received: Tensor
) -> None:
    query_heads, queries = query.shape[1:3]
    group = query_heads // spans.heads
    for b, h, start, place, length in _rows(spans):
        rows = query[b, h * group : (h + 1) * group]
        keys = spans.keys[start : start + length]
        for some in _blocks(queries, group * length):
            part = rows[:, some]
            logits = (part @ keys.T).float() * scaling
            if hidden is None:
                weights = logits.softmax(-1)
            else:
                own = hidden[b, some]
                weights = logits.masked_fill(~_visible(length, own.clamp(min=0)), float("-inf")).softmax(-1)
                weights = weights.masked_fill((own < 0)[:, None], 0.0)
            received[place : place + length] += weights.sum((0, 1))


def _rows(spans: Spans) -> Iterator[tuple[int, int, int, int, int]]:
    starts, lengths, places = spans.on_host
    for b in range(spans.rows):
        for h in range(spans.heads):
            yield b, h, int(starts[b, h]), int(places[b, h]), int(lengths[b, h])


def _blocks(queries: int, entries: int) -> Iterator[slice]:
    """As many queries at a time as a block holds, each with so many entries."""
    block = max(1, _BLOCK_ENTRIES // max(entries, 1))
    for first in range(0, queries, block):
        yield slice(first, first + block)


def _visible(length: int, hidden: Int[Tensor, "queries"]) -> Tensor:
    index = torch.arange(length, device=hidden.device)
    return index < (length - hidden).clamp(min=1)[:, None]
