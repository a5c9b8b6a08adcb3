"""One layer's cache: ragged storage, what must be observed, and its compression. Knows no engine.

An engine calls, for every forward pass of the layer, ``prefill`` (a first chunk, which the engine attends to
densely) or ``attend`` (anything later); speculative decoding adds ``hold`` and ``rollback``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.cache.attention import AttentionBackend, attend_rows, check_backend, choose_backend, received_attention
from reasonalloc.cache.compressor import LayerCompressor
from reasonalloc.cache.query_window import Queries, QueryWindow
from reasonalloc.cache.recorder import Recorder, Routing
from reasonalloc.cache.slab import RaggedSlab
from reasonalloc.cache.spans import HostInts, on_device
from reasonalloc.cache.totals import LayerBudgets
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.tokens import LayerTokens, drop_padding

SPECULATED = 1024  # tokens of a forward pass that can be rolled back


@dataclass(frozen=True)
class NewTokens:
    """Which tokens of a chunk are real.

    Attributes:
        columns: tokens in the chunk, padding included.
        real: False marks padding; None if every token is real.
        counts: real tokens of each sequence, on the host.
    """

    columns: int
    real: Bool[Tensor, "batch queries"] | None
    counts: HostInts

    @classmethod
    def all_real(cls, batch: int, columns: int) -> NewTokens:
        """A chunk without padding."""
        return cls(columns, None, np.full(batch, columns, dtype=np.int64))

    @classmethod
    def masked(cls, real: Bool[Tensor, "batch queries"]) -> NewTokens:
        """A chunk with padding where ``real`` is False. One wait for the device."""
        counts = real.sum(-1).cpu().numpy()
        if int(counts.min(initial=real.shape[1])) == real.shape[1]:
            return cls.all_real(*real.shape)
        return cls(real.shape[1], real, counts)

    def hidden(self, device: torch.device) -> Tensor:
        """How many of the chunk's tokens each query must not see; -1 for padding."""
        if self.real is None:
            hidden = torch.arange(self.columns - 1, -1, -1, device=device)
            return hidden.expand(len(self.counts), -1)
        later = self.real.sum(-1, keepdim=True) - self.real.cumsum(-1)
        return later.masked_fill(~self.real, -1)


class Probe(Protocol):
    """Watches a full cache: once per interval, and right after the prompt, it may look at all that a layer holds.

    Attributes:
        observed_queries: how many of the last queries it reads.
        needs_received: whether the attention received by every token must be accumulated for it.
    """

    observed_queries: int
    needs_received: bool

    def observe(self, layer: int, tokens: LayerTokens, window: QueryWindow, scaling: float, steps: int) -> None:
        """What the layer holds now; ``steps`` tokens were decoded since the last call."""


