"""Whether ``generate`` goes on with the cache that it was given. A model may make another one, and never says so."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch.nn import Module
from transformers import LogitsProcessor

from reasonalloc.engines.models import UnsupportedModelError
from reasonalloc.engines.transformers.continuation import GENERATE
from reasonalloc.engines.transformers.names import CACHE_NAMES, FIELD, MODEL_CACHE_NAMES


def check_presence(module: Module) -> None:
    """Called where an attention is not given keys of a ragged cache: that must be right.

    Looks among the functions that are at work, as ``continuation.Origin`` does: the model that ``generate`` runs must
    have been given the cache that ``generate`` was. Only a model's first layer asks, so this is done once a pass, and
    never in a pass with a ragged cache.

    A compression that the model's generation_config or ``enable`` asks for is nothing that the ``generate`` of the
    model's class knows of. It is refused here where no cache was passed, rather than left without effect.

    Args:
        module: the attention.

    Raises:
        UnsupportedModelError: it was given another one, or none.
        ValueError: a compression is asked for, and the call has no cache.
    """
    if getattr(module, "layer_idx", None) != 0:
        return
    frame: FrameType | None = sys._getframe(1)
    model: FrameType | None = None  # the outermost that takes a cache
    while frame is not None:
        code = frame.f_code
        if code is GENERATE:
            if model is not None:
                _compare(_cache(frame.f_locals.get("model_kwargs", {})), model.f_locals)
                _check_asked(frame.f_locals)
            return
        if code.co_name == "forward" and any(name in code.co_varnames for name in MODEL_CACHE_NAMES):
            model = frame
        elif code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), LogitsProcessor):
            return  # a model that helps to choose tokens (guidance) has a cache of its own
        frame = frame.f_back


def _compare(given: Any, passed: dict[str, Any]) -> None:
    if hasattr(given, "ragged") and _cache(passed) is not given:
        raise left_behind(passed.get("self"), given.get_seq_length())


def _check_asked(call: dict[str, Any]) -> None:
    config: Any = call.get("generation_config")
    if getattr(config, "is_assistant", False):  # an assistant is passed the other model's
        return
    if any(call.get("kwargs", {}).get(name) is not None for name in CACHE_NAMES):
        return
    if hasattr(vars(call["self"]).get("generate"), "compression"):
        raise ValueError(
            "this model was enabled, and this call of its class's generate has no cache: call model.generate, or pass "
            "a cache"
        )
    if getattr(config, FIELD, None) is not None:
        raise ValueError(
            f"generation_config asks for a compression in its field {FIELD!r}, and this call of generate has no cache: "
            "call ra.enable(model) once, which makes one for every call, or pass a cache, or set the field to None"
        )


def _cache(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in MODEL_CACHE_NAMES if arguments.get(name) is not None), None)


def left_behind(model: Any, seen: int) -> UnsupportedModelError:
    """The error of a model that goes on without the cache that it was given, which has seen so many tokens."""
    return UnsupportedModelError(
        f"{type(model).__name__} goes on without the cache that it was given, after {seen} tokens: write shorter texts "
        "(max_new_tokens), or use transformers' own DynamicCache for it"
    )
