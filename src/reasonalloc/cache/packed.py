"""Arrays of whole numbers inside JSON: deflated, as text. Browsers can read them, too."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_BYTES = 1 << 28  # of an array in a file; few bytes that are not true can claim, and inflate to, far more
_KINDS = ("uint8", "uint16", "uint32")


def smallest(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Whole numbers of at least 0 in as few bytes as they fit in."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def pack(array: npt.NDArray[Any]) -> dict[str, Any]:
    """An array as a JSON object: its kind, its shape, and its bytes (little-endian, zlib, base64).

    Raises:
        ValueError: another kind than 8, 16 or 32 bit unsigned.
    """
    if array.dtype.name not in _KINDS:
        raise ValueError(f"arrays are packed as {', '.join(_KINDS)}, got {array.dtype.name}")
    content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {
        "kind": array.dtype.name,
        "shape": list(array.shape),
        "deflated": base64.b64encode(zlib.compress(content)).decode(),
    }


def unpack(entry: Any) -> npt.NDArray[Any]:
    """What ``pack`` was given.

    Raises:
        ValueError: it is no such object, or its bytes are not as many as its shape says.
    """
    if not isinstance(entry, dict) or set(entry) != {"kind", "shape", "deflated"}:
        raise ValueError("a packed array needs kind, shape and deflated")
    kind, shape, text = entry["kind"], entry["shape"], entry["deflated"]
    whole = isinstance(shape, list) and all(type(x) is int and x >= 0 for x in shape)
    if kind not in _KINDS or not whole or not isinstance(text, str):
        raise ValueError(f"a packed array of kind {kind!r} and shape {shape!r} is not known")
    dtype = np.dtype(kind).newbyteorder("<")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > MOST_BYTES:
        raise ValueError(f"a packed array of {wanted} bytes is too large: {MOST_BYTES} are the most")
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(base64.b64decode(text, validate=True), wanted + 1)  # no more, whatever it claims
    except zlib.error as error:
        raise ValueError(f"a packed array is damaged: {error}") from error
    if len(content) != wanted or not inflate.eof:
        raise ValueError(f"a packed array has not the bytes of its shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape).astype(np.dtype(kind), copy=False)
