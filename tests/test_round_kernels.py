"""The kernels of a round against their twins in plain torch: on a GPU where there is one, else interpreted.

Without a GPU they are compiled for real ones, too.
"""

from dataclasses import replace

import pytest
import torch
from uninterpreted import SHARED, printed

pytest.importorskip("triton")

from reasonalloc.cache.selection import Candidates, rank_candidates, select
from reasonalloc.kernels import compaction, launch, ranking, rkv, window
from reasonalloc.policies.allocation.heads import pooled_counts
from reasonalloc.policies.scoring import RKV, Noise, Observation, SnapKV
from reasonalloc.policies.scoring.tokens import LayerTokens, RaggedKeys

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
RUNS = pytest.mark.skipif(not (launch.INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")
FIRST, SECOND = 16, 32  # keys of the first two looks, in place of 128 and 512
THRESHOLD = 0.5


@pytest.fixture
def small(monkeypatch):
    """Small tiles, so that spans of a hundred tokens have several of everything."""
    monkeypatch.setattr(launch, "serve", lambda device: True)
    monkeypatch.setattr(rkv, "_FIRST", FIRST)
    monkeypatch.setattr(rkv, "_SECOND", SECOND)
    monkeypatch.setattr(rkv.SearchTile, "of", lambda keys: rkv.SearchTile(32, 16))
    for module in (rkv, window):
        monkeypatch.setattr(module, "tile_of", lambda keys: {"TILE": 32, "num_warps": 4})
    monkeypatch.setattr(rkv, "_SCORE_TILE", 64)
    monkeypatch.setattr(window, "_POOL_TILE", 64)
    monkeypatch.setattr(ranking, "_TILE", 16)
    monkeypatch.setattr(ranking, "_SELECT_TILE", 32)
    monkeypatch.setattr(ranking, "_COUNT_ENTRIES", 128)
    monkeypatch.setattr(compaction, "_TILE", 16)
    monkeypatch.setattr(compaction, "_NUMBERS", 16)
    monkeypatch.setattr(compaction, "_PROGRAMS", 2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- keys --------------------------------------------------------------------------------------------------


def make_keys(kind, batch, heads, width, dim, seed):
    """Padded keys. random: none has a near duplicate; half: 6 in 10 have one, the others none.

    walk: nearly all have one among the newest; the others, around rare centres, far back. Two keys around one centre
    have a cosine of about 0.67.
    """
    rng = seeded(seed)
    keys = torch.randn(batch, heads, width, dim, generator=rng)
    if kind == "random":
        return keys
    often = {"walk": [0.4, 0.4, *[0.04] * 5], "half": [0.2] * 5}[kind]
    centres = torch.randn(batch, heads, len(often), dim, generator=rng)
    which = torch.multinomial(torch.tensor(often), batch * heads * width, replacement=True, generator=rng)
    alike = centres.gather(2, which.view(batch, heads, width, 1).expand_as(keys)) + 0.7 * keys
    lonely = torch.rand(batch, heads, width, 1, generator=rng) < {"walk": 0.02, "half": 0.4}[kind]
    return torch.where(lonely, keys, alike)


def observe(
    kind="half", lengths=((90, 47, 75), (20, 96, 3)), dim=48, group=2, observed=8, dtype=torch.float32, seed=0,
    real=None, width=None, kept_window=8,
):  # fmt: skip
    """The same tokens twice: padded on the CPU, and ragged where the kernels run, between slots of other content."""
    lengths = torch.tensor(lengths)
    batch, heads = lengths.shape
    width = width or int(lengths.max())
    keys = make_keys(kind, batch, heads, width, dim, seed).to(dtype)
    queries = (2 * torch.randn(batch, heads * group, observed, dim, generator=seeded(seed + 1))).to(dtype)
    real = None if real is None else torch.tensor(real)
    absent = torch.arange(width) >= lengths[..., None]
    padded = torch.where(absent[..., None], 1e3, keys)
    least = torch.promote_types(dtype, torch.float32)
    order = torch.randperm(batch * heads, generator=seeded(seed + 2)).tolist()
    slots, starts = [torch.full((5, dim), -7.0)], torch.zeros(batch * heads, dtype=torch.long)
    for span in order:
        starts[span] = sum(map(len, slots))
        slots += [keys.flatten(0, 1)[span, : lengths.flatten()[span]].float(), torch.full((3, dim), 100.0)]
    positions = torch.arange(width).expand(batch, heads, -1)
    rest = {
        "scaling": 0.4, "window": kept_window, "generator": seeded(0), "budget": torch.full((batch,), 20.0),
        "noise": Noise(0, torch.arange(batch), torch.full((batch,), width)),
    }  # fmt: skip
    tokens = LayerTokens(padded.to(least), _never, lengths, positions)
    plain = Observation(tokens, queries.to(least), real, **rest)
    ragged = RaggedKeys(torch.cat(slots).to(dtype).to(DEVICE), starts.view(batch, heads).to(DEVICE))
    where = LayerTokens(_never, _never, lengths.to(DEVICE), _never, width=width, ragged=ragged)
    here = Observation(where, queries.to(DEVICE), None if real is None else real.to(DEVICE), **rest)
    return plain, here


def _never():
    raise AssertionError("nobody asked for padded tensors")


def left_after(plain, keys):
    """Per span, the share of its tokens that have no near duplicate among its newest ``keys``."""
    tokens, shares = plain.tokens, []
    for own, n in zip(tokens.keys.flatten(0, 1), tokens.lengths.flatten().tolist(), strict=True):
        unit = torch.nn.functional.normalize(own[:n], dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(0.0)
        shares.append(float((similarity[:, -keys:].amax(-1) <= THRESHOLD).float().mean()))
    return shares


def assert_scores(got, expected, tokens, tolerance=1e-5):
    """Equal but for rounding, and in the same order but for what rounding makes equal."""
    got, valid = got.cpu(), tokens.valid
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    scale = expected[valid].abs().max()
    torch.testing.assert_close(got[valid], expected[valid], rtol=tolerance, atol=tolerance * float(scale))
    ordered = expected.gather(-1, got.masked_fill(~valid, float("-inf")).argsort(-1, descending=True))
    for row, n in zip(ordered.flatten(0, 1), tokens.lengths.flatten().tolist(), strict=True):
        assert n < 2 or (row[1:n] - row[: n - 1]).max() <= 2 * tolerance * scale
    assert not got[~valid].any()


def kept_sets(scores, tokens, share=0.5):
    """Per span, its best tokens outside the window."""
    for row, n in zip(scores.cpu().flatten(0, 1), tokens.lengths.flatten().tolist(), strict=True):
        yield set(row[: max(0, n - 8)].topk(int(max(0, n - 8) * share)).indices.tolist())


# ---- R-KV ----------------------------------------------------------------------------------------------------


@RUNS
@pytest.mark.parametrize(
    ("kind", "changes", "scorer"),
    [
        ("walk", {}, {}),
        ("half", {"group": 3, "dim": 24, "real": [[True] * 8, [False] * 3 + [True] * 5]}, {}),
        ("random", {"group": 5, "observed": 3}, {"per_token": False}),
        ("half", {"lengths": ((96, 0, 5),), "width": 130}, {"kernel": 3, "weight": 0.0}),
        ("half", {"lengths": ((0, 1), (8, 60)), "observed": 5}, {"kernel": 1, "weight": 0.9}),
    ],
    ids=["walk", "half, missing queries", "random", "no importance", "short spans"],
)
def test_rkv(small, kind, changes, scorer):
    plain, here = observe(kind, **changes)
    scorer = RKV(threshold=THRESHOLD, **scorer)
    assert_scores(scorer.score(here), scorer.score(plain), plain.tokens)


def test_the_kinds_of_keys_take_all_ways():
    """Few left after the first look, of whom some find their near duplicate in the second, some later; or many left."""
    first, second, last = (torch.tensor(left_after(observe("walk")[0], n)) for n in (FIRST, FIRST + SECOND, 96))
    few = (first > 0) & (first <= 0.25)
    assert few.sum() >= 3
    assert (few & (second < first)).any()
    assert (few & (last < second)).any()
    assert all(share > 0.25 for share in left_after(observe("random")[0], FIRST))


@RUNS
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1), (torch.float16, 1)], ids=str)
def test_rkv_in_half_precision(small, dtype, most):
    """The sets that stay are those of the same keys in float32, but for ``most`` of their tokens."""
    plain, here = observe("half", dtype=dtype, seed=3)
    got, expected = (RKV(threshold=THRESHOLD).score(seen) for seen in (here, plain))
    pairs = zip(kept_sets(got, plain.tokens), kept_sets(expected, plain.tokens), strict=True)
    differing = [len(mine ^ theirs) for mine, theirs in pairs]
    assert sum(differing) <= 2 * most
    torch.testing.assert_close(got.cpu()[plain.tokens.valid], expected[plain.tokens.valid], rtol=1e-4, atol=1e-4)


@RUNS
def test_rkv_is_the_same_in_any_order_and_place(small):
    """Similarities are added as whole numbers: a row's scores do not depend on the rows beside it."""
    _, here = observe("half", seed=5)
    both = RKV().score(here)
    tokens, ragged = here.tokens, here.tokens.ragged
    for row in range(2):
        own = LayerTokens(
            _never, _never, tokens.lengths[row : row + 1], _never, width=tokens.width,
            ragged=RaggedKeys(ragged.keys, ragged.starts[row : row + 1]),
        )  # fmt: skip
        alone = RKV().score(replace(here, tokens=own, queries=here.queries[row : row + 1]))
        assert torch.equal(alone[0], both[row])


@RUNS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_keys_that_are_not_numbers_are_seen(small):
    """In the whole span, which the round then refuses; nowhere else."""
    for scorer in (RKV(), SnapKV()):
        _, here = observe("half", group=3)
        here.tokens.ragged.keys[int(here.tokens.ragged.starts[0, 1]) + 3, 2] = float("nan")
        got = scorer.score(here)
        assert got[0, 1].isnan().any()
        got[0, 1] = 0.0
        assert not got.isnan().any()


# ---- attention of the last queries -----------------------------------------------------------------------------


@RUNS
@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({"group": 1, "real": [[False] * 8, [False] * 7 + [True]]}, 1 << 15),
        ({"group": 6, "dim": 20, "observed": 16}, 64 * 32 * 4),  # 4 queries at a time
        ({"group": 8, "observed": 1, "lengths": ((70, 2), (0, 64)), "width": 140}, 1 << 15),
        ({"group": 2, "kept_window": 0, "observed": 3}, 1 << 15),
    ],
    ids=["missing queries", "blocks of queries", "short spans", "no window"],
)
def test_snapkv(small, monkeypatch, changes, room):
    monkeypatch.setattr(window, "_QUERY_BYTES", room)
    plain, here = observe("random", **changes)
    assert_scores(SnapKV(kernel=5).score(here), SnapKV(kernel=5).score(plain), plain.tokens)


