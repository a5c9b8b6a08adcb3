"""The one place where the recorded scenarios touch the cache's internals.

Whoever rewrites the storage rewrites this file; scenarios and the recorded positions stay as they are.
"""

from dataclasses import dataclass

import numpy as np
import torch

from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk

Kept = list[list[list[np.ndarray]]]  # [layer][row][head]: positions in the row's own text, in the order of storage


def kept_positions(cache) -> Kept:
    """What a transformers cache holds now."""
    return _held(cache.ragged, range(cache.ragged.table.rows))


def _held(ragged, rows):
    layers = [ragged.tokens(layer) for layer in range(ragged.table.layers)]
    return [
        [
            [
                positions[:count].numpy().astype(np.int32)
                for positions, count in zip(tokens.positions[row], tokens.lengths[row].tolist(), strict=True)
            ]
            for row in rows
        ]
        for tokens in layers
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
        self.ragged = RaggedCache(compression, shape, attention=backend)
        layouts = {
            layer: ArenaLayout.of(compression, shape, self.ragged.totals.fixed(layer), dtype)
            for layer in range(shape.layers)
        }
        memory = {  # NaN, if anybody read it
            layer: torch.full((arenas, layout.nbytes), 255, dtype=torch.uint8) for layer, layout in layouts.items()
        }
        self.ragged.lend(memory, layouts)
        self.scaling = shape.head_dim**-0.5

    def step(self, alive, parts):
        """One forward pass of all layers.

        Args:
            alive: arenas of all requests that have not ended, those that add nothing in this step included.
            parts: what the others add.
        """
        ragged = self.ragged
        ragged.free([row for row in range(ragged.table.rows) if row not in alive])
        ragged.free([part.arena for part in parts if part.first])
        decoded = [part for part in parts if part.decoded]
        chunks = [
            (part, Chunk.of(np.array([part.arena]), part.states[0][0].shape[1], ends_prompt=False))
            for part in parts
            if not part.decoded
        ]
        ragged.begin([part.arena for part in decoded], [chunk for _, chunk in chunks])
        for layer in range(ragged.table.layers):
            for part, chunk in chunks:
                query, key, value = (x[None] for x in part.states[layer])
                if ragged.is_new(chunk):
                    ragged.take(layer, chunk, query, key, value, self.scaling)
                else:
                    ragged.attend(layer, chunk, query, key, value, self.scaling)
            if decoded:
                query, key, value = (torch.stack(x) for x in zip(*(p.states[layer] for p in decoded), strict=True))
                ragged.decode(layer, query, key, value, self.scaling)
            ragged.end_layer(layer)

    def kept(self, arena) -> list[list[np.ndarray]]:
        """``[layer][head]``: what a request holds whose first token was decoded."""
        return [layer[0] for layer in _held(self.ragged, [arena])]
