"""What to keep: the one configuration object."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from reasonalloc.policies.allocation import (
    HEAD_ALLOCATORS,
    LAYER_ALLOCATORS,
    DemandProfile,
    DynamicLayers,
    HeadAllocator,
    LayerAllocator,
    ModelShape,
)
from reasonalloc.policies.allocation.curves import CurveBudgets
from reasonalloc.policies.allocation.layers import no_profile
from reasonalloc.policies.asked import PIN_SHARE, Asked, pinned_of
from reasonalloc.policies.methods import METHODS
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.scoring import SCORERS, Scorer
from reasonalloc.policies.scoring.scorer import without_window
from reasonalloc.policies.values import check_setting, shown, tokens

Allocator = TypeVar("Allocator", LayerAllocator, HeadAllocator)
Prompt = Literal["compete", "protect", "pin"]
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
            ``{"name": "rkv", "kernel": 5}``. "window" among them is the field below, unless the scorer has a setting
            of this name.
        layers: how tokens are split over layers: likewise, or a ``LayerAllocator``. None (the default) is
            "wave" where a profile is given, and otherwise "dynamic", ReasonAlloc's calibration-free form.
        heads: how a layer's tokens are split over its heads: likewise, or a ``HeadAllocator``.
        profile: the model's demand profile, or the path of its JSON file; "wave", "miss-curve",
            "loss-curve", "sensitivity" read it.
            "auto": the engine's cache looks in the user's cache folder, and calibrates the model if nothing is there.
        interval: decoded tokens between two compressions (the paper's Delta).
        window: newest tokens that every head keeps; None takes the scorer's own.
        prompt: "compete": the prompt's tokens are evicted like all others (as in the paper);
            "protect": they stay, on top of the budget; "pin": they stay, inside the budget, in every head as many as
            ``pin_share`` allows. A prompt ends before the first token that comes alone, so a chunk of one token (but
            for the very first) counts as decoded.
        pin_share: of the budget, that a prompt's tokens may hold with "pin" (arXiv 2609.03430 keeps all of it). Of a
            longer prompt every head pins its best-scored ones, chosen when the prompt ends; the window's are not asked.
            Layers and heads get no less than those and the window, whatever their demand, so budget and window must
            leave room; that floor counts before R(.)'s own bounds, and its upper bound gives way to it.
        storage_order: order of the survivors in memory. "position" keeps the text's order; "score" is the order of
            R-KV's original code, where neighbours in later rounds are neighbours in score.
        seed: of the cache's own random numbers, for scorers that draw.
        asked: its own record of what it was made from; never to be passed.

    Once made, every field reads as what the cache will do: policies as objects, ``window`` as a number, ``layers``
    as what None stands for. Two that read alike are equal. Copies with changes (``replace``) start from what was
    asked, not from what it reads as.

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
    pin_share: float = PIN_SHARE
    storage_order: StorageOrder = "position"
    seed: int = 0
    asked: Asked | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self) if f.name != "asked"}
        given: dict[str, Any] = {name: getattr(self, name) for name in defaults}
        asked = Asked(given) if self.asked is None else self.asked
        if not isinstance(asked, Asked):
            raise ValueError(f"asked is a Compression's own record, leave it out: got {shown(asked)}")
        if asked.read:  # dataclasses.replace hands over what the fields read as
            asked = asked.changed({name: value for name, value in given.items() if not asked.reads_as(name, value)})
            given = {**defaults, **asked.fields()}
        read = _resolved(given, asked)
        for name, value in read.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "asked", asked.resolved(read))
        _check(self)

    @property
    def kept_window(self) -> int:
        """The window as a number: newest tokens that every head keeps."""
        assert self.window is not None
        return self.window

    @property
    def most_pinned(self) -> int:
        """Tokens of a prompt that every head keeps for good at most."""
        return 0 if self.budget is None else pinned_of(self.budget, self.prompt, self.pin_share)

    @property
    def least(self) -> int:
        """Tokens that a head needs room for whatever its demand: the pinned ones of a long prompt, and the window."""
        return self.kept_window + self.most_pinned

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

    @property
    def unbounded(self) -> str:
        """Why no layer's memory has a bound that is known before the first token, and the remedy; "" if it has."""
        if self.budget is None:
            return "a full cache has no bound: ask for a budget"
        if isinstance(self.layer_allocator, DynamicLayers):
            return (
                "layer budgets measured while decoding fix no layer's memory: pass a calibrated profile, or "
                "layers='uniform' (method 'reasonalloc-head') for equal layers"
            )
        if self.prompt == "protect":
            return "prompt='protect' has no bound: use prompt='pin', which keeps the prompt inside the budget"
        return ""

    def check_profile(self, shape: ModelShape, architecture: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if the profile is of another model.

        Warn where its curves were measured with the prompt protected and this cache does not protect it, or the other
        way round: then they say what another cache loses.
        """
        if self.demand_profile is None:
            return
        self.demand_profile.check(shape, architecture)
        for policy in (self.layer_allocator, self.head_allocator):
            grid = self.demand_profile.grids.get(policy.scorer) if isinstance(policy, CurveBudgets) else None
            if grid is not None and grid.protect_prompt != (self.prompt == "protect"):
                if grid.protect_prompt:
                    measured, remedy = (
                        "with the prompt protected",
                        "prompt='protect' (--protect-prompt), or curves measured without it",
                    )
                else:
                    measured, remedy = (
                        "without protecting the prompt",
                        "a profile of `reasonalloc calibrate ... --protect-prompt`",
                    )
                warnings.warn(
                    f"the profile's curves were measured {measured}, but this cache has prompt={self.prompt!r}: they "
                    f"describe another cache; use {remedy}",
                    stacklevel=3,  # where the cache is made
                )
                return

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
            **({"pin_share": self.pin_share} if self.prompt == "pin" else {}),
            "storage_order": self.storage_order,
            "seed": self.seed,
        }

    @classmethod
    def method(cls, name: str, budget: int | None = None, **overrides: Any) -> Compression:
        """A method by its name in ``METHODS``.

        Args:
            name: "full", "rkv", "reasonalloc", ...
            budget: tokens per head; required by all methods but "full", which takes none.
            overrides: any field of ``Compression``, in place of the method's own choice.

        Raises:
            ValueError: unknown name (the nearest one is suggested), no budget, or one for "full".
        """
        if not isinstance(name, str) or name not in METHODS:
            raise unknown_name("method", name, list(METHODS))
        if name == "full" and budget is not None:
            raise ValueError(f"method 'full' keeps every token and takes no budget, got {shown(budget)}: leave it out")
        if name != "full" and budget is None:
            raise ValueError(f"method {name!r} needs a budget: tokens per key/value head, for instance 256")
        return cls._of(Asked({"budget": budget, **overrides}, name))

    def replace(self, **changes: Any) -> Compression:
        """What the same call with some other fields would have made.

        What was left open, as ``window=None`` or ``layers=None``, is decided anew, and what a method sets by its
        budget follows a new budget.
        """
        assert self.asked is not None
        return self._of(self.asked.changed(changes))

    @classmethod
    def _of(cls, asked: Asked) -> Compression:
        return cls(**asked.fields(), asked=asked)


def _resolved(given: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """What every field of a ``Compression`` reads as: names become policies, and what was left open is decided."""
    profile = given["profile"]
    if isinstance(profile, str | Path) and profile != AUTO_PROFILE:
        profile = DemandProfile.load(profile)
    elif profile is not None and profile != AUTO_PROFILE and not isinstance(profile, DemandProfile):
        raise ValueError(f"profile must be a DemandProfile, the path of its JSON file or 'auto', got {shown(profile)}")
    plain, window = without_window(given["scorer"])
    scorer = SCORERS.create(plain)
    if window is None:
        window = given["window"]
    elif asked.given.get("window") not in (None, window):
        raise ValueError(
            f"window is {shown(asked.given['window'])}, and {shown(window)} in the scorer's settings: give it once"
        )
    layers = given["layers"]
    if layers is None:
        layers = "dynamic" if profile is None else "wave"
    return {
        **given,
        "budget": None if given["budget"] is None else tokens("budget", given["budget"], 1),
        "scorer": scorer,
        "layers": _of_scorer(LAYER_ALLOCATORS.create(layers), scorer),
        "heads": _of_scorer(HEAD_ALLOCATORS.create(given["heads"]), scorer),
        "profile": profile,
        "interval": tokens("interval", given["interval"], 1),
        "window": tokens("window", scorer.window if window is None else window, 0),
        "pin_share": check_setting("pin_share", given["pin_share"], "float"),
        "seed": check_setting("seed", given["seed"], "int"),
    }


def _of_scorer(policy: Allocator, scorer: Scorer) -> Allocator:
    """Curves that name no scorer are those of the scorer in use."""
    if isinstance(policy, CurveBudgets) and not policy.scorer:
        return replace(policy, scorer=SCORERS.name_of(scorer))
    return policy


def _check(made: Compression) -> None:
    """Raise ``ValueError`` where fields that are right by themselves do not go together."""
    if made.budget is not None and made.budget < made.kept_window + 1:
        raise ValueError(
            f"budget {made.budget} leaves nothing beside the window of {made.kept_window} newest tokens: "
            f"ask for at least {made.kept_window + 1}, or pass a smaller window"
        )
    if not 0 < made.pin_share <= 1:
        raise ValueError(f"pin_share is a share of the budget, above 0 and at most 1, got {made.pin_share}")
    if made.budget is not None and made.most_pinned and made.budget < made.least + 1:
        raise ValueError(
            f"budget {made.budget} has no room for {made.most_pinned} pinned tokens (pin_share {made.pin_share}), the "
            f"window of {made.kept_window} and one more: ask for a larger budget, or a smaller window or pin_share"
        )
    for name, allowed in (("prompt", get_args(Prompt)), ("storage_order", get_args(StorageOrder))):
        if getattr(made, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(made, name))}")
    layers, heads = LAYER_ALLOCATORS.name_of(made.layer_allocator), HEAD_ALLOCATORS.name_of(made.head_allocator)
    for level, name, policy in (("layers", layers, made.layer_allocator), ("heads", heads, made.head_allocator)):
        if made.profile is None and policy.needs_profile:
            assert made.asked is not None
            own = made.asked.method and level not in made.asked.given
            written = f"method {made.asked.method!r}" if own else f"{level}={name!r}"
            raise ValueError(no_profile(policy, written))
        if isinstance(policy, CurveBudgets) and policy.scorer != SCORERS.name_of(made.token_scorer):
            raise ValueError(
                f"curves of {policy.scorer!r} do not describe scorer {SCORERS.name_of(made.token_scorer)!r}: "
                "choose layers and heads together with the scorer"
            )
