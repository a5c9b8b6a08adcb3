"""Files: written whole or not at all, read with errors that name the line, kept for the user in one folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where this package keeps files for its user: $REASONALLOC_CACHE, or reasonalloc in the user's cache folder."""
    own = os.environ.get("REASONALLOC_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{base}/reasonalloc").expanduser()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    with _beside(path, content) as whole:
        os.replace(whole, path)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file, whole, unless there is one already; of several writers the first wins.

    Returns:
        Whether this call wrote it.
    """
    if path.exists():
        return False
    with _beside(path, content) as whole:
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except PermissionError:  # a file system without hard links: the last writer wins instead
            os.replace(whole, path)
    return True


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[str]:
    """A hidden file with the content, in the same folder; gone afterwards unless it was moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes private files; ours are as readable as any other
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see ``parse_json_lines``, or the file is no text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return parse_json_lines(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def parse_json_lines(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a text in JSON lines, with their line numbers.

    Raises:
        ValueError: nothing in it, or a line that is no JSON object; ``name`` and line are named.
    """
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"{name}, line {number}: a JSON object is needed, found {type(data).__name__}")
        objects.append((number, data))
    if not objects:
        raise ValueError(f"{name} is empty")
    return objects


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