@RUNS
def test_importance_alone_is_snapkv_times_length(small):
    plain, here = observe("random", lengths=((40, 33),))
    got = RKV(weight=1.0).score(here)
    assert torch.equal(got, SnapKV().score(here) * here.tokens.lengths[..., None])
    assert_scores(got, RKV(weight=1.0).score(plain), plain.tokens)


@pytest.mark.parametrize("changes", [{"dim": 260}, {"dtype": torch.float64}], ids=str)
def test_what_the_kernels_do_not_read_is_gathered(small, changes):
    """Keys wider than 256 channels, and such that are neither in half nor in single precision."""
    plain, here = observe("random", lengths=((12, 9),), **changes)
    tokens = LayerTokens(plain.tokens.keys, _never, plain.tokens.lengths, _never, ragged=here.tokens.ragged)
    for scorer in (RKV(), SnapKV()):
        assert torch.equal(scorer.score(replace(plain, tokens=tokens)), scorer.score(plain))


# ---- ranks, counts, selection ------------------------------------------------------------------------------------


def make_scores(batch=2, heads=3, width=70, distinct=None, seed=0):
    """Scores, with ``distinct`` many ties; all -inf in one head, as where a head holds nothing."""
    scores = torch.randn(batch, heads, width, generator=seeded(seed))
    return scores if distinct is None else (scores * distinct).round() / distinct


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_rank(small, dtype):
    lengths, protected = torch.tensor([[70, 0, 5], [33, 12, 64]]), torch.tensor([7, 0])
    scores = make_scores().to(dtype)
    if dtype.is_floating_point:
        scores[0, 0, :12:4], scores[0, 2, 3] = float("inf"), float("-inf")
        scores[1, 1, 20] = float("nan")  # absent
    index = torch.arange(70)
    valid = index < lengths[..., None]
    expected = rank_candidates(scores, valid, valid & (index >= lengths[..., None] - 8), protected).scores
    got, wrong = ranking.rank(scores.to(DEVICE), lengths.to(DEVICE), protected.to(DEVICE), 8)
    assert torch.equal(got.cpu(), expected)
    assert wrong.shape == ()
    assert wrong.dtype == torch.bool
    assert not wrong
    if dtype.is_floating_point:
        scores[1, 1, 11] = float("nan")
        got, wrong = ranking.rank(scores.to(DEVICE), lengths.to(DEVICE), protected.to(DEVICE), 8)
        assert wrong
        assert not got.isnan().any()


