"""Requests in arenas that come, are cut into chunks, pause, decode, end, and are aborted at any time."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import reasonalloc as ra
from golden.access import Arenas, Part
from golden.rounds import Round, Watch
from reasonalloc.policies.allocation import ModelShape

SHAPE = ModelShape(layers=2, kv_heads=3, query_heads=6, head_dim=8)
ARENAS, STEPS = 4, 150
CUTS = ([1], [20], [90], [70, 9, 1], [1, 1], [13, 2, 30], [40, 40], [33, *[1] * 9])


@dataclass
class Request:
    """Chunks of the prompt still to come, then tokens still to decode."""

    chunks: list[int]
    left: int
    started: bool = False

    def __post_init__(self):
        self.watch, self.new = Watch(), 0


class _States:
    """Queries, keys and values from one seed, in float32 whatever the variant."""

    def __init__(self, variant, seed):
        self.variant = variant
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(7)

    def _draw(self, heads, count):
        drawn = torch.randn(heads, count, SHAPE.head_dim, generator=self.generator).to(self.variant.dtype)
        noise = torch.randn(drawn.shape, generator=self.noise, dtype=drawn.dtype)
        return drawn * (1 + self.variant.noise * noise)

    def of(self, count):
        heads = (SHAPE.query_heads, SHAPE.kv_heads, SHAPE.kv_heads)
        return [tuple(self._draw(n, count) for n in heads) for _ in range(SHAPE.layers)]


def arrivals(method, variant, seed) -> Iterator[Round]:
    """After every step in which a decoding request forgot something: what all decoding requests keep."""
    unequal = {"name": "random-split", "split_seed": 1}
    chosen = ra.Compression.method(method, 24, interval=8, window=4, layers=unequal)
    arenas = Arenas(chosen, SHAPE, ARENAS, variant.dtype, variant.attention)
    states, choose = _States(variant, seed), random.Random(seed)
    live: dict[int, Request] = {}
    last = None
    for step in range(1, STEPS + 1):
        for arena in range(ARENAS):
            if arena in live and choose.random() < 0.04:
                del live[arena]  # aborted, whatever it was doing; perhaps lent again at once
            if arena not in live and choose.random() < 0.4:
                live[arena] = Request(list(choose.choice(CUTS)), choose.randrange(5, 40))
        parts = [_part(arena, live[arena], states) for arena in live if choose.random() < 0.85]
        arenas.step(live, parts)
        decoding = [arena for arena, request in live.items() if request.started]
        kept = {arena: arenas.kept(arena) for arena in decoding}
        forgot = [_forgot(live[arena], kept[arena]) for arena in decoding]
        if decoding:
            last = Round(step, decoding, [[kept[arena][layer] for arena in decoding] for layer in range(SHAPE.layers)])
            if any(forgot):
                yield last
                last = None
        for arena in [arena for arena, request in live.items() if not request.left]:
            del live[arena]
    if last is not None:
        yield last


def _part(arena, request, states):
    if not request.chunks:
        request.started = True
        request.left -= 1
        request.new += 1
        return Part(arena, states.of(1), decoded=True)
    first, count = not request.new, request.chunks.pop(0)
    request.new += count
    return Part(arena, states.of(count), first=first, last=not request.chunks)


def _forgot(request, kept: list[list[np.ndarray]]):
    new, request.new = request.new, 0
    return request.watch.forgot([[heads] for heads in kept], [new])
