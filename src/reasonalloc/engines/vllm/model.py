"""What the plugin knows of the model that vLLM serves, and what it cannot serve."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.totals import LayerTotals, check_ranks
from reasonalloc.engines.models import UnsupportedModelError, architecture, model_shape
from reasonalloc.engines.vllm.settings import Settings
from reasonalloc.policies.allocation import HeadAllocator, ModelShape
from reasonalloc.policies.allocation.ranks import GatheredHeads
from reasonalloc.policies.compression import Compression


@dataclass(frozen=True)
class ServedModel:
    """A compression for a model, as one tensor-parallel rank sees it.

    Attributes:
        compression: what was asked for.
        shape: of this rank's part.
        totals: the layers' totals on this rank.
    """

    compression: Compression
    shape: ModelShape
    totals: LayerTotals

    @classmethod
    def of(cls, settings: Settings, vllm_config: Any) -> ServedModel:
        """Raises ``ValueError`` with one sentence where model, settings and arenas do not go together."""
        _refuse(vllm_config)
        compression, ranks = settings.compression, vllm_config.parallel_config.tensor_parallel_size
        config = vllm_config.model_config.hf_text_config
        whole = model_shape(config)
        compression.check_profile(whole, architecture(config))
        shape = whole.split(ranks)
        if ranks > 1:
            check_ranks(compression)
        if settings.routing == "global" and ranks > 1:
            compression = compression.replace(heads=_over_all_ranks(compression.head_allocator))
        return cls(compression, shape, LayerTotals(compression, shape))

    def layout(self, layer: int, dtype: torch.dtype) -> ArenaLayout:
        """The arena of one layer."""
        return ArenaLayout.of(self.compression, self.shape, self.totals.fixed(layer), dtype)


def _over_all_ranks(heads: HeadAllocator) -> GatheredHeads:
    from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather

    return GatheredHeads(heads, partial(tensor_model_parallel_all_gather, dim=0), get_tensor_model_parallel_rank())


def layer_number(name: str) -> int:
    """7 for "model.layers.7.self_attn.attn"."""
    found = re.search(r"\.layers\.(\d+)\.", f".{name}")
    if found is None:
        raise UnsupportedModelError(f"cannot tell which layer {name!r} is: its name should contain layers.NUMBER")
    return int(found[1])


def _refuse(vllm_config: Any) -> None:
    cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "prefix caching is on: pass --no-enable-prefix-caching (an evicted prompt cannot be shared)": (
            cache.enable_prefix_caching
        ),
        f"the cache is {cache.cache_dtype}: leave --kv-cache-dtype at auto (arenas hold the model's own dtype)": (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."))
        ),
        "speculative decoding is on: leave --speculative-config out (rejected tokens may have evicted others)": (
            vllm_config.speculative_config is not None
        ),
        "a KV connector is on: leave --kv-transfer-config out (it would move blocks of tokens, not arenas)": (
            vllm_config.kv_transfer_config is not None
        ),
        "batches are split: leave --enable-dbo and --ubatch-size out (a step is prepared once for all layers)": (
            parallel.use_ubatching
        ),
        "the V2 model runner is on: unset VLLM_USE_V2_MODEL_RUNNER (the plugin works with the V1 model runner)": (
            vllm_config.use_v2_model_runner
        ),
        "decode context parallelism is on: it splits tokens over ranks, arenas are whole": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
        ),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise UnsupportedModelError("reasonalloc cannot serve here: " + "; ".join(found))
