"""The numbers of a model's cache: where the tokens of every row of every layer lie, and how many they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
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


@dataclass(frozen=True)
class Flight:
    """Numbers that a device has been asked for, and that have not been read yet.

    Attributes:
        rows: which rows they are about.
        numbers: in pinned memory.
        event: after which they are there.
        land: what is done with them.
    """

    rows: HostInts
    numbers: Tensor
    event: torch.cuda.Event
    land: Callable[[npt.NDArray[Any]], None]


class Table:
    """Numbers of all rows, one array for all layers, on the host.

    A row is a sequence of a batch, or a request of a server. Between two rounds its numbers change by known amounts,
    so the host knows them without asking the device. A round decides on the device where spans lie next; the host
    gets these numbers later (``expect``) and waits for them only when it needs them.

    Attributes:
        young: ``[layers, rows]``, tokens that came after the last round, the same number in every head. They follow
            one another, so only the settled ones have their position stored.
        seen: ``[rows]``, tokens of each row so far, padding not counted, evicted ones included.
        steps: ``[rows]``, steps decoded since the last round.
        pushed: ``[rows]``, queries that went into the ring.
        prompt: ``[rows]``, tokens of its prompt.
        protected: ``[rows]``, leading tokens of every head that stay on top of the budget.
        pinned: ``[rows]``, leading tokens of every head that stay inside the budget.
        streams: ``[rows]``, which random numbers a row draws: a row that moves takes its stream along.
        phases: ``[rows]``, a ``Phase`` each.
        moves: how often spans were moved, or their sizes changed.
    """

    def __init__(self, layers: int, rows: int, heads: int) -> None:
        self._flights: list[Flight] = []
        self.open(layers, rows, heads)

    def open(self, layers: int, rows: int, heads: int) -> None:
        """Begin anew, with so many empty rows."""
        spans = (layers, rows, heads)
        self._flights.clear()
        self._starts, self._capacities, self._settled = (np.zeros(spans, np.int64) for _ in range(3))
        self.young = np.zeros((layers, rows), np.int64)
        self.seen, self.steps, self.pushed = (np.zeros(rows, np.int64) for _ in range(3))
        self.prompt, self.protected, self.pinned = (np.zeros(rows, np.int64) for _ in range(3))
        self.streams = np.arange(rows)
        self.phases = np.full(rows, Phase.EMPTY, dtype=np.int64)
        self.moves = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no numbers under way."""
        self.land()
        return vars(self)

    @property
    def layers(self) -> int:
        """Layers."""
        return int(self._starts.shape[0])

    @property
    def rows(self) -> int:
        """Rows, empty ones included."""
        return int(self._starts.shape[1])

    @property
    def heads(self) -> int:
        """Key/value heads of a layer."""
        return int(self._starts.shape[2])

    @property
    def starts(self) -> HostInts:
        """``[layers, rows, heads]``, the first slot of every span."""
        self.land()
        return self._starts

    @property
    def capacities(self) -> HostInts:
        """``[layers, rows, heads]``, slots of every span."""
        self.land()
        return self._capacities

    @property
    def settled(self) -> HostInts:
        """``[layers, rows, heads]``, how many of a span's tokens the last round left."""
        self.land()
        return self._settled

    @property
    def lengths(self) -> HostInts:
        """``[layers, rows, heads]``, tokens of every span; a copy."""
        return self.settled + self.young[..., None]

    def lengths_of(self, layers: HostInts, rows: HostInts) -> HostInts:
        """Tokens of some spans, ``[layers, rows, heads]``; waits for numbers of these rows alone."""
        self.land(rows)
        of = (layers[:, None], rows)
        return self._settled[of] + self.young[of][..., None]

    # ---- numbers that come from the device ----

    def expect(self, rows: HostInts, numbers: Tensor, land: Callable[[npt.NDArray[Any]], None]) -> None:
        """Ask for a device's numbers; on the CPU they are there at once.

        Args:
            rows: which rows they are about.
            numbers: one-dimensional.
            land: gets them on the host, when any of these rows is asked about.
        """
        if numbers.device.type != "cuda":
            land(numbers.cpu().numpy())
            return
        pinned = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        pinned.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(numbers.device))
        self._flights.append(Flight(rows, pinned, event, land))

    def land(self, rows: HostInts | None = None) -> None:
        """Wait for the numbers of these rows (None: of all) and take them in, and all that were asked for before."""
        last = len(self._flights)
        if rows is not None:
            last = max((i + 1 for i, x in enumerate(self._flights) if np.isin(rows, x.rows).any()), default=0)
        for _ in range(last):
            self._flights[0].event.synchronize()
            self._land_first()

    def land_what_is_there(self) -> None:
        """Take in the numbers that have arrived, without waiting."""
        while self._flights and self._flights[0].event.query():
            self._land_first()

    def _land_first(self) -> None:
        flight = self._flights.pop(0)
        flight.land(flight.numbers.numpy())

    def place(
        self, layers: HostInts, rows: HostInts, starts: HostInts, capacities: HostInts, settled: HostInts
    ) -> None:
        """Spans that were rewritten: ``[layers, rows, heads]`` each."""
        of = (layers[:, None], rows)
        self._starts[of], self._capacities[of], self._settled[of] = starts, capacities, settled

    # ---- rows ----

    def clear(self, rows: HostInts) -> None:
        """Forget these rows' tokens; their memory stays as it is."""
        self.land(rows)
        self._settled[:, rows] = 0
        self.young[:, rows] = 0
        for counts in (self.seen, self.steps, self.pushed, self.prompt, self.protected, self.pinned):
            counts[rows] = 0
        self.phases[rows] = Phase.EMPTY

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder rows; their starts are the pools' to set."""
        self.land()
        index = np.asarray(rows, dtype=np.int64)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                by_layer = value.ndim > 1
                setattr(self, name, np.ascontiguousarray(value[:, index] if by_layer else value[index]))
        self.moves += 1


