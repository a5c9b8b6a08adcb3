"""Bands, comparisons and studies of profiles, on profiles made for the purpose; and the commands about them."""

import json
import math

import numpy as np
import pytest
from reference import tiny_model, word_tokenizer
from scipy.stats import wasserstein_distance
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.calibration import auto as auto_profile
from reasonalloc.calibration import calibrate as calibration
from reasonalloc.calibration.compare import compare, correlation, wave_distance
from reasonalloc.calibration.operator_study import operator_effects, rho_effects
from reasonalloc.calibration.stability import bootstrap, bootstrap_miss_curves, head_skew
from reasonalloc.cli.app import app
from reasonalloc.policies.allocation import MissGrid, PromptDemand

LAYERS = 6
SHAPE = ra.ModelShape(LAYERS, 2, 4, 8)


def profile_of(wave, noise, prompts=8, seed=0, rows=100, model="a", **more):
    """A profile whose prompts scatter around a wave."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(prompts):
        own = np.asarray(wave) * np.exp(noise * rng.normal(size=len(wave)))
        sums = np.round(np.stack([own * factor for factor in (0.5, 1.0)])[..., None] * rows * np.ones(4))
        records.append(PromptDemand(f"{seed}-{i}", rows, sums, more.get("misses", {})))
    shape = ra.ModelShape(len(wave), 2, 4, 8)
    grids = more.get("grids", {})
    return ra.DemandProfile(shape, (0.85, 0.93), tuple(records), {}, grids=grids, source={"model": model})


WAVE = (90.0, 40.0, 20.0, 30.0, 25.0, 50.0)
OTHER = (20.0, 30.0, 40.0, 60.0, 30.0, 20.0)


# ---- stability -------------------------------------------------------------------------------------------


def test_bands_cover_the_truth_and_shrink():
    """Coverage over many profiles; a percentile bootstrap of 24 prompts falls a little short of its level."""
    inside, layers = 0, 0
    for seed in range(60):
        bands = bootstrap(profile_of(WAVE, 0.1, 24, seed), draws=400)
        truth = np.array(WAVE) * math.exp(0.1**2 / 2)
        inside += int(((bands.wave_low <= truth) & (truth <= bands.wave_high)).sum())
        layers += LAYERS
    assert 0.88 <= inside / layers <= 0.98
    few, many = (bootstrap(profile_of(WAVE, 0.1, n, 1)) for n in (6, 96))
    assert few.widths.mean() / many.widths.mean() == pytest.approx(4, rel=0.35)
    assert (few.budget_low <= few.budget_high).all()


def test_advice():
    assert "instead of 8 would do" in bootstrap(profile_of(WAVE, 0.3, 8)).advice()
    assert bootstrap(profile_of(WAVE, 0.001, 8)).advice() is None
    assert "one prompt" in bootstrap(profile_of(WAVE, 0.1, 1)).advice()
    with pytest.raises(ValueError, match="level"):
        bootstrap(profile_of(WAVE, 0.1), level=1.0)


def test_budgets_of_the_bands_are_those_of_the_allocator():
    """Without scatter every bootstrap sample is the profile itself."""
    profile = profile_of(WAVE, 0.0, 5)
    bands = bootstrap(profile, budget=64)
    expected = ra.WaveLayers().allocate(SHAPE, 64, 0, profile).numpy() / 2
    assert bands.budget_low.tolist() == bands.budget_high.tolist() == expected.tolist()


def test_skew_of_the_heads():
    """Heads that ask for 1, 2, 3 and 6 times as much; one layer that differs does not move the median."""

    def with_heads(noise, seed=0, prompts=24):
        rng, records = np.random.default_rng(seed), []
        for i in range(prompts):
            sums = np.stack([np.outer(WAVE, (1.0, 2.0, 3.0, 6.0))] * 2) * 100
            sums[:, 2, 3] *= 1.5
            sums[..., 3] *= np.exp(noise * rng.normal() - noise**2 / 2)
            records.append(PromptDemand(f"{i}", 100, np.round(sums), {}))
        return ra.DemandProfile(SHAPE, (0.85, 0.93), tuple(records), {})

    assert head_skew(with_heads(0.0)) == pytest.approx((6, 6, 6))
    found = [head_skew(with_heads(0.2, seed), draws=300) for seed in range(40)]
    assert 0.8 <= np.mean([low <= 6 <= high for _, low, high in found]) <= 1
    widths = [high - low for _, low, high in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 6 * 0.2 / math.sqrt(24), rel=0.2)


def test_bands_of_miss_curve_budgets():
    """Without scatter the bands are the budgets; with it they hold them, and shrink with more prompts."""
    grid = MissGrid((16, 32, 64, 128), 64)

    def with_curves(prompts, noise):
        rng = np.random.default_rng(1)
        steep = rng.uniform(0.2, 3, (1, LAYERS, 2))
        records = []
        for i in range(prompts):
            own = steep * np.exp(noise * rng.normal(size=steep.shape))
            curve = 100 * np.exp(-own * np.array(grid.budgets)[:, None, None] / 40)
            records.append(PromptDemand(f"{i}", 100, np.ones((1, LAYERS, 4)), {"rkv": curve}))
        return ra.DemandProfile(SHAPE, (0.93,), tuple(records), grids={"rkv": grid})

    still = bootstrap_miss_curves(with_curves(5, 0.0), "rkv", 48)
    assert still.budgets.sum() == 48 * LAYERS * 2
    assert (still.low == still.budgets).all()
    assert (still.high == still.budgets).all()
    few, many = (bootstrap_miss_curves(with_curves(n, 0.6), "rkv", 48) for n in (5, 80))
    assert ((few.low <= few.budgets) & (few.budgets <= few.high)).mean() > 0.9
    assert many.widths.mean() < 0.6 * few.widths.mean()


# ---- comparison ------------------------------------------------------------------------------------------


def test_distance_is_wasserstein_over_relative_depth():
    """Against its definition, the area between the cumulative curves, integrated finely."""
    a, b = np.array(WAVE), np.array((3.0, 1.0, 2.0))
    depth = np.linspace(0, 1, 200_001)

    def cumulative(curve):
        places = (np.arange(len(curve)) + 0.5) / len(curve)
        return (curve / curve.sum() * (places <= depth[:, None])).sum(1)

    area = np.abs(cumulative(a) - cumulative(b)).mean()
    assert wave_distance(a, b) == pytest.approx(area, abs=1e-4)
    assert wave_distance(a, 7 * a) == pytest.approx(0, abs=1e-12)


def test_tasks_that_do_not_differ():
    """Under the null hypothesis p is uniform: about one in ten is below 0.1."""
    found = [
        compare([profile_of(WAVE, 0.1, 6, 2 * s), profile_of(WAVE, 0.1, 6, 2 * s + 1)], "ab", permutations=99)
        for s in range(60)
    ]
    small = sum(c.levels[1].p <= 0.1 for c in found)
    assert 1 <= small <= 14
    assert np.mean([c.levels[1].ratio for c in found]) == pytest.approx(1, abs=0.15)
    assert [level.name for level in found[0].levels] == ["prompts", "tasks"]


def shares_by_hand(profiles, models):
    """The decomposition from its definition: within a group, squared distances of pairs over the group's size."""
    curves = [(i, models[i], c) for i, p in enumerate(profiles) for c in p.prompt_layer_demand()]

    def within(key):
        total = 0.0
        for value in {c[key] for c in curves} if key is not None else {None}:
            group = [c[2] for c in curves if key is None or c[key] == value]
            pairs = [(a, b) for n, a in enumerate(group) for b in group[n + 1 :]]
            total += sum(wave_distance(a, b) ** 2 for a, b in pairs) / len(group)
        return total

    tasks, inside_models, everything = within(0), within(1), within(None)
    return tasks / everything, (inside_models - tasks) / everything, 1 - inside_models / everything


