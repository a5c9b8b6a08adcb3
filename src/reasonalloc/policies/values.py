"""Values as users give them, made plain; whatever is wrong with one is said in a sentence that names it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from numbers import Real
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

MOST_TOKENS = 2**40
LARGEST = 2**63  # numbers in files are below
_SHOWN = 80  # characters of a value's text in a message
_JSON = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
Plain = TypeVar("Plain")


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
    """A number of tokens, at least ``least`` and at most ``MOST_TOKENS``. Raises ``ValueError``."""
    try:
        number = whole_number(value)
    except TypeError:
        number = least - 1
    if number > MOST_TOKENS:
        raise ValueError(f"{name} must be at most {MOST_TOKENS} tokens, got {shown(value)}")
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
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} is too large: {shown(value)}") from None
        return value if isinstance(value, int) else number
    if kind == "bool":
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {shown(value)}")
        return bool(value)
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    return value


def built(kind: Callable[..., Plain], values: Any) -> Plain:
    """A dataclass of plain JSON values, as a file holds them: its fields by name, each of the type that it is declared.

    Raises:
        ValueError: no object, an unknown or missing field, a value of another type; the field is named.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a JSON object is needed, got {shown(values)}")
    hints, needed = _declared(kind)
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ValueError(f"unknown field {shown(unknown[0])}; there are {', '.join(hints)}")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"field {missing[0]!r} is missing")
    return kind(**{name: _plain(name, value, hints[name]) for name, value in values.items()})


@lru_cache
def _declared(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """A dataclass's fields with their types, and which of them must be given."""
    hints = get_type_hints(kind)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return {f.name: hints[f.name] for f in fields(kind)}, needed


def _plain(name: str, value: Any, kind: Any) -> Any:
    """A value of a declared type: a list becomes a tuple, an object a dataclass; others are as they were."""
    origin, inner = get_origin(kind), get_args(kind)
    if NoneType in inner:
        return None if value is None else _plain(name, value, inner[0])
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {', '.join(inner)}, got {shown(value)}")
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        if set(map(type, value)) == {inner[0]} and inner[0] in (bool, float):  # thousands, in results
            _check_range(name, min(value))
            _check_range(name, max(value))
            return origin(value)
        return origin(_plain(f"an entry of {name}", entry, inner[0]) for entry in value)
    elif origin is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a JSON object, got {shown(value)}")
    elif isinstance(kind, type) and is_dataclass(kind):
        try:
            return built(kind, value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif kind is not Any:
        of_kind = type(value) in (int, float) if kind is float else type(value) is kind
        if not of_kind:
            raise ValueError(f"{name} must be {_JSON[kind]}, got {shown(value)}")
        if kind in (int, float):
            _check_range(name, value)
    return value


def _check_range(name: str, value: float) -> None:
    if not -LARGEST < value < LARGEST:
        raise ValueError(f"{name} must be a number below 2 ** 63, got {shown(value)}")
