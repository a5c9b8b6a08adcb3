"""Attention of new queries over ragged spans. Several backends, one contract, chosen once per cache."""

from reasonalloc.cache.attention.backend import BACKENDS, AttentionBackend, check_backend, choose_backend
from reasonalloc.cache.attention.rows import attend_rows, received_attention

__all__ = ["BACKENDS", "AttentionBackend", "attend_rows", "check_backend", "choose_backend", "received_attention"]
