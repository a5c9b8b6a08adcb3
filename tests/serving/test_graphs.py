"""Full CUDA graphs of decoding steps, on the CPU: the plugin's own code, driven as vLLM's runner drives it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_engine import BUCKETS, LAYERS, Engine, Request, config, load
from recorded import NothingIsRead
from vllm.platforms import current_platform

from reasonalloc.cache.spans import Spans
from reasonalloc.engines.vllm import backend
from reasonalloc.engines.vllm.batch import NULL
from reasonalloc.engines.vllm.model import ServedModel
from reasonalloc.engines.vllm.settings import settings

UNEQUAL = {"name": "random-split", "split_seed": 1}


@pytest.fixture
def asked(monkeypatch):
    def ask(method, layers=None, interval=8):
        fields = {"method": method, "budget": 16, "interval": interval, "window": 4}
        monkeypatch.setenv("REASONALLOC", json.dumps(fields | ({"layers": layers} if layers else {})))
        return settings()

    return ask


@pytest.mark.parametrize(
    ("method", "layers"), [("reasonalloc-head", UNEQUAL), ("rkv", None), ("h2o", None), ("random", UNEQUAL)]
)
def test_graphs_change_nothing(monkeypatch, asked, method, layers):
    """Outputs, positions that are kept, and what was evicted, over many rounds, with and without graphs."""
    asked(method, layers)
    with_graphs, eager = Engine(monkeypatch), Engine(monkeypatch, graphs=False)
    assert (len(eager.builders) > 1) is (layers is not None)
    for i, (ours, theirs) in enumerate(zip(load(with_graphs, 160), load(eager, 160), strict=True)):
        for mine, other in zip(ours[0], theirs[0], strict=True):
            assert (mine.name, mine.computed) == (other.name, other.computed)
            last = mine.computed - 1
            torch.testing.assert_close(mine.outputs[last], other.outputs[last], atol=1e-5, rtol=1e-5)
        if i % 7 == 0:
            for mine, other in zip(ours[1], theirs[1], strict=True):
                assert with_graphs.kept(mine) == eager.kept(other), (i, mine)
    rounds = with_graphs.running.cache.round
    np.testing.assert_array_equal(rounds.evicted, eager.running.cache.round.evicted)
    assert rounds.rounds.min() > 20
    assert with_graphs.replays > 60
    assert eager.replays == 0


def addresses(engine):
    """Of all that a recorded step of this bucket reads or writes."""
    cache = engine.running.cache
    views = [
        x
        for spans, *places in cache._decode._look()
        for x in (*vars(spans).values(), *vars(spans.chunks).values(), *places)
    ]
    numbers = [cache._device.lengths, cache._device.pushed, cache._device.starts]
    return [(x.data_ptr(), x.shape) for x in (*views, *numbers) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("method", ["rkv", "h2o"])
def test_what_a_graph_reads_stays_where_it_is(monkeypatch, asked, method):
    """More buckets than arenas, over rounds, prompts and changing batches."""
    asked(method, UNEQUAL)
    engine, seen = Engine(monkeypatch, arenas=5), {}
    for _ in load(engine, 120):
        if engine.running.batch is not None and not engine.running.batch.prompts:
            rows = len(engine.running.batch.arenas)
            found = addresses(engine)
            assert len(found) > 12 * LAYERS
            assert seen.setdefault(rows, found) == found, rows
    assert len(set(BUCKETS) & set(seen)) == 3, "up to 4 requests"
    assert engine.running.cache.round.rounds.min() > 10


def test_warming_up_and_recording_leave_no_trace(monkeypatch, asked):
    """Not at start, and not between the steps of real requests: data-parallel ranks run along without any."""
    asked("rkv")
    engine, other = Engine(monkeypatch), Engine(monkeypatch, graphs=False)
    table = engine.running.cache.table
    assert not table.seen[1:].any()
    assert not table.young[:, 1:].any()
    assert 1 <= table.seen[NULL] <= 8
    assert engine.running.cache._device.lengths[:, 1:].sum() == 0
    mine, theirs = Request("a", 20, 3), Request("a", 20, 3)
    for one, request in ((engine, mine), (other, theirs)):
        one.step([(request, 20)])
        for _ in range(30):
            one.step([(request, 1)])
            if one is engine:
                engine.record()
    assert engine.kept(mine) == other.kept(theirs)
    assert engine.running.cache.round.evicted.tolist() == other.running.cache.round.evicted.tolist()


@pytest.mark.parametrize("interval", [8, 24])  # more than the budget, which padding must not be held to
def test_padding_never_grows_and_is_never_compressed(monkeypatch, asked, interval):
    asked("h2o", None, interval)
    engine = Engine(monkeypatch)
    requests = [Request(name, 10, arena) for arena, name in enumerate("abc", 1)]
    for request in requests:
        engine.step([(request, 10)])
    cache = engine.running.cache
    before = cache.round.rounds.copy()
    for _ in range(50):
        engine.step([(request, 1) for request in requests])
        lengths = cache._device.lengths[:, NULL]
        assert engine.running.batch.arenas.tolist() == [1, 2, 3, NULL]
        assert 1 <= lengths.min() == lengths.max() <= interval
        assert cache.table.lengths[0, NULL].tolist() == lengths[0].tolist()
    assert (cache.table.settled[:, NULL] == 0).all()
    assert (cache.round.rounds - before == 50 // interval).all(), "of the three requests, all at once"


def test_a_prompt_that_ends_with_one_token_is_no_decoding_step(monkeypatch, asked):
    """To vLLM one token of each request is a batch for a graph; here a prompt lies beside its arena until it ends."""
    asked("rkv")
    engine = Engine(monkeypatch)
    one, two = Request("a", 1, 1), Request("b", 17, 2)
    engine.step([(one, 1)])
    engine.step([(two, 16)])
    assert engine.replays == 0
    engine.step([(one, 1), (two, 1)])
    assert engine.replays == 0
    assert set(engine.running.cache.prompts) == {2}
    engine.step([(one, 1), (two, 1)])
    assert engine.replays == 1
    assert not engine.running.cache.prompts


@pytest.mark.parametrize("graphs", [False, True])
def test_a_decoding_step_waits_for_nothing(monkeypatch, asked, graphs):
    """The host reads no tensor of the device when a step is prepared, nor when it runs; only a round's numbers come."""
    asked("h2o", UNEQUAL)
    monkeypatch.setattr(Spans, "__post_init__", lambda _: None)  # on a CPU it looks at its own memory
    engine = Engine(monkeypatch, graphs=graphs)
    requests = [Request(name, 10, arena) for arena, name in enumerate("abc", 1)]
    for request in requests:
        engine.step([(request, 10)])
    engine.step([(request, 1) for request in requests])  # their prompts move into arenas
    engine.reads = NothingIsRead([])
    for i in range(5):
        engine.step([(request, 1) for request in requests[: 3 - i % 2]])
    engine.reads = None
    assert engine.replays == (6 if graphs else 0)
    with NothingIsRead([]), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).tolist()


