"""Answers prompts with vLLM, in a process of its own: the plugin is on where REASONALLOC is set.

    python run_offline.py JOB.json RESULT.json

A job: {"model", "prompts": [token ids], "tokens", "options": of vllm.LLM, "watch": whether to report what is kept}.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, to look into it

from vllm import LLM, SamplingParams


def arenas(llm):
    """Every layer's arenas, if the plugin is on."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    found = {name: getattr(layer.impl, "arenas", None) for name, layer in layers.items() if hasattr(layer, "impl")}
    return {name: value for name, value in found.items() if value is not None}


def kept(llm):
    """Positions by request, layer and head."""
    requests = {}
    for layer in sorted(arenas(llm).values(), key=lambda found: found.layer):
        for arena, cache in layer.requests.items():
            tokens = cache.slab.padded()
            positions = [sorted(row[: int(n)].tolist()) for row, n in zip(tokens.positions[0], tokens.lengths[0])]
            requests.setdefault(arena, []).append(positions)
    return requests


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    began = time.perf_counter()
    llm = LLM(
        model=job["model"], dtype="float32", seed=0,
        **{"max_model_len": 1024, "enable_prefix_caching": False, **job.get("options", {})},
    )  # fmt: skip
    ready = time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": {"start": ready - began, "generate": time.perf_counter() - ready},
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "kept": kept(llm) if job.get("watch") else None,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
