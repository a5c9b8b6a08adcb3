"""Ragged storage: a slab of key/value slots per layer, one span per (sequence, head), any length each."""

from reasonalloc.storage.slab import RaggedSlab
from reasonalloc.storage.spans import Spans
from reasonalloc.storage.tokens import LayerTokens

__all__ = ["LayerTokens", "RaggedSlab", "Spans"]
