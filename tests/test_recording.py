"""Steps that are recorded once and replayed, and numbers of a round that reach the host late.

On the CPU: a "graph" is the device's part of a step, done again; late numbers land only when somebody asks for them.
"""

import copy

import numpy as np
import pytest
import torch
from reference import compression, prompts, tiny_model

import reasonalloc as ra
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.round import Round
from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import Flight, Table
from reasonalloc.policies.allocation import ModelShape

LAYERS, HEADS, GROUP, DIM = 4, 3, 2, 8
SHAPE = ModelShape(LAYERS, HEADS, HEADS * GROUP, DIM)
METHODS = ["rkv", "reasonalloc-head", "reasonalloc-dynamic", "h2o", "random", "streaming", "adakv-rkv"]


class LateEvent:
    """Of a copy that arrives when it is waited for."""

    def synchronize(self):
        pass

    def query(self):
        return False


@pytest.fixture
def late(monkeypatch):
    """Numbers are under way until they are asked for; the list holds how many were, at every request."""
    under_way = []

    def expect(table, rows, numbers, land):
        table._flights.append(Flight(rows, numbers.clone(), LateEvent(), land))
        under_way.append(len(table._flights))

    monkeypatch.setattr(Table, "expect", expect)
    return under_way


class Batch:
    """A batch of rows in a cache of its own, fed with random states."""

    def __init__(self, method, rows=3, recorder=None, **changes):
        chosen = compression(method, 24, interval=8, **changes)
        at_once = None if method == "reasonalloc-dynamic" else 2  # all in one pool, where kernels run
        self.ragged = RaggedCache(chosen, SHAPE, layers_at_once=at_once, recorder=recorder)
        self.generator, self.rows, self.outputs = torch.Generator().manual_seed(0), rows, []
        self.chunk(40)

    def states(self, tokens):
        of = ((heads, self.rows) for heads in (HEADS * GROUP, HEADS, HEADS))
        return [torch.randn(rows, heads, tokens, DIM, generator=self.generator) for heads, rows in of]

    def chunk(self, tokens):
        chunk = Chunk.of(np.arange(self.rows), tokens)
        self.ragged.begin((), (chunk,), tokens)
        for layer in range(LAYERS):
            call = self.ragged.take if self.ragged.is_new(chunk) else self.ragged.attend
            call(layer, chunk, *self.states(tokens), 1.0)
            self.ragged.end_layer(layer)

    def layers(self, states):
        for layer in range(LAYERS):
            self.out = self.ragged.decode(layer, *states[layer], 1.0)
            self.ragged.end_layer(layer)

    def step(self, recorded):
        states = [self.states(1) for _ in range(LAYERS)]
        if recorded:
            self.ragged.replay(lambda: self.layers(states), self.ragged.fixed_memory)
        else:
            self.ragged.begin(np.arange(self.rows))
            self.layers(states)
        self.outputs.append(self.out)

    def kept(self):
        layers = [self.ragged.tokens(layer) for layer in range(LAYERS)]
        return [
            [tokens.positions[row, head, :count].tolist() for head, count in enumerate(tokens.lengths[row].tolist())]
            for tokens in layers
            for row in range(self.rows)
        ]


def same(one, other):
    assert one.kept() == other.kept()
    assert all(a.equal(b) for a, b in zip(one.outputs, other.outputs, strict=True))
    for name in ("starts", "lengths", "capacities", "settled", "young", "seen", "steps", "pushed"):
        np.testing.assert_array_equal(getattr(one.ragged.table, name), getattr(other.ragged.table, name), name)


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_are_decoding_steps(method):
    plain, replayed = Batch(method), Batch(method)
    for _ in range(40):
        plain.step(False)
        replayed.step(True)
    assert plain.ragged.round.rounds.min() >= 4
    same(plain, replayed)


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_run_changes_nothing(method):
    plain, tried = Batch(method), Batch(method)
    for _ in range(20):  # with spans that are full to the last slot, too
        with tried.ragged.recording():
            tried.layers([[torch.full_like(x, 7.0) for x in tried.states(1)] for _ in range(LAYERS)])
        plain.generator.set_state(tried.generator.get_state())
        plain.step(False)
        tried.step(True)
    same(plain, tried)


