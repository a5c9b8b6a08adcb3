"""What comes from outside, changed in every way: a right result or one of our errors, and little more memory than it.

With ``checksum`` the file had one before it was changed; files of older versions and of other hands have none.
"""

import json
import math
import random
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_record import forgetting, made, words

import reasonalloc as ra
from reasonalloc.cache.recorder import Recorder, Routing
from reasonalloc.calibration.prompts import read_prompts
from reasonalloc.engines.vllm import settings as vllm_settings
from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.questions import FIDELITY, Question, QuestionSet, load_questions
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import Study
from reasonalloc.files import sealed, unsealed
from reasonalloc.policies.allocation import MissGrid, PromptDemand
from reasonalloc.policies.allocation.profile import HISTOGRAM_EDGES

SHAPE = ra.ModelShape(2, 2, 4, 8)
NASTY = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**30)),
    *(0.5, -0.0, 1e-320, 1e300, math.nan, math.inf),
    *("", "x", "12", "\x00", "\ud800", "../../x", "/dev/zero", "auto", "full", "rkv", "a" * 300),
    *([], {}, [[]], [1, [2]], ["5", "6"], [None], {"a": {"b": []}}, {"name": "rkv"}, {"name": "rkv", "kernel": 10**9}),
]
TOKENS = [b'"', b"[", b"]", b"{", b"}", b",", b"null", b"NaN", b"1e999", b"-", b"9" * 30, b"\\ud800", b"\x00", b"\xff",
          b"[" * 2000, b"9" * 5000]  # fmt: skip
MEASURED = 8  # of so many examples the memory of one is measured, which takes time
EXTRA = 2_000_000  # bytes beside ten times the file: caches, messages


def profile():
    rng = np.random.default_rng(0)
    prompts = [
        PromptDemand(
            name * 64, 9, rng.integers(1, 50, (2, 2, 4)).astype(float), {"rkv": rng.random((2, 2, 2))}, "task", 12,
            rng.random((2, 2)), {"rkv": rng.random((2, 2, 2))},
        ) for name in "ab"
    ]  # fmt: skip
    histogram = rng.integers(1, 5, (2, 4, len(HISTOGRAM_EDGES)))
    grids = {"rkv": MissGrid((8, 128), 4, True)}
    return ra.DemandProfile(
        SHAPE, (0.5, 0.93), tuple(prompts), {"model_type": "x"}, histogram, grids, {"a": 1}, {"b": "c"}
    )


STUDY = {
    "model": "made up",
    "tasks": [{"name": "maps:6", "count": 2}, {"name": "own", "data": "x.jsonl", "fidelity": True, "least_words": 2}],
    "variants": ["full", "rkv", {"name": "mine", "method": "reasonalloc", "changes": {"window": 2, "prompt": "pin"}}],
    "budgets": [16, 32],
    "samples": 2,
    "sampling": {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 60},
    "common": {"scorer": {"name": "rkv", "kernel": 5}, "window": 4},
    "interval_share": 0.5,
    "random_splits": 2,
    "random_budgets": [16],
    "baseline": "rkv",
    "dtype": "float32",
}
SETS = [
    QuestionSet("maps:6", "recall", (Question("0", "p", '{"a": "1"}'), Question("1", "q", '{"a": "2"}'))),
    QuestionSet("fidelity:own", FIDELITY, (Question("0", "p", "a b c"),)),
]


def store_of(folder):
    store = Store(folder)
    store.begin(Study.from_dict(STUDY), "m", SETS)
    return store


# ---- targets: each takes a folder and gives valid content, and what is to be done with a mutation of it ----


