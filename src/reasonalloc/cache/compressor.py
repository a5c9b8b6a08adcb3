"""One layer's routing round, as a plan: from what is stored and observed to what stays. Moves nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reasonalloc.cache.query_window import QueryWindow
from reasonalloc.cache.selection import rank_candidates, route_heads, select
from reasonalloc.cache.spans import HostInts, on_device
from reasonalloc.cache.totals import LayerBudgets
from reasonalloc.policies.allocation import HeadSplit, attention_demand
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.noise import Noise, stream_of
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import attention_weights, mean_over_queries


@dataclass(frozen=True)
class Plan:
    """The outcome of a round for one layer.

    Attributes:
        index: which tokens stay, per sequence and head, in their new order; entries at or past ``kept`` mean nothing.
        kept: how many stay.
        split: the head budgets, and the threshold behind them.
        totals: the layer's budget per sequence.
    """

    index: Int[Tensor, "batch heads kept"]
    kept: Int[Tensor, "batch heads"]
    split: HeadSplit
    totals: HostInts


class LayerCompressor:
    """Scores, splits and selects for one layer; its share of the whole cache comes from ``LayerBudgets``."""

    def __init__(self, layer: int, compression: Compression, budgets: LayerBudgets) -> None:
        self.layer = layer
        self.compression = compression
        self.budgets = budgets
        self.head_allocator = compression.head_allocator.for_layer(
            layer, budgets.shape, budgets.budget, compression.kept_window, compression.demand_profile
        )
        self._generator: torch.Generator | None = None

    def start(self, device: torch.device) -> None:
        """A new generation: the layer's random numbers begin anew."""
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(self.compression.seed * 1_000_003 + self.layer)

    @property
    def measures_demand(self) -> bool:
        """Whether every round must be planned, full or not, because layer budgets follow measured demand."""
        return self.budgets.dynamic is not None

    def totals(self, batch: int) -> HostInts:
        """The layer's budget over all heads, per sequence."""
        return self.budgets.totals(self.layer, batch)

    def first_spans(self, batch: int, heads: int) -> HostInts:
        """Spans before any routing: the total in equal parts, the odd tokens to the first heads, and the interval."""
        share, odd = np.divmod(self.totals(batch)[:, None], heads)
        return share + (np.arange(heads) < odd) + self.compression.interval

    def open_round(self) -> None:
        """Before any layer of a round is planned (called by each, done by the first)."""
        if self.layer == 0:
            self.budgets.open_round()

    def plan(
        self, tokens: LayerTokens, window: QueryWindow, protected: HostInts, seen: HostInts, scaling: float
    ) -> Plan:
        """What stays of ``tokens``.

        Args:
            tokens: everything that the layer holds.
            window: the last queries.
            protected: leading tokens of each sequence that stay on top of the budget.
            seen: real tokens of each sequence so far.
            scaling: factor of the attention logits.
        """
        device, newest = tokens.keys.device, self.compression.kept_window
        totals = self.totals(len(protected))
        rows = torch.arange(len(seen), device=device)
        noise = Noise(self.compression.seed, stream_of(self.layer, rows), on_device(seen, device))
        if self.budgets.dynamic is not None:
            self._report_demand(self._observe(tokens, window, totals, scaling, noise, self.budgets.dynamic.queries))
        scorer = self.compression.token_scorer
        scores = scorer.score(self._observe(tokens, window, totals, scaling, noise, scorer.observed_queries))
        if scores.shape != tokens.keys.shape[:3]:
            raise ValueError(
                f"scorer {type(scorer).__name__} returned shape {tuple(scores.shape)}, "
                f"expected one score per token: {tuple(tokens.keys.shape[:3])}"
            )
        spared = on_device(protected, device)
        candidates = rank_candidates(scores, tokens.valid, tokens.newest(newest), spared)
        split = route_heads(self.head_allocator, candidates, on_device(totals, device), newest)
        index, kept = select(candidates, split.budgets, self.compression.storage_order == "score")
        return Plan(index, kept, split, totals)

    def _observe(
        self, tokens: LayerTokens, window: QueryWindow, totals: HostInts, scaling: float, noise: Noise, wanted: int
    ) -> Observation:
        remembered = window.read() if wanted else None
        queries = None if remembered is None else remembered.last(wanted)
        assert self._generator is not None
        return Observation(
            tokens=tokens,
            queries=None if queries is None else queries.states,
            real_queries=None if queries is None else queries.real,
            scaling=scaling,
            window=self.compression.kept_window,
            budget=torch.from_numpy(totals / tokens.keys.shape[1]).to(tokens.keys.device, torch.float32),
            noise=noise,
            generator=self._generator,
        )

    def _report_demand(self, seen: Observation) -> None:
        dynamic = self.budgets.dynamic
        assert dynamic is not None
        demand = attention_demand(attention_weights(seen, seen.tokens.valid), dynamic.rho)
        self.budgets.report(self.layer, mean_over_queries(seen, demand[..., None]).mean((1, 2, 3)))
