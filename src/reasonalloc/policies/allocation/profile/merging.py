"""Profiles of one model put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonalloc.policies.allocation.profile.demand_profile import DemandProfile, differences


def merge(profiles: Sequence[DemandProfile]) -> DemandProfile:
    """One profile of all prompts: to the last digit what measuring them together would have given.

    Raises:
        ValueError: nothing to merge, different models or settings (every difference is named), or a prompt that
            is in two of them.
    """
    if not profiles:
        raise ValueError("there is no profile to merge")
    first = profiles[0]
    for other in profiles[1:]:
        other.check(first.shape, first.architecture)
        own, theirs = _measured_with(first), _measured_with(other)
        different = differences(own, theirs, "one", "other")
        if different:
            raise ValueError(f"profiles measured differently cannot be merged ({different})")
    histograms = [profile.histogram for profile in profiles if profile.histogram is not None]
    return DemandProfile(
        first.shape,
        first.rhos,
        tuple(prompt for profile in profiles for prompt in profile.prompts),
        first.architecture,
        np.sum(histograms, axis=0) if len(histograms) == len(profiles) else None,
        first.grids,
        first.settings,
        first.source,
    )


def _measured_with(profile: DemandProfile) -> dict[str, Any]:
    grids = {f"miss {name}": vars(grid) for name, grid in profile.grids.items()}
    return {**profile.source, **profile.settings, "rhos": profile.rhos, **grids}
