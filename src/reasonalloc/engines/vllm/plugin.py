"""The entry point (``vllm.general_plugins``), which vLLM calls in every one of its processes."""

from __future__ import annotations

import os
from typing import Any

from reasonalloc.engines.vllm.settings import VARIABLE, settings

_COPIED = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
_NEWER_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's default on a GPU since 0.32; the plugin knows the other one


def register() -> None:
    """Put arenas in the place of vLLM's blocks, if REASONALLOC is set.

    Raises:
        ValueError: it is set to something wrong.
    """
    if settings() is None:
        return
    _carry_to_other_machines()
    os.environ.setdefault(_NEWER_RUNNER, "0")
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.registry import register_backend

    from reasonalloc.engines.vllm import runner
    from reasonalloc.engines.vllm.backend import ArenaBackend, slot

    register_backend(slot(), f"{ArenaBackend.__module__}.{ArenaBackend.__qualname__}")
    if not hasattr(Attention, "stock_kv_cache_spec"):  # vLLM may call this again
        Attention.stock_kv_cache_spec = Attention.get_kv_cache_spec
        Attention.get_kv_cache_spec = arena_spec
        runner.install()


def _carry_to_other_machines() -> None:
    """vLLM gives its Ray workers the variables that this one lists."""
    copied = os.environ.get(_COPIED, "").split(",")
    if VARIABLE not in copied:
        os.environ[_COPIED] = ",".join([name for name in copied if name] + [VARIABLE])


def arena_spec(attention: Any, vllm_config: Any) -> Any:
    """In the place of ``Attention.get_kv_cache_spec``: one block is one arena.

    Raises:
        UnsupportedModelError: the layer has no plain full attention or another backend, or the server is set to what
            arenas cannot do.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from reasonalloc.engines.models import UnsupportedModelError
    from reasonalloc.engines.vllm.backend import ArenaBackend
    from reasonalloc.engines.vllm.model import ServedModel, layer_number
    from reasonalloc.engines.vllm.spec import ArenaSpec

    if not issubclass(attention.attn_backend, ArenaBackend):
        raise UnsupportedModelError(
            f"vLLM chose the attention backend {attention.attn_backend.get_name()}, which knows no arenas: "
            f"pass --attention-backend {ArenaBackend.get_name()}"
        )
    stock = attention.stock_kv_cache_spec(vllm_config)
    if type(stock) is not FullAttentionSpec or stock.head_size != stock.head_size_v:
        raise UnsupportedModelError(
            f"reasonalloc cannot serve this model in vLLM: layer {attention.layer_name} has {type(stock).__name__} "
            f"with heads of {getattr(stock, 'head_size', '?')} and {getattr(stock, 'head_size_v', '?')} channels"
        )
    asked = settings()
    assert asked is not None
    layout = ServedModel.of(asked, vllm_config).layout(layer_number(attention.layer_name), stock.dtype)
    return ArenaSpec(
        block_size=vllm_config.model_config.max_model_len,
        num_kv_heads=stock.num_kv_heads,
        head_size=stock.head_size,
        dtype=stock.dtype,
        pairs=layout.rows // 2,
    )
