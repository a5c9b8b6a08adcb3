"""Cached tokens in padded form: what scorers read and what a round selects from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Source = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class RaggedKeys:
    """Where keys lie that nobody has gathered.

    Attributes:
        keys: ``[slots, dim]``, contiguous, after rotary embedding.
        starts: ``[batch, heads]`` int64, the first slot of each head; its tokens follow one another.
    """

    keys: Float[Tensor, "slots dim"]
    starts: Int[Tensor, "batch heads"]


class LayerTokens:
    """Tokens of every (sequence, head), left-aligned and padded at the end.

    The batch may hold the sequences of several layers, one layer behind the other: what a scorer does with one
    sequence must not depend on the others. The last tokens of a head are always the newest ones. Entries at or past
    ``lengths`` are undefined. All but the lengths is gathered when it is first asked for: a scorer that looks at
    neither keys nor values costs no copy of the cache.

    Attributes:
        lengths: ``[batch, heads]``, tokens that each head holds.
        width: tokens of the padded tensors.
        ragged: the keys where they lie, or None where they lie padded only.
    """

    def __init__(
        self,
        keys: Source,
        values: Source,
        lengths: Int[Tensor, "batch heads"],
        positions: Source,
        received: Source | None = None,
        width: int | None = None,
        ragged: RaggedKeys | None = None,
    ) -> None:
        """``keys``, ``values``, ``positions``, ``received``: tensors, or functions that gather them.

        ``width`` is needed where none of them is a tensor.
        """
        self._keys, self._values, self._positions, self._received = keys, values, positions, received
        if width is None:
            tensors = [x for x in (positions, keys, values, received) if isinstance(x, Tensor)]
            if not tensors:
                raise ValueError("width is needed where keys, values and positions are all gathered later")
            width = tensors[0].shape[2]
        self.lengths, self.width, self.ragged = lengths, width, ragged

    @property
    def keys(self) -> Float[Tensor, "batch heads tokens dim"]:
        """After rotary embedding, in the model's dtype."""
        if not isinstance(self._keys, Tensor):
            self._keys = self._keys()
        return self._keys

    @property
    def values(self) -> Float[Tensor, "batch heads tokens value_dim"]:
        """In the model's dtype."""
        if not isinstance(self._values, Tensor):
            self._values = self._values()
        return self._values

    @property
    def positions(self) -> Int[Tensor, "batch heads tokens"]:
        """Each token's index in its sequence, padding not counted."""
        if not isinstance(self._positions, Tensor):
            self._positions = self._positions()
        return self._positions

    @property
    def received(self) -> Float[Tensor, "batch heads tokens"] | None:
        """Attention that each token received since it arrived, float32, or None if nobody asked."""
        if self._received is not None and not isinstance(self._received, Tensor):
            self._received = self._received()
        return self._received

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.lengths.device

    @property
    def index(self) -> Int[Tensor, "tokens"]:
        """0, 1, 2, ... along the token axis."""
        return torch.arange(self.width, device=self.device)

    @property
    def valid(self) -> Bool[Tensor, "batch heads tokens"]:
        """Which entries are tokens."""
        return self.index < self.lengths[..., None]

    def newest(self, window: int) -> Bool[Tensor, "batch heads tokens"]:
        """Which entries are among a head's last ``window`` tokens."""
        return self.valid & (self.index >= self.lengths[..., None] - window)

    def gather(self, index: Int[Tensor, "batch heads kept"], lengths: Int[Tensor, "batch heads"]) -> LayerTokens:
        """The tokens at ``index`` (any token of the head past ``lengths``), a copy."""
        rows = torch.arange(index.shape[0] * index.shape[1], device=index.device).view(*index.shape[:2], 1)
        places = (rows * self.width + index).flatten()

        def pick(x: Tensor) -> Tensor:  # whole tokens: on a CPU far faster than a gather of their channels
            return x.flatten(0, 2).index_select(0, places).view(*index.shape, *x.shape[3:])

        received = None if self.received is None else pick(self.received)
        return LayerTokens(lambda: pick(self.keys), lambda: pick(self.values), lengths, pick(self.positions), received)


def drop_padding(x: Tensor, real: Bool[Tensor, "batch tokens"]) -> Tensor:
    """Move each sequence's real tokens to the front of the token axis (dim 2 of ``x``), order kept."""
    order = real.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return x.gather(2, order[:, None, :, None].expand_as(x))