@RUNS
@pytest.mark.parametrize(("width", "distinct"), [(70, None), (70, 2), (5, 1), (1, None)], ids=str)
def test_pooled_counts(small, monkeypatch, width, distinct):
    scores = make_scores(batch=6, width=width, distinct=distinct)
    scores[0, 1], scores[1, :, ::2], scores[1, 0, 1:] = float("-inf"), float("inf"), -0.0
    scores[2], scores[2, 1] = 0.0, -0.0
    wanted = torch.tensor([1, 2, 3, 40, 3 * width, 3 * width + 9])
    got = pooled_counts(scores.to(DEVICE), wanted.to(DEVICE))
    monkeypatch.setattr(launch, "serve", lambda device: False)
    expected = pooled_counts(scores, wanted)
    assert got[0].dtype == torch.int64
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


@RUNS
@pytest.mark.parametrize("distinct", [None, 1], ids=["no ties", "ties"])
def test_select(small, monkeypatch, distinct):
    """Of a part of wider scores, as a round asks for; every width of a span, none kept and all kept among them."""
    lengths, protected = torch.tensor([[70, 40, 16], [33, 12, 64]]), torch.tensor([5, 0])
    scores = make_scores(width=90, distinct=distinct)
    index = torch.arange(90)
    valid = index < lengths[..., None]
    ranked = rank_candidates(scores, valid, valid & (index >= lengths[..., None] - 8), protected)
    budgets = torch.tensor([[20, 0, 100], [32, 12, 9]])

    def on(device):
        return Candidates(*(x.to(device) for x in (ranked.scores, ranked.lengths, ranked.protected)))

    got, kept = select(on(DEVICE).part(slice(0, 2), 70), budgets.to(DEVICE), by_score=False)
    monkeypatch.setattr(launch, "serve", lambda device: False)
    expected, wanted = select(ranked.part(slice(0, 2), 70), budgets, by_score=False)
    assert torch.equal(kept.cpu(), wanted)
    assert got.shape == expected.shape
    assert got.dtype == torch.int32
    got = got.cpu()
    stays = torch.arange(70) < wanted[..., None]
    assert torch.equal(got[stays].long(), expected[stays])
    assert not got[~stays].any()


