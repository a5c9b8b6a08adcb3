"""Part of ``make gpu``: a decoding step and a round of Llama-8B's shape, by themselves.

A step is recorded in one CUDA graph, a round is what the step adds after which rows are due. Nothing waits for the
device in either, so the host's time, until the calls return, is given, too.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import random_ids, random_model
from gpu_model import (
    Recorded,
    Sizes,
    begin,
    bytes_per_token,
    cell,
    count,
    count_to_a_round,
    fill,
    filled,
    free,
    repeated,
    timed,
)
from gpu_report import Clock, figure

import reasonalloc as ra
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

STEP = {1: 7.4, 8: 8.1, 64: 10.7, 256: 19.7}  # milliseconds; 10 % more are allowed
ROUND = {"walk": 1.1, "random": 2.0}  # per cent of an interval's steps, from batch 64 on
ROUTING, NO_SIMILARITIES, MEMORY = 0.1, 0.6, 103.0  # per cent
LARGE = 64
ROUTED, PLAIN = "reasonalloc-head", "rkv"
KEYS = {"walk": "alike keys", "random": "random keys"}


@dataclass
class Bench:
    """The model, and what has been found of it.

    Attributes:
        model, sizes: which.
        weights: bytes that are in use without any cache.
        shares: of a round in an interval's steps, per cent, by (method, keys, batch).
        longest: tokens of the longest head in the last rounds.
    """

    model: Any
    sizes: Sizes
    weights: int
    shares: dict[tuple[str, str, int], float]
    longest: int = 0

    def batch(self, batch: int) -> None:
        """Steps and rounds with head routing, at one batch."""
        cache = filled(self.model, ROUTED, batch, self.sizes)
        if batch <= LARGE:
            self.eager(cache, batch)
        recorded = Recorded(self.model, cache, batch, self.sizes.budget)
        step = self.step(recorded, cache, batch)
        peaks = [self.rounds(recorded, cache, ROUTED, kind, batch, step) for kind in KEYS]
        if batch >= min(LARGE, max(self.sizes.batches)):
            self.memory(max(peaks), recorded, cache, batch)

    def eager(self, cache: ra.Cache, batch: int) -> None:
        """Steps that are not recorded."""
        ids, count_of = random_ids(self.model, batch), 3

        def step() -> None:
            self.model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache})

        timed(repeated(step, 2), ids.device)
        device, _ = timed(repeated(step, count_of), ids.device)
        figure(f"eager step, batch {batch}", device / count_of, "ms")

    def step(self, recorded: Recorded, cache: ra.Cache, batch: int) -> float:
        """Milliseconds of a recorded step in the middle of an interval."""
        ragged, times = cache.ragged, self.sizes.steps
        count(ragged, max(0, self.sizes.interval // 2 - times // 2 - int(ragged.table.steps.max())))
        device, host = recorded.milliseconds(times)
        bar = STEP.get(batch)
        figure(f"step, batch {batch}", device, "ms", at_most=None if bar is None else round(1.1 * bar, 2))
        figure(f"step, batch {batch}, host", host, "ms")
        return device

    def rounds(self, recorded: Recorded, cache: ra.Cache, method: str, kind: str, batch: int, step: float) -> int:
        """Rounds of one kind of keys. Bytes in use at their peak, without the weights."""
        ragged, where = cache.ragged, self.sizes.where
        on_device, on_host, peak = [], [], 0
        self.longest = 0
        for number in range(self.sizes.rounds + 1):
            count_to_a_round(ragged)
            fill(ragged, kind)
            last, _ = recorded.milliseconds(1)
            self.longest = max(self.longest, int(ragged.table.lengths.max()) + 1)
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            device, host = timed(recorded.step, where)
            if where.type == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated() - self.weights)
            if number:  # the first one compiles, and makes spans unequal
                on_device.append(device - last)
                on_host.append(host)
        round_ms = statistics.median(on_device)
        share = 100 * round_ms / (self.sizes.interval * step)
        self.shares[method, kind, batch] = share
        name = f"round, {method}, {KEYS[kind]}, batch {batch}"
        bar = None
        if batch >= LARGE and method == ROUTED:
            bar = ROUND[kind]
        elif batch >= LARGE and method != PLAIN:
            bar = NO_SIMILARITIES
        figure(name, round_ms, "ms")
        figure(f"{name}, of an interval", share, "%", at_most=bar)
        figure(f"{name}, host", statistics.median(on_host), "ms")
        return peak

    def other(self, method: str, kinds: tuple[str, ...], batch: int) -> None:
        """Rounds of another method, as shares of an interval of its own steps."""
        cache = filled(self.model, method, batch, self.sizes)
        recorded = Recorded(self.model, cache, batch, self.sizes.budget)
        step, _ = recorded.milliseconds(self.sizes.interval // 2)
        for kind in kinds:
            self.rounds(recorded, cache, method, kind, batch, step)
            if (ROUTED, kind, batch) in self.shares and method == PLAIN:
                more = self.shares[ROUTED, kind, batch] - self.shares[method, kind, batch]
                figure(
                    f"routing over R-KV, {KEYS[kind]}, batch {batch}, of an interval", more, "%",
                    at_most=ROUTING if batch >= LARGE and kind == "walk" else None,
                )  # fmt: skip

    def memory(self, peak: int, recorded: Recorded, cache: ra.Cache, batch: int) -> None:
        """The peak, a round and the graph included, against the formula."""
        if not peak:  # a CPU's is not known
            return
        want = formula(self.model.config, cache.compression, batch, self.model.dtype.itemsize)
        round_bytes = in_a_round(self.model.config, batch, self.longest)
        want += round_bytes + recorded.nbytes
        found = peak + recorded.nbytes - recorded.live
        figure(f"cache at its peak, batch {batch}", found / 2**30, "GiB")
        figure(f"of it the graph, batch {batch}", recorded.nbytes / 2**30, "GiB")
        figure(f"of the formula a round, batch {batch}", round_bytes / 2**30, "GiB")
        figure(f"peak of the formula, batch {batch}", 100 * found / want, "%", at_most=MEMORY)


def formula(config: Any, compression: ra.Compression, batch: int, size: int) -> int:
    """docs/speed.md's bytes of a bounded cache: slots of a key, a value and a position, and the last queries.

    Args:
        config: of the model.
        compression: of the cache.
        batch: sequences.
        size: bytes of a number.
    """
    slots = config.num_key_value_heads * ((compression.budget or 0) + compression.interval)
    slot_bytes = 2 * size * config.head_dim + 4
    queries = compression.kept_window * config.num_attention_heads * config.head_dim * size
    return int(batch * config.num_hidden_layers * (slots * slot_bytes + queries))


def in_a_round(config: Any, batch: int, longest: int) -> int:
    """Bytes on top in a round, where kernels read the keys where they lie, if the longest head has so many tokens.

    R-KV scores eight layers at a time: 36 bytes for each of their tokens, scores among them, beside 4 of the layers
    before. Then the scores of all layers are put side by side, twice, beside themselves: 12 bytes a token.
    """
    tokens, layers = batch * config.num_key_value_heads * longest, config.num_hidden_layers
    together = min(8, layers)
    return int(tokens * max(36 * together + 4 * (layers - together), 12 * layers))


def main() -> None:
    sizes, clock = begin(__doc__)
    model = random_model(sizes.shape, device=sizes.device, dtype=sizes.dtype)
    model(random_ids(model, 1), use_cache=False, logits_to_keep=1)
    free()
    weights = torch.cuda.memory_allocated() if sizes.where.type == "cuda" else 0
    bench = Bench(model, sizes, weights, {})
    measure(bench, clock)


def measure(bench: Bench, clock: Clock) -> None:
    """All cells, those that say most first."""
    sizes = bench.sizes
    slots = bytes_per_token(bench.model.config, sizes.dtype) * (sizes.budget + sizes.interval)
    both = tuple(KEYS)
    for batch in sizes.batches:
        needed = batch * slots * 11 // 10
        cell(f"step and round, batch {batch}", partial(bench.batch, batch), clock, needed)
        cell(f"round of R-KV, batch {batch}", partial(bench.other, PLAIN, both, batch), clock, needed)
        if batch == sizes.alone:
            for method in ("snapkv", "h2o"):
                work = partial(bench.other, method, ("random",), batch)
                cell(f"round of {method}, batch {batch}", work, clock, needed)


if __name__ == "__main__":
    main()
