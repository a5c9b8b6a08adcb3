"""One model's demand profile, as allocators read it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from reasonalloc.files import write_atomically
from reasonalloc.policies.allocation.profile import serialised
from reasonalloc.policies.allocation.profile.measurements import (
    HISTOGRAM_EDGES,
    PAPER_RHO,
    Floats,
    MissGrid,
    PromptDemand,
    check_rhos,
)
from reasonalloc.policies.allocation.profile.statistics import histogram_quantiles, ratio_standard_error, total
from reasonalloc.policies.allocation.shape import ModelShape


@dataclass(frozen=True, eq=False)
class DemandProfile:
    """The calibration artefact of one model: attention demand, and miss curves where they were asked for.

    Independent of any budget: allocators compute budgets from it for any total.

    Attributes:
        shape: the model's attention shape; a cache for another shape refuses the profile.
        rhos: shares of attention mass that demand was measured for, ascending.
        prompts: one record for each prompt, in the order of their hashes.
        architecture: what else tells models apart ("model_type", "hidden_size", ...); empty for a profile by hand.
        histogram: how many rows of each layer and query head fell into each bin of ``HISTOGRAM_EDGES``, for the
            rho nearest the paper's; None for a profile by hand.
        grids: where the miss curves of each scorer were simulated.
        settings: how it was measured; merged profiles must agree on it.
        source: the model's name and revision, its dtype, the library's version. A cache does not look at it; profiles
            of different sources are not merged.
    """

    shape: ModelShape
    rhos: tuple[float, ...]
    prompts: tuple[PromptDemand, ...]
    architecture: Mapping[str, Any] = field(default_factory=dict)
    histogram: Int[np.ndarray[Any, Any], "layers query_heads bins"] | None = None
    grids: Mapping[str, MissGrid] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(sorted(self.prompts, key=lambda prompt: prompt.hash)))
        check_rhos(self.rhos)
        if not self.prompts:
            raise ValueError("prompts are missing: a profile needs at least one")
        twice = [a.hash for a, b in pairwise(self.prompts) if a.hash == b.hash]
        if twice:
            raise ValueError(f"prompts counted twice: {', '.join(twice)}")
        for prompt in self.prompts:
            self._check_prompt(prompt)
        if len({prompt.sensitivity is None for prompt in self.prompts}) > 1:
            raise ValueError("sensitivity was measured on some prompts only")
        if len({tuple(sorted(prompt.losses)) for prompt in self.prompts}) > 1:
            raise ValueError("loss curves of a scorer were measured on some prompts only")
        if self.histogram is not None:
            wanted = (self.shape.layers, self.shape.query_heads, len(HISTOGRAM_EDGES))
            if self.histogram.shape != wanted:
                raise ValueError(f"histogram has shape {self.histogram.shape}, expected {wanted}")

    def _check_prompt(self, prompt: PromptDemand) -> None:
        wanted = (len(self.rhos), self.shape.layers, self.shape.query_heads)
        if prompt.sums.shape != wanted:
            raise ValueError(
                f"sums of prompt {prompt.hash[:8]} have shape {prompt.sums.shape}, "
                f"expected {wanted} (rhos, layers, query heads)"
            )
        if prompt.rows < 1:
            raise ValueError(f"rows of prompt {prompt.hash[:8]} must be at least 1, got {prompt.rows}")
        if set(prompt.misses) != set(self.grids):
            raise ValueError(
                f"misses of prompt {prompt.hash[:8]} are of {sorted(prompt.misses)}, not {sorted(self.grids)}"
            )
        if not set(prompt.losses) <= set(self.grids):
            raise ValueError(
                f"losses of prompt {prompt.hash[:8]} are of {sorted(prompt.losses)}, which are not all in grids: "
                f"{sorted(self.grids)}"
            )
        curves = [(f"misses.{name}", name, values) for name, values in prompt.misses.items()]
        curves += [(f"losses.{name}", name, values) for name, values in prompt.losses.items()]
        for name, values in (("sums", prompt.sums), *((name, values) for name, _, values in curves)):
            if not np.isfinite(values).all() or (not name.startswith("losses") and (values < 0).any()):
                raise ValueError(f"{name} of prompt {prompt.hash[:8]} must be finite and not negative")
        heads = (self.shape.layers, self.shape.kv_heads)
        if prompt.sensitivity is not None and (
            prompt.sensitivity.shape != heads or not np.isfinite(prompt.sensitivity).all()
        ):
            raise ValueError(f"sensitivity of prompt {prompt.hash[:8]} must be {heads[0]} x {heads[1]} finite numbers")
        for name, scorer, values in curves:
            wanted = (len(self.grids[scorer].budgets), self.shape.layers, self.shape.kv_heads)
            if values.shape != wanted:
                raise ValueError(f"{name} have shape {values.shape}, expected {wanted}")

    @classmethod
    def of_layers(
        cls, layers: Sequence[float], shape: ModelShape, model_type: str = "", rho: float = PAPER_RHO
    ) -> DemandProfile:
        """A profile by hand: one demand in tokens for each layer, the same for its heads.

        Raises:
            ValueError: another number of layers than the model has, or a negative or non-finite demand.
        """
        if len(layers) != shape.layers:
            raise ValueError(f"the profile has {len(layers)} layer demands for a model of {shape.layers} layers")
        if not all(math.isfinite(d) and d >= 0 for d in layers):
            raise ValueError(f"layer demands must be finite and not negative, got {list(layers)}")
        sums = np.repeat(np.array(layers, dtype=np.float64)[None, :, None], shape.query_heads, 2)
        architecture = {"model_type": model_type} if model_type else {}
        return cls(shape, (rho,), (PromptDemand("by hand", 1, sums),), architecture)

    # ---- what allocators and readers ask ----

    def rho_index(self, rho: float) -> int:
        """Where ``rho`` stands in ``rhos``. Raises ``ValueError`` naming those that were measured."""
        near = [i for i, known in enumerate(self.rhos) if abs(known - rho) < 1e-9]
        if not near:
            raise ValueError(f"the profile has no demand for rho={rho}; measured: {', '.join(map(str, self.rhos))}")
        return near[0]

    @property
    def reference_rho(self) -> float:
        """The measured rho nearest the paper's 0.93: that of the histogram."""
        return min(self.rhos, key=lambda rho: abs(rho - PAPER_RHO))

    @property
    def rows(self) -> int:
        """Decode positions measured, over all prompts."""
        return sum(prompt.rows for prompt in self.prompts)

    def head_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers query_heads"]:
        """Mean ``N_rho`` of each query head over all measured positions, in tokens."""
        at = self.rho_index(rho)
        return total([prompt.sums[at] for prompt in self.prompts]) / self.rows

    def kv_head_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers kv_heads"]:
        """Mean ``N_rho`` of each key/value head: the mean of its query heads."""
        return self.head_demand(rho).reshape(self.shape.layers, self.shape.kv_heads, -1).mean(-1)

    def layer_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers"]:
        """Mean ``N_rho`` of each layer over positions and query heads: the Reasoning Wave, in tokens."""
        at = self.rho_index(rho)
        return total([prompt.sums[at].sum(-1) for prompt in self.prompts]) / (self.rows * self.shape.query_heads)

    def prompt_layer_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "prompts layers"]:
        """Each prompt's own wave."""
        at = self.rho_index(rho)
        return np.stack([prompt.sums[at].mean(-1) / prompt.rows for prompt in self.prompts])

    def layer_standard_error(self, rho: float = PAPER_RHO) -> Float[Floats, "layers"]:
        """Standard error of ``layer_demand`` over prompts (as a ratio of sums); NaN for a single prompt."""
        at = self.rho_index(rho)
        rows = np.array([prompt.rows for prompt in self.prompts], dtype=np.float64)
        return ratio_standard_error(np.stack([prompt.sums[at].mean(-1) for prompt in self.prompts]), rows)

    def quantiles(self, shares: Sequence[float] = serialised.QUANTILES) -> Float[Floats, "shares layers query_heads"]:
        """Quantiles of ``N_rho`` over positions at ``reference_rho``, as the upper edge of the histogram's bin.

        Raises ``ValueError`` for a profile without a histogram.
        """
        if self.histogram is None:
            raise ValueError("a profile by hand has no quantiles")
        return histogram_quantiles(self.histogram, shares)

    def miss_curves(self, scorer: str) -> Float[Floats, "budgets layers kv_heads"]:
        """Mean share of attention that falls on evicted tokens, at the budgets of ``grids[scorer]``.

        Raises ``ValueError`` if the profile has no curves of that scorer.
        """
        if scorer not in self.grids:
            raise ValueError(
                f"the profile has no miss curves of {scorer!r} (it has: {', '.join(self.grids) or 'none'}); "
                f"calibrate with --miss {scorer}"
            )
        return total([prompt.misses[scorer] for prompt in self.prompts]) / self.rows

    def loss_curves(self, scorer: str) -> Float[Floats, "budgets layers kv_heads"]:
        """What each head adds to the divergence from the full cache's predictions when all are held to a budget.

        In nats per token, at the budgets of ``grids[scorer]``. Raises ``ValueError`` if the profile has no such curves.
        """
        if any(scorer not in prompt.losses for prompt in self.prompts):
            raise ValueError(
                f"the profile has no loss curves of {scorer!r} (it has: "
                f"{', '.join(self.prompts[0].losses) or 'none'}); calibrate with --loss {scorer}"
            )
        return total([prompt.losses[scorer] for prompt in self.prompts]) / sum(prompt.tokens for prompt in self.prompts)

    def loss_sensitivity(self) -> Float[Floats, "layers kv_heads"]:
        """Rise of the loss per token when one head alone forgets, in nats; negative where forgetting helps.

        Raises ``ValueError`` if it was not measured.
        """
        parts = [prompt.sensitivity for prompt in self.prompts if prompt.sensitivity is not None]
        if not parts:
            raise ValueError("the profile has no loss sensitivity; calibrate with --sensitivity")
        return total(parts) / sum(prompt.tokens for prompt in self.prompts)

    def check(self, shape: ModelShape, architecture: Mapping[str, Any]) -> None:
        """Raise ``ValueError``, naming every difference, if the profile is of another model."""
        own, other = ({**vars(self.shape), **self.architecture}, {**vars(shape), **architecture})
        different = differences(own, {key: other.get(key) for key in own}, "profile", "model")
        if different:
            raise ValueError(
                f"the demand profile belongs to another model ({different}); "
                "pass this model's own (`reasonalloc calibrate` makes it), or choose a method that needs none"
            )

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values, as ``load`` reads them; "summary" is for people and ignored there."""
        return serialised.to_document(self)

    def to_json(self) -> bytes:
        """``to_dict`` as the text of a file: a checksum, and one line for each field and each prompt."""
        return serialised.to_file(self.to_dict())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the file's text without its checksum."""
        return hashlib.sha256(serialised.to_text(self.to_dict())).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether the other's file would have the same text."""
        return self.digest == other.digest if isinstance(other, DemandProfile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written there.
        """
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> DemandProfile:
        """Read a profile from JSON.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not JSON, another schema, damaged, or a missing or wrong field; file and field are named.
        """
        try:
            return cls(**serialised.read_profile(Path(path)))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a demand profile, or damaged: {error}; restore it, or delete it and calibrate again"
            ) from error


def differences(own: Mapping[str, Any], other: Mapping[str, Any], own_name: str, other_name: str) -> str:
    """Every key whose values differ, in words; empty if none does."""
    keys = [*own, *(key for key in other if key not in own)]
    return "; ".join(
        f"{key}: {own_name} {own.get(key)!r}, {other_name} {other.get(key)!r}"
        for key in keys
        if own.get(key) != other.get(key)
    )
