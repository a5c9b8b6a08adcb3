"""The attention kernels against float64: on a GPU where there is one, else by Triton's interpreter (see conftest)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorers import HIDDEN, assert_received, make_spans, randn

pytest.importorskip("triton")

from reasonalloc.cache.attention import BACKENDS, attend_rows, received_attention, triton_backend
from reasonalloc.cache.spans import Spans
from reasonalloc.kernels import chunk_attention, decode_attention
from reasonalloc.kernels.chunk_attention import Blocks, blocks_for
from reasonalloc.kernels.chunks import BEYOND, ChunkTable, most_chunks
from reasonalloc.kernels.decode_attention import Tuning, tuning_for
from reasonalloc.kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = Tuning(chunk=16, tile=16, warps=4, stages=2, fused=False)
LENGTHS = np.array([[1, 70], [0, 33], [0, 96]])  # none to six chunks of 16; the last empty span has no slot either
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-5, F16: 4e-3, BF16: 2e-2}
runs = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and no interpreter asked for")
no_gpu = INTERPRETED or not torch.cuda.is_available()


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="needs a GPU, uninterpreted")(test))


fused = pytest.mark.parametrize("fused", [False, True], ids=["joined", "fused"])


def reference(query, tokens, scaling, hidden=None):
    """Output and added weights in float64. Padding has no output (NaN) and adds nothing; an empty span gives zeros."""
    rows, query_heads, queries, _ = query.shape
    heads, longest = tokens.keys.shape[1:3]
    unseen = torch.zeros(rows, queries, dtype=torch.int64) if hidden is None else hidden
    lengths = tokens.lengths[:, :, None]
    sees = torch.minimum((lengths - unseen.clamp(min=0)[:, None]).clamp(min=1), lengths)
    q = query.double().view(rows, heads, -1, queries, query.shape[-1])
    logits = torch.einsum("rhgqd,rhtd->rhgqt", q, tokens.keys.double()) * scaling
    logits = logits.masked_fill((torch.arange(longest) >= sees[..., None])[:, :, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    out = torch.einsum("rhgqt,rhtd->rhgqd", weights, tokens.values.double())
    padding = (unseen < 0)[:, None, None, :, None]
    added = weights.masked_fill(padding, 0.0).sum((2, 3))
    return out.masked_fill(padding, torch.nan).reshape(rows, query_heads, queries, -1), added


def assert_output(got, want, tolerance):
    defined = ~want.isnan()
    torch.testing.assert_close(got.cpu().double()[defined], want[defined], rtol=tolerance, atol=tolerance)


def cut(spans, chunk, slack=0):
    """The spans' chunk table, with room for any other split of the slots."""
    return ChunkTable.of(capacities_of(spans), chunk, len(spans.keys) + slack)


def capacities_of(spans):
    """They lie one behind the other."""
    first = spans.starts_device
    return torch.cat([first.flatten()[1:], first.new_full((1,), len(spans.keys))]).view_as(first) - first


def attend(query, spans, scaling, chunks, tuning):
    out = decode_attention.attend(
        query.to(spans.keys.device), spans.keys, spans.values, spans.starts_device, spans.lengths_device, chunks,
        tuning, scaling, spans.received, spans.received_starts_device,
    )  # fmt: skip
    assert out.dtype == query.dtype
    assert not chunks.arrived.any(), "left as it was found"
    return out


# ---- one query a row ----


@runs
@fused
@pytest.mark.parametrize(
    ("dtype", "group", "dim", "value_dim", "chunk", "tile"),
    [
        (F32, 1, 6, 5, 16, 16),
        (F32, 3, 24, 24, 32, 16),
        (F32, 4, 64, 64, 64, 32),
        (F32, 8, 6, 24, 16, 16),
        (F32, 1, 256, 256, 32, 32),
        (F32, 17, 6, 5, 512, 64),
        (F16, 4, 24, 24, 16, 16),
        (BF16, 3, 64, 64, 32, 32),
        (BF16, 1, 6, 5, 16, 16),
    ],
    ids=str,
)
def test_one_query(dtype, group, dim, value_dim, chunk, tile, fused):
    spans, tokens = make_spans(dtype, lengths=LENGTHS, dim=dim, value_dim=value_dim, device=DEVICE)
    query = randn(860, 3, 2 * group, 1, dim).to(dtype)
    out, added = reference(query, tokens, dim**-0.5)
    tuning = replace(SMALL, chunk=chunk, tile=tile, fused=fused)
    got = attend(query, spans, dim**-0.5, cut(spans, chunk).layer(0), tuning)
    assert_output(got, out, TOLERANCE[dtype])
    assert not got[1:, :group].any(), "an empty span gives zeros"
    assert_received(spans, tokens, added, TOLERANCE[dtype])


