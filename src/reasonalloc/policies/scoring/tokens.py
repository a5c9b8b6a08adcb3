"""One layer's cached tokens in padded form: what scorers read and what a compression selects from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of every (sequence, head) of one layer, left-aligned and padded at the end.

    The last stored tokens of a head are always the newest ones. Entries at or past ``lengths`` are undefined.

    Attributes:
        keys, values: after rotary embedding, in the model's dtype.
        lengths: tokens that each head holds.
        positions: each token's index in its sequence, padding not counted.
        received: attention that each token received since it arrived (float32), or None if nobody asked.
    """

    keys: Float[Tensor, "batch heads tokens dim"]
    values: Float[Tensor, "batch heads tokens value_dim"]
    lengths: Int[Tensor, "batch heads"]
    positions: Int[Tensor, "batch heads tokens"]
    received: Float[Tensor, "batch heads tokens"] | None = None

    @property
    def index(self) -> Int[Tensor, "tokens"]:
        """0, 1, 2, ... along the token axis."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @property
    def valid(self) -> Bool[Tensor, "batch heads tokens"]:
        """Which entries are tokens."""
        return self.index < self.lengths[..., None]

    def newest(self, window: int) -> Bool[Tensor, "batch heads tokens"]:
        """Which entries are among a head's last ``window`` tokens."""
        return self.valid & (self.index >= self.lengths[..., None] - window)

    def places(self, index: Int[Tensor, "batch heads some"]) -> Int[Tensor, "batch heads some"]:
        """Where the tokens at ``index`` of each head lie in ``keys.flatten(0, 2)``."""
        batch, heads = index.shape[:2]
        rows = torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
        return rows * self.keys.shape[2] + index

    def gather(self, index: Int[Tensor, "batch heads kept"], lengths: Int[Tensor, "batch heads"]) -> LayerTokens:
        """The tokens at ``index`` (any token of the head past ``lengths``), a copy."""
        places = self.places(index).flatten()

        def pick(x: Tensor) -> Tensor:  # whole tokens: on a CPU far faster than a gather of their channels
            return x.flatten(0, 2).index_select(0, places).view(*index.shape, *x.shape[3:])

        received = None if self.received is None else pick(self.received)
        return LayerTokens(pick(self.keys), pick(self.values), lengths, pick(self.positions), received)


def drop_padding(x: Tensor, real: Bool[Tensor, "batch tokens"]) -> Tensor:
    """Move each sequence's real tokens to the front of the token axis (dim 2 of ``x``), order kept."""
    order = real.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return x.gather(2, order[:, None, :, None].expand_as(x))