class LayerCache:
    """The ragged cache of one layer under one ``Compression``.

    Attributes:
        steps: single-token steps since the last compression opportunity.
        evicted: tokens evicted so far, over all sequences and heads.
        compressions: rounds in which at least one token was evicted.
        in_prompt: whether the tokens that come are a prompt's, of which nothing is forgotten until ``end_prompt``.
    """

    keeps_prompt = False  # whether the engine says when a prompt that may come in several chunks ends

    def __init__(
        self,
        layer: int,
        compression: Compression,
        budgets: LayerBudgets | None,
        backend: str = "auto",
        recorder: Recorder | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.layer = layer
        self.compression = compression
        self.compressor = None if budgets is None else LayerCompressor(layer, compression, budgets)
        check_backend(backend)
        self.backend_name = backend
        self.recorder = recorder
        self.probe = probe
        self.tracks_received = compression.tracks_received or (probe is not None and probe.needs_received)
        self.window = self._new_window(compression.observed_queries if probe is None else probe.observed_queries)
        self.reset()

    def reset(self) -> None:
        """Empty the cache; it can be used again, for any batch."""
        self.slab: RaggedSlab | None = None
        self.backend: AttentionBackend | None = None
        self.protected = np.zeros(0, dtype=np.int64)
        self.seen_columns = 0
        self.steps = 0
        self.evicted = 0
        self.compressions = 0
        self.decoding = False
        self.holding = False
        self.in_prompt = self.keeps_prompt
        self._held: tuple[Queries, NewTokens] | None = None
        self._scaling = 1.0
        self.window.clear()

    @property
    def _store(self) -> RaggedSlab:
        assert self.slab is not None, "no token was stored yet"
        return self.slab

    # ---- the engine's calls ----

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch heads queries dim"],
        value: Float[Tensor, "batch heads queries value_dim"],
        new: NewTokens,
        scaling: float,
    ) -> None:
        """Take in the first chunk, which the engine itself attends to.

        A chunk over the budget is compressed straight from the engine's tensors: at no time does more than one
        layer's prompt lie here beside its compressed form.
        """
        self._scaling = scaling
        self._open(key, value)
        tokens = _chunk(key, value, new)
        queries = Queries(query, new.real)
        whole = not self.holding and not self.in_prompt
        direct = whole and not self.compression.tracks_received and self.compression.prompt == "compete"
        if not (direct and self._over_budget(new.counts)):
            self._extend(tokens, new)
            self._after_chunk(queries, new)
            return
        self.seen_columns += new.columns
        self._store.seen += new.counts
        self.window.push(queries)
        self._rewrite(tokens)

    def attend(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch heads queries dim"],
        value: Float[Tensor, "batch heads queries value_dim"],
        new: NewTokens,
        scaling: float,
    ) -> Float[Tensor, "batch query_heads queries value_dim"]:
        """Append the new tokens, attend to everything cached and, when it is time, compress."""
        self._scaling = scaling
        if self.slab is None:
            self._open(key, value)
        if self._held is not None:  # nobody rolled back: the speculation is over
            self.rollback(0)
            self.holding = False
        if new.columns > 1 or new.real is not None or self.holding or self.in_prompt:
            self._extend(_chunk(key, value, new), new)
            out = attend_rows(query, self._store, scaling, new.hidden(query.device).clamp(min=0))
            self._after_chunk(Queries(query, new.real), new)
            return out
        self.decoding = self.seen_columns > 0  # the first token of all is a prompt
        self._make_room(1)
        self._store.append(key, value)
        self.seen_columns += 1
        self._protect_prompt(new)
        self.decoding = True
        self.steps += 1
        self.window.push(Queries(query))
        assert self.backend is not None
        out = self.backend.attend(query, self._store, scaling)
        if self.steps >= self.compression.interval:
            self._compress()
        return out

    def hold(self) -> None:
        """From now on the tokens of each forward pass are speculative: observe and evict after ``rollback``."""
        self.holding = True

    def rollback(self, columns: int) -> None:
        """Forget the newest ``columns`` tokens and settle what was postponed for the others.

        Raises:
            ValueError: more tokens than the last forward pass added (older ones may be evicted), or than SPECULATED.
        """
        if self.slab is None or (self._held is None and not columns):
            return
        known = 0 if self._held is None else min(self._held[1].columns, SPECULATED)
        if columns > known:
            raise ValueError(f"cannot roll back {columns} tokens of a compressed cache, only the last {known}")
        assert self._held is not None
        queries, new = self._held
        self._held = None
        is_prompt = self.seen_columns == new.columns
        if columns:
            if new.real is not None:
                raise ValueError("cannot roll back a padded chunk: decode speculatively with batch size 1")
            self.slab.truncate(columns)
            self.seen_columns -= columns
            queries, new = queries.without_last(columns), NewTokens.all_real(self._store.batch, new.columns - columns)
        self._settle(queries, new, is_prompt)

    def end_prompt(self) -> None:
        """All of the prompt was taken in: compress it."""
        if self.in_prompt:
            self.in_prompt = False
            self._compress()
            self.steps = int(self.seen_columns == 1)  # a single token is a decoding step, also as a prompt

    def select_sequences(self, indices: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences (beams, several samples, finished rows)."""
        if self.slab is None:
            return
        self.slab.select_sequences(indices)
        self.window.select(indices)
        self.protected = self.protected[np.asarray(indices, dtype=np.int64)]

    def flush(self) -> None:
        """Show the probe what was decoded since the last interval ended."""
        if self.probe is not None and self.steps:
            self._compress()

    # ---- taking tokens in ----

    def _open(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        self.backend = choose_backend(
            self.backend_name, key.device, key.dtype, max(key.shape[-1], value.shape[-1]), self.tracks_received
        )
        self.protected = np.zeros(batch, dtype=np.int64)
        if self.compressor is None:
            capacities = np.zeros((batch, heads), dtype=np.int64)
        else:
            self.compressor.start(key.device)
            capacities = self.compressor.first_spans(batch, heads)
        self.slab = self._new_slab(key, value, capacities)

    def _new_slab(self, key: Tensor, value: Tensor, capacities: HostInts) -> RaggedSlab:
        return RaggedSlab(key, value, capacities, self.tracks_received)

    def _new_window(self, size: int) -> QueryWindow:
        return QueryWindow(size)

    def _extend(self, tokens: LayerTokens, new: NewTokens) -> None:
        self._make_room(new.counts[:, None])
        self._store.extend(tokens, new.counts)
        self.seen_columns += new.columns

    def _make_room(self, tokens: HostInts | int) -> None:
        """Enlarge the spans if they cannot take ``tokens`` more; without a budget by a quarter, to copy rarely."""
        slab = self._store
        needed = slab.lengths + tokens
        if self.compressor is not None and self.compression.prompt == "protect" and not self.decoding:
            needed = needed + self.compressor.first_spans(slab.batch, slab.heads)  # a short prompt takes room, too
        if (needed <= slab.capacities).all():
            return
        if self.compressor is None:
            needed = needed + slab.lengths // 4 + self.compression.interval
        slab.grow(np.maximum(slab.capacities, needed))

    def _after_chunk(self, queries: Queries, new: NewTokens) -> None:
        if self.holding:
            # A whole prompt's queries, of all layers, would be larger than the cache.
            some = queries if self._store.received is not None else queries.last(self.window.size + SPECULATED)
            self._held = (some, new)
            return
        self._observe(queries, new)
        self._protect_prompt(new)
        if self.in_prompt:
            return
        if new.columns == 1:  # a decoding step in which some sequences only padded
            self.decoding = True
            self.steps += 1
            if self.steps < self.compression.interval:
                return
        self._compress()

    def _settle(self, queries: Queries, new: NewTokens, is_prompt: bool) -> None:
        """Observe accepted tokens; compress after the prompt, and then after every interval."""
        self._observe(queries, new)
        if is_prompt:
            self._protect_prompt(new)
        self.decoding = True
        self.steps += new.columns
        if is_prompt or self.steps >= self.compression.interval:
            self._compress()

    def _observe(self, queries: Queries, new: NewTokens) -> None:
        self.window.push(queries)
        if self._store.received is not None:
            received_attention(queries.states, self._store, self._scaling, new.hidden(queries.states.device))

    def _protect_prompt(self, new: NewTokens) -> None:
        """Before the first decoded token; nobody says which that is: one that comes alone, unless it is the first."""
        in_prompt = not self.decoding and (new.columns > 1 or self.seen_columns == 1)
        if self.compression.prompt == "protect" and in_prompt:
            self.protected = self.protected + new.counts

    # ---- compression ----

    def _over_budget(self, extra: HostInts | int = 0) -> bool:
        """Whether any sequence holds more than the layer's total, with ``extra`` tokens more per head."""
        if self.compressor is None:
            return False
        slab = self._store
        held = slab.lengths.sum(1) + (extra - self.protected) * slab.heads
        return bool((held > self.compressor.totals(slab.batch)).any())

    def _compress(self) -> None:
        steps, self.steps = self.steps, 0
        if self.probe is not None:
            self.probe.observe(self.layer, self._store.padded(), self.window, self._scaling, steps)
        if self.compressor is None:
            return
        self.compressor.open_round()
        if self.compressor.measures_demand or self._over_budget():
            self._rewrite(self._store.padded())

    def _rewrite(self, tokens: LayerTokens) -> None:
        """One routing round: plan what stays, and rewrite the slab with it."""
        assert self.compressor is not None
        slab = self._store
        plan = self.compressor.plan(tokens, self.window, self.protected, slab.seen, self._scaling)
        kept, budgets, held = (x.cpu().numpy() for x in (plan.kept, plan.split.budgets, tokens.lengths))
        capacities = budgets + self.protected[:, None] + self.compression.interval
        evicted = int(held.sum() - kept.sum())
        slab.store(tokens, kept, capacities, slab.seen, plan.index)
        self.evicted += evicted
        self.compressions += evicted > 0
        if self.recorder is not None:
            threshold = plan.split.threshold
            self.recorder.add(
                Routing(
                    self.seen_columns,
                    self.layer,
                    plan.totals.tolist(),
                    budgets.tolist(),
                    kept.tolist(),
                    held.tolist(),
                    None if threshold is None else threshold.tolist(),
                )
            )


def _chunk(key: Tensor, value: Tensor, new: NewTokens) -> LayerTokens:
    """A chunk's keys and values as tokens, padding dropped. Positions are left to the slab."""
    batch, heads, columns = key.shape[:3]
    if new.real is not None:
        key, value = drop_padding(key, new.real), drop_padding(value, new.real)
    lengths = on_device(new.counts, key.device)[:, None].expand(batch, heads)
    positions = torch.arange(columns, dtype=torch.int32, device=key.device).expand(batch, heads, columns)
    return LayerTokens(key, value, lengths, positions)
