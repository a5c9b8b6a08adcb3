"""Every scorer, and the attention that H2O accumulates, against slow loops in plain Python floats.

The references are written from the definitions (design notes and class docstrings), one (sequence, head) at a
time, and share no code with the package. Inputs are continuous random numbers, so nothing ties but by max
pooling; what lies past ``lengths``, and queries that are padding, is garbage that ruins any score it enters.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import reasonalloc
from reasonalloc.cache.attention import BACKENDS, attend_rows, received_attention
from reasonalloc.cache.selection import rank_candidates, select
from reasonalloc.cache.spans import Spans
from reasonalloc.policies.scoring import (
    H2O,
    RKV,
    SCORERS,
    TOVA,
    Knorm,
    Noise,
    Observation,
    QueryFreeVaSE,
    Random,
    SnapKV,
    StreamingLLM,
    VaSE,
)
from reasonalloc.policies.scoring.rkv import counted_similarity
from reasonalloc.policies.scoring.tokens import LayerTokens

# Long and short heads, a head with fewer tokens than its sequence has queries, and an empty sequence.
LENGTHS = [[17, 9], [12, 14], [3, 11], [2, 1], [0, 0]]
REAL = [6, 4, 6, 2, 0]  # of 6 observed queries; the older ones are padding
QUERIES = 6
BUDGETS = [13.7, 8.0, 6.0, 21.3, 4.0]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
GROUPS = pytest.mark.parametrize("group", [1, 2, 3])
WINDOWS = pytest.mark.parametrize("window", [0, 3, QUERIES, 9])  # none; under, as many as and over the queries


# ---- inputs ------------------------------------------------------------------------------------------------


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def observe(seed=0, *, group=2, dtype=torch.float32, window=3, dim=8, value_dim=5, garbage=1, keys=None, **changes):
    """A ragged observation; the same for the same seed but for its garbage."""
    lengths = torch.tensor(LENGTHS)
    batch, heads = lengths.shape
    n = int(lengths.max()) + 3  # even the longest head has entries that are not tokens
    absent = torch.arange(n) >= lengths[..., None]

    def filled(x, i):
        noise = 1e3 * randn(1000 * garbage + i, *x.shape)
        return torch.where(absent.reshape(*absent.shape, *[1] * (x.dim() - 3)), noise, x)

    keys = randn(seed + 1, batch, heads, n, dim) if keys is None else keys
    values = randn(seed + 2, batch, heads, n, value_dim)
    received = randn(seed + 3, batch, heads, n).abs()
    # Positions have gaps, other ones in every head, as after evictions.
    positions = torch.rand(batch, heads, 25, generator=rng(seed + 4)).argsort(-1)[..., :n].double().sort(-1).values
    tokens = LayerTokens(
        filled(keys, 1).to(dtype),
        filled(values, 2).to(dtype),
        lengths,
        filled(positions, 3).to(torch.int32),
        filled(received, 4).float(),
    )
    queries = randn(seed + 5, batch, heads * group, QUERIES, keys.shape[-1])
    real = torch.arange(QUERIES) >= QUERIES - torch.tensor(REAL)[:, None]
    queries = queries.where(real[:, None, :, None], 1e3 * randn(1000 * garbage + 5, *queries.shape)).to(dtype)
    budget = torch.tensor(BUDGETS)
    noise = Noise(seed + 6, torch.arange(batch), lengths.amax(-1))
    seen = Observation(tokens, queries, real, 0.7, window, budget, noise, rng(seed + 7))
    return replace(seen, **changes)


def changed(tokens, **changes):
    """The same tokens, some of their tensors replaced."""
    names = ("keys", "values", "lengths", "positions", "received")
    return LayerTokens(**{name: changes.get(name, getattr(tokens, name)) for name in names})


def keys_with_duplicates(seed=0, dim=24, length=20):
    """Keys of which some share a mean vector (near duplicates); each other one has a direction of its own."""
    batch, heads = len(LENGTHS), len(LENGTHS[0])
    noise = randn(seed + 11, batch, heads, length, dim)
    means = torch.cat([randn(seed + 12, batch, heads, 2, 8), torch.zeros(batch, heads, 2, dim - 8).double()], -1)
    member = torch.randint(0, 3, (batch, heads, length), generator=rng(seed + 13))  # 2: no cluster
    keys = torch.zeros(batch, heads, length, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            alone = 0
            for t in range(length):
                if (which := int(member[b, h, t])) < 2:
                    keys[b, h, t] = 1.5 * means[b, h, which] + 0.3 * noise[b, h, t]
                else:
                    keys[b, h, t] = 0.15 * noise[b, h, t]
                    keys[b, h, t, 8 + alone % (dim - 8)] += 2.0
                    alone += 1
    return keys


@dataclass
class Row:
    """One (sequence, head) in Python numbers, without its padding."""

    keys: list
    values: list
    positions: list
    queries: list  # [group][query][dim]
    real: list
    scaling: float
    window: int
    budget: float

    @property
    def candidates(self):
        """Tokens outside the window."""
        return range(max(len(self.keys) - self.window, 0))


def read(seen, b, h):
    tokens, n = seen.tokens, int(seen.tokens.lengths[b, h])
    queries, real = [], []
    if seen.queries is not None:
        group = seen.queries.shape[1] // tokens.keys.shape[1]
        queries = seen.queries[b, h * group : (h + 1) * group].double().tolist()
        real = [True] * seen.queries.shape[2] if seen.real_queries is None else seen.real_queries[b].tolist()
    return Row(
        tokens.keys[b, h, :n].double().tolist(),
        tokens.values[b, h, :n].double().tolist(),
        tokens.positions[b, h, :n].tolist(),
        queries,
        real,
        seen.scaling,
        seen.window,
        float(seen.budget[b]),
    )


def rows(seen):
    for b in range(seen.tokens.keys.shape[0]):
        for h in range(seen.tokens.keys.shape[1]):
            yield b, h, read(seen, b, h)


# ---- references --------------------------------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    """Of a dict from column to logit."""
    if not logits:
        return {}
    top = max(logits.values())
    powers = {t: math.exp(x - top) for t, x in logits.items()}
    total = sum(powers.values())
    return {t: x / total for t, x in powers.items()}


def existed(row, q):
    """Candidates that were there when query ``q`` was made: each query sees itself, and nothing newer."""
    newer = len(row.real) - 1 - q
    return [t for t in row.candidates if t < len(row.keys) - newer]


def ref_importance(row, kernel=7):
    """R-KV: maximum over the group before the softmax, mean over queries, running maximum over candidates."""
    mean = [0.0 for _ in row.candidates]
    for q, real in enumerate(row.real):
        if not real:
            continue
        logits = {t: max(dot(head[q], row.keys[t]) for head in row.queries) * row.scaling for t in existed(row, q)}
        for t, weight in softmax(logits).items():
            mean[t] += weight / sum(row.real)
    reach = kernel // 2
    return [max(mean[max(t - reach, 0) : t + reach + 1]) for t in row.candidates]


def cosines(row):
    """Cosine matrix of a head's keys, diagonal zeroed."""
    norms = [max(math.sqrt(dot(k, k)), 1e-8) for k in row.keys]
    n = len(row.keys)
    return [
        [0.0 if i == j else dot(row.keys[i], row.keys[j]) / norms[i] / norms[j] for j in range(n)] for i in range(n)
    ]


