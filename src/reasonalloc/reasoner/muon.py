"""The Muon optimizer in float32, all matrices of one shape at a time.

``torch.optim.Muon`` orthogonalises in bfloat16, one matrix after the other: on a CPU without bfloat16 arithmetic that
took 84 % of a training step of the small reasoner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the description of Muon
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is brought near the closest orthogonal matrix (Jordan et al., 2024).

    Args:
        params: matrices only.
        lr: learning rate; a matrix taller than wide takes ``sqrt(height / width)`` times that.
        momentum: of the gradient's running sum.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        params = list(params)
        if any(p.ndim != 2 for p in params):
            raise ValueError("Muon takes matrices only")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the orthogonalised momentum."""
        for group in self.param_groups:
            for alike in _by_shape(group["params"]):
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in alike])
                height, width = alike[0].shape
                rate = group["lr"] * max(1.0, height / width) ** 0.5
                for p, update in zip(alike, orthogonalised(updates), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].mul_(momentum).add_(p.grad)
        return p.grad + momentum * state["momentum"]


def orthogonalised(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Each matrix with its singular values pushed near 1, by a Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _by_shape(params: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            groups.setdefault(tuple(p.shape), []).append(p)
    return list(groups.values())
