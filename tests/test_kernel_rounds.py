"""Whole rounds by the kernels, in Triton's interpreter, against the same rounds by torch.

On a GPU the kernels are what runs anyway; ``tests/test_gpu.py`` compares it with the CPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_operations import WAITS, Operations
from test_recording import Batch, Requests, same

pytest.importorskip("triton")

from triton.runtime import interpreter

from reasonalloc import Recorder
from reasonalloc.cache import moving
from reasonalloc.cache.attention.triton_backend import make_table
from reasonalloc.cache.round import Round
from reasonalloc.kernels import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are interpreted on the CPU only")


@pytest.fixture
def kernels(monkeypatch):
    """The CPU is served by the kernels; the list holds who moved tokens."""
    made, begin = [], moving.begin

    def noting(survivors):
        made.append(begin(survivors))
        return made[-1]

    monkeypatch.setattr(launch, "serve", lambda device: True)
    monkeypatch.setattr(moving, "begin", noting)
    return made


def run(batch, steps):
    for _ in range(steps):
        batch.step(True)
    return batch


@pytest.mark.parametrize(
    "method",
    [
        "reasonalloc-head",
        "snapkv",
        "h2o",
        "random",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("rkv", "reasonalloc-dynamic", "adakv-rkv")),
    ],
)
def test_a_batch(method, kernels, request):
    by_kernels = run(Batch(method, rows=2), 9)
    assert {type(move) for move in kernels} == {moving.KernelMove}
    request.getfixturevalue("monkeypatch").undo()
    by_torch = run(Batch(method, rows=2), 9)
    assert by_torch.ragged.round.rounds.min() >= 2
    same_but_layout(by_torch, by_kernels)


def same_but_layout(one, other):
    """Dynamic layers share a pool where kernels run: their slots have other numbers."""
    if len(one.ragged.pools) == len(other.ragged.pools):
        same(one, other)
        return
    assert one.kept() == other.kept()
    np.testing.assert_array_equal(one.ragged.table.lengths, other.ragged.table.lengths)
    for mine, theirs in zip(one.outputs, other.outputs, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dynamic_layers_stay_in_one_memory(kernels):
    """What an attention kernel is prepared included: else the step would be recorded anew after a round."""
    batch = Batch("reasonalloc-dynamic", rows=2)
    batch.ragged.backend = replace(batch.ragged.backend, table=make_table)
    run(batch, 1)
    memory, totals = batch.ragged.fixed_memory, batch.ragged.table.capacities.sum(-1)
    most = totals.sum(-1).max()
    run(batch, 16)
    assert len(batch.ragged.pools) == 1
    assert (batch.ragged.table.capacities.sum(-1) != totals).any(), "layers have grown at the cost of others"
    assert batch.ragged.table.capacities.sum((1, 2)).max() > most, "one holds more than any did before"
    pool, chunks = batch.ragged.pools[0], batch.ragged._decode._chunks
    assert {x.data_ptr() for x in (pool.keys, pool.values, chunks.rows)} < set(memory)
    assert batch.ragged.fixed_memory == memory


@pytest.mark.parametrize(
    "changes", [{"prompt": "protect"}, {"storage_order": "score"}, {"prompt": "pin", "pin_share": 0.5}], ids=str
)
def test_what_else_a_round_knows(changes, kernels, request):
    def batch():
        made = Batch("reasonalloc-head", rows=2, recorder=Recorder(tokens=True), **changes)
        return run(made, 8)

    by_kernels = batch()
    request.getfixturevalue("monkeypatch").undo()
    by_torch = batch()
    same(by_torch, by_kernels)
    mine, theirs = by_torch.ragged.recorder.tokens, by_kernels.ragged.recorder.tokens
    np.testing.assert_array_equal(mine.let_go, theirs.let_go)
    np.testing.assert_allclose(mine.scores, theirs.scores, atol=1)  # a mean that rounding moves


def test_a_later_turn_and_rows_that_leave(kernels, request):
    def batch():
        made = run(Batch("snapkv", rows=3), 1)
        made.chunk(13)
        made.ragged.select([2, 0])
        made.rows = 2
        return run(made, 9)

    by_kernels = batch()
    request.getfixturevalue("monkeypatch").undo()
    by_torch = batch()
    assert by_torch.kept() == by_kernels.kept()
    assert all(a.equal(b) for a, b in zip(by_torch.outputs, by_kernels.outputs, strict=True))


def test_arenas(kernels, request):
    by_kernels = Requests()
    by_kernels.run(17)
    request.getfixturevalue("monkeypatch").undo()
    by_torch = Requests()
    by_torch.run(17)
    assert by_torch.ragged.round.rounds.min() >= 2
    np.testing.assert_array_equal(by_torch.ragged.table.lengths, by_kernels.ragged.table.lengths)
    assert all(a.equal(b) for a, b in zip(by_torch.outputs, by_kernels.outputs, strict=True))


OF_THE_INTERPRETER = {"set_", "copy_", "_to_copy"}  # it carries a kernel's tensors to the CPU and back


@pytest.mark.parametrize("method", ["reasonalloc-head", "h2o", pytest.param("snapkv", marks=pytest.mark.slow)])
def test_a_round_is_a_few_hundred_launches_and_waits_for_nothing(method, kernels, monkeypatch):
    found, launched = [], []
    plain, execute = Round.run, interpreter.GridExecutor.__call__

    def counting(*args):
        with Operations() as operations:
            plain(*args)
        found.append(operations.names)

    def noting(executor, *args, **kwargs):
        launched.append(executor.fn.__name__)
        return execute(executor, *args, **kwargs)

    batch = run(Batch(method, rows=2), 7)
    monkeypatch.setattr(Round, "run", counting)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noting)
    run(batch, 1)
    assert len(found) == 1
    assert not WAITS & set(found[0])
    assert sum(count for name, count in found[0].items() if name not in OF_THE_INTERPRETER) + len(launched) <= 400
    assert {"_rank", "_select", "_move"} <= set(launched)
