"""The CUDA kernels: on the CPU by Triton's interpreter (see conftest), and compiled for real GPUs without one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_scorers import GROUPS, assert_output, assert_received, make_slab, randn, ref_attend, tolerances

pytest.importorskip("triton")

from reasonalloc.attention import triton_decode
from reasonalloc.attention.triton_decode import ChunkTable, TritonDecode

HALF = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reasonalloc.attention import triton_decode

pointers = {
    "query": "*bf16", "keys": "*bf16", "values": "*bf16", "out": "*bf16", "starts": "*i64", "lengths": "*i64",
    "rows": "*i32", "offsets": "*i32", "first": "*i32", "scaling": "fp32",
}
sizes = {
    "group": 4, "dim": 128, "value_dim": 128, "GROUP": 16, "DIM": 128, "VALUE_DIM": 128, "WIDEN": False,
    "CHUNK": 256, "TILE": 64,
}
for kernel in (triton_decode._attend_chunk, triton_decode._join_chunks, triton_decode._receive_chunk):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else pointers.get(name, "*fp32") for name in names}
    known = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    code = compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(code.asm["cubin"]))
"""


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize(("chunk", "tile"), [(16, 16), (32, 16), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@GROUPS
def test_one_query(monkeypatch, dtype, group, chunk, tile, track):
    monkeypatch.setattr(triton_decode, "_CHUNK", chunk)
    monkeypatch.setattr(triton_decode, "_TILE", tile)
    slab, tokens = make_slab(dtype, track)
    query = randn(860, 3, 2 * group, 1, 6).to(dtype)
    out, added = ref_attend(query, tokens, 0.6)
    got = TritonDecode()(query, slab, 0.6)
    assert got.dtype == dtype
    assert_output(got, out, HALF.get(dtype, tolerances(torch.float32)[0]))
    if track:
        assert_received(slab, tokens, added, HALF.get(dtype, 2e-5))


def test_large_logits_and_empty_chunks(monkeypatch):
    monkeypatch.setattr(triton_decode, "_CHUNK", 16)
    monkeypatch.setattr(triton_decode, "_TILE", 16)
    slab, tokens = make_slab(torch.float32)
    assert (ChunkTable.of(slab, 4).offsets.numpy() >= slab.lengths.min()).any(), "some chunk holds no live token"
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


def test_it_compiles_for_a_gpu():
    """To machine code of an H100, through ptxas; no GPU is needed for that."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["_attend_chunk", "_join_chunks", "_receive_chunk"]
