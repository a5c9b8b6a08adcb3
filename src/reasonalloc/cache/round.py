"""A round: what the rows that are due forget, in all layers, as one plan.

    score    every pool's tokens, one padded batch a pool: layers x rows
    split    pooled counts and R(.), once for all layers and rows
    move     which tokens stay, and every pool's survivors, whole tokens, in place
    copy     the new numbers to the host, in one piece, which takes them in when it needs them

Nothing waits for the device. A pool's layers share a batch, so the number of operations depends on the number of
pools, not of layers or rows. What a round takes beside the cache: the scores of all tokens, and for a few layers at a
time what the scorer computes them from. Kernels read keys where they lie and move survivors in place; where none serve
(other scorers, and what dynamic layers measure) that is a copy of the keys, on a CPU also one of the survivors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.cache.moving import Source, Survivors
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.queries import Queries
from reasonalloc.cache.recorder import Recorder, Routing
from reasonalloc.cache.selection import Candidates, kept_of, pin, rank, route_heads, select
from reasonalloc.cache.table import HostInts, Table, on_device
from reasonalloc.cache.token_record import TokenRecord
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.policies.allocation import HeadAllocator, attention_demand
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.noise import Noise, stream_of
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import LayerTokens, RaggedKeys
from reasonalloc.policies.scoring.window_attention import attention_weights, mean_over_queries

MOST_LAYERS = 8  # that a batch of scores has: what it takes beside the cache grows with them
MOST_WEIGHTS = 1 << 26  # attention weights of a batch that measures demand: each takes some tens of bytes


class Held(Protocol):
    """Where the tokens of a round's rows lie: in a pool, or, a prompt that has just ended, beside it.

    Attributes:
        pool: where the survivors go; its layers are the batch.
        rows: which rows.
        lengths: ``[layers, rows, heads]``, tokens of each span, on the host.
        is_settled: whether what is pinned comes first already; of a prompt that has just ended it is to be chosen yet.
    """

    pool: Pool
    rows: HostInts
    lengths: HostInts
    is_settled: bool

    def tokens(self, first: int, last: int) -> LayerTokens:
        """Those of the pool's layers ``first`` to ``last - 1``, counted within it; batch layer-major."""

    def source(self) -> Source:
        """All of them, where they lie."""


class PoolTokens:
    """Tokens that lie in the pool itself."""

    def __init__(self, pool: Pool, rows: HostInts, is_settled: bool = True) -> None:
        self.pool, self.rows, self.is_settled = pool, rows, is_settled
        self.lengths = pool.table.lengths_of(pool.layers, rows)

    def tokens(self, first: int, last: int) -> LayerTokens:
        """Gathered from the pool when they are asked for."""
        pool, rows = self.pool.of_layers(first, last), self.rows
        width = int(self.lengths[first:last].max(initial=0))

        @cache
        def slots() -> Tensor:
            return pool.slots_of(rows, width)

        def pick(memory: Tensor) -> Tensor:
            return memory.index_select(0, slots().flatten()).view(*slots().shape, memory.shape[1])

        received = pool.received
        return LayerTokens(
            lambda: pick(pool.keys),
            lambda: pick(pool.values),
            pool.device.read("lengths", pool.section, rows).flatten(0, 1),
            lambda: pool.positions_of(rows, width),
            None if received is None else lambda: pool.numbers_of(received, rows, width),
            width,
            RaggedKeys(pool.keys, pool.device.read("starts", pool.section, rows).flatten(0, 1)),
        )

    def source(self) -> Source:
        """The pool's memory."""
        return self.pool.source(self.rows)