@runs
@fused
def test_more_chunks_than_are_joined_at_once(fused):
    lengths = np.array([[300, 2]])
    spans, tokens = make_spans(F32, False, lengths=lengths, device=DEVICE)
    query = randn(861, 1, 4, 1, 6).float()
    out, _ = reference(query, tokens, 0.6)
    assert_output(attend(query, spans, 0.6, cut(spans, 16).layer(0), replace(SMALL, fused=fused)), out, 2e-5)


@runs
@fused
def test_large_logits_and_chunks_without_tokens(fused):
    spans, tokens = make_spans(F32, lengths=LENGTHS, room=40, device=DEVICE)
    query = 100 * randn(862, 3, 4, 1, 6).float()
    out, added = reference(query, tokens, 1.0)
    assert_output(attend(query, spans, 1.0, cut(spans, 16).layer(0), replace(SMALL, fused=fused)), out, 1e-3)
    assert_received(spans, tokens, added, 1e-3)


@runs
@fused
def test_a_table_is_filled_in_place(fused):
    """As for a CUDA graph: the same tensors serve spans that have moved, and every layer."""
    first, tokens = make_spans(F32, lengths=LENGTHS, device=DEVICE)
    second, moved = make_spans(F32, lengths=LENGTHS[::-1, ::-1] + 1, room=30, device=DEVICE)
    query, tuning = randn(863, 3, 4, 1, 6).float(), replace(SMALL, fused=fused)
    table = ChunkTable(2, 6, 16, len(second.keys), torch.device(DEVICE))
    layers = [table.layer(0), table.layer(1)]
    assert (layers[0].offsets == BEYOND).all(), "nothing is cut yet"
    for order in ([first, second], [second, first]):
        table.fill(torch.stack([capacities_of(spans) for spans in order]))
        for chunks, spans in zip(layers, order, strict=True):
            out, _ = reference(query, tokens if spans is first else moved, 0.6)
            assert_output(attend(query, spans, 0.6, chunks, tuning), out, 2e-5)


@runs
def test_the_backend_makes_what_it_was_not_given():
    backend = BACKENDS["triton"]()
    spans, tokens = make_spans(F32, lengths=LENGTHS * 3, device=DEVICE)
    total = 0.0
    for step in range(2):
        query = randn(864 + step, 3, 4, 1, 6).float()
        out, added = reference(query, tokens, 0.6)
        if step:
            table = backend.table(1, 3, 2, len(spans.keys), torch.device(DEVICE))
            table.fill(capacities_of(spans))
            spans = replace(spans, chunks=table.layer(0))
        assert_output(backend.attend(query.to(DEVICE), spans, 0.6), out, 2e-5)
        total = total + added
    assert_received(spans, tokens, total, 2e-5)


def test_only_kernels_want_a_table():
    for name in ("rows", "compiled"):
        if name == "compiled":
            pytest.importorskip("numba")
        backend = BACKENDS[name]()
        assert backend.table(2, 3, 4, 100, torch.device("cpu")) is None
        assert (backend.attend_chunk, backend.receive_chunk) == (attend_rows, received_attention)


def test_the_tuning_follows_the_spans():
    few, some, many = (tuning_for(spans, 128, 128, 2) for spans in (64, 256, 512))
    assert few == Tuning(chunk=256, tile=64, warps=2, stages=3, fused=False)
    assert some == Tuning(chunk=256, tile=64, warps=4, stages=2, fused=True)
    assert many == Tuning(chunk=512, tile=64, warps=4, stages=2, fused=True)
    assert [tuning_for(64, n, n, size).tile for n, size in ((64, 2), (256, 2), (128, 4), (256, 4))] == [64, 32, 32, 16]
    with pytest.raises(ValueError, match="2048 and 2048 channels are too wide"):
        tuning_for(64, 2048, 2048, 4)
    with pytest.raises(ValueError, match="too wide"):
        blocks_for(100, 2048, 2048, 4)


