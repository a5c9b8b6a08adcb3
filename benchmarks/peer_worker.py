"""One generation by one library, for peers.py; runs in an environment that need not have reasonalloc.

Prints one line of JSON: seconds of the whole generation, tokens, and the largest key and value bytes after any step;
with --watch-memory by how many bytes the process grew at most, the model's own doing included.
"""

import argparse
import inspect
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from resident import Peak, resident


def held(cache: Any) -> int:
    """Bytes of keys and values."""
    if hasattr(cache, "stats"):
        return int(cache.stats().kv_bytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def prepared(library: str, method: str, model: Any, budget: int, interval: int) -> tuple[Any, Any]:
    """A cache and a context in which to generate."""
    if library == "reasonalloc":
        import reasonalloc as ra

        model.set_attn_implementation("reasonalloc")
        return ra.Cache(model.config, ra.Compression.method(method, budget, interval=interval)), nullcontext()
    cache = transformers.DynamicCache(config=model.config)
    if method == "full":
        return cache, nullcontext()
    import kvpress

    base = {"snapkv": kvpress.SnapKVPress, "knorm": kvpress.KnormPress}[method]()
    press = kvpress.DecodingPress(base, compression_interval=interval, target_size=budget)
    return cache, press(model)


def generate(model: Any, options: argparse.Namespace, tokens: int) -> tuple[float, int]:
    """Seconds, and the largest bytes at any step."""
    cache, context = prepared(options.library, options.method, model, options.budget, options.interval)
    peak = 0

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        nonlocal peak
        peak = max(peak, held(cache))
        return torch.zeros(len(ids), dtype=torch.bool)

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids = torch.randint(1, model.config.vocab_size, (options.batch, options.prompt))
    with context, torch.no_grad():
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{name: cache},
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=("reasonalloc", "kvpress", "transformers"))
    parser.add_argument("method")
    parser.add_argument("--shape", required=True, help="settings of LlamaConfig (JSON)")
    for name in ("batch", "budget", "interval", "tokens", "prompt", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--watch-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**json.loads(options.shape))
    model = transformers.LlamaForCausalLM(config).eval()
    warm_up = min(options.tokens, options.budget + options.interval + 2)  # compiles, and compresses once
    generate(model, options, warm_up)
    growth = None
    if options.watch_memory:
        before = resident()
        with Peak() as watched:
            seconds, peak = generate(model, options, options.tokens)
        growth = watched.bytes - before
    else:
        seconds, peak = generate(model, options, options.tokens)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if options.library in sys.modules:
        from importlib.metadata import version

        versions[options.library] = version(options.library)
    found = {"seconds": seconds, "tokens": options.batch * options.tokens, "kv_bytes": peak, "peak_growth": growth}
    print(json.dumps({**found, **versions}))


if __name__ == "__main__":
    main()
