"""What stands in the place of some methods of vLLM's ``GPUModelRunner`` (which is the CPU's, too) and of its workers.

Each calls the method that it replaces, which ``install`` leaves under a name with ``stock_`` before it.
"""

from __future__ import annotations

from typing import Any

from reasonalloc.engines.vllm.running import Running, attentions, running

_LEAST_ARENAS = 2  # vLLM's null block, and one


def install() -> None:
    """Put them there."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    for new in (
        _update_states,
        _determine_batch_execution_and_padding,
        initialize_kv_cache,
        _cleanup_profiling_kv_cache,
    ):
        setattr(GPUModelRunner, f"stock_{new.__name__.strip('_')}", getattr(GPUModelRunner, new.__name__))
        setattr(GPUModelRunner, new.__name__, new)
    WorkerBase.reasonalloc_counters = reasonalloc_counters


def _serving(runner: Any) -> Running | None:
    return running(runner.compilation_config.static_forward_context)


def _update_states(runner: Any, scheduler_output: Any) -> Any:
    """Where a worker hears which requests have ended and which come next.

    Arenas of those that have ended or were preempted are emptied, and the memory of prompts that had not ended is let
    go of. A request that pauses is none of these. What arena a request has is noted when it gets it: one that was
    preempted has lost its arena, perhaps to another.
    """
    serving = _serving(runner)
    if serving is None:
        return runner.stock_update_states(scheduler_output)
    serving.free({*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())})
    serving.end()
    done = runner.stock_update_states(scheduler_output)
    given = [request.req_id for request in scheduler_output.scheduled_new_reqs]
    for name in (*given, *scheduler_output.scheduled_cached_reqs.resumed_req_ids):
        serving.owners.update({blocks[0]: name for blocks in runner.requests[name].block_ids if blocks})
    if scheduler_output.total_num_scheduled_tokens:
        serving.expect(runner.input_batch)
    return done


def _determine_batch_execution_and_padding(runner: Any, *given: Any, **asked: Any) -> Any:
    """Where vLLM chooses a graph. To it, one token is decoding, also where it is the last of a prompt."""
    serving = _serving(runner)
    if asked.get("max_num_scheduled_tokens") == 1 and serving is not None and serving.has_prompts:
        asked["force_eager"] = True
    return runner.stock_determine_batch_execution_and_padding(*given, **asked)


def initialize_kv_cache(runner: Any, kv_cache_config: Any, is_profiling: bool = False, **more: Any) -> Any:
    """To measure its graphs vLLM takes a block for every request of the largest one: little memory, were it not arenas.

    They are recorded with the null block alone.
    """
    if is_profiling:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

        cache = runner.vllm_config.cache_config
        asked, cache.num_gpu_blocks_override = cache.num_gpu_blocks_override, _LEAST_ARENAS
        try:
            groups = kv_cache_config.kv_cache_groups
            kv_cache_config = get_kv_cache_config_from_groups(runner.vllm_config, groups, available_memory=0)
        finally:
            cache.num_gpu_blocks_override = asked
    return runner.stock_initialize_kv_cache(kv_cache_config, is_profiling, **more)


def _cleanup_profiling_kv_cache(runner: Any) -> Any:
    """Where vLLM takes its memory back."""
    for layer in attentions(runner.compilation_config.static_forward_context).values():
        layer.impl.serve(None)
    return runner.stock_cleanup_profiling_kv_cache()


def reasonalloc_counters(worker: Any) -> dict[str, int]:
    """For ``LLM.collective_rpc("reasonalloc_counters")``: what a worker's layers have forgotten so far; it waits.

    Returns:
        "arenas": requests that fit at once; "rounds" in which a layer forgot tokens, and "evicted_tokens", over all
        heads: sums over this worker's layers.
    """
    serving = _serving(worker.model_runner)
    if serving is None or serving.cache.round is None:
        return {"arenas": 0, "rounds": 0, "evicted_tokens": 0}
    serving.end()
    serving.cache.table.land()
    done = serving.cache.round
    return {
        "arenas": serving.requests, "rounds": int(done.rounds.sum()), "evicted_tokens": int(done.evicted.sum())
    }  # fmt: skip