def test_chunks_of_another_size_are_refused():
    spans, _ = make_spans(F32)
    with pytest.raises(ValueError, match="chunks of 32 slots, and kernels for chunks of 16"):
        attend(randn(865, 3, 4, 1, 6).float(), spans, 0.6, cut(spans, 32).layer(0), SMALL)


# ---- the table ----


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_cover_every_slot_once(data):
    """Whatever the split; and never more than there is room for."""
    layers, rows, heads, chunk = (data.draw(st.integers(1, most)) for most in (3, 3, 3, 20))
    sizes = st.lists(st.integers(0, 70), min_size=layers * rows * heads, max_size=layers * rows * heads)
    capacities = torch.tensor(data.draw(sizes)).view(layers, rows, heads)
    slots = int(capacities.sum((1, 2)).max()) + data.draw(st.sampled_from([0, 50]))
    most = most_chunks(slots, rows * heads, chunk)
    table = ChunkTable.of(capacities, chunk, slots)
    for layer in range(layers):
        chunks, own = table.layer(layer), capacities[layer].flatten().tolist()
        used = int(chunks.first[-1])
        assert used <= most == len(chunks.rows)
        covered = [[] for _ in own]
        for row, offset in zip(chunks.rows[:used].tolist(), chunks.offsets[:used].tolist(), strict=True):
            covered[row] += range(offset, min(offset + chunk, own[row]))
        assert covered == [list(range(n)) for n in own]
        assert chunks.first[:-1].tolist() == torch.nonzero(chunks.offsets[:used] == 0).flatten().tolist()
        assert not chunks.rows[used:].any()
        assert (chunks.offsets[used:] == BEYOND).all()
        assert {x.dtype for x in (chunks.rows, chunks.offsets, chunks.first, chunks.arrived)} == {torch.int32}


def test_fewer_spans_than_the_table_is_made_for():
    """A server's requests: as many slots each, and not all of them decode."""
    table = ChunkTable(2, 8, 16, 4 * 50, torch.device("cpu"))
    for rows in (3, 4, 1):
        first = torch.randint(0, 51, (2, rows))
        capacities = torch.stack([first, 50 - first], 2)
        table.fill(capacities)
        alone = ChunkTable.of(capacities, 16, rows * 50)
        for layer in range(2):
            some, own = table.layer(layer, rows * 2), alone.layer(layer)
            assert all(getattr(some, x).equal(getattr(own, x)) for x in ("rows", "offsets", "first", "arrived"))
            assert some.rows.data_ptr() == table.layer(layer).rows.data_ptr()


def test_the_bound_is_reached():
    """Spans of one slot more than whole chunks need every chunk of it."""
    capacities = torch.tensor([[17, 1, 33]])
    table = ChunkTable.of(capacities, 16, 51)
    assert table.first.tolist() == [[0, 2, 3, 6]]
    assert table.rows.tolist() == [[0, 0, 1, 2, 2, 2]]


# ---- several queries a row ----


def attend_chunk(query, spans, scaling, hidden, blocks):
    arguments = (x.to(DEVICE) for x in (query, hidden))
    query, hidden = arguments
    where = (spans.starts_device, spans.lengths_device, hidden, blocks, scaling)
    out = chunk_attention.attend_chunk(query, spans.keys, spans.values, *where)
    if spans.received is not None:
        places = spans.received_starts_device
        chunk_attention.receive_chunk(query, spans.keys, *where, spans.received, places, spans.longest)
    return out


def later(real):
    """What each query must not see of a chunk with padding where ``real`` is False."""
    return (real.sum(-1, keepdim=True) - real.cumsum(-1)).masked_fill(~real, -1)