def test_levels_are_told_apart():
    a, shifted = np.array(WAVE), np.array(WAVE) * (1.3, 1, 1, 1, 1, 0.8)
    profiles = [
        profile_of(wave, 0.05, 6, seed, model=model)
        for seed, (wave, model) in enumerate(
            [(a, "a"), (shifted, "a"), (a, "a"), (OTHER, "b"), (OTHER, "b"), (OTHER, "b")]
        )
    ]
    found = compare(profiles, "abcdef", permutations=199)
    prompts, tasks, models = found.levels
    assert tasks.p <= 0.02
    assert tasks.ratio > 1.2
    assert models.p <= 0.15  # of 20 ways to halve six tasks, two are the true one
    assert models.ratio > 3
    assert models.share > 0.5
    assert (prompts.share, tasks.share, models.share) == pytest.approx(shares_by_hand(profiles, [0, 0, 0, 1, 1, 1]))
    assert found.matrix == pytest.approx(found.matrix.T)
    places = (np.arange(LAYERS) + 0.5) / LAYERS
    waves = [profile.layer_demand() for profile in profiles]
    assert found.matrix[0, 3] == pytest.approx(wasserstein_distance(places, places, waves[0], waves[3]))
    one_each = compare([profiles[0], profiles[3]], "ab", permutations=99).levels
    assert [level.name for level in one_each] == ["prompts", "models"]
    assert math.isnan(one_each[1].p), "with one task a model nothing can be permuted"
    two_each = compare([profiles[0], profiles[1], profiles[3], profiles[4]], "abcd", permutations=99).levels[-1]
    assert two_each.least_p == pytest.approx(1 / 3)  # of three ways to pair four tasks
    assert two_each.p >= 0.2
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(profiles[:1], "a")


