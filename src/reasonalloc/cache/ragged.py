"""The ragged cache of a model: its rows, its steps and its rounds. Knows no engine.

An engine calls, in every forward pass,

    begin      before the first layer: which rows decode one token, which bring a chunk
    decode     in each layer, for the rows that decode
    take       in each layer, for a chunk of rows that were empty: the engine itself attends, densely
    attend     in each layer, for any other chunk
    end_layer  at the end of each layer; after the last one the rows that are due are compressed

and says when rows come and go (``select``, ``free``) and when tokens are only speculated (``hold``, ``rollback``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.cache.arena import ArenaLayout, joined, neighbours
from reasonalloc.cache.attention import (
    AttentionBackend,
    check_backend,
    choose_backend,
)
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.prompt import Prompt
from reasonalloc.cache.queries import Queries
from reasonalloc.cache.recorder import Recorder
from reasonalloc.cache.round import PoolTokens, Round
from reasonalloc.cache.schedule import Probe, Schedule
from reasonalloc.cache.spans import Spans
from reasonalloc.cache.speculation import Speculation
from reasonalloc.cache.step import Chunk, Decode, Step
from reasonalloc.cache.table import DeviceTable, HostInts, Phase, Table
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.kernels import launch
from reasonalloc.policies.allocation import ModelShape
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.scoring.tokens import LayerTokens


class RaggedCache:
    """Keys and values of a model's layers, in ragged storage under one ``Compression``.

    Its memory is its own, made by the first tokens of a batch (all rows come at once, and leave by ``select``), or
    lent by an engine in equal arenas, one row each (``lend``).

    Attributes:
        compression, shape: as given.
        totals: the layers' totals; None keeps everything.
        table: the numbers of all rows; of a batch there are none before the first tokens.
        pools: the memory, in the order of the layers.
        round: carries out rounds; None keeps everything.
        step: the present forward pass, or the last one.
        columns: tokens that a batch has seen, padding and evicted ones included.
        prompt_columns: tokens of the text that the engine says is the prompt, where it knows; a first chunk may hold
            speculated tokens beside it.
    """

    def __init__(
        self,
        compression: Compression,
        shape: ModelShape,
        *,
        attention: str = "auto",
        layers_at_once: int | None = None,
        recorder: Recorder | None = None,
        probe: Probe | None = None,
    ) -> None:
        """
        Args:
            compression: what to keep.
            shape: of the model, or of this process's part of it.
            attention: backend for decoding, see ``attention``.
            layers_at_once: layers that share a pool, and so a move of a round and the memory of a prompt. None: one on
                a CPU, eight elsewhere; all of them for dynamic layers on CUDA, so that memory stays where it is.
            recorder: gets every routing.
            probe: watches a full cache.

        Raises:
            ValueError: there is no such backend.
        """
        check_backend(attention)
        self.compression, self.shape, self.recorder, self.probe = compression, shape, recorder, probe
        self._attention, self._at_once = attention, layers_at_once
        self.totals = None if compression.budget is None else LayerTotals(compression, shape)
        watched = probe is not None and probe.needs_received
        self._tracks_received = compression.tracks_received or watched
        self._window = compression.observed_queries if probe is None else probe.observed_queries
        self._start(Table(shape.layers, 0, shape.kv_heads), np.arange(shape.layers))

    def reset(self) -> None:
        """Forget everything, memory included; not for lent memory."""
        self.table.land()  # a recorder wants to know
        self._start(Table(self.shape.layers, 0, self.shape.kv_heads), np.arange(self.shape.layers))
        if self.totals is not None:
            self.totals.reset()

    def lend(self, memory: Mapping[int, Tensor], layouts: Mapping[int, ArenaLayout], most: int = 0) -> None:
        """Live in an engine's memory from now on: one row for each arena.

        Every arena has spans, of equal parts, before anything is in it: an engine that pads its steps to fixed sizes
        lets padding decode in an arena that is no request's.

        Args:
            memory: of every layer that this process runs, by the layer's number: ``[arenas, ...]``, contiguous. Layers
                whose memory lies one behind the other share pools.
            layouts: likewise; equally many heads.
            most: rows of a step at most, padding included; 0: as many as there are arenas.

        Raises:
            ValueError: the compression's memory has no bound, or the memory does not fit the layouts.
        """
        if self.compression.unbounded:
            raise ValueError(f"arenas have a fixed size: {self.compression.unbounded}")
        numbers = sorted(memory)
        table = Table(len(numbers), len(memory[numbers[0]]), self.shape.kv_heads)
        table.streams[:] = 0  # what a request draws must not depend on the arena that it got
        device, pools = DeviceTable(table, memory[numbers[0]].device), []
        for group in neighbours(numbers, memory, layouts, self._layers_at_once(memory[numbers[0]].device)):
            layers = [numbers.index(number) for number in group]
            pools.append(Pool.lent(table, device, layers, joined([memory[n] for n in group]), layouts[group[0]]))
        self._start(table, np.array(numbers), device, pools, most or table.rows)
        assert self.round is not None
        for pool in pools:
            pool.lay_out(self.round.first_capacities(pool.layers, self.rows))
        layout = layouts[numbers[0]]
        self._choose(memory[numbers[0]].device, {layout.dtype}, layout.dim)

    def _start(
        self,
        table: Table,
        numbers: HostInts,
        device: DeviceTable | None = None,
        pools: Sequence[Pool] = (),
        most: int | None = None,
    ) -> None:
        self.table, self._device = table, device
        self._keep_pools(list(pools))
        totals = self.totals
        if self.recorder is not None:
            self.recorder.follow(table.land, self.shape.layers, self.shape.kv_heads)
        self.round = None if totals is None else Round(self.compression, table, totals, numbers, self.recorder)
        self._schedule = Schedule(table, self.compression.interval, self.round, self.probe)
        self.step = Step(None, (), table.layers)
        self.backend: AttentionBackend | None = None
        self.columns = 0
        self.prompt_columns: int | None = None
        self.prompts: dict[int, Prompt] = {}  # by their first row
        self.holding = False
        self.is_recording = False
        self._speculation: Speculation | None = None
        self._decode: Decode | None = None
        self._most = most  # rows of a step in lent memory
        self._scaling = 1.0

    def __getstate__(self) -> dict[str, Any]:
        """A copy (copy.deepcopy, pickle) prepares its steps anew, and has no numbers under way."""
        self.table.land()
        return {**vars(self), "_decode": None, "step": Step(None, self.step.chunks, self.step.done)}

    def _keep_pools(self, pools: list[Pool]) -> None:
        self.pools = pools
        self._pool_of = [pool for pool in pools for _ in pool.layers]

    # ---- rows ----

    @property
    def rows(self) -> HostInts:
        """All rows of the table."""
        return np.arange(self.table.rows)

    def free(self, rows: Sequence[int]) -> None:
        """These requests have ended: their arenas are empty, and what of their prompts lies elsewhere is let go of."""
        if not len(rows):
            return
        index = np.asarray(rows, dtype=np.int64)
        self.table.clear(index)
        if self._device is not None:
            self._device.clear(index)
        for row in rows:
            self.prompts.pop(int(row), None)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder the rows of a batch (beams, several samples, finished rows).

        Raises:
            IndexError: there is no such row.
            ValueError: tokens are recorded, and rows are repeated.
        """
        if list(rows) == list(range(self.table.rows)):
            return
        wrong = [row for row in rows if not 0 <= row < self.table.rows]
        if wrong:
            raise IndexError(f"the cache holds {self.table.rows} sequences, there is no sequence {wrong[0]}")
        self.rollback(0)  # first: what it settles is of the rows as they were
        if self.recorder is not None:
            self.recorder.select(rows, self.table.rows)
        self.step.done -= 1  # until it is done, an interruption shows
        self._decode = self.step.decode = None  # it reads the old numbers, and holds the old memory
        self.table.select(rows)
        if self._device is not None:
            self._device.select(self.table)
        for pool in self.pools:
            pool.select(rows)
        for prompt in self.prompts.values():
            prompt.select(rows)
        if self.totals is not None:
            self.totals.select(rows)
        self.step.done += 1

    def _let_go(self) -> None:
        """The pools' memory may be replaced: what a step knows of it must not keep the old."""
        if self._decode is not None:
            self._decode.let_go()

    # ---- a forward pass ----

    def begin(self, decoding: Sequence[int] | HostInts, chunks: Sequence[Chunk] = (), columns: int = 1) -> Step:
        """Before the first layer of a pass.

        Args:
            decoding: rows that decode one token. Their prompts have ended.
            chunks: what other rows bring.
            columns: tokens that the pass adds to a batch, padding included.

        Raises:
            RuntimeError: the last pass was broken off between two layers, and the layers do not agree any more.
        """
        if self.step.done < self.table.layers and self.table.rows:
            raise RuntimeError(
                f"the last forward pass ended after {self.step.done} of {self.table.layers} layers: it was "
                "interrupted, or the cache was made for another model; reset() the cache, or make a new one"
            )
        if self._speculation is not None:  # nobody rolled back: the speculation is over
            self.rollback(0)
            self.holding = False
        self.step = Step(None, chunks)  # from here on an interruption shows
        index = np.asarray(decoding, dtype=np.int64)
        if len(index):
            self.end_prompts([row for row in index.tolist() if row in self.prompts])
        if chunks and not len(index):
            self._let_go()
        for chunk in chunks:
            self._begin_chunk(chunk)
        self.columns += columns
        if len(index):
            self.step.decode = self._prepare(index)
        return self.step

    def decode(
        self,
        layer: int,
        query: Float[Tensor, "rows query_heads 1 dim"],
        key: Float[Tensor, "rows heads 1 dim"],
        value: Float[Tensor, "rows heads 1 value_dim"],
        scaling: float,
    ) -> Float[Tensor, "rows query_heads 1 value_dim"]:
        """Append the token of each row that decodes, and attend to all that is cached of it."""
        self._scaling = scaling
        assert self.step.decode is not None
        if self.is_recording and not layer:  # ``begin`` has not
            self.step.decode.advance()
        return self.step.decode.layer(layer, query, key, value, scaling)

    def is_new(self, chunk: Chunk) -> bool:
        """Whether these are their rows' first tokens, so that the engine attends by itself and calls ``take``."""
        prompt = self._prompt(chunk)
        return prompt is not None and bool((prompt.counts == chunk.counts).all())

    def take(
        self,
        layer: int,
        chunk: Chunk,
        query: Float[Tensor, "rows query_heads queries dim"],
        key: Float[Tensor, "rows heads queries dim"],
        value: Float[Tensor, "rows heads queries value_dim"],
        scaling: float,
    ) -> None:
        """Take in a chunk of rows that were empty.

        Unless it is held or goes on, it is compressed as soon as the last layer of its pool has it: at no time does
        more than a pool's prompt lie beside its compressed form.
        """
        self._scaling = scaling
        if not self.pools:
            self._open(query, key, value)
        self.prompts[int(chunk.rows[0])].add(self._pool_of[layer], layer, key, value, chunk)
        self._watch(layer, chunk, Queries(query, chunk.real))

    def attend(
        self,
        layer: int,
        chunk: Chunk,
        query: Float[Tensor, "rows query_heads queries dim"],
        key: Float[Tensor, "rows heads queries dim"],
        value: Float[Tensor, "rows heads queries value_dim"],
        scaling: float,
    ) -> Float[Tensor, "rows query_heads queries value_dim"]:
        """Append a chunk to what is cached of its rows, and attend to all of it, causally."""
        self._scaling = scaling
        prompt = self._prompt(chunk)
        if prompt is not None:
            prompt.add(self._pool_of[layer], layer, key, value, chunk)
            spans = prompt.spans(self._pool_of[layer], layer)
        else:
            self._extend(layer, chunk, key, value)
            spans = self._spans(layer, chunk.rows)
        assert self.backend is not None
        out = self.backend.attend_chunk(query, spans, scaling, chunk.hidden(query.device))
        self._watch(layer, chunk, Queries(query, chunk.real))
        return out

    def end_layer(self, layer: int) -> None:
        """A layer has run. At the end of a pool its chunks are compressed, at the end of the pass the rows due."""
        if self.step.chunks and layer == self._pool_of[layer].layers[-1] and not self.holding:
            for chunk in self.step.chunks:
                if chunk.ends_prompt and self._settles(chunk):
                    self._compress(self._pool_of[layer], chunk.rows)
        if self.step.done + 1 == self.table.layers and not self.is_recording:
            self._end_step()
        self.step.done += 1  # last: what was interrupted here is not done

    def end_prompts(self, rows: Sequence[int]) -> None:
        """All of these rows' prompts was taken in: compress them, and bring what stays into the pools."""
        for row in rows:
            prompt = self.prompts[row]
            for pool in self.pools:
                self._compress(pool, prompt.rows)
            self._settle(prompt.rows)

    # ---- a step that is recorded once, and replayed ----

    @property
    def can_record(self) -> str:
        """Why a decoding step of all rows cannot be recorded in a CUDA graph; "" if it can."""
        if not self.pools or self.backend is None:
            return "nothing is cached yet"
        device = self.pools[0].keys.device.type
        if device != "cuda":
            return f"the device is a {device.upper()}"
        if self.backend.reads_host:
            return f"the attention backend {self.backend.name!r} reads numbers on the host"
        if self.holding:
            return "tokens are held back until they are accepted"
        return ""

    @property
    def fixed_memory(self) -> tuple[int, ...]:
        """Addresses of all memory that a recorded step reads and writes. Another value: it must be recorded anew.

        Makes everything ready for the next step: prompts end, a full cache gets room.
        """
        return self._ready().fixed()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For one forward pass of one token for all rows: what a step does on the device, and nothing on the host.

        A CUDA graph records it; a trial run before may be in it, too, if only one of the passes is carried out. At the
        end all numbers on the device are as before.
        """
        changed = self._ready().changed()
        saved = [tensor.clone() for tensor in changed]
        try:
            with self._device_alone():
                yield
        finally:
            for tensor, old in zip(changed, saved, strict=True):
                tensor.copy_(old)
            self.step.done = self.table.layers

    def replay(self, step: Callable[[], None], memory: tuple[int, ...]) -> None:
        """One decoding step of all rows as it was recorded: the host counts it, and rows that are due are compressed.

        Args:
            step: does the device's part.
            memory: ``fixed_memory`` when it was recorded.

        Raises:
            RuntimeError: the memory is not there any more.
        """
        if self.fixed_memory != memory:
            raise RuntimeError("the cache's memory has moved since the step was recorded")
        decode = self._decode
        assert decode is not None  # the memory was asked for, which makes the step ready
        self.table.phases[decode.rows] = Phase.DECODING
        self.step = Step(None)  # until it is done an interruption shows
        decode.count()
        with self._device_alone():
            step()
        self.columns += 1
        self._after_steps(decode.rows)
        self.step.done = self.table.layers

    def end_replayed(self) -> None:
        """The last pass ran where the host did not see its layers (an engine's graph): the rows due are compressed.

        To be called before ``begin`` of the next pass; nothing happens where the host has seen the layers.
        """
        if not self.step.done:
            self._end_step()
            self.step.done = self.table.layers

    @contextmanager
    def _device_alone(self) -> Iterator[None]:
        """In here a pass is a step of all rows, of which the host counts nothing."""
        self.is_recording, self.step = True, Step(self._decode)
        try:
            yield
        finally:
            self.is_recording, self.step = False, Step(None)

    def _ready(self) -> Decode:
        """The next step of all rows."""
        self.end_prompts(list(self.prompts))
        self._make_room_for_a_step()
        return self._prepared(self.rows)

    # ---- speculation ----

    def hold(self) -> None:
        """From now on the tokens of each pass are speculative: observe and compress after ``rollback``."""
        self.holding = True

    def rollback(self, columns: int) -> None:
        """Forget the newest ``columns`` tokens and settle what was postponed for the others.

        Raises:
            ValueError: more tokens than the last pass added (older ones may be evicted), or than SPECULATED.
        """
        if self._speculation is None:
            if columns:
                raise ValueError(f"cannot roll back {columns} tokens of a compressed cache, only the last 0")
            return
        chunk, queries = self._speculation.without_last(columns)
        self._speculation = None
        self.step.done -= 1  # until it is settled, an interruption shows
        rows, prompt = chunk.rows, self._prompt(chunk)
        self.table.seen[rows] -= columns
        self.table.pushed[rows] -= columns
        self._count_pushed()
        self.columns -= columns
        if prompt is not None:
            prompt.counts = prompt.counts - columns
        else:
            for pool in self.pools:
                pool.truncate(rows, columns)
        for layer, of_layer in enumerate(queries):
            self._observe(layer, chunk, of_layer)
        if prompt is not None:
            known = self.prompt_columns
            self._keep_prompt(rows, chunk.counts if known is None else np.minimum(chunk.counts, known))
            for pool in self.pools:
                self._compress(pool, rows)
            self._settle(rows)
            self.table.steps[rows] = 0
        else:
            self.table.steps[rows] += chunk.columns
            self._after_steps(rows)
        self.table.phases[rows] = Phase.DECODING
        self.step.done += 1

    # ---- what a scorer or a test sees ----

    def tokens(self, layer: int) -> LayerTokens:
        """What a layer holds of all rows, padded: a copy where keys or values are asked for."""
        pool = self._pool_of[layer]
        local = pool.local(layer)
        return PoolTokens(pool, self.rows).tokens(local, local + 1)

    def flush(self) -> None:
        """Show the probe what was decoded since the last interval ended."""
        if self.probe is not None and self.table.rows and self.table.steps[0]:
            for pool in self.pools:
                self._schedule.show(pool, self._scaling)
            self.table.steps[:] = 0

    # ---- taking tokens in ----

    def _layers_at_once(self, device: torch.device) -> int:
        if self._at_once is not None:
            return self._at_once
        if self.totals is not None and self.totals.dynamic is not None and launch.serve(device):
            return self.shape.layers  # what one layer loses another gets: in one pool that is a move in place
        return 1 if device.type == "cpu" or self.totals is None else 8

    def _open(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Make the pools of a batch: nothing is known of it before its first tokens."""
        self._choose(key.device, {key.dtype, value.dtype}, max(key.shape[-1], value.shape[-1]))
        if self.recorder is not None:
            self.recorder.entry_bytes = sum(x.shape[-1] * x.element_size() for x in (key, value))
        size, layers = self._layers_at_once(key.device), self.table.layers
        groups = [range(first, min(first + size, layers)) for first in range(0, layers, size)]
        like = (key, value, self._window, query.shape[1], self._tracks_received)
        self._device = device = DeviceTable(self.table, key.device)
        self._keep_pools([Pool.owned(self.table, device, group, *like) for group in groups])
        self._count_pushed()

    def _choose(self, device: torch.device, dtypes: set[torch.dtype], dim: int) -> None:
        self.backend = choose_backend(self._attention, device, dtypes, dim)

    def _begin_chunk(self, chunk: Chunk) -> None:
        rows = chunk.rows
        if not self.table.rows:  # of a batch, all rows come with the first chunk
            self.table.open(self.table.layers, len(rows), self.table.heads)
        if (self.table.phases[rows] == Phase.EMPTY).all():
            self.prompts[int(rows[0])] = Prompt(rows, self._tracks_received)
            self.table.phases[rows] = Phase.PROMPT
        prompt = self.prompts.get(int(rows[0]))
        if prompt is not None:
            prompt.counts = prompt.counts + chunk.counts
        self.table.seen[rows] += chunk.counts
        self.table.pushed[rows] += chunk.counts
        self._count_pushed()
        if self._in_prompt(rows) and not self.holding and (chunk.columns > 1 or prompt is not None):
            self._keep_prompt(rows, self.table.prompt[rows] + chunk.counts)

    def _in_prompt(self, rows: HostInts) -> bool:
        return bool((self.table.phases[rows] != Phase.DECODING).all())

    def _keep_prompt(self, rows: HostInts, tokens: HostInts) -> None:
        """So many leading tokens of these rows are a prompt's."""
        self.table.prompt[rows] = tokens
        if self.compression.prompt == "protect":
            self.table.protected[rows] = tokens
        self.table.pinned[rows] = np.minimum(tokens, self.compression.most_pinned)

    def _prepare(self, rows: HostInts) -> Decode:
        self._make_room_for_a_step()
        decode = self._prepared(rows)
        self.table.phases[rows] = Phase.DECODING
        decode.count()
        decode.advance()
        return decode

    def _make_room_for_a_step(self) -> None:
        """In a full cache; under a budget a round makes it."""
        if self.totals is None and (self.table.lengths >= self.table.capacities).any():
            self._let_go()
            for pool in self.pools:
                self._make_room(pool, np.ones(1, dtype=np.int64))

    def _prepared(self, rows: HostInts) -> Decode:
        """The step of these rows, without having counted their tokens."""
        if self._decode is None:
            assert self.backend is not None
            assert self._device is not None
            grows = self.totals is not None and self.totals.dynamic is not None
            self._decode = Decode(self.table, self._device, self.pools, self.backend, self._most, grows)
        self._decode.prepare(rows)
        return self._decode

    def _count_pushed(self) -> None:
        """Chunks of queries were counted on the host, or taken back."""
        if self._device is not None:
            self._device.count(self.table.pushed)

    def _prompt(self, chunk: Chunk) -> Prompt | None:
        """The prompt that a chunk belongs to, while it lies beside the pools."""
        return self.prompts.get(int(chunk.rows[0]))

    def _spans(self, layer: int, rows: HostInts) -> Spans:
        pool, device = self._pool_of[layer], self._device
        assert device is not None
        local, one = pool.local(layer), slice(layer, layer + 1)
        starts, lengths = (device.read(name, one, rows)[0] for name in ("starts", "lengths"))
        places = pool.of_layers(local, local + 1).places_of(rows)[0]
        longest = int(self.table.lengths_of(np.array([layer]), rows).max(initial=0))
        return Spans(pool.keys, pool.values, pool.received, starts, lengths, places, longest)

    def _extend(self, layer: int, chunk: Chunk, key: Tensor, value: Tensor) -> None:
        pool = self._pool_of[layer]
        if layer == pool.layers[0]:
            self._make_room(pool, chunk.counts)
        pool.extend(layer, chunk.rows, chunk.packed(key), chunk.packed(value), chunk.counts)

    def _make_room(self, pool: Pool, counts: HostInts) -> None:
        """Enlarge a batch's spans if they cannot take so many tokens; of a full cache by a quarter, to copy rarely."""
        table = self.table
        lengths, capacities = table.lengths[pool.layers], table.capacities[pool.layers]
        needed = lengths + counts[:, None]
        if self.round is not None and self.compression.prompt == "protect" and self._in_prompt(self.rows):
            needed = needed + self.round.first_capacities(pool.layers, self.rows)  # what it is on top of
        if (needed <= capacities).all():
            return
        if self.totals is None:
            needed = needed + self._schedule.room(lengths)
        pool.grow(np.maximum(capacities, needed))

    # ---- observing ----

    def _watch(self, layer: int, chunk: Chunk, queries: Queries) -> None:
        """Observe a chunk's queries now, or once it is known which of them stay."""
        if not self.holding:
            self._observe(layer, chunk, queries)
            return
        if self._speculation is None:
            self._speculation = Speculation(chunk)
        self._speculation.hold(queries, None if self._tracks_received else self._window)

    def _observe(self, layer: int, chunk: Chunk, queries: Queries) -> None:
        pool = self._pool_of[layer]
        counts = np.minimum(chunk.counts, len(queries))
        pushed = self.table.pushed[chunk.rows] - counts
        pool.queries.push(pool.local(layer), chunk.rows, queries, counts, pushed)
        if self._tracks_received:
            prompt = self._prompt(chunk)
            spans = self._spans(layer, chunk.rows) if prompt is None else prompt.spans(pool, layer)
            assert self.backend is not None
            self.backend.receive_chunk(queries.states, spans, self._scaling, chunk.hidden(queries.states.device))

    # ---- compressing ----

    def _end_step(self) -> None:
        for chunk in self.step.chunks:
            if self.holding or not chunk.ends_prompt:
                continue
            if self._settles(chunk):
                self._settle(chunk.rows)
            else:  # a decoding step in which some rows only padded
                self.table.steps[chunk.rows] += 1
                self.table.phases[chunk.rows] = Phase.DECODING
                self._after_steps(chunk.rows)
        if self.step.decode is not None:
            rows, self.step.decode = self.step.decode.rows, None
            self._after_steps(rows)

    def _after_steps(self, rows: HostInts) -> None:
        """These rows have decoded a token: one round of those that are due."""
        due = self._schedule.due(rows)
        if len(due):
            self._let_go()
            self._schedule.after_interval(self.pools, due, self._scaling, self.columns)

    def _settles(self, chunk: Chunk) -> bool:
        """Whether an interval begins anew with it; a later token that comes alone, beside padding, is a step."""
        return chunk.columns > 1 or self._prompt(chunk) is not None

    def _settle(self, rows: HostInts) -> None:
        """A chunk is in the pools: the interval begins anew. A single token is a step, also as a prompt."""
        prompt = self.prompts.pop(int(rows[0]), None)
        self.table.steps[rows] = int(prompt is not None and prompt.counts.max() <= 1)

    def _compress(self, pool: Pool, rows: HostInts) -> None:
        """After a chunk of these rows has passed the layers of a pool."""
        prompt = self.prompts.get(int(rows[0]))
        self._schedule.after_chunk(pool, pool is self.pools[0], rows, prompt, self._scaling, self.columns)