class DeviceTable:
    """The numbers of a table that a step and a round read and write, where the keys are.

    They are changed in place, so that a recorded step finds them: by a step, by a round, and by whatever the host does
    to rows; only ``select`` replaces them. The host's table follows.

    Attributes:
        starts, lengths, capacities, settled: ``[layers, rows, heads]``, as in the table; int64, because a slot times
            its channels does not fit int32 in a large pool.
        pushed: ``[rows]`` int64.
    """

    def __init__(self, table: Table, device: torch.device) -> None:
        def zeros(*shape: int) -> Int[Tensor, "..."]:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        spans = (table.layers, table.rows, table.heads)
        self.starts, self.lengths, self.capacities, self.settled = (zeros(*spans) for _ in range(4))
        self.pushed = zeros(table.rows)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.lengths.device

    def read(self, name: str, layers: slice, rows: HostInts) -> Int[Tensor, "layers rows heads"]:
        """Some spans' numbers: a view where these are all rows, else a copy."""
        numbers: Tensor = getattr(self, name)[layers]
        if _is_all(rows, numbers.shape[1]):
            return numbers
        return numbers.index_select(1, on_device(rows, self.device))

    def write(self, layers: slice, rows: HostInts, **numbers: Int[Tensor, "layers rows heads"]) -> None:
        """Set some spans' numbers, by their names."""
        everything = _is_all(rows, self.lengths.shape[1])
        index = None if everything else on_device(rows, self.device)
        for name, new in numbers.items():
            own: Tensor = getattr(self, name)[layers]
            if index is None:
                own.copy_(new)
            else:
                own.index_copy_(1, index, new)

    def add(self, layers: slice, rows: HostInts, tokens: HostInts) -> None:
        """So many tokens come to (or leave) every head of these rows: ``[rows]``."""
        more = on_device(tokens.copy(), self.device)[:, None].expand(-1, self.lengths.shape[2])
        own = self.lengths[layers]
        own.index_add_(1, on_device(rows, self.device), more.expand(len(own), -1, -1))

    def count(self, pushed: HostInts) -> None:
        """Queries remembered of all rows, as the host has counted them."""
        self.pushed.copy_(on_device(pushed.copy(), self.device), non_blocking=True)

    def select(self, table: Table) -> None:
        """The table's rows were kept, repeated, reordered: take its numbers, in memory for as many rows."""
        kept = (table.starts, table.lengths, table.capacities, table.settled)
        self.starts, self.lengths, self.capacities, self.settled = (on_device(x.copy(), self.device) for x in kept)
        self.pushed = on_device(table.pushed.copy(), self.device)

    def clear(self, rows: HostInts) -> None:
        """As ``Table.clear``."""
        index = on_device(rows, self.device)
        for numbers in (self.lengths, self.settled):
            numbers.index_fill_(1, index, 0)
        self.pushed.index_fill_(0, index, 0)


def _is_all(rows: HostInts, count: int) -> bool:
    return len(rows) == count and bool((rows == np.arange(count)).all())
