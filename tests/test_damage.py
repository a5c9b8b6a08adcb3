"""What happens to files: power losses, bits that flip, and what comes from outside."""

import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.cli.app import app
from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.findings import collect
from reasonalloc.evaluation.questions import FIDELITY, Question, QuestionSet
from reasonalloc.evaluation.report import write_report
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import Study, digest
from reasonalloc.files import sealed, unsealed, write_atomically, write_once
from reasonalloc.tasks import TASKS

PROFILE = ra.DemandProfile.of_layers([1.0, 3.0], ra.ModelShape(2, 2, 4, 8))
STUDY = {
    "model": "made up",
    "tasks": [{"name": "maps:6", "count": 3}, {"name": "maps:4", "fidelity": True, "count": 2}],
    "variants": ["full", "rkv", {"name": "auto", "method": "reasonalloc", "changes": {"profile": "auto"}}],
    "budgets": [16],
    "samples": 1,
    "sampling": {"temperature": 0, "top_p": 1.0, "max_new_tokens": 60},
    "batch": 2,
}


def made_up(unit):
    """A result that follows from the unit alone."""
    rng = random.Random(unit.key)
    if unit.grader == FIDELITY:
        nll = [round(rng.random(), 6) for _ in range(5)]
        return Reading(nll, [x / 2 for x in nll], [x < 0.5 for x in nll], 12.5, 1000, True)
    problem = TASKS.create("maps").problem(int(unit.question.id), 6)
    right = unit.cell.method == "full" or rng.random() < 0.5
    text = f"{problem.thought} <answer> {problem.answer if right else 'x1'}"
    return Answer(text, 20, True, 12.5, 1000, unit.cell.budget is not None)


class FakeWorker:
    """In a model's place."""

    together, writes, fingerprint = False, True, "m"

    def __init__(self, *arguments, **options):
        pass

    def beyond_positions(self, study, sets):
        return ""

    def auto_profile(self, study, *more):
        return PROFILE

    def run(self, batch, keep, written):
        made = [made_up(unit) for unit in batch]
        for unit, result in zip(batch, made, strict=True):
            keep(unit, result)
        return made


