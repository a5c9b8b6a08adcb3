"""One-query attention over ragged spans on CUDA, by torch's variable-length flash attention.

A (sequence, KV head) row is one "sequence" of the kernel: its keys are the span ``cu_seq_k[r]`` onwards of which
``seqused_k[r]`` are live, and the query heads of its group are the kernel's non-causal query rows. Nothing is padded.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.spans import Spans


@lru_cache(maxsize=1)  # every layer asks at every step
def kernel() -> Any | None:
    """torch's ``varlen_attn`` if this torch has one that takes live lengths, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in signature(varlen_attn).parameters else None


def attend_varlen(
    query: Float[Tensor, "batch query_heads 1 dim"], spans: Spans, scaling: float
) -> Float[Tensor, "batch query_heads 1 value_dim"]:
    """Attention of one query per sequence over all tokens of its rows."""
    rows = spans.rows * spans.heads
    group = query.shape[1] // spans.heads
    starts = spans.starts_device.flatten()
    ends = torch.cat([starts, starts.new_full((1,), len(spans.keys))]).to(torch.int32)
    queries = torch.arange(rows + 1, device=query.device, dtype=torch.int32) * group
    varlen_attn = kernel()
    assert varlen_attn is not None
    out = varlen_attn(
        query.reshape(rows * group, 1, query.shape[-1]),
        spans.keys[:, None],
        spans.values[:, None],
        queries,
        ends,
        group,
        int(spans.capacities.max()),
        scale=scaling,
        seqused_k=spans.lengths_device.flatten().to(torch.int32),
    )
    return out.view(*query.shape[:3], spans.values.shape[1])
