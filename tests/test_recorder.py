"""The record of every routing: its arrays, its files, and the picture of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import tiny_model
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc import Recorder
from reasonalloc.cache.recorder import Routing
from reasonalloc.cli.app import app

INFINITY = float("inf")
TABLES = ("budgets", "kept", "held")
ARRAYS = ("step", "total", *TABLES)


def routing(
    step: int, layer: int, batch: int = 2, heads: int = 3, threshold: list[float] | None = None, more: int = 0
) -> Routing:
    """Every number another: a head's budget, what it held and keeps tell step, layer, sequence and head."""
    budgets = [[1000 * step + 100 * layer + 10 * b + h + more + 1 for h in range(heads)] for b in range(batch)]
    return Routing(
        step=step,
        layer=layer,
        total=[sum(row) for row in budgets],
        budgets=budgets,
        kept=[[b - 1 for b in row] for row in budgets],
        held=[[b + 5 for b in row] for row in budgets],
        threshold=threshold,
    )


def recorder_of(*routings: Routing) -> Recorder:
    recorder = Recorder()
    for entry in routings:
        recorder.add(entry)
    return recorder


def recorded(rounds: int = 3, layers: int = 4, threshold: list[float] | None = None) -> Recorder:
    return recorder_of(*(routing(r, layer, threshold=threshold) for r in range(rounds) for layer in range(layers)))


