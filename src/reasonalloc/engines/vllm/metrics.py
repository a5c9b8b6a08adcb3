"""What the plugin counts, in Prometheus' format, beside vLLM's own metrics.

vLLM's workers are processes of their own: set PROMETHEUS_MULTIPROC_DIR to an empty folder before ``vllm serve``, then
the server's /metrics collects from all of them. Arenas in use are vLLM's ``kv_cache_usage_perc`` of ``arenas``.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from reasonalloc.cache.ragged import RaggedCache

_EVICTED = Counter("reasonalloc_evicted_tokens", "Tokens forgotten, over heads.", ["layer"])
_COMPRESSIONS = Counter("reasonalloc_compressions", "Rounds in which a request's layer forgot tokens.", ["layer"])
_KEPT = Gauge(
    "reasonalloc_kept_tokens", "Tokens per head after the last such round.", ["layer"], multiprocess_mode="mostrecent"
)
_ARENAS = Gauge("reasonalloc_arenas", "Requests that fit at once.", multiprocess_mode="mostrecent")


class LayerMetrics:
    """Reads one layer's counts and tells Prometheus what is new."""

    def __init__(self, cache: RaggedCache, index: int, requests: int) -> None:
        assert cache.round is not None
        self.round, self.index = cache.round, index
        layer = int(cache.round.numbers[index])
        self._seen = (0, 0)
        self._evicted, self._compressions = _EVICTED.labels(layer), _COMPRESSIONS.labels(layer)
        self._kept = _KEPT.labels(layer)
        _ARENAS.set(requests)

    def update(self) -> None:
        """After a forward pass."""
        evicted, compressions = int(self.round.evicted[self.index]), int(self.round.rounds[self.index])
        if (evicted, compressions) == self._seen:
            return
        self._evicted.inc(evicted - self._seen[0])
        self._compressions.inc(compressions - self._seen[1])
        self._kept.set(float(self.round.kept[self.index]))
        self._seen = (evicted, compressions)
