"""Profiles of one model put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonalloc.policies.allocation.profile.demand_profile import DemandProfile, differences


def merge(profiles: Sequence[DemandProfile], names: Sequence[str] | None = None) -> DemandProfile:
    """One profile of all prompts: to the last digit what measuring them together would have given.

    Args:
        profiles: of one model, measured alike, on different prompts.
        names: of the profiles, in messages: their files, for instance.

    Raises:
        ValueError: nothing to merge, different models or settings (every difference is named), or a prompt that
            is in two of them.
    """
    if not profiles:
        raise ValueError("there is no profile to merge")
    if names is None:
        names = ["one", *["other"] * (len(profiles) - 1)]
    first, holder = profiles[0], dict[str, str]()
    for name, other in zip(names, profiles, strict=True):
        try:
            other.check(first.shape, first.architecture)
        except ValueError as error:
            raise ValueError(f"{names[0]} and {name} cannot be merged: {error}") from error
        different = differences(_measured_with(first), _measured_with(other), names[0], name)
        if different:
            raise ValueError(f"profiles measured differently cannot be merged ({different})")
        for prompt in other.prompts:
            if prompt.hash in holder:
                twice = sum(p.hash in holder for p in other.prompts)
                raise ValueError(
                    f"prompts counted twice: {twice} of the {len(other.prompts)} prompts of {name} are in others "
                    f"already, {prompt.hash[:12]}... in {holder[prompt.hash]}: leave one of the two out"
                )
        holder.update({prompt.hash: name for prompt in other.prompts})
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
