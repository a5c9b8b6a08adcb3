"""Arenas: ragged caches of many requests in memory that an engine owns and lends by the block.

An engine with a pool of equal blocks (vLLM) gives every request one block per layer, its *arena*. All that the layer
remembers of the request lies in it. How large an arena is never changes; how heads share it does, at every routing.
"""

from reasonalloc.cache.arenas.layer import ArenaLayer
from reasonalloc.cache.arenas.layers import ArenaLayers
from reasonalloc.cache.arenas.layout import ArenaLayout
from reasonalloc.cache.arenas.pool import ArenaPool

__all__ = ["ArenaLayer", "ArenaLayers", "ArenaLayout", "ArenaPool"]
