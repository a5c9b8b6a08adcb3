"""A record of every routing: who got how many tokens, when, and why."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reasonalloc.files import write_atomically


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
    """

    step: int
    layer: int
    total: list[int]
    budgets: list[list[int]]
    kept: list[list[int]]
    held: list[list[int]]
    threshold: list[float] | None


class Recorder:
    """Collects routings; give it to a cache and save it when the generation is done."""

    FIELDS = ("total", "budgets", "kept", "held", "threshold")

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def add(self, routing: Routing) -> None:
        """Keep one routing."""
        self.routings.append(routing)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The record as arrays ``[rounds, layers, batch(, heads)]``, and ``step`` as ``[rounds]``.

        Raises:
            ValueError: nothing was recorded, or the batch changed between rounds.
        """
        if not self.routings:
            raise ValueError("no routing was recorded: the cache never held more than its budget for an interval")
        layers = sorted({routing.layer for routing in self.routings})
        by_layer = [[r for r in self.routings if r.layer == layer] for layer in layers]
        rounds = min(map(len, by_layer))
        table = [[column[i] for column in by_layer] for i in range(rounds)]
        if len({len(r.total) for row in table for r in row}) > 1:
            raise ValueError("the batch changed while recording; save it as JSON instead")
        arrays = {"step": np.array([row[0].step for row in table])}
        for name in self.FIELDS:
            values = [[getattr(r, name) for r in row] for row in table]
            if not any(v is None for row in values for v in row):
                arrays[name] = np.array(values, dtype=np.float64 if name == "threshold" else np.int64)
        return arrays

    def save(self, path: str | Path) -> None:
        """Write the record, atomically: ``.json`` (any record) or ``.npz`` (fixed batch, see ``arrays``)."""
        path = Path(path)
        if path.suffix == ".json":
            entries = [{**vars(r), "threshold": _json_floats(r.threshold)} for r in self.routings]
            text = json.dumps({"schema": 1, "routings": entries}, allow_nan=False)
            write_atomically(path, text.encode())
        elif path.suffix == ".npz":
            arrays = self.arrays()
            with tempfile.TemporaryFile() as buffer:
                np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
                buffer.seek(0)
                write_atomically(path, buffer.read())
        else:
            raise ValueError(f"a record is saved as .json or .npz, got {path.name!r}")

    @classmethod
    def load(cls, path: str | Path) -> Recorder:
        """Read a record saved as JSON. Raises ``ValueError`` if the file is not one."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no record at {path}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            recorder = cls()
            recorder.routings = [_routing(entry) for entry in data["routings"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a record of routings saved as JSON: {error}") from error
        return recorder


def _json_floats(values: list[float] | None) -> list[float | str] | None:
    return None if values is None else [x if math.isfinite(x) else str(x) for x in values]


def _routing(entry: dict[str, Any]) -> Routing:
    threshold = entry["threshold"]
    return Routing(**{**entry, "threshold": None if threshold is None else [float(x) for x in threshold]})
