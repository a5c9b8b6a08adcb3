"""One layer of all requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reasonalloc.arenas.pool import ArenaPool
from reasonalloc.arenas.ring import QueryRing
from reasonalloc.arenas.slab import ArenaSlab
from reasonalloc.attention import choose_backend
from reasonalloc.budgets import LayerBudgets
from reasonalloc.compression import Compression
from reasonalloc.layer_cache import LayerCache, NewTokens
from reasonalloc.query_window import QueryWindow
from reasonalloc.storage import LayerTokens, RaggedSlab
from reasonalloc.storage.spans import HostInts


class RequestCache(LayerCache):
    """The layer's cache of one request, in its arena."""

    def __init__(
        self, layer: int, compression: Compression, budgets: LayerBudgets, pool: ArenaPool, index: int, backend: str
    ) -> None:
        self.pool, self.index = pool, index
        super().__init__(layer, compression, budgets, backend)

    def took_one(self) -> None:
        """One token was appended to the arena and attended to, together with other requests'."""
        assert self.slab is not None
        self.decoding = True
        self.slab.seen += 1
        self.seen_columns += 1
        self.steps += 1
        if self.steps >= self.compression.interval:
            self._compress()

    def settle(self) -> None:
        """Bring the tokens back into the arena where a chunk of a prompt took more and was not compressed."""
        assert isinstance(self.slab, ArenaSlab)
        if not self.slab.is_home:
            self.make_even()

    def make_even(self) -> None:
        """Share the arena's free slots equally: a chunk that was not compressed may have filled some spans.

        Room is left for the steps up to the next compression, because what is held is at most the budget, and a
        token per head for every step since.
        """
        assert isinstance(self.slab, ArenaSlab)
        self.slab.share_evenly()

    def _rewrite(self, tokens: LayerTokens) -> None:
        before = self.evicted
        super()._rewrite(tokens)
        if self.evicted > before:
            self.pool.count_round(self.index, self.evicted - before)

    def _new_slab(self, key: Tensor, value: Tensor, capacities: HostInts) -> RaggedSlab:
        return ArenaSlab(self.pool, self.index, capacities)

    def _new_window(self, size: int) -> QueryWindow:
        return QueryRing(self.pool, self.index)


class ArenaLayer:
    """One layer of all requests: what an engine calls in a forward pass.

    Attributes:
        requests: the cache in every arena in use, by the arena's number.
    """

    def __init__(
        self, layer: int, compression: Compression, budgets: LayerBudgets, pool: ArenaPool, backend: str = "auto"
    ) -> None:
        self.layer, self.compression, self.budgets, self.pool = layer, compression, budgets, pool
        self.attention = choose_backend(backend, pool.rows.device, pool.layout.dtype, compression.tracks_received)
        self.requests: dict[int, RequestCache] = {}

    def chunk(
        self,
        arena: int,
        query: Float[Tensor, "query_heads tokens dim"],
        key: Float[Tensor, "heads tokens dim"],
        value: Float[Tensor, "heads tokens dim"],
        scaling: float,
        first: bool,
    ) -> Float[Tensor, "query_heads tokens dim"]:
        """Several tokens of one request's prompt; ``first``: whatever lies in the arena is another's, or forgotten."""
        if first:
            self.requests[arena] = RequestCache(
                self.layer, self.compression, self.budgets, self.pool, arena, self.attention.name
            )
        cache, new = self.requests[arena], NewTokens.all_real(1, query.shape[1])
        query, key, value = query[None], key[None], value[None]
        if first:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            cache.prefill(query, key, value, new, scaling)
        else:
            out = cache.attend(query, key, value, new, scaling)
        cache.settle()
        return out[0]

    def decode(
        self,
        arenas: Sequence[int],
        query: Float[Tensor, "batch query_heads dim"],
        key: Float[Tensor, "batch heads dim"],
        value: Float[Tensor, "batch heads dim"],
        scaling: float,
    ) -> Float[Tensor, "batch query_heads dim"]:
        """One token of each of several requests."""
        query, key, value = query[:, :, None], key[:, :, None], value[:, :, None]
        caches = [self.requests[arena] for arena in arenas]
        if self.compression.tracks_received:  # accumulated attention lies in every arena by itself
            new = NewTokens.all_real(1, 1)
            each = (
                cache.attend(query[i : i + 1], key[i : i + 1], value[i : i + 1], new, scaling)
                for i, cache in enumerate(caches)
            )
            return torch.cat(list(each))[:, :, 0]
        index = np.asarray(arenas, dtype=np.int64)
        for i in (self.pool.lengths[index] == self.pool.capacities[index]).any(1).nonzero()[0]:
            caches[i].make_even()
        spans = self.pool.append(index, key, value, query)
        out = self.attention.attend(query, spans, scaling)
        for cache in caches:
            cache._scaling = scaling
            cache.took_one()
        return out[:, :, 0]
