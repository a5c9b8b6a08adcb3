"""The last queries of every sequence, remembered for the next compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Queries of one forward pass; ``real`` marks those that are not padding, None if all are real."""

    states: Float[Tensor, "batch query_heads queries dim"]
    real: Bool[Tensor, "batch queries"] | None = None

    def __len__(self) -> int:
        return self.states.shape[2]

    def last(self, count: int) -> Queries:
        """The last ``count``, as a copy, so that a long prompt's queries can be freed."""
        if len(self) <= count:
            return self
        first = len(self) - count
        real = None if self.real is None else self.real[:, first:].clone()
        return Queries(self.states[:, :, first:].clone(), real)

    def without_last(self, count: int) -> Queries:
        """All but the last ``count``."""
        keep = len(self) - count
        return Queries(self.states[:, :, :keep], None if self.real is None else self.real[:, :keep])

    def select(self, rows: Tensor) -> Queries:
        """The given sequences."""
        return Queries(self.states[rows], None if self.real is None else self.real[rows])


class QueryWindow:
    """The last ``size`` *real* queries of each sequence, oldest first.

    Decoding appends references, not copies; they are joined when a compression reads them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: deque[Queries] = deque()

    def push(self, queries: Queries) -> None:
        """Append the queries of one forward pass and forget those that no one can ask for any more."""
        if not self.size or not len(queries):
            return
        if queries.real is not None:  # padding between real queries: settle per sequence which ones count
            self._parts = deque([_last_real([*self._parts, queries], self.size)])
            return
        self._parts.append(queries.last(self.size))
        spare = sum(map(len, self._parts)) - self.size
        while spare > 0 and len(self._parts[0]) <= spare:
            spare -= len(self._parts.popleft())

    def read(self) -> Queries | None:
        """The window, or None if it is empty or not wanted."""
        return _last_real(list(self._parts), self.size) if self._parts else None

    def select(self, indices: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences."""
        if self._parts:
            rows = torch.tensor(list(indices), dtype=torch.long, device=self._parts[0].states.device)
            self._parts = deque(part.select(rows) for part in self._parts)

    def clear(self) -> None:
        """Forget everything."""
        self._parts.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.states.nbytes for part in self._parts)


def _last_real(parts: list[Queries], size: int) -> Queries:
    """The last ``size`` real queries of each sequence, at the end; missing ones are marked as not real."""
    states = torch.cat([part.states for part in parts], 2)
    if all(part.real is None for part in parts):
        return Queries(states[:, :, -size:])
    marks = [
        torch.ones(len(states), len(part), dtype=torch.bool, device=states.device) if part.real is None else part.real
        for part in parts
    ]
    real = torch.cat(marks, 1)
    order = real.to(torch.uint8).argsort(dim=-1, stable=True)[:, -size:]
    states = states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
    return Queries(states, real.gather(1, order))