@runs
@pytest.mark.parametrize(
    ("dtype", "group", "dim", "value_dim", "blocks"),
    [
        (F32, 1, 6, 5, Blocks(16, 16)),
        (F32, 3, 24, 24, Blocks(16, 32)),
        (F32, 4, 64, 64, Blocks(64, 32)),
        (F32, 8, 6, 24, Blocks(32, 64)),
        (F32, 1, 256, 256, Blocks(32, 16)),
        (F16, 4, 24, 24, Blocks(32, 16)),
        (BF16, 3, 64, 64, Blocks(32, 32)),
    ],
    ids=str,
)
def test_a_chunk(dtype, group, dim, value_dim, blocks):
    """Padding before, between and nowhere; an empty span; spans that are shorter than their chunk."""
    lengths = np.array([[90, 30], [21, 70], [0, 5]])
    spans, tokens = make_spans(dtype, lengths=lengths, dim=dim, value_dim=value_dim, device=DEVICE)
    real = torch.ones(3, 21, dtype=torch.bool)
    real[1, :5] = real[2, 1::3] = False
    query = randn(870, 3, 2 * group, 21, dim)
    query = torch.where(real[:, None, :, None], query, 1e3 * query).to(dtype)
    out, added = reference(query, tokens, dim**-0.5, later(real))
    got = attend_chunk(query, spans, dim**-0.5, later(real), blocks)
    assert got.dtype == dtype
    assert got.isfinite().all(), "padding has no meaning, but harms nobody"
    assert not got[2, :group].any(), "an empty span gives zeros"
    assert_output(got, out, TOLERANCE[dtype])
    assert_received(spans, tokens, added, TOLERANCE[dtype] * (1 if dtype == F32 else 10))


@runs
def test_a_chunk_as_the_twin():
    """By the backend's own choice of blocks; queries as a model gives them, and hidden tokens that many rows share."""
    lengths = np.array([[13, 5], [5, 12], [8, 10]])
    spans, twin = (make_spans(F32, lengths=lengths, device=device)[0] for device in (DEVICE, "cpu"))
    query = randn(871, 3, 5, 4, 6).float().transpose(1, 2)
    backend = BACKENDS["triton"]()
    for hidden in (HIDDEN, torch.arange(4, -1, -1).expand(3, -1), torch.full((3, 5), -1)):
        want = attend_rows(query, twin, 0.6, hidden)
        got = backend.attend_chunk(query.to(DEVICE), spans, 0.6, hidden.to(DEVICE)).cpu()
        real = (hidden >= 0)[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[real], want[real], rtol=2e-5, atol=2e-5)
        received_attention(query, twin, 0.6, hidden)
        backend.receive_chunk(query.to(DEVICE), spans, 0.6, hidden.to(DEVICE))
        torch.testing.assert_close(spans.received.cpu(), twin.received, rtol=2e-5, atol=2e-5)


@runs
def test_tiles_that_no_query_sees_are_not_read():
    lengths = np.array([[96, 80]])
    spans, tokens = make_spans(F32, lengths=lengths, device=DEVICE)
    query, hidden = randn(872, 1, 4, 3, 6).float(), torch.tensor([[70, 65, 64]])
    out, added = reference(query, tokens, 0.6, hidden)
    for start, length in zip(spans.on_host[0][0], lengths[0], strict=True):
        unseen = slice(start + (length - 64 + 15) // 16 * 16, start + length)
        spans.keys[unseen] = spans.values[unseen] = torch.nan
    assert_output(attend_chunk(query, spans, 0.6, hidden, Blocks(16, 16)), out, 2e-5)
    assert_received(spans, tokens, added, 2e-5)


# ---- on a GPU, at real sizes ----


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "dim", "rows"),
    [
        *((F32, 64, 2), (F16, 128, 2), (BF16, 128, 2), (BF16, 256, 2), (F32, 256, 2)),
        *((BF16, 128, 24), (BF16, 128, 64), (F32, 64, 64)),
    ],
    ids=str,
)
def test_kernels_at_real_sizes(dtype, dim, rows):
    """By the kernels' own tuning, for few, some and many spans; then a chunk of several tokens."""
    backend = BACKENDS["triton"]()
    lengths = np.random.default_rng(0).integers(0, 1500, (rows, 8))
    spans, tokens = make_spans(dtype, lengths=lengths, dim=dim, value_dim=dim, device="cuda")
    query = randn(880, rows, 32, 1, dim).to(dtype)
    out, added = reference(query, tokens, dim**-0.5)
    assert_output(backend.attend(query.cuda(), spans, dim**-0.5), out, TOLERANCE[dtype])
    assert_received(spans, tokens, added, TOLERANCE[dtype])
    if rows == 2:
        spans, tokens = make_spans(dtype, lengths=lengths, dim=dim, value_dim=dim, device="cuda")
        query, hidden = randn(881, rows, 32, 70, dim).to(dtype), torch.arange(69, -1, -1).expand(rows, -1)
        out, added = reference(query, tokens, dim**-0.5, hidden)
        assert_output(backend.attend_chunk(query.cuda(), spans, dim**-0.5, hidden.cuda()), out, TOLERANCE[dtype])
        backend.receive_chunk(query.cuda(), spans, dim**-0.5, hidden.cuda())
        assert_received(spans, tokens, added, TOLERANCE[dtype] * (5 if dtype == F32 else 20))