def fuzzed_profile(folder, checksum):
    path = folder / "wave.json"

    def use(content):
        path.write_bytes(content)
        found = with_path(path, partial(ra.DemandProfile.load, path))
        again = folder / "again.json"
        again.write_bytes(found.to_json())
        assert ra.DemandProfile.load(again).digest == found.digest
        shape, most = found.shape, 64
        for method in ("reasonalloc-layer", "missalloc", "lossalloc", "sensitivity"):
            made = ra.Compression.method(method, most, profile=found, window=2)
            budgets = made.layer_allocator.allocate(shape, most, 2, found)
            assert int(np.sum(np.asarray(budgets))) == most * shape.layers * shape.kv_heads

    document = profile().to_dict()
    return json.dumps(sealed(document) if checksum else document).encode(), use


def fuzzed_study(folder):
    path = folder / "study.json"

    def use(content):
        path.write_bytes(content)
        found = with_path(path, partial(Study.load, path))
        assert Study.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    return json.dumps(STUDY).encode(), use


def fuzzed_result(folder, reading, checksum):
    store = store_of(folder)
    unit = next(unit for batch in store.plan() for unit in batch if (unit.grader == FIDELITY) == reading)
    whole = (
        Reading([0.5, 1.5], [0.1, 0.2], [True, False], 3.5, 100) if reading else Answer("a: 1", 3, True, 2.5, 10, True)
    )
    store.write(unit, whole)
    (path,) = folder.glob("results/*/*.json")
    content = path.read_bytes()

    def use(changed):
        path.write_bytes(changed)
        store = Store(folder)
        found = store.read(unit)
        if found is None:
            assert store.damaged == {path}
            store.write(unit, whole)
            assert path.read_bytes() == content
        elif b'"checksum"' in changed:
            assert found == whole, "a checksum that is right belongs to this result"
        elif reading:
            assert all(type(x) in (int, float) for x in found.nll)
        else:
            assert store.grade(unit, found).score in (0.0, 1.0)

    return content if checksum else json.dumps(unsealed(json.loads(content))).encode(), use


def fuzzed_grade(folder):
    store = store_of(folder)
    unit = next(unit for batch in store.plan() for unit in batch if unit.grader != FIDELITY)
    answer = Answer("a: 1", 3, True, 2.5, 10, True)
    expected = store.grade(unit, answer)
    (path,) = folder.glob("grades/*/*.json")

    def use(content):
        path.write_bytes(content)
        assert store.grade(unit, answer) == expected

    return path.read_bytes(), use


def fuzzed_folder(folder, name, checksum):
    store = store_of(folder)
    keys = [[unit.key for unit in batch] for batch in store.plan()]
    path = folder / name
    content = path.read_bytes()

    def use(changed):
        path.write_bytes(changed)
        plan = with_path(path, lambda: Store(folder).plan())
        assert b'"checksum"' not in changed or [[unit.key for unit in batch] for batch in plan] == keys

    return content if checksum else json.dumps(unsealed(json.loads(content))).encode(), use


def fuzzed_record(folder, suffix, tokens=False):
    path, recorder = folder / f"record{suffix}", Recorder()
    for step in (8, 16):
        for layer in range(2):
            recorder.add(Routing(step, layer, [8, 8], [[4, 4]] * 2, [[4, 3], [2, 4]], [[9, 9]] * 2, [0.5, math.inf]))
    recorder.layers = 3
    if tokens:
        recorder = made(forgetting(2, 2, [8, 16], 0.3), [8, 16], words(20), 4, "rkv")
    recorder.save(path)

    def use(content):
        path.write_bytes(content)
        found = with_path(path, partial(Recorder.load, path))
        found.arrays()
        found.save(path)
        assert repr(Recorder.load(path).routings) == repr(found.routings)  # a threshold may be NaN

    content = path.read_bytes()
    return json.dumps(unsealed(json.loads(content))).encode() if suffix == ".json" else content, use


