"""What the parts of ``make gpu`` share that time a model: its sizes, caches that are full, and a recorded step."""

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import LLAMA_8B, NARROW, SHAPES, finish, random_ids
from gpu_report import Clock, failure, note, one_line
from torch import Tensor

import reasonalloc as ra
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

GIB = 2**30
PIECE = 1 << 20  # slots that are filled at a time
ROOM = 3 * GIB  # for what a cell needs beside its caches: activations, logits, workspaces
SHAPES["tiny"] = {**LLAMA_8B, **NARROW, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "head_dim": 16}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape, device, dtype: of the model.
        budget, interval: of the caches.
        batches: the one that says most comes first.
        alone: the batch at which what costs least is measured, too.
        contexts: of the full cache, each with its batch.
        memory: bytes for the largest batch, which the full cache holds at the last of the contexts.
        rounds: that are measured of each kind.
        steps: that are measured in one piece.
    """

    shape: str = "llama-8b"
    device: str = "cuda"
    dtype: str = "bfloat16"
    budget: int = 1024
    interval: int = 128
    batches: tuple[int, ...] = (64, 256, 8, 1)
    alone: int = 64
    contexts: tuple[tuple[int, int], ...] = ((8, 2048), (8, 16384), (8, 32768), (24, 16384))
    memory: int = 48 * GIB
    rounds: int = 4
    steps: int = 24

    @property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


TINY = Sizes("tiny", "cpu", "float32", 24, 16, (2, 1), 2, ((2, 64), (3, 64)), 200_000, 1, 3)


def begin(description: str | None) -> tuple[Sizes, Clock]:
    """Read the command line: what to measure, and how long it may take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    return TINY if options.rehearse else Sizes(), Clock(options.seconds - 3)


# ---- cells: what may fail alone ----


