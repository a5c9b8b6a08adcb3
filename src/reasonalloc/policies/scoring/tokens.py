"""Cached tokens in padded form: what scorers read and what a round selects from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Source = Tensor | Callable[[], Tensor]


class LayerTokens:
    """Tokens of every (sequence, head), left-aligned and padded at the end.

    The batch may hold the sequences of several layers, one layer behind the other: what a scorer does with one
    sequence must not depend on the others. The last tokens of a head are always the newest ones. Entries at or past
    ``lengths`` are undefined. Keys and values are gathered when they are first asked for: a scorer that looks at
    neither costs no copy of the cache.

    Attributes:
        lengths: ``[batch, heads]``, tokens that each head holds.
        positions: ``[batch, heads, tokens]``, each token's index in its sequence, padding not counted.
        received: ``[batch, heads, tokens]`` float32, attention that each token received since it arrived, or None if
            nobody asked.
    """

    def __init__(
        self,
        keys: Source,
        values: Source,
        lengths: Int[Tensor, "batch heads"],
        positions: Int[Tensor, "batch heads tokens"],
        received: Float[Tensor, "batch heads tokens"] | None = None,
    ) -> None:
        """``keys``, ``values``: tensors, or functions that gather them."""
        self._keys, self._values = keys, values
        self.lengths, self.positions, self.received = lengths, positions, received

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
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.positions.device

    @property
    def index(self) -> Int[Tensor, "tokens"]:
        """0, 1, 2, ... along the token axis."""
        return torch.arange(self.positions.shape[2], device=self.device)

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
        places = (rows * self.positions.shape[2] + index).flatten()

        def pick(x: Tensor) -> Tensor:  # whole tokens: on a CPU far faster than a gather of their channels
            return x.flatten(0, 2).index_select(0, places).view(*index.shape, *x.shape[3:])

        received = None if self.received is None else pick(self.received)
        return LayerTokens(lambda: pick(self.keys), lambda: pick(self.values), lengths, pick(self.positions), received)


def drop_padding(x: Tensor, real: Bool[Tensor, "batch tokens"]) -> Tensor:
    """Move each sequence's real tokens to the front of the token axis (dim 2 of ``x``), order kept."""
    order = real.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return x.gather(2, order[:, None, :, None].expand_as(x))
