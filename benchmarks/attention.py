"""Decode attention over ragged spans: the backends, against a padded gather and against sdpa on equal heads.

    python benchmarks/attention.py [--budget 128] [--batch 8] [--dtype float32]
    python benchmarks/attention.py --shape llama-8b --device cuda --dtype bfloat16 --budget 1024 --batch 64

One step attends in all layers of the shape, each with storage of its own, so that memory is really read.
Backends that this machine's torch cannot run are left out, and named.
"equal heads, sdpa" is what a cache with equal budgets could do at best; the ragged ones hold as many tokens.
Attention reads every key and value once: its bytes per second stand against those of a large copy in the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import SHAPES, add_device, finish, save

from reasonalloc.cache.attention import AttentionBackend, choose_backend
from reasonalloc.cache.spans import Spans

INTERVAL = 128
COPIED = 1 << 28  # bytes, far more than any cache holds
EQUAL = "equal heads, sdpa"
BACKENDS = {"cpu": ("rows", "compiled"), "cuda": ("varlen", "triton")}


class Shape:
    """What of a model decides the cost of its attention."""

    def __init__(self, name: str) -> None:
        config = SHAPES[name]
        self.layers, self.heads, self.dim = (
            config["num_hidden_layers"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        self.group = config["num_attention_heads"] // self.heads


def ragged_spans(shape: Shape, batch: int, budget: int, like: torch.Tensor) -> Spans:
    """A layer's storage in the middle of an interval: unequal heads, one behind the other."""
    share = np.random.default_rng(0).uniform(0.25, 2.0, (batch, shape.heads))
    budgets = (share / share.sum(1, keepdims=True) * budget * shape.heads).astype(np.int64)
    capacities = budgets + INTERVAL
    ends = capacities.cumsum().reshape(capacities.shape)
    keys, values = (like.new_empty(int(capacities.sum()), shape.dim).normal_() for _ in range(2))
    return Spans.of(keys, values, None, ends - capacities, budgets + INTERVAL // 2)


def padded_gather(query: torch.Tensor, spans: Spans, scaling: float) -> torch.Tensor:
    at = torch.arange(int(spans.lengths.max()), device=query.device)
    slots = (spans.starts_device[..., None] + at).clamp(max=len(spans.keys) - 1)
    keys, values = (x.index_select(0, slots.flatten()).view(*slots.shape, -1) for x in (spans.keys, spans.values))
    rows = query.view(*slots.shape[:2], -1, query.shape[-1])
    valid = at < spans.lengths_device[..., None]
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=valid[:, :, None], scale=scaling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    add_device(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, device, dtype = Shape(options.shape), torch.device(options.device), getattr(torch, options.dtype)
    query = torch.randn(options.batch, shape.heads * shape.group, 1, shape.dim, dtype=dtype, device=device)
    layers = [ragged_spans(shape, options.batch, options.budget, query) for _ in range(shape.layers)]
    live = options.budget + INTERVAL // 2
    equal = [query.new_empty(2, options.batch, shape.heads, live, shape.dim).normal_() for _ in range(shape.layers)]
    scaling = shape.dim**-0.5

    def with_backend(backend: AttentionBackend) -> Callable[[int], torch.Tensor]:
        return lambda i: backend.attend(query, layers[i], scaling)

    rows = query.view(options.batch, shape.heads, shape.group, shape.dim)
    contenders: dict[str, Callable[[int], torch.Tensor]] = {
        EQUAL: lambda i: F.scaled_dot_product_attention(rows, equal[i][0], equal[i][1], scale=scaling),
        "ragged, padded gather": lambda i: padded_gather(query, layers[i], scaling),
    }
    for name in BACKENDS[device.type]:
        try:
            backend = choose_backend(name, device, dtype, shape.dim, tracks_received=False)
            backend.attend(query, layers[0], scaling)
        except (ValueError, RuntimeError) as error:
            print(f"ragged, {name}: left out: {error}")
            continue
        contenders[f"ragged, {name}"] = with_backend(backend)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tokens = {name: sum(int(spans.lengths.sum()) for spans in layers) for name in contenders}
    tokens[EQUAL] = shape.layers * options.batch * shape.heads * live
    bytes_per_token = 2 * shape.dim * dtype.itemsize
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    copying: list[float] = []

    def timed(work: Callable[[], object]) -> float:
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        return time.perf_counter() - began

    with torch.no_grad():
        for repeat in range(options.repeats + 1):
            copy = timed(lambda: target.copy_(source))
            found = {
                name: timed(lambda attend=attend: [attend(i) for i in range(shape.layers)])  # type: ignore[misc]
                for name, attend in contenders.items()
            }
            if repeat:  # the first round warms up
                copying.append(copy)
                for name, spent in found.items():
                    seconds[name].append(spent)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians[EQUAL]
    shares: dict[str, list[float]] = {}
    limit = [2 * COPIED / s for s in copying]  # a copy reads and writes
    for name, median in medians.items():
        shares[name] = [
            tokens[name] * bytes_per_token / mine / best for mine, best in zip(seconds[name], limit, strict=True)
        ]
        print(
            f"{name:24s} {1e3 * median:8.2f} ms/step   {median / base:5.2f} x equal heads   "
            f"{statistics.median(shares[name]):4.0%} of a copy's bytes per second"
        )
    results = {"seconds": seconds, "copy_gigabytes_per_second": [1e-9 * best for best in limit]}
    save(
        f"attention-{options.device}-{options.dtype}-{options.budget}",
        {**vars(options), **results, "share_of_copy": shares},
    )


if __name__ == "__main__":
    main()
