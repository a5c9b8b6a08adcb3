"""The vLLM plugin with CUDA graphs of its decoding steps and without: answers, what was forgotten, tokens a second.

    PYTHONPATH=src python3 benchmarks/gpu_vllm.py

Serves the built-in reasoner in float32, 16 requests at once, each way in a process of its own. The last line is JSON:
figures as ``gpu.py`` reads them, and what the engines said. On a CPU, vLLM has no graphs and serves eagerly twice.
"""

import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / "src" / "reasonalloc" / "reasoner" / "model"
ASKED = {"method": "reasonalloc", "budget": 64, "interval": 32, "profile": str(MODEL / "demand_profile.json")}
REQUESTS, TOKENS = 16, 400
GRAPHS = {
    "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "graphs": {"compilation_config": GRAPHS}}
LEAST_EQUAL = 0.9  # of the answers: sums of padded steps differ in the last bit, and a near tie goes the other way


def serve(options: dict[str, Any]) -> dict[str, Any]:
    """In this process: answers, seconds without start and warm-up, and what was forgotten."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "REASONALLOC": json.dumps(ASKED)}
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    backend = {} if current_platform.is_cpu() else {"attention_backend": "CUSTOM", "gpu_memory_utilization": 0.3}
    llm = LLM(
        model=str(MODEL), dtype="float32", seed=0, max_model_len=1024, max_num_seqs=REQUESTS,
        num_gpu_blocks_override=REQUESTS + 1, enable_prefix_caching=False, disable_log_stats=True, **backend, **options,
    )  # fmt: skip
    choose = random.Random(0)
    words = llm.llm_engine.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [choose.randrange(20, words) for _ in range(choose.randint(8, 100))]}
        for _ in range(REQUESTS)
    ]
    short, long = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (40, TOKENS))
    llm.generate(prompts, short, use_tqdm=False)  # kernels are compiled
    before = llm.collective_rpc("reasonalloc_counters")[0]
    began = time.perf_counter()
    answers = llm.generate(prompts, long, use_tqdm=False)
    seconds = time.perf_counter() - began
    [after] = llm.collective_rpc("reasonalloc_counters")
    return {
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "seconds": seconds,
        "rounds": after["rounds"] - before["rounds"],
        "evicted_tokens": after["evicted_tokens"] - before["evicted_tokens"],
        "graphs": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        "device": current_platform.get_device_name() or current_platform.device_type,
    }


def in_a_process(way: str) -> dict[str, Any]:
    """What ``serve`` returns.

    Raises:
        SystemExit: the engine ended; the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, __file__, way], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not last[0].startswith("{"):
        print(done.stdout[-4000:])
        raise SystemExit(f"vLLM did not serve ({way}): {last[0][:300]}")
    return dict(json.loads(last[0]))


def figure(name: str, value: float, unit: str = "", least: float | None = None) -> dict[str, Any]:
    """As ``gpu.py`` reads it."""
    bar, met = ("", None) if least is None else (f">= {least:g}", value >= least)
    return {"figure": name, "value": float(f"{value:.5g}"), "unit": unit, "bar": bar, "met": met}


def main() -> None:
    if find_spec("vllm") is None:
        print(json.dumps({"note": "left out: vLLM is not installed"}))
        return
    found = {way: in_a_process(way) for way in WAYS}
    eager, graphs = found["eager"], found["graphs"]
    equal = sum(a == b for a, b in zip(eager["answers"], graphs["answers"], strict=True)) / REQUESTS
    same = (eager["rounds"], eager["evicted_tokens"]) == (graphs["rounds"], graphs["evicted_tokens"])
    speeds = {way: REQUESTS * TOKENS / result["seconds"] for way, result in found.items()}
    figures = [
        *(figure(f"vLLM, {way}", speed, "tokens/s") for way, speed in speeds.items()),
        figure("vLLM, graphs over eager", speeds["graphs"] / speeds["eager"], "x"),
        figure("vLLM, answers equal with graphs and without", equal, "", LEAST_EQUAL),
        figure("vLLM, rounds in which a layer forgot tokens", graphs["rounds"], "", 1),
        figure("vLLM, as much forgotten with graphs as without", float(same), "", 1),
    ]
    if "cpu" not in graphs["device"].lower():
        figures.append(figure("vLLM, full graphs of decoding steps", float("FULL" in graphs["graphs"]), "", 1))
    said = {way: {k: v for k, v in result.items() if k != "answers"} for way, result in found.items()}
    print(json.dumps({"figures": figures, "engines": said}))
    if any(x["met"] is False for x in figures):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(serve(WAYS[sys.argv[1]])), flush=True)
    else:
        main()
