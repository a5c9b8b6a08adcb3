"""Triton without a GPU: where its kernels are interpreted, and that they compile for GPUs."""

import os

import pytest
from uninterpreted import SHARED, printed

pytest.importorskip("triton")

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reasonalloc.kernels import chunk_attention, decode_attention

dtype, dim = sys.argv[1], int(sys.argv[2])
size = {"bf16": 2, "fp32": 4}[dtype]
types = {
    **dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}"),
    **dict.fromkeys(("starts", "lengths", "places", "hidden"), "*i64"),
    **dict.fromkeys(("rows", "offsets", "first", "arrived"), "*i32"),
    **dict.fromkeys(("queries", "cuts", "tiles"), "i32"),
    "scaling": "fp32",
}
common = {"group": 4, "dim": dim, "value_dim": dim, "DIM": dim, "VALUE_DIM": dim, "WIDEN": False}


def build(kernel, capability, warps, stages, **sizes):
    sizes = {**common, **sizes}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types.get(name, "*fp32") for name in names}
    known = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    code = compile(ASTSource(kernel, signature, known, aligned), target=target, options=options)
    print(kernel.__name__, capability, code.metadata.shared)


for capability in (80, 90):
    for spans in (64, 512):
        tuning = decode_attention.tuning_for(spans, dim, dim, size)
        sizes = {"GROUP": 16, "CHUNK": tuning.chunk, "TILE": tuning.tile, "FUSED": tuning.fused, "PIECES": 16}
        for kernel in (decode_attention._attend_chunk, decode_attention._join_chunks, decode_attention._receive_chunk):
            if not (tuning.fused and kernel is decode_attention._join_chunks):
                build(kernel, capability, tuning.warps, tuning.stages, **sizes)
    blocks = chunk_attention.blocks_for(400, dim, dim, size)
    sizes = {"heads": 8, "BLOCK": blocks.block, "TILE": blocks.tile}
    for mixes in (True, False):
        build(chunk_attention._attend_block, capability, 4, 2, **sizes, MIXES=mixes)
    build(chunk_attention._receive_tile, capability, 4, 2, **sizes)
"""


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        ("bf16", 128),
        *(pytest.param(d, n, marks=pytest.mark.slow) for d, n in (("bf16", 256), ("fp32", 128), ("fp32", 256))),
    ],
)
def test_attention_compiles_for_gpus(dtype, dim):
    """To machine code, through ptxas, no GPU needed; into the shared memory that consumer GPUs have."""
    lines = printed(COMPILE, dtype, dim)
    assert len(lines) == 16
    assert max(int(line[2]) for line in lines) <= SHARED, lines


def test_a_gpu_is_used_where_there_is_one():
    """conftest asks for the interpreter only where there is no GPU."""
    asked = "import os, sys; sys.path.insert(0, sys.argv[1]); import torch; torch.cuda.is_available = lambda: {}; "
    asked += "import conftest; print(os.environ.get('TRITON_INTERPRET'))"
    for available, wanted in ((True, "None"), (False, "1")):
        assert printed(asked.format(available), os.path.dirname(__file__)) == [[wanted]]
