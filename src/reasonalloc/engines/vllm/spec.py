"""An arena, as vLLM's memory management sees it: one block that lasts a request's whole life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """A block of ``max_model_len`` tokens that takes the bytes of an arena.

    With that block size every formula of vLLM's gives one block per request, whatever it generates.

    Attributes:
        pairs: pairs of rows in the layer's arena; vLLM's shape is ``[blocks, 1, pairs, 2 * head_size]``.
    """

    pairs: int = 0

    @property
    def num_heads(self) -> int:
        """One: what the heads' shares are is the arena's business."""
        return 1

    @property
    def num_states(self) -> int:
        """Pairs of rows."""
        return self.pairs

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Pairs of rows; a block is never split."""
        return self.pairs

    @property
    def prefix_cacheable(self) -> bool:
        """Never: an evicted prefix is another request's no more."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        """Never: tokens have no slots of their own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """An arena, whatever the length."""
        return self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Layers with equal arenas share a group."""
        return KVCacheSpec.merge.__func__(cls, specs)