# ---- survivors ---------------------------------------------------------------------------------------------------


def make_moves(spans, segments, seed):
    """Which tokens of each span stay; old and new layouts in the same slots, segment by segment.

    Returns index, kept, old starts, new starts, and the number of slots.
    """
    rng = seeded(seed)
    held = torch.randint(1, 60, (segments, spans), generator=rng)
    stay = (held * torch.rand(segments, spans, generator=rng)).round().long()
    stay[0, 0], stay[0, 1] = 0, held[0, 1]
    slots = held.sum(1) + 40

    def layout(counts):
        """Spans of so many tokens, the free slots anywhere between them."""
        free = (torch.rand(segments, spans, generator=rng).sort(-1).values * (slots - counts.sum(1))[:, None]).long()
        return ((slots.cumsum(0) - slots)[:, None] + counts.cumsum(1) - counts + free).flatten()

    old, new, kept = layout(held), layout(stay), stay.flatten()
    index = torch.zeros(len(kept), 64, dtype=torch.int32)
    for span, (n, k) in enumerate(zip(held.flatten().tolist(), kept.tolist(), strict=True)):
        index[span, :k] = torch.randperm(n, generator=rng)[:k].sort().values
    return index, kept, old, new, int(slots.sum())


def moved(memory, index, kept, old, new, source=None):
    """The plain copy."""
    out, source = memory.clone(), memory if source is None else source
    for span, k in enumerate(kept.tolist()):
        chosen = torch.arange(k) if index is None else index[span, :k].long()
        out[new[span] : new[span] + k] = source[old[span] + chosen]
    return out


