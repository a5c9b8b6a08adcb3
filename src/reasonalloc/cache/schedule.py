"""When rounds take place: after a chunk, and whenever rows have decoded an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from reasonalloc.cache.moving import Survivors
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.prompt import Prompt, PromptTokens
from reasonalloc.cache.queries import Queries
from reasonalloc.cache.round import Held, PoolTokens, Round
from reasonalloc.cache.table import HostInts, Phase, Table, on_device
from reasonalloc.policies.scoring.tokens import LayerTokens


class Probe(Protocol):
    """Watches a full cache: once per interval, and right after the prompt, it may look at all that a layer holds.

    Attributes:
        observed_queries: how many of the last queries it reads.
        needs_received: whether the attention received by every token must be accumulated for it.
    """

    observed_queries: int
    needs_received: bool

    def observe(self, layer: int, tokens: LayerTokens, queries: Queries, scaling: float, steps: int) -> None:
        """What the layer holds now; ``steps`` tokens were decoded since the last call."""


class Schedule:
    """Decides when which rows are compressed, and brings prompts into the pools.

    Time is counted in decoding steps, not in tokens, so that a padded batch is compressed when its single rows would
    be: after every chunk, and after every ``interval`` steps.
    """

    def __init__(self, table: Table, interval: int, round: Round | None, probe: Probe | None) -> None:
        self.table, self.interval, self.round, self.probe = table, interval, round, probe

    def due(self, rows: HostInts) -> HostInts:
        """Those of the rows that have decoded an interval."""
        return rows[self.table.steps[rows] >= self.interval]

    def after_interval(self, pools: Sequence[Pool], due: HostInts, scaling: float, columns: int) -> None:
        """One round of rows that have decoded an interval, in every pool where one of them is over its total.

        Args:
            pools: all of them.
            due: these rows.
            scaling: factor of the attention logits.
            columns: tokens seen, for the recorder.
        """
        self.table.land(due)  # what these rows' last round measured
        for pool in pools:
            self.show(pool, scaling)
        self.table.steps[due] = 0
        if self.round is None:
            return
        self.round.totals.open_round()
        parts: list[Held] = [PoolTokens(pool, due) for pool in pools]
        parts = [part for part in parts if self.round.is_due(part.pool.layers, due, part.lengths)]
        if parts:
            self.round.run(parts, scaling, columns)

    def after_chunk(
        self, pool: Pool, first: bool, rows: HostInts, prompt: Prompt | None, scaling: float, columns: int
    ) -> None:
        """After a chunk has passed the layers of a pool: one round of its rows there; a prompt moves into the pool.

        Args:
            pool: whose layers have seen the chunk.
            first: whether these are the first of all layers.
            rows: of the chunk.
            prompt: their prompt, if it lies beside the pool.
            scaling, columns: as for ``after_interval``.
        """
        is_over = bool((self.table.phases[rows] == Phase.DECODING).all())
        held: Held = PoolTokens(pool, rows, is_over) if prompt is None else PromptTokens(prompt, pool)
        if self.round is not None and first:
            self.table.land(rows)  # what these rows' last round measured
            self.round.totals.open_round()
        if self.round is not None and self.round.is_due(pool.layers, rows, held.lengths, held.is_settled):
            self.round.run([held], scaling, columns)
        elif isinstance(held, PromptTokens):
            self._store(held)
        if prompt is not None:
            prompt.let_go(pool)
        self.show(pool, scaling)

    def room(self, lengths: HostInts) -> HostInts:
        """Spare slots for tokens to come, where a cache keeps everything: a quarter, so that it is copied rarely."""
        return lengths // 4 + self.interval

    def show(self, pool: Pool, scaling: float) -> None:
        """Let the probe look at a pool's layers, of all rows."""
        if self.probe is None:
            return
        rows, table = np.arange(self.table.rows), self.table
        count = int(min(pool.queries.size, table.pushed.max()))
        for local, layer in enumerate(pool.layers.tolist()):
            one = pool.of_layers(local, local + 1)
            queries = one.queries.read(rows, table.pushed, count)
            self.probe.observe(layer, PoolTokens(one, rows).tokens(0, 1), queries, scaling, int(table.steps[0]))

    def _store(self, held: PromptTokens) -> None:
        """Bring a whole prompt into its pool."""
        pool, rows, lengths = held.pool, held.rows, held.lengths
        if self.round is None:
            capacities = lengths + self.room(lengths)
        else:
            protected = self.table.protected[rows][:, None]
            capacities = self.round.first_capacities(pool.layers, rows) + protected
        kept, spans = (on_device(x, pool.keys.device) for x in (lengths, capacities))
        tokens = Survivors(held.source(), kept, int(lengths.sum()), int(lengths.max(initial=0)))
        pool.rewrite(rows, tokens, spans, capacities.sum(-1), torch.zeros_like(kept))
        pool.note(rows, capacities, np.zeros_like(lengths))
        self.table.young[pool.layers[:, None], rows] = lengths[..., 0]  # all tokens, in every head