def ref_redundancy(row, threshold=0.5):
    """R-KV: softmax of the column means of the cosine matrix; each row's last similar column set to zero."""
    matrix, n = cosines(row), len(row.keys)
    # A cosine next to the threshold would make the outcome a matter of rounding, not of the definition.
    assert all(abs(c - threshold) > 1e-5 for line in matrix for c in line)
    for line in matrix:
        hits = [j for j in range(n) if line[j] > threshold]
        if hits:
            line[hits[-1]] = 0.0
    return softmax({j: sum(line[j] for line in matrix) / n for j in range(n)})


def ref_rkv(row, weight=0.1, threshold=0.5, kernel=7, per_token=True):
    importance, redundancy = ref_importance(row, kernel), ref_redundancy(row, threshold)
    scale = len(row.keys) if per_token else 1
    return [scale * (weight * importance[t] - (1 - weight) * redundancy[t]) for t in row.candidates]


def ref_probability(row, kernel=5):
    """VaSE: softmax per query head, mean over queries, average pool (zeros at both ends), group mean."""
    reach = kernel // 2
    total = [0.0 for _ in row.candidates]
    for head in row.queries:
        mean = [0.0 for _ in row.candidates]
        for q, real in enumerate(row.real):
            if not real:
                continue
            logits = {t: dot(head[q], row.keys[t]) * row.scaling for t in existed(row, q)}
            for t, weight in softmax(logits).items():
                mean[t] += weight / sum(row.real)
        for t in row.candidates:
            total[t] += sum(mean[max(t - reach, 0) : t + reach + 1]) / kernel
    return [x / len(row.queries) for x in total]


def ref_protected(row, sinks=4, protected=0.25):
    """VaSE: the candidates that are always kept, first ones first: sinks, then values of largest range."""

    def range_of(t):
        return math.inf if row.positions[t] < sinks else max(row.values[t]) - min(row.values[t])

    ranked = sorted(row.candidates, key=lambda t: (-range_of(t), t))
    return ranked[: math.floor(protected * row.budget)]


def assert_scores(got, seen, reference, dtype=torch.float32):
    """Scores of all candidates; the window's are free, for it is kept whatever its score."""
    assert got.shape == seen.tokens.keys.shape[:3]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    compared = 0
    for b, h, row in rows(seen):
        want = reference(row)
        torch.testing.assert_close(
            got[b, h, : len(want)].double(),
            torch.tensor(want, dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, where=(b, h): f"sequence and head {where}: {text}",
        )
        compared += len(want)
    assert compared > 10, "the case leaves nothing to compare"


# ---- R-KV and SnapKV ---------------------------------------------------------------------------------------


@DTYPES
@GROUPS
@WINDOWS
def test_snapkv(dtype, group, window):
    seen = observe(window, group=group, dtype=dtype, window=window)
    assert_scores(SnapKV().score(seen), seen, ref_importance, dtype)


@pytest.mark.parametrize("kernel", [1, 3, 31])
def test_snapkv_kernel(kernel):
    seen = observe(20)
    assert_scores(SnapKV(kernel).score(seen), seen, lambda row: ref_importance(row, kernel))


@DTYPES
@GROUPS
@WINDOWS
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_rkv(dtype, group, window, per_token, weight):
    seen = observe(30, group=group, dtype=dtype, window=window, keys=keys_with_duplicates(window))
    got = RKV(weight=weight, per_token=per_token).score(seen)
    assert_scores(got, seen, lambda row: ref_rkv(row, weight, per_token=per_token), dtype)


@pytest.mark.parametrize("window", [0, 3, QUERIES, 9])
def test_rkv_inputs_have_near_duplicates_and_lone_keys(window):
    # Otherwise the tests around would not notice a wrong rule for duplicates, or for keys without any.
    seen = observe(30, keys=keys_with_duplicates(window))
    for _, _, row in rows(seen):
        if len(row.keys) > 8:
            hits = [sum(c > 0.5 for c in line) for line in cosines(row)]
            assert min(hits) == 0, "every key has a duplicate"
            assert max(hits) > 1, "no key has several duplicates to choose the newest of"


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.9])
def test_rkv_threshold(threshold):
    seen = observe(40, keys=keys_with_duplicates(3))
    got = RKV(weight=0.0, threshold=threshold).score(seen)
    assert_scores(got, seen, lambda row: ref_rkv(row, 0.0, threshold))


@pytest.mark.parametrize("kernel", [1, 5])
def test_rkv_kernel(kernel):
    seen = observe(50, keys=keys_with_duplicates(4))
    got = RKV(weight=0.9, kernel=kernel).score(seen)
    assert_scores(got, seen, lambda row: ref_rkv(row, 0.9, kernel=kernel))


