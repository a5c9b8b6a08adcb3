"""Files: written whole or not at all, with a checksum; read with errors that name the file; kept in one folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"
_DEEPEST = 64  # lists and objects inside one another


def cache_folder() -> Path:
    """Where this package keeps files for its user: $REASONALLOC_CACHE, or reasonalloc in the user's cache folder."""
    own = os.environ.get("REASONALLOC_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{base}/reasonalloc").expanduser()


def write_atomically(path: Path, content: bytes, lasting: bool = True) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: of the file; its folder is made.
        content: all of it.
        lasting: wait until the disk has it, so that a power loss cannot take it. Only for what may be lost at any time
            is that not worth the milliseconds.
    """
    with _beside(path, content, lasting) as whole:
        os.replace(whole, path)
    if lasting:
        _to_disk(path.parent)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file, whole, unless there is one already; of several writers the first wins. Waits for the disk.

    Returns:
        Whether this call wrote it.
    """
    if path.exists():
        return False
    with _beside(path, content, lasting=True) as whole:
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except PermissionError:  # a file system without hard links: the last writer wins instead
            os.replace(whole, path)
    _to_disk(path.parent)
    return True


@contextmanager
def _beside(path: Path, content: bytes, lasting: bool) -> Iterator[str]:
    """A hidden file with the content, in the same folder; gone afterwards unless it was moved."""
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes private files; ours are as readable as any other
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that the disk has them."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _to_disk(folder.parent)


def _to_disk(folder: Path) -> None:
    """Wait until the disk has a folder's list of files, on systems that let one wait for that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def digest(value: Any) -> str:
    """The first 24 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of all else in it, which ``unsealed`` verifies."""
    return {CHECKSUM: digest(dict(document)), **document}


def unsealed(document: Any) -> dict[str, Any]:
    """A JSON object without its checksum; one that has none, as of an older version or by hand, as it is.

    Raises:
        ValueError: no object, or something was changed after the checksum was made.
    """
    if not isinstance(document, dict):
        raise ValueError(f"a JSON object is needed, found {type(document).__name__}")
    found = {name: value for name, value in document.items() if name != CHECKSUM}
    if CHECKSUM in document and document[CHECKSUM] != digest(found):
        raise ValueError(
            f"its content is not what its checksum was made of; if you changed it yourself, remove {CHECKSUM!r} from it"
        )
    return found


def parse_json(content: str | bytes, finite: bool = True) -> Any:
    """The value of a JSON text, by the letter of the standard.

    Args:
        content: the text, as bytes in UTF-8.
        finite: refuse numbers that are no JSON (NaN) or infinite as floats (1e999).

    Raises:
        ValueError: no text in UTF-8, not JSON, or what no file of ours holds: such a number, halves of characters,
            integers of thousands of digits, lists inside lists without end.
    """
    strict: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, **strict)
        if not text.isascii() or "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters fail here
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"it is no text in UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    _check_depth(value)
    return value


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises ``ValueError`` as ``parse_json``, and ``OSError``."""
    return parse_json(path.read_bytes())


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits} is too large")
    return value


def _check_depth(value: Any) -> None:
    level = _nested([value])
    for _ in range(_DEEPEST):
        level = [child for found in level for child in _nested(found.values() if isinstance(found, dict) else found)]
    if level:
        raise ValueError("it is nested too deeply")


def _nested(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see ``parse_json_lines``, or the file is no text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    return parse_json_lines(text, str(path))


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
            data = parse_json(line, finite=False)  # a field that nobody asks for may be NaN
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{name}, line {number}: a JSON object is needed, found {type(data).__name__}")
        objects.append((number, data))
    if not objects:
        raise ValueError(f"{name} is empty: it needs a JSON object on every line")
    return objects


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