def survivors_of(memory, kept, new):
    return torch.cat([memory.cpu()[start : start + k] for start, k in zip(new.tolist(), kept.tolist(), strict=True)])


def to_device(*tensors):
    return [None if x is None else x.to(DEVICE) for x in tensors]


def test_memories_of_two_dtypes_are_not_moved_by_one_program():
    """Keys and values under torch.autocast: the interpreter would not mind, a compiler does."""
    keys, values = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16)
    assert [a is b for a, b in compaction._pairs((keys, values))] == [True, True]
    assert [a is b for a, b in compaction._pairs((keys, values.float()))] == [False]


@RUNS
@pytest.mark.parametrize(
    ("spans", "segments", "dims", "dtype"),
    [(5, 3, (24, 24), torch.float32), (4, 2, (16, 5), torch.bfloat16), (7, 1, (64, 64), torch.float16)],
    ids=str,
)
def test_move_within(small, monkeypatch, spans, segments, dims, dtype):
    if dims[0] == 64:
        monkeypatch.setattr(compaction, "_PROGRAMS", 6)  # three parts of a token
    right = left = 0
    for seed in range(3):
        index, kept, old, new, slots = make_moves(spans, segments, seed)
        memories = tuple(torch.randn(slots, dim, generator=seeded(seed + i)).to(dtype) for i, dim in enumerate(dims))
        mine = to_device(*(x.clone() for x in memories))
        compaction.move_within(tuple(mine), *to_device(index, kept, old, new), spans)
        for got, memory in zip(mine, memories, strict=True):
            assert torch.equal(
                survivors_of(got, kept, new), survivors_of(moved(memory, index, kept, old, new), kept, new)
            )
        shift = [(new[s] + i - old[s] - index[s, i]).item() for s, k in enumerate(kept.tolist()) for i in range(k)]
        right += sum(x > 0 for x in shift)
        left += sum(x < 0 for x in shift)
    assert min(right, left) > 20, "the test moves tokens both ways"


def test_parts_of_a_token():
    """Whole tokens where segments are many; else as many channels as fill the device, 32 bytes at least."""
    assert compaction.part_of(128, 2, 4096) == 128
    assert compaction.part_of(128, 2, 132) == 64
    assert compaction.part_of(128, 2, 4) == 16
    assert compaction.part_of(80, 4, 60) == 16


@RUNS
@pytest.mark.parametrize("chosen", [True, False])
def test_copy_between(small, chosen):
    index, kept, old, new, slots = make_moves(5, 2, 11)
    source, target = (torch.randn(slots, 24, generator=seeded(i)) for i in (1, 2))
    index = index if chosen else None
    got = target.clone().to(DEVICE)
    compaction.copy_between(*to_device(source), got, *to_device(old, new, kept, index), int(kept.max()))
    assert torch.equal(got.cpu(), moved(target, index, kept, old, new, source))


@RUNS
@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "first ones"])
@pytest.mark.parametrize("elsewhere", [True, False], ids=["from elsewhere", "in place"])
def test_move_numbers(small, chosen, elsewhere):
    index, kept, old, new, slots = make_moves(5, 2, 12)
    index = index if chosen else None
    received, other = (torch.rand(slots, generator=seeded(i)) for i in (3, 4))
    got = received.clone().to(DEVICE)
    source = other if elsewhere else None
    compaction.move_numbers(got, *to_device(index, kept, old, new), 64, *to_device(source))
    assert torch.equal(got.cpu(), moved(received, index, kept, old, new, source))