def unequal() -> Recorder:
    """Layer 0 has so much room that it routes late; layer 2 routes once."""
    return recorder_of(*(routing(step, layer) for step, layer in [(8, 1), (8, 2), (16, 1), (24, 0), (24, 1), (32, 0)]))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plot(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plot", "budgets", *map(str, arguments)])


# ---- arrays ------------------------------------------------------------------------------------------------


def test_layers_that_route_at_other_steps_are_not_paired() -> None:
    arrays = unequal().arrays()
    assert arrays["step"].tolist() == [8, 16, 24, 32]
    assert arrays["routed"].tolist() == [
        [False, True, True],
        [False, True, False],
        [True, True, False],
        [True, False, False],
    ]
    taken_from = [[None, 8, 8], [None, 16, 8], [24, 24, 8], [32, 24, 8]]  # the step at which each layer routed last
    for name in ("total", *TABLES):
        for i, steps in enumerate(taken_from):
            for layer, step in enumerate(steps):
                found = arrays[name][i, layer]
                wanted = np.full_like(found, -1) if step is None else getattr(routing(step, layer), name)
                np.testing.assert_array_equal(found, wanted)


def test_arrays_of_a_run_are_what_the_cache_held() -> None:
    """Budgets of 75, 15 and 30 a head: the layers evict for the first time at three different steps."""
    model = tiny_model()
    shape = ra.ModelShape(3, 3, 6, 16)
    profile = ra.DemandProfile.of_layers((400.0, 25.0, 100.0), shape, "llama")
    recorder = Recorder()
    compression = ra.Compression(budget=40, profile=profile, interval=8)
    cache = ra.Cache(model.config, compression, recorder=recorder)
    ids = torch.randint(2, 97, (1, 120), generator=torch.Generator().manual_seed(0))
    held = {}  # after every forward pass, as the cache itself says
    with torch.no_grad():
        for start, end in [(0, 20), *((i, i + 1) for i in range(20, 120))]:
            model(ids[:, start:end], past_key_values=cache)
            held[end] = [layer[0] for layer in cache.stats().kept]
    arrays = recorder.arrays()
    first = arrays["routed"].argmax(0)
    assert len(set(first.tolist())) == 3
    for i, step in enumerate(arrays["step"].tolist()):
        for layer in range(3):
            if i < first[layer]:
                assert (arrays["kept"][i, layer] == -1).all()
                assert held[step][layer] == [step] * 3
            else:
                assert arrays["routed"][i, layer]
                assert arrays["kept"][i, layer, 0].tolist() == held[step][layer]


def test_of_two_routings_at_one_step_the_last_counts() -> None:
    arrays = recorder_of(routing(8, 0), routing(8, 0, more=7), routing(16, 0)).arrays()
    assert arrays["step"].tolist() == [8, 16]
    assert arrays["kept"][0, 0].tolist() == routing(8, 0, more=7).kept


def test_layers_that_never_route_have_their_place() -> None:
    recorder = recorder_of(routing(8, 1))
    assert recorder.arrays()["kept"].shape == (1, 2, 2, 3)
    assert Recorder.attach(recorder, 4) is recorder
    kept = recorder.arrays()["kept"]
    assert kept.shape == (1, 4, 2, 3)
    assert (kept[0, [0, 2, 3]] == -1).all()
    assert kept[0, 1].tolist() == routing(8, 1).kept


def test_thresholds_are_nan_where_there_is_none() -> None:
    arrays = recorder_of(routing(8, 1, threshold=[0.5, INFINITY]), routing(16, 0), routing(16, 1)).arrays()
    nan = float("nan")
    np.testing.assert_array_equal(arrays["threshold"], [[[nan, nan], [0.5, INFINITY]], [[nan, nan], [nan, nan]]])
    assert "threshold" not in recorded().arrays()


@pytest.mark.parametrize("other", [routing(16, 0, batch=3), routing(16, 0, heads=2)])
def test_a_changed_batch_has_no_arrays(other: Routing) -> None:
    with pytest.raises(ValueError, match="the batch changed while recording"):
        recorder_of(routing(8, 0), other).arrays()


def test_two_generations_in_one_record_have_no_arrays() -> None:
    """The second generation's first rounds would stand before the first's last."""
    recorder = recorder_of(routing(8, 0), routing(16, 0), routing(8, 0))
    with pytest.raises(ValueError, match=r"layer 0 routed after 16 tokens and later after 8; give each generation"):
        recorder.arrays()


@pytest.mark.parametrize("wrong", [True, Recorder, "routing.json", []])
def test_only_a_recorder_is_a_recorder(wrong: object) -> None:
    with pytest.raises(
        TypeError, match=r"recorder must be None or a recorder, made with reasonalloc\.Recorder\(\), got"
    ):
        Recorder.attach(wrong, 4)
    assert Recorder.attach(None, 4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must be a whole number"),
        ({"layer": 1.0}, "layer must be a whole number"),
        ({"total": [5, True]}, "total must be whole numbers"),
        ({"kept": [[1, 2, 3]]}, "kept must be 2 lists"),
        ({"held": [[1, 2, 3], [4, 5]]}, "held must be 2 lists"),
        ({"budgets": 3}, "budgets must be 2 lists"),
        ({"threshold": [0.5]}, "threshold must be 2 floats"),
    ],
)
def test_a_routing_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"a routing's {message}"):
        Routing(**{**vars(routing(8, 1)), **change})


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize(
    "recorder",
    [
        recorder_of(),
        unequal(),
        recorder_of(routing(8, 0), routing(16, 1, threshold=[0.25, -1e-9]), routing(24, 0, batch=1, heads=2)),
        recorder_of(routing(8, 0, threshold=[INFINITY, -INFINITY]), routing(8, 0), routing(4, 0)),
        recorder_of(routing(8, 0, batch=0, threshold=[]), routing(8, 1)),
    ],
    ids=["empty", "unequal", "changed batch", "infinite, twice, back", "no sequence"],
)
def test_both_formats_hold_the_whole_record(tmp_path: Path, suffix: str, recorder: Recorder) -> None:
    Recorder.attach(recorder := copy.deepcopy(recorder), 5)
    path = tmp_path / f"run.{suffix}"
    recorder.save(path)
    assert left_in(tmp_path) == [path.name]
    for name in (path, str(path)):
        loaded = Recorder.load(name)
        assert loaded.routings == recorder.routings
        assert loaded.layers == 5


