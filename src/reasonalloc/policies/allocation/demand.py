"""Attention demand: how many tokens a query needs. ``allocation.profile`` keeps what a model's layers need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def attention_demand(weights: Float[Tensor, "*rows tokens"], rho: float) -> Float[Tensor, "*rows"]:
    """``N_rho`` of ReasonAlloc, section 4: the least number of tokens that hold ``rho`` of a row's attention.

    Args:
        weights: attention rows, each non-negative with sum 1; entries of absent tokens are 0.
        rho: share of the mass to cover, in (0, 1]; the paper uses 0.93.

    Returns:
        Whole numbers of tokens in the weights' dtype, at least 1.
    """
    return attention_demands(weights, (rho,)).squeeze(-1)


def attention_demands(weights: Float[Tensor, "*rows tokens"], rhos: Sequence[float]) -> Float[Tensor, "*rows rhos"]:
    """``attention_demand`` for several shares of the mass, from one sort."""
    covered = descending(weights).cumsum(-1)
    most = (weights > 0).sum(-1).clamp(min=1)  # rounding must not count absent tokens in
    needed = [torch.minimum((covered < rho).sum(-1) + 1, most) for rho in rhos]
    return torch.stack(needed, -1).to(weights.dtype)


def descending(x: Float[Tensor, "*rows items"]) -> Float[Tensor, "*rows items"]:
    """``x`` sorted along its last dimension, largest first; on the CPU by numpy, which is ten times as fast."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(x.detach().numpy(), axis=-1)).flip(-1)
    return x.sort(-1, descending=True).values
