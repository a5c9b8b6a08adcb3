"""The choice of an attention backend: what attends to ragged spans."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from reasonalloc.cache.attention.rows import attend_rows, received_attention
from reasonalloc.cache.spans import Spans
from reasonalloc.kernels.chunks import ChunkTable
from reasonalloc.kernels.launch import serve
from reasonalloc.policies.registry import unknown_name

_AMPERE = (8, 0)


def _no_table(layers: int, rows: int, heads: int, slots: int, device: torch.device) -> ChunkTable | None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """Attention of new queries over their rows' spans.

    Attributes:
        name: "rows" (plain torch), "compiled" (numba, CPU) or "triton" (CUDA).
        attend: one query a row: ``(query [rows, query_heads, 1, dim], spans, scaling)`` gives
            ``[rows, query_heads, 1, value_dim]``. If received attention is tracked, it is added there.
        attend_chunk: several, ``(query [rows, query_heads, queries, dim], spans, scaling, hidden [rows, queries])``:
            each sees all tokens of its spans but the newest ``hidden`` ones, one at least. The output of padding
            (``hidden`` -1) has no meaning. Adds nothing to received attention.
        receive_chunk: with the same arguments, adds to ``spans.received`` what each token receives from these
            queries; padding gives nothing.
        table: ``(layers, rows, heads, slots, device)``: what ``attend`` wants prepared for so many rows and heads that
            share so many slots in each layer, or None if it wants nothing. Fill it when spans have moved, and give
            each layer's part to its spans.
        reads_host: whether ``attend`` reads numbers of the spans on the host, so that no graph can hold it.
    """

    name: str
    attend: Callable[[Tensor, Spans, float], Tensor]
    attend_chunk: Callable[[Tensor, Spans, float, Tensor], Tensor] = attend_rows
    receive_chunk: Callable[[Tensor, Spans, float, Tensor], None] = received_attention
    table: Callable[[int, int, int, int, torch.device], ChunkTable | None] = _no_table
    reads_host: bool = True


def _attend_one(query: Tensor, spans: Spans, scaling: float) -> Tensor:
    if spans.received is not None:
        received_attention(query, spans, scaling)
    return attend_rows(query, spans, scaling)


def _make_rows() -> AttentionBackend:
    return AttentionBackend("rows", _attend_one)


def _make_compiled() -> AttentionBackend:
    from reasonalloc.cache.attention.compiled import attend_compiled

    return AttentionBackend("compiled", attend_compiled)


def _make_triton() -> AttentionBackend:
    from reasonalloc.cache.attention import triton_backend as on_cuda

    calls = (on_cuda.attend, on_cuda.attend_chunk, on_cuda.receive_chunk, on_cuda.make_table)
    return AttentionBackend("triton", *calls, reads_host=False)


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {  # the order of "auto"
    "triton": _make_triton,
    "compiled": _make_compiled,
    "rows": _make_rows,
}


def check_backend(name: str) -> None:
    """Raise ``ValueError`` for a name that no backend has; whether it serves a cache shows when that has tensors."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("attention backend", name, ["auto", *BACKENDS])


def choose_backend(name: str, device: torch.device, dtypes: AbstractSet[torch.dtype], dim: int) -> AttentionBackend:
    """The backend of that name, or for "auto" the fastest one that serves such keys and values.

    Args:
        name: "auto", or of a backend.
        device: where they are.
        dtypes: of keys and of values, which differ under ``torch.autocast``.
        dim: channels of the wider ones.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve these.
    """
    check_backend(name)
    if name == "auto":
        name = next(candidate for candidate in BACKENDS if not _problem(candidate, device, dtypes, dim))
    problem = _problem(name, device, dtypes, dim)
    if problem:
        raise ValueError(f"attention backend {name!r} cannot serve this cache: {problem}; use 'auto' or 'rows'")
    return BACKENDS[name]()


def _problem(name: str, device: torch.device, dtypes: AbstractSet[torch.dtype], dim: int) -> str:
    """Why a backend cannot be used here, or "" if it can."""
    if name == "compiled":
        if device.type != "cpu":
            return f"it runs on the CPU, the cache is on {device}"
        if other := dtypes - {torch.float32, torch.bfloat16}:
            return f"it has no {next(iter(other))}"
        return "" if find_spec("numba") else "numba is not installed (pip install 'reasonalloc[cpu]')"
    if name == "triton":
        if device.type != "cuda":
            return f"it runs on CUDA, the cache is on {device}"
        if other := dtypes - {torch.float32, torch.float16, torch.bfloat16}:
            return f"it has no {next(iter(other))}"
        if not serve(device):
            return "triton is not installed (it comes with torch for CUDA)"
        from reasonalloc.kernels.decode_attention import tuning_for

        try:
            tuning_for(1, dim, dim, max(dtype.itemsize for dtype in dtypes))
        except ValueError as error:
            return str(error)
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return f"it needs a GPU of at least compute capability 8.0, {device} is older"
    return ""
