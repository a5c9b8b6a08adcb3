"""Decoding end to end: tokens a second and bytes of keys and values, against the full cache, over the context.

    python benchmarks/decode.py [--batches 1 8] [--budget 128] [--contexts 256 1024 4096 16384 32768] [--repeats 3]
    python benchmarks/decode.py --shape llama-8b --device cuda --dtype bfloat16 --budget 1024 --memory 100 --room 16384

``full`` is transformers' own DynamicCache under stock sdpa, filled with random keys and values. A bounded cache holds
the same whatever the context, so it is filled once, and a measured block is one whole interval with its compression.
Blocks take turns, so that a change of the machine's speed meets all alike; ratios are per round, medians of rounds.
Then the full cache and the last of the methods each get the largest batch whose keys and values fit ``--memory`` GiB;
the full cache's must have room for ``--room`` tokens, whatever the context at which it is measured.
"""

import argparse
import statistics
from typing import Any

import torch
from common import add_device, full_cache, random_ids, random_model, save, seconds_per_step

import reasonalloc as ra
from reasonalloc.engines.transformers.cache import kv_bytes


class Bench:
    """A model, its bounded methods, and the rows found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, list[dict[str, Any]]()
        self.model = random_model(options.shape, device=options.device, dtype=options.dtype)

    def bounded(self, method: str, batch: int) -> ra.Cache:
        """A cache that is full and has been compressed once: as it stays, whatever the context."""
        budget, interval = self.options.budget, self.options.interval
        cache = ra.Cache(self.model.config, ra.Compression.method(method, budget, interval=interval))
        self.rate(cache, batch, 1, tokens=budget + 64)
        self.rate(cache, batch, interval)  # warm up: compilation, allocator
        return cache

    def rate(self, cache: Any, batch: int, steps: int, tokens: int = 1) -> float:
        """Sequences that take a step, per second."""
        return batch / seconds_per_step(self.model, cache, random_ids(self.model, batch, tokens), steps)

    def compare(self, context: int, full: Any, batch: int, others: dict[str, tuple[ra.Cache, int]], part: str) -> None:
        """Blocks of the full cache and of the others, each (cache, batch), in turn."""
        self.rate(full, batch, 2)
        rates: dict[str, list[float]] = {"full": [], **{name: [] for name in others}}
        for _ in range(self.options.repeats):
            full.crop(context - full.get_seq_length())
            rates["full"].append(self.rate(full, batch, self.options.full_steps))
            for name, (cache, own) in others.items():
                rates[name].append(self.rate(cache, own, self.options.interval))
        self.report(part, context, "full", batch, full, rates)
        for name, (cache, own) in others.items():
            self.report(part, context, name, own, cache, rates)

    def report(self, part: str, context: int, name: str, batch: int, cache: Any, rates: dict[str, list[float]]) -> None:
        """Add a row, and print it."""
        ratios = [mine / base for mine, base in zip(rates[name], rates["full"], strict=True)]
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        self.rows.append({"part": part, "context": context, "method": name, "batch": batch, "times_full": median,
                          "times_full_range": [low, high], "tokens_per_second": [round(x, 2) for x in rates[name]],
                          "kv_bytes": kv_bytes(cache)})  # fmt: skip
        print(
            f"{part:14s} {context:6d}  {name:12s} batch {batch:3d} {statistics.median(rates[name]):8.1f} tokens/s   "
            f"{median:6.2f} x full ({low:.2f} to {high:.2f})   {kv_bytes(cache) / 1e6:8.1f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full-steps", type=int, default=8, help="steps of one measured block of the full cache")
    parser.add_argument("--memory", type=float, default=0.5, help="GiB for the largest batch; 0: leave that part out")
    parser.add_argument("--room", type=int, default=0, help="tokens that a full cache must have room for")
    add_device(parser)
    parser.add_argument("--methods", nargs="+", default=["rkv", "reasonalloc"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    for batch in options.batches:
        others = {name: (bench.bounded(name, batch), batch) for name in options.methods}
        for context in options.contexts:
            bench.compare(context, full_cache(bench.model, batch, context), batch, others, f"batch {batch}")
    if options.memory:
        memory = int(options.memory * 2**30)
        token = kv_bytes(full_cache(bench.model, 1, 1))
        own = memory // (token * (options.budget + options.interval))
        others = {name: (bench.bounded(name, own), own) for name in options.methods[-1:]}
        for context in options.contexts:
            if batch := memory // (token * max(context, options.room)):
                bench.compare(context, full_cache(bench.model, batch, context), batch, others, "largest batch")
            else:
                print(f"largest batch  {context:6d}  full         none fits in {options.memory} GiB")
    save(f"decode-{options.device}", {**vars(options), "rows": bench.rows})


if __name__ == "__main__":
    main()
