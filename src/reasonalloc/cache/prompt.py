"""A prompt that has not been taken into the pools yet: whole, in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.moving import Source
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.spans import Spans
from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import HostInts, on_device
from reasonalloc.kernels import launch
from reasonalloc.policies.scoring.tokens import LayerTokens, RaggedKeys


@dataclass
class Memory:
    """A prompt's tokens in the layers of one pool, ``[layers, rows, heads, tokens(, dim)]``."""

    keys: Float[Tensor, "layers rows heads tokens dim"]
    values: Float[Tensor, "layers rows heads tokens value_dim"]
    received: Float[Tensor, "layers rows heads tokens"] | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """All of it, changed alike."""
        received = None if self.received is None else function(self.received)
        return Memory(function(self.keys), function(self.values), received)


class Prompt:
    """Keys and values of some rows' first tokens, pool by pool.

    A prompt is kept whole until it ends, however it is cut into chunks: what is forgotten does not depend on the
    cuts. A prompt in one piece is compressed pool by pool, and so lies here no longer than a pool's layers run. Of a
    pool of one layer it is the engine's own tensors; the layers of a larger one are copied into one memory.

    Attributes:
        rows: which rows of the table.
        counts: ``[rows]``, tokens of each so far.
    """

    def __init__(self, rows: HostInts, track_received: bool) -> None:
        self.rows = rows
        self.counts = np.zeros(len(rows), dtype=np.int64)
        self._of_pool: dict[int, Memory] = {}  # by the pool's first layer
        self._track_received = track_received

    def add(
        self,
        pool: Pool,
        layer: int,
        key: Float[Tensor, "rows heads tokens dim"],
        value: Float[Tensor, "rows heads tokens value_dim"],
        chunk: Chunk,
    ) -> None:
        """Take in a layer's part of a chunk, padding left out; ``counts`` includes it already."""
        key, value = chunk.packed(key), chunk.packed(value)
        local, width = pool.local(layer), key.shape[2]
        old = self._of_pool.get(int(pool.layers[0]))
        if local == 0:
            new = Memory(key[None], value[None], None)
            if self._track_received:
                new.received = key.new_zeros((1, *key.shape[:3]), dtype=torch.float32)
            # A chunk that goes on stays for a while, and the engine's tensors are those of its whole batch.
            if len(pool.layers) > 1 or old is not None or not chunk.ends_prompt:
                new = _enlarged(new, old, len(pool.layers))
            self._of_pool[int(pool.layers[0])] = old = new
        assert old is not None
        if len(pool.layers) > 1:
            old.keys[local, :, :, -width:], old.values[local, :, :, -width:] = key, value

    def of(self, pool: Pool) -> Memory:
        """All of a pool's layers."""
        return self._of_pool[int(pool.layers[0])]

    def spans(self, pool: Pool, layer: int) -> Spans:
        """For attention of a later chunk, and for what a chunk's queries give to the tokens."""
        memory, local = self.of(pool), pool.local(layer)
        key, value = memory.keys[local], memory.values[local]
        received = None if memory.received is None else memory.received[local].view(-1)
        heads, width = key.shape[1:3]
        starts = np.arange(len(self.rows) * heads).reshape(-1, heads) * width
        lengths = np.repeat(self.counts[:, None], heads, axis=1)
        return Spans.of(key.reshape(-1, key.shape[3]), value.reshape(-1, value.shape[3]), received, starts, lengths)

    def let_go(self, pool: Pool) -> None:
        """The tokens are in their pool now."""
        del self._of_pool[int(pool.layers[0])]

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder the rows of a batch."""
        index = list(rows)
        self.rows, self.counts = np.arange(len(index)), self.counts[index]
        for first, memory in self._of_pool.items():
            self._of_pool[first] = memory.map(lambda x: x[:, index])


def _enlarged(new: Memory, old: Memory | None, layers: int) -> Memory:
    """Memory for so many layers: what is there, and behind it room for what is new, of which the first layer is in."""
    width = 0 if old is None else old.keys.shape[3]

    def grown(x: Tensor, before: Tensor | None) -> Tensor:
        room = x.new_zeros if x.dim() == 4 else x.new_empty
        larger = room((layers, *x.shape[1:3], width + x.shape[3], *x.shape[4:]))
        if before is not None:
            larger[:, :, :, :width] = before
        larger[0, :, :, width:] = x[0]
        return larger

    received = None
    if new.received is not None:
        received = grown(new.received, None if old is None else old.received)
    before = (None, None) if old is None else (old.keys, old.values)
    return Memory(grown(new.keys, before[0]), grown(new.values, before[1]), received)


class PromptTokens:
    """The tokens of a prompt on their way into a pool."""

    is_settled = False

    def __init__(self, prompt: Prompt, pool: Pool) -> None:
        self.pool, self.rows = pool, prompt.rows
        self._memory = prompt.of(pool).map(lambda x: x.flatten(0, 1))
        self.width = int(self._memory.keys.shape[2])
        shape = (len(pool.layers), len(prompt.rows), pool.table.heads)
        self.lengths = np.broadcast_to(prompt.counts[:, None], shape).copy()
        self._first = np.arange(self.lengths.size).reshape(shape) * self.width

    def tokens(self, first: int, last: int) -> LayerTokens:
        """As ``round.Held``; the prompt's own memory."""
        memory, device = self._memory, self._memory.keys.device
        of = slice(first * len(self.rows), last * len(self.rows))
        lengths, starts = (on_device(x[first:last], device).flatten(0, 1) for x in (self.lengths, self._first))
        return LayerTokens(
            memory.keys[of],
            memory.values[of],
            lengths,
            torch.arange(self.width, device=device).expand(*lengths.shape, -1),
            None if memory.received is None else memory.received[of],
            self.width,
            RaggedKeys(self._flat.keys, starts) if launch.serve(device) else None,
        )

    def source(self) -> Source:
        """The prompt's memory; spans of ``width`` tokens one behind the other, all of them in order."""
        first, flat = on_device(self._first, self._memory.keys.device), self._flat
        return Source(flat.keys, flat.values, first, flat.received, first)

    @cached_property
    def _flat(self) -> Memory:
        """Of rows that are the model's own, not in one piece, a copy."""
        return self._memory.map(lambda x: x.flatten(0, 2))
