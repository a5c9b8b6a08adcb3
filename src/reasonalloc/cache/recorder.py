"""A record of every routing: who got how many tokens, when, and why."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as _brief
from typing import IO, Any

import numpy as np

from reasonalloc.cache.packed import MOST_BYTES, pack, unpack
from reasonalloc.cache.token_record import Text, TokenRecord
from reasonalloc.files import parse_json, sealed, unsealed, write_atomically

SCHEMA = 1
_TABLES = ("budgets", "kept", "held")  # a routing's numbers per sequence and head
_MOST_LAYERS = 1000  # of a record; arrays have a place for each, whether it routed or not
_BLOCK = 1 << 20  # bytes that are read at once, where only their number counts
_NOT_YET = -1  # stands in the arrays where a layer has not routed yet

Arrays = dict[str, np.ndarray[Any, Any]]
_Content = tuple[int, str, list["Routing"], TokenRecord | None, int]  # layers, about, routings, tokens, entry_bytes


@dataclass(frozen=True)
class Routing:
    """One layer at one routing round.

    Attributes:
        step: tokens that the sequences had seen, padding included.
        layer: index of the layer.
        total: the layer's budget per sequence, over all heads.
        budgets: tokens per sequence and head from this round on.
        kept: tokens per sequence and head after the round (protected prompt tokens included).
        held: tokens per sequence and head before it.
        threshold: pooled score that a token had to reach, per sequence (infinite where everything fits, or where the
            windows fill the layer; in JSON the string "inf" or "-inf"); None for allocators without one.

    Raises:
        ValueError: a number that is not whole or below 0, or lists that differ in sequences or heads.
    """

    step: int
    layer: int
    total: list[int]
    budgets: list[list[int]]
    kept: list[list[int]]
    held: list[list[int]]
    threshold: list[float] | None

    def __post_init__(self) -> None:
        for name in ("step", "layer"):
            if not _whole([getattr(self, name)]):
                raise ValueError(f"a routing's {name} must be a whole number of at least 0, got {getattr(self, name)}")
        if not _whole(self.total):
            raise ValueError(
                f"a routing's total must be whole numbers of at least 0, one a sequence, got {_brief(self.total)}"
            )
        batch, heads = self.shape
        for name in _TABLES:
            rows = getattr(self, name)
            right = isinstance(rows, list) and len(rows) == batch
            if not right or not all(_whole(row) and len(row) == heads for row in rows):
                raise ValueError(
                    f"a routing's {name} must be {batch} lists (sequences) of {heads} whole numbers of at least 0 "
                    f"(heads), got {_brief(rows)}"
                )
        if self.threshold is not None and not (
            isinstance(self.threshold, list)
            and len(self.threshold) == batch
            and all(type(x) is float for x in self.threshold)
        ):
            raise ValueError(
                f"a routing's threshold must be {batch} floats (sequences) or None, got {_brief(self.threshold)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and heads."""
        first = self.budgets[0] if isinstance(self.budgets, list) and self.budgets else []
        return len(self.total), len(first) if isinstance(first, list) else 0


def _nothing() -> None:
    """Nothing is under way."""


