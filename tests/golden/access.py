"""The one place where the recorded scenarios touch the cache's internals.

Whoever rewrites the storage rewrites this file; scenarios and the recorded positions stay as they are.
"""

from dataclasses import dataclass

import numpy as np
import torch

from reasonalloc.cache.arenas import ArenaLayers, ArenaLayout
from reasonalloc.cache.totals import LayerBudgets

Kept = list[list[list[np.ndarray]]]  # [layer][row][head]: positions in the row's own text, in the order of storage


def kept_positions(cache) -> Kept:
    """What a transformers cache holds now."""
    return [_held(layer.slab, range(layer.slab.batch)) for layer in cache.layer_caches]


def _held(slab, rows):
    positions = slab.positions.numpy()
    return [
        [
            positions[first : first + count].copy()
            for first, count in zip(slab.starts[row].tolist(), slab.lengths[row].tolist(), strict=True)
        ]
        for row in rows
    ]


@dataclass(frozen=True)
class Part:
    """What one request adds in a step.

    Attributes:
        arena: where the request lives.
        states: for every layer query ``[query_heads, tokens, dim]``, key and value ``[heads, tokens, dim]``.
        first: the first tokens of its prompt: whatever lies in the arena is another's.
        last: the last tokens of its prompt.
        decoded: one token, and the prompt ended in a step before this one.
    """

    arena: int
    states: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    first: bool = False
    last: bool = False
    decoded: bool = False


class Arenas:
    """All layers' arenas, driven as an engine with blocks drives them."""

    def __init__(self, compression, shape, arenas, dtype, backend):
        budgets = LayerBudgets(compression, shape)
        layouts = {
            layer: ArenaLayout.of(compression, shape, int(budgets.totals(layer, 1)[0]), dtype)
            for layer in range(shape.layers)
        }
        memory = {  # NaN, if anybody read it
            layer: torch.full((arenas, layout.nbytes), 255, dtype=torch.uint8) for layer, layout in layouts.items()
        }
        self.arenas = ArenaLayers(compression, budgets, memory, layouts, backend)
        self.scaling = shape.head_dim**-0.5

    def step(self, alive, parts):
        """One forward pass of all layers.

        Args:
            alive: arenas of all requests that have not ended, those that add nothing in this step included.
            parts: what the others add.
        """
        decoded = [part for part in parts if part.decoded]
        arenas = [part.arena for part in decoded]
        self.arenas.begin_step(set(alive), arenas)
        for i, layer in enumerate(self.arenas.layers):
            for part in parts:
                if not part.decoded:
                    layer.chunk(part.arena, *part.states[i], self.scaling, first=part.first)
            if decoded:
                query, key, value = (torch.stack(x)[:, :, 0] for x in zip(*(p.states[i] for p in decoded), strict=True))
                layer.decode(arenas, query, key, value, self.scaling)

    def kept(self, arena) -> list[list[np.ndarray]]:
        """``[layer][head]``: what a request holds whose first token was decoded."""
        return [_held(layer.requests[arena].slab, [0])[0] for layer in self.arenas.layers]