def test_rkv_similarity_is_free_of_scale():
    keys = keys_with_duplicates(5)
    keys[:, :, 1] = 0.0  # similar to none
    keys[:, :, 4] *= 1e-4  # its direction counts as before
    keys[:, :, 5] *= 1e4
    seen = observe(60, keys=keys)
    assert_scores(RKV().score(seen), seen, ref_rkv)


@pytest.mark.parametrize("rows_at_once", [0, 1, 3, 7])
def test_rkv_blocks(monkeypatch, rows_at_once):
    seen = observe(70, keys=keys_with_duplicates(6))
    whole = RKV().score(seen)
    entries_of_a_row = whole.numel()  # a row of every (sequence, head): batch * heads * n
    monkeypatch.setattr("reasonalloc.policies.scoring.rkv._BLOCK_ENTRIES", {"cpu": rows_at_once * entries_of_a_row})
    got = RKV().score(seen)
    assert_scores(got, seen, ref_rkv)
    valid = seen.tokens.valid
    torch.testing.assert_close(got[valid], whole[valid], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("newest", [1, 2, 5, 19])
@pytest.mark.parametrize("entries", [1, 400, 1 << 19])
def test_rkv_looks_through_the_newest_keys_first(monkeypatch, newest, entries):
    """However many keys are asked at a time, and however few queries ask them, it is the newest similar one."""
    seen = observe(75, keys=keys_with_duplicates(9))
    monkeypatch.setattr("reasonalloc.policies.scoring.rkv.NEWEST", newest)
    monkeypatch.setattr("reasonalloc.policies.scoring.rkv._BLOCK_ENTRIES", {"cpu": entries})
    assert_scores(RKV(weight=0.0).score(seen), seen, lambda row: ref_rkv(row, 0.0))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_counted_similarity_of_any_lengths(data):
    """Against all pairs at once, in float64: rows of any length, keys with and without near duplicates."""
    lengths = data.draw(st.lists(st.integers(0, 260), min_size=1, max_size=6))
    clusters, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1 << 20))
    center = torch.randn(clusters, 16, generator=rng(seed), dtype=torch.float64)
    member = torch.randint(clusters, (len(lengths), max(lengths)), generator=rng(seed + 1))
    noise = torch.randn(*member.shape, 16, generator=rng(seed + 2), dtype=torch.float64)
    absent = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    keys = center[member] + noise
    unit = torch.nn.functional.normalize(keys, dim=-1).masked_fill(absent[..., None], 0.0)
    wanted = torch.zeros(member.shape, dtype=torch.float64)
    for row, cosine in enumerate((unit @ unit.transpose(1, 2)).tolist()):
        for i, line in enumerate(cosine):
            line[i] = 0.0
            hits = [j for j, c in enumerate(line) if c > 0.5]
            if hits:
                line[hits[-1]] = 0.0
            wanted[row] += torch.tensor(line, dtype=torch.float64)
    got = counted_similarity(keys.masked_fill(absent[..., None], float("nan")), torch.tensor(lengths), 0.5)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@DTYPES
@pytest.mark.parametrize("per_token", [True, False])
def test_rkv_of_weight_one_is_snapkv_in_order(dtype, per_token):
    seen = observe(80, dtype=dtype, keys=keys_with_duplicates(7))
    rkv, snapkv = RKV(weight=1.0, per_token=per_token).score(seen), SnapKV().score(seen)
    for b, h, row in rows(seen):
        n = len(row.candidates)
        order = snapkv[b, h, :n].argsort(descending=True, stable=True)
        assert torch.equal(rkv[b, h, :n].argsort(descending=True, stable=True), order)


def test_rkv_per_token_does_not_change_the_order_in_a_head():
    seen = observe(90, keys=keys_with_duplicates(8))
    scaled, literal = RKV(per_token=True).score(seen), RKV(per_token=False).score(seen)
    for b, h, row in rows(seen):
        n = len(row.candidates)
        assert torch.equal(scaled[b, h, :n].argsort(stable=True), literal[b, h, :n].argsort(stable=True))


@pytest.mark.parametrize("scorer", [SnapKV(), RKV()], ids=["snapkv", "rkv"])
def test_tokens_kept_of_equal_scores_the_lower_position_wins(scorer):
    # Max pooling makes ties; the cut must fall as in the reference, which sorts by score and then by index.
    seen = observe(100, keys=keys_with_duplicates(9))
    reference, ties = {SnapKV: ref_importance, RKV: ref_rkv}[type(scorer)], 0
    tokens, budget = seen.tokens, 7
    nothing = torch.zeros(len(LENGTHS), dtype=torch.long)
    candidates = rank_candidates(scorer.score(seen), tokens.valid, tokens.newest(seen.window), nothing)
    index, kept = select(candidates, torch.full_like(tokens.lengths, budget), by_score=False)
    for b, h, row in rows(seen):
        scores, n = reference(row), len(row.keys)
        best = sorted(row.candidates, key=lambda t: (-scores[t], t))
        room = max(min(budget, n) - min(seen.window, n), 0)
        want = sorted([*best[:room], *range(len(row.candidates), n)])
        assert index[b, h, : kept[b, h]].tolist() == want
        ties += 0 < room < len(best) and scores[best[room - 1]] == scores[best[room]]
    assert ties or isinstance(scorer, RKV), "no tie at any cut"


# ---- H2O, StreamingLLM, TOVA, Knorm, Random ----------------------------------------------------------------


def test_h2o_is_the_received_attention():
    seen = observe(110, queries=None, real_queries=None)
    valid = seen.tokens.valid
    assert torch.equal(H2O().score(seen)[valid], seen.tokens.received[valid])


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_streaming_ranks_sinks_first_then_the_newest(sinks):
    seen = observe(120, queries=None, real_queries=None)
    # Any storage order: the scorer goes by the position given, not by the place in memory.
    shuffled = seen.tokens.positions.clone()
    for b, h, row in rows(seen):
        n = len(row.keys)
        shuffled[b, h, :n] = shuffled[b, h, torch.randperm(n, generator=rng(b * 2 + h))]
    seen = replace(seen, tokens=changed(seen.tokens, positions=shuffled))
    got, found = StreamingLLM(sinks).score(seen), 0
    for b, h, row in rows(seen):
        scores = got[b, h].tolist()
        is_sink = [p < sinks for p in row.positions]
        rest = [t for t in range(len(row.keys)) if not is_sink[t]]
        assert sorted(rest, key=lambda t: -scores[t]) == sorted(rest, key=lambda t: -row.positions[t])
        for t in range(len(row.keys)):
            if is_sink[t]:
                assert all(scores[t] > scores[other] for other in rest)
                found += 1
    assert (found > 3) == (sinks > 0)


