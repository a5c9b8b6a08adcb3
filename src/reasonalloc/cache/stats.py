"""What a cache holds, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reasonalloc.cache.ragged import RaggedCache


@dataclass(frozen=True)
class CacheStats:
    """A cache's state at one moment. Bytes are read off the tensors.

    Attributes:
        seen: tokens the sequences have seen, padding included (the longest one's length).
        batch: sequences in the cache.
        kv_bytes: key and value slots, free ones included: a cache without a budget grows ahead, and one with a budget
            has room for the tokens that come before the next round.
        full_bytes: keys and values that a full cache without free slots would take for the same tokens.
        index_bytes: positions and accumulated scores, per slot.
        query_bytes: remembered queries.
        kept: tokens held, ``[layers][batch][heads]``.
        budgets: tokens per layer over all heads, ``[layers][batch]``; None without a budget.
        evicted: (token, head) entries evicted so far, over all layers, sequences and heads.
        compressions: rounds that evicted something, of the layer with most.
        method: the policies: scorer, layers, heads.
        backend: the attention backend in use.
    """

    seen: int
    batch: int
    kv_bytes: int
    full_bytes: int
    index_bytes: int
    query_bytes: int
    kept: list[list[list[int]]]
    budgets: list[list[int]] | None
    evicted: int
    compressions: int
    method: dict[str, str]
    backend: str

    @property
    def total_bytes(self) -> int:
        """Everything the cache holds on the device."""
        return self.kv_bytes + self.index_bytes + self.query_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        if not self.batch:
            return "empty cache"
        kept = np.array(self.kept)
        policies = ", ".join(f"{key} {value}" for key, value in self.method.items())
        lines = [
            f"{self.batch} sequence(s), {self.seen} tokens seen ({policies}; attention: {self.backend})",
            f"keys and values {size_text(self.kv_bytes)}, free slots included; a full cache of this text takes "
            f"{size_text(self.full_bytes)}",
            f"index {size_text(self.index_bytes)}, queries {size_text(self.query_bytes)}",
            f"kept tokens per head: min {kept.min()}, mean {kept.mean():.1f}, max {kept.max()}",
            f"{self.compressions} compressions, {self.evicted} entries evicted",
            "layer  kept per head (mean over sequences)",
        ]
        lines += [f"{i:5d}  " + " ".join(f"{k:6.1f}" for k in layer.mean(0)) for i, layer in enumerate(kept)]
        return "\n".join(lines)


def size_text(count: float) -> str:
    """Bytes in the unit that fits: "812.0 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def collect(ragged: RaggedCache, method: dict[str, str]) -> CacheStats:
    """The statistics of a cache."""
    table, pools, totals = ragged.table, ragged.pools, ragged.totals
    table.land()
    rounds = ragged.round
    slot = sum(states[:1].nbytes for states in (pools[0].keys, pools[0].values)) if table.rows else 0
    layers = np.arange(table.layers) if rounds is None else rounds.numbers
    return CacheStats(
        seen=ragged.columns,
        batch=table.rows,
        kv_bytes=sum(pool.kv_bytes for pool in pools),
        full_bytes=int(table.seen.sum()) * table.layers * table.heads * slot,
        index_bytes=sum(pool.index_bytes for pool in pools),
        query_bytes=sum(pool.queries.nbytes for pool in pools),
        kept=table.lengths.tolist() if table.rows else [],
        budgets=None if totals is None else totals.of(layers, ragged.rows).tolist(),
        evicted=0 if rounds is None else int(rounds.evicted.sum()),
        compressions=0 if rounds is None else int(rounds.rounds.max()),
        method=method,
        backend="" if ragged.backend is None else ragged.backend.name,
    )