class Recorder:
    """Collects the routings of one generation: give it to a cache, and save it when the generation is done.

        recorder = Recorder(tokens=True)
        cache = Cache(model.config, compression, recorder=recorder)
        out = model.generate(**inputs, cache=cache)
        recorder.set_text(tokenizer, out, inputs["attention_mask"])
        recorder.save("routing.json")

    Args:
        tokens: record also when each head let go of each token. Each round then waits for the device, and looks at
            every token so far in every head: its time and memory grow with the text, and are noticed in long ones.

    Attributes:
        layers: layers of the model whose cache writes here; 0 if no cache has said so yet.
        about: the method and its settings, in words; empty if no cache has said so yet.
        entry_bytes: of a token's key and value in one head; 0 if no cache has said so yet.
        tokens: the record of tokens; None if it was not asked for.
    """

    def __init__(self, tokens: bool = False) -> None:
        self._routings: list[Routing] = []
        self._under_way: Callable[[], None] = _nothing
        self.layers = 0
        self.about = ""
        self.entry_bytes = 0
        self.tokens = TokenRecord() if tokens else None

    @property
    def routings(self) -> list[Routing]:
        """Every routing, in the order in which they happened; waits for those that a device has not told yet."""
        self._under_way()
        return self._routings

    def follow(self, land: Callable[[], None], layers: int, heads: int) -> None:
        """From now on a cache adds routings, the last ones perhaps only when it is asked to by ``land``.

        It has so many layers, and so many heads in each.
        """
        self._under_way = land
        if self.tokens is not None:
            self.tokens.open(layers, heads)

    def select(self, rows: Sequence[int], count: int) -> None:
        """A cache keeps these of its ``count`` rows.

        Raises:
            ValueError: tokens are recorded, and rows are repeated.
        """
        if self.tokens is not None:
            self.tokens.select(rows, count)

    def set_text(self, tokenizer: Any, ids: Any, attention_mask: Any) -> None:
        """Give the recorded tokens their text. A second call replaces the first one's.

        Args:
            tokenizer: the model's; ``tokenizer.decode(ids)`` is called.
            ids: ``[batch, columns]``, what ``generate`` returned: the prompt, padded on the left, and the answer.
            attention_mask: ``[batch, prompt columns]``, of the prompt: 0 where it is padding.

        Raises:
            ValueError: the recorder does not record tokens, or the text is not what the cache has seen.
        """
        if self.tokens is None:
            raise ValueError("this recorder does not record tokens: make it with Recorder(tokens=True)")
        self._under_way()
        rows, masks, texts = _lists(ids), _lists(attention_mask), []
        if len(rows) != len(masks) or any(len(row) < len(mask) for row, mask in zip(rows, masks, strict=True)):
            raise ValueError(
                f"ids are of {len(rows)} sequences and attention_mask of {len(masks)}, or ids are shorter: pass all "
                "that generate returned, and a row of the prompt's mask for each of its sequences"
            )
        for row, mask in zip(rows, masks, strict=True):
            prompt = [token for token, real in zip(row, mask, strict=False) if real]
            texts.append(Text.of(tokenizer, prompt + row[len(mask) :], len(prompt)))
        self.tokens.set_texts(texts)

    @staticmethod
    def attach(recorder: object, layers: int, about: str = "") -> Recorder | None:
        """What a cache of ``layers`` layers calls with the ``recorder`` it was given; returns it.

        ``about``: the method and its settings, in words.

        Raises:
            TypeError: neither a ``Recorder`` nor None.
            ValueError: another cache has it already.
        """
        if recorder is None:
            return None
        if not isinstance(recorder, Recorder):
            what = f"the class {recorder.__name__}" if isinstance(recorder, type) else repr(recorder)
            raise TypeError(f"recorder must be None or a recorder, made with reasonalloc.Recorder(), got {what}")
        if recorder.layers:
            raise ValueError("this recorder is another cache's: give each generation a Recorder of its own")
        recorder.layers, recorder.about = layers, about
        return recorder

    def add(self, routing: Routing) -> None:
        """Keep one routing."""
        self._routings.append(routing)

    def arrays(self) -> Arrays:
        """The record as arrays over rounds and layers, int64 where nothing else is said.

        A round is a step at which any layer routed; where a layer routed twice at one step, the last one counts. A
        layer that did not route in a round keeps the numbers of its last routing. Before its first, a layer holds all
        that it has seen (but padding), and has -1 here (NaN for the threshold). The second axis counts the layers from
        0: all of the model's if a cache wrote the record, otherwise up to the last that routed.

        Returns:
            ``step`` ``[rounds]``, ascending. ``routed`` ``[rounds, layers]``, bool: whether the layer routed in this
            round. ``total`` ``[rounds, layers, batch]``. ``budgets``, ``kept`` and ``held`` ``[rounds, layers, batch,
            heads]``. ``threshold`` ``[rounds, layers, batch]``, float64, NaN for a routing without one; left out if no
            routing has one. All are those of ``Routing``.

        Raises:
            ValueError: nothing was recorded, the batch changed between routings, or the record holds several
                generations (steps go back).
        """
        reason = self._no_arrays()
        if reason is not None:
            raise ValueError(reason)
        latest = {(r.step, r.layer): r for r in self.routings}
        steps = sorted({r.step for r in self.routings})
        layers = max(self.layers, 1 + max(r.layer for r in self.routings))
        batch, heads = self.routings[0].shape
        arrays: Arrays = {
            "step": np.array(steps, dtype=np.int64),
            "routed": np.array([[(step, layer) in latest for layer in range(layers)] for step in steps]),
            "total": np.full((len(steps), layers, batch), _NOT_YET, dtype=np.int64),
        }
        for name in _TABLES:
            arrays[name] = np.full((len(steps), layers, batch, heads), _NOT_YET, dtype=np.int64)
        if any(r.threshold is not None for r in self.routings):
            arrays["threshold"] = np.full((len(steps), layers, batch), np.nan)
        for layer in range(layers):
            last = None
            for i, step in enumerate(steps):
                last = latest.get((step, layer), last)
                for name in ("total", *_TABLES, "threshold"):
                    if last is not None and name in arrays:
                        value = getattr(last, name)
                        arrays[name][i, layer] = np.nan if value is None else value
        return arrays

    def save(self, path: str | Path) -> None:
        """Write the record, atomically, as ``.json`` or ``.npz``; ``load`` reads either back whole.

        The npz is read without pickle. It holds ``arrays()``, unless that raises, and one column over all routings for
        each of their numbers (``routings_step``, ..., batches and heads one after another). What is recorded of tokens
        and their text goes along.

        Raises:
            ValueError: another suffix, or more recorded tokens than a file may hold.
        """
        path = Path(path)
        if path.suffix == ".json":
            entries = [{**vars(r), "threshold": _json_floats(r.threshold)} for r in self.routings]
            data = {"schema": SCHEMA, "layers": self.layers, "about": self.about, "routings": entries}
            data["entry_bytes"] = self.entry_bytes
            if self.tokens is not None:
                arrays = {name: pack(array) for name, array in self.tokens.arrays().items()}
                data["tokens"] = {**self.tokens.document(), **arrays}
            write_atomically(path, json.dumps(sealed(data), allow_nan=False).encode())
        elif path.suffix == ".npz":
            buffer = io.BytesIO()
            found = {} if self._no_arrays() else self.arrays()
            np.savez_compressed(buffer, **found, **_columns(self))  # type: ignore[arg-type]
            write_atomically(path, buffer.getvalue())
        else:
            raise ValueError(f"a record is saved as .json or .npz, got {path.name!r}")

    @classmethod
    def load(cls, path: str | Path) -> Recorder:
        """Read what ``save`` wrote, JSON or npz.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or no record, or of another schema.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no record at {path}")
        content = path.read_bytes()
        recorder = cls()
        try:
            found = _from_npz(content) if content.startswith(b"PK") else _from_json(content)
            layers, recorder.about, recorder._routings, recorder.tokens, recorder.entry_bytes = found
            if not _whole([layers]) or max(layers, *(r.layer + 1 for r in recorder._routings), 0) > _MOST_LAYERS:
                raise ValueError(f"layers must be whole numbers of at least 0 and at most {_MOST_LAYERS}, got {layers}")
            recorder.layers = layers
            if not _whole([recorder.entry_bytes]):
                raise ValueError(f"entry_bytes must be a whole number of at least 0, got {recorder.entry_bytes!r}")
            if recorder.tokens is not None:
                _check_tokens(recorder.tokens, recorder._routings, layers)
        except Exception as error:  # zipfile, zlib, numpy and json have dozens of errors for damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is not a record of routings, or damaged: {reason}") from error
        return recorder

    def _no_arrays(self) -> str | None:
        """Why the record does not fit into arrays; None if it does."""
        if not self.routings:
            return "no routing was recorded: the cache never held more than its budget for an interval"
        if len({r.shape for r in self.routings}) > 1:
            return "the batch changed while recording: arrays need one batch; the routings themselves are all there"
        last: dict[int, int] = {}
        for r in self.routings:
            if r.step < last.get(r.layer, 0):
                return (
                    f"the record holds several generations: layer {r.layer} routed after {last[r.layer]} tokens and "
                    f"later after {r.step}; give each generation a Recorder of its own"
                )
            last[r.layer] = r.step
        return None


def _lists(numbers: Any) -> list[list[int]]:
    """Rows of a tensor, an array or lists."""
    rows: list[list[int]] = numbers.tolist() if hasattr(numbers, "tolist") else [list(row) for row in numbers]
    return rows


def _check_tokens(tokens: TokenRecord, routings: list[Routing], layers: int) -> None:
    """Raise ``ValueError`` where a record of tokens is not one of these routings, of a model of so many layers."""
    if [len(rows) for rows in tokens.rows] != [len(r.total) for r in routings]:
        raise ValueError("its tokens are not those of its routings")
    if sorted({r.step for r in routings}) != tokens.steps:
        raise ValueError("its tokens are of other rounds than its routings")
    shape = tokens.let_go.shape
    if tokens.steps and shape[0] != layers:
        raise ValueError(f"its tokens are of {shape[0]} layers, and the record of {layers}")
    if any(r.layer >= shape[0] or r.shape[1] != shape[2] for r in routings):
        raise ValueError("its tokens are of other layers or heads than its routings")


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**63 for x in values)


# ---- JSON ----


def _json_floats(values: list[float] | None) -> list[float | str] | None:
    return None if values is None else [x if math.isfinite(x) else str(x) for x in values]


def _from_json(content: bytes) -> _Content:
    data = parse_json(content)
    if not isinstance(data, dict) or not isinstance(data.get("routings"), list):
        raise ValueError("an object with a list of routings is needed")
    _check_schema(data.get("schema"))
    data = unsealed(data)
    routings = [_routing(i, entry) for i, entry in enumerate(data["routings"])]
    about, tokens = _words(data.get("about", "")), _tokens(data.get("tokens"))
    return data.get("layers", 0), about, routings, tokens, data.get("entry_bytes", 0)


def _tokens(entry: Any) -> TokenRecord | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"tokens must be an object, found {type(entry).__name__}")
    document = {name: value for name, value in entry.items() if name not in ("let_go", "scores")}
    return TokenRecord.of(document, unpack(entry.get("let_go")), unpack(entry.get("scores")))


def _words(about: Any) -> str:
    if not isinstance(about, str):
        raise ValueError(f"about must be a string, found {type(about).__name__}")
    if not about.isprintable():  # it is printed, and a terminal obeys control characters
        raise ValueError("about holds control characters")
    return about


def _routing(i: int, entry: Any) -> Routing:
    names = [field.name for field in fields(Routing)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"routing {i} needs {', '.join(names)}, found {found}")
    threshold = entry["threshold"]
    return Routing(**{**entry, "threshold": None if threshold is None else [float(x) for x in threshold]})


def _check_schema(schema: Any) -> None:
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, and this version of reasonalloc reads {SCHEMA}")


# ---- npz: the routings' numbers one after another ----


def _bytes(text: str) -> np.ndarray[Any, Any]:
    """A text as an array: its bytes in UTF-8."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _string(array: np.ndarray[Any, Any]) -> str:
    if array.dtype != np.uint8:
        raise ValueError("a text of it is not made of bytes")
    return array.tobytes().decode()


