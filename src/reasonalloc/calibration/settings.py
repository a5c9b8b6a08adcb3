"""How a model is calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reasonalloc.calibration.probe import ProbeSettings
from reasonalloc.policies.allocation.profile import PAPER_RHO, MissGrid, check_rhos
from reasonalloc.policies.compression import Compression

SENSITIVITY_WINDOW = 16
BLOCK = 32  # decoded tokens that are looked at together
MISS_BUDGETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class CalibrationSettings:
    """How long and how the model generates, and what is measured meanwhile.

    Attributes:
        max_new_tokens: longest chain of thought.
        rhos: shares of attention mass whose demand is measured, ascending.
        least_tokens: positions that see fewer tokens do not count [ours].
        temperature: of sampling; 0 decodes greedily (small models then fall into loops).
        top_p: of sampling.
        seed: of sampling; each prompt draws from its own stream.
        batch_size: prompts that are decoded together. Demand does not depend on the batch but for rounding (which may
            now and then flip a sampled token); miss curves of scorers that draw at random do.
        miss: scorers (names) whose eviction is simulated for miss curves.
        miss_budgets: tokens per head of that simulation, ascending.
        interval: decoded tokens between two simulated compressions.
        protect_prompt: simulate with the prompt kept on top of the budget, for ``Compression(prompt="protect")``.
        loss: scorers (names) whose loss curves are measured, at the same budgets; they get miss curves, too. It takes
            ``loss_points`` passes forwards and backwards over every answer for each budget.
        loss_points: of the path from the full cache to the compressed one, see ``loss_curves``.
        sensitivity_window: tokens that a head keeps while its loss sensitivity is measured; None measures none. It
            takes about ``layers * kv_heads / 2`` passes over every answer.

    Raises:
        ValueError: a setting out of range, when constructed.
    """

    max_new_tokens: int = 1024
    rhos: tuple[float, ...] = (0.85, 0.90, PAPER_RHO, 0.95, 0.99)
    least_tokens: int = 64
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 4
    miss: tuple[str, ...] = ()
    miss_budgets: tuple[int, ...] = MISS_BUDGETS
    interval: int = 128
    protect_prompt: bool = False
    loss: tuple[str, ...] = ()
    loss_points: int = 2
    sensitivity_window: int | None = None

    def __post_init__(self) -> None:
        for name in ("rhos", "miss", "miss_budgets", "loss"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_rhos(self.rhos)
        for name in ("max_new_tokens", "least_tokens", "batch_size", "interval", "loss_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sensitivity_window is not None and self.sensitivity_window < 1:
            raise ValueError(f"sensitivity_window must be at least 1, got {self.sensitivity_window}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for scorer in self.simulated:
            for budget in self.miss_budgets:
                try:
                    least = Compression(None, scorer, layers="uniform").kept_window + 1
                    Compression(max(budget, least), scorer, layers="uniform")
                except ValueError as error:
                    raise ValueError(f"curves of {scorer!r} at miss_budgets (--miss-budgets): {error}") from error
                if budget < least:
                    raise ValueError(
                        f"curves of {scorer!r} at miss_budgets (--miss-budgets): {budget} leaves nothing beside the "
                        f"scorer's window, ask for at least {least}"
                    )
        self.probe()

    @property
    def simulated(self) -> tuple[str, ...]:
        """Scorers whose eviction is simulated."""
        return tuple(dict.fromkeys([*self.miss, *self.loss]))

    @property
    def grids(self) -> dict[str, MissGrid]:
        """Where their curves are measured."""
        return {scorer: MissGrid(self.miss_budgets, self.interval, self.protect_prompt) for scorer in self.simulated}

    def probe(self) -> ProbeSettings:
        """What the probe needs to know of this."""
        nearest = min(range(len(self.rhos)), key=lambda i: abs(self.rhos[i] - PAPER_RHO))
        # Blocks end where the simulated compressions are due; without any their length is free.
        block = max(b for b in range(1, BLOCK + 1) if self.interval % b == 0) if self.simulated else BLOCK
        return ProbeSettings(self.rhos, nearest, self.grids, self.least_tokens, block)

    def describe(self) -> Mapping[str, Any]:
        """What merged profiles must agree on, beside rhos and grids, as plain JSON values."""
        names = ("max_new_tokens", "least_tokens", "temperature", "top_p", "seed", "sensitivity_window")
        loss = {"loss": sorted(self.loss), "loss_points": self.loss_points} if self.loss else {}
        return {name: getattr(self, name) for name in names} | loss
