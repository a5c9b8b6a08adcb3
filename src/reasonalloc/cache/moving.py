"""How tokens that stay come to their new slots: by torch, or by kernels that need no memory beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.kernels import launch

Spans = Int[Tensor, "layers rows heads"]


@dataclass(frozen=True)
class Source:
    """Where the tokens of some rows lie.

    Attributes:
        keys, values: ``[slots, dim]``, a pool's memory or a prompt's.
        first: ``[layers, rows, heads]``, each span's first slot there.
        received: ``[places]`` float32, their accumulated attention; None: not tracked.
        places: ``[layers, rows, heads]``, each span's first place there.
        settled: how many tokens of each span have their position stored in the pool, at ``places``; None: of none.
        counted: the position of a span's first token, were all of them to follow one another; None: 0.
    """

    keys: Float[Tensor, "slots dim"]
    values: Float[Tensor, "slots value_dim"]
    first: Spans
    received: Float[Tensor, "places"] | None
    places: Spans
    settled: Spans | None = None
    counted: Spans | None = None


@dataclass(frozen=True)
class Survivors:
    """What is written into a pool: some tokens of a batch of rows, layer-major (``layers * rows``).

    Attributes:
        source: where they are taken from.
        kept: ``[layers, rows, heads]``, how many of each span stay.
        count: tokens that stay, of all spans together.
        width: tokens that no span has more of that stay.
        index: ``[layers * rows, heads, width]``, which ones; None: the first ones.
        in_order: whether these are ascending, so that tokens keep their order.
    """

    source: Source
    kept: Spans
    count: int
    width: int
    index: Int[Tensor, "batch heads width"] | None = None
    in_order: bool = True


class Move(Protocol):
    """The same tokens' way to the same new spans, in every kind of memory."""

    def tokens(
        self, memory: tuple[Tensor, Tensor], starts: Spans, slots: int, segment: int | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values.

        Args:
            memory: the pool's.
            starts: where the spans begin there, afterwards.
            slots: of the pool, afterwards; new memory is made if it has others.
            segment: of how many consecutive spans the slots stay the same ones; None: of none.
        """

    def positions(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """Each token's position, stored or counted."""

    def received(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """Accumulated attention."""


def begin(survivors: Survivors) -> Move:
    """By kernels where they run and tokens keep their order, else by torch."""
    serves = survivors.in_order and launch.serve(survivors.kept.device)
    return KernelMove(survivors) if serves else TorchMove(survivors)


class TorchMove:
    """Whole tokens are read before anything is written; what is read takes memory beside the pool's."""

    def __init__(self, survivors: Survivors) -> None:
        self.source = survivors.source
        kept = survivors.kept.flatten()
        count, device = survivors.count, kept.device
        spans = torch.arange(len(kept), device=device)
        self._span = torch.repeat_interleave(spans, kept, output_size=count)
        self._at = torch.arange(count, device=device) - (kept.cumsum(0) - kept)[self._span]
        index = survivors.index
        self._chosen = self._at if index is None else index.flatten()[self._span * index.shape[-1] + self._at]

    def tokens(
        self, memory: tuple[Tensor, Tensor], starts: Spans, slots: int, segment: int | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Move.tokens``."""
        places = self.source.first.flatten()[self._span] + self._chosen
        targets = starts.flatten()[self._span] + self._at
        keys = _written(memory[0], self.source.keys.index_select(0, places), targets, slots)
        return keys, _written(memory[1], self.source.values.index_select(0, places), targets, slots)

    def positions(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """As ``Move.positions``."""
        source, numbers = self.source, self._chosen
        if source.counted is not None:
            numbers = source.counted.flatten()[self._span] + numbers
        if source.settled is not None:
            stored = memory[source.places.flatten()[self._span] + self._chosen]
            numbers = torch.where(self._chosen < source.settled.flatten()[self._span], stored.long(), numbers)
        return self._numbers(memory, numbers, places, slots)

    def received(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """As ``Move.received``."""
        assert self.source.received is not None
        numbers = self.source.received[self.source.places.flatten()[self._span] + self._chosen]
        return self._numbers(memory, numbers, places, slots)

    def _numbers(self, memory: Tensor, numbers: Tensor, places: Spans, slots: int) -> Tensor:
        return _written(memory, numbers.to(memory.dtype), places.flatten()[self._span] + self._at, slots)


class KernelMove:
    """Within blocks that stay where they are, tokens move in place; otherwise they are copied once."""

    def __init__(self, survivors: Survivors) -> None:
        self.source = survivors.source
        self._shape, self._width = survivors.kept.shape, survivors.width
        self._kept = survivors.kept.flatten()
        index = survivors.index
        self._index = None if index is None else index.flatten(0, 1).to(torch.int32)

    def tokens(
        self, memory: tuple[Tensor, Tensor], starts: Spans, slots: int, segment: int | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Move.tokens``."""
        from reasonalloc.kernels.compaction import copy_between, move_within

        first, new = self.source.first.flatten(), starts.flatten()
        if memory[0] is self.source.keys and segment is not None and self._index is not None:
            index, kept = self._index, self._kept
            if segment > self._shape[2]:  # of all layers of a row: they lie one behind the other
                first, new, kept = (self._by_row(x) for x in (first, new, kept))
                index = index.view(*self._shape, -1).transpose(0, 1).reshape(index.shape)
            move_within(memory, index, kept, first, new, segment)
            return memory
        written = []
        for own, source in zip(memory, (self.source.keys, self.source.values), strict=True):
            fresh = own if len(own) == slots and own is not source else own.new_empty(slots, own.shape[1])
            copy_between(source, fresh, first, new, self._kept, self._index, self._width)
            written.append(fresh)
        return written[0], written[1]

    def positions(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """As ``Move.positions``."""
        source = self.source
        settled = torch.zeros_like(self._kept) if source.settled is None else source.settled.flatten()
        counted = torch.zeros_like(self._kept) if source.counted is None else source.counted.flatten()
        return self._numbers(memory, memory, places, slots, settled, counted)

    def received(self, memory: Tensor, places: Spans, slots: int) -> Tensor:
        """As ``Move.received``."""
        assert self.source.received is not None
        return self._numbers(memory, self.source.received, places, slots, None, None)

    def _numbers(
        self, memory: Tensor, source: Tensor, places: Spans, slots: int, settled: Tensor | None, counted: Tensor | None
    ) -> Tensor:
        from reasonalloc.kernels.compaction import move_numbers

        fresh = memory if len(memory) == slots else memory.new_empty(slots)
        old, new = self.source.places.flatten(), places.flatten()
        other = None if source is fresh else source
        move_numbers(fresh, self._index, self._kept, old, new, self._width, other, settled, counted)
        return fresh

    def _by_row(self, x: Tensor) -> Tensor:
        return x.view(self._shape).transpose(0, 1).flatten()


def _written(memory: Tensor, tokens: Tensor, targets: Tensor, slots: int) -> Tensor:
    """``memory`` with these tokens in it; new memory where it must have other slots."""
    if len(memory) != slots:
        memory = memory.new_empty(slots, *memory.shape[1:])
    return memory.index_copy_(0, targets, tokens)