def fuzzed_lines(folder, read):
    path = folder / "own.jsonl"
    rows = [{"question": "2 + 2?", "answer": ["4", 5], "id": "a", "prompt": "x", "task": "t"},
            {"question": [{"role": "user", "content": "ü"}], "answer": 0.5, "unique_id": 3, "prompt": "y"}]  # fmt: skip

    def use(content):
        path.write_bytes(content)
        with_path(path, lambda: read(path))

    return "\n".join(json.dumps(row) for row in rows).encode(), use


def questions(path):
    for question in load_questions("own", path).questions:
        (question.id + question.prompt + question.reference).encode()


def fuzzed_variable(folder):
    asked = {"method": "missalloc", "budget": 64, "profile": str(folder / "wave.json"), "routing": "global"}
    asked |= {"scorer": {"name": "rkv", "kernel": 5}, "prompt": "pin", "pin_share": 0.5, "interval": 16, "seed": 3}
    (folder / "wave.json").write_bytes(profile().to_json())

    def use(content):
        found = vllm_settings._parse(content.decode("utf-8", "surrogateescape").strip())
        assert found is None or found.compression.budget > 0

    return json.dumps(asked).encode(), use


TARGETS = {
    "profile": partial(fuzzed_profile, checksum=False),
    "profile with checksum": partial(fuzzed_profile, checksum=True),
    "study": fuzzed_study,
    "answer": partial(fuzzed_result, reading=False, checksum=True),
    "answer without checksum": partial(fuzzed_result, reading=False, checksum=False),
    "reading": partial(fuzzed_result, reading=True, checksum=True),
    "reading without checksum": partial(fuzzed_result, reading=True, checksum=False),
    "grade": fuzzed_grade,
    "study.json": partial(fuzzed_folder, name="study.json", checksum=True),
    "inputs.json": partial(fuzzed_folder, name="inputs.json", checksum=True),
    "inputs.json without checksum": partial(fuzzed_folder, name="inputs.json", checksum=False),
    "record.json": partial(fuzzed_record, suffix=".json"),
    "record.json with tokens": partial(fuzzed_record, suffix=".json", tokens=True),
    "record.npz": partial(fuzzed_record, suffix=".npz"),
    "questions": partial(fuzzed_lines, read=questions),
    "prompts": partial(fuzzed_lines, read=read_prompts),
    "REASONALLOC": fuzzed_variable,
}


def with_path(path, load):
    """What ``load`` gives; its errors must name the file."""
    try:
        return load()
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise AssertionError(f"{path} is not named") from error
        raise


# ---- mutations ----


def places(value, at=()):
    """Every place in a JSON value, as a path of keys."""
    yield at
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*at, key))


def change_value(content, rng):
    """Another value somewhere, another key, an entry more or less."""
    lines = content.split(b"\n") if b"\n{" in content else [content]
    i = rng.randrange(len(lines))
    value = json.loads(lines[i])
    *path, last = rng.choice([at for at in places(value) if at])
    parent = value
    for key in path:
        parent = parent[key]
    kind = rng.randrange(5)
    if kind < 3:
        parent[last] = rng.choice(NASTY)
    elif kind == 3 and isinstance(parent, dict):
        parent[rng.choice(["checksum", "budget", "asked", "name", "layers", last + "x"])] = parent.pop(last)
    elif kind == 3:
        parent.append(parent[last])
    else:
        del parent[last]
    lines[i] = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def change_bytes(content, rng):
    """A bit, a piece gone, twice or elsewhere, a token more."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 40, 10**6)))
    kind = rng.randrange(6)
    if kind == 0 and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:a]
    if kind == 2:
        return content[:a] + content[b:]
    if kind == 3:
        return content[:b] + content[a:]
    return content[:a] + rng.choice(TOKENS) + content[a if kind == 4 else b :]


def change_array(content, rng):
    """A number in a record's arrays, or in their headers."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                end = data.index(b"\n")
                if rng.random() < 0.5:
                    data = data[: end + 1] + change_bytes(data[end + 1 :], rng)
                else:
                    header = data[:end].replace(b"(4,", rng.choice((b"(9,", b"(99999999999,", b"(-1,", b"(2, 2,")))
                    header = header.replace(b"<i8", rng.choice((b"<i8", b"|O8", b"<f8", b"|b1", b"<i2")))
                    data = header.ljust(end)[:end] + data[end:]
            new.writestr(name, data)
    return out.getvalue()