@RUNS
@pytest.mark.parametrize("elsewhere", [True, False], ids=["from elsewhere", "in place"])
def test_positions_are_counted_where_none_are_stored(small, elsewhere):
    index, kept, old, new, slots = make_moves(5, 2, 13)
    memory, other = (torch.randint(1000, (slots,), generator=seeded(i), dtype=torch.int32) for i in (5, 6))
    settled = torch.randint(0, 40, (len(kept),), generator=seeded(7))
    first = torch.randint(-5, 500, (len(kept),), generator=seeded(8))
    source = other if elsewhere else None
    got = memory.clone().to(DEVICE)
    compaction.move_numbers(got, *to_device(index, kept, old, new), 64, *to_device(source, settled, first))
    expected = memory.clone()
    for span, k in enumerate(kept.tolist()):
        j = index[span, :k].long()
        stored = (memory if source is None else source)[(old[span] + j)].long()
        expected[new[span] : new[span] + k] = torch.where(j < settled[span], stored, first[span] + j).int()
    assert torch.equal(got.cpu(), expected)


# ---- lazy tokens -------------------------------------------------------------------------------------------------


def test_tokens_are_gathered_when_asked_for_and_once():
    asked = []

    def gather(name, *shape):
        def make():
            asked.append(name)
            return torch.zeros(shape)

        return make

    lengths = torch.tensor([[3, 5]])
    sources = [gather("keys", 1, 2, 5, 4), gather("values", 1, 2, 5, 4)]
    tokens = LayerTokens(*sources, lengths, gather("positions", 1, 2, 5), gather("received", 1, 2, 5), width=5)
    assert tokens.valid.sum() == 8
    assert tokens.newest(2).sum() == 4
    assert not asked
    for _ in range(2):
        assert tokens.positions.shape == tokens.received.shape == (1, 2, 5)
    assert asked == ["positions", "received"]
    with pytest.raises(ValueError, match="width is needed"):
        LayerTokens(*sources, lengths, gather("positions", 1, 2, 5))


# ---- on real GPUs ------------------------------------------------------------------------------------------------


