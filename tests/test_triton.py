"""The CUDA kernels: on a GPU where there is one, else on the CPU by Triton's interpreter (see conftest).

Without a GPU they are compiled for real ones, too.
"""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_scorers import GROUPS, assert_output, assert_received, make_spans, randn, ref_attend, tolerances

pytest.importorskip("triton")

from reasonalloc.cache.attention import triton_decode
from reasonalloc.cache.attention.triton_decode import ChunkTable, TritonDecode

INTERPRETED = triton_decode._INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and no interpreter asked for")
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
    "starts": "*i64", "lengths": "*i64", "places": "*i64",
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


def check(attend, query, spans, tokens, scaling, tolerance):
    """Outputs, with everything but the reference where the kernels run; returns what each token was given."""
    out, added = ref_attend(query, tokens, scaling)
    got = attend(query.to(DEVICE), spans, scaling)
    assert got.dtype == query.dtype
    assert_output(got.cpu(), out, tolerance)
    return added


@RUNS
@pytest.mark.parametrize(
    ("dtype", "chunk", "tile", "track"), [*HALVES, *SINGLE, (torch.float32, 256, 64, True)], ids=str
)
@GROUPS
def test_one_query(monkeypatch, dtype, group, chunk, tile, track):
    monkeypatch.setattr(triton_decode, "_CHUNK", chunk)
    monkeypatch.setattr(triton_decode, "tile_of", lambda *_: tile)
    spans, tokens = make_spans(dtype, track, lengths=LONG, device=DEVICE)
    query = randn(860, 3, 2 * group, 1, 6).to(dtype)
    attend = TritonDecode()
    added = check(attend, query, spans, tokens, 0.6, HALF.get(dtype, tolerances(torch.float32)[0]))
    assert len(attend._tables[spans].rows) == (-(-spans.capacities // chunk)).sum()
    if track:
        assert_received(spans, tokens, added, HALF.get(dtype, 2e-5))


@RUNS
def test_large_logits_and_empty_chunks(monkeypatch):
    monkeypatch.setattr(triton_decode, "_CHUNK", 16)
    room = 40  # whole chunks without a live token
    spans, tokens = make_spans(torch.float32, lengths=LONG, room=room, device=DEVICE)
    check(TritonDecode(), 100 * randn(861, 3, 4, 1, 6).float(), spans, tokens, 1.0, 1e-3)


def test_chunks_cover_every_slot_once():
    spans, _ = make_spans(torch.float32)
    for chunk in (1, 3, 5, 1000):
        table = ChunkTable.of(spans, chunk)
        capacities = spans.capacities.reshape(-1)
        covered = [[] for _ in capacities]
        for row, offset in zip(table.rows.tolist(), table.offsets.tolist(), strict=True):
            covered[row] += range(offset, min(offset + chunk, capacities[row]))
        assert covered == [list(range(n)) for n in capacities]
        starts = np.flatnonzero(table.offsets.numpy() == 0)
        assert table.first.tolist() == [*starts, len(table.rows)]


@RUNS
def test_the_table_follows_the_spans():
    """Made once for all steps between two rounds; a round makes other spans, and the old ones' table goes with them."""
    spans, tokens = make_spans(torch.float32, device=DEVICE)
    attend, query = TritonDecode(), randn(862, 3, 4, 1, 6).float()
    check(attend, query, spans, tokens, 0.6, 2e-5)
    first = attend._tables[spans]
    check(attend, query, spans, tokens, 0.6, 2e-5)
    assert attend._tables[spans] is first
    moved, tokens = make_spans(torch.float32, room=np.array([[300, 1], [2, 500], [0, 7]]), device=DEVICE)
    check(attend, query, moved, tokens, 0.6, 2e-5)
    assert len(attend._tables) == 2, "other layers' spans have tables of their own"
    assert attend._tables[moved] is not first
    del spans
    gc.collect()
    assert [*attend._tables] == [moved]


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


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, uninterpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """As wide and long as models are, by the kernels' own choice of chunk and tile."""
    spans, tokens = make_spans(dtype, lengths=LONG * 9, dim=64, value_dim=64, device="cuda")
    added = check(TritonDecode(), randn(863, 3, 8, 1, 64).to(dtype), spans, tokens, 0.1, HALF.get(dtype, 2e-5))
    assert_received(spans, tokens, added, HALF.get(dtype, 2e-5))


def test_a_gpu_is_used_where_there_is_one():
    """conftest asks for the interpreter only where there is no GPU."""
    asked = "import os, sys; sys.path.insert(0, sys.argv[1]); import torch; torch.cuda.is_available = lambda: {}; "
    asked += "import conftest; print(os.environ.get('TRITON_INTERPRET'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for available, wanted in ((True, "None"), (False, "1")):
        command = [sys.executable, "-c", asked.format(available), os.path.dirname(__file__)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted
