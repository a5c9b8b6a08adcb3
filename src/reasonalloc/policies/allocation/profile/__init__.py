"""The demand profile: what calibration measured on one model, and what allocators read from it.

Everything is kept as sums per prompt, so that profiles merge exactly, and intervals come from a bootstrap over prompts.
"""

from reasonalloc.policies.allocation.profile.demand_profile import DemandProfile, differences
from reasonalloc.policies.allocation.profile.measurements import (
    HISTOGRAM_EDGES,
    PAPER_RHO,
    Floats,
    MissGrid,
    PromptDemand,
    check_rhos,
)
from reasonalloc.policies.allocation.profile.merging import merge
from reasonalloc.policies.allocation.profile.serialised import SCHEMA

__all__ = [
    "HISTOGRAM_EDGES",
    "PAPER_RHO",
    "SCHEMA",
    "DemandProfile",
    "Floats",
    "MissGrid",
    "PromptDemand",
    "check_rhos",
    "differences",
    "merge",
]
