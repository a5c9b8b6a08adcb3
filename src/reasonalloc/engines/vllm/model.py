"""What the plugin knows of the model that vLLM serves, and what it cannot serve."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from reasonalloc.allocation import ModelShape
from reasonalloc.arenas import ArenaLayout
from reasonalloc.budgets import LayerBudgets
from reasonalloc.compression import Compression
from reasonalloc.engines.transformers.support import UnsupportedModelError, architecture, model_shape


@dataclass(frozen=True)
class ServedModel:
    """A compression for a model, as one tensor-parallel rank sees it.

    Attributes:
        compression: what was asked for.
        shape: of this rank's part.
        budgets: the layers' totals on this rank.
    """

    compression: Compression
    shape: ModelShape
    budgets: LayerBudgets

    @classmethod
    def of(cls, compression: Compression, vllm_config: Any) -> ServedModel:
        """Raises ``ValueError`` with one sentence where model, settings and arenas do not go together."""
        _refuse(vllm_config)
        config = vllm_config.model_config.hf_text_config
        whole = _shape(config)
        if compression.demand_profile is not None:
            compression.demand_profile.check(whole, architecture(config))
        shape = whole.split(vllm_config.parallel_config.tensor_parallel_size)
        return cls(compression, shape, LayerBudgets(compression, shape))

    def layout(self, layer: int, dtype: torch.dtype) -> ArenaLayout:
        """The arena of one layer."""
        return ArenaLayout.of(self.compression, self.shape, int(self.budgets.totals(layer, 1)[0]), dtype)


def layer_number(name: str) -> int:
    """7 for "model.layers.7.self_attn.attn"."""
    found = re.search(r"\.layers\.(\d+)\.", f".{name}")
    if found is None:
        raise UnsupportedModelError(f"cannot tell which layer {name!r} is: its name should contain layers.NUMBER")
    return int(found[1])


def _shape(config: Any) -> ModelShape:
    attention, config._attn_implementation = getattr(config, "_attn_implementation", None), None
    try:
        return model_shape(config)
    finally:
        config._attn_implementation = attention


def _refuse(vllm_config: Any) -> None:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    reasons = {
        "prefix caching is on: pass --no-enable-prefix-caching (an evicted prompt cannot be shared)": (
            cache.enable_prefix_caching
        ),
        f"the cache is {cache.cache_dtype}: leave --kv-cache-dtype at auto (arenas hold the model's own dtype)": (
            cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32")
        ),
        "speculative decoding is on: leave --speculative-config out (rejected tokens may have evicted others)": (
            vllm_config.speculative_config is not None
        ),
        "a KV connector is on: leave --kv-transfer-config out (it would move blocks of tokens, not arenas)": (
            vllm_config.kv_transfer_config is not None
        ),
        "decode context parallelism is on: it splits tokens over ranks, arenas are whole": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
        ),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise UnsupportedModelError("reasonalloc cannot serve here: " + "; ".join(found))