def cell(name: str, work: Callable[[], None], clock: Clock, needed: int = 0) -> None:
    """Measure one thing. What fails, has no room or no time says so in one line, and leaves nothing behind.

    Args:
        name: of it.
        work: measures.
        clock: of the part.
        needed: bytes of its caches on the GPU.
    """
    if clock.left() < 2:
        note(f"{name}: left out, no time was left")
        return
    free()
    if needed and torch.cuda.is_available():
        room = torch.cuda.mem_get_info()[0]
        if needed + ROOM > room:
            note(f"{name}: left out, it needs {(needed + ROOM) / GIB:.1f} GiB, {room / GIB:.1f} are free")
            return
    try:
        work()
    except Exception as error:
        failure(f"{name}: {one_line(error)}")
    free()


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---- time ----


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Milliseconds that the device takes for it, and until the host is done. Nothing else is under way."""
    finish(device)
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return (1e3 * (time.perf_counter() - began),) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    first.record()
    work()
    last.record()
    host = time.perf_counter() - began
    last.synchronize()
    return first.elapsed_time(last), 1e3 * host


def repeated(work: Callable[[], None], times: int) -> Callable[[], None]:
    """As one piece of work."""

    def all_of_them() -> None:
        for _ in range(times):
            work()

    return all_of_them


# ---- a cache that is full ----


def bytes_per_token(config: Any, dtype: str) -> int:
    """Keys and values of one token, in all layers."""
    size: int = getattr(torch, dtype).itemsize
    return int(2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def filled(model: Any, method: str, batch: int, sizes: Sizes) -> ra.Cache:
    """A cache that has its budget of tokens, random ones; the next round comes after an interval.

    No prompt is run: a few random tokens open it, it counts the others, and all memory is filled at random.
    """
    cache = ra.Cache(model.config, ra.Compression.method(method, sizes.budget, interval=sizes.interval))
    ragged, config = cache.ragged, model.config
    few = min(sizes.budget, 16)
    chunk = Chunk.of(np.arange(batch), few)
    like: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    ragged.begin((), (chunk,), few)
    for layer in range(config.num_hidden_layers):
        query, key, value = (
            torch.randn(batch, heads, few, config.head_dim, **like)
            for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        )
        ragged.take(layer, chunk, query, key, value, config.head_dim**-0.5)
        ragged.end_layer(layer)
    count(ragged, sizes.budget - few)
    ragged.table.steps[:] = 0
    fill(ragged, "random")
    return cache


def count(ragged: RaggedCache, steps: int) -> None:
    """Decode so many tokens in name only: they are counted, and their slots stay as they are."""

    def step() -> None:
        assert ragged.step.decode is not None
        ragged.step.decode.advance()

    for _ in range(steps):
        ragged.replay(step, ragged.fixed_memory)


def count_to_a_round(ragged: RaggedCache) -> None:
    """So many that the next step makes all rows due."""
    count(ragged, int(ragged.compression.interval - 1 - ragged.table.steps.max()))


def fill(ragged: RaggedCache, kind: str) -> None:
    """Random keys, values and accumulated attention in all slots.

    Args:
        ragged: a cache.
        kind: of the keys. "random": none is like another. "walk": 98 % have a near duplicate among the newest 128 of
            their span: each lies around one of its span's eight centres, two of the same one have a cosine of 0.67.
    """
    for pool in ragged.pools:
        for values in pool.values.split(PIECE):
            values.normal_()
        if pool.received is not None:
            pool.received.uniform_()
        if kind == "random":
            for keys in pool.keys.split(PIECE):
                keys.normal_()
        else:
            _walk(pool.keys, torch.from_numpy(ragged.table.starts[pool.layers]).flatten())


def _walk(keys: Tensor, starts: Tensor, topics: int = 8, lonely: float = 0.02) -> None:
    device, dim = keys.device, keys.shape[1]
    starts = starts.to(device).sort().values
    centres = torch.randn(len(starts) * topics, dim, device=device)
    for first in range(0, len(keys), PIECE):
        own = keys[first : first + PIECE]
        slots = torch.arange(first, first + len(own), device=device)
        span = (torch.searchsorted(starts, slots, right=True) - 1).clamp_(min=0)
        which = span * topics + torch.randint(topics, span.shape, device=device)
        noise = torch.randn(len(own), dim, device=device)
        alike = centres.index_select(0, which).add_(noise, alpha=0.7)
        alone = torch.rand(len(own), 1, device=device) < lonely
        own.copy_(torch.where(alone, noise, alike))


# ---- a step ----


class Recorded:
    """A forward pass of one token of every row, recorded in one CUDA graph; on a CPU it is simply run again.

    Attributes:
        ids: ``[rows, 1]``, what comes next; a step leaves its own choice there.
        nbytes: that the graph keeps.
        live: how many of these are tensors.
    """

    def __init__(self, model: Any, cache: Any, batch: int, position: int) -> None:
        """
        Args:
            model: of transformers, with the attention that belongs to the cache.
            cache: ours, or one whose memory stays where it is.
            batch: rows.
            position: of the next token.
        """
        self._model, self._cache = model, cache
        self.ids = random_ids(model, batch)
        self._positions = torch.full_like(self.ids, position)
        # A mask of four dimensions is taken as it is: none is built, and nothing looks into the positions.
        self._mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=model.device)
        self._ragged: RaggedCache | None = cache.ragged if isinstance(cache, ra.Cache) else None
        self.nbytes = self.live = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._record()
        self._memory = () if self._ragged is None else self._ragged.fixed_memory

    def _record(self) -> None:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        with self._nothing_stays():  # what is made at the first run, kernels and workspaces, must be there
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self._forward()
            main.wait_stream(side)
        free()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with self._nothing_stays(), torch.cuda.graph(self._graph):
                self._forward()
        finally:
            torch.cuda.set_stream(main)  # a recording that fails leaves the other stream in use
        free()
        self.nbytes = torch.cuda.memory_reserved() - reserved
        self.live = torch.cuda.memory_allocated() - allocated

    def _nothing_stays(self) -> Any:
        return nullcontext() if self._ragged is None else self._ragged.recording()

    def _forward(self) -> None:
        out = self._model(
            self.ids, attention_mask=self._mask, position_ids=self._positions, logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        )  # fmt: skip
        self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        self._positions.add_(1)

    def replay(self) -> None:
        """The device's part of a step."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._forward()

    def step(self) -> None:
        """A step of our cache, and a round where rows are due."""
        assert self._ragged is not None
        self._ragged.replay(self.replay, self._memory)

    def milliseconds(self, times: int) -> tuple[float, float]:
        """Of a step without a round, on the device and on the host; afterwards our cache is as before.

        Args:
            times: so many steps in one piece. There is room for as many tokens.
        """
        with self._nothing_stays():
            timed(repeated(self.replay, min(2, times)), self.ids.device)
        with self._nothing_stays():
            device, host = timed(repeated(self.replay, times), self.ids.device)
        return device / times, host / times
