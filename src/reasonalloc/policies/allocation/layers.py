"""Layer allocators: how many tokens each layer may hold, over all its heads.

A layer allocator answers once, when the cache is made (``allocate``), or - ``DynamicLayers`` - again at every
routing round from measured demands (``split``). All totals sum to layers x heads x budget, to the token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.policies.allocation.apportion import apportion, check_operator, smooth
from reasonalloc.policies.allocation.profile import PAPER_RHO, DemandProfile
from reasonalloc.policies.allocation.shape import ModelShape
from reasonalloc.policies.registry import Registry


class LayerAllocator(ABC):
    """Splits the whole cache's tokens over layers. Implementations are frozen dataclasses of their settings.

    Attributes:
        needs_profile: whether a cache without a demand profile is refused.
    """

    needs_profile: bool = False

    @property
    def calibrate_options(self) -> str:
        """What `reasonalloc calibrate` must be told beside the model, for a profile that serves this allocator."""
        return ""

    @abstractmethod
    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """Tokens per layer over all its heads, summing to ``layers * kv_heads * budget``.

        Args:
            shape: the model's attention shape.
            budget: tokens per key/value head, averaged over the model; includes the window.
            window: recent tokens that every head keeps: no layer gets less than ``kv_heads * window``.
            profile: the model's demand profile, or None.

        Returns:
            ``[layers]``, int64, on the CPU.
        """


LAYER_ALLOCATORS: Registry[LayerAllocator] = Registry("layer allocator", "reasonalloc.layers", LayerAllocator)
"""Every known layer allocator by name: ``LAYER_ALLOCATORS.names()``, ``LAYER_ALLOCATORS.create("wave")``."""
register_layer_allocator = LAYER_ALLOCATORS.register
"""Class decorator that enters a ``LayerAllocator`` under a name: ``@register_layer_allocator("mine")``.

Raises ``ValueError`` for a name that another class has, and for a class that is no ``LayerAllocator``.
"""


class ReadsProfile(Protocol):
    """Any allocator, of layers or of heads, that can say how to calibrate for it."""

    @property
    def calibrate_options(self) -> str:
        """As for ``LayerAllocator``."""


def no_profile(policy: ReadsProfile, name: str = "") -> str:
    """What is wrong where an allocator that needs a profile has none, and what to do.

    Args:
        policy: the allocator.
        name: what asked for it, as its user wrote it, for instance "method 'lossalloc'"; "" for the policy's class.
    """
    options = policy.calibrate_options
    kind = next((words for option, words in _MEASURED.items() if options.startswith(option)), "")
    command = " ".join(filter(None, ("reasonalloc calibrate --model MODEL", options, "-o profile.json")))
    return (
        f"{name or type(policy).__name__} needs the model's demand profile{kind and f' with {kind}'}: run `{command}` "
        "and pass profile='profile.json' (--profile profile.json)"
        + (
            ""
            if options
            else ", or profile='auto' to calibrate once and keep the result; layers='dynamic' (method "
            "'reasonalloc-dynamic') measures demand while it decodes and needs none"
        )
    )


_MEASURED = {"--miss": "miss curves", "--loss": "loss curves", "--sensitivity": "loss sensitivity"}


def check_rho(rho: float) -> None:
    """Validate a share of attention mass; raises ``ValueError``."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")


def split_over_layers(
    weights: Float[Tensor, "*batch layers"],
    shape: ModelShape,
    budget: int,
    window: int,
    lower: float,
    upper: float,
) -> Int[Tensor, "*batch layers"]:
    """Exact layer totals in proportion to ``weights``, clipped to multiples of the mean, window always affordable."""
    mean = float(shape.kv_heads * budget)
    low = torch.full_like(weights, max(lower * mean, shape.kv_heads * window), dtype=torch.float64)
    high = torch.full_like(weights, upper * mean, dtype=torch.float64)
    return apportion(weights, shape.layers * shape.kv_heads * budget, low, high)


@LAYER_ALLOCATORS.register("uniform")
@dataclass(frozen=True)
class UniformLayers(LayerAllocator):
    """Every layer the same: the base line of all eviction methods."""

    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """``kv_heads * budget`` for each layer."""
        return torch.full((shape.layers,), shape.kv_heads * budget, dtype=torch.int64)


