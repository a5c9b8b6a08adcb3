"""Routing overhead: decoding with ReasonAlloc against R-KV with equal budgets, in one run, rounds interleaved.

    python benchmarks/overhead.py [--batch 8] [--budget 256] [--repeats 9]

Both decode the same tokens on the same model. A measured block is one whole interval, its compression included;
blocks of the methods alternate, so that a change of the machine's speed meets both alike. Ratios are per pair,
of the whole block and of its compression.
A round's stages are timed as well: score (with the padded copies of keys that a scorer asks for, and what dynamic
layers measure), route (budgets of heads and layers), select, move (the survivors, to where their new spans begin).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import random_ids, random_model, save, seconds_per_step

import reasonalloc as ra
from reasonalloc.cache import round as rounds
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

INTERVAL = 128
STAGES = ("all", "score", "route", "select", "move")
Clock = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default="rkv,reasonalloc-head,reasonalloc-dynamic")
    options = parser.parse_args()
    model = random_model()
    names = options.methods.split(",")
    prompt, ids = random_ids(model, options.batch, options.budget + 64), random_ids(model, options.batch)
    caches: dict[str, ra.Cache] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clock: Clock = dict.fromkeys(STAGES, 0.0)
    clocks: dict[str, list[Clock]] = {name: [] for name in names}
    time_stages(clock)
    for name in names:
        caches[name] = ra.Cache(model.config, ra.Compression.method(name, options.budget))
        with torch.no_grad():
            model(prompt, **{CACHE_ARGUMENT: caches[name]}, logits_to_keep=1)
        seconds_per_step(model, caches[name], ids, INTERVAL)  # warm up: compilation, allocator
    for repeat in range(options.repeats):
        for name in names if repeat % 2 else reversed(names):  # neither is always first
            clock.update(dict.fromkeys(STAGES, 0.0))
            seconds[name].append(INTERVAL * seconds_per_step(model, caches[name], ids, INTERVAL))
            clocks[name].append(dict(clock))
    base = names[0]
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        ratios = [mine / theirs - 1 for mine, theirs in zip(seconds[name], seconds[base], strict=True)]
        # What the compressions alone add, in the same pairs: the rest is how differently the steps between them ran.
        added = [
            (mine["all"] - theirs["all"]) / whole
            for mine, theirs, whole in zip(clocks[name], clocks[base], seconds[base], strict=True)
        ]
        spent = {stage: sum(of_block[stage] for of_block in clocks[name]) for stage in STAGES}
        share = spent["all"] / sum(seconds[name])
        entry: dict[str, Any] = {
            "ms_per_step": [round(1e3 * s / INTERVAL, 3) for s in seconds[name]],
            "overhead_median": statistics.median(ratios),
            "overhead_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "added_by_compressions": statistics.median(added),
            "added_quartiles": statistics.quantiles(added, n=4)[::2],
            "compression_share": share,
            "compression_ms_per_round": 1e3 * spent["all"] / options.repeats,
            "compression_us_per_token": 1e6 * spent["all"] / options.repeats / INTERVAL / options.batch,
            "stage_ms_per_round": {stage: 1e3 * spent[stage] / options.repeats for stage in STAGES[1:]},
        }
        methods[name] = entry
        low, high = entry["overhead_quartiles"]
        print(
            f"{name:22s} {1e3 * statistics.median(seconds[name]) / INTERVAL:8.2f} ms/step   over {base}: "
            f"{entry['overhead_median']:+.2%} (quartiles {low:+.2%} {high:+.2%}), "
            f"of which compressions {entry['added_by_compressions']:+.2%}   "
            f"all compression work {share:.2%}, {entry['compression_ms_per_round']:.1f} ms per round: "
            + ", ".join(f"{stage} {ms:.1f}" for stage, ms in entry["stage_ms_per_round"].items())
        )
    save("overhead", {"batch": options.batch, "budget": options.budget, "interval": INTERVAL, "methods": methods})


def timed(inner: Callable[..., Any], clock: Clock, stage: str) -> Callable[..., Any]:
    """``inner``, whose seconds are added to a stage's."""

    def run(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            clock[stage] += time.perf_counter() - began

    return run


def time_stages(clock: Clock) -> None:
    """Time what every round calls, and the round as a whole."""
    owners: list[tuple[Any, str, str]] = [
        (rounds.Round, "_score", "score"),
        (LayerTotals, "open_round", "route"),
        (LayerTotals, "report", "route"),
        (rounds, "route_heads", "route"),
        (rounds, "rank", "select"),
        (rounds, "select", "select"),
        (Pool, "rewrite", "move"),
        (LayerTotals, "open_round", "all"),
        (rounds.Round, "run", "all"),
    ]
    for owner, name, stage in owners:
        setattr(owner, name, timed(getattr(owner, name), clock, stage))


if __name__ == "__main__":
    main()