# ---- choices between profile and budgets -----------------------------------------------------------------


def test_choices():
    profile = profile_of(WAVE, 0.0)
    effects = rho_effects(profile, 100)
    assert [effect.choice.rho for effect in effects] == [0.85, 0.93]
    assert effects[1].distance == 0
    assert effects[1].choice.moved == 0
    assert effects[0].distance == pytest.approx(0, abs=1e-12)  # half the demand everywhere: the same wave
    assert effects[0].correlation == pytest.approx(1)
    by_choice = {(c.exponent, c.lower, c.upper): c for c in operator_effects(profile, 100)}
    assert by_choice[0.5, 0.25, 2.0].moved == 0
    assert by_choice[0.0, 0.25, 2.0].budgets.tolist() == [100] * LAYERS
    assert by_choice[1.0, 0.0, 6.0].budgets == pytest.approx(np.array(WAVE) / np.mean(WAVE) * 100, abs=0.6)
    for choice in by_choice.values():
        assert choice.budgets.sum() == pytest.approx(600)


# ---- commands --------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    word_tokenizer().save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder


def write_questions(path, count=3):
    rng = np.random.default_rng(0)
    lines = [{"q": " ".join(f"w{i}" for i in rng.integers(2, 97, 30))} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_calibrate_show_study_merge_and_use(model_folder, tmp_path):
    questions = write_questions(tmp_path / "q.jsonl")
    common = ("calibrate", "-m", model_folder, "--prompts", questions, "--max-new-tokens", 60, "--loss", "rkv")
    missing = run(*common, "-o", tmp_path / "wave.json")
    assert missing.exit_code == 2
    assert "no text in field 'prompt'" in missing.output
    common = (*common, "--field", "q")
    done = run(*common, "-o", tmp_path / "wave.json")
    assert done.exit_code == 0, done.output
    assert "3 prompts" in done.output
    assert "prompts: 0 of 3 done\n" in done.output, "without a terminal, lines"
    assert "prompts: 3 of 3 done\n" in done.output
    assert not list(tmp_path.glob("*.partial"))
    again = run(*common, "-o", tmp_path / "wave.json")
    assert again.exit_code == 2
    assert "--force" in again.output
    profile = ra.DemandProfile.load(tmp_path / "wave.json")
    assert profile.source["model"] == str(model_folder)

    shown = run("profile", "show", tmp_path / "wave.json", "-b", 64, "--plot", tmp_path / "wave.png")
    assert shown.exit_code == 0, shown.output
    studied = run("profile", "study", tmp_path / "wave.json", "--plot", tmp_path / "study.png")
    assert studied.exit_code == 0, studied.output
    for picture in ("wave.png", "study.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    refused = run("profile", "show", tmp_path / "wave.json", "--plot", tmp_path / "wave.svg")
    assert refused.exit_code == 2

    named = run(*common, "--limit", 1, "--name", "tiny", "-o", tmp_path / "named.json")
    assert named.exit_code == 0, named.output
    assert ra.DemandProfile.load(tmp_path / "named.json").source["model"] == "tiny"
    one = run(*common, "--limit", 1, "-o", tmp_path / "one.json")
    assert one.exit_code == 0, one.output
    twice = run("profile", "merge", tmp_path / "wave.json", tmp_path / "one.json", "-o", tmp_path / "all.json")
    assert twice.exit_code == 2
    assert "counted twice" in twice.output
    for file in ("wave.json", "one.json"):
        assert str(tmp_path / file) in twice.output, "both files are named"
    alone = run("profile", "merge", tmp_path / "one.json", "-o", tmp_path / "all.json")
    assert alone.exit_code == 0
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "one.json").read_bytes()

    assert "with 64 tokens per head nothing was lost" in " ".join(shown.output.split())
    assert " ".join(shown.output.split()).count("with 64 tokens per head nothing was lost") == 1, "said twice"
    assert "what rkv's evictions cost, by tokens per head (a round every" in shown.output
    columns = [line.split("│")[1:-1] for line in shown.output.splitlines() if line.count("│") == 4]
    grid = ra.DemandProfile.load(tmp_path / "wave.json").grids["rkv"].budgets
    assert [int(budget) for budget, attention, nats in columns] == list(grid)
    assert all(attention.strip().endswith("%") and float(nats) is not None for _, attention, nats in columns)
    for method in ("reasonalloc", "missalloc", "lossalloc"):
        used = run(
            "generate", "-m", model_folder, "-p", "w3 w4", "-b", 24, "--method", method, "--max-new-tokens", 20,
            "--profile", tmp_path / "wave.json",
        )  # fmt: skip
        assert used.exit_code == 0, used.output


def test_a_correlation_and_its_interval():
    """Against Fisher's z by hand: tanh(atanh(r) -+ 1.96 / sqrt(n - 3))."""
    rng = np.random.default_rng(0)
    first = rng.random(24)
    second = first + rng.random(24)
    found, low, high = correlation(first, second)
    centred = [x - x.mean() for x in (first, second)]
    expected = (centred[0] @ centred[1]) / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert found == pytest.approx(expected)
    half = 1.959964 / np.sqrt(21)
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(expected) - half), np.tanh(np.arctanh(expected) + half)))
    for wrong in (first[:3], np.ones(24)):
        with pytest.raises(ValueError, match="a correlation needs four values that differ"):
            correlation(wrong, first[: len(wrong)])


