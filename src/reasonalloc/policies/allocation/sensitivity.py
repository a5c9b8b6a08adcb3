"""Loss sensitivity: budgets by how much a text suffers when a head alone forgets. This allocator is ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from reasonalloc.policies.allocation.apportion import apportion
from reasonalloc.policies.allocation.heads import HEAD_ALLOCATORS
from reasonalloc.policies.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.policies.allocation.offline_heads import OfflineBudgets, OfflineHeads, OfflineLayers
from reasonalloc.policies.allocation.profile import DemandProfile, Floats
from reasonalloc.policies.allocation.shape import ModelShape


def tempered_sensitivity(profile: DemandProfile, exponent: float) -> Float[Floats, "layers kv_heads"]:
    """Each head's rise of the loss, to a power; heads whose forgetting helps count as 0.

    A power below 1 tempers it: heads that single-head ablation calls free are often one of several that do the same.
    """
    return profile.loss_sensitivity().clip(min=0) ** exponent


@dataclass(frozen=True)
class SensitivityBudgets(OfflineBudgets):
    """Above the floor, tokens in proportion to the tempered loss sensitivity.

    Attributes:
        exponent: 0.5 takes the square root.
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent must not be negative, nor infinite, got {self.exponent}")

    @property
    def calibrate_options(self) -> str:
        """Loss sensitivity."""
        return "--sensitivity"

    def split(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile
    ) -> Int[np.ndarray[Any, Any], "layers kv_heads"]:
        """Tokens of every head. Raises ``ValueError`` for a profile without loss sensitivity."""
        heads, floor = shape.layers * shape.kv_heads, self.least(budget, window)
        weights = torch.from_numpy(tempered_sensitivity(profile, self.exponent).reshape(heads))
        low = torch.full_like(weights, floor)
        budgets = apportion(weights, heads * budget, low, torch.full_like(weights, heads * budget))
        return budgets.numpy().reshape(shape.layers, shape.kv_heads)


@LAYER_ALLOCATORS.register("sensitivity")
@dataclass(frozen=True)
class SensitivityLayers(SensitivityBudgets, OfflineLayers):
    """Layer totals by the loss sensitivity of their heads [ours]: the sums of what ``SensitivityHeads`` gives.

    Above the floor, tokens are in proportion to the sensitivity to a power.

    Attributes:
        floor: least tokens of a head, as a share of the mean budget, in [0, 1]; never below the window and one more.
        exponent: that power; 0.5 takes the square root.

    Raises:
        ValueError: a setting out of range, when constructed; a profile without sensitivity, when a cache is made.
    """


@HEAD_ALLOCATORS.register("sensitivity")
@dataclass(frozen=True)
class SensitivityHeads(SensitivityBudgets, OfflineHeads):
    """Head budgets by loss sensitivity [ours]; settings and errors are those of ``SensitivityLayers``."""
