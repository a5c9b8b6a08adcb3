"""The choice of an attention backend for decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from reasonalloc.cache.attention.rows import attend_rows, received_attention
from reasonalloc.cache.spans import Spans
from reasonalloc.policies.registry import unknown_name

Attend = Callable[[Tensor, Spans, float], Tensor]

_WIDEST, _AMPERE = 256, (8, 0)  # what torch's flash attention serves


@dataclass(frozen=True)
class AttentionBackend:
    """Attention of one query per row over its span.

    Attributes:
        name: "rows" (plain torch), "compiled" (numba, CPU), "varlen" (CUDA, torch's) or "triton" (CUDA, ours).
        attend: ``(query [batch, query_heads, 1, dim], spans, scaling) -> [batch, query_heads, 1, value_dim]``.
            If received attention is tracked, it is added there.
    """

    name: str
    attend: Attend
    reads_host: bool = True

    def table(self, layers: int, rows: int, heads: int, slots: int, device: torch.device) -> Any:
        """None."""
        return None


def _rows(query: Tensor, spans: Spans, scaling: float) -> Tensor:
    if spans.received is not None:
        received_attention(query, spans, scaling)
    return attend_rows(query, spans, scaling)


def _make_rows() -> Attend:
    return _rows


def _make_compiled() -> Attend:
    from reasonalloc.cache.attention.compiled import attend_compiled

    return attend_compiled


def _make_varlen() -> Attend:
    from reasonalloc.cache.attention.varlen import attend_varlen

    return attend_varlen


def _make_triton() -> Attend:
    from reasonalloc.cache.attention.triton_decode import TritonDecode

    return TritonDecode()


BACKENDS: dict[str, Callable[[], Attend]] = {
    "rows": _make_rows,
    "compiled": _make_compiled,
    "varlen": _make_varlen,
    "triton": _make_triton,
}


def check_backend(name: str) -> None:
    """Raise ``ValueError`` for a name that no backend has; whether it serves a cache shows when that has tensors."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("attention backend", name, ["auto", *BACKENDS])


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, dim: int, tracks_received: bool
) -> AttentionBackend:
    """The backend of that name, or for "auto" the fastest one that serves this device, dtype and width of heads.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve these.
    """
    check_backend(name)
    problems = {candidate: _problem(candidate, device, dtype, dim, tracks_received) for candidate in BACKENDS}
    if name == "auto":
        name = next(candidate for candidate in ("varlen", "triton", "compiled", "rows") if not problems[candidate])
    if problems[name]:
        raise ValueError(f"attention backend {name!r} cannot serve this cache: {problems[name]}; use 'auto' or 'rows'")
    return AttentionBackend(name, BACKENDS[name]())


def _problem(name: str, device: torch.device, dtype: torch.dtype, dim: int, tracks_received: bool) -> str:
    """Why a backend cannot be used here, or "" if it can."""
    if name == "compiled":
        if device.type != "cpu":
            return f"it runs on the CPU, the cache is on {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it has no {dtype}"
        return "" if find_spec("numba") else "numba is not installed (pip install 'reasonalloc[cpu]')"
    if name == "varlen":
        if device.type != "cuda":
            return f"it runs on CUDA, the cache is on {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it has no {dtype}"
        if dim > _WIDEST or dim % 8:
            return f"it takes heads of up to {_WIDEST} channels, a multiple of 8, and these have {dim}"
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return f"it needs a GPU of at least compute capability 8.0, {device} is older"
        if tracks_received:
            return "it does not return attention weights, which the scorer accumulates"
        from reasonalloc.cache.attention.varlen import kernel

        return "" if kernel() else "this torch has no varlen_attn with seqused_k"
    if name == "triton":
        if device.type != "cuda":
            return f"it runs on CUDA, the cache is on {device}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it has no {dtype}"
        return "" if find_spec("triton") else "triton is not installed (it comes with torch for CUDA)"
    return ""
