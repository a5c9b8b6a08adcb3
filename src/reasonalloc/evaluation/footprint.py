"""What a cache holds while it is in use."""

from __future__ import annotations

from reasonalloc.engines.transformers.cache import Cache


class Footprint:
    """Kept tokens and bytes of each sequence of a batch, looked at now and then.

    Attributes:
        kept: for each sequence, tokens per head at every look, averaged over layers and heads.
        kv_bytes: for each sequence, the most bytes of keys and values that it held, in its own slots, free ones
            included. Of a full cache only its tokens count: it grows ahead to be fast, and transformers' own, which it
            stands for, does not.
        evicted: for each sequence, whether any head had dropped a token of it at the last look.
    """

    def __init__(self, sequences: int) -> None:
        self.kept: list[list[float]] = [[] for _ in range(sequences)]
        self.kv_bytes = [0] * sequences
        self.evicted = [False] * sequences
        self._held: list[int] = []  # the sequence of each row of the cache

    def hold(self, sequences: list[int]) -> None:
        """From now on the cache's rows are these sequences, in this order."""
        self._held = sequences

    def look(self, cache: Cache, sequences: list[int]) -> None:
        """Look at some sequences of a cache. If it holds as many, they are its rows, in this order."""
        table, pools = cache.ragged.table, cache.ragged.pools
        if len(sequences) == table.rows:
            self.hold(sequences)
        rows = [self._held.index(sequence) for sequence in sequences]
        lengths = table.lengths[:, rows]
        short = (lengths.min((0, 2)) < table.seen[rows]).tolist()
        slots = lengths if cache.compression.budget is None else table.capacities[:, rows]
        held = slots.sum((0, 2)) * (pools[0].kv_bytes // len(pools[0].keys))
        kept = lengths.mean((0, 2)).tolist()
        for sequence, tokens, size, evicted in zip(sequences, kept, held.tolist(), short, strict=True):
            self.evicted[sequence] = evicted
            self.kept[sequence].append(tokens)
            self.kv_bytes[sequence] = max(self.kv_bytes[sequence], size)
