"""Loss curves: budgets for all heads of a model at once, by what each head adds to the loss when all forget.

A miss curve counts attention that found nothing, whatever hung on it; a sensitivity says what hangs on a head, but not
how many tokens it needs, and of each head alone. A loss curve says both, in nats: the head's part of the divergence
from the full cache's predictions when the scorer holds all heads to a budget. Tokens are given where the curves fall
most. This allocator is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from reasonalloc.policies.allocation.curves import CurveBudgets
from reasonalloc.policies.allocation.heads import HEAD_ALLOCATORS
from reasonalloc.policies.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.policies.allocation.offline_heads import OfflineHeads, OfflineLayers
from reasonalloc.policies.allocation.profile import DemandProfile, Floats


@dataclass(frozen=True)
class LossCurveBudgets(CurveBudgets):
    """The split of all tokens that minimises the summed losses of all heads of the model."""

    @property
    def calibrate_options(self) -> str:
        """Loss curves of the scorer."""
        return f"--loss {self.scorer or 'SCORER'}"

    def curves(self, profile: DemandProfile) -> Float[Floats, "budgets layers kv_heads"]:
        """Loss curves."""
        return profile.loss_curves(self.scorer)


@LAYER_ALLOCATORS.register("loss-curve")
@dataclass(frozen=True)
class LossCurveLayers(LossCurveBudgets, OfflineLayers):
    """Layer totals by the loss curves of their heads [ours]: the sums of what ``LossCurveHeads`` gives.

    Attributes:
        floor: least tokens of a head, as a share of the mean budget, in [0, 1]; never below the window and one more.
        scorer: whose curves; "" takes the compression's own.

    Raises:
        ValueError: a floor out of range, when constructed; a profile without these curves, when a cache is made.
    """


@HEAD_ALLOCATORS.register("loss-curve")
@dataclass(frozen=True)
class LossCurveHeads(LossCurveBudgets, OfflineHeads):
    """Head budgets by loss curves [ours]; settings and errors are those of ``LossCurveLayers``."""
