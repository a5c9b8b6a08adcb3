"""What to keep: the one configuration object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from reasonalloc.policies.allocation import (
    HEAD_ALLOCATORS,
    LAYER_ALLOCATORS,
    DemandProfile,
    DynamicLayers,
    HeadAllocator,
    LayerAllocator,
)
from reasonalloc.policies.allocation.layers import no_profile
from reasonalloc.policies.allocation.miss import MissCurveBudgets
from reasonalloc.policies.methods import METHODS
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.scoring import SCORERS, Scorer

Prompt = Literal["compete", "protect"]
StorageOrder = Literal["position", "score"]
Settings = Mapping[str, Any]  # of a policy, its name among them
AUTO_PROFILE = "auto"


@dataclass(frozen=True)
class Compression:
    """How a cache is kept small. The defaults are ReasonAlloc (arXiv 2606.11164) with R-KV's scores.

    Attributes:
        budget: tokens per key/value head, averaged over all layers and heads, the window included; None keeps all.
            Between two compressions every head holds up to ``interval`` more.
        scorer: which tokens to keep: a registered name, a ``Scorer``, or a name with settings:
            ``{"name": "rkv", "window": 16}``.
        layers: how tokens are split over layers: likewise, or a ``LayerAllocator``. None (the default) is
            "wave" where a profile is given, and otherwise "dynamic", ReasonAlloc's calibration-free form.
        heads: how a layer's tokens are split over its heads: likewise, or a ``HeadAllocator``.
        profile: the model's demand profile, or the path of its JSON file; "wave", "miss-curve", "sensitivity" read it.
            "auto": the engine's cache looks in the user's cache folder, and calibrates the model if nothing is there.
        interval: decoded tokens between two compressions (the paper's Delta).
        window: newest tokens that every head keeps; None takes the scorer's own.
        prompt: "compete": the prompt's tokens are evicted like all others (as in the paper);
            "protect": they stay, on top of the budget. A prompt ends before the first token that comes alone, so
            a chunk of one token (but for the very first) counts as decoded.
        storage_order: order of the survivors in memory. "position" keeps the text's order; "score" is the order of
            R-KV's original code, where neighbours in later rounds are neighbours in score.
        seed: of the cache's own random numbers, for scorers that draw.

    Raises:
        ValueError: a value out of range or an unknown name, when constructed.
    """

    budget: int | None
    scorer: Scorer | Settings | str = "rkv"
    layers: LayerAllocator | Settings | str | None = None
    heads: HeadAllocator | Settings | str = "threshold"
    profile: DemandProfile | str | Path | None = None
    interval: int = 128
    window: int | None = None
    prompt: Prompt = "compete"
    storage_order: StorageOrder = "position"
    seed: int = 0

    def __post_init__(self) -> None:
        resolve = object.__setattr__  # the one place where names become policies; the instance is frozen after it
        resolve(self, "scorer", SCORERS.create(self.scorer))
        resolve(self, "heads", HEAD_ALLOCATORS.create(self.heads))
        if isinstance(self.profile, str | Path) and self.profile != AUTO_PROFILE:
            resolve(self, "profile", DemandProfile.load(self.profile))
        layers = self.layers if self.layers is not None else ("dynamic" if self.profile is None else "wave")
        resolve(self, "layers", LAYER_ALLOCATORS.create(layers))
        for name in ("layers", "heads"):
            policy = getattr(self, name)
            if isinstance(policy, MissCurveBudgets) and not policy.scorer:
                resolve(self, name, replace(policy, scorer=SCORERS.name_of(self.token_scorer)))
        resolve(self, "window", self.scorer.window if self.window is None else self.window)  # type: ignore[union-attr]
        self._validate()

    def _validate(self) -> None:
        for name, least in (("interval", 1), ("window", 0), ("budget", 1)):
            value = getattr(self, name)
            if name == "budget" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of tokens, at least {least}, got {value!r}")
        if self.budget is not None and self.budget < self.kept_window + 1:
            raise ValueError(
                f"budget {self.budget} leaves nothing beside the window of {self.kept_window} newest tokens: "
                f"ask for at least {self.kept_window + 1}, or pass a smaller window"
            )
        for name, allowed in (("prompt", get_args(Prompt)), ("storage_order", get_args(StorageOrder))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for policy in (self.layer_allocator, self.head_allocator):
            if self.profile is None and policy.needs_profile:
                raise ValueError(no_profile(policy))
            if isinstance(policy, MissCurveBudgets) and policy.scorer != SCORERS.name_of(self.token_scorer):
                raise ValueError(
                    f"miss curves of {policy.scorer!r} do not describe scorer {SCORERS.name_of(self.token_scorer)!r}: "
                    "choose layers and heads together with the scorer"
                )

    @property
    def kept_window(self) -> int:
        """The window as a number: newest tokens that every head keeps."""
        assert self.window is not None
        return self.window

    @property
    def token_scorer(self) -> Scorer:
        """The scorer as an object."""
        assert isinstance(self.scorer, Scorer)
        return self.scorer

    @property
    def layer_allocator(self) -> LayerAllocator:
        """The layer allocator as an object."""
        assert isinstance(self.layers, LayerAllocator)
        return self.layers

    @property
    def head_allocator(self) -> HeadAllocator:
        """The head allocator as an object."""
        assert isinstance(self.heads, HeadAllocator)
        return self.heads

    @property
    def demand_profile(self) -> DemandProfile | None:
        """The demand profile as an object; None if there is none, or none yet ("auto")."""
        return self.profile if isinstance(self.profile, DemandProfile) else None

    @property
    def observed_queries(self) -> int:
        """Last queries that must be remembered for the next compression."""
        if self.budget is None:
            return 0
        dynamic = self.layer_allocator.queries if isinstance(self.layer_allocator, DynamicLayers) else 0
        return max(self.token_scorer.observed_queries, dynamic)

    @property
    def tracks_received(self) -> bool:
        """Whether the attention received by every token must be accumulated."""
        return self.budget is not None and self.token_scorer.needs_received

    def describe(self) -> dict[str, Any]:
        """The configuration as plain JSON values; policies by name and settings, the profile by its hash."""

        def policy(value: Any, name: str) -> dict[str, Any]:
            return {"name": name, **vars(value)}

        return {
            "budget": self.budget,
            "scorer": policy(self.scorer, SCORERS.name_of(self.token_scorer)),
            "layers": policy(self.layers, LAYER_ALLOCATORS.name_of(self.layer_allocator)),
            "heads": policy(self.heads, HEAD_ALLOCATORS.name_of(self.head_allocator)),
            "profile": self.profile if self.demand_profile is None else self.demand_profile.digest,
            "interval": self.interval,
            "window": self.window,
            "prompt": self.prompt,
            "storage_order": self.storage_order,
            "seed": self.seed,
        }

    @classmethod
    def method(cls, name: str, budget: int | None = None, **overrides: Any) -> Compression:
        """A method by its name in ``METHODS``.

        Args:
            name: "full", "rkv", "reasonalloc", ...
            budget: tokens per head; required by all methods but "full", which ignores it.
            overrides: any field of ``Compression``, in place of the method's own choice.

        Raises:
            ValueError: unknown name (the nearest one is suggested), or no budget.
        """
        if name not in METHODS:
            raise unknown_name("method", name, list(METHODS))
        if name == "full":
            return cls(None, **{**METHODS[name].fields(0), **overrides})
        if budget is None:
            raise ValueError(f"method {name!r} needs a budget: tokens per key/value head, for instance 256")
        return cls(budget, **{**METHODS[name].fields(budget), **overrides})

    def replace(self, **changes: Any) -> Compression:
        """A copy with some fields changed."""
        return replace(self, **changes)
