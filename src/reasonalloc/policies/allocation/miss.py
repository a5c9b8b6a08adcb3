"""Miss curves: budgets for all heads of a model at once, by what each head *misses* when it forgets.

``N_rho`` says how broadly a head looks at one step; a head that looks up one token at a time is sharp at every step and
still needs its whole table. A miss curve m(b) is the share of a head's attention that falls on tokens which the
scorer's own eviction had dropped at budget b. Tokens are given where the curves fall most. This allocator is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float

from reasonalloc.policies.allocation.curves import CurveBudgets
from reasonalloc.policies.allocation.heads import HEAD_ALLOCATORS
from reasonalloc.policies.allocation.layers import LAYER_ALLOCATORS
from reasonalloc.policies.allocation.offline_heads import OfflineHeads, OfflineLayers
from reasonalloc.policies.allocation.profile import DemandProfile, Floats
from reasonalloc.policies.allocation.sensitivity import tempered_sensitivity


@dataclass(frozen=True)
class MissCurveBudgets(CurveBudgets):
    """The split of all tokens that minimises the summed misses of all heads of the model.

    Attributes:
        scorer: see ``CurveBudgets``.
        sensitivity_exponent: weigh each head's curve by its loss sensitivity to this power; 0: not at all.
    """

    sensitivity_exponent: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sensitivity_exponent < math.inf:
            raise ValueError(
                f"sensitivity_exponent must not be negative, nor infinite, got {self.sensitivity_exponent}"
            )

    @property
    def calibrate_options(self) -> str:
        """Miss curves of the scorer."""
        return f"--miss {self.scorer or 'SCORER'}"

    def curves(self, profile: DemandProfile) -> Float[Floats, "budgets layers kv_heads"]:
        """Miss curves, weighed."""
        curves = profile.miss_curves(self.scorer)
        return (
            curves * tempered_sensitivity(profile, self.sensitivity_exponent) if self.sensitivity_exponent else curves
        )


@LAYER_ALLOCATORS.register("miss-curve")
@dataclass(frozen=True)
class MissCurveLayers(MissCurveBudgets, OfflineLayers):
    """Layer totals by the miss curves of their heads [ours]: the sums of what ``MissCurveHeads`` gives.

    Attributes:
        floor: least tokens of a head, as a share of the mean budget, in [0, 1]; never below the window and one more.
        scorer: whose curves; "" takes the compression's own.
        sensitivity_exponent: weigh each head's curve by its loss sensitivity to this power; 0: not at all.

    Raises:
        ValueError: a setting out of range, when constructed; a profile without these curves, when a cache is made.
    """


@HEAD_ALLOCATORS.register("miss-curve")
@dataclass(frozen=True)
class MissCurveHeads(MissCurveBudgets, OfflineHeads):
    """Head budgets by miss curves [ours]; settings and errors are those of ``MissCurveLayers``."""
