"""What the plugin counts, in Prometheus' format, beside vLLM's own metrics.

vLLM's workers are processes of their own: set PROMETHEUS_MULTIPROC_DIR to an empty folder before ``vllm serve``, then
the server's /metrics collects from all of them. Arenas in use are vLLM's ``kv_cache_usage_perc`` of ``arenas``.
"""

from __future__ import annotations

import numpy as np
from prometheus_client import Counter, Gauge

from reasonalloc.cache.ragged import RaggedCache

_EVICTED = Counter("reasonalloc_evicted_tokens", "Tokens forgotten, over heads.", ["layer"])
_COMPRESSIONS = Counter("reasonalloc_compressions", "Rounds in which a request's layer forgot tokens.", ["layer"])
_KEPT = Gauge(
    "reasonalloc_kept_tokens", "Tokens per head after the last such round.", ["layer"], multiprocess_mode="mostrecent"
)
_ARENAS = Gauge("reasonalloc_arenas", "Requests that fit at once.", multiprocess_mode="mostrecent")


class Metrics:
    """Reads a cache's counts and tells Prometheus what is new."""

    def __init__(self, cache: RaggedCache) -> None:
        assert cache.round is not None
        self._table, self._round = cache.table, cache.round
        layers = cache.round.numbers.tolist()
        self._seen = np.zeros((2, len(layers)), dtype=np.int64)
        self._metrics = [[metric.labels(layer) for metric in (_EVICTED, _COMPRESSIONS, _KEPT)] for layer in layers]

    def show(self, requests: int) -> None:
        """How many requests fit."""
        _ARENAS.set(requests)

    def update(self) -> None:
        """Between two passes; it does not wait for rounds that the device has not finished."""
        self._table.land_what_is_there()
        counts = np.stack([self._round.evicted, self._round.rounds])
        new, self._seen = counts - self._seen, counts
        for layer in np.flatnonzero(new.any(0)).tolist():
            evicted, compressions, kept = self._metrics[layer]
            evicted.inc(int(new[0, layer]))
            compressions.inc(int(new[1, layer]))
            kept.set(float(self._round.kept[layer]))
