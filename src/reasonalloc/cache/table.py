"""The numbers of a model's cache: where the tokens of every row of every layer lie, and how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HostInts = npt.NDArray[np.int64]


def on_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The host's numbers on a device, without waiting for it; on the CPU the same memory."""
    on_host = torch.from_numpy(numbers)
    return on_host if device.type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)


class Phase(IntEnum):
    """What a row is doing. The engine says when it changes; nothing is guessed.

    Attributes:
        EMPTY: it has no tokens.
        PROMPT: it has tokens, none of them decoded: more of its prompt may come.
        DECODING: a token came alone after the first one, or speculated ones were settled: the prompt has ended.
    """

    EMPTY = 0
    PROMPT = 1
    DECODING = 2


class Table:
    """Numbers of all rows, one array for all layers, on the host.

    A row is a sequence of a batch, or a request of a server. Between two rounds its numbers change by known amounts,
    so the host knows them without asking the device. A decoding step changes them once for all layers
    (``Decode.advance``); a round writes them when it moves tokens (``Pool``).

    Attributes:
        starts, lengths, capacities: ``[layers, rows, heads]``: first slot, tokens and slots of every span.
        settled: ``[layers, rows, heads]``: how many of a span's tokens the last round left. Younger tokens follow one
            another, so only the settled ones have their position stored.
        seen: ``[rows]``, tokens of each row so far, padding not counted, evicted ones included.
        steps: ``[rows]``, steps decoded since the last round.
        pushed: ``[rows]``, queries that went into the ring.
        protected: ``[rows]``, leading tokens of every head that stay on top of the budget.
        streams: ``[rows]``, which random numbers a row draws: a row that moves takes its stream along.
        phases: ``[rows]``, a ``Phase`` each.
        moves: how often spans were moved, or changed otherwise than by a decoding step.
    """

    def __init__(self, layers: int, rows: int, heads: int) -> None:
        self.open(layers, rows, heads)

    def open(self, layers: int, rows: int, heads: int) -> None:
        """Begin anew, with so many empty rows."""
        spans = (layers, rows, heads)
        self.starts, self.lengths, self.capacities, self.settled = (np.zeros(spans, np.int64) for _ in range(4))
        self.seen, self.steps, self.pushed, self.protected = (np.zeros(rows, np.int64) for _ in range(4))
        self.streams = np.arange(rows)
        self.phases = np.full(rows, Phase.EMPTY, dtype=np.int64)
        self.moves = 0

    @property
    def layers(self) -> int:
        """Layers."""
        return int(self.starts.shape[0])

    @property
    def rows(self) -> int:
        """Rows, empty ones included."""
        return int(self.starts.shape[1])

    @property
    def heads(self) -> int:
        """Key/value heads of a layer."""
        return int(self.starts.shape[2])

    def clear(self, rows: HostInts) -> None:
        """Forget these rows' tokens; their memory stays as it is."""
        for spans in (self.lengths, self.settled):
            spans[:, rows] = 0
        for counts in (self.seen, self.steps, self.pushed, self.protected):
            counts[rows] = 0
        self.phases[rows] = Phase.EMPTY

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder rows; their starts are the pools' to set."""
        index = np.asarray(rows, dtype=np.int64)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, np.ascontiguousarray(value[:, index] if value.ndim == 3 else value[index]))
        self.moves += 1
