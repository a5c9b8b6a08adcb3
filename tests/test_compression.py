"""``Compression``: what was asked is kept, what it reads as is decided anew in copies, and wrong values are named."""

import copy
import dataclasses
import json
import pickle
import re
from dataclasses import dataclass

import numpy as np
import pytest

import reasonalloc as ra
from reasonalloc.policies.registry import Registry
from reasonalloc.policies.scoring import SCORERS

PROFILE = ra.DemandProfile.of_layers((1.0, 2.0), ra.ModelShape(2, 3, 6, 16), "qwen2")
COPIES = pytest.mark.parametrize("change", [ra.Compression.replace, dataclasses.replace], ids=["own", "dataclasses"])


# ---- copies with changes ----


@COPIES
def test_the_window_left_open_follows_the_scorer(change):
    assert change(ra.Compression(256), scorer="vase").window == 64
    assert change(ra.Compression(256, "vase"), scorer="tova").window == 0
    assert change(ra.Compression(512, window=300), budget=1024, scorer="vase").window == 300


@COPIES
def test_what_a_method_sets_by_budget_follows_the_budget(change):
    h2o = ra.Compression.method("h2o", 256)
    assert h2o.window == 128
    assert change(h2o, budget=512).window == 256
    assert change(change(h2o, budget=512), budget=64).window == 32
    assert change(change(h2o, window=16), budget=512).window == 16
    assert change(ra.Compression.method("h2o", 256, window=16), budget=512).window == 16
    assert change(h2o, interval=64) == ra.Compression.method("h2o", 256, interval=64)


def test_a_window_asked_for_stays_even_where_it_is_the_scorers_own():
    assert ra.Compression(256).replace(window=8).replace(scorer="vase").window == 8
    assert ra.Compression.method("h2o", 16).replace(window=8).replace(budget=512).window == 8


@COPIES
def test_layers_left_open_follow_the_profile(change):
    for start in (ra.Compression(256), ra.Compression.method("reasonalloc", 256), ra.Compression(256, layers=None)):
        assert start.layers == ra.DynamicLayers()
        with_profile = change(start, profile=PROFILE)
        assert with_profile.layers == ra.WaveLayers()
        assert change(with_profile, profile=None).layers == ra.DynamicLayers()
    asked = ra.Compression(256, layers="dynamic")
    assert change(asked, profile=PROFILE).layers == ra.DynamicLayers()


@COPIES
def test_miss_curves_follow_the_scorer_unless_they_name_one(change):
    start = ra.Compression.method("missalloc", 256, profile=PROFILE)
    changed = change(start, scorer="snapkv")
    assert (start.layers.scorer, start.heads.scorer) == ("rkv", "rkv")
    assert (changed.layers.scorer, changed.heads.scorer) == ("snapkv", "snapkv")
    named = ra.Compression(256, layers=ra.MissCurveLayers(scorer="rkv"), heads="uniform", profile=PROFILE)
    with pytest.raises(ValueError, match="curves of 'rkv' do not describe scorer 'snapkv'"):
        change(named, scorer="snapkv")


@COPIES
def test_the_full_cache_takes_a_budget(change):
    assert change(ra.Compression.method("full"), budget=64) == ra.Compression(64, layers="uniform", heads="uniform")


@COPIES
def test_a_profiles_file_is_read_once(change, tmp_path):
    path = tmp_path / "wave.json"
    path.write_text(json.dumps(PROFILE.to_dict()))
    start = ra.Compression(256, profile=path)
    path.unlink()
    assert change(start, budget=512).profile is start.profile


def test_settings_are_copied():
    settings = {"name": "rkv", "kernel": 5}
    start = ra.Compression(256, settings)
    settings["kernel"] = 9
    assert start.replace(budget=128).scorer == ra.RKV(kernel=5)


# ---- equal, hashed, copied, pickled ----


def test_what_reads_alike_is_equal():
    same = [
        ra.Compression(256),
        ra.Compression(256, "rkv", "dynamic", {"name": "threshold"}, window=8),
        ra.Compression(512, "vase").replace(budget=256, scorer=ra.RKV()),
        ra.Compression.method("reasonalloc", 256),
    ]
    assert len(set(same)) == 1
    assert ra.Compression(256) != ra.Compression(256, window=9)
    assert "asked" not in repr(same[0])
    assert repr(same[0]) == repr(same[1])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_remember_what_was_asked(copied):
    start = ra.Compression.method("h2o", 2000, interval=1000)
    again = copied(start)
    assert again == start
    for change in (ra.Compression.replace, dataclasses.replace):
        changed = change(again, budget=4000)
        assert (changed.window, changed.interval) == (2000, 1000)
    assert copied(ra.Compression(256, profile=PROFILE)).replace(budget=512).layers == ra.WaveLayers()


# ---- what may be given ----


