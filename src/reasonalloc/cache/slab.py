"""The ragged slab of one layer.

One tensor of key slots and one of value slots per layer. Each (sequence, head) owns a contiguous *span* of them:
its budget plus room for the tokens of one interval. Spans differ in size; the sum of a sequence's spans does not
change when a routing moves budget between heads, so a slab is allocated once and re-used in place. Padding is
never stored.

Lengths and span starts are mirrored on the host: between compressions they grow by known amounts, so nothing in
the decode loop has to wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.spans import HostInts, Spans, on_device
from reasonalloc.policies.scoring.tokens import LayerTokens


class RaggedSlab(Spans):
    """Key/value slots of one layer, owned in spans by its (sequence, head) rows.

    Attributes:
        positions: ``[slots]`` int32, the token's index in its sequence; also filled ahead for the span's free slots.
        seen: ``[batch]`` on the host: real tokens of each sequence so far, evicted ones included.
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch heads tokens dim"],
        values: Float[Tensor, "batch heads tokens value_dim"],
        capacities: HostInts,
        track_received: bool,
    ) -> None:
        """An empty slab for tensors like ``keys`` and ``values`` (their content is not read)."""
        self.device = keys.device
        self.keys = keys.new_empty(0, keys.shape[-1])
        self.values = values.new_empty(0, values.shape[-1])
        self.positions = torch.empty(0, dtype=torch.int32, device=self.device)
        self.received = torch.empty(0, device=self.device) if track_received else None
        self.seen = np.zeros(keys.shape[0], dtype=np.int64)
        self._layout(capacities, np.zeros_like(capacities))
        self._resize(int(capacities.sum()))
        self._number_slots()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key and value tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of everything kept per slot beside keys and values."""
        return self.positions.nbytes + (0 if self.received is None else self.received.nbytes)

    # ---- growing --------------------------------------------------------------------------------------------

    def extend(self, tokens: LayerTokens, counts: HostInts) -> None:
        """Add several tokens to every row, ``counts`` of each sequence. The caller has made room."""
        filled = tokens.valid.flatten()
        first = (self.starts_device + self.lengths_device)[..., None]
        slots = (first + tokens.index).flatten()[filled]
        self.keys[slots] = tokens.keys.flatten(0, 2)[filled]
        self.values[slots] = tokens.values.flatten(0, 2)[filled]
        if self.received is not None:
            self.received[slots] = 0.0
        self._advance(counts)

    def truncate(self, tokens: int) -> None:
        """Forget the newest ``tokens`` of every row (a rejected speculation)."""
        self._advance(np.full(self.batch, -tokens, dtype=np.int64))

    def _advance(self, counts: HostInts) -> None:
        super()._advance(counts)
        self.seen += counts

    def _number_slots(self) -> None:
        """Give every slot the position its token will have: one write here spares one per decoded token and head."""
        first_free = (self.starts + self.lengths - self.seen[:, None]).reshape(-1)
        numbers = np.arange(self.slots) - first_free.repeat(self.capacities.reshape(-1))
        self.positions.copy_(torch.from_numpy(numbers.astype(np.int32)))

    # ---- reading and rewriting --------------------------------------------------------------------------------

    def padded(self) -> LayerTokens:
        """All live tokens, a padded copy: one layer's extra memory, taken at a compression only."""
        at = torch.arange(int(self.lengths.max(initial=0)), device=self.device)
        slots = (self.starts_device[..., None] + at).clamp(max=max(self.slots - 1, 0))
        received = None if self.received is None else self.received[slots]
        lengths = self.lengths_device.clone()
        return LayerTokens(self.keys[slots], self.values[slots], lengths, self.positions[slots], received)

    def store(
        self,
        tokens: LayerTokens,
        lengths: HostInts,
        capacities: HostInts,
        seen: HostInts,
        index: Int[Tensor, "batch heads kept"] | None = None,
    ) -> None:
        """Replace the content by some of ``tokens``, in place where the number of slots does not change.

        Args:
            tokens: must not share memory with the slab.
            lengths: how many each row holds from now on, on the host.
            capacities: the new spans.
            seen: real tokens of each sequence so far.
            index: which of a row's tokens, any past ``lengths``; None: the first ones.
        """
        self.seen = seen.copy()
        self._layout(capacities, lengths)
        self._resize(int(capacities.sum()))
        self._number_slots()
        slots = _numbers(self.starts, lengths, self.device)
        padded = (tokens.keys if index is None else index).shape[2] * np.arange(lengths.size)
        places = _numbers(padded, lengths, self.device)
        if index is not None:
            places = tokens.places(index).flatten().index_select(0, places)
        # Whole tokens, by places that the host knows: faster than by masks, and nothing waits for the device.
        self.keys.index_copy_(0, slots, tokens.keys.flatten(0, 2).index_select(0, places))
        self.values.index_copy_(0, slots, tokens.values.flatten(0, 2).index_select(0, places))
        positions = tokens.positions.flatten().index_select(0, places)
        self.positions.index_copy_(0, slots, positions.to(torch.int32))
        if self.received is not None and tokens.received is not None:
            self.received.index_copy_(0, slots, tokens.received.flatten().index_select(0, places))

    def grow(self, capacities: HostInts) -> None:
        """Larger spans, same content."""
        self.store(self.padded(), self.lengths.copy(), capacities, self.seen)

    def select_sequences(self, indices: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences as ``indices`` says (beams, several samples, finished rows)."""
        first = self.starts[:, 0]
        last = first + self.capacities.sum(1)

        def pick(x: Tensor) -> Tensor:
            return torch.cat([x[first[i] : last[i]] for i in indices]) if len(indices) else x[:0]

        self.keys, self.values, self.positions = pick(self.keys), pick(self.values), pick(self.positions)
        if self.received is not None:
            self.received = pick(self.received)
        rows = np.asarray(indices, dtype=np.int64)
        self.seen = self.seen[rows]
        self._layout(self.capacities[rows], self.lengths[rows])

    def _layout(self, capacities: HostInts, lengths: HostInts) -> None:
        ends = capacities.reshape(-1).cumsum()
        self._place((ends - capacities.reshape(-1)).reshape(capacities.shape), lengths.copy(), capacities.copy())

    def _resize(self, slots: int) -> None:
        if slots == self.slots:
            return
        self.keys = self.keys.new_empty(slots, self.keys.shape[1])
        self.values = self.values.new_empty(slots, self.values.shape[1])
        self.positions = self.positions.new_empty(slots)
        if self.received is not None:
            self.received = self.received.new_zeros(slots)


def _numbers(first: HostInts, counts: HostInts, device: torch.device) -> Tensor:
    """``first[i], first[i] + 1, ...``, ``counts[i]`` of them, for one row after another."""
    counts = counts.reshape(-1)
    before = counts.cumsum() - counts
    return on_device((first.reshape(-1) - before).repeat(counts) + np.arange(counts.sum()), device)