def _columns(recorder: Recorder) -> Arrays:
    routings = recorder.routings

    def ints(values: list[int]) -> np.ndarray[Any, Any]:
        return np.array(values, dtype=np.int64)

    columns = {
        "schema": np.array(SCHEMA),
        "layers": np.array(recorder.layers),
        "about": _bytes(recorder.about),
        "entry_bytes": np.array(recorder.entry_bytes),
        "routings_step": ints([r.step for r in routings]),
        "routings_layer": ints([r.layer for r in routings]),
        "routings_batch": ints([r.shape[0] for r in routings]),
        "routings_heads": ints([r.shape[1] for r in routings]),
        "routings_total": ints([x for r in routings for x in r.total]),
        "routings_has_threshold": np.array([r.threshold is not None for r in routings], dtype=bool),
        "routings_threshold": np.array([x for r in routings for x in r.threshold or ()], dtype=np.float64),
    }
    for name in _TABLES:
        columns[f"routings_{name}"] = ints([x for r in routings for row in getattr(r, name) for x in row])
    if recorder.tokens is not None:
        columns["tokens_document"] = _bytes(json.dumps(recorder.tokens.document()))
        columns |= {f"tokens_{name}": array for name, array in recorder.tokens.arrays().items()}
    return columns


def _from_npz(content: bytes) -> _Content:
    _check_sizes(content)
    with np.load(io.BytesIO(content), allow_pickle=False) as data:
        if "schema" not in data:
            raise ValueError("it has no schema")
        _check_schema(data["schema"].tolist())
        layers = data["layers"].tolist()
        columns = {name: data[f"routings_{name}"] for name in ("step", "layer", "batch", "heads", "has_threshold")}
        flat = {name: _Column(name, data[f"routings_{name}"]) for name in ("total", "threshold", *_TABLES)}
        about, tokens = _string(data["about"]) if "about" in data else "", None
        entry_bytes = data["entry_bytes"].tolist() if "entry_bytes" in data else 0
        if "tokens_document" in data:
            document = parse_json(_string(data["tokens_document"]))
            tokens = TokenRecord.of(document, data["tokens_let_go"], data["tokens_scores"])
    if len({column.shape for column in columns.values()}) > 1 or columns["step"].ndim != 1:
        raise ValueError("its columns differ in length")
    routings = []
    for step, layer, batch, heads, has in zip(*(column.tolist() for column in columns.values()), strict=True):
        total = flat["total"].take(batch)  # first: it has as many entries as the file holds, whatever "batch" says
        tables = {name: [flat[name].take(heads) for _ in total] for name in _TABLES}
        threshold = flat["threshold"].take(batch) if has else None
        routings.append(Routing(step, layer, total, **tables, threshold=threshold))
    for column in flat.values():
        column.end()
    return layers, _words(about), routings, tokens, entry_bytes


def _check_sizes(content: bytes) -> None:
    """Raise ``ValueError`` where an array is too large, or shorter than it says: numpy would make room for it first."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, kind = read[version](member)
                claimed = math.prod(shape) * kind.itemsize
                if claimed > MOST_BYTES:
                    raise ValueError(f"its array {name!r} of {claimed} bytes is too large: {MOST_BYTES} are the most")
                if claimed > _length(member):
                    raise ValueError(f"its array {name!r} is shorter than it says")


def _length(file: IO[bytes]) -> int:
    """How many bytes follow in a file; few of them are in memory at a time."""
    count = 0
    while block := file.read(_BLOCK):
        count += len(block)
    return count


class _Column:
    """Numbers to be taken from the front, all of them."""

    def __init__(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self.name, self.values, self.at = name, values.tolist(), 0

    def take(self, count: int) -> Any:
        found = self.values[self.at : self.at + max(count, 0)]
        if len(found) != count:
            raise ValueError(f"its column {self.name!r} is too short")
        self.at += count
        return found

    def end(self) -> None:
        if self.at < len(self.values):
            raise ValueError(f"its column {self.name!r} is too long")