def test_streaming_keeps_sinks_and_the_newest():
    seen = observe(125, window=0)
    tokens, budget = seen.tokens, 6
    candidates = rank_candidates(
        StreamingLLM().score(seen),
        tokens.valid,
        tokens.newest(0),
        torch.zeros(len(LENGTHS), dtype=torch.long),
    )
    index, kept = select(candidates, torch.full_like(tokens.lengths, budget), by_score=False)
    for b, h, row in rows(seen):
        order = sorted(range(len(row.keys)), key=lambda t: (row.positions[t] >= 4, -row.positions[t]))
        assert index[b, h, : kept[b, h]].tolist() == sorted(order[:budget])


@DTYPES
@GROUPS
def test_tova(dtype, group):
    # No tokens are forced, so all of them are compared: window 0.
    seen = observe(130, group=group, dtype=dtype, window=0)
    weights = {}  # (sequence, position) -> the last query's weights, of every query head that holds the token
    for b, _, row in rows(seen):
        for head in row.queries:
            logits = {t: dot(head[-1], row.keys[t]) * row.scaling for t in range(len(row.keys))}
            for t, weight in softmax(logits).items():
                weights.setdefault((b, row.positions[t]), []).append(weight)
    counts = {len(found) for found in weights.values()}
    assert counts == {group, 2 * group}, "some tokens must be held by one head and some by both"
    got = TOVA().score(seen)
    want = torch.zeros(got.shape, dtype=torch.float64)
    for b, h, row in rows(seen):
        for t, position in enumerate(row.positions):
            want[b, h, t] = sum(weights[b, position]) / len(weights[b, position])
    valid, tolerance = seen.tokens.valid, 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got[valid].double(), want[valid], rtol=tolerance, atol=tolerance)


def test_tova_reads_the_newest_query_only():
    seen = observe(140, window=0)
    one = replace(seen, queries=seen.queries[:, :, -1:], real_queries=seen.real_queries[:, -1:])
    valid = seen.tokens.valid
    torch.testing.assert_close(TOVA().score(one)[valid], TOVA().score(seen)[valid])


@DTYPES
def test_knorm(dtype):
    seen = observe(150, dtype=dtype, window=0, queries=None, real_queries=None)
    assert_scores(Knorm().score(seen), seen, lambda row: [-math.sqrt(dot(k, k)) for k in row.keys], dtype)


