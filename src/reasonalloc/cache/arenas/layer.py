"""One layer of all requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.arenas.places import Places
from reasonalloc.cache.arenas.pool import ArenaPool
from reasonalloc.cache.arenas.ring import QueryRing
from reasonalloc.cache.arenas.slab import ArenaSlab
from reasonalloc.cache.attention import AttentionBackend
from reasonalloc.cache.layer_cache import LayerCache, NewTokens
from reasonalloc.cache.query_window import QueryWindow
from reasonalloc.cache.slab import RaggedSlab
from reasonalloc.cache.spans import HostInts
from reasonalloc.cache.totals import LayerBudgets
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.tokens import LayerTokens


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

    @property
    def steps(self) -> int:
        """Tokens decoded since the last compression: the table's number."""
        return int(self.pool.steps[self.index])

    @steps.setter
    def steps(self, steps: int) -> None:
        self.pool.steps[self.index] = steps

    @property
    def seen_columns(self) -> int:
        """A request has no padding: what the slab has seen."""
        return int(self.pool.seen[self.index])

    @seen_columns.setter
    def seen_columns(self, columns: int) -> None:
        pass  # the slab counts

    def end_interval(self) -> None:
        """An interval's tokens were appended to the arena and attended to, together with other requests'."""
        self._compress()

    @property
    def is_home(self) -> bool:
        """Whether the tokens lie in the arena."""
        assert isinstance(self.slab, ArenaSlab)
        return self.slab.is_home

    def end_prompt(self) -> None:
        """Compress the prompt, and bring what stays into the arena."""
        super().end_prompt()
        self.decoding = True
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
        places: of the tokens that the step decodes; ``ArenaLayers.begin_step`` sets it.
    """

    def __init__(
        self,
        layer: int,
        compression: Compression,
        budgets: LayerBudgets,
        pool: ArenaPool,
        attention: AttentionBackend,
        patience: int,
    ) -> None:
        self.layer, self.compression, self.budgets, self.pool = layer, compression, budgets, pool
        self.attention, self.patience = attention, patience
        self.staged: dict[int, int] = {}
        self.requests: dict[int, RequestCache] = {}
        self.places: Places | None = None

    def give_back(self, present: Collection[int]) -> None:
        """Before a step of the requests in ``present``: end the prompts of requests that have ended themselves."""
        for arena, absent in list(self.staged.items()):
            self.staged[arena] = 0 if arena in present else absent + 1
            if self.staged[arena] >= self.patience:
                self._end_prompt(arena)

    def end_prompts(self, arenas: Sequence[int]) -> None:
        """Before the first step in which these requests decode."""
        for arena in arenas:
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
        """One token of each of several requests, those that the step began with."""
        query, key, value = query[:, :, None], key[:, :, None], value[:, :, None]
        if self.compression.tracks_received:  # accumulated attention lies in every arena by itself
            caches, new = [self.requests[arena] for arena in arenas], NewTokens.all_real(1, 1)
            each = (
                cache.attend(query[i : i + 1], key[i : i + 1], value[i : i + 1], new, scaling)
                for i, cache in enumerate(caches)
            )
            return torch.cat(list(each))[:, :, 0]
        places, pool = self.places, self.pool
        assert places is not None
        pool.keys.index_copy_(0, places.slots, key.reshape(-1, key.shape[-1]))
        pool.values.index_copy_(0, places.slots, value.reshape(-1, value.shape[-1]))
        if len(places.ring):
            pool.rows.index_copy_(0, places.ring, query.reshape(-1, query.shape[-1]))
        out = self.attention.attend(query, places.spans, scaling)
        for arena in places.due:
            self.requests[arena].end_interval()
        return out[:, :, 0]