def test_the_window_among_a_scorers_settings():
    assert ra.Compression(256, {"name": "rkv", "window": 16}) == ra.Compression(256, window=16)
    assert ra.Compression(256, {"name": "rkv", "window": 16}).replace(scorer="vase").window == 64
    assert ra.Compression.method("h2o", 256, scorer={"name": "h2o", "window": 16}).replace(budget=512).window == 16
    assert ra.Compression(256, {"name": "rkv", "window": 16}, window=16).window == 16
    with pytest.raises(ValueError, match="window is 8, and 16 in the scorer's settings: give it once"):
        ra.Compression(256, {"name": "rkv", "window": 16}, window=8)
    with pytest.raises(ValueError, match="window must be a whole number of tokens, at least 0, got '16'"):
        ra.Compression(256, {"name": "rkv", "window": "16"})
    with pytest.raises(ValueError, match="unknown token scorer 'rvk'"):
        ra.Compression(256, {"name": "rvk", "window": 16})


@pytest.fixture
def own_names(monkeypatch):
    """Names registered by a test are forgotten after it."""
    monkeypatch.setattr(SCORERS, "_classes", dict(SCORERS._classes))


@pytest.mark.usefixtures("own_names")
def test_a_scorer_may_have_a_window_of_its_own():
    @ra.register_scorer("mine")
    @dataclass(frozen=True)
    class Mine(ra.Scorer):
        window: int = 4

        def score(self, seen):
            return seen.tokens.positions.float()

    made = ra.Compression(256, {"name": "mine", "window": 16})
    assert (made.scorer, made.window) == (Mine(16), 16)
    assert ra.Compression(256, "mine").window == 4


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_whole_numbers_are_numbers(kind):
    made = ra.Compression(kind(100), interval=kind(32), window=kind(9), seed=kind(3))
    assert made == ra.Compression(100, interval=32, window=9, seed=3)
    assert {type(getattr(made, name)) for name in ("budget", "interval", "window", "seed")} == {int}
    assert ra.Compression.method("h2o", kind(100)).window == 50
    assert json.dumps(made.describe())
    described = ra.Compression(64, {"name": "rkv", "kernel": kind(5), "weight": np.float32(0.5)}).describe()
    assert json.loads(json.dumps(described))["scorer"]["kernel"] == 5