def test_random_is_uniform_and_independent():
    seen = long_observation(2000)
    got = Random().score(seen)
    assert got.shape == seen.tokens.positions.shape
    assert 0 <= got.min() < 0.01 < 0.99 < got.max() <= 1
    bins = (got * 20).long().clamp(max=19)
    assert_frequencies(bins.flatten(), [1 / 20] * 20)
    # Neighbours along the token and the head axis: a score repeated there would fill the diagonal only.
    pairs = bins // 5 * 4
    assert_frequencies((pairs[..., :-1:2] + bins[..., 1::2] // 5).flatten(), [1 / 16] * 16)
    assert_frequencies((pairs[:, 0] + bins[:, 1] // 5).flatten(), [1 / 16] * 16)


# ---- VaSE --------------------------------------------------------------------------------------------------


@DTYPES
@GROUPS
@WINDOWS
def test_vase_probability(dtype, group, window):
    seen = observe(200, group=group, dtype=dtype, window=window)
    candidates = seen.tokens.valid & ~seen.tokens.newest(window)
    got = VaSE().probability(seen, candidates)
    assert not got[~candidates].any(), "only candidates can be drawn"
    assert_scores(got, seen, ref_probability)  # it is float32 whatever the keys are


@pytest.mark.parametrize("kernel", [1, 9])
def test_vase_kernel(kernel):
    seen = observe(210)
    candidates = seen.tokens.valid & ~seen.tokens.newest(seen.window)
    got = VaSE(kernel=kernel).probability(seen, candidates)
    assert_scores(got, seen, lambda row: ref_probability(row, kernel))


def large_in_the_window(seen):
    """The same observation, with the largest value ranges where they must not count: in the window."""
    values = torch.where(seen.tokens.newest(seen.window)[..., None], 50 * seen.tokens.values, seen.tokens.values)
    return replace(seen, tokens=changed(seen.tokens, values=values))


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"sinks": 0}, {"sinks": 9}, {"protected": 0.5}, {"protected": 1.0}])
def test_vase_protected_tokens_rank_above_all_others(dtype, settings):
    checked = 0
    for seed in range(6):
        seen = large_in_the_window(observe(220 + 10 * seed, dtype=dtype))
        got = VaSE(**settings).score(seen)
        for b, h, row in rows(seen):
            protected = ref_protected(row, **settings)
            scores = got[b, h].tolist()
            others = [scores[t] for t in row.candidates if t not in protected]
            if protected and others:
                assert min(scores[t] for t in protected) > max(others)
                assert max(others) < 1e30, "more tokens are protected than the share allows"
                checked += 1
    assert checked > 10


def test_vase_nothing_is_protected_at_share_zero():
    seen = observe(300)
    got = VaSE(protected=0.0).score(seen)
    assert got[seen.tokens.valid & ~seen.tokens.newest(seen.window)].max() < 1e30


def test_vase_protected_tokens_rank_by_range():
    # A head's budget may be less than the protected share, which refers to the layer's mean budget: then
    # sinks and the largest ranges must survive, not the tokens that happen to be stored first.
    seen = observe(310, budget=torch.full((len(LENGTHS),), 32.0))
    got, compared = VaSE(sinks=2).score(seen), 0
    for b, h, row in rows(seen):
        protected = ref_protected(row, sinks=2)
        by_score = sorted(protected, key=lambda t: (-float(got[b, h, t]), t))
        assert by_score == protected
        compared += len(protected)
    assert compared > 20


def long_observation(repeats, tokens=14, heads=2):
    """The same few tokens in many sequences, so that one call makes many draws."""
    shape = (1, heads, tokens)
    keys, values = randn(401, *shape, 4), randn(402, *shape, 3)
    lengths = torch.full((1, heads), tokens)
    positions = torch.arange(tokens, dtype=torch.int32).expand(shape)

    def repeat(x):
        return x.repeat(repeats, *[1] * (x.dim() - 1))

    queries = randn(403, 1, 2 * heads, 5, 4).float()
    layer = LayerTokens(repeat(keys.float()), repeat(values.float()), repeat(lengths), repeat(positions))
    budget = torch.full((repeats,), 12.0)
    real = torch.ones(repeats, 5, dtype=torch.bool)
    noise = Noise(404, torch.arange(repeats), torch.full((repeats,), tokens))
    return Observation(layer, repeat(queries), real, 0.8, 4, budget, noise, rng(405))


def in_round(seen, i):
    """The same, so many rounds later."""
    return replace(seen, noise=replace(seen.noise, round=seen.noise.round + i))


def assert_frequencies(draws, probabilities):
    """Chi-square test. The seed is fixed, so a fair draw that passes once passes always."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(draws)
    assert expected.min() > 5, "too few draws for the test"
    counts = torch.bincount(draws, minlength=len(probabilities))
    assert len(counts) == len(probabilities)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(probabilities) - 1, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(freedom / 2, statistic / 2))
    assert p_value > 1e-4, f"chi-square {float(statistic):.1f} at {int(freedom)} degrees of freedom: p = {p_value:.1e}"


def drawn(scorer, seen, h):
    """Probabilities of the tokens in the lottery of head ``h``, and the order of each row's draws."""
    row = read(seen, 0, h)
    protected = ref_protected(row, scorer.sinks, scorer.protected)
    free = [t for t in row.candidates if t not in protected]
    weights = ref_probability(row)
    probability = [weights[t] / sum(weights[u] for u in free) for t in free]
    assert len(free) == len(row.candidates) - 3  # the protected quarter of the budget of 12 took part, and no more
    return probability, scorer.score(seen)[:, h, free].argsort(-1, descending=True)


@pytest.mark.parametrize("h", [0, 1])
def test_vase_draws_in_proportion_to_attention(h):
    probability, order = drawn(VaSE(sinks=1), long_observation(20_000), h)
    assert max(probability) > 2 * min(probability), "a uniform draw could pass"
    assert_frequencies(order[:, 0], probability)


@pytest.mark.parametrize("h", [0, 1])
def test_vase_draws_without_replacement(h):
    p, order = drawn(VaSE(sinks=1), long_observation(20_000), h)
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if i != j]
    place = torch.full((len(p), len(p)), -1)
    for at, (i, j) in enumerate(pairs):
        place[i, j] = at
    draws = place[order[:, 0], order[:, 1]]
    assert draws.min() >= 0
    assert_frequencies(draws, [p[i] * p[j] / (1 - p[i]) for i, j in pairs])


def test_vase_draws_for_every_head_and_sequence_anew():
    seen = long_observation(2000)
    # Both heads hold the same tokens and see the same queries: only the lottery can tell them apart.
    same = [x[:, :1].expand(-1, 2, *x.shape[2:]) for x in (seen.tokens.keys, seen.tokens.values)]
    queries = seen.queries[:, :2].repeat(1, 2, 1, 1)
    seen = replace(seen, tokens=changed(seen.tokens, keys=same[0], values=same[1]), queries=queries)
    probability, order = drawn(VaSE(sinks=1), seen, 0)
    _, other = drawn(VaSE(sinks=1), seen, 1)
    joint = [a * b for a in probability for b in probability]
    assert_frequencies(order[:, 0] * len(probability) + other[:, 0], joint)


def test_queryfree_sketch_is_of_the_norms():
    # With values equal to keys of unit norm the root of the score is |kG|^2: a mean of ``rank`` squared
    # normal numbers, so its mean is 1 = |k|^2 and its variance 2 / rank.
    eye = torch.eye(20).expand(len(LENGTHS), 2, 20, 20)
    seen = observe(500, queries=None, real_queries=None)
    seen = replace(seen, tokens=changed(seen.tokens, keys=eye, values=eye))
    scorer = QueryFreeVaSE(sinks=0)
    draws = [scorer.score(in_round(seen, i))[0, 0, : LENGTHS[0][0]] for i in range(500)]
    norms = torch.stack(draws).sqrt()
    assert abs(norms.mean() - 1) < 4 * (0.1 / norms.numel()) ** 0.5
    assert abs(norms.var() - 0.1) < 0.01


def test_queryfree_uses_one_gaussian_for_keys_and_values():
    # E |kG|^2 |vG|^2 for unit k = v is 1 + 2 / rank with one G, and 1 with a G of its own for each.
    eye = torch.eye(20).expand(len(LENGTHS), 2, 20, 20)
    seen = observe(510, queries=None, real_queries=None)
    seen = replace(seen, tokens=changed(seen.tokens, keys=eye, values=eye))
    scorer = QueryFreeVaSE(sinks=0, rank=4)
    draws = [scorer.score(in_round(seen, i))[0, 0, : LENGTHS[0][0]] for i in range(2000)]
    assert abs(torch.stack(draws).mean() - 1.5) < 0.1


@DTYPES
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (8, 5), (5, 8)])
def test_queryfree_of_large_rank_is_the_product_of_the_squared_norms(dtype, dim, value_dim):
    seen = observe(520, dtype=dtype, dim=dim, value_dim=value_dim, window=0, queries=None, real_queries=None)
    got = QueryFreeVaSE(sinks=0, rank=1 << 14).score(seen)
    for b, h, row in rows(seen):
        for t, (key, value) in enumerate(zip(row.keys, row.values, strict=True)):
            assert float(got[b, h, t]) == pytest.approx(dot(key, key) * dot(value, value), rel=0.08)


