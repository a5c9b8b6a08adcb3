"""The CUDA kernels: on the CPU by Triton's interpreter (see conftest), and compiled for real GPUs without one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_scorers import GROUPS, assert_output, assert_received, make_slab, randn, ref_attend, tolerances

pytest.importorskip("triton")

from reasonalloc.cache.attention import triton_decode
from reasonalloc.cache.attention.triton_decode import ChunkTable, TritonDecode
from reasonalloc.cache.slab import RaggedSlab
from reasonalloc.policies.scoring.tokens import LayerTokens

HALF = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reasonalloc.cache.attention import triton_decode

dtype, dim = sys.argv[1], int(sys.argv[2])
tile = triton_decode.tile_of(dim, dim, {"bf16": 2, "fp32": 4}[dtype])
pointers = {
    **dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}"),
    "starts": "*i64", "lengths": "*i64",
    "rows": "*i32", "offsets": "*i32", "first": "*i32", "scaling": "fp32",
}
sizes = {
    "group": 4, "dim": dim, "value_dim": dim, "GROUP": 16, "DIM": dim, "VALUE_DIM": dim, "WIDEN": False,
    "CHUNK": 256, "TILE": tile,
}
for kernel in (triton_decode._attend_chunk, triton_decode._join_chunks, triton_decode._receive_chunk):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else pointers.get(name, "*fp32") for name in names}
    known = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    options = {"num_stages": triton_decode._STAGES}
    code = compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", 86, 32), options=options)
    print(kernel.__name__, code.metadata.shared)
"""


LONG = np.array([[1, 70], [40, 3], [33, 96]])  # one to six chunks of 16


HALVES = [(dtype, 16, 16, True) for dtype in HALF]
SINGLE = [(torch.float32, 16, 16, False), (torch.float32, 16, 16, True), (torch.float32, 64, 16, True)]


@pytest.mark.parametrize(
    ("dtype", "chunk", "tile", "track"), [*HALVES, *SINGLE, (torch.float32, 256, 64, True)], ids=str
)
@GROUPS
def test_one_query(monkeypatch, dtype, group, chunk, tile, track):
    monkeypatch.setattr(triton_decode, "_CHUNK", chunk)
    monkeypatch.setattr(triton_decode, "tile_of", lambda *_: tile)
    slab, tokens = make_slab(dtype, track, lengths=LONG)
    query = randn(860, 3, 2 * group, 1, 6).to(dtype)
    out, added = ref_attend(query, tokens, 0.6)
    attend = TritonDecode()
    got = attend(query, slab, 0.6)
    assert len(attend._table.rows) == (-(-slab.capacities // chunk)).sum()
    assert got.dtype == dtype
    assert_output(got, out, HALF.get(dtype, tolerances(torch.float32)[0]))
    if track:
        assert_received(slab, tokens, added, HALF.get(dtype, 2e-5))


def test_large_logits_and_empty_chunks(monkeypatch):
    monkeypatch.setattr(triton_decode, "_CHUNK", 16)
    slab, tokens = make_slab(torch.float32, lengths=LONG)
    slab.grow(slab.capacities + 40)  # whole chunks without a live token
    query = 100 * randn(861, 3, 4, 1, 6).float()
    assert_output(TritonDecode()(query, slab, 1.0), ref_attend(query, tokens, 1.0)[0], 1e-3)


def test_chunks_cover_every_slot_once():
    slab, _ = make_slab(torch.float32)
    for chunk in (1, 3, 5, 1000):
        table = ChunkTable.of(slab, chunk)
        capacities = slab.capacities.reshape(-1)
        covered = [[] for _ in capacities]
        for row, offset in zip(table.rows.tolist(), table.offsets.tolist(), strict=True):
            covered[row] += range(offset, min(offset + chunk, capacities[row]))
        assert covered == [list(range(n)) for n in capacities]
        starts = np.flatnonzero(table.offsets.numpy() == 0)
        assert table.first.tolist() == [*starts, len(table.rows)]


def test_the_table_follows_the_spans():
    slab, tokens = make_slab(torch.float32)
    attend, query = TritonDecode(), randn(862, 3, 4, 1, 6).float()
    attend(query, slab, 0.6)
    first = attend._table
    attend(query, slab, 0.6)
    assert attend._table is first, "made once for all steps between two routings"
    slab.grow(slab.capacities + np.array([[300, 1], [2, 500], [0, 7]]))
    assert_output(attend(query, slab, 0.6), ref_attend(query, tokens, 0.6)[0], 2e-5)
    assert attend._table is not first


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        ("bf16", 128),
        *(pytest.param(d, n, marks=pytest.mark.slow) for d, n in (("bf16", 256), ("fp32", 128), ("fp32", 256))),
    ],
)
def test_it_compiles_for_a_gpu(dtype, dim):
    """To machine code, through ptxas, no GPU needed; into the shared memory that consumer GPUs have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, dtype, str(dim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["_attend_chunk", "_join_chunks", "_receive_chunk"]
    assert max(int(line[1]) for line in lines) <= 101_376


def test_heads_that_are_too_wide():
    assert [triton_decode.tile_of(n, n, size) for n, size in ((64, 2), (128, 2), (256, 4))] == [64, 64, 16]
    with pytest.raises(ValueError, match="2048 and 2048 channels are too wide"):
        triton_decode.tile_of(2048, 2048, 4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="needs a GPU, uninterpreted"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """TRITON_INTERPRET= pytest tests/test_triton.py, on a machine that has one."""
    slab, tokens = make_slab(dtype, lengths=LONG * 9, dim=64, value_dim=64)
    out, _ = ref_attend(query := randn(863, 3, 8, 1, 64).to(dtype), tokens, 0.1)
    on_gpu = RaggedSlab(tokens.keys.cuda(), tokens.values.cuda(), slab.capacities, True)
    moved = LayerTokens(
        *(x.cuda() for x in (tokens.keys, tokens.values, tokens.lengths, tokens.positions, tokens.received))
    )
    on_gpu.store(moved, slab.lengths, slab.capacities, slab.seen)
    assert_output(TritonDecode()(query.cuda(), on_gpu, 0.1).cpu(), out, HALF.get(dtype, 2e-5))
