"""What a cache holds while it is in use."""

from __future__ import annotations

import numpy as np

from reasonalloc.engines.transformers.cache import Cache


class Footprint:
    """Kept tokens and bytes of each sequence of a batch, looked at now and then.

    Attributes:
        kept: for each sequence, tokens per head at every look, averaged over layers and heads.
        kv_bytes: for each sequence, its largest share of the key and value slots, free ones included, in bytes.
    """

    def __init__(self, sequences: int) -> None:
        self.kept: list[list[float]] = [[] for _ in range(sequences)]
        self.kv_bytes = [0] * sequences

    def look(self, cache: Cache, sequences: list[int]) -> None:
        """Look at a cache that holds these sequences, in this order."""
        slabs = [layer.slab for layer in cache.layer_caches if layer.slab is not None]
        kept = np.stack([slab.lengths for slab in slabs]).mean((0, 2))
        share = sum(slab.kv_bytes for slab in slabs) // len(kept)
        for sequence, tokens in zip(sequences, kept.tolist(), strict=True):
            self.kept[sequence].append(tokens)
            self.kv_bytes[sequence] = max(self.kv_bytes[sequence], share)
