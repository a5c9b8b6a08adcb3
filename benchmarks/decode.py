"""Decoding end to end: tokens a second and bytes of keys and values, against the full cache, over the context.

    python benchmarks/decode.py [--batch 8] [--budget 128] [--contexts 256 1024 4096 16384] [--repeats 3]

``full`` is transformers' own DynamicCache under stock sdpa, filled with random keys and values. A bounded cache holds
the same whatever the context, so it is filled once, and a measured block is one whole interval with its compression.
Blocks take turns, so that a change of the machine's speed meets all alike; ratios are per round, medians of rounds.
"""

import argparse
import statistics
from typing import Any

import torch
from common import full_cache, save, seconds_per_step, smollm2_shape

import reasonalloc as ra
from reasonalloc.engines.transformers.cache import kv_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full-steps", type=int, default=8, help="steps of one measured block of the full cache")
    parser.add_argument("--methods", nargs="+", default=["rkv", "reasonalloc"])
    options = parser.parse_args()
    model = smollm2_shape()
    ids = torch.randint(1, 49152, (options.batch, 1))
    bounded = {}
    for name in options.methods:
        compression = ra.Compression.method(name, options.budget, interval=options.interval)
        bounded[name] = ra.Cache(model.config, compression)
        seconds_per_step(model, bounded[name], torch.randint(1, 49152, (options.batch, options.budget + 64)), 1)
        seconds_per_step(model, bounded[name], ids, options.interval)  # warm up: compilation, allocator
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        full = full_cache(model, options.batch, context)
        held = {name: kv_bytes(cache) for name, cache in {"full": full, **bounded}.items()}
        seconds_per_step(model, full, ids, 2)
        times: dict[str, list[float]] = {"full": [], **{name: [] for name in bounded}}
        for _ in range(options.repeats):
            full.crop(context - full.get_seq_length())
            times["full"].append(seconds_per_step(model, full, ids, options.full_steps))
            for name, cache in bounded.items():
                times[name].append(seconds_per_step(model, cache, ids, options.interval))
        del full
        for name, found in times.items():
            ratios = [base / mine for base, mine in zip(times["full"], found, strict=True)]
            rows.append(
                {
                    "context": context,
                    "method": name,
                    "tokens_per_second": [round(options.batch / s, 2) for s in found],
                    "times_full": statistics.median(ratios),
                    "times_full_range": [min(ratios), max(ratios)],
                    "kv_bytes": held[name],
                }
            )
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"{context:6d}  {name:12s} {options.batch / statistics.median(found):8.1f} tokens/s   "
                f"{median:5.2f} x full ({low:.2f} to {high:.2f})   {held[name] / 1e6:8.1f} MB",
                flush=True,
            )
    save("decode", {"batch": options.batch, "budget": options.budget, "interval": options.interval, "rows": rows})


if __name__ == "__main__":
    main()