WRONG = [
    ({"layers": 5}, 'a layer allocator is a name, {"name": ...} with settings, or a LayerAllocator object, got 5'),
    ({"heads": 5}, 'a head allocator is a name, {"name": ...} with settings, or a HeadAllocator object, got 5'),
    ({"heads": ra.RKV()}, "or a HeadAllocator object, got RKV(weight="),
    ({"layers": ra.UniformHeads()}, "or a LayerAllocator object, got UniformHeads()"),
    ({"scorer": ra.RKV}, "or a Scorer object, got the class RKV: write RKV()"),
    ({"heads": ra.UniformHeads}, "got the class UniformHeads: write UniformHeads()"),
    ({"scorer": None}, "or a Scorer object, got None; names: h2o, knorm, "),
    ({"heads": None}, "or a HeadAllocator object, got None"),
    ({"profile": {"layers": []}}, "profile must be a DemandProfile, the path of its JSON file or 'auto', got {'lay"),
    ({"profile": 5}, "profile must be a DemandProfile, the path of its JSON file or 'auto', got 5"),
    ({"profile": False}, "profile must be a DemandProfile, the path of its JSON file or 'auto', got False"),
    ({"budget": 64.0}, "budget must be a whole number of tokens, at least 1, got 64.0"),
    ({"budget": np.float64(64)}, "budget must be a whole number of tokens, at least 1, got "),
    ({"budget": True}, "budget must be a whole number of tokens, at least 1, got True"),
    ({"budget": np.bool_(True)}, "budget must be a whole number of tokens, at least 1, got "),
    ({"budget": "64"}, "budget must be a whole number of tokens, at least 1, got '64'"),
    ({"interval": True}, "interval must be a whole number of tokens, at least 1, got True"),
    ({"window": 8.5}, "window must be a whole number of tokens, at least 0, got 8.5"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"prompt": ["compete"]}, "prompt must be one of compete, protect, pin, got ['compete']"),
    ({"asked": 3}, "asked is a Compression's own record, leave it out: got 3"),
    ({"scorer": {}}, 'a token scorer with settings needs its name, {"name": ...}, got {}'),
    ({"scorer": {"kernel": 5}}, "a token scorer with settings needs its name, {\"name\": ...}, got {'kernel': 5}"),
    ({"scorer": {"window": 5}}, "a token scorer with settings needs its name, {\"name\": ...}, got {'window': 5}"),
    ({"heads": {"name": 5}}, "a head allocator with settings needs its name"),
    (
        {"scorer": {"name": "rkv", "kernal": 5}},
        "unknown setting of token scorer 'rkv': 'kernal'. Did you mean 'kernel'",
    ),
    ({"scorer": {"name": "rkv", 5: 5}}, "unknown setting of token scorer 'rkv': 5. Known: kernel, per_token"),
    ({"layers": {"name": "pyramid", "window": 5}}, "unknown setting of layer allocator 'pyramid': 'window'"),
    ({"scorer": {"name": "rkv", "kernel": "5"}}, "kernel of token scorer 'rkv' must be a whole number, got '5'"),
    ({"scorer": {"name": "rkv", "kernel": True}}, "kernel of token scorer 'rkv' must be a whole number, got True"),
    ({"scorer": {"name": "rkv", "weight": "0.1"}}, "weight of token scorer 'rkv' must be a number, got '0.1'"),
    ({"scorer": {"name": "rkv", "weight": None}}, "weight of token scorer 'rkv' must be a number, got None"),
    ({"scorer": {"name": "rkv", "per_token": "no"}}, "per_token of token scorer 'rkv' must be True or False, got 'no'"),
    ({"scorer": ra.RKV(per_token="no")}, "per_token of token scorer 'RKV' must be True or False, got 'no'"),
    ({"layers": {"name": "miss-curve", "scorer": 5}}, "scorer of layer allocator 'miss-curve' must be a text, got 5"),
    ({"layers": {"name": "random-split", "spread": np.nan}}, "spread must not be negative, nor infinite, got nan"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_what_is_wrong_is_said(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ra.Compression(**{"budget": 64, **arguments})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.Compression(64).replace(**arguments) if "asked" not in arguments else ra.Compression(64, **arguments)


@pytest.mark.parametrize("name", [None, 5, {"name": "rkv"}])
def test_a_method_is_named_by_a_text(name):
    with pytest.raises(ValueError, match="unknown method"):
        ra.Compression.method(name, 64)


def test_the_full_cache_takes_no_budget_in_silence():
    assert ra.Compression.method("full").budget is None
    with pytest.raises(ValueError, match="method 'full' keeps every token and takes no budget, got 64: leave it out"):
        ra.Compression.method("full", 64)


def test_a_methods_budget_is_checked_before_it_is_reckoned_with():
    for wrong in ("256", 256.0):
        with pytest.raises(
            ValueError, match=re.escape(f"budget must be a whole number of tokens, at least 1, got {wrong!r}")
        ):
            ra.Compression.method("h2o", wrong)


# ---- names ----


class Animal:
    """What is registered below."""


def _animal(name, module="zoo", legs=4):
    return type(name, (Animal,), {"__module__": module, "legs": legs})


def test_two_classes_of_one_name_are_refused_unless_one_is_the_other_again():
    animals = Registry("animal", "reasonalloc.tests", Animal)
    first = animals.register("cat")(_animal("Cat"))
    with pytest.raises(
        ValueError, match=r"animal 'cat' is already registered by zoo\.Cat: choose another name for .*Cat"
    ):
        animals.register("cat")(_animal("Cat", module="farm"))
    assert type(animals.create("cat")) is first
    again = animals.register("cat")(_animal("Cat", legs=3))  # a notebook's cell, run again
    assert type(animals.create("cat")) is again
    assert animals.name_of(first()) == "cat"


@pytest.mark.parametrize("wrong", [int, "Cat", lambda: None])
def test_only_classes_of_the_kind_are_registered(wrong):
    animals = Registry("animal", "reasonalloc.tests", Animal)
    with pytest.raises(ValueError, match="animal 'cat' must be a subclass of Animal, got"):
        animals.register("cat")(wrong)


def test_a_decorator_without_a_name_is_named():
    animals = Registry("animal", "reasonalloc.tests", Animal)
    with pytest.raises(ValueError, match=r"registered under a name, register\('name'\), got <class"):
        animals.register(_animal("Cat"))


def test_settings_without_a_default_are_asked_for():
    animals = Registry("animal", "reasonalloc.tests", Animal)

    @animals.register("cat")
    @dataclass(frozen=True)
    class Cat(Animal):
        lives: int

    assert animals.create({"name": "cat", "lives": 9}) == Cat(9)
    for asked in ("cat", {"name": "cat"}):
        with pytest.raises(ValueError, match=re.escape("animal 'cat' needs lives: {\"name\": 'cat', 'lives': ...}")):
            animals.create(asked)


# ---- bounds ----


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (ra.Compression.method("full"), "a full cache has no bound: ask for a budget"),
        (ra.Compression(64), "layer budgets measured while decoding fix no layer's memory: pass a calibrated profile"),
        (ra.Compression.method("rkv", 64, prompt="protect"), "prompt='protect' has no bound: use prompt='pin'"),
    ],
)
def test_what_has_no_bound_says_why(made, reason):
    assert made.unbounded.startswith(reason)


@pytest.mark.parametrize("name", sorted(set(ra.METHODS) - {"full", "reasonalloc-dynamic"}))
def test_with_a_profile_all_other_methods_are_bounded(name):
    assert ra.Compression.method(name, 256, profile=PROFILE).unbounded == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 10**400}, "budget must be at most 1099511627776 tokens, got 1000"),
        ({"interval": 2**41}, "interval must be at most 1099511627776 tokens, got 2199023255552"),
        ({"pin_share": 10**400}, "pin_share is too large: 1000"),
    ],
)
def test_numbers_that_are_too_large(changes, message):
    with pytest.raises(ValueError, match=message):
        ra.Compression(**{"budget": 64, "prompt": "pin", **changes})
