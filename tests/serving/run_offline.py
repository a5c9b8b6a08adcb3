"""Answers prompts with vLLM, in a process of its own: the plugin is on where REASONALLOC is set.

    python run_offline.py JOB.json RESULT.json

A job: {"model", "prompts": [token ids], "tokens": how many to generate, one number or a list, "options": of vllm.LLM,
"abort": {number of a prompt: after how many tokens its client hangs up}, "watch": whether to report what is kept,
"backend": whether attention reads nothing on the host, "graphs": whether decoding steps are recorded, too}.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, to look into it

from vllm import LLM, SamplingParams


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def kept_by(worker):
    """Positions on one rank, by arena, layer and head."""
    from reasonalloc.engines.vllm.running import running

    serving = running(worker.model_runner.vllm_config.compilation_config.static_forward_context)
    serving.end()
    cache, requests = serving.cache, {}
    for layer in range(cache.table.layers):
        tokens = cache.tokens(layer)
        for arena in cache.table.seen.nonzero()[0].tolist():
            heads = zip(tokens.positions[arena], tokens.lengths[arena], strict=True)
            positions = [sorted(row[: int(n)].tolist()) for row, n in heads]
            requests.setdefault(arena, []).append(positions)
    return requests


def kept(llm):
    """Positions by arena, layer and head, the ranks' heads side by side."""
    ranks = llm.collective_rpc(kept_by)
    return {
        arena: [
            [head for heads in layer for head in heads] for layer in zip(*(rank[arena] for rank in ranks), strict=True)
        ]
        for arena in ranks[0]
    }


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def generate(llm, job):
    """All requests at once; what each generated, and how memory went."""
    engine, pool = llm.llm_engine, core_of(llm).scheduler.kv_cache_manager.block_pool
    lengths = job["tokens"] if isinstance(job["tokens"], list) else [job["tokens"]] * len(job["prompts"])
    abort = {int(number): after for number, after in job.get("abort", {}).items()}
    for i, (ids, count) in enumerate(zip(job["prompts"], lengths, strict=True)):
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.add_request(str(i), {"prompt_token_ids": ids}, sampling)
    tokens, free, memory, finished, running = [[] for _ in lengths], [pool.get_num_free_blocks()], [], 0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            number = int(output.request_id)
            tokens[number] = list(output.outputs[0].token_ids)
            if len(tokens[number]) >= abort.get(number, 1 << 60):
                engine.abort_request([output.request_id])
                abort.pop(number)
                finished += 1
            finished += output.finished
        free.append(pool.get_num_free_blocks())
        running = max(running, len(core_of(llm).scheduler.running))
        memory.append((finished, resident_bytes()))
    return {"tokens": tokens, "free": free, "memory": memory, "running": running}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("backend") or job.get("graphs"):
        import graphs_on_cpu

        graphs_on_cpu.use_device_backend()
    began = time.perf_counter()
    llm = LLM(
        model=job["model"], dtype="float32", seed=0,
        **{"max_model_len": 1024, "enable_prefix_caching": False, **job.get("options", {})},
    )  # fmt: skip
    if job.get("graphs"):
        llm.collective_rpc(graphs_on_cpu.record)
    ready = time.perf_counter()
    result, cache = generate(llm, job), llm.llm_engine.vllm_config.cache_config
    result |= {
        "seconds": {"start": ready - began, "generate": time.perf_counter() - ready},
        "blocks": cache.num_gpu_blocks,
        "slots": cache.num_gpu_blocks * cache.block_size,
        "step": llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
        "kept": kept(llm) if job.get("watch") else None,
        "replays": llm.collective_rpc(graphs_on_cpu.replays)[0] if job.get("graphs") else 0,
        "counters": llm.collective_rpc("reasonalloc_counters")[0] if os.environ.get("REASONALLOC") else None,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
