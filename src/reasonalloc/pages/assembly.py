"""How a page is put together: a template, styles and scripts of this package, and data, in one file.

All that comes from a user or a model (texts, names) is inside the data: deflated and in base64, so that nothing of it
can be read as HTML. The page may load nothing, and runs no script but ours: its policy names their digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonalloc.cache.packed import pack
from reasonalloc.files import write_atomically

_ASSETS = files("reasonalloc.pages") / "assets"


def write_page(path: str | Path, name: str, facts: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: ending in .html.
        name: of the template, the style and the script in ``assets``.
        facts: JSON.
        arrays: whole numbers.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"a page is saved as .html, got {path.name!r}")
    style, script = (_read(f"common.{kind}") + _read(f"{name}.{kind}") for kind in ("css", "js"))
    text = np.frombuffer(json.dumps(facts, allow_nan=False).encode(), dtype=np.uint8)
    data = {"facts": pack(text), "arrays": {key: pack(array) for key, array in arrays.items()}}
    page = Template(_read(f"{name}.html")).substitute(
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
        style=style,
        script=script,
        data=json.dumps(data),
    )
    write_atomically(path, page.encode())


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
