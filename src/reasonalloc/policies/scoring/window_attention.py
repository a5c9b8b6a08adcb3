"""Attention of the last queries over the cached tokens, shared by the scorers that look at it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.kernels import launch
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import RaggedKeys

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNEL_CHANNELS = 256  # at most: tiles of keys must fit shared memory
_KERNEL_GROUP = 32  # likewise, of queries


def query_logits(seen: Observation) -> Float[Tensor, "batch heads group queries tokens"]:
    """Scaled float32 dot products of the observed queries with all cached keys, no mask applied."""
    assert seen.queries is not None, "the scorer did not declare observed_queries"
    keys = seen.tokens.keys
    batch, heads, _, dim = keys.shape
    queries = seen.queries.reshape(batch, heads, -1, seen.queries.shape[2], dim)
    return torch.einsum("bhgqd,bhtd->bhgqt", at_least_float32(queries), at_least_float32(keys)) * seen.scaling


def kernel_keys(seen: Observation) -> RaggedKeys | None:
    """The keys where they lie, if Triton's kernels can read them there; else None."""
    ragged, queries = seen.tokens.ragged, seen.queries
    if ragged is None or queries is None or not launch.serve(seen.tokens.device):
        return None
    fits = (
        ragged.keys.dtype == queries.dtype
        and ragged.keys.dtype in _KERNEL_DTYPES
        and ragged.keys.shape[1] <= _KERNEL_CHANNELS
        and queries.shape[1] <= _KERNEL_GROUP * ragged.starts.shape[1]
    )
    return ragged if fits else None


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def visible(seen: Observation) -> Bool[Tensor, "batch heads queries tokens"]:
    """Which tokens existed when each observed query was made (a query sees itself).

    Ages are read off the storage order: exact as long as a head still holds the tokens of all observed queries, that
    is, unless window and interval are both smaller than the number of queries; then some older tokens are hidden too.
    """
    assert seen.queries is not None
    tokens, count = seen.tokens, seen.queries.shape[2]
    newer = torch.arange(count - 1, -1, -1, device=tokens.lengths.device)  # tokens younger than each query
    return tokens.index < (tokens.lengths[..., None] - newer)[..., None]


def softmax_over(logits: Tensor, columns: Bool[Tensor, "..."]) -> Tensor:
    """Softmax over the given columns; rows without any column are zero."""
    weights = logits.masked_fill(~columns, float("-inf")).softmax(-1)
    return weights.masked_fill(~columns, 0.0)


def attention_weights(
    seen: Observation, candidates: Bool[Tensor, "batch heads tokens"]
) -> Float[Tensor, "batch heads group queries tokens"]:
    """Attention of each observed query over those candidates that it could see."""
    columns = candidates[:, :, None] & visible(seen)
    return softmax_over(query_logits(seen), columns[:, :, None])


def mean_over_queries(seen: Observation, x: Float[Tensor, "batch *heads queries tokens"]) -> Tensor:
    """Mean over the queries that exist (dim -2)."""
    if seen.real_queries is None:
        return x.mean(-2)
    real = seen.real_queries.reshape(x.shape[0], *[1] * (x.dim() - 3), x.shape[-2], 1).to(x.dtype)
    return (x * real).sum(-2) / real.sum(-2).clamp(min=1)


def max_pool(x: Float[Tensor, "batch heads tokens"], kernel: int) -> Float[Tensor, "batch heads tokens"]:
    """Running maximum over neighbours in storage order, centred, same length."""
    return F.max_pool1d(x, kernel_size=kernel, stride=1, padding=kernel // 2)


def average_pool(x: Float[Tensor, "*batch tokens"], kernel: int) -> Float[Tensor, "*batch tokens"]:
    """Running mean over neighbours in storage order, zeros beyond the ends, divisor always ``kernel``."""
    flat = F.avg_pool1d(x.flatten(0, -2)[:, None], kernel_size=kernel, stride=1, padding=kernel // 2)
    return flat.reshape(x.shape)


def check_kernel(kernel: int) -> None:
    """Validate a pooling kernel size."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"a pooling kernel must be odd and positive, got {kernel}")


def pooled_importance(seen: Observation, kernel: int) -> Float[Tensor, "batch heads tokens"]:
    """R-KV's importance: attention of the observed queries over the tokens outside the window.

    The maximum over a group's query heads is taken on the logits, before the softmax; then the mean over
    queries and a max pooling of ``kernel`` neighbours (arXiv 2505.24133). Window entries are 0.
    """
    tokens = seen.tokens
    if (ragged := kernel_keys(seen)) is not None:
        from reasonalloc.kernels import window

        assert seen.queries is not None
        return window.pooled_importance(
            ragged.keys, ragged.starts, tokens.lengths, tokens.width, seen.queries, seen.real_queries, seen.window,
            seen.scaling, kernel,
        )  # fmt: skip
    candidates = tokens.valid & ~tokens.newest(seen.window)
    columns = candidates[:, :, None] & visible(seen)
    weights = mean_over_queries(seen, softmax_over(query_logits(seen).amax(2), columns))
    return max_pool(weights, kernel).masked_fill(~candidates, 0.0)
