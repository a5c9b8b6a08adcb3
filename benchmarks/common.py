"""What the benchmarks share: random models of known shapes, the machine's description, results as JSON."""

import argparse
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


LLAMA_8B = {  # R1-Distill-Llama-8B's
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {"smollm2-135m": SMOLLM2, "llama-8b": LLAMA_8B}
RESULTS = Path(__file__).parent / "results"
NARROW = {"hidden_size": 72, "intermediate_size": 64, "vocab_size": 1024}


def add_device(parser: argparse.ArgumentParser) -> None:
    """Options: which shape, and where it runs."""
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)


def random_model(
    shape: str = "smollm2-135m", narrow: bool = False, device: str = "cpu", dtype: str = "float32", **changes: Any
) -> Any:
    """A random model of some model's shape: speed and bytes do not depend on the weights.

    With ``narrow`` only the cache has that shape, and the rest of the model costs next to nothing.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPES[shape], **(NARROW if narrow else {}), **changes})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.set_attn_implementation("reasonalloc")
    return model


def random_ids(model: Any, batch: int, tokens: int = 1) -> torch.Tensor:
    """Tokens for each sequence, where the model is."""
    return torch.randint(1, model.config.vocab_size, (batch, tokens), device=model.device)


def full_cache(model: Any, batch: int, context: int) -> Any:
    """transformers' DynamicCache, filled with random keys and values."""
    config, cache = model.config, transformers.DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(model: Any, cache: Any, ids: torch.Tensor, steps: int) -> float:
    """Decode the same tokens so many times, each cache under the attention that it belongs to.

    Of several tokens at once, a prompt, only the last one's logits are made: a prompt's would be gigabytes.
    """
    from reasonalloc.engines.transformers.names import (
        CACHE_ARGUMENT,  # here: benchmarks/versions.py runs this file with others
    )

    model.set_attn_implementation("reasonalloc" if isinstance(cache, ra.Cache) else "sdpa")
    finish(ids.device)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    finish(ids.device)
    return (time.perf_counter() - began) / steps


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
