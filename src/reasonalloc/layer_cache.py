"""One layer's cache: ragged storage, what must be observed, and its compression. Knows no engine.

An engine calls, for every forward pass of the layer, ``prefill`` (a first chunk, which the engine attends to
densely) or ``attend`` (anything later); speculative decoding adds ``hold`` and ``rollback``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.allocation import attention_demand
from reasonalloc.attention import AttentionBackend, attend_rows, choose_backend, received_attention
from reasonalloc.budgets import LayerBudgets
from reasonalloc.compression import Compression
from reasonalloc.eviction import rank_candidates, route_heads, select
from reasonalloc.query_window import Queries, QueryWindow
from reasonalloc.recorder import Recorder, Routing
from reasonalloc.scoring.scorer import Observation
from reasonalloc.scoring.window_attention import query_logits, softmax_over, visible
from reasonalloc.storage import LayerTokens, RaggedSlab
from reasonalloc.storage.slab import HostInts
from reasonalloc.storage.tokens import drop_padding


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


class LayerCache:
    """The ragged cache of one layer under one ``Compression``.

    Attributes:
        steps: single-token steps since the last compression opportunity.
        evicted: tokens evicted so far, over all sequences and heads.
        compressions: rounds in which at least one token was evicted.
    """

    def __init__(
        self,
        layer: int,
        compression: Compression,
        budgets: LayerBudgets | None,
        backend: str = "auto",
        recorder: Recorder | None = None,
    ) -> None:
        self.layer = layer
        self.compression = compression
        self.budgets = budgets
        self.backend_name = backend
        self.recorder = recorder
        self.window = QueryWindow(compression.observed_queries)
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
        self._held: tuple[Queries, NewTokens] | None = None
        self._scaling = 1.0
        self._generator: torch.Generator | None = None
        self.window.clear()

    # ---- the engine's calls -------------------------------------------------------------------------------------

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
        assert self.slab is not None
        tokens = _chunk(key, value, new)
        queries = Queries(query, new.real)
        if self.holding or self.compression.tracks_received or not self._over_budget(new.counts):
            self._extend(tokens, new)
            self._after_chunk(queries, new)
            return
        self.seen_columns += new.columns
        self.slab.seen += new.counts
        self.window.push(queries)
        self._route(tokens)

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
        assert self.slab is not None and self.backend is not None
        if self._held is not None:  # nobody rolled back: the speculation is over
            self.rollback(0)
            self.holding = False
        if new.columns > 1 or new.real is not None or self.holding:
            self._extend(_chunk(key, value, new), new)
            out = attend_rows(query, self.slab, scaling, new.hidden(query.device).clamp(min=0))
            self._after_chunk(Queries(query, new.real), new)
            return out
        self.decoding = True
        if not self.slab.has_room(1):
            self.slab.grow(self._enlarged(1))
        self.slab.append(key, value)
        self.seen_columns += 1
        self.steps += 1
        self.window.push(Queries(query))
        out = self.backend.attend(query, self.slab, scaling)
        if self.steps >= self.compression.interval:
            self._compress()
        return out

    def hold(self) -> None:
        """From now on the tokens of each forward pass are speculative: observe and evict after ``rollback``."""
        self.holding = True

    def rollback(self, columns: int) -> None:
        """Forget the newest ``columns`` tokens and settle what was postponed for the others.

        Raises:
            ValueError: more tokens than the last forward pass added; older ones may be evicted.
        """
        if self.slab is None or (self._held is None and not columns):
            return
        known = 0 if self._held is None else self._held[1].columns
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
            queries, new = queries.without_last(columns), NewTokens.all_real(self.slab.batch, known - columns)
        self._settle(queries, new, is_prompt)

    def select_sequences(self, indices: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences (beams, several samples, finished rows)."""
        if self.slab is None:
            return
        self.slab.select_sequences(indices)
        self.window.select(indices)
        self.protected = self.protected[np.asarray(indices, dtype=np.int64)]

    # ---- taking tokens in ---------------------------------------------------------------------------------------

    def _open(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        tracks = self.compression.tracks_received
        self.backend = choose_backend(self.backend_name, key.device, key.dtype, tracks)
        self.protected = np.zeros(batch, dtype=np.int64)
        if self.budgets is None:
            capacities = np.zeros((batch, heads), dtype=np.int64)
        else:
            capacities = self._first_spans(batch, heads)
        self.slab = RaggedSlab(key, value, capacities, tracks)
        self._generator = torch.Generator(device=key.device)
        self._generator.manual_seed(self.compression.seed * 1_000_003 + self.layer)

    def _extend(self, tokens: LayerTokens, new: NewTokens) -> None:
        assert self.slab is not None
        if not self.slab.has_room(new.columns):
            self.slab.grow(self._enlarged(new.columns))
        self.slab.extend(tokens, new.counts)
        self.seen_columns += new.columns

    def _enlarged(self, tokens: int) -> HostInts:
        """Spans with room for ``tokens`` more. A cache without budget grows in steps of a quarter, to copy rarely."""
        assert self.slab is not None
        needed = self.slab.lengths + tokens
        if self.budgets is None:
            needed = needed + self.slab.lengths // 4 + self.compression.interval
        elif self.compression.prompt == "protect" and not self.decoding:
            needed = needed + self._first_spans(self.slab.batch, self.slab.heads)
        return np.maximum(self.slab.capacities, needed)

    def _first_spans(self, batch: int, heads: int) -> HostInts:
        """Spans before any routing: the layer's total in equal parts, the odd tokens to the first heads."""
        assert self.budgets is not None
        share, odd = np.divmod(self.budgets.totals(self.layer, batch)[:, None], heads)
        return share + (np.arange(heads) < odd) + self.compression.interval

    def _after_chunk(self, queries: Queries, new: NewTokens) -> None:
        if self.holding:
            self._held = (queries, new)
            return
        self._observe(queries, new)
        self._protect_prompt(new.counts)
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
            self._protect_prompt(new.counts)
        self.decoding = True
        self.steps += new.columns
        if is_prompt or self.steps >= self.compression.interval:
            self._compress()

    def _observe(self, queries: Queries, new: NewTokens) -> None:
        assert self.slab is not None
        self.window.push(queries)
        if self.slab.received is not None:
            received_attention(queries.states, self.slab, self._scaling, new.hidden(queries.states.device))

    def _protect_prompt(self, counts: HostInts) -> None:
        if self.compression.prompt == "protect" and not self.decoding:
            self.protected = self.protected + counts

    # ---- compression --------------------------------------------------------------------------------------------

    def _over_budget(self, extra: HostInts | None = None) -> bool:
        """Whether any sequence holds more than the layer's total, with ``extra`` tokens more per head."""
        if self.budgets is None:
            return False
        assert self.slab is not None
        held = self.slab.lengths.sum(1) - self.protected * self.slab.heads
        if extra is not None and self.compression.prompt == "compete":
            held = held + extra * self.slab.heads
        return bool((held > self.budgets.totals(self.layer, self.slab.batch)).any())

    def _compress(self) -> None:
        self.steps = 0
        if self.budgets is None:
            return
        if self.layer == 0:
            self.budgets.open_round()
        assert self.slab is not None
        if self.budgets.dynamic is not None or self._over_budget():
            self._route(self.slab.padded())

    def _route(self, tokens: LayerTokens) -> None:
        """One routing round: score, split over heads, select, and rewrite the slab with what stays."""
        assert self.slab is not None and self.budgets is not None
        device = tokens.keys.device
        totals = self.budgets.totals(self.layer, self.slab.batch)
        protected = torch.from_numpy(self.protected).to(device)
        if self.budgets.dynamic is not None:
            self._report_demand(tokens, totals)
        scores = self._score(tokens, totals)
        candidates = rank_candidates(scores, tokens.valid, tokens.newest(self.compression.kept_window), protected)
        total = torch.from_numpy(totals).to(device)
        split = route_heads(self.compression.head_allocator, candidates, total, self.compression.kept_window)
        index, kept = select(candidates, split.budgets, self.compression.storage_order == "score")
        self._rewrite(tokens, index, kept, split.budgets, totals, split.threshold)

    def _rewrite(
        self,
        tokens: LayerTokens,
        index: Tensor,
        kept: Tensor,
        budgets: Tensor,
        totals: HostInts,
        threshold: Tensor | None,
    ) -> None:
        assert self.slab is not None
        host_kept, host_budgets, held = (x.cpu().numpy() for x in (kept, budgets, tokens.lengths))
        capacities = host_budgets + self.protected[:, None] + self.compression.interval
        evicted = int(held.sum() - host_kept.sum())
        self.slab.store(tokens.gather(index, kept), host_kept, capacities, self.slab.seen)
        self.evicted += evicted
        self.compressions += evicted > 0
        if self.recorder is not None:
            self.recorder.add(
                Routing(
                    self.seen_columns,
                    self.layer,
                    totals.tolist(),
                    host_budgets.tolist(),
                    host_kept.tolist(),
                    held.tolist(),
                    None if threshold is None else threshold.tolist(),
                )
            )

    def _score(self, tokens: LayerTokens, totals: HostInts) -> Tensor:
        scorer = self.compression.token_scorer
        scores = scorer.score(self._observation(tokens, totals, scorer.observed_queries))
        if scores.shape != tokens.keys.shape[:3]:
            raise ValueError(
                f"scorer {type(scorer).__name__} returned shape {tuple(scores.shape)}, "
                f"expected one score per token: {tuple(tokens.keys.shape[:3])}"
            )
        return scores

    def _observation(self, tokens: LayerTokens, totals: HostInts, wanted: int) -> Observation:
        window = self.window.read() if wanted else None
        queries = None if window is None else window.last(wanted)
        assert self._generator is not None
        return Observation(
            tokens,
            None if queries is None else queries.states,
            None if queries is None else queries.real,
            self._scaling,
            self.compression.kept_window,
            torch.from_numpy(totals / tokens.keys.shape[1]).to(tokens.keys.device, torch.float32),
            self._generator,
        )

    def _report_demand(self, tokens: LayerTokens, totals: HostInts) -> None:
        assert self.budgets is not None and self.budgets.dynamic is not None
        dynamic = self.budgets.dynamic
        seen = self._observation(tokens, totals, dynamic.queries)
        columns = (tokens.valid[:, :, None] & visible(seen))[:, :, None]
        demand = attention_demand(softmax_over(query_logits(seen), columns), dynamic.rho)
        if seen.real_queries is None:
            self.budgets.report(self.layer, demand.mean((1, 2, 3)))
        else:
            real = seen.real_queries[:, None, None].expand_as(demand).to(demand.dtype)
            self.budgets.report(self.layer, (demand * real).sum((1, 2, 3)) / real.sum((1, 2, 3)).clamp(min=1))


def _chunk(key: Tensor, value: Tensor, new: NewTokens) -> LayerTokens:
    """A chunk's keys and values as tokens, padding dropped. Positions are left to the slab."""
    batch, heads, columns = key.shape[:3]
    if new.real is not None:
        key, value = drop_padding(key, new.real), drop_padding(value, new.real)
    lengths = torch.from_numpy(new.counts).to(key.device)[:, None].expand(batch, heads)
    positions = torch.arange(columns, dtype=torch.int32, device=key.device).expand(batch, heads, columns)
    return LayerTokens(key, value, lengths, positions)
