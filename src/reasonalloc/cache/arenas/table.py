"""What the host knows of all arenas of all layers."""

from __future__ import annotations

import numpy as np


class ArenaTable:
    """Numbers of every layer's arenas, one array for all layers: a step's places are worked out for all at once.

    Attributes:
        starts, lengths, capacities: ``[layers, arenas, heads]``: first row, live tokens and slots of every span.
        pushed: ``[layers, arenas]``, queries that went into every ring.
        seen: ``[layers, arenas]``, tokens of every request, evicted ones included.
        steps: ``[layers, arenas]``, tokens decoded since the last compression.
    """

    def __init__(self, layers: int, arenas: int, heads: int) -> None:
        self.starts, self.lengths, self.capacities = (
            np.zeros((layers, arenas, heads), dtype=np.int64) for _ in range(3)
        )
        self.pushed, self.seen, self.steps = (np.zeros((layers, arenas), dtype=np.int64) for _ in range(3))
