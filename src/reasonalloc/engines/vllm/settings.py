"""What the user asks of the plugin, by the environment variable REASONALLOC."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

from reasonalloc.allocation import DynamicLayers
from reasonalloc.compression import AUTO_PROFILE, Compression

VARIABLE = "REASONALLOC"
EXAMPLE = """'{"method": "reasonalloc", "budget": 1024, "profile": "wave.json"}'"""


def compression() -> Compression | None:
    """The compression that was asked for, or None if the variable is not set.

    Raises:
        ValueError: it is no JSON object, names no budget or no known method, or asks for what arenas cannot give.
    """
    return _parse(os.environ.get(VARIABLE, "").strip())


@lru_cache(maxsize=4)
def _parse(text: str) -> Compression | None:
    if not text:
        return None
    try:
        asked: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} must be JSON, for instance {EXAMPLE}: {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"{VARIABLE} must be a JSON object, for instance {EXAMPLE}, got {text}")
    method = asked.pop("method", "reasonalloc")
    try:
        chosen = Compression.method(method, **asked)
    except TypeError as error:
        raise ValueError(f"{VARIABLE} has a field that no Compression has: {error}") from error
    _check(chosen)
    return chosen


def _check(chosen: Compression) -> None:
    if chosen.budget is None:
        raise ValueError(f"{VARIABLE} asks for the full cache: leave it unset, then vLLM serves as ever")
    if isinstance(chosen.layer_allocator, DynamicLayers):
        raise ValueError(
            "layer budgets measured while decoding do not fit vLLM, which fixes every layer's memory at start: pass a "
            'calibrated "profile", or "method": "reasonalloc-head" for equal layers'
        )
    if chosen.prompt == "protect":
        raise ValueError('"prompt": "protect" has no bound, an arena has one: use "compete" with a larger budget')
    if chosen.profile == AUTO_PROFILE:
        raise ValueError('"profile": "auto" calibrates a model, a server cannot: run `reasonalloc calibrate` and name its file')