COMPILE = """
import sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reasonalloc.kernels import compaction, ranking, rkv, window

name, dim = sys.argv[1], int(sys.argv[2])
keys = torch.empty(1, dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[name])
attention = window.WindowAttention.of(torch.empty(1, 8, 8, dim, dtype=keys.dtype), None, 2)
tile, search = window.tile_of(keys), rkv.SearchTile.of(keys)
warps = tile.pop("num_warps")
of_type, of_int64, of_int32 = f"*{name}", "*i64", "*i32"
types = {
    **dict.fromkeys(("keys", "queries", "first", "second"), of_type),
    **dict.fromkeys(("starts", "lengths", "kept", "protected", "k", "old_starts", "new_starts", "spared"), of_int64),
    **dict.fromkeys(("old", "new", "settled", "counted_from"), of_int64),
    **dict.fromkeys(("rest", "asking", "rest_counts", "asking_counts", "index", "counts", "wrong"), of_int32),
    **dict.fromkeys(("window", "stride", "tiles", "heads", "width", "spans", "parts", "programs"), "i32"),
    **dict.fromkeys(("scaling", "threshold", "weight"), "fp32"),
}
sizes = {**attention.sizes, **window.key_sizes(keys), **tile, "BLOCKS": attention.blocks, "WIDEN": False, "WEIGH": True}
searching = {**sizes, "ASKING": search.asking, "KEYS": search.asked, "LIMIT": 128, "SKIP": 128}
pooling = {"TILE": 1024, "KERNEL": 7, "PER_TOKEN": True, "WEIGH": True}
looks = (rkv._ask_newest, rkv._ask_all, rkv._ask_on)
kernels = [(kernel, searching, search.warps, search.stages, {}) for kernel in looks]
kernels += [(kernel, sizes, warps, 2, {}) for kernel in (rkv._scan, window._statistics, window._weigh)]
kernels += [(kernel, pooling, 4, 3, {}) for kernel in (rkv._score, window._pool, ranking._rank)]
kernels += [
    (ranking._count, {"HEADS": 8, "TILE": 2048}, 16, 3, {"counts": of_int64}),
    (ranking._select, {"TILE": 2048}, 4, 3, {}),
    (compaction._move, {"dim": dim, "PART": dim, "TILE": 64}, 4, 1, {}),
    (compaction._copy, {"dim": dim, "DIM": dim, "CHOSEN": True, "TILE": 64}, 4, 3,
     {"source": of_type, "target": of_type, "first": of_int64}),
    (compaction._gather, {"CHOSEN": True, "COUNTED": True, "PLACED": True, "TILE": 256}, 4, 3,
     {"source": of_int32, "target": of_int32}),
    (compaction._place, {"TILE": 256}, 4, 3, {}),
]
searches = [one for one in kernels if one[0] in (*looks, rkv._scan)]
for arch, (kernel, known, warps, stages, others) in [*((90, one) for one in kernels), *((80, one) for one in searches)]:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in known else {**types, **others}.get(n, "*fp32") for n in names}
    constants = {(i,): known[n] for i, n in enumerate(names) if n in known}
    options = {"num_warps": warps, "num_stages": stages}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source, target = ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32)
    code = compile(source, target=target, options=options)
    print(kernel.__name__, code.metadata.shared)
"""


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        ("bf16", 128),
        *(pytest.param(d, n, marks=pytest.mark.slow) for d, n in (("fp32", 128), ("bf16", 256), ("fp32", 256))),
    ],
)
def test_they_compile_for_gpus(dtype, dim):
    """To machine code, through ptxas, no GPU needed; into the shared memory that consumer GPUs have."""
    lines = printed(COMPILE, dtype, dim)
    assert len(lines) == 15 + 4, "all of them for Hopper, R-KV's largest for Ampere, too"
    assert max(int(line[1]) for line in lines) <= SHARED


@pytest.mark.skipif(launch.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, uninterpreted")
@pytest.mark.parametrize("kind", ["walk", "half", "random"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 64), (torch.bfloat16, 256)], ids=str)
def test_on_a_gpu(dtype, dim, kind):
    """As wide and long as models are, by the kernels' own choice of tiles."""
    plain, here = observe(kind, lengths=((1100, 300, 777), (9000, 64, 2048)), dim=dim, group=4, dtype=dtype)
    got, expected = (RKV().score(seen).cpu() for seen in (here, plain))
    pairs = list(zip(kept_sets(got, plain.tokens), kept_sets(expected, plain.tokens), strict=True))
    assert sum(len(mine ^ theirs) for mine, theirs in pairs) <= max(2, sum(len(mine) for mine, _ in pairs) // 500)
    assert_scores(SnapKV().score(here), SnapKV().score(plain), plain.tokens, 1e-3)
    ranked, wrong = ranking.rank(
        got.to(DEVICE), here.tokens.lengths, torch.zeros(2, dtype=torch.long, device=DEVICE), 8
    )
    assert not wrong
    wanted = torch.tensor([900, 4000])
    counts, thresholds = pooled_counts(ranked, wanted.to(DEVICE))
    expected_counts, expected_thresholds = pooled_counts(ranked.cpu(), wanted)
    assert torch.equal(counts.cpu(), expected_counts)
    assert torch.equal(thresholds.cpu(), expected_thresholds)
    budgets = torch.minimum(counts, here.tokens.lengths)
    candidates = Candidates(ranked, here.tokens.lengths, torch.tensor([3, 0], device=DEVICE))
    index, kept = select(candidates, budgets - 1, by_score=False)
    on_cpu = Candidates(ranked.cpu(), plain.tokens.lengths, torch.tensor([3, 0]))
    expected_index, expected_kept = select(on_cpu, budgets.cpu() - 1, by_score=False)
    assert torch.equal(kept.cpu(), expected_kept)
    stays = torch.arange(ranked.shape[-1]) < expected_kept[..., None]
    assert torch.equal(index.cpu()[stays].long(), expected_index[stays])