def test_memory_stays_where_it_is_over_rounds_and_is_told_of_where_not():
    batch = Batch("reasonalloc-head")
    first = batch.ragged.fixed_memory
    for _ in range(20):
        batch.step(True)
        assert batch.ragged.fixed_memory == first
    copied = copy.deepcopy(batch)
    assert not set(copied.ragged.fixed_memory) & set(first)
    copied.step(True)
    batch.ragged.select([2, 0])
    assert batch.ragged.fixed_memory != first


def test_a_full_cache_gets_room_before_a_step():
    plain, replayed = Batch("full"), Batch("full")
    places = set()
    for _ in range(40):
        plain.step(False)
        places.add(replayed.ragged.fixed_memory)
        replayed.step(True)
    same(plain, replayed)
    assert len(places) >= 2


@pytest.mark.parametrize("method", METHODS)
def test_late_numbers_change_nothing(method, late, request):
    lagging = Batch(method)
    for _ in range(33):
        lagging.step(True)
    assert late, "there were rounds"
    request.getfixturevalue("monkeypatch").undo()
    plain = Batch(method)
    for _ in range(33):
        plain.step(False)
    same(plain, lagging)


def test_between_two_rounds_nobody_waits_for_them(late):
    batch = Batch("reasonalloc-head")
    for _ in range(32):
        batch.step(True)
        if batch.ragged.table.steps[0] == 0:
            assert batch.ragged.table._flights, "a round has just begun"
    assert max(late) >= 1
    steps = int(batch.ragged.table.steps[0])
    assert batch.ragged.table._flights or steps, "and is still under way after it"
    batch.ragged.table.land_what_is_there()
    assert batch.ragged.table._flights, "land_what_is_there does not wait"
    batch.ragged.table.land()
    assert not batch.ragged.table._flights


def test_transformers_with_late_numbers(late, request):
    def text():
        model = tiny_model()
        ids, mask = prompts([40, 17])
        cache = ra.Cache(model.config, compression("reasonalloc-head", 24, interval=8), layers_at_once=3)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=50, do_sample=False)
        return out, cache.stats()

    lagging = text()
    assert len(late) >= 4
    request.getfixturevalue("monkeypatch").undo()
    assert lagging[0].equal(text()[0])
    assert lagging[1] == text()[1]


class Requests:
    """Requests of a server that begin one after the other, so that every few steps another one is due."""

    def __init__(self):
        self.ragged = RaggedCache(compression("reasonalloc-head", 24, interval=8), SHAPE, layers_at_once=2)
        layout = ArenaLayout.of(self.ragged.compression, SHAPE, self.ragged.totals.fixed(0), torch.float32)
        memory = torch.zeros(LAYERS, 6, layout.nbytes, dtype=torch.uint8)
        self.ragged.lend(dict(enumerate(memory)), dict.fromkeys(range(LAYERS), layout))
        self.generator, self.outputs = torch.Generator().manual_seed(0), []

    def states(self, rows, tokens):
        return [
            torch.randn(rows, heads, tokens, DIM, generator=self.generator) for heads in (HEADS * GROUP, HEADS, HEADS)
        ]

    def run(self, steps=60):
        decoding, under_way = [], 0
        for step in range(steps):
            chunks = []
            if step % 7 == 0 and len(decoding) < 4:
                arena = min({1, 2, 3, 4} - set(decoding))
                chunks = [Chunk.of(np.array([arena]), 30, ends_prompt=False)]
            if step == 45:
                self.ragged.free([decoding.pop(0)])
            self.ragged.begin(decoding, chunks)
            for layer in range(LAYERS):
                for chunk in chunks:
                    self.ragged.take(layer, chunk, *self.states(1, 30), 1.0)
                if decoding:
                    out = self.ragged.decode(layer, *self.states(len(decoding), 1), 1.0)
                    self.outputs.append(out)
                self.ragged.end_layer(layer)
            decoding += [int(chunk.rows[0]) for chunk in chunks]
            under_way = max(under_way, len(self.ragged.table._flights))
        return under_way


def test_requests_that_are_due_wait_for_their_own_numbers_alone(late, request):
    lagging = Requests()
    assert lagging.run() >= 3, "rounds of several requests are under way at once"
    request.getfixturevalue("monkeypatch").undo()
    plain = Requests()
    plain.run()
    assert all(a.equal(b) for a, b in zip(lagging.outputs, plain.outputs, strict=True))
    np.testing.assert_array_equal(lagging.ragged.table.lengths, plain.ragged.table.lengths)
    np.testing.assert_array_equal(lagging.ragged.round.evicted, plain.ragged.round.evicted)