@dataclass(frozen=True)
class Outcome:
    """What the host knows of a round before the device has answered.

    Attributes:
        step: tokens seen, padding included.
        layers, rows: which; ``layers`` of the table.
        totals, held: ``[layers, rows]`` and ``[layers, rows, heads]``, tokens before the round.
        protected: ``[rows]``, tokens on top of the budget.
        has_threshold: whether the head allocator has one.
    """

    step: int
    layers: HostInts
    rows: HostInts
    totals: HostInts
    held: HostInts
    protected: HostInts
    has_threshold: bool


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

    def is_due(self, layers: HostInts, rows: HostInts, lengths: HostInts, is_settled: bool = True) -> bool:
        """Whether any of these rows holds more than its total in one of these layers, or all must be planned.

        That is so with dynamic layers, and where it is still to be chosen what of a prompt is pinned.
        """
        most = self.compression.most_pinned
        to_pin = bool(most) and not is_settled and bool((self.table.prompt[rows] > most).any())
        if self.totals.dynamic is not None or to_pin:
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
            ValueError: the scorer returned scores of the wrong shape, or NaN; or the recorder of tokens holds another
                generation.
        """
        rows = parts[0].rows
        layers = np.concatenate([part.pool.layers for part in parts])
        totals = self.totals.of(self.numbers[layers], rows)
        device = parts[0].pool.keys.device
        with torch.autocast(device.type, enabled=False):
            ranked, wrong, demands = self._score(parts, totals, scaling)
            candidates = _side_by_side(ranked)
            wanted, least = on_device(totals.reshape(-1), device), self._least(layers, rows, device)
            split = route_heads(self._allocator(layers), candidates, wanted, least)
            del ranked
        stays = kept_of(candidates, split.budgets)
        threshold = split.threshold if split.threshold is not None else candidates.scores.new_zeros(0)
        held = np.concatenate([part.lengths for part in parts])
        outcome = Outcome(step, layers, rows, totals, held, self.table.protected[rows], len(threshold) > 0)
        # Every number of tokens is exact in float64.
        numbers = [x.flatten().to(torch.float64) for x in (wrong, stays, split.budgets, threshold, *demands)]
        if device.type == "cpu":
            self._refuse_nan(wrong.numpy()[0])  # before anything is forgotten
        tokens = None if self.recorder is None else self.recorder.tokens
        if tokens is not None:  # not before: a round that is refused is none
            tokens.begin(step, self.table.rows)
            _record_scores(tokens, parts, candidates)
        self._move(parts, candidates, split.budgets, stays, totals)
        if tokens is not None:
            _record_survivors(tokens, parts, self.numbers)
        pools = [part.pool for part in parts]
        for pool in pools:
            self.table.young[pool.layers[:, None], rows] = 0
        self.table.expect(rows, torch.cat(numbers), lambda found: self._land(outcome, pools, found))

    def _score(
        self, parts: Sequence[Held], totals: HostInts, scaling: float
    ) -> tuple[list[Candidates], Bool[Tensor, "1"], list[Float[Tensor, "batch"]]]:
        """Every part's candidates, whether a score is NaN, and what dynamic layers measure.

        Of a pool with more layers than a batch should have, some layers at a time.
        """
        ranked, wrong, demands, first = [], [], [], 0
        for part in parts:
            count = len(part.pool.layers)
            at_once = self._layers_at_once(part)
            for begin in range(0, count, at_once):
                end = min(begin + at_once, count)
                candidates, is_nan, demand = self._score_part(
                    part, begin, end, totals[first + begin : first + end], scaling
                )
                ranked.append(candidates)
                wrong.append(is_nan)
                demands += demand
            first += count
        return ranked, torch.stack(wrong).any()[None], demands

    def _layers_at_once(self, part: Held) -> int:
        """How many layers' scores are computed together: dynamic layers' demand looks at every observed query's."""
        dynamic, width = self.totals.dynamic, int(part.lengths.max(initial=1))
        if dynamic is None:
            return MOST_LAYERS
        of_layer = len(part.rows) * self.totals.shape.query_heads * dynamic.queries * width
        return max(1, min(MOST_LAYERS, MOST_WEIGHTS // of_layer))

    def _score_part(
        self, part: Held, first: int, last: int, totals: HostInts, scaling: float
    ) -> tuple[Candidates, Bool[Tensor, ""], list[Float[Tensor, "batch"]]]:
        """As ``_score``, for some layers of one part: when it returns, their copy of the keys is gone."""
        scorer, dynamic, demands = self.compression.token_scorer, self.totals.dynamic, []
        pool, rows = part.pool.of_layers(first, last), part.rows
        tokens = part.tokens(first, last)
        seen = self._observe(tokens, pool.layers, rows, totals, scaling)
        if dynamic is not None:
            measured = _with_queries(seen, self._queries(pool, rows, dynamic.queries))
            demand = attention_demand(attention_weights(measured, tokens.valid), dynamic.rho)
            demands.append(mean_over_queries(measured, demand[..., None]).mean((1, 2, 3)))
        wanted = scorer.observed_queries
        scores = scorer.score(_with_queries(seen, self._queries(pool, rows, wanted) if wanted else None))
        shape = (*tokens.lengths.shape, tokens.width)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"scorer {type(scorer).__name__} returned {type(scores).__name__}, expected a tensor of one score "
                f"per token: {shape}"
            )
        if scores.shape != shape:
            raise ValueError(
                f"scorer {type(scorer).__name__} returned shape {tuple(scores.shape)}, "
                f"expected one score per token: {shape}"
            )
        spared = on_device(np.tile(self.table.protected[rows], len(pool.layers)), tokens.device)
        pinned = self._pinned(pool.layers, rows, tokens.device) if part.is_settled else None
        candidates, is_nan = rank(scores, tokens.lengths, self.compression.kept_window, spared, pinned)
        return candidates, is_nan, demands

    def _observe(
        self, tokens: LayerTokens, layers: HostInts, rows: HostInts, totals: HostInts, scaling: float
    ) -> Observation:
        table, device = self.table, tokens.device
        if self._generator is None:
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(self.compression.seed)
        numbers = on_device(np.repeat(self.numbers[layers], len(rows)), device)
        streams = on_device(np.tile(table.streams[rows], len(layers)), device)
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
                on_device(np.tile(table.seen[rows], len(layers)), device),
            ),
        )

    def _pinned(self, layers: HostInts, rows: HostInts, device: torch.device) -> Int[Tensor, "batch"] | None:
        """Leading tokens that stay inside the budget, of every row; None: there are none of any."""
        pinned = self.table.pinned[rows]
        return on_device(np.tile(pinned, len(layers)), device) if pinned.any() else None

    def _least(self, layers: HostInts, rows: HostInts, device: torch.device) -> int | Int[Tensor, "batch 1"]:
        """What every head keeps whatever its score: the window and what is pinned."""
        pinned, window = self._pinned(layers, rows, device), self.compression.kept_window
        return window if pinned is None else pinned[:, None] + window

    def _queries(self, pool: Pool, rows: HostInts, count: int) -> Queries:
        return pool.queries.read(rows, self.table.pushed[rows], count)

    def _allocator(self, layers: HostInts) -> HeadAllocator:
        """The head allocator of a batch of these layers."""
        key = tuple(self.numbers[layers].tolist())
        if key not in self._allocators:
            compression, totals = self.compression, self.totals
            self._allocators[key] = compression.head_allocator.for_layers(
                key, totals.shape, totals.budget, compression.least, compression.demand_profile
            )
        return self._allocators[key]

    def _move(
        self,
        parts: Sequence[Held],
        candidates: Candidates,
        budgets: Int[Tensor, "batch heads"],
        stays: Int[Tensor, "batch heads"],
        totals: HostInts,
    ) -> None:
        """Select and move the survivors, a part at a time."""
        by_score, first, heads = self.compression.storage_order == "score", 0, self.table.heads
        interval = self.compression.interval
        for part in parts:
            pool, rows = part.pool, part.rows
            of = slice(first, first + len(pool.layers))
            batch = slice(of.start * len(rows), of.stop * len(rows))
            first = of.stop
            width = int(part.lengths.max(initial=0))
            index, _ = select(candidates.part(batch, width), budgets[batch], by_score)
            in_order = not by_score
            pinned = self._pinned(pool.layers, rows, index.device)
            if pinned is not None and not part.is_settled:
                index, in_order = pin(candidates.part(batch, width), index, stays[batch], pinned), False
            kept = stays[batch].view(part.lengths.shape)
            # What the host knows of it: a row that is over its total keeps just that, any other all it has.
            protected = self.table.protected[rows]
            counted = part.lengths.sum(-1) - heads * protected
            count = int((np.minimum(counted, totals[of]) + heads * protected).sum())
            spare = on_device(protected + interval, kept.device)[:, None]
            sizes = totals[of] + heads * (protected + interval)
            survivors = Survivors(part.source(), kept, count, width, index, in_order)
            pool.rewrite(rows, survivors, budgets[batch].view(kept.shape) + spare, sizes, kept)

    def _land(self, outcome: Outcome, pools: Sequence[Pool], found: npt.NDArray[np.float64]) -> None:
        """Take in what a round has decided, when the host gets to know it."""
        layers, rows, held = outcome.layers, outcome.rows, outcome.held
        sizes = [held.size, held.size, held.shape[0] * held.shape[1] if outcome.has_threshold else 0]
        kept, split, threshold, demands = np.split(found[1:], np.cumsum(sizes))
        stays, budgets = (x.astype(np.int64).reshape(held.shape) for x in (kept, split))
        if len(demands):
            self.totals.report(self.numbers[layers], demands.reshape(held.shape[:2]))
        capacities = budgets + outcome.protected[:, None] + self.compression.interval
        first = 0
        for pool in pools:
            of = slice(first, first + len(pool.layers))
            first = of.stop
            pool.note(rows, capacities[of], stays[of])
        self._count(layers, held, stays)
        if self.recorder is not None:
            thresholds = threshold.reshape(held.shape[:2]) if outcome.has_threshold else None
            for i, layer in enumerate(self.numbers[layers].tolist()):
                self.recorder.add(
                    Routing(
                        outcome.step, layer, outcome.totals[i].tolist(), budgets[i].tolist(), stays[i].tolist(),
                        held[i].tolist(), None if thresholds is None else thresholds[i].tolist(),
                    )
                )  # fmt: skip
        self._refuse_nan(found[0])  # last: the numbers are right, and the tokens are gone

    def _refuse_nan(self, found: float) -> None:
        if found:
            name = type(self.compression.token_scorer).__name__
            raise ValueError(f"scorer {name} returned NaN for a cached token: every score is a number")

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