def test_compare_command(tmp_path):
    for name, wave, seed in (("a", WAVE, 0), ("b", OTHER, 1)):
        (tmp_path / f"{name}.json").write_bytes(profile_of(wave, 0.05, 5, seed).to_json())
    done = run("profile", "compare", tmp_path / "a.json", tmp_path / "b.json", "--permutations", 99)
    assert done.exit_code == 0, done.output
    assert "0.0000" in done.output
    assert "tasks" in done.output
    assert run("profile", "compare", tmp_path / "a.json").exit_code == 2


def test_miss_curves_are_shown(tmp_path):
    misses = {"h2o": np.linspace(40, 10, 2)[:, None, None] * np.ones((2, LAYERS, 2))}
    profile = profile_of(WAVE, 0.1, 4, misses=misses, grids={"h2o": MissGrid((16, 32), 128)})
    (tmp_path / "a.json").write_bytes(profile.to_json())
    done = run("profile", "show", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    told = " ".join(done.output.split())
    assert "what h2o's evictions cost, by tokens per head (a round every 128 tokens):" in told
    assert "│ 16 │ 40.0% │ │ 32 │ 10.0% │" in told
    assert (tmp_path / "a.png").exists()


# ---- profile="auto" --------------------------------------------------------------------------------------


def test_auto_calibrates_once_and_keeps_it(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REASONALLOC_CACHE", str(tmp_path))
    short = ra.CalibrationSettings(max_new_tokens=80, miss=("rkv",))
    monkeypatch.setattr(auto_profile, "SETTINGS", short)
    words = [ra.ProbePrompt("w5 w6 w7 " * 10), ra.ProbePrompt("w8 w9 " * 12)]
    monkeypatch.setattr(calibration, "built_in_prompts", lambda: words)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="reasonalloc")
    compression = ra.Compression.method("reasonalloc", 64, profile="auto")
    first = ra.Cache(model.config, compression)
    assert "calibrating" in capsys.readouterr().err
    (kept,) = (tmp_path / "profiles").iterdir()
    assert first.compression.demand_profile.to_json() == kept.read_bytes()
    assert first.stats().method["layers"] == "wave"
    second = ra.Cache(model.config, ra.Compression.method("missalloc", 20, profile="auto"))
    assert capsys.readouterr().err == ""
    assert second.compression.demand_profile.to_json() == kept.read_bytes()
    nameless = tiny_model()
    with pytest.raises(ValueError, match=r"auto.*only: run `reasonalloc calibrate --model MODEL --sensitivity"):
        ra.Cache(model.config, ra.Compression.method("sensitivity", 64, profile="auto"))
    with pytest.raises(ValueError, match="name_or_path is empty"):
        ra.Cache(nameless.config, compression)


def test_wave_without_a_profile_names_the_command():
    with pytest.raises(
        ValueError, match=r"layers='wave' needs .* `reasonalloc calibrate --model MODEL -o profile\.json`"
    ):
        ra.Compression(64, layers="wave")


def test_profiles_of_one_file_are_equal(tmp_path):
    wave = np.linspace(3, 9, 4)
    profile_of(wave, 0.05, 5, 0).save(tmp_path / "wave.json")
    first, second = (ra.DemandProfile.load(tmp_path / "wave.json") for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != profile_of(wave, 0.05, 5, 1)
    assert first != "wave.json"
    assert ra.Compression(32, profile=first) == ra.Compression(32, profile=second)