def test_requests_that_end_are_forgotten_before_the_next_round(monkeypatch, asked):
    asked("rkv")
    engine = Engine(monkeypatch)
    mine, other = Request("a", 10, 1), Request("b", 30, 2)
    engine.step([(mine, 10), (other, 16)])
    for _ in range(8):
        engine.step([(mine, 1)])
    assert engine.running.owners == {1: "a", 2: "b"}
    engine.step([], ["a"])
    table = engine.running.cache.table
    assert table.seen.tolist()[1:3] == [0, 16]
    assert not engine.running.cache.round.evicted.any(), "the round that was due would have been for nothing"
    engine.step([], [], ["b"])
    assert not engine.running.owners
    assert not engine.running.cache.prompts
    assert not table.seen[1:].any()


def test_other_memory_is_another_cache(monkeypatch, asked):
    """vLLM measures its graphs in memory that it takes back."""
    asked("rkv")
    engine = Engine(monkeypatch)
    first = engine.running
    assert engine.running is first
    engine.bind(4)
    assert engine.running is not first
    assert engine.running.cache.table.rows == 4
    assert all(layer.impl.running is engine.running for layer in engine.layers.values())
    for layer in engine.layers.values():
        layer.kv_cache = torch.empty(0)
    assert engine.running is None


@pytest.mark.parametrize(("reads", "support"), [(False, "UNIFORM_SINGLE_TOKEN_DECODE"), (True, "NEVER")])
def test_graphs_where_attention_reads_nothing_on_the_host(monkeypatch, asked, reads, support):
    asked("h2o")
    seen = []
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(
        backend, "choose_backend", lambda *given: seen.append(given) or SimpleNamespace(reads_host=reads)
    )
    model = SimpleNamespace(dtype=torch.bfloat16, get_head_size=lambda: 64)
    found = backend.StepBuilder.get_cudagraph_support(SimpleNamespace(model_config=model), None)
    assert found.name == support
    assert seen == [("auto", torch.device("cuda"), {torch.bfloat16}, 64)]


def test_the_newer_runner_is_refused(monkeypatch, asked):
    asked("rkv")
    fields = config(8)
    fields.use_v2_model_runner = True
    with pytest.raises(ValueError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        ServedModel.of(settings(), fields)
