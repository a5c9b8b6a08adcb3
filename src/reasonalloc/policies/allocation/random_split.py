"""Random splits of the same total: the control that an allocator has to beat. Not in the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from reasonalloc.policies.allocation.apportion import apportion
from reasonalloc.policies.allocation.heads import HEAD_ALLOCATORS
from reasonalloc.policies.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.policies.allocation.offline_heads import OfflineBudgets, OfflineHeads, OfflineLayers
from reasonalloc.policies.allocation.profile import DemandProfile
from reasonalloc.policies.allocation.shape import ModelShape


@dataclass(frozen=True)
class RandomBudgets(OfflineBudgets):
    """Budgets of all heads drawn once: uneven like an informed allocator's, but uninformed.

    A head's weight is log-normal, the product of a draw for its layer and one for itself, both of deviation
    ``spread``; the floor is ``OfflineBudgets``'s.

    Attributes:
        split_seed: of the draw; layers and heads of one split take the same.
        spread: standard deviation of the logarithm, of layers and of heads within a layer.
    """

    split_seed: int = 0
    spread: float = 0.5

    needs_profile = False
    calibrate_options = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread < math.inf:
            raise ValueError(f"spread must not be negative, nor infinite, got {self.spread}")

    def split(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
        """Tokens of every head; the profile is not looked at."""
        rng = np.random.default_rng(self.split_seed)
        logs = rng.normal(size=(shape.layers, 1)) + rng.normal(size=(shape.layers, shape.kv_heads))
        weights = torch.from_numpy(np.exp(self.spread * logs).flatten())
        total = weights.numel() * budget
        low = torch.full_like(weights, self.least(budget, window))
        return apportion(weights, total, low, torch.full_like(weights, total)).numpy().reshape(logs.shape)


@LAYER_ALLOCATORS.register("random-split")
@dataclass(frozen=True)
class RandomLayers(RandomBudgets, OfflineLayers):
    """Layer totals of a random split, the control of an evaluation: the sums of what ``RandomHeads`` gives.

    Attributes:
        floor: least tokens of a head, as a share of the mean budget, in [0, 1]; never below the window and one more.
        split_seed: of the draw; layers and heads of one split take the same.
        spread: standard deviation of the logarithm, of layers and of heads within a layer.

    Raises:
        ValueError: a setting out of range, when constructed.
    """


@HEAD_ALLOCATORS.register("random-split")
@dataclass(frozen=True)
class RandomHeads(RandomBudgets, OfflineHeads):
    """Head budgets of a random split; settings and errors are those of ``RandomLayers``."""
