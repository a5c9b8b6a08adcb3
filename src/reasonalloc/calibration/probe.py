"""What is measured while a model generates with its full cache: attention demand, and what eviction would have missed.

Streaming: a layer hands over its cache and its last queries once per ``block`` decoded tokens. No attention matrix
outlives the call: a few copies of [batch, query heads, block, length] for one layer at a time. Miss curves also keep,
for all layers, one byte (five where received attention counts) for each budget, sequence, KV head and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasonalloc.cache.queries import Queries
from reasonalloc.calibration.miss_simulation import MissSimulation
from reasonalloc.policies.allocation import ModelShape, PromptDemand
from reasonalloc.policies.allocation.demand import attention_demands
from reasonalloc.policies.allocation.profile import HISTOGRAM_EDGES, MissGrid, check_rhos
from reasonalloc.policies.scoring.noise import Noise
from reasonalloc.policies.scoring.scorer import Observation
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import attention_weights, visible


@dataclass(frozen=True)
class ProbeSettings:
    """What is measured, and on which rows.

    Attributes:
        rhos: shares of attention mass, ascending.
        histogram_rho: index of the one whose distribution is kept.
        grids: scorers whose eviction is simulated, each with its budgets.
        least_tokens: rows of queries that see fewer tokens do not count.
        block: decoded tokens that are observed together; divides every grid's interval.
    """

    rhos: tuple[float, ...]
    histogram_rho: int
    grids: dict[str, MissGrid]
    least_tokens: int = 64
    block: int = 32

    def __post_init__(self) -> None:
        check_rhos(self.rhos)
        for name in ("least_tokens", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for scorer, grid in self.grids.items():
            if grid.interval % self.block:
                raise ValueError(f"interval {grid.interval} of {scorer} is no multiple of the block of {self.block}")


class DemandProbe:
    """Collects the demand of one batch of prompts, over all layers. Give it to a full cache."""

    def __init__(self, shape: ModelShape, settings: ProbeSettings) -> None:
        self.shape = shape
        self.settings = settings
        self._simulations = {
            scorer: [MissSimulation(scorer, grid, layer) for layer in range(shape.layers)]
            for scorer, grid in settings.grids.items()
        }
        simulations = [parts[0] for parts in self._simulations.values()]
        self.observed_queries = max([settings.block, *(part.observed_queries for part in simulations)])
        self.needs_received = any(part.needs_received for part in simulations)
        self._sums: np.ndarray[Any, Any] | None = None  # made with the rest by the first call, which knows the batch
        self._alive = np.zeros(0, dtype=np.int64)

    def observe(self, layer: int, tokens: LayerTokens, queries: Queries, scaling: float, steps: int) -> None:
        """Take in what a layer has seen since the last call.

        Args:
            layer: its index.
            tokens: its full cache.
            queries: its last queries.
            scaling: factor of the attention logits.
            steps: decoded tokens since the last call; 0 right after the prompt.
        """
        if self._sums is None:
            self._start(len(tokens.keys))
        if steps:
            weights, rows = self._attention(tokens, queries.last(steps), scaling)
            rows = rows & self._before_end(layer, steps).to(rows.device)
            self._add_demand(layer, weights, rows)
            for scorer, layers in self._simulations.items():
                self._misses[scorer][self._alive, :, layer] += layers[layer].observe(weights, rows, steps)
        for layers in self._simulations.values():
            layers[layer].compress(tokens, queries, scaling)

    def finish(self, sequence: int, steps: int) -> None:
        """Of this sequence (counted in the first batch) only the first ``steps`` decoded tokens count."""
        self._ends[sequence] = steps

    def _before_end(self, layer: int, steps: int) -> Bool[Tensor, "batch queries"]:
        first = self._steps[layer]
        self._steps[layer] += steps
        return torch.from_numpy(first + np.arange(steps) < self._ends[self._alive, None])

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Only these sequences go on; what was measured on the others stays."""
        self._alive = self._alive[list(rows)]
        for layers in self._simulations.values():
            for simulation in layers:
                simulation.select_sequences(rows)

    def results(self, hashes: Sequence[str], tasks: Sequence[str], tokens: Sequence[int]) -> list[PromptDemand]:
        """One record for each sequence of the batch, in its first order; of a text too short it has no rows."""
        assert self._sums is not None
        return [
            PromptDemand(
                hash=hashes[i],
                rows=int(self._rows[i]),
                sums=self._sums[i],
                misses={scorer: nine_digits(values[i]) for scorer, values in self._misses.items()},
                task=tasks[i],
                tokens=tokens[i],
            )
            for i in range(len(hashes))
        ]

    @property
    def histogram(self) -> np.ndarray[Any, Any]:
        """Counts for each layer, query head and bin of ``HISTOGRAM_EDGES``, over the batch."""
        return self._histogram

    def _start(self, batch: int) -> None:
        shape, settings = self.shape, self.settings
        self._alive = np.arange(batch)
        self._ends = np.full(batch, np.iinfo(np.int64).max)
        self._steps = np.zeros(shape.layers, dtype=np.int64)
        self._rows = np.zeros(batch, dtype=np.int64)
        self._sums = np.zeros((batch, len(settings.rhos), shape.layers, shape.query_heads))
        self._histogram = np.zeros((shape.layers, shape.query_heads, len(HISTOGRAM_EDGES)), dtype=np.int64)
        self._misses = {
            scorer: np.zeros((batch, len(grid.budgets), shape.layers, shape.kv_heads))
            for scorer, grid in settings.grids.items()
        }

    def _attention(
        self, tokens: LayerTokens, queries: Queries, scaling: float
    ) -> tuple[Float[Tensor, "batch heads group queries tokens"], Bool[Tensor, "batch queries"]]:
        """The queries' attention over all that they could see, and which of them count."""
        seen = attention_alone(tokens, queries, scaling)
        return attention_weights(seen, tokens.valid), visible(seen)[:, 0].sum(-1) >= self.settings.least_tokens

    def _add_demand(self, layer: int, weights: Tensor, rows: Tensor) -> None:
        demand = attention_demands(weights, self.settings.rhos).flatten(1, 2)  # [batch, query heads, queries, rhos]
        counted = demand.double() * rows[:, None, :, None]
        assert self._sums is not None
        self._sums[self._alive, :, layer] += counted.sum(2).transpose(1, 2).cpu().numpy()
        if layer == 0:
            self._rows[self._alive] += rows.sum(-1).cpu().numpy()
        edges = torch.tensor(HISTOGRAM_EDGES, device=demand.device, dtype=demand.dtype)
        bins = torch.bucketize(demand[..., self.settings.histogram_rho].contiguous(), edges)
        kept = bins.transpose(0, 1)[:, rows]  # [query heads, counted rows]
        offset = torch.arange(len(kept), device=kept.device)[:, None] * len(edges)
        counts = torch.bincount((kept + offset).flatten(), minlength=len(kept) * len(edges))
        self._histogram[layer] += counts.view(len(kept), -1).cpu().numpy()


def attention_alone(tokens: LayerTokens, queries: Queries, scaling: float) -> Observation:
    """What a scorer would see, where only the attention of these queries is looked at."""
    none = torch.zeros(len(tokens.lengths), dtype=torch.int64)  # nothing is drawn, and nothing has a budget
    noise = Noise(0, none, none)
    return Observation(tokens, queries.states, None, scaling, 0, none.float(), noise, torch.Generator())


def nine_digits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rounded once, here: files stay small, and what is merged is what was written."""
    return np.array([float(f"{x:.9g}") for x in values.flat]).reshape(values.shape)
