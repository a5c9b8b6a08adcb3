"""How many operations a step and a round are, and that nothing in them waits for a device.

Counted by torch's dispatch mode, on the CPU, with what an accelerator would run. Views and allocations start nothing on
a device and do not count. The numbers are bounds on launches: a step's must not grow with rows, a round's must grow
neither with rows nor with the layers that share a pool.
"""

import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from reference import prompts, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import reasonalloc as ra
from reasonalloc.cache import step
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.round import Round
from reasonalloc.cache.step import Chunk, Decode
from reasonalloc.engines.transformers import attention, cache
from reasonalloc.policies.allocation import ModelShape
from reasonalloc.policies.scoring import rkv

NOTHING_STARTS = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "detach", "as_strided", "expand", "lift_fresh"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "diagonal"),
    *("transpose", "t", "permute", "unsqueeze", "squeeze"),
    *("empty", "empty_like", "new_empty", "empty_strided"),
}
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique_consecutive"}


class Operations(TorchDispatchMode):
    """Counts by name while it is on."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name not in NOTHING_STARTS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch):
    """Operations of every call of some methods: lists by the method's name."""
    monkeypatch.setattr(rkv, "counted_similarity", rkv.counted_over_all_pairs)  # an accelerator's
    found = {}

    def count(owner, name):
        plain, calls = getattr(owner, name), found.setdefault(name, [])

        def counting(*args, **kwargs):
            with Operations() as operations:
                out = plain(*args, **kwargs)
            calls.append(operations.names)
            return out

        monkeypatch.setattr(owner, name, counting)
        return calls

    return count