def test_queryfree_sketches_anew_at_every_eviction():
    seen = observe(530, queries=None, real_queries=None)
    scorer, valid = QueryFreeVaSE(sinks=0), seen.tokens.valid
    first, second = scorer.score(seen)[valid], scorer.score(in_round(seen, 1))[valid]
    assert (first != second).all()


def test_queryfree_forces_the_sinks_and_no_large_ranges():
    """As the original: what stays of the others is the sketch's choice alone."""
    seen = observe(540, queries=None, real_queries=None, budget=torch.full((len(LENGTHS),), 32.0))
    values = seen.tokens.values.clone()
    values[:, :, 6] *= 1e-6
    values[:, :, 6, 0] = 100.0  # of a huge range, and of a key without a norm: nobody would draw it
    keys = seen.tokens.keys.clone()
    keys[:, :, 6] = 0.0
    seen = replace(seen, tokens=changed(seen.tokens, keys=keys, values=values))
    got = QueryFreeVaSE(sinks=2).score(seen)
    alone = QueryFreeVaSE(sinks=0).score(seen)
    sinks = (seen.tokens.positions < 2) & seen.tokens.valid
    assert sinks.any()
    assert (got[sinks] > 1e30).all()
    others = ~sinks & seen.tokens.valid
    assert torch.equal(got[others], alone[others])
    long = seen.tokens.valid[:, :, 6] & others[:, :, 6]
    assert long.any()
    assert (got[:, :, 6][long] == 0).all()


def test_queryfree_draws_one_sketch_for_every_sequence():
    seen = long_observation(2)
    same = [x[:, :1].expand(-1, 2, *x.shape[2:]) for x in (seen.tokens.keys, seen.tokens.values)]
    seen = replace(seen, tokens=changed(seen.tokens, keys=same[0], values=same[1]))
    got = QueryFreeVaSE(sinks=0).score(seen)
    torch.testing.assert_close(got[:, 0], got[:, 1])
    assert ((got[0] - got[1]).abs() > 1e-3 * got[0]).all(), "two sequences share a sketch"


# ---- all scorers -------------------------------------------------------------------------------------------

DEFAULTS = {
    "rkv": (RKV, {"weight": 0.1, "threshold": 0.5, "kernel": 7, "window": 8, "observed_queries": 8}),
    "snapkv": (SnapKV, {"kernel": 7, "observed_queries": 8}),
    "h2o": (H2O, {"needs_received": True}),
    "streaming": (StreamingLLM, {"sinks": 4}),
    "tova": (TOVA, {"window": 0, "observed_queries": 1}),
    "knorm": (Knorm, {}),
    "vase": (VaSE, {"sinks": 4, "protected": 0.25, "kernel": 5, "window": 64, "observed_queries": 64}),
    "vase-queryfree": (QueryFreeVaSE, {"rank": 20, "sinks": 4, "window": 64, "observed_queries": 0}),
    "random": (Random, {}),
}
DRAWING = ["random", "vase", "vase-queryfree"]
NAMES = pytest.mark.parametrize("name", DEFAULTS)


@NAMES
def test_defaults_are_the_papers(name):
    cls, settings = DEFAULTS[name]
    scorer = reasonalloc.Compression(budget=128, scorer=name).token_scorer
    assert type(scorer) is cls
    assert {key: getattr(scorer, key) for key in settings} == settings
    assert scorer.needs_received == (name == "h2o")


def test_every_scorer_is_tested_here():
    shipped = {n for n in SCORERS.names() if SCORERS.create(n).__module__.startswith("reasonalloc.")}
    assert shipped == set(DEFAULTS)


@NAMES
@DTYPES
def test_padding_is_ignored(name, dtype):
    scorer = SCORERS.create(name)
    first, second = (observe(600, dtype=dtype, garbage=garbage) for garbage in (1, 2))
    valid = first.tokens.valid
    assert not torch.equal(first.tokens.keys, second.tokens.keys)
    # Not bit for bit: how a product is summed is the matrix library's affair.
    torch.testing.assert_close(scorer.score(first)[valid], scorer.score(second)[valid], rtol=1e-6, atol=1e-7)
    assert not scorer.score(first)[valid].isnan().any()


@NAMES
def test_no_real_queries_mark_means_all_are_real(name):
    all_real = torch.ones(len(LENGTHS), QUERIES, dtype=torch.bool)
    scorer, scores = SCORERS.create(name), []
    for real in (None, all_real):
        seen = observe(610, real_queries=real)
        scores.append(scorer.score(seen)[seen.tokens.valid])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-7)


