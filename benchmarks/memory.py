"""Memory: ReasonAlloc's cache after a long generation against the full cache of the same text.

    python benchmarks/memory.py [--model FOLDER] [--tokens 4000] [--batch 8] [--budget 128]

Each cache lives in a process of its own. Bytes are read off the tensors, and confirmed by how much the process's
resident memory grew from before the first token to after the last, and to its peak in between (sampled every
millisecond). The formula is that of docs/speed.md.
"""

import argparse
import json
from typing import Any

import torch
import transformers
from common import in_own_processes, random_model, save
from resident import ENVIRONMENT, Peak, resident

import reasonalloc as ra
from reasonalloc.engines.transformers.cache import kv_bytes
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.policies.scoring import rkv


def formula(config: Any, compression: ra.Compression, batch: int) -> int:
    """docs/speed.md's bytes of a bounded float32 cache: slots of a key, a value and a position, and the last queries."""
    slots = config.num_key_value_heads * ((compression.budget or 0) + compression.interval)
    slot_bytes = 2 * 4 * config.head_dim + 4
    queries = compression.kept_window * config.num_attention_heads * config.head_dim * 4
    return int(batch * config.num_hidden_layers * (slots * slot_bytes + queries))


def in_a_round(longest: int, config: Any, batch: int) -> int:
    """docs/speed.md's bytes on top in a round, one layer to a pool on a CPU, when the longest head has so many tokens.

    R-KV scores a layer from a padded copy of its keys, slots and positions, with a block of similarities, one to
    compare them in, and twice the keys of the rows that such a block takes; the scores of the layers before it are
    held. Then the scores of all layers are split at once: they, side by side, sorted, and which of them reach the
    threshold, counted. Survivors move a layer at a time, keys and values in turn, which takes less.
    """
    layers, dim = int(config.num_hidden_layers), int(config.head_dim)
    padded = batch * int(config.num_key_value_heads) * longest  # tokens of a layer
    blocks = int(2 * 4 * rkv.block_entries(torch.device("cpu")) * (1 + dim / rkv.NEWEST))
    scoring = padded * (4 * dim + 8 + 8 + 4 * layers) + blocks
    splitting = padded * layers * (4 + 4 + 4 + 1 + 8)
    return max(scoring, splitting)


def longest_span(cache: ra.Cache) -> int:
    """Slots of the largest head."""
    return int(cache.ragged.table.capacities.max(initial=0))


def measure(kind: str, model_path: str, tokens: int, batch: int, budget: int) -> dict[str, Any]:
    if model_path:
        from reasonalloc.engines.transformers.loading import load

        model, _ = load(model_path, "float32", "cpu")
    else:
        model = random_model(narrow=True)
    vocabulary = model.config.vocab_size
    torch.manual_seed(1)
    ids = torch.randint(3, vocabulary, (batch, 1))
    # What any generation allocates once (buffers, compiled code) is not the cache's: a short one comes first.
    warm = ra.Cache(model.config, ra.Compression.method("reasonalloc", budget))
    with torch.no_grad():
        model(torch.randint(3, vocabulary, (batch, 500)), use_cache=False, logits_to_keep=1)
        for _ in range(budget + 2 * warm.compression.interval):
            model(ids, **{CACHE_ARGUMENT: warm})
    del warm
    before = resident()
    if kind == "full":
        cache: Any = transformers.DynamicCache(config=model.config)
        with torch.no_grad(), Peak() as peak:
            for _ in range(0, tokens, 500):
                model(torch.randint(3, vocabulary, (batch, 500)), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    else:
        cache, longest = ra.Cache(model.config, ra.Compression.method(kind, budget)), 0
        with torch.no_grad(), Peak() as peak:
            for _ in range(tokens):
                ids = model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)
                longest = max(longest, longest_span(cache))
    after = resident()
    result = {"tokens": cache.get_seq_length(), "kv_bytes": kv_bytes(cache), "resident_growth": after - before,
              "peak_growth": peak.bytes - before}  # fmt: skip
    if kind != "full":
        result["total_bytes"] = cache.stats().total_bytes
        result["formula"] = formula(model.config, cache.compression, batch)
        result["formula_peak"] = result["formula"] + in_a_round(longest, model.config, batch)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default="",
        help="folder, .gguf or hub id; default: a cache of SmolLM2's shape in a narrow random model",
    )
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.model, options.tokens, options.batch, options.budget)))
        return
    results = in_own_processes(("full", "reasonalloc"), **ENVIRONMENT)
    full, ours = results["full"], results["reasonalloc"]
    print(f"KV bytes: {ours['kv_bytes'] / full['kv_bytes']:.3%} of the full cache's")
    print(f"all bytes of the cache: {ours['total_bytes'] / full['kv_bytes']:.3%}")
    print(f"growth of resident memory: {ours['resident_growth'] / full['resident_growth']:.3%}")
    print(f"docs/speed.md's formula: {ours['formula'] / ours['total_bytes']:.2%} of what stats() says")
    print(f"growth of resident memory: {ours['resident_growth'] / ours['formula']:.2%} of the formula")
    print(f"at its peak: {ours['peak_growth'] / ours['formula_peak']:.2%} of the formula with a round")
    print(f"bound (budget + interval) / tokens: {(options.budget + 128) / options.tokens:.3%}, plus 2 %")
    save("memory", {"batch": options.batch, "budget": options.budget, "tokens": options.tokens, **results})


if __name__ == "__main__":
    main()