def of_transformers(layers, rows, padded, counted, method="reasonalloc-head"):
    """Operations of steps, layers in a step, and rounds of a model that decodes."""
    model = tiny_model(num_hidden_layers=layers)
    chosen = ra.Compression.method(method, 24, interval=16)
    ragged = ra.Cache(model.config, chosen, layers_at_once=layers)
    prepared, layer, rounds = (
        counted(cache._Pass, "begin"),
        counted(Decode, "layer"),
        counted(Round, "run"),
    )
    ids, mask = prompts([40 + i * padded for i in range(rows)])
    model.generate(ids, attention_mask=mask, past_key_values=ragged, max_new_tokens=40, do_sample=False)
    assert ragged.stats().compressions >= 2
    return prepared[-1], layer[-layers:], rounds[-1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", ["reasonalloc-head", "h2o", "streaming"])
@pytest.mark.parametrize(("layers", "rows"), [(1, 1), (3, 2), (6, 5)])
def test_a_step_is_four_operations_a_layer_and_a_few_for_all(layers, rows, method, padded, counted):
    prepared, of_layers, _ = of_transformers(layers, rows, padded, counted, method)
    assert prepared.total() <= 30, prepared
    for operations in of_layers:
        assert operations.total() <= 4, operations
    if not padded:  # a padded batch asks its mask, once for all layers
        assert not (WAITS & {*prepared, *(name for operations in of_layers for name in operations)})


def test_nothing_else_of_a_layer_is_counted_away(counted):
    """What transformers calls in a layer has no operation that ``Decode.layer`` and ``_Pass.begin`` do not."""
    model = tiny_model(num_hidden_layers=2)
    ragged = ra.Cache(model.config, ra.Compression.method("rkv", 24, interval=100))
    ids, _ = prompts([20])
    with torch.no_grad():
        model(ids, past_key_values=ragged)
        whole, inner = counted(attention, "attention_forward"), counted(Decode, "layer")
        prepared = counted(cache._Pass, "begin")
        query, key = torch.randn(1, 6, 1, 16), torch.randn(1, 3, 1, 16)
        for layer in range(2):
            tagged, value = ragged.update(key, key, layer)
            attention.attention_forward(model.model.layers[layer].self_attn, query, tagged, value, None)
    assert [x.total() for x in inner] == [4, 4]
    assert sum(x.total() for x in whole) == 8 + prepared[0].total()


@pytest.mark.parametrize("method", ["reasonalloc-head", "rkv", "adakv-rkv", "snapkv", "h2o", "tova", "random", "vase"])
def test_a_round_is_as_many_operations_whatever_rows_and_layers(method, counted):
    found = []
    for layers, rows in ((1, 1), (2, 3), (6, 5)):
        changes = {"window": 8} if method == "vase" else {}
        model = tiny_model(num_hidden_layers=layers)
        chosen = ra.Compression.method(method, 24, interval=16, **changes)
        ragged = ra.Cache(model.config, chosen, layers_at_once=layers)
        rounds = counted(Round, "run")
        ids, _ = prompts([40] * rows)
        model.generate(ids, past_key_values=ragged, max_new_tokens=40, do_sample=False)
        found.append(rounds[-1])
    assert_alike(found)
    assert found[0].total() <= (400 if method != "vase" else 440)
    assert not WAITS & set(found[0])


def assert_alike(found):
    """As many operations; what is a view of one row of one layer may be a copy of more."""
    assert len({operations.total() for operations in found[1:]}) == 1, [x.total() for x in found]
    assert not found[0] - found[1]
    assert set(found[1] - found[0]) <= {"clone"}


class Served:
    """Requests in arenas of one tensor, fed with random states."""

    def __init__(self, layers, requests, at_once, method="reasonalloc-head"):
        shape = ModelShape(layers, 3, 6, 8)
        self.ragged = RaggedCache(ra.Compression.method(method, 24, interval=16), shape, layers_at_once=at_once)
        layout = ArenaLayout.of(self.ragged.compression, shape, self.ragged.totals.fixed(0), torch.float32)
        memory = torch.zeros(layers, requests + 2, layout.nbytes, dtype=torch.uint8)
        self.ragged.lend(dict(enumerate(memory)), dict.fromkeys(range(layers), layout))
        self.layers, self.arenas = layers, list(range(1, requests + 1))

    def prompt(self, length):
        chunks = [Chunk.of(np.array([arena]), length, ends_prompt=False) for arena in self.arenas]
        self.ragged.begin((), chunks)
        for layer in range(self.layers):
            for chunk in chunks:
                self.ragged.take(layer, chunk, *(torch.randn(1, n, length, 8) for n in (6, 3, 3)), 1.0)
            self.ragged.end_layer(layer)

    def step(self):
        self.ragged.begin(self.arenas)
        for layer in range(self.layers):
            states = (torch.randn(len(self.arenas), n, 1, 8) for n in (6, 3, 3))
            self.ragged.decode(layer, *states, 1.0)
            self.ragged.end_layer(layer)


def test_between_two_rounds_nothing_is_copied_to_the_device(monkeypatch):
    """An engine that frees no arena, step for step, does not make a step read the table anew."""
    served = Served(2, 3, 2)
    served.prompt(40)
    served.step()
    sent, on_device = [], step.on_device
    monkeypatch.setattr(step, "on_device", lambda *args: sent.append(args) or on_device(*args))
    for _ in range(20):
        served.ragged.free([])
        served.step()
    assert not sent
    assert served.ragged.round.rounds.all(), "not even after a round"
    served.arenas.pop()
    served.step()
    assert sent, "other rows"


@pytest.mark.parametrize("change", ["rows leave", "it grows"])
def test_memory_that_is_replaced_is_let_go_of_at_once(change):
    """What a step knows of the old memory does not keep it."""
    model = tiny_model()
    text, _ = prompts([120, 120])
    budget = 24 if change == "rows leave" else None
    full = ra.Cache(model.config, ra.Compression(budget, layers="uniform", heads="uniform", interval=16))
    with torch.no_grad():
        for part in text[:, :50].split([40, *[1] * 10], 1):
            model(part, past_key_values=full)
        old = [weakref.ref(x) for pool in full.ragged.pools for x in (pool.keys, pool.values)]
        if change == "rows leave":
            full.batch_select_indices(torch.tensor([1]))
        else:
            for part in text[:, 50:].split(1, 1):
                model(part, past_key_values=full)
    assert all(tensor() is None for tensor in old)


@pytest.mark.parametrize("method", ["reasonalloc-head", "h2o"])
def test_arenas_are_as_few_operations(method, counted):
    torch.manual_seed(0)
    begins, of_layers = counted(RaggedCache, "begin"), counted(Decode, "layer")
    rounds, found = counted(Round, "run"), []
    for layers, requests in ((1, 1), (2, 3), (6, 5)):
        served = Served(layers, requests, layers, method)
        served.prompt(40)
        for _ in range(40):
            served.step()
        assert begins[-1].total() <= 30
        assert max(x.total() for x in of_layers[-layers:]) <= 4
        assert not WAITS & {*begins[-1], *of_layers[-1], *rounds[-1]}
        found.append(rounds[-1])
    assert_alike(found)
    assert found[-1].total() <= 400


class Remembering(ra.RKV):
    """R-KV that looks, whenever it is asked, for keys that it was shown before."""

    alive, shown = [], []

    def score(self, seen):
        self.alive.append(sum(keys() is not None for keys in self.shown))
        self.shown.append(weakref.ref(seen.tokens.keys))
        return super().score(seen)


def test_a_round_holds_one_pools_keys_at_a_time():
    model = tiny_model(num_hidden_layers=4)
    ragged = ra.Cache(model.config, ra.Compression(24, Remembering(), "uniform", interval=16), layers_at_once=1)
    model.generate(prompts([10])[0], past_key_values=ragged, max_new_tokens=60, do_sample=False)
    assert len(Remembering.alive) >= 8, "two rounds of four layers"
    assert not any(Remembering.alive)
    assert not any(keys() is not None for keys in Remembering.shown)
