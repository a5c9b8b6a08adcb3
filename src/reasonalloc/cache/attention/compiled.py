"""One-query attention over ragged spans on the CPU, compiled by numba (extra ``reasonalloc[cpu]``).

Each (sequence, head) row reads its own span once, whatever its length: no padding, no gather, no call per row.
That makes unequal heads cost what equal heads of the same total cost. Sums are in float32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from numba.np import arrayobj
from torch import Tensor

from reasonalloc.cache.spans import Spans

_NOTHING = np.empty(0, dtype=np.float32)
_ZERO = np.float32(0)
_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}  # sums in any order; NaN and infinity stay what they are
_AHEAD, _LINE = 32, 64  # tokens that memory is asked for in advance; bytes that it gives at a time
_LOG2_E, _LEAST_POWER = np.float32(1.4426950408889634), np.float32(-126)  # below that, weights are nothing
# 2**f on (-1, 0], fitted for the least largest relative error: 7.5e-8; rounding x * log2(e) costs more.
_C0, _C1, _C2 = np.float32(0.999999925), np.float32(0.693142252), np.float32(0.240172189)
_C3, _C4, _C5 = np.float32(5.52797207e-2), np.float32(9.18860966e-3), np.float32(9.38787533e-4)


@intrinsic
def _as_float32(typingctx: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float32: numba has no such cast for scalars."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def _prefetch(typingctx: Any, source: Any, slot: Any, d: Any) -> Any:
    """Ask memory for one channel of one slot, and its cache line: a hint, harmless past the end of the array.

    A processor foresees a stream of reads by itself, but not over the end of a page, and a page holds 16 float32 keys
    of 64 channels. Into the second-level cache: the first level can wait for few lines at a time.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        row, column = cgutils.unpack_tuple(builder, array.strides, 2)
        offset = builder.add(builder.mul(args[1], row), builder.mul(args[2], column))
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0i8")
        reading, near, data = (ir.Constant(number, value) for value in (0, 2, 1))
        builder.call(function, [builder.gep(builder.bitcast(array.data, byte), [offset]), reading, near, data])
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp), generate


def _at(source: Any, slot: int, d: int) -> Any:
    """One channel of one slot as float32; bfloat16 arrives as its 16 bits, the upper half of a float32."""


@overload(_at, inline="always")
def _at_overload(source: Any, slot: Any, d: Any) -> Any:
    if source.dtype == types.uint16:

        def read_bfloat16(source: Any, slot: Any, d: Any) -> Any:
            return _as_float32(np.uint32(source[slot, d]) << np.uint32(16))

        return read_bfloat16

    def read_float32(source: Any, slot: Any, d: Any) -> Any:
        return source[slot, d]

    return read_float32


@numba.njit(fastmath=_FAST, inline="always")
def _exp(x: Any) -> Any:
    """The exponential of a float32 that is not positive, to 4e-6 of its value (1e-6 above -20).

    Unlike the C library's, a loop over it becomes vector instructions. Two to the power of ``k + f``, k whole: a shift,
    and a polynomial in f in (-1, 0].
    """
    y = max(x * _LOG2_E, _LEAST_POWER)
    k = np.int32(y)
    f = y - np.float32(k)
    power = ((((_C5 * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    return power * _as_float32(np.uint32((k + 127) << 23))


@numba.njit(nogil=True, fastmath=_FAST, error_model="numpy", cache=True)  # a NaN comes out as one
def _attend(
    first: int, last: int, query: Any, keys: Any, values: Any, starts: Any, lengths: Any,
    received: Any, places: Any, out: Any,
) -> None:  # fmt: skip
    """Rows ``first`` to ``last``. Tokens are taken four at a time, so that what is common stays in registers."""
    group, dim = query.shape[1:]
    line = _LINE // keys.itemsize
    for r in range(first, last):
        start, length = starts[r], lengths[r]
        fours = length // 4 * 4
        weights = np.empty((group, length), np.float32)
        for t in range(0, fours, 4):
            s = start + t
            for slot in range(s + _AHEAD, s + _AHEAD + 4):
                for d in range(0, dim, line):
                    _prefetch(keys, slot, d)
            for g in range(group):
                dot0, dot1, dot2, dot3 = _ZERO, _ZERO, _ZERO, _ZERO
                for d in range(dim):
                    q = query[r, g, d]
                    dot0 += q * _at(keys, s, d)
                    dot1 += q * _at(keys, s + 1, d)
                    dot2 += q * _at(keys, s + 2, d)
                    dot3 += q * _at(keys, s + 3, d)
                weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3] = dot0, dot1, dot2, dot3
        for t in range(fours, length):
            for g in range(group):
                dot = _ZERO
                for d in range(dim):
                    dot += query[r, g, d] * _at(keys, start + t, d)
                weights[g, t] = dot
        for g in range(group):
            largest = np.float32(-3.0e38)
            for t in range(length):
                largest = max(largest, weights[g, t])
            total = _ZERO
            for t in range(length):
                weights[g, t] = _exp(weights[g, t] - largest)
                total += weights[g, t]
            share = np.float32(1) / total
            for t in range(length):
                weights[g, t] *= share
        mixed = np.zeros((group, values.shape[1]), np.float32)
        for t in range(0, fours, 4):
            s = start + t
            for slot in range(s + _AHEAD, s + _AHEAD + 4):
                for d in range(0, mixed.shape[1], line):
                    _prefetch(values, slot, d)
            for g in range(group):
                w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
                for d in range(mixed.shape[1]):
                    pair = w0 * _at(values, s, d) + w1 * _at(values, s + 1, d)
                    mixed[g, d] += pair + (w2 * _at(values, s + 2, d) + w3 * _at(values, s + 3, d))
        for t in range(fours, length):
            for g in range(group):
                for d in range(mixed.shape[1]):
                    mixed[g, d] += weights[g, t] * _at(values, start + t, d)
        out[r] = mixed
        if received.shape[0] > 0:
            for g in range(group):
                for t in range(length):
                    received[places[r] + t] += weights[g, t]


def attend_compiled(
    query: Float[Tensor, "batch query_heads 1 dim"], spans: Spans, scaling: float
) -> Float[Tensor, "batch query_heads 1 value_dim"]:
    """Attention of one query per sequence over all tokens of its rows; adds to ``spans.received`` if it is tracked."""
    rows, width = spans.rows * spans.heads, spans.values.shape[1]
    out = torch.empty(rows, query.shape[1] // spans.heads, width, device="cpu")
    starts, lengths, places = spans.on_host
    arguments = (
        (query.float() * scaling).reshape(rows, -1, query.shape[-1]).numpy(),
        _array(spans.keys),
        _array(spans.values),
        starts.reshape(-1),
        lengths.reshape(-1),
        _NOTHING if spans.received is None else spans.received.numpy(),
        places.reshape(-1),
        out.numpy(),
    )
    bounds = _equal_work(lengths, min(torch.get_num_threads(), rows))
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
