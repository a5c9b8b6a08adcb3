"""What the vLLM plugin costs a step, and what it gains in a fixed memory. Needs vLLM (`make test-vllm` installs it).

    .venv-vllm/bin/python benchmarks/serving.py [--requests 8] [--budget 256] [--rounds 5]

First as many requests for everyone, which come one by one as a server's do, so that compressions do not fall into one
step: the engines decode an interval each in turn, and ratios are taken within a turn. "whole" is the plugin with a
budget that nothing exceeds: what it costs by itself. Then the same memory for everyone, and more requests than fit.
Random weights in SmolLM2's shape, on one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from common import SHAPES, save

HERE = Path(__file__).parent
PROFILE = HERE.parent / "profiles" / "smollm2-135m.json"
STOCK = "stock"
WHOLE = "whole"
UNIFORM = "rkv"
SHAPE = SHAPES["smollm2-135m"]


class Worker:
    """A vLLM engine in a process of its own."""

    def __init__(self, asked: dict[str, Any] | None, options: dict[str, Any]) -> None:
        settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
        environment = {**os.environ, **settings}
        environment.pop("REASONALLOC", None)
        if asked is not None:
            environment["REASONALLOC"] = json.dumps(asked)
        job = json.dumps({"vocabulary": SHAPE["vocab_size"], "options": options})
        self.process = subprocess.Popen(
            [sys.executable, HERE / "serving_worker.py", job],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, do: str, **what: Any) -> dict[str, Any]:
        """Have a method of ``serving_worker.Engine`` called."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **what}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended (code {self.process.wait()}); what it said stands above")
        return dict(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def kinds(budget: int, interval: int, length: int) -> dict[str, dict[str, Any] | None]:
    """What the plugin is asked for."""
    return {
        STOCK: None,
        WHOLE: {"method": UNIFORM, "budget": length, "interval": interval},
        UNIFORM: {"method": UNIFORM, "budget": budget, "interval": interval},
        "reasonalloc-head": {"method": "reasonalloc-head", "budget": budget, "interval": interval},
        "reasonalloc": {"method": "reasonalloc", "budget": budget, "interval": interval, "profile": str(PROFILE)},
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def cost_of_a_step(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Seconds of a step for as many requests, engine by engine."""
    turns = options.rounds + 3  # one in which requests come, one to warm up, and spare steps
    length = options.prompt + turns * options.interval
    engine = {"model": model, "dtype": "float32", "max_model_len": length, "max_num_seqs": options.requests}
    room = {"kv_cache_memory_bytes": 2 * options.requests * length * bytes_per_token()}
    workers = {
        kind: Worker(asked, {**engine, **room})
        for kind, asked in kinds(options.budget, options.interval, length).items()
    }
    apart = options.interval // options.requests
    for kind, worker in workers.items():
        worker("fill", requests=options.requests, prompt=options.prompt, tokens=length - options.prompt, apart=apart)
        assert worker("steps", count=options.interval)["running"] == options.requests, kind
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in workers}
    for turn in range(options.rounds):
        for kind in workers if turn % 2 == 0 else reversed(workers):  # nobody is always first
            seconds[kind].append(workers[kind]("steps", count=options.interval)["seconds"])
        print(f"turn {turn + 1}: " + ", ".join(f"{k} {sum(s[-1]):.2f} s" for k, s in seconds.items()), flush=True)
    for worker in workers.values():
        worker.close()
    return {"length": length, "kinds": {kind: step_row(kind, seconds) for kind in seconds}}


def step_row(kind: str, seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """What one kind's steps took, against stock vLLM's and the uniform method's of the same turn."""
    mine = [sum(turn) for turn in seconds[kind]]
    ratios = {
        other: [a / sum(turn) for a, turn in zip(mine, seconds[other], strict=True)] for other in (STOCK, UNIFORM)
    }
    every = [step for turn in seconds[kind] for step in turn]
    median, slow = statistics.median(every), statistics.quantiles(every, n=100)[-1]
    print(
        f"{kind:17s} against stock {spread(ratios[STOCK])}, against {UNIFORM} {spread(ratios[UNIFORM])}; "
        f"a step {1e3 * median:.1f} ms, one in a hundred over {1e3 * slow:.1f} ms",
        flush=True,
    )
    return {"turns": mine, "median_step": median, "slow_step": slow, "ratios": ratios}


def gain_in_a_memory(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Seconds for more requests than fit into one memory."""
    length = options.prompt + options.answer
    engine = {"model": model, "dtype": "float32", "max_model_len": length, "max_num_seqs": options.many}
    rows = {}
    for kind, asked in kinds(options.small_budget, options.interval, length).items():
        if kind == WHOLE:
            continue
        worker = Worker(asked, {**engine, "kv_cache_memory_bytes": options.memory << 20})
        worker("answer", requests=1, prompt=options.prompt, tokens=options.interval + 1)  # warms up
        rows[kind] = worker("answer", requests=options.many, prompt=options.prompt, tokens=options.answer)
        worker.close()
        rate = options.many * options.answer / rows[kind]["seconds"]
        faster = rows[STOCK]["seconds"] / rows[kind]["seconds"]
        print(f"{kind:17s} {rows[kind]['running']:3d} at once, {rate:.1f} tokens/s, {faster:.2f} x stock", flush=True)
    return {"length": length, "kinds": rows}


def bytes_per_token() -> int:
    return int(SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 2 * SHAPE["head_dim"] * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"requests": 8, "budget": 256, "interval": 128, "prompt": 384, "rounds": 5,
               "many": 24, "answer": 640, "memory": 160, "small-budget": 64}  # fmt: skip
    helps = {"memory": "MiB for the cache", "many": "requests in one memory", "answer": "tokens of each of these",
             "small-budget": "for these"}  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=helps.get(name))
    options = parser.parse_args()
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as model:
        config.save_pretrained(model)
        results = {"step": cost_of_a_step(options, model)}
        save("serving", {**vars(options), **results})
        results["memory"] = gain_in_a_memory(options, model)
    save("serving", {**vars(options), **results})


if __name__ == "__main__":
    main()
