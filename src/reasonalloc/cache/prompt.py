"""A prompt that has not been taken into the pools yet: whole, in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

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


class Prompt:
    """Keys and values of some rows' first tokens, layer by layer.

    A prompt is kept whole until it ends, however it is cut into chunks: what is forgotten does not depend on the
    cuts. A prompt in one piece is compressed pool by pool, and so lies here no longer than a pool's layers run.

    Attributes:
        rows: which rows of the table.
        counts: ``[rows]``, tokens of each so far.
    """

    def __init__(self, rows: HostInts, layers: int, track_received: bool) -> None:
        self.rows = rows
        self.counts = np.zeros(len(rows), dtype=np.int64)
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._received: list[Tensor | None] = [None] * layers
        self._track_received = track_received

    def add(
        self,
        layer: int,
        key: Float[Tensor, "rows heads tokens dim"],
        value: Float[Tensor, "rows heads tokens value_dim"],
        chunk: Chunk,
    ) -> None:
        """Take in a layer's part of a chunk, padding left out; ``counts`` includes it already."""
        key, value = chunk.packed(key), chunk.packed(value)
        if not chunk.ends_prompt:  # it stays for a while, and the engine's tensors are those of its whole batch
            key, value = key.clone(), value.clone()
        received = key.new_zeros(key.shape[:3], dtype=torch.float32) if self._track_received else None
        old, old_value, old_received = self._keys[layer], self._values[layer], self._received[layer]
        if old is not None and old_value is not None:  # of one row: only a server cuts prompts
            key, value = torch.cat([old, key], 2), torch.cat([old_value, value], 2)
            received = None if received is None or old_received is None else torch.cat([old_received, received], 2)
        self._keys[layer], self._values[layer], self._received[layer] = key, value, received

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's keys, values and received attention, ``[rows, heads, tokens(, dim)]``."""
        key, value = self._keys[layer], self._values[layer]
        assert key is not None
        assert value is not None
        return key, value, self._received[layer]

    def spans(self, layer: int) -> Spans:
        """For attention of a later chunk, and for what a chunk's queries give to the tokens."""
        key, value, received = self.of(layer)
        heads, width = key.shape[1:3]
        starts = np.arange(len(self.rows) * heads).reshape(-1, heads) * width
        lengths = np.repeat(self.counts[:, None], heads, axis=1)
        return Spans.of(
            key.reshape(-1, key.shape[3]),
            value.reshape(-1, value.shape[3]),
            None if received is None else received.view(-1),
            starts,
            lengths,
        )

    def let_go(self, layers: HostInts) -> None:
        """These layers' tokens are in their pool now."""
        for layer in layers.tolist():
            self._keys[layer] = self._values[layer] = self._received[layer] = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder the rows of a batch."""
        index = list(rows)
        self.rows, self.counts = np.arange(len(index)), self.counts[index]
        for tensors in (self._keys, self._values, self._received):
            tensors[:] = [None if x is None else x[index] for x in tensors]


class PromptTokens:
    """The tokens of a prompt on their way into a pool. Of a pool of several layers, a copy."""

    def __init__(self, prompt: Prompt, pool: Pool) -> None:
        self.pool, self.rows = pool, prompt.rows
        of_layers = [prompt.of(layer) for layer in pool.layers.tolist()]
        self._keys, self._values = (_one([x[i] for x in of_layers]) for i in (0, 1))  # type: ignore[misc]
        received = [x for _, _, x in of_layers if x is not None]
        self._received = _one(received) if received else None
        self.width = int(self._keys.shape[2])
        shape = (len(pool.layers), len(prompt.rows), pool.table.heads)
        self.lengths = np.broadcast_to(prompt.counts[:, None], shape).copy()
        self._first = np.arange(self.lengths.size).reshape(shape) * self.width

    def tokens(self, first: int, last: int) -> LayerTokens:
        """As ``round.Held``; the prompt's own memory where the pool has one layer."""
        device, of = self._keys.device, slice(first * len(self.rows), last * len(self.rows))
        lengths, starts = (on_device(x[first:last], device).flatten(0, 1) for x in (self.lengths, self._first))
        return LayerTokens(
            self._keys[of],
            self._values[of],
            lengths,
            torch.arange(self.width, device=device).expand(*lengths.shape, -1),
            None if self._received is None else self._received[of],
            self.width,
            RaggedKeys(self._keys.flatten(0, 2), starts) if launch.serve(device) else None,
        )

    def source(self) -> Source:
        """The prompt's memory; spans of ``width`` tokens one behind the other, all of them in order."""
        first = on_device(self._first, self._keys.device)
        received = None if self._received is None else self._received.flatten()
        return Source(self._keys.flatten(0, 2), self._values.flatten(0, 2), first, received, first)


def _one(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