@pytest.fixture
def command(monkeypatch):
    """Calls a command; pictures, which take most of a report's time, are left out."""

    def no_pictures(*arguments, **options):
        raise ImportError

    monkeypatch.setattr("reasonalloc.evaluation.executors.Worker", FakeWorker)
    monkeypatch.setattr("reasonalloc.evaluation.plots.draw_curves", no_pictures)

    def call(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code in (0, 2), (done.exception, done.stderr)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return call


@pytest.fixture
def whole(command, tmp_path):
    """A finished folder, graded, and its report."""
    (tmp_path / "study").write_text(json.dumps(STUDY))
    folder = tmp_path / "whole"
    assert command("eval", "-o", folder, "--study", tmp_path / "study").exit_code == 0
    assert command("report", folder).exit_code == 0
    return folder


def reported(folder):
    return {path.name: path.read_bytes() for path in (folder / "report").iterdir()}


def damage(path, rng):
    content = bytearray(path.read_bytes())
    kind = rng.choice(("truncated", "empty", "zeros", "bit", "bit", "bit", "bit"))
    at = rng.randrange(len(content))
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":  # what some file systems leave of blocks that were not written
        content[at:] = bytes(len(content) - at)
    else:
        del content[at if kind == "truncated" else 0 :]
    path.write_bytes(content)
    return f"{path} {kind} at {at}"


def damages(command, whole, count):
    """Damage one file of a finished folder, again and again; returns how often what kind of file."""
    expected, results = reported(whole), Store(whole).results()
    kinds = [sorted(whole.glob(pattern)) for pattern in ("results/*/*.json", "grades/*/*.json", "*.json")]
    rng, found, folder = random.Random(0), dict.fromkeys(("sound", "results", "grades", "named"), 0), whole.parent / "x"
    shutil.copytree(whole, folder)
    for i in range(count):
        for path in (folder / "report").iterdir():
            path.unlink()
        path = folder / rng.choice(kinds[i % 3]).relative_to(whole)
        what, kind = damage(path, rng), path.relative_to(folder).parts[0]
        before = command("report", folder)
        resumed = command("eval", "--resume", "-o", folder)
        if before.exit_code == 0:
            assert reported(folder) == expected, what
            assert "damaged" not in before.stderr + resumed.stderr, what
        else:
            assert str(path) in before.stderr, (what, before.stderr)
        if kind == "results":
            assert resumed.exit_code == 0, what
            assert (before.exit_code == 0) != (f"1 result is damaged ({path}): made anew" in resumed.stderr), what
        if kind == "grades":
            assert before.exit_code == 0, what
        if resumed.exit_code == 0:
            assert before.exit_code == 0 or command("report", folder).exit_code == 0, what
            assert reported(folder) == expected, what
            assert before.exit_code == 0 or Store(folder).results() == results
        else:
            assert str(path) in resumed.stderr, (what, resumed.stderr)
        found[kind if kind in found else "named" if before.exit_code else "sound"] += 1
        path.write_bytes((whole / path.relative_to(folder)).read_bytes())
    return found


def test_damage_is_mended_or_named(command, whole):
    found = damages(command, whole, 12)
    assert min(found[kind] for kind in ("results", "grades", "named")) > 0, found


@pytest.mark.slow
def test_much_damage_is_mended_or_named(command, whole):
    found = damages(command, whole, 200)
    print(found)
    assert min(found[kind] for kind in ("results", "grades", "named")) > 10, found


@pytest.mark.parametrize("name", ["study.json", "inputs.json", "demand_profile.json"])
def test_a_damaged_file_that_settles_things_is_named_with_the_remedy(command, whole, name):
    for content in (b"", (whole / name).read_bytes()[:-9], b"[1]", b"\xff", b"[" * 100_000):
        (whole / name).write_bytes(content)
        for call in (("report", whole), ("report", whole, "--partial"), ("eval", "--resume", "-o", whole)):
            done = command(*call)
            assert done.exit_code == 2
            assert str(whole / name) in done.stderr
            assert "restore it, or delete it and " in done.stderr
    (whole / name).unlink()
    again = ("--study", whole.parent / "study") if name == "study.json" else ("--resume",)
    assert command("eval", "-o", whole, *again).exit_code == 0
    assert command("report", whole).exit_code == 0


def test_damaged_results_are_counted_as_missing(command, whole):
    expected, (first, second, *_) = reported(whole), sorted(whole.glob("results/*/*.json"))
    first.write_bytes(b"")
    other = json.loads(second.read_text())
    second.write_text(json.dumps(sealed({**unsealed(other), "unit": {**other["unit"], "seed": 1}})))  # another unit's
    done = command("report", whole)
    assert done.exit_code == 2
    assert f"2 results are damaged ({first}); run `reasonalloc eval --resume -o {whole}`, or" in done.stderr
    done = command("report", whole, "--partial")
    assert done.exit_code == 0
    assert "INCOMPLETE: 2 answers are missing" in done.stdout
    done = command("eval", "--resume", "-o", whole)
    assert f"2 results are damaged ({first}): made anew" in done.stderr
    assert command("report", whole).exit_code == 0
    assert reported(whole) == expected


def test_a_grade_belongs_to_its_answer(command, whole):
    """An answer that was made anew, and otherwise, is not judged by the grade of the one before."""
    store = Store(whole)
    unit = next(unit for batch in store.plan() for unit in batch if unit.cell.method == "full")
    answer = store.read(unit)
    assert store.grade(unit, answer).correct
    assert not store.grade(unit, Answer("I do not know", 1, True, 1.0, 1)).correct
    assert store.grade(unit, answer).correct


def test_files_of_an_older_version_are_read(command, whole):
    """They have no checksums, and grades do not say of what."""
    expected = reported(whole)
    for path in whole.rglob("*.json"):
        content = unsealed(json.loads(path.read_text()))
        content.pop("answer", None)
        path.write_text(json.dumps(content))
    done = command("eval", "--resume", "-o", whole)
    assert done.exit_code == 0
    assert "damaged" not in done.stderr
    assert command("report", whole).exit_code == 0
    assert reported(whole) == expected


@pytest.mark.parametrize("name", ["qwen-0.5b-gsm8k", "qwen-1.5b-fidelity"])
def test_results_of_the_first_version_are_read(tmp_path, name):
    archive = Path(__file__).parents[1] / "results" / name / "raw.tar.xz"
    with tarfile.open(archive) as raw:
        raw.extractall(tmp_path, filter="data")
    (study,) = tmp_path.rglob("study.json")
    store = Store(study.parent)
    plan = store.plan()
    assert sum(map(len, plan)) == len(store.results()) > 50
    assert not any(store.missing(batch) for batch in plan)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside", "a b:c"])
def test_names_lead_to_no_other_folder(monkeypatch, tmp_path, name):
    monkeypatch.setattr("reasonalloc.evaluation.plots.draw_curves", lambda **curves: None)
    monkeypatch.setattr("reasonalloc.evaluation.plots.png", lambda figure: b"png")
    study = Study.from_dict({**STUDY, "tasks": [{"name": name, "data": "x", "fidelity": True}]})
    questions = QuestionSet(f"{FIDELITY}:{name}", FIDELITY, (Question("../../q", "p", "r"),))
    folder = tmp_path / "a" / "b" / "run"
    store = Store(folder)
    store.begin(study, "../m", [questions], PROFILE)
    for batch in store.plan():
        for unit in batch:
            store.write(unit, made_up(unit))
    paths = write_report(collect(store, study, store.plan()), folder / "report")
    assert len(paths) == 5
    assert {path.resolve().parent for path in paths} == {folder / "report"}
    assert {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()} == {
        ("a", "b", "run")
    }


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are asked of Linux")
@pytest.mark.parametrize("write", [write_atomically, write_once])
def test_a_file_is_on_the_disk_before_it_counts(monkeypatch, tmp_path, write):
    """Its content before it has its name, then its name, and the names of new folders."""
    events = []

    def noted(name, of):
        before = getattr(os, name)

        def call(*arguments):
            events.append((name, of(*arguments)))
            return before(*arguments)

        monkeypatch.setattr(os, name, call)

    def opened(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    noted("fsync", opened)
    noted("replace", lambda whole, path: path.name)
    noted("link", lambda whole, path: path.name)
    write(tmp_path / "new" / "folder" / "file", b"content")
    names = [name for _, name in events]
    assert [name for name, _ in events][-3:-1] == ["fsync", "replace" if write is write_atomically else "link"]
    assert names[-3].startswith(".file.")
    assert names[-2:] == ["file", "folder"]
    assert names[:-3] == [tmp_path.name, "new"]


def test_a_checksum_is_of_all_else():
    document = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    assert unsealed(json.loads(json.dumps(sealed(document)))) == document == unsealed(document)
    assert sealed(document)["checksum"] == digest(document)
    with pytest.raises(ValueError, match="if you changed it yourself, remove 'checksum' from it"):
        unsealed({**sealed(document), "c": 1})
    with pytest.raises(ValueError, match="a JSON object is needed, found list"):
        unsealed([1])
