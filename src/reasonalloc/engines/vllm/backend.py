"""The attention backend: vLLM's batches, handed to arenas."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.engines.models import UnsupportedModelError
from reasonalloc.engines.vllm.metrics import LayerMetrics
from reasonalloc.engines.vllm.model import ServedModel, layer_number
from reasonalloc.engines.vllm.settings import settings

_RESERVED = 1  # block 0 is vLLM's null block, which no request gets
_logger = logging.getLogger("vllm.reasonalloc")  # below vLLM's own, so that it is shown as vLLM's are


@dataclass(frozen=True)
class PromptPart:
    """Tokens of one request's prompt in a batch.

    Attributes:
        chunk: as the cache takes it.
        tokens: where they lie in the batch.
        first: whether nothing came before them; the arena may hold what another request left.
    """

    chunk: Chunk
    tokens: slice
    first: bool


@dataclass(frozen=True)
class Batch:
    """What a forward pass does.

    Attributes:
        arenas: of the requests that decode one token, their prompts being complete.
        rows: where these tokens lie in the batch: a slice if no others are between them.
        prompts: all others.
    """

    arenas: list[int]
    rows: Tensor | slice
    prompts: list[PromptPart]

    @classmethod
    def read(cls, batch: Any) -> Batch:
        """Off vLLM's description of a batch; waits for the device, where its block table lies."""
        bounds = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        lengths = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist()  # of prompts it is exact
        in_prompt = batch.is_prefilling[: batch.num_reqs].tolist()
        table = batch.block_table_tensor
        arenas = table[: batch.num_reqs, 0].tolist()
        decoding, rows, prompts = [], [], []
        for arena, start, stop, length, prompt in zip(arenas, bounds[:-1], bounds[1:], lengths, in_prompt, strict=True):
            if stop - start == 1 and not prompt:
                decoding.append(arena)
                rows.append(start)
            elif stop > start:
                chunk = Chunk.of(np.array([arena]), stop - start, ends_prompt=False)
                prompts.append(PromptPart(chunk, slice(start, stop), stop - start == length))
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            return cls(decoding, slice(rows[0], rows[-1] + 1), prompts)
        return cls(decoding, torch.tensor(rows, dtype=torch.long, device=table.device), prompts)


class StepBuilder(AttentionMetadataBuilder[Any]):
    """Hands vLLM's description of a batch on, unread: layers of unequal arenas have a builder each, one reads it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The description itself."""
        return common_attn_metadata


@dataclass
class Running:
    """What the layers of a process share.

    Attributes:
        cache: of all of them.
        metrics: of each layer.
        batch: the present one; the first layer reads it.
    """

    cache: RaggedCache
    metrics: Sequence[LayerMetrics]
    batch: Batch | None = None

    def begin(self, description: Any) -> None:
        """Before the first layer."""
        self.batch = batch = Batch.read(description)
        self.cache.free([int(prompt.chunk.rows[0]) for prompt in batch.prompts if prompt.first])
        self.cache.begin(batch.arenas, [prompt.chunk for prompt in batch.prompts])


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
        """Attend, remember, and where it is time forget."""
        if not kv_cache.numel():  # vLLM measures its own memory
            self.room = torch.empty(2, self.staged_tokens, *key.shape[1:], dtype=key.dtype, device=key.device)
            return output
        if self.running is None:
            self._open()
        if attn_metadata is None:  # it warms up
            return output
        assert self.running is not None
        cache = self.running.cache
        if self.index == 0:
            self.running.begin(attn_metadata)
        batch = self.running.batch
        assert batch is not None
        for prompt in batch.prompts:
            q, k, v = (x[prompt.tokens].transpose(0, 1)[None] for x in (query, key, value))
            output[prompt.tokens] = self._attend(prompt.chunk, q, k, v)[0].transpose(0, 1)
        if batch.arenas:
            q, k, v = (x[batch.rows][:, :, None] for x in (query, key, value))
            output[batch.rows] = cache.decode(self.index, q, k, v, self.scale)[:, :, 0]
        cache.end_layer(self.index)
        if self.index == cache.table.layers - 1:
            for metrics in self.running.metrics:
                metrics.update()
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

    def _open(self) -> None:
        """Make arenas of the memory that vLLM has bound to the layers: of all of them, by the first that is asked."""
        found = attentions(get_forward_context().no_compile_layers)
        memory = {number: attention.kv_cache for number, attention in found.items()}
        layouts = {number: self.served.layout(number, cache.dtype) for number, cache in memory.items()}
        cache = RaggedCache(self.served.compression, self.served.shape)
        cache.lend(memory, layouts)
        requests = len(memory[min(memory)]) - _RESERVED
        running = Running(cache, [LayerMetrics(cache, index, requests) for index in range(len(found))])
        for index, number in enumerate(sorted(found)):
            found[number].impl._take(running, index)
        _logger.info(
            "reasonalloc: %d requests fit at once, each %d tokens per head and layer on average",
            requests, self.served.compression.budget,
        )  # fmt: skip

    def _take(self, running: Running, index: int) -> None:
        self.room, self.running, self.index = None, running, index


def attentions(layers: Mapping[str, Any]) -> dict[int, Any]:
    """vLLM's attention layers that are served here, by their number."""
    return {
        layer_number(name): layer
        for name, layer in layers.items()
        if isinstance(getattr(layer, "impl", None), ArenaAttention)
    }


class ArenaBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

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
