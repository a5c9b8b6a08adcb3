"""One layer of all requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    """The layer's cache of one request, in its arena.

    A prompt is kept whole until it ends, however the engine cuts it: else what is forgotten would depend on the cuts,
    and so on what other requests there are. A prompt that the arena has no room for lies in memory of its own
    meanwhile.
    """

    keeps_prompt = True

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

    @property
    def is_home(self) -> bool:
        """Whether the tokens lie in the arena."""
        assert isinstance(self.slab, ArenaSlab)
        return self.slab.is_home

    def end_prompt(self) -> None:
        """Compress the prompt, and bring what stays into the arena."""
        super().end_prompt()
        if not self.is_home:  # it was short enough to stay whole
            self.make_even()

    def make_even(self) -> None:
        """Share the arena's free slots equally: a prompt that was not compressed may have filled some spans.

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
        staged: the arenas whose prompt lies in memory of its own, and for how many steps they have been absent.
    """

    def __init__(
        self,
        layer: int,
        compression: Compression,
        budgets: LayerBudgets,
        pool: ArenaPool,
        backend: str = "auto",
        patience: int = 1,
    ) -> None:
        """
        Args:
            layer, compression, budgets: as for ``LayerCache``.
            pool: the arenas.
            backend: of attention.
            patience: a request whose prompt is staged has ended if it is absent for so many steps in a row: one, or
                as many as a pipeline has stages, whose requests take turns.
        """
        self.layer, self.compression, self.budgets, self.pool = layer, compression, budgets, pool
        self.patience = patience
        self.staged: dict[int, int] = {}
        layout, device = pool.layout, pool.rows.device
        self.attention = choose_backend(backend, device, layout.dtype, layout.dim, compression.tracks_received)
        self.requests: dict[int, RequestCache] = {}

    def begin_step(self, arenas: Collection[int]) -> None:
        """Before a step of the requests in ``arenas``: give back the memory of prompts whose requests have ended.

        The engine does not say that a request has ended; its prompt's memory would be held until its arena is lent
        again.
        """
        for arena, absent in list(self.staged.items()):
            self.staged[arena] = 0 if arena in arenas else absent + 1
            if self.staged[arena] >= self.patience:
                self._end_prompt(arena)

    def _end_prompt(self, arena: int) -> None:
        self.requests[arena].end_prompt()
        self.staged.pop(arena, None)

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
            self.staged.pop(arena, None)
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
        if not cache.is_home:
            self.staged[arena] = 0
        return out[0]

    def decode(
        self,
        arenas: Sequence[int],
        query: Float[Tensor, "batch query_heads dim"],
        key: Float[Tensor, "batch heads dim"],
        value: Float[Tensor, "batch heads dim"],
        scaling: float,
    ) -> Float[Tensor, "batch query_heads dim"]:
        """One token of each of several requests, whose prompts have ended."""
        for arena in arenas:
            if self.requests[arena].in_prompt:
                self._end_prompt(arena)
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
