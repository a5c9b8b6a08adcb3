"""The attention backend: vLLM's batches, handed to arenas."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from reasonalloc.cache.arenas import ArenaLayer, ArenaLayers
from reasonalloc.engines.models import UnsupportedModelError
from reasonalloc.engines.vllm.metrics import LayerMetrics
from reasonalloc.engines.vllm.model import ServedModel, layer_number
from reasonalloc.engines.vllm.settings import settings

_RESERVED = 1  # block 0 is vLLM's null block, which no request gets
_logger = logging.getLogger("vllm.reasonalloc")  # below vLLM's own, so that it is shown as vLLM's are


@dataclass(frozen=True)
class Chunk:
    """Tokens of one request's prompt in a batch.

    Attributes:
        arena: the request's.
        tokens: where they lie in the batch.
        first: whether nothing came before them; the arena may hold what another request left.
    """

    arena: int
    tokens: slice
    first: bool


@dataclass(frozen=True)
class Step:
    """What a forward pass does.

    Attributes:
        arenas: of the requests that decode one token, their prompts being complete.
        rows: where these tokens lie in the batch: a slice if no others are between them.
        chunks: all others.
    """

    arenas: list[int]
    rows: Tensor | slice
    chunks: list[Chunk]

    @property
    def present(self) -> set[int]:
        """The arenas of all requests that take part."""
        return {*self.arenas, *(chunk.arena for chunk in self.chunks)}

    @classmethod
    def read(cls, batch: Any) -> Step:
        """Off vLLM's description of a batch; waits for the device, where its block table lies."""
        bounds = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        lengths = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist()  # of prompts it is exact
        in_prompt = batch.is_prefilling[: batch.num_reqs].tolist()
        table = batch.block_table_tensor
        arenas = table[: batch.num_reqs, 0].tolist()
        decoding, rows, chunks = [], [], []
        for arena, start, stop, length, prompt in zip(arenas, bounds[:-1], bounds[1:], lengths, in_prompt, strict=True):
            if stop - start == 1 and not prompt:
                decoding.append(arena)
                rows.append(start)
            elif stop > start:
                chunks.append(Chunk(arena, slice(start, stop), stop - start == length))
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            return cls(decoding, slice(rows[0], rows[-1] + 1), chunks)
        return cls(decoding, torch.tensor(rows, dtype=torch.long, device=table.device), chunks)


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
        arenas: of all of them.
        step: the present one; the first layer reads it.
    """

    arenas: ArenaLayers
    step: Step | None = None

    def begin_step(self, batch: Any) -> None:
        """Before the first layer."""
        self.step = Step.read(batch)
        self.arenas.begin_step(self.step.present, self.step.arenas)


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
        self.patience = config.parallel_config.pipeline_parallel_size
        self.running: Running | None = None
        self.arenas: ArenaLayer | None = None
        self.metrics: LayerMetrics | None = None

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
        if self.arenas is None:
            self._open()
        if attn_metadata is None:  # it warms up
            return output
        assert self.running is not None
        assert self.arenas is not None
        assert self.metrics is not None
        if self.arenas is self.running.arenas.layers[0]:
            self.running.begin_step(attn_metadata)
        step = self.running.step
        assert step is not None
        for chunk in step.chunks:
            q, k, v = (x[chunk.tokens].transpose(0, 1) for x in (query, key, value))
            output[chunk.tokens] = self.arenas.chunk(chunk.arena, q, k, v, self.scale, chunk.first).transpose(0, 1)
        if step.arenas:
            rows = step.rows
            output[rows] = self.arenas.decode(step.arenas, query[rows], key[rows], value[rows], self.scale)
        self.metrics.update()
        return output

    def _open(self) -> None:
        """Make arenas of the memory that vLLM has bound to the layers: of all of them, by the first that is asked."""
        found = {
            layer_number(name): attention
            for name, attention in get_forward_context().no_compile_layers.items()
            if isinstance(getattr(attention, "impl", None), ArenaAttention)
        }
        memory = {number: attention.kv_cache for number, attention in found.items()}
        layouts = {number: self.served.layout(number, cache.dtype) for number, cache in memory.items()}
        compression, budgets = self.served.compression, self.served.budgets
        running = Running(ArenaLayers(compression, budgets, memory, layouts, patience=self.patience))
        for arenas in running.arenas.layers:
            found[arenas.layer].impl._take(running, arenas, len(memory[arenas.layer]) - _RESERVED)

    def _take(self, running: Running, arenas: ArenaLayer, requests: int) -> None:
        self.room = None
        self.running, self.arenas = running, arenas
        self.metrics = LayerMetrics(arenas.layer, arenas.pool, requests)
        if arenas.layer == 0:
            _logger.info(
                "reasonalloc: %d requests fit at once, each %d tokens per head and layer on average",
                requests, self.served.compression.budget,
            )  # fmt: skip


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