@LAYER_ALLOCATORS.register("pyramid")
@dataclass(frozen=True)
class PyramidLayers(LayerAllocator):
    """PyramidKV (arXiv 2406.02069): linearly less for deeper layers.

    Deviation: the schedule's floor divisions overspend by up to some percent; here the schedule only gives the
    proportions, and the totals are exact.

    Attributes:
        beta: the last layer has about 1/beta of the mean beside the window, the first nearly twice the mean.

    Raises:
        ValueError: beta below 1, when constructed.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")

    def schedule(self, layers: int, budget: int, window: int) -> list[int]:
        """Tokens per head and layer as the paper's code computes them, not renormalised."""
        rest = budget - window
        least = rest // self.beta
        most = 2 * rest - least
        step = (most - least) // max(layers - 1, 1)
        return [max(most - layer * step, 0) + window for layer in range(layers)]

    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """The schedule, renormalised to the exact total."""
        weights = torch.tensor(self.schedule(shape.layers, budget, window), dtype=torch.float64)
        return split_over_layers(weights, shape, budget, window, 0.0, float(shape.layers))


@LAYER_ALLOCATORS.register("wave")
@dataclass(frozen=True)
class WaveLayers(LayerAllocator):
    """ReasonAlloc's offline preallocation (section 3 there): R(.) on the model's measured demand profile.

    The lower bound never falls under the window [ours]: a layer must be able to keep its recent tokens.

    Attributes:
        rho: share of attention whose demand is read from the profile, in (0, 1]; it must have been measured.
        exponent: the paper's gamma, the power of R(.).
        lower: least share of a layer, as a multiple of the mean, in [0, 1].
        upper: largest share, likewise, at least 1.

    Raises:
        ValueError: a setting out of range, when constructed; no profile or another rho, when a cache is made.
    """

    rho: float = PAPER_RHO
    exponent: float = 0.5
    lower: float = 0.25
    upper: float = 2.0

    needs_profile = True

    def __post_init__(self) -> None:
        check_operator(self.exponent, self.lower, self.upper)
        check_rho(self.rho)

    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """R(demand profile; exponent gamma, clip to [lower, upper] x mean). Raises ``ValueError`` without a profile."""
        if profile is None:
            raise ValueError(no_profile(self))
        demand = torch.from_numpy(profile.layer_demand(self.rho))
        return split_over_layers(smooth(demand, self.exponent), shape, budget, window, self.lower, self.upper)


@LAYER_ALLOCATORS.register("dynamic")
@dataclass(frozen=True)
class DynamicLayers(LayerAllocator):
    """Layer budgets from demand measured while decoding (ReasonAlloc, appendix C; the formulas are ours).

    At each routing round every layer measures ``N_rho`` of its observation window; an exponential moving average
    per sequence takes the place of the offline profile. Layers run one after another, so a round uses the demands
    of the round before; the first round is uniform.

    Attributes:
        rho: share of attention whose demand is measured, in (0, 1].
        decay: weight of the past in the moving average, in [0, 1).
        queries: recent queries that the demand is measured on.
        exponent: the paper's gamma, the power of R(.).
        lower: least share of a layer, as a multiple of the mean, in [0, 1].
        upper: largest share, likewise, at least 1.

    Raises:
        ValueError: a setting out of range, when constructed.
    """

    rho: float = PAPER_RHO
    decay: float = 0.5
    queries: int = 8
    exponent: float = 0.5
    lower: float = 0.25
    upper: float = 2.0

    def __post_init__(self) -> None:
        check_operator(self.exponent, self.lower, self.upper)
        check_rho(self.rho)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")

    def allocate(
        self, shape: ModelShape, budget: int, window: int, profile: DemandProfile | None
    ) -> Int[Tensor, "layers"]:
        """The first round: uniform, as nothing has been measured."""
        return UniformLayers().allocate(shape, budget, window, profile)

    def split(
        self, demand: Float[Tensor, "batch layers"], shape: ModelShape, budget: int, window: int
    ) -> Int[Tensor, "batch layers"]:
        """R(.) on averaged demands, one exact split per sequence."""
        return split_over_layers(smooth(demand, self.exponent), shape, budget, window, self.lower, self.upper)
