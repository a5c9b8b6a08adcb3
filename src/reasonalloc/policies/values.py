"""Values as users give them, made plain; whatever is wrong with one is said in a sentence that names it."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np

_SHOWN = 80  # characters of a value's text in a message


def shown(value: Any) -> str:
    """A value as messages show it: its text, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def whole_number(value: Any) -> int:
    """Any integral number, numpy's too, as ``int``. Raises ``TypeError`` for booleans and everything else."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{value!r} is a truth value")
    return operator.index(value)


def tokens(name: str, value: Any, least: int) -> int:
    """A number of tokens, at least ``least``. Raises ``ValueError``."""
    try:
        number = whole_number(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be a whole number of tokens, at least {least}, got {shown(value)}")
    return number


def check_setting(name: str, value: Any, annotation: Any) -> Any:
    """A policy's setting, by its annotation: ``int``, ``float``, ``bool`` and ``str`` are checked, others are not.

    Raises:
        ValueError: a value of another kind.
    """
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if kind == "int":
        try:
            return whole_number(value)
        except TypeError:
            raise ValueError(f"{name} must be a whole number, got {shown(value)}") from None
    if kind == "float":
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {shown(value)}")
        return value if isinstance(value, int) else float(value)
    if kind == "bool":
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {shown(value)}")
        return bool(value)
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    return value