@NAMES
def test_sequences_do_not_see_each_other(name):
    seen, scorer = observe(620, keys=keys_with_duplicates(10)), SCORERS.create(name)
    together = scorer.score(seen)
    for b in range(len(LENGTHS) - 1):
        tokens = seen.tokens
        parts = [x[b : b + 1] for x in (tokens.keys, tokens.values, tokens.lengths, tokens.positions, tokens.received)]
        own = replace(
            seen,
            tokens=LayerTokens(*parts),
            queries=seen.queries[b : b + 1],
            real_queries=seen.real_queries[b : b + 1],
            budget=seen.budget[b : b + 1],
            noise=replace(seen.noise, stream=seen.noise.stream[b : b + 1], round=seen.noise.round[b : b + 1]),
        )
        valid = own.tokens.valid
        torch.testing.assert_close(scorer.score(own)[valid], together[b : b + 1][valid], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_repeats_exactly(name):
    seen, scorer = observe(630), SCORERS.create(name)
    valid = seen.tokens.valid
    torch.manual_seed(1)  # the global generator must have no say, nor what the cache's own gave before
    first = scorer.score(seen)[valid]
    torch.manual_seed(2)
    assert torch.equal(scorer.score(replace(seen, generator=rng(632)))[valid], first)
    assert not torch.equal(scorer.score(in_round(seen, 1))[valid], first), "two evictions drew the same"
    other = replace(seen, noise=replace(seen.noise, seed=1))
    assert not torch.equal(scorer.score(other)[valid], first), "the seed does not matter"


# ---- names, settings, own scorers --------------------------------------------------------------------------


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'rvk'.*Did you mean 'rkv'"):
        reasonalloc.Compression(budget=64, scorer="rvk")


@pytest.mark.parametrize(
    ("scorer", "settings"),
    [
        (RKV, {"weight": -0.01}),
        (RKV, {"weight": 1.01}),
        (RKV, {"weight": math.nan}),
        (RKV, {"threshold": 1.01}),
        (RKV, {"threshold": -1.01}),
        (RKV, {"kernel": 0}),
        (RKV, {"kernel": 4}),
        (SnapKV, {"kernel": 2}),
        (SnapKV, {"kernel": -1}),
        (StreamingLLM, {"sinks": -1}),
        (VaSE, {"sinks": -1}),
        (VaSE, {"protected": -0.1}),
        (VaSE, {"protected": 1.1}),
        (VaSE, {"kernel": 4}),
        (QueryFreeVaSE, {"rank": 0}),
        (QueryFreeVaSE, {"sinks": -1}),
    ],
)
def test_settings_out_of_range(scorer, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        scorer(**settings)


def test_settings_at_the_ends_of_their_range():
    RKV(weight=0, threshold=0, kernel=1)
    RKV(weight=1, threshold=1)
    SnapKV(kernel=1)
    StreamingLLM(sinks=0)
    VaSE(sinks=0, protected=0, kernel=1)
    QueryFreeVaSE(sinks=0, rank=1)


@pytest.fixture
def own_names(monkeypatch):
    """Names registered by a test are forgotten after it."""
    monkeypatch.setattr(SCORERS, "_classes", dict(SCORERS._classes))


@pytest.mark.usefixtures("own_names")
def test_user_scorer_decides_what_stays():
    @reasonalloc.register_scorer("mine")
    @dataclass(frozen=True)
    class Mine(reasonalloc.Scorer):
        """Even positions first, of these the newest."""

        window = 4

        def score(self, seen):
            return seen.tokens.positions + 1000.0 * (seen.tokens.positions % 2 == 0)

    compression = reasonalloc.Compression(budget=16, scorer="mine", layers="uniform", heads="uniform")
    assert isinstance(compression.token_scorer, Mine)
    assert compression.window == 4
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    model.set_attn_implementation("reasonalloc")
    cache = reasonalloc.Cache(model.config, compression)
    with torch.no_grad():
        model(torch.randint(50, (2, 40), generator=rng(700)), past_key_values=cache)
    for layer in range(2):
        positions = cache.ragged.tokens(layer).positions
        assert positions.tolist() == [[[*range(12, 36, 2), 36, 37, 38, 39]] * 2] * 2


@pytest.mark.usefixtures("own_names")
def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="'rkv' is already registered"):

        @reasonalloc.register_scorer("rkv")
        class Other(reasonalloc.Scorer):
            pass

    assert type(SCORERS.create("rkv")) is RKV


# ---- attention over ragged rows, and what H2O accumulates of it --------------------------------------------

SPAN_LENGTHS = np.array([[13, 1], [9, 12], [8, 10]])


def make_spans(dtype, track=True, lengths=SPAN_LENGTHS, seed=800, dim=6, value_dim=5, room=0, device="cpu"):
    """Ragged rows with garbage in their free slots, ``room`` more of these in each, and the tokens in them (CPU).

    Accumulated attention lies elsewhere than the slots: each row's is shifted by some places, as in an arena.
    """
    shape = (*lengths.shape, int(lengths.max()))
    keys, values = randn(seed + 1, *shape, dim).to(dtype), randn(seed + 2, *shape, value_dim).to(dtype)
    received = randn(seed + 3, *shape).abs().float() if track else None
    positions = torch.arange(shape[-1]).expand(shape)
    tokens = LayerTokens(keys, values, torch.from_numpy(lengths), positions, received)
    capacities = lengths + np.arange(lengths.size).reshape(lengths.shape) % 4 + room
    starts, slots = capacities.cumsum().reshape(lengths.shape) - capacities, int(capacities.sum())
    shift = 2 + 3 * np.arange(len(lengths))
    places = torch.full((slots + int(shift[-1]),), 7.0) if track else None
    key_slots = (1e3 * randn(seed + 4, slots, dim)).to(dtype)
    value_slots = (1e3 * randn(seed + 5, slots, value_dim)).to(dtype)
    for b, h in np.ndindex(*lengths.shape):
        first, n = int(starts[b, h]), int(lengths[b, h])
        key_slots[first : first + n], value_slots[first : first + n] = keys[b, h, :n], values[b, h, :n]
        if track:
            places[first + shift[b] : first + shift[b] + n] = received[b, h, :n]
    memory = (None if x is None else x.to(device) for x in (key_slots, value_slots, places))
    spans = Spans.of(*memory, starts, lengths)
    return replace(spans, received_starts_device=torch.from_numpy(starts + shift[:, None]).to(device)), tokens


def ref_attend(query, tokens, scaling, hidden=None):
    """Outputs and added weights; a query sees all of its row but the newest ``hidden``; -1 marks padding."""
    batch, query_heads, queries, _ = query.shape
    group = query_heads // tokens.keys.shape[1]
    out = torch.full((batch, query_heads, queries, tokens.values.shape[-1]), math.nan, dtype=torch.float64)
    added = torch.zeros(tokens.keys.shape[:3], dtype=torch.float64)
    for b in range(batch):
        for head in range(query_heads):
            h = head // group
            keys, values = tokens.keys[b, h].double().tolist(), tokens.values[b, h].double().tolist()
            for q in range(queries):
                if hidden is not None and hidden[b, q] < 0:
                    continue
                sees = int(tokens.lengths[b, h]) - (0 if hidden is None else int(hidden[b, q]))
                own = query[b, head, q].double().tolist()
                weights = softmax({t: dot(own, keys[t]) * scaling for t in range(sees)})
                out[b, head, q] = torch.tensor(
                    [sum(w * values[t][c] for t, w in weights.items()) for c in range(len(values[0]))],
                    dtype=torch.float64,
                )
                for t, w in weights.items():
                    added[b, h, t] += w
    return out, added


def assert_output(got, want, tolerance):
    """Outputs of padding queries have no meaning; the reference leaves them NaN."""
    defined = ~want.isnan()
    assert defined.any()
    torch.testing.assert_close(got.double()[defined], want[defined], rtol=tolerance, atol=tolerance)


def assert_received(spans, tokens, added, tolerance):
    """What was there plus what was added; free places untouched."""
    received = spans.received.cpu()
    free = torch.ones(len(received), dtype=torch.bool)
    _, lengths, places = spans.on_host
    for b, h in np.ndindex(*lengths.shape):
        start, n = int(places[b, h]), int(lengths[b, h])
        want = tokens.received[b, h, :n].double() + added[b, h, :n]
        torch.testing.assert_close(received[start : start + n].double(), want, rtol=tolerance, atol=tolerance)
        free[start : start + n] = False
    assert free.any()
    assert (received[free] == 7.0).all()


def tolerances(dtype):
    """Of the output and of the received sums (float32 whatever the keys are)."""
    return {torch.float64: (1e-10, 2e-6), torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2)}[dtype]


