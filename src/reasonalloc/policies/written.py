"""A compression as it is written in JSON: the fields of ``Compression``, and ``method``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from reasonalloc.policies.compression import Compression
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.values import shown

FIELDS = ("method", *(field.name for field in fields(Compression) if field.name != "asked"))
DEFAULT_METHOD = "reasonalloc"
EXAMPLE = '{"method": "reasonalloc", "budget": 1024, "profile": "wave.json"}'


def compression_of(written: Any, source: str) -> Compression:
    """The compression that an object of fields asks for; without ``method`` it is ``DEFAULT_METHOD``.

    Args:
        written: a mapping from ``FIELDS`` to plain values; policies by name, or as ``{"name": ..., settings}``.
        source: where it is written, for messages.

    Raises:
        ValueError: no object, an unknown field, or a bad value. One sentence, which begins with ``source``.
    """
    if not isinstance(written, Mapping):
        raise ValueError(f"{source} must be a JSON object, for instance {EXAMPLE}, got {shown(written)}")
    for name in written:
        if name not in FIELDS:
            raise ValueError(f"{source}: {unknown_name('field', name, list(FIELDS))}")
    given = {"method": DEFAULT_METHOD, **written}
    method = given.pop("method")
    try:
        return Compression.method(method, **given)
    except (ValueError, OSError) as error:  # a profile's file may not be there
        raise ValueError(f"{source}: {error}") from error
