"""What a cache holds, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reasonalloc.cache.layer_cache import LayerCache
from reasonalloc.cache.totals import LayerBudgets


@dataclass(frozen=True)
class CacheStats:
    """A cache's state at one moment. Bytes are read off the tensors.

    Attributes:
        seen: tokens the sequences have seen, padding included (the longest one's length).
        batch: sequences in the cache.
        kv_bytes: key and value slots, free ones included.
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
            f"keys and values {_size(self.kv_bytes)}, "
            f"index {_size(self.index_bytes)}, queries {_size(self.query_bytes)}",
            f"kept tokens per head: min {kept.min()}, mean {kept.mean():.1f}, max {kept.max()}",
            f"{self.compressions} compressions, {self.evicted} entries evicted",
            "layer  kept per head (mean over sequences)",
        ]
        lines += [f"{i:5d}  " + " ".join(f"{k:6.1f}" for k in layer.mean(0)) for i, layer in enumerate(kept)]
        return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def collect(layers: list[LayerCache], budgets: LayerBudgets | None, method: dict[str, str]) -> CacheStats:
    """The statistics of a cache made of these layers."""
    slabs = [layer.slab for layer in layers if layer.slab is not None]
    full = len(slabs) == len(layers)
    batch = slabs[0].batch if full else 0
    return CacheStats(
        seen=layers[0].seen_columns,
        batch=batch,
        kv_bytes=sum(slab.kv_bytes for slab in slabs),
        index_bytes=sum(slab.index_bytes for slab in slabs),
        query_bytes=sum(layer.window.nbytes for layer in layers),
        kept=[slab.lengths.tolist() for slab in slabs],
        budgets=None if budgets is None else [budgets.totals(i, batch).tolist() for i in range(len(layers))],
        evicted=sum(layer.evicted for layer in layers),
        compressions=max(layer.compressions for layer in layers),
        method=method,
        backend="" if layers[0].backend is None else layers[0].backend.name,
    )
