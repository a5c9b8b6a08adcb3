"""The attention backend: vLLM's batches, handed to arenas."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from reasonalloc.cache.attention import choose_backend
from reasonalloc.cache.step import Chunk
from reasonalloc.engines.models import UnsupportedModelError
from reasonalloc.engines.vllm.model import ServedModel
from reasonalloc.engines.vllm.running import Running, running
from reasonalloc.engines.vllm.settings import settings


class StepBuilder(AttentionMetadataBuilder[Any]):
    """Prepares a pass. Layers of unequal arenas have a builder each; that of the process's first layer does it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs of batches in which every request decodes one token, where a GPU kernel attends."""
        from vllm.platforms import current_platform

        device, model = torch.device(current_platform.device_type), vllm_config.model_config
        if choose_backend("auto", device, {model.dtype}, model.get_head_size()).reads_host:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's description of the batch, as it is: the layers look at what was prepared."""
        serving = running(self.vllm_config.compilation_config.static_forward_context)
        assert serving is not None, "a step before there is memory"
        if serving.first.layer_name in self.layer_names:
            serving.begin(common_attn_metadata)
        return common_attn_metadata


class ArenaAttention(AttentionImpl[Any]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """As vLLM makes it.

        Raises:
            UnsupportedModelError: attention that a ragged cache cannot give.
        """
        unserved = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "soft-capped logits": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != "decoder",
            "layers that share caches": kv_sharing_target_layer_name is not None,
            "attention sinks": sinks is not None,
        }
        if any(unserved.values()):
            found = ", ".join(name for name, true in unserved.items() if true)
            raise UnsupportedModelError(f"reasonalloc cannot serve this model in vLLM: it has {found}")
        asked = settings()
        assert asked is not None, "the plugin registers this backend only where REASONALLOC is set"
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype
        config = get_current_vllm_config()
        self.served = ServedModel.of(asked, config)
        self.most = config.scheduler_config.max_num_seqs  # requests in a step, padding included
        # Of prompts that arenas have no room for: the longest one, and what the step that ends it begins of others.
        self.staged_tokens = config.model_config.max_model_len + config.scheduler_config.max_num_batched_tokens
        self.room: Tensor | None = None  # held while vLLM measures what the model takes beside its cache
        self.running: Running | None = None
        self.index = 0  # which of the process's layers this is

    def forward(
        self,
        layer: Any,
        query: Float[Tensor, "tokens query_heads dim"],
        key: Float[Tensor, "tokens heads dim"],
        value: Float[Tensor, "tokens heads dim"],
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Float[Tensor, "tokens query_heads dim"],
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend and remember.

        Where no prompts come, a CUDA graph may record it: it works on the device alone, in tensors that stay where
        they are from step to step.
        """
        if not kv_cache.numel():  # vLLM measures its own memory
            self.room = torch.empty(2, self.staged_tokens, *key.shape[1:], dtype=key.dtype, device=key.device)
            return output
        if attn_metadata is None:  # it warms up
            return output
        assert self.running is not None
        batch = self.running.batch
        assert batch is not None
        for prompt in batch.prompts:
            q, k, v = (x[prompt.tokens].transpose(0, 1)[None] for x in (query, key, value))
            output[prompt.tokens] = self._attend(prompt.chunk, q, k, v)[0].transpose(0, 1)
        if len(batch.arenas):
            q, k, v = (x[batch.rows][:, :, None] for x in (query, key, value))
            output[batch.rows] = self.running.cache.decode(self.index, q, k, v, self.scale)[:, :, 0]
        return output

    def _attend(self, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A chunk of a prompt, ``[1, heads, tokens, dim]``."""
        assert self.running is not None
        cache = self.running.cache
        if not cache.is_new(chunk):
            return cache.attend(self.index, chunk, query, key, value, self.scale)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)
        cache.take(self.index, chunk, query, key, value, self.scale)
        return out

    def serve(self, running: Running | None, index: int = 0) -> None:
        """There is memory, and this is the layer of that index in it; None: there is none any more."""
        self.room, self.running, self.index = None, running, index


class ArenaBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = []  # any: what is not the model's own is refused in model.py

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: a block is an arena."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks of one layer lie one behind the other."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_name() -> str:
        """The name of the slot that it is registered in."""
        return slot().name

    @staticmethod
    def get_impl_cls() -> type[ArenaAttention]:
        """Of the attention."""
        return ArenaAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """Of the metadata."""
        return StepBuilder


def slot() -> AttentionBackendEnum:
    """Where the backend is registered: the CPU's only one, or the one vLLM keeps for plugins."""
    from vllm.platforms import current_platform

    return AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM
