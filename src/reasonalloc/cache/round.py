"""A round: what the rows that are due forget, in all layers, as one plan.

    score    every pool's tokens, one padded batch a pool: layers x rows
    split    pooled counts and R(.), once for all layers and rows
    copy     the new numbers to the host, in one piece
    move     which tokens stay, and every pool's survivors, whole tokens, in place

Up to the copy nothing waits for the device. A pool's layers share a batch, so the number of operations depends on the
number of pools, not of layers or rows. What a round takes beside the cache is a pool's copy of the keys, or of the
survivors, and the scores of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.cache.pool import Pool, Survivors
from reasonalloc.cache.queries import Queries
from reasonalloc.cache.recorder import Recorder, Routing
from reasonalloc.cache.selection import Candidates, kept_of, rank_candidates, route_heads, select
from reasonalloc.cache.table import HostInts, Table, on_device
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.policies.allocation import HeadAllocator, attention_demand
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.noise import Noise, stream_of
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import attention_weights, mean_over_queries


class Held(Protocol):
    """Where the tokens of a round's rows lie: in a pool, or, a prompt that has just ended, beside it.

    Attributes:
        pool: where the survivors go; its layers are the batch.
        rows: which rows.
        lengths: ``[layers, rows, heads]``, tokens of each span.
    """

    pool: Pool
    rows: HostInts
    lengths: HostInts

    def tokens(self) -> LayerTokens:
        """All of them, batch layer-major."""

    def source(self) -> tuple[Tensor, Tensor, HostInts]:
        """Keys ``[source, dim]``, values, and where in them each span begins: ``[layers, rows, heads]``."""


class PoolTokens:
    """Tokens that lie in the pool itself."""

    def __init__(self, pool: Pool, rows: HostInts) -> None:
        self.pool, self.rows = pool, rows
        self.lengths = pool.table.lengths[pool.layers[:, None], rows]

    def tokens(self) -> LayerTokens:
        """Gathered from the pool; keys and values when they are asked for."""
        pool, rows = self.pool, self.rows
        width = int(self.lengths.max(initial=0))
        slots = pool.slots_of(rows, width)
        places = pool.places_of(rows, slots)

        def pick(memory: Tensor) -> Tensor:
            return memory.index_select(0, slots.flatten()).view(*slots.shape, memory.shape[1])

        return LayerTokens(
            lambda: pick(pool.keys),
            lambda: pick(pool.values),
            on_device(self.lengths.reshape(slots.shape[:2]), slots.device),
            pool.positions_of(rows, places),
            None if pool.received is None else pool.received[places],
        )

    def source(self) -> tuple[Tensor, Tensor, HostInts]:
        """The pool's memory and the table's starts."""
        return self.pool.keys, self.pool.values, self.pool.table.starts[self.pool.layers[:, None], self.rows]


class Round:
    """Carries out rounds for one cache.

    Attributes:
        numbers: ``[layers]``, the model's number of each of the table's layers: a pipeline's stage has some of them.
        evicted: ``[layers]``, tokens forgotten so far, over all rows and heads.
        rounds: ``[layers]``, rounds in which at least one token was forgotten.
        kept: ``[layers]``, tokens per head that the last of these left in such rows, on average.
    """

    def __init__(
        self,
        compression: Compression,
        table: Table,
        totals: LayerTotals,
        numbers: HostInts,
        recorder: Recorder | None = None,
    ) -> None:
        self.compression, self.table, self.totals, self.recorder = compression, table, totals, recorder
        self.numbers = numbers
        self.evicted, self.rounds = (np.zeros(len(numbers), dtype=np.int64) for _ in range(2))
        self.kept = np.zeros(len(numbers))
        self._allocators: dict[tuple[int, ...], HeadAllocator] = {}
        self._generator: torch.Generator | None = None

    def first_capacities(self, layers: HostInts, rows: HostInts) -> HostInts:
        """Spans before any round: the total in equal parts, the odd tokens to the first heads, and the interval."""
        heads = self.table.heads
        share, odd = np.divmod(self.totals.of(self.numbers[layers], rows)[..., None], heads)
        return share + (np.arange(heads) < odd) + self.compression.interval

    def is_due(self, layers: HostInts, rows: HostInts, lengths: HostInts) -> bool:
        """Whether any of these rows holds more than its total in one of these layers, or all must be planned."""
        if self.totals.dynamic is not None:
            return True
        counted = (lengths - self.table.protected[rows][:, None]).sum(-1)
        return bool((counted > self.totals.of(self.numbers[layers], rows)).any())

    def run(self, parts: Sequence[Held], scaling: float, step: int) -> None:
        """One round of the same rows in every part.

        Args:
            parts: in the order of their layers.
            scaling: factor of the attention logits.
            step: tokens seen, padding included, for the recorder.

        Raises:
            TypeError: the scorer returned no tensor.
            ValueError: the scorer returned scores of the wrong shape, or NaN.
        """
        rows, heads = parts[0].rows, self.table.heads
        layers = np.concatenate([part.pool.layers for part in parts])
        totals = self.totals.of(self.numbers[layers], rows)
        device = parts[0].pool.keys.device
        with torch.autocast(device.type, enabled=False):
            ranked, wrong, demands = self._score(parts, totals, scaling)
            candidates = _side_by_side(ranked)
            split = route_heads(
                self._allocator(layers), candidates, on_device(totals.reshape(-1), device), self.compression.kept_window
            )
            del ranked
        threshold = split.threshold if split.threshold is not None else candidates.scores.new_zeros(0)
        numbers = [kept_of(candidates, split.budgets), split.budgets, threshold, wrong, *demands]
        # Every number of tokens is exact in float64.
        copied = torch.cat([x.flatten().to(torch.float64) for x in numbers]).cpu().numpy()
        parts_of = np.split(copied, np.cumsum([x.numel() for x in numbers])[:-1])
        if parts_of[3][0]:
            name = type(self.compression.token_scorer).__name__
            raise ValueError(f"scorer {name} returned NaN for a cached token: every score is a number")
        shape = (len(layers), len(rows), heads)
        stays, budgets = (x.astype(np.int64).reshape(shape) for x in parts_of[:2])
        if demands:
            self.totals.report(self.numbers[layers], np.concatenate(parts_of[4:]).reshape(shape[:2]))
        held = np.concatenate([part.lengths for part in parts])
        self._move(parts, candidates, split.budgets, stays, budgets)
        self._count(layers, held, stays)
        if self.recorder is not None:
            found = parts_of[2].reshape(shape[:2]) if split.threshold is not None else None
            for i, layer in enumerate(self.numbers[layers].tolist()):
                self.recorder.add(
                    Routing(
                        step, layer, totals[i].tolist(), budgets[i].tolist(), stays[i].tolist(), held[i].tolist(),
                        None if found is None else found[i].tolist(),
                    )
                )  # fmt: skip

    def _score(
        self, parts: Sequence[Held], totals: HostInts, scaling: float
    ) -> tuple[list[Candidates], Bool[Tensor, "1"], list[Float[Tensor, "batch"]]]:
        """Every part's candidates, whether a score is NaN, and what dynamic layers measure."""
        ranked, wrong, demands, first = [], [], [], 0
        for part in parts:
            count = len(part.pool.layers)
            candidates, is_nan, demand = self._score_part(part, totals[first : first + count], scaling)
            first += count
            ranked.append(candidates)
            wrong.append(is_nan)
            demands += demand
        return ranked, torch.stack(wrong).any()[None], demands

    def _score_part(
        self, part: Held, totals: HostInts, scaling: float
    ) -> tuple[Candidates, Bool[Tensor, ""], list[Float[Tensor, "batch"]]]:
        """As ``_score``, for one part: when it returns, its copy of the keys is gone."""
        scorer, dynamic, demands = self.compression.token_scorer, self.totals.dynamic, []
        seen = self._observe(part, totals, scaling)
        if dynamic is not None:
            measured = _with_queries(seen, self._queries(part, dynamic.queries))
            demand = attention_demand(attention_weights(measured, seen.tokens.valid), dynamic.rho)
            demands.append(mean_over_queries(measured, demand[..., None]).mean((1, 2, 3)))
        wanted = scorer.observed_queries
        scores = scorer.score(_with_queries(seen, self._queries(part, wanted) if wanted else None))
        tokens = seen.tokens
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"scorer {type(scorer).__name__} returned {type(scores).__name__}, expected a tensor of one score "
                f"per token: {tuple(tokens.positions.shape)}"
            )
        if scores.shape != tokens.positions.shape:
            raise ValueError(
                f"scorer {type(scorer).__name__} returned shape {tuple(scores.shape)}, "
                f"expected one score per token: {tuple(tokens.positions.shape)}"
            )
        valid = tokens.valid
        spared = on_device(np.tile(self.table.protected[part.rows], len(part.pool.layers)), tokens.device)
        ranked = rank_candidates(scores, valid, tokens.newest(self.compression.kept_window), spared)
        return ranked, (scores.isnan() & valid).any(), demands

    def _observe(self, part: Held, totals: HostInts, scaling: float) -> Observation:
        tokens, table, rows = part.tokens(), self.table, part.rows
        device = tokens.device
        if self._generator is None:
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(self.compression.seed)
        numbers = on_device(np.repeat(self.numbers[part.pool.layers], len(rows)), device)
        streams = on_device(np.tile(table.streams[rows], len(part.pool.layers)), device)
        return Observation(
            tokens=tokens,
            queries=None,
            real_queries=None,
            scaling=scaling,
            window=self.compression.kept_window,
            budget=on_device((totals.reshape(-1) / table.heads).astype(np.float32), device),
            generator=self._generator,
            noise=Noise(
                self.compression.seed,
                stream_of(numbers, streams),
                on_device(np.tile(table.seen[rows], len(part.pool.layers)), device),
            ),
        )

    def _queries(self, part: Held, count: int) -> Queries:
        return part.pool.queries.read(part.rows, self.table.pushed[part.rows], count)

    def _allocator(self, layers: HostInts) -> HeadAllocator:
        """The head allocator of a batch of these layers."""
        key = tuple(self.numbers[layers].tolist())
        if key not in self._allocators:
            compression, totals = self.compression, self.totals
            self._allocators[key] = compression.head_allocator.for_layers(
                key, totals.shape, totals.budget, compression.kept_window, compression.demand_profile
            )
        return self._allocators[key]

    def _move(
        self, parts: Sequence[Held], candidates: Candidates, split: Tensor, stays: HostInts, budgets: HostInts
    ) -> None:
        """Select and move the survivors, a part at a time."""
        by_score, first = self.compression.storage_order == "score", 0
        for part in parts:
            pool, rows = part.pool, part.rows
            of = slice(first, first + len(pool.layers))
            batch = slice(of.start * len(rows), of.stop * len(rows))
            first = of.stop
            index, _ = select(candidates.part(batch, int(part.lengths.max())), split[batch], by_score)
            tokens, (keys, values, begin) = part.tokens(), part.source()
            survivors = Survivors(keys, values, begin, stays[of], index, tokens.positions, tokens.received)
            protected = self.table.protected[rows][:, None]
            pool.rewrite(rows, survivors, budgets[of] + protected + self.compression.interval)

    def _count(self, layers: HostInts, held: HostInts, stays: HostInts) -> None:
        gone = (held - stays).sum(-1)  # [layers, rows]
        self.evicted[layers] += gone.sum(1)
        self.rounds[layers] += (gone > 0).any(1)
        for layer, rows, left in zip(layers.tolist(), gone > 0, stays, strict=True):
            if rows.any():
                self.kept[layer] = left[rows].mean()


def _with_queries(seen: Observation, queries: Queries | None) -> Observation:
    if queries is None:
        return seen
    return Observation(**{**vars(seen), "queries": queries.states, "real_queries": queries.real})


def _side_by_side(ranked: list[Candidates]) -> Candidates:
    """All parts' candidates as one batch, padded to the widest."""
    if len(ranked) == 1:
        return ranked[0]
    widest = max(x.scores.shape[-1] for x in ranked)
    scores = [F.pad(x.scores, (0, widest - x.scores.shape[-1]), value=float("-inf")) for x in ranked]
    return Candidates(
        torch.cat(scores), *(torch.cat([getattr(x, n) for x in ranked]) for n in ("lengths", "protected"))
    )
