"""The entry point (``vllm.general_plugins``), which vLLM calls in every one of its processes."""

from __future__ import annotations

import os
from typing import Any

from reasonalloc.engines.vllm.settings import VARIABLE, settings

_COPIED = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def register() -> None:
    """Put arenas in the place of vLLM's blocks, if REASONALLOC is set.

    Raises:
        ValueError: it is set to something wrong.
    """
    if settings() is None:
        return
    _carry_to_other_machines()
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.registry import register_backend
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from reasonalloc.engines.vllm.backend import ArenaBackend, slot

    register_backend(slot(), f"{ArenaBackend.__module__}.{ArenaBackend.__qualname__}")
    if not hasattr(Attention, "stock_kv_cache_spec"):  # vLLM may call this again
        Attention.stock_kv_cache_spec = Attention.get_kv_cache_spec
        Attention.get_kv_cache_spec = arena_spec
        GPUModelRunner.stock_update_states = GPUModelRunner._update_states
        GPUModelRunner._update_states = update_states


def _carry_to_other_machines() -> None:
    """vLLM gives its Ray workers the variables that this one lists."""
    copied = os.environ.get(_COPIED, "").split(",")
    if VARIABLE not in copied:
        os.environ[_COPIED] = ",".join([name for name in copied if name] + [VARIABLE])


def update_states(runner: Any, scheduler_output: Any) -> Any:
    """In the place of ``GPUModelRunner._update_states``, where a worker hears which requests have ended.

    Their arenas are emptied, and the memory of prompts that had not ended is let go of. A request that pauses is none
    of these. What arena a request has is noted when it gets it: one that was preempted has lost its arena, perhaps to
    another.
    """
    from reasonalloc.engines.vllm.backend import attentions

    owners: dict[int, str] = vars(runner).setdefault("arena_owners", {})
    arenas = [arena for arena, name in owners.items() if name in scheduler_output.finished_req_ids]
    for arena in arenas:
        del owners[arena]
    if arenas:
        for attention in attentions(runner.compilation_config.static_forward_context).values():
            if attention.impl.running is not None:
                attention.impl.running.cache.free(arenas)
                break
    done = runner.stock_update_states(scheduler_output)
    given = [request.req_id for request in scheduler_output.scheduled_new_reqs]
    for name in (*given, *scheduler_output.scheduled_cached_reqs.resumed_req_ids):
        owners.update({blocks[0]: name for blocks in runner.requests[name].block_ids if blocks})
    return done


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
