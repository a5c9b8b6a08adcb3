"""One-query attention over a ragged slab on the CPU, compiled by numba (extra ``reasonalloc[cpu]``).

Each (sequence, head) row reads its own span once, whatever its length: no padding, no gather, no call per row.
That makes unequal heads cost what equal heads of the same total cost. Sums are in float32.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from numba.core import types
from numba.extending import intrinsic, overload
from torch import Tensor

from reasonalloc.storage.slab import RaggedSlab

DTYPES = (torch.float32, torch.bfloat16)
_NOTHING = np.empty(0, dtype=np.float32)


@intrinsic
def _as_float32(typingctx: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float32: numba has no such cast for scalars."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


def _load(source: Any, slot: int, row: Any) -> None:
    """Copy one slot into a float32 row; bfloat16 arrives as its 16 bits, the upper half of a float32."""


@overload(_load, inline="always")
def _load_overload(source: Any, slot: Any, row: Any) -> Any:
    if source.dtype == types.uint16:

        def load_bfloat16(source: Any, slot: Any, row: Any) -> None:
            for d in range(row.shape[0]):
                row[d] = _as_float32(np.uint32(source[slot, d]) << np.uint32(16))

        return load_bfloat16

    def load_float32(source: Any, slot: Any, row: Any) -> None:
        for d in range(row.shape[0]):
            row[d] = source[slot, d]

    return load_float32


@numba.njit(nogil=True, fastmath=True, cache=True)
def _attend(
    first: int, last: int, query: Any, keys: Any, values: Any, starts: Any, lengths: Any, received: Any, out: Any
) -> None:
    group, dim = query.shape[1:]
    for r in range(first, last):
        start, length = starts[r], lengths[r]
        weights = np.empty((group, length), np.float32)
        row = np.empty(dim, np.float32)
        for t in range(length):
            _load(keys, start + t, row)
            for g in range(group):
                dot = np.float32(0)
                for d in range(dim):
                    dot += query[r, g, d] * row[d]
                weights[g, t] = dot
        for g in range(group):
            largest = np.float32(-3.0e38)
            for t in range(length):
                largest = max(largest, weights[g, t])
            total = np.float32(0)
            for t in range(length):
                weights[g, t] = math.exp(weights[g, t] - largest)
                total += weights[g, t]
            for t in range(length):
                weights[g, t] /= total
        mixed = np.zeros((group, values.shape[1]), np.float32)
        row = np.empty(values.shape[1], np.float32)
        for t in range(length):
            _load(values, start + t, row)
            for g in range(group):
                for d in range(row.shape[0]):
                    mixed[g, d] += weights[g, t] * row[d]
        out[r] = mixed
        if received.shape[0] > 0:
            for t in range(length):
                for g in range(group):
                    received[start + t] += weights[g, t]


def attend_compiled(
    query: Float[Tensor, "batch query_heads 1 dim"], slab: RaggedSlab, scaling: float
) -> Float[Tensor, "batch query_heads 1 value_dim"]:
    """Attention of one query per sequence over all tokens of its rows; adds to ``slab.received`` if it is tracked."""
    rows, width = slab.batch * slab.heads, slab.values.shape[1]
    out = torch.empty(rows, query.shape[1] // slab.heads, width)
    arguments = (
        (query.float() * scaling).reshape(rows, -1, query.shape[-1]).numpy(),
        _array(slab.keys),
        _array(slab.values),
        slab.starts.reshape(-1),
        slab.lengths.reshape(-1),
        _NOTHING if slab.received is None else slab.received.numpy(),
        out.numpy(),
    )
    bounds = _equal_work(slab.lengths, min(torch.get_num_threads(), rows))
    if len(bounds) == 2:
        _attend(0, rows, *arguments)
    else:
        list(_threads(len(bounds) - 1).map(lambda part: _attend(*part, *arguments), pairwise(bounds)))
    return out.view(*query.shape[:3], width).to(query.dtype)


def _equal_work(lengths: Any, parts: int) -> list[int]:
    """Row numbers that cut the rows into ``parts`` of about as many tokens each, both ends included."""
    if parts == 1:
        return [0, lengths.size]
    tokens = lengths.reshape(-1).cumsum()
    cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, parts) / parts, side="right")
    return [0, *cuts.tolist(), lengths.size]


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Plain threads: numba's own parallel loops bring a second OpenMP runtime, which takes the cores from torch's."""
    return ThreadPoolExecutor(count, thread_name_prefix="reasonalloc-attention")


def _array(x: Tensor) -> Any:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