def test_a_wrong_score_is_told_when_its_numbers_arrive(late):
    """And the numbers are taken in, so that host and device agree."""
    batch = Batch("reasonalloc-head")
    for flight in batch.ragged.table._flights:
        flight.numbers[0] = 1.0  # what a device reports of a score that is no number
    told = len(batch.ragged.table._flights)
    assert told == 2, "a pool each"
    for _ in range(told):
        with pytest.raises(ValueError, match="scorer RKV returned NaN"):
            batch.ragged.table.land()
    np.testing.assert_array_equal(batch.ragged.table.lengths, batch.ragged._device.lengths.numpy())


@pytest.mark.parametrize("method", ["reasonalloc-dynamic", "reasonalloc-head"])
def test_a_copy_has_no_numbers_under_way(method, late):
    batch = Batch(method)
    for _ in range(9):
        batch.step(True)
    assert batch.ragged.table._flights
    copied = copy.deepcopy(batch)
    for _ in range(16):
        batch.step(True)
        copied.step(True)
    same(batch, copied)


def test_a_recorder_is_told_of_the_last_round(late):
    recorder = ra.Recorder()
    batch = Batch("rkv", recorder=recorder)
    for _ in range(8):
        batch.step(True)
    assert batch.ragged.table._flights
    assert len(recorder.routings) == 2 * LAYERS
    batch.step(True)
    for _ in range(8):
        batch.step(True)
    batch.ragged.reset()
    assert len(recorder.routings) == 3 * LAYERS, "also of a cache that was reset"


@pytest.mark.parametrize("where", ["step", "round"])
def test_an_interrupted_replay_shows(where, monkeypatch):
    batch = Batch("rkv")
    for _ in range(7):
        batch.step(True)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "round":
            patch.setattr(Round, "run", interrupted)
        else:
            patch.setattr(batch, "layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step(True)
    with pytest.raises(RuntimeError, match="interrupted"):
        batch.step(False)


@pytest.mark.parametrize("cuts", [(40,), (13, 27), (1, 38, 1)], ids=str)
@pytest.mark.parametrize("method", ["rkv", "h2o"])
def test_a_prompt_of_pools_of_several_layers(cuts, method):
    """However it is cut: a pool's layers share one memory, which grows by chunks."""

    def kept(cuts, at_once):
        ragged = RaggedCache(compression(method, 24, interval=8), SHAPE, layers_at_once=at_once)
        layout = ArenaLayout.of(ragged.compression, SHAPE, ragged.totals.fixed(0), torch.float64)
        memory = torch.zeros(LAYERS, 2, layout.nbytes, dtype=torch.uint8)
        ragged.lend(dict(enumerate(memory)), dict.fromkeys(range(LAYERS), layout))
        generator = torch.Generator().manual_seed(0)
        states = [
            [torch.randn(1, heads, 41, DIM, generator=generator).double() for heads in (HEADS * GROUP, HEADS, HEADS)]
            for _ in range(LAYERS)
        ]
        at = 0
        for tokens in cuts:
            chunk = Chunk.of(np.array([1]), tokens, ends_prompt=False)
            ragged.begin((), [chunk])
            for layer, of_layer in enumerate(states):
                part = [x[:, :, at : at + tokens] for x in of_layer]
                call = ragged.take if ragged.is_new(chunk) else ragged.attend
                call(layer, chunk, *part, 1.0)
                ragged.end_layer(layer)
            at += tokens
        ragged.begin([1])
        for layer, of_layer in enumerate(states):
            ragged.decode(layer, *(x[:, :, 40:] for x in of_layer), 1.0)
            ragged.end_layer(layer)
        return [ragged.tokens(layer) for layer in range(LAYERS)]

    for one, other in zip(kept((40,), 1), kept(cuts, 3), strict=True):
        assert one.lengths.equal(other.lengths)
        for head, count in enumerate(one.lengths[1].tolist()):
            assert one.positions[1, head, :count].equal(other.positions[1, head, :count])
            assert one.keys[1, head, :count].equal(other.keys[1, head, :count])
