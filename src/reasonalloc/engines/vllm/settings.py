"""What the user asks of the plugin, by the environment variable REASONALLOC."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reasonalloc.files import parse_json
from reasonalloc.policies.allocation import DynamicLayers
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.policies.written import EXAMPLE, compression_of

VARIABLE = "REASONALLOC"


@dataclass(frozen=True)
class Settings:
    """What REASONALLOC says.

    Attributes:
        compression: its fields, ``method`` among them.
        routing: under tensor parallelism, whether heads compete within their "rank" or, at the price of gathering a
            layer's scores at every routing, in the whole layer ("global").
    """

    compression: Compression
    routing: str = "rank"

    def __post_init__(self) -> None:
        if self.routing not in ("rank", "global"):
            raise ValueError(f'"routing" must be "rank" or "global", got {self.routing!r}')
        _check(self.compression)


def settings() -> Settings | None:
    """What was asked for, or None if the variable is not set.

    Raises:
        ValueError: it is no JSON object, names no budget or no known method, or asks for what arenas cannot give.
    """
    return _parse(os.environ.get(VARIABLE, "").strip())


@lru_cache(maxsize=4)
def _parse(text: str) -> Settings | None:
    if not text:
        return None
    try:
        asked: Any = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE} must be JSON, for instance '{EXAMPLE}': {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"{VARIABLE} must be a JSON object, for instance '{EXAMPLE}', got {text}")
    routing = asked.pop("routing", "rank")
    return Settings(compression_of(asked, VARIABLE), routing)


def _check(chosen: Compression) -> None:
    if chosen.budget is None:
        raise ValueError(f"{VARIABLE} asks for the full cache: leave it unset, then vLLM serves as ever")
    if isinstance(chosen.layer_allocator, DynamicLayers):
        raise ValueError(
            "layer budgets measured while decoding do not fit vLLM, which fixes every layer's memory at start: pass a "
            'calibrated "profile", or "method": "reasonalloc-head" for equal layers'
        )
    if chosen.prompt == "protect":
        raise ValueError(
            '"prompt": "protect" has no bound, an arena has one: use "pin", which keeps it inside the budget'
        )
    if chosen.profile == AUTO_PROFILE:
        raise ValueError(
            '"profile": "auto" calibrates a model, a server cannot: run `reasonalloc calibrate` and name its file'
        )