def _record_scores(tokens: TokenRecord, parts: Sequence[Held], candidates: Candidates) -> None:
    """What a recorder of tokens is told before survivors move. Waits for the device."""
    first = 0
    for part in parts:
        held = part.tokens(0, len(part.pool.layers))
        scores = candidates.part(slice(first, first + len(held.lengths)), held.width).scores
        first += len(held.lengths)
        tokens.score(part.rows, held.positions.cpu().numpy(), scores.cpu().numpy())


def _record_survivors(tokens: TokenRecord, parts: Sequence[Held], numbers: HostInts) -> None:
    """What a recorder of tokens is told when they have moved: where the cache itself says that they are."""
    for part in parts:
        pool, rows = part.pool, part.rows
        lengths = pool.device.read("lengths", pool.section, rows).cpu().numpy()
        positions = pool.positions_of(rows, int(lengths.max(initial=0))).cpu().numpy()
        positions = positions.reshape(*lengths.shape, -1)
        tokens.note(rows, numbers[pool.layers], pool.table.seen[rows], positions, lengths)


def _side_by_side(ranked: list[Candidates]) -> Candidates:
    """All parts' candidates as one batch, padded to the widest."""
    if len(ranked) == 1:
        return ranked[0]
    widest = max(x.scores.shape[-1] for x in ranked)
    scores = [F.pad(x.scores, (0, widest - x.scores.shape[-1]), value=float("-inf")) for x in ranked]
    return Candidates(
        torch.cat(scores), *(torch.cat([getattr(x, n) for x in ranked]) for n in ("lengths", "protected"))
    )