@on_gpu
@pytest.mark.parametrize("rows", [4, 80])
def test_a_graph_outlives_the_spans(rows):
    """Captured once; lengths, starts and the table are filled in place between replays."""
    backend, rng = BACKENDS["triton"](), np.random.default_rng(1)
    device, slots = torch.device("cuda"), rows * 8 * 700
    keys, values = torch.randn(2, slots, 128, device=device, dtype=BF16)
    starts, lengths = torch.zeros(2, rows, 8, dtype=torch.int64, device=device)
    table = backend.table(1, rows, 8, slots, device)
    query = torch.randn(rows, 32, 1, 128, device=device, dtype=BF16)
    spans = Spans(keys, values, None, starts, lengths, starts, slots, table.layer(0))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backend.attend(query, spans, 0.1)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = backend.attend(query, spans, 0.1)
    for _ in range(3):
        share = rng.dirichlet(np.ones(rows * 8)).reshape(rows, 8)
        capacities = 2 + (share * (slots - 16 * rows)).astype(np.int64)
        ends = capacities.cumsum().reshape(rows, 8)
        moved = Spans.of(keys, values, None, ends - capacities, capacities // 2)
        starts.copy_(moved.starts_device)
        lengths.copy_(moved.lengths_device)
        table.fill(torch.from_numpy(capacities).to(device))
        graph.replay()
        torch.testing.assert_close(out, backend.attend(query, moved, 0.1), rtol=0, atol=0)
        want = attend_rows(query.float(), replace(moved, keys=keys.float(), values=values.float()), 0.1)
        torch.testing.assert_close(out.float(), want.nan_to_num(0.0), rtol=2e-2, atol=2e-2)


@on_gpu
def test_filling_does_not_wait():
    table = triton_backend.make_table(4, 8, 8, 64 * 1000, torch.device("cuda"))
    capacities = torch.randint(0, 1000, (4, 8, 8), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        table.fill(capacities)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_slots_beyond_31_bits():
    """The last spans of a pool with more than 2**31 numbers."""
    slots = (1 << 31) // 128 + 3000
    if torch.cuda.mem_get_info()[0] < 3 * slots * 128 * 2:
        pytest.skip("needs 13 GB of memory")
    keys = torch.zeros(slots, 128, dtype=BF16, device="cuda")
    keys[-3000:].normal_()
    starts, lengths = slots - np.array([[3000, 1200]]), np.array([[1700, 1200]])
    spans = Spans.of(keys, keys, None, starts, lengths)
    backend, query = BACKENDS["triton"](), torch.randn(1, 8, 5, 128, dtype=BF16, device="cuda")
    hidden = torch.arange(4, -1, -1, device="cuda")[None]
    for got, want in (
        (backend.attend(query[:, :, :1], spans, 0.1), attend_rows(query[:, :, :1], spans, 0.1)),
        (backend.attend_chunk(query, spans, 0.1, hidden), attend_rows(query, spans, 0.1, hidden)),
    ):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