def mutated(content, seed):
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        try:
            if content.startswith(b"PK"):
                content = rng.choice((change_array, change_bytes))(content, rng)
            else:
                content = rng.choice((change_value, change_value, change_bytes))(content, rng)
        except Exception:  # it was broken already
            content = change_bytes(content, rng)
    return content


def fuzz(name, folder, examples):
    """Returns how many mutations were taken, and how many refused."""
    content, use = TARGETS[name](folder)
    use(content)
    outcomes = {"taken": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**64))
    def check(seed):
        changed, problem = mutated(content, seed), None
        if seed % MEASURED == 0:
            tracemalloc.start()
        try:
            use(changed)
        except (ValueError, OSError) as error:
            problem = error
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        outcomes["refused" if problem else "taken"] += 1
        assert not isinstance(problem, UnicodeError | json.JSONDecodeError)
        assert problem is None or len(str(problem).split()) > 3, problem
        assert peak < 10 * len(changed) + EXTRA, f"{peak} bytes for a file of {len(changed)}"

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check()
    return outcomes


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def measured(load):
    """Most memory that a call that raises ``ValueError`` takes, in bytes."""
    tracemalloc.start()
    with pytest.raises(ValueError):  # noqa: PT011 (what is asked here is the memory)
        load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("layers", "heads", "histogram"),
    [
        (10**9, 4, None),
        (2, 10**9, None),
        (1, 30_000, [[[]] * 30_000]),
        (30_000, 4, [[]] * 30_000),
        (1, 4, [[[1] * 30_000]]),
    ],
)
def test_sizes_that_a_profile_claims_are_not_allocated(tmp_path, layers, heads, histogram):
    document = profile().to_dict()
    document["model"] |= {"layers": layers, "query_heads": heads}
    document["histogram"] = histogram or document["histogram"]
    path = tmp_path / "wave.json"
    path.write_text(json.dumps(document))
    # Python's own empty list takes some 20 times its text; the bins of each head would take 200 times it.
    assert measured(lambda: ra.DemandProfile.load(path)) < 25 * path.stat().st_size + 500_000


def test_sizes_that_a_record_claims_are_not_allocated(tmp_path):
    path, whole = tmp_path / "record.npz", Recorder()
    whole.add(Routing(8, 0, [8], [[4, 4]], [[4, 4]], [[9, 9]], None))
    whole.save(path)
    arrays = dict(np.load(path))
    for changes in ({"batch": 10**12, "heads": 0}, {"batch": 10**12, "heads": -1}, {"batch": -1}, {"layer": 10**9}):
        changed = {f"routings_{name}": np.array([value]) for name, value in changes.items()}
        np.savez(path, **{**arrays, **changed})
        assert measured(lambda: Recorder.load(path)) < 10 * path.stat().st_size + 500_000
    np.savez(path, **{**arrays, "layers": np.array(10**9)})
    assert measured(lambda: Recorder.load(path)) < 10 * path.stat().st_size + 500_000


def test_sizes_that_a_study_claims_are_not_allocated(tmp_path):
    path = tmp_path / "study.json"
    for changes in ({"random_splits": 10**12}, {"samples": 10**12}, {"budgets": [10**400]}, {"interval_share": 1e300}):
        path.write_text(json.dumps({**STUDY, **changes}))
        assert measured(lambda: Study.load(path)) < 10 * path.stat().st_size + 500_000


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name, tmp_path):
    outcomes = fuzz(name, tmp_path, 300)
    assert outcomes["taken"], outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutations(name, tmp_path):
    print(name, fuzz(name, tmp_path, 10_000))
