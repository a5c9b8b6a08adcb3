"""What the benchmarks share: a model in SmolLM2's shape, the machine's description, results as JSON."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import reasonalloc as ra
from reasonalloc.files import write_atomically

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


RESULTS = Path(__file__).parent / "results"
NARROW = {"hidden_size": 72, "intermediate_size": 64, "vocab_size": 1024}


def smollm2_shape(narrow: bool = False, **changes: Any) -> Any:
    """A random model in the shape of SmolLM2-135M: speed and bytes do not depend on the weights.

    With ``narrow`` only the cache has SmolLM2's shape, and the rest of the model costs next to nothing.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMOLLM2, **(NARROW if narrow else {}), **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("reasonalloc")
    return model


def full_cache(model: Any, batch: int, context: int) -> Any:
    """transformers' DynamicCache, filled with random keys and values."""
    config, cache = model.config, transformers.DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def seconds_per_step(model: Any, cache: Any, ids: torch.Tensor, steps: int) -> float:
    """Decode the same tokens so many times, each cache under the attention that it belongs to."""
    model.set_attn_implementation("reasonalloc" if isinstance(cache, ra.Cache) else "sdpa")
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            model(ids, past_key_values=cache)
    return (time.perf_counter() - began) / steps


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reasonalloc": ra.__version__,
    }


def in_own_processes(kinds: Sequence[str], **environment: str) -> dict[str, Any]:
    """This benchmark run once for each kind (``--only KIND``), in a process of its own; its last line is the result."""
    results = {}
    for kind in kinds:
        command = [sys.executable, *sys.argv, "--only", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        results[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, results[kind], flush=True)
    return results


def save(name: str, results: dict[str, Any]) -> None:
    """Write the results beside the benchmarks."""
    path = RESULTS / f"{name}.json"
    write_atomically(path, json.dumps({"machine": machine(), **results}, indent=1).encode())
    print(f"wrote {path}")