ANY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@ANY_DTYPE
@GROUPS
def test_one_query_rows(dtype, group):
    spans, tokens = make_spans(dtype)
    query = randn(810, 3, 2 * group, 1, 6).to(dtype)
    out, added = ref_attend(query, tokens, 0.6)
    assert_output(attend_rows(query, spans, 0.6), out, tolerances(dtype)[0])
    received_attention(query, spans, 0.6)
    assert_received(spans, tokens, added, tolerances(dtype)[1])


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@GROUPS
def test_one_query_compiled(dtype, group, track):
    pytest.importorskip("numba")
    from reasonalloc.cache.attention.compiled import attend_compiled

    spans, tokens = make_spans(dtype, track)
    query = randn(820, 3, 2 * group, 1, 6).to(dtype)
    out, added = ref_attend(query, tokens, 0.6)
    got = attend_compiled(query, spans, 0.6)
    assert got.dtype == dtype
    # It computes in float32: in bfloat16 only the final rounding of the output is coarse.
    assert_output(got, out, 2e-5 if dtype == torch.float32 else 2**-8)
    if track:
        assert_received(spans, tokens, added, 2e-5)


@pytest.mark.parametrize("name", ["rows", "compiled"])
def test_backends_accumulate_over_steps(name):
    if name == "compiled":
        pytest.importorskip("numba")
    spans, tokens = make_spans(torch.float32)
    attend, total = BACKENDS[name]().attend, 0.0
    for step in range(3):
        query = randn(830 + step, 3, 4, 1, 6).float()
        out, added = ref_attend(query, tokens, 0.6)
        assert_output(attend(query, spans, 0.6), out, 2e-5)
        total = total + added
    assert_received(spans, tokens, total, 2e-5)


def test_backends_do_not_overflow_on_large_logits():
    pytest.importorskip("numba")
    spans, tokens = make_spans(torch.float32)
    query = 100 * randn(840, 3, 4, 1, 6).float()
    out, _ = ref_attend(query, tokens, 1.0)
    for name in ("rows", "compiled"):
        assert_output(BACKENDS[name]().attend(query, spans, 1.0), out, 1e-3)


# How many of the newest tokens a chunk's queries must not see: no padding, padding before, padding between.
HIDDEN = torch.tensor([[4, 3, 2, 1, 0], [-1, -1, 2, 1, 0], [2, -1, 1, 0, -1]])
CHUNK_LENGTHS = np.array([[13, 5], [3, 12], [8, 10]])  # each query sees itself, so no row is shorter than its chunk


@ANY_DTYPE
@GROUPS
def test_chunk_with_hidden_tokens(dtype, group):
    spans, tokens = make_spans(dtype, lengths=CHUNK_LENGTHS)
    query = randn(850, 3, 2 * group, 5, 6)
    padding = (HIDDEN < 0)[:, None, :, None]
    query = torch.where(padding, 1e3 * randn(851, *query.shape), query).to(dtype)
    out, added = ref_attend(query, tokens, 0.6, HIDDEN)
    assert_output(attend_rows(query, spans, 0.6, HIDDEN.clamp(min=0)), out, tolerances(dtype)[0])
    received_attention(query, spans, 0.6, HIDDEN)
    assert_received(spans, tokens, added, tolerances(dtype)[1])


def test_chunk_that_sees_everything():
    spans, tokens = make_spans(torch.float32)
    query = randn(860, 3, 4, 5, 6).float()
    out, added = ref_attend(query, tokens, 0.6)
    assert_output(attend_rows(query, spans, 0.6), out, 2e-5)
    received_attention(query, spans, 0.6)
    assert_received(spans, tokens, added, 2e-5)


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["all seen", "hidden"])
@pytest.mark.parametrize("entries", [1, 50])
def test_attention_in_blocks_of_queries(monkeypatch, entries, hidden):
    monkeypatch.setattr("reasonalloc.cache.attention.rows._BLOCK_ENTRIES", entries)
    spans, tokens = make_spans(torch.float32, lengths=CHUNK_LENGTHS)
    query = randn(870, 3, 4, 5, 6).float()
    out, added = ref_attend(query, tokens, 0.6, hidden)
    assert_output(attend_rows(query, spans, 0.6, None if hidden is None else hidden.clamp(min=0)), out, 2e-5)
    received_attention(query, spans, 0.6, hidden)
    assert_received(spans, tokens, added, 2e-5)


def test_queries_that_are_padding_only_add_nothing():
    spans, _ = make_spans(torch.float32)
    before = spans.received.clone()
    received_attention(1e3 * randn(880, 3, 4, 5, 6).float(), spans, 0.6, torch.full((3, 5), -1))
    assert torch.equal(spans.received, before)