def test_infinite_thresholds_are_json_to_any_parser(tmp_path: Path) -> None:
    """The threshold is +inf where a layer's windows alone fill its total."""
    recorder_of(routing(1, 0, threshold=[INFINITY, -INFINITY])).save(tmp_path / "run.json")
    assert "Infinity" not in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("threshold", [None, [0.5, 1.5]])
def test_npz_holds_the_arrays(tmp_path: Path, threshold: list[float] | None) -> None:
    recorded(threshold=threshold).save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as saved:
        arrays = dict(saved)
    assert ("threshold" in arrays) == (threshold is not None)
    assert arrays["step"].tolist() == [0, 1, 2]
    assert arrays["routed"].all()
    assert arrays["total"].shape == (3, 4, 2)
    for name in TABLES:
        assert arrays[name].shape == (3, 4, 2, 3)
        assert np.issubdtype(arrays[name].dtype, np.integer)
        wanted = [[getattr(routing(r, layer), name) for layer in range(4)] for r in range(3)]
        assert arrays[name].tolist() == wanted
    if threshold is not None:
        assert arrays["threshold"].tolist() == [[threshold] * 4] * 3


@pytest.mark.parametrize("recorder", [Recorder(), recorder_of(routing(8, 0), routing(16, 0, batch=3))])
def test_npz_leaves_out_arrays_that_there_are_not(tmp_path: Path, recorder: Recorder) -> None:
    recorder.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as saved:
        assert not set(ARRAYS) & set(saved)


@pytest.mark.parametrize("name", ["run", "run.txt", "run.json.gz", "run.npy"])
def test_wrong_suffix_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"\.json or \.npz.*{name}"):
        recorded().save(tmp_path / name)
    assert left_in(tmp_path) == []


ENTRY = json.dumps(vars(routing(8, 1)))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", "null", "{}", "\x00\x01", "[" * 100_000,
        '{"schema": 1, "routings": 3}',
        '{"schema": 1, "routings": [{"step": 1}]}',
        '{"schema": 1, "routings": [7]}',
        '{"routings": []}',
        '{"schema": 1, "layers": "four", "routings": []}',
        '{"schema": 1, "entry_bytes": -1, "routings": []}',
        f'{{"schema": 1, "routings": [{ENTRY.replace("8103", "null")}]}}',
    ],
)  # fmt: skip
def test_loading_another_file_says_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is not a record of routings, or damaged: ") as raised:
        Recorder.load(path)
    assert "\n" not in str(raised.value)


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema": 2, "routings": []}')
    with pytest.raises(ValueError, match="its schema is 2, and this version of reasonalloc reads 1"):
        Recorder.load(tmp_path / "run.json")
    recorded().save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz") as saved:
        np.savez(tmp_path / "new.npz", **{**saved, "schema": np.array(2)})
    with pytest.raises(ValueError, match="its schema is 2"):
        Recorder.load(tmp_path / "new.npz")


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no record at .*none\.json"):
        Recorder.load(tmp_path / "none.json")


