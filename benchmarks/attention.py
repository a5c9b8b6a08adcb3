"""Decode attention over ragged spans: the backends, against a padded gather and against sdpa on equal heads.

    python benchmarks/attention.py [--budget 128] [--batch 8] [--dtype float32]
    python benchmarks/attention.py --shape llama-8b --device cuda --dtype bfloat16 --budget 1024 --batch 64 [--tunings]

One step attends in all layers of the shape, each with storage of its own, so that memory is really read.
On CUDA the whole step is one CUDA graph, as in a model's: launches cost nothing then.
Backends that this machine cannot run are left out, and named. --tunings: the Triton kernel's alternatives, too.
"equal heads, sdpa" is what a cache with equal budgets could do at best; the ragged ones hold as many tokens.
Attention reads every key and value once: its bytes per second stand against those of a large copy in the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from common import SHAPES, add_device, finish, save

from reasonalloc.cache.attention import AttentionBackend, choose_backend
from reasonalloc.cache.spans import Spans

INTERVAL = 128
COPIED = 1 << 28  # bytes, far more than any cache holds
EQUAL = "equal heads, sdpa"
BACKENDS = {"cpu": ("rows", "compiled"), "cuda": ("triton",)}
# Slots of a chunk, warps, stages, fused: see ``reasonalloc.kernels.decode_attention.Tuning``.
TUNINGS = [
    *((256, 2, 3, False), (256, 2, 3, True), (256, 4, 2, False), (256, 4, 2, True)),
    *((512, 2, 3, False), (512, 2, 3, True), (512, 4, 2, False), (512, 4, 2, True)),
]
Contender = Callable[[int], torch.Tensor]


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
    at = torch.arange(spans.longest, device=query.device)
    slots = (spans.starts_device[..., None] + at).clamp(max=len(spans.keys) - 1)
    keys, values = (x.index_select(0, slots.flatten()).view(*slots.shape, -1) for x in (spans.keys, spans.values))
    rows = query.view(*slots.shape[:2], -1, query.shape[-1])
    valid = at < spans.lengths_device[..., None]
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=valid[:, :, None], scale=scaling)


def with_backend(backend: AttentionBackend, query: torch.Tensor, layers: list[Spans], scaling: float) -> Contender:
    """A backend, with what it wants prepared."""
    slots = max(len(spans.keys) for spans in layers)
    table = backend.table(len(layers), layers[0].rows, layers[0].heads, slots, query.device)
    if table is not None:
        table.fill(capacities_of(layers))
        layers = [replace(spans, chunks=table.layer(i)) for i, spans in enumerate(layers)]
    return lambda i: backend.attend(query, layers[i], scaling)


def with_tunings(query: torch.Tensor, layers: list[Spans], scaling: float) -> dict[str, Contender]:
    """The Triton kernel, tuned otherwise."""
    from reasonalloc.kernels.chunks import ChunkTable
    from reasonalloc.kernels.decode_attention import attend, tuning_for

    spans, slots = layers[0].lengths_device.numel(), max(len(spans.keys) for spans in layers)
    chosen = tuning_for(spans, query.shape[-1], query.shape[-1], query.element_size())

    def tuned(chunk: int, warps: int, stages: int, fused: bool) -> Contender:
        tuning = replace(chosen, chunk=chunk, warps=warps, stages=stages, fused=fused)
        table = ChunkTable.of(capacities_of(layers), chunk, slots)

        def contend(i: int) -> torch.Tensor:
            own = layers[i]
            where = (own.keys, own.values, own.starts_device, own.lengths_device)
            return attend(query, *where, table.layer(i), tuning, scaling)

        return contend

    return {
        f"{chunk} slots, {warps} warps, {stages} stages{', fused' * fused}": tuned(chunk, warps, stages, fused)
        for chunk, warps, stages, fused in TUNINGS
    }


def capacities_of(layers: list[Spans]) -> torch.Tensor:
    """They lie one behind the other: ``[layers, rows, heads]``."""
    ends = [torch.cat([x.starts_device.flatten()[1:], x.starts_device.new_full((1,), len(x.keys))]) for x in layers]
    return torch.stack([end.view_as(x.starts_device) - x.starts_device for end, x in zip(ends, layers, strict=True)])


def in_graph(step: Callable[[], object]) -> Callable[[], object]:
    """The same as one CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tunings", action="store_true", help="the Triton kernel's alternatives, too (CUDA)")
    add_device(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, device, dtype = Shape(options.shape), torch.device(options.device), getattr(torch, options.dtype)
    query = torch.randn(options.batch, shape.heads * shape.group, 1, shape.dim, dtype=dtype, device=device)
    layers = [ragged_spans(shape, options.batch, options.budget, query) for _ in range(shape.layers)]
    live = options.budget + INTERVAL // 2
    equal = [query.new_empty(2, options.batch, shape.heads, live, shape.dim).normal_() for _ in range(shape.layers)]
    scaling = shape.dim**-0.5
    rows = query.view(options.batch, shape.heads, shape.group, shape.dim)
    contenders: dict[str, Contender] = {
        EQUAL: lambda i: F.scaled_dot_product_attention(rows, equal[i][0], equal[i][1], scale=scaling),
        "ragged, padded gather": lambda i: padded_gather(query, layers[i], scaling),
    }
    for name in BACKENDS[device.type]:
        try:
            backend = choose_backend(name, device, {dtype}, shape.dim)
            contender = with_backend(backend, query, layers, scaling)
            contender(0)
        except (ValueError, RuntimeError) as error:
            print(f"ragged, {name}: left out: {error}")
            continue
        contenders[f"ragged, {name}"] = contender
    if options.tunings:
        contenders |= with_tunings(query, layers, scaling)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tokens = {name: sum(int(spans.lengths_device.sum()) for spans in layers) for name in contenders}
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

    def step(contender: Contender) -> Callable[[], object]:
        return lambda: [contender(i) for i in range(shape.layers)]

    with torch.no_grad():
        steps = {name: step(contender) for name, contender in contenders.items()}
        if device.type == "cuda":
            steps = {name: in_graph(work) for name, work in steps.items()}
        for repeat in range(options.repeats + 1):
            copy = timed(lambda: target.copy_(source))
            found = {name: timed(work) for name, work in steps.items()}
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
            f"{name:32s} {1e3 * median:8.2f} ms/step   {median / base:5.2f} x equal heads   "
            f"{statistics.median(shares[name]):4.0%} of a copy's bytes per second"
        )
    results = {"seconds": seconds, "copy_gigabytes_per_second": [1e-9 * best for best in limit]}
    save(
        f"attention-{options.device}-{options.dtype}-{options.budget}" + "-tunings" * options.tunings,
        {**vars(options), **results, "share_of_copy": shares},
    )


if __name__ == "__main__":
    main()
