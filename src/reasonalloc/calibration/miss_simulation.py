"""Simulated eviction beside a full cache: which attention would have fallen on tokens that a scorer had dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.cache.queries import Queries
from reasonalloc.cache.selection import rank_candidates, select
from reasonalloc.policies.allocation.profile import MissGrid
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.noise import Noise, stream_of
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import LayerTokens


class MissSimulation:
    """One layer under one scorer, with its own window, at every budget of a grid, each head with the same budget.

    The model goes on with its full cache; only the bookkeeping forgets. Once per interval each budget's survivors are
    scored and cut as in a real cache.
    """

    def __init__(self, scorer: str, grid: MissGrid, layer: int) -> None:
        self.grid = grid
        self.compressions = [Compression(b, scorer, layers="uniform", heads="uniform") for b in grid.budgets]
        self.layer = layer
        self.observed_queries = max(c.token_scorer.observed_queries for c in self.compressions)
        self.needs_received = any(c.tracks_received for c in self.compressions)
        self._kept: list[Bool[Tensor, "batch heads tokens"]] = []
        self._received: list[Float[Tensor, "batch heads tokens"]] = []
        self._generator: torch.Generator | None = None
        self._rows = torch.arange(0)  # of the first batch
        self._protected = torch.zeros(0, dtype=torch.int64)  # tokens of each sequence's prompt that stay
        self._steps = grid.interval  # the prompt is compressed at once

    @property
    def kept(self) -> list[Bool[Tensor, "batch heads tokens"]]:
        """For each budget, which tokens are still there."""
        return self._kept

    def observe(
        self,
        weights: Float[Tensor, "batch heads group queries tokens"],
        rows: Bool[Tensor, "batch queries"],
        steps: int,
    ) -> Float[np.ndarray[Any, Any], "batch budgets heads"]:
        """Attention mass on evicted tokens, summed over the counted rows, mean over a group's query heads."""
        self.follow(weights.shape[-1], steps)
        share = torch.einsum("bhgmn,bm->bhn", weights, rows.to(weights.dtype)) / weights.shape[2]
        missed = torch.stack([(share * ~kept).sum(-1) for kept in self._kept], 1)
        for i, received in enumerate(self._received):
            left = weights * self._kept[i][:, :, None, None]
            received += (left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)).sum((2, 3))
        return missed.double().cpu().numpy()

    def follow(self, tokens: int, steps: int) -> None:
        """So many steps were decoded, and so many tokens are there now. For scorers that need no received attention."""
        self._steps += steps
        self._extend(tokens)

    def compress(self, tokens: LayerTokens, queries: Queries, scaling: float) -> None:
        """Once per interval: evict at every budget."""
        if self._steps < self.grid.interval:
            return
        self._steps = 0
        if not self._kept:
            self._start(tokens)
        for i, compression in enumerate(self.compressions):
            self._kept[i] = self._evict(i, compression, tokens, queries, scaling)

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Only these sequences go on."""
        self._rows, self._protected = self._rows[list(rows)], self._protected[list(rows)]
        self._kept = [kept[list(rows)] for kept in self._kept]
        self._received = [received[list(rows)] for received in self._received]

    def _start(self, tokens: LayerTokens) -> None:
        device = tokens.lengths.device
        self._rows = torch.arange(len(tokens.lengths), device=device)
        prompts = tokens.lengths[:, 0].to(torch.int64, copy=True)  # the cache counts on in its own
        self._protected = prompts if self.grid.protect_prompt else torch.zeros_like(prompts)
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(self.layer)
        # True beyond a sequence's length: the tokens that will stand there are new.
        self._kept = [torch.ones_like(tokens.valid) for _ in self.compressions]
        if self.needs_received:
            assert tokens.received is not None
            # Absent entries are undefined in the cache: they will be added to.
            self._received = [tokens.received.masked_fill(~tokens.valid, 0.0) for _ in self.compressions]

    def _extend(self, tokens: int) -> None:
        """New tokens are there, for every budget."""
        missing = tokens - self._kept[0].shape[-1]
        if missing:
            pad = torch.nn.functional.pad
            self._kept = [pad(kept, (0, missing), value=True) for kept in self._kept]
            self._received = [pad(received, (0, missing)) for received in self._received]

    def _evict(
        self, i: int, compression: Compression, tokens: LayerTokens, queries: Queries, scaling: float
    ) -> Bool[Tensor, "batch heads tokens"]:
        assert self._generator is not None
        kept = self._kept[i] & tokens.valid
        lengths = kept.sum(-1)
        budget = self.grid.budgets[i]
        if int((lengths - self._protected[:, None]).max()) <= budget:
            return self._kept[i]
        index = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(lengths.max())]
        received = tokens.received if not self._received else self._received[i]
        held = LayerTokens(tokens.keys, tokens.values, tokens.lengths, tokens.positions, received)
        held = held.gather(index, lengths)
        wanted = compression.token_scorer.observed_queries
        last = queries.last(wanted) if wanted else None
        seen = Observation(
            tokens=held,
            queries=None if last is None else last.states,
            real_queries=None if last is None else last.real,
            scaling=scaling,
            window=compression.kept_window,
            budget=torch.full((len(lengths),), float(budget), device=lengths.device),
            noise=Noise(0, stream_of(self.layer, self._rows), tokens.lengths[:, 0]),
            generator=self._generator,
        )
        scores = compression.token_scorer.score(seen)
        candidates = rank_candidates(scores, held.valid, held.newest(compression.kept_window), self._protected)
        chosen, count = select(candidates, torch.full_like(lengths, budget), by_score=False)
        beyond = torch.arange(chosen.shape[-1], device=chosen.device) >= count[..., None]
        survivors = torch.nn.functional.pad(~tokens.valid, (0, 1))
        places = index.gather(-1, chosen).masked_fill(beyond, kept.shape[-1])
        return survivors.scatter_(-1, places, True)[..., :-1]