def test_a_record_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    entry = vars(routing(1, 0)) | {"colour": "blue"}
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "routings": [entry]}))
    with pytest.raises(ValueError, match="colour"):
        Recorder.load(tmp_path / "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": None},
        {"routings_kept": None},
        {"routings_kept": np.arange(5)},
        {"routings_held": np.arange(500)},
        {"routings_step": np.arange(7.0)},
        {"routings_batch": np.array([[2]])},
        {"routings_total": np.array([b"a", 3], dtype=object)},
        {"layers": np.array([1, 2])},
        {"entry_bytes": np.array(0.5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_npz_that_is_no_record_says_so(tmp_path: Path, change: dict[str, Any]) -> None:
    recorded().save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as saved:
        content = {name: value for name, value in {**saved, **change}.items() if value is not None}
    np.savez(tmp_path / "run.npz", **content)
    with pytest.raises(ValueError, match=r"run\.npz is not a record of routings, or damaged: "):
        Recorder.load(tmp_path / "run.npz")


def test_a_damaged_npz_says_so(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte wrong: the right record or one sentence."""
    path = tmp_path / "run.npz"
    recorder = unequal()
    recorder.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for at in rng.integers(len(whole), size=150).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        for content in (bytes(flipped), whole[:at]):
            path.write_bytes(content)
            try:
                loaded = Recorder.load(path)
            except ValueError as error:
                messages.append(str(error))
            else:
                assert loaded.routings == recorder.routings
    assert len(messages) > 200
    assert all("run.npz is not a record of routings, or damaged: " in message for message in messages)


# ---- the picture -------------------------------------------------------------------------------------------


def drawn(recorder: Recorder, sequence: int = 0) -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from reasonalloc.evaluation.plots import _draw_budgets

    figure = Figure(layout="constrained")
    _draw_budgets(figure, recorder.arrays(), sequence)
    return figure


def test_the_picture_shows_what_is_held_at_its_step() -> None:
    recorder = unequal()
    over_time, over_layers, bar = drawn(recorder, sequence=1).axes
    (mesh,) = over_time.collections
    kept = recorder.arrays()["kept"][:, :, 1]  # rounds, layers, heads
    found = np.ma.filled(mesh.get_array(), -1)  # rows of heads, columns of rounds
    np.testing.assert_array_equal(found, kept.reshape(4, 9).T)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [8, 16, 24, 32, 40]
    assert [text.get_text() for text in over_time.get_xticklabels()] == ["8", "16", "24", "32"]
    assert "held" in bar.get_ylabel()
    lines = {patch.get_label(): patch.get_data().values for patch in over_layers.patches if hasattr(patch, "get_data")}
    np.testing.assert_allclose(lines["held: mean of the layer's heads"], kept[-1].mean(-1))
    np.testing.assert_array_equal(lines["held: least to most of a head"], kept[-1].max(-1))
    np.testing.assert_allclose(lines["budget: mean of the layer's heads"], recorder.arrays()["total"][-1, :, 1] / 3)


def test_the_legend_says_what_is_drawn() -> None:
    def legend(recorder: Recorder) -> list[str]:
        (found,) = drawn(recorder).legends
        return [text.get_text() for text in found.get_texts()]

    held = ["held: least to most of a head", "held: mean of the layer's heads"]
    budget, silent = "budget: mean of the layer's heads", "nothing evicted yet: every token seen is held"
    assert legend(recorded()) == [*held, budget]
    assert legend(unequal()) == [*held, budget, silent]
    protected = replace(routing(8, 0), kept=[[5000] * 3] * 2, budgets=[[1000] * 3] * 2, total=[3000] * 2)
    assert legend(recorder_of(protected)) == [*held, f"{budget} (a protected prompt on top)"]


def test_ticks_are_rounds_that_do_not_crowd() -> None:
    recorder = recorder_of(*(routing(step, 0) for step in [100, *range(101, 110), *range(200, 2000, 7)]))
    ticks = drawn(recorder).axes[0].get_xticks().tolist()
    assert 4 <= len(ticks) <= 10
    assert set(ticks) <= {r.step for r in recorder.routings}


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_plot_budgets_reads_both_formats(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / f"routing.{suffix}", tmp_path / "budgets.png"
    unequal().save(record)
    result = plot(record, "-o", picture, "--sequence", 1)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = plot(record, "-o", picture, "--sequence", 2)
    assert result.exit_code == 2
    assert "the record has sequences 0 to 1, got 2" in result.stderr


def test_plot_of_a_missing_or_wrong_record(tmp_path: Path) -> None:
    assert "no record at" in plot(tmp_path / "none.json").stderr
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    assert "is not a record of routings" in " ".join(plot(wrong).stderr.split())
    Recorder().save(tmp_path / "empty.npz")
    assert "no routing was recorded" in " ".join(plot(tmp_path / "empty.npz").stderr.split())
