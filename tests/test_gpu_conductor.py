"""``make gpu`` without a GPU: parts that end well, fail, crash, run over; the table and the file. Parts are fakes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import gpu
    from gpu import Part
    from gpu_report import Clock, figure, one_line
finally:
    sys.path.remove(str(BENCHMARKS))

HEAD = f"import sys, time, os; sys.path.insert(0, {str(BENCHMARKS)!r}); from gpu_report import failure, figure, note\n"
MACHINE = {"gpu": "A GPU", "torch": "2.11.0", "transformers": "5.17.0"}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Writes fake parts, conducts them, and returns what was written."""
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "GRACE", 1.0)

    def play(scripts, limit=20.0, total=60.0, rehearse=False, options=True):
        parts = []
        for name, script in scripts.items():
            if script is not None:
                (tmp_path / f"{name}.py").write_text(HEAD + script)
            parts.append(Part(name, limit, f"{name}.py", options))
        output = tmp_path / "out.json"
        well = gpu.conduct(parts, output, MACHINE, rehearse, total)
        return well, json.loads(output.read_text())["parts"]

    return play


def test_figures_bars_and_notes(stage, capsys):
    well, parts = stage({
        "first": "figure('a', 1.5, 'ms', at_most=2)\nfigure('b', 3, 'ms', at_most=2)\nnote('c was left out')",
        "second": "print('chatter')\nfigure('d', 0.9, 'x', at_least=1)\nfigure('e', 123456.0)",
    })  # fmt: skip
    assert well
    assert [(x["figure"], x["value"], x["met"]) for x in parts["first"]["figures"]] == [
        ("a", 1.5, True),
        ("b", 3.0, False),
    ]
    assert [x["met"] for x in parts["second"]["figures"]] == [False, None]
    assert parts["first"]["notes"] == ["c was left out"]
    assert "tail" not in parts["second"]
    said = capsys.readouterr().out
    table = said[said.index("A GPU, torch 2.11.0") :]
    assert "chatter" not in said
    lines = [line.split() for line in table.splitlines()]
    assert ["a", "1.5", "ms", "<=", "2", "met"] in lines
    assert ["b", "3", "ms", "<=", "2", "NOT", "MET"] in lines
    assert "bars met: 1 of 3; failures in: no part" in table
    assert "  c was left out" in table


def test_a_part_that_fails_says_so_in_one_line_and_the_next_one_runs(stage, capsys):
    well, parts = stage({
        "raises": "figure('before', 1)\nraise ValueError('no\\nsuch thing')",
        "crashes": "figure('before', 2)\nos.abort()",
        "silent": "sys.exit(3)",
        "cell": "failure('one cell')\nfigure('after', 3)",
        "fine": "figure('after', 4)",
    })  # fmt: skip
    assert not well
    assert parts["raises"]["problem"] == "failed (exit 1): such thing"
    assert parts["crashes"]["problem"].startswith("failed (signal 6)")
    assert parts["silent"]["problem"] == "failed (exit 3): it said nothing"
    assert [part["figures"][0]["value"] for part in parts.values() if part["figures"]] == [1, 2, 3, 4]
    assert parts["cell"]["problem"] == ""
    assert parts["cell"]["failures"] == ["one cell"]
    assert any("ValueError" in line for line in parts["raises"]["tail"])
    assert "failures in: raises, crashes, silent, cell" in capsys.readouterr().out


def test_a_part_that_runs_over_is_ended_with_all_it_has_started(stage):
    child = "import time; time.sleep(60)"
    script = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {child!r}])
figure("child", child.pid)
time.sleep(60)
"""
    began = time.monotonic()
    well, parts = stage({"over": script, "fine": "figure('after', 1)"}, limit=2.0)
    assert time.monotonic() - began < 12
    assert not well
    assert parts["over"]["problem"] == "ran over its 2 seconds, and was ended"
    assert parts["fine"]["figures"][0]["value"] == 1
    assert not runs(int(parts["over"]["figures"][0]["value"]))


def runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1][:3]


def test_all_parts_share_one_limit(stage):
    well, parts = stage({"long": "time.sleep(60)", "late": "figure('a', 1)"}, limit=20, total=2.4)
    assert not well
    assert parts["long"]["problem"] == "ran over its 2 seconds, and was ended"
    assert parts["late"]["problem"] == "has not run: no time was left"


def test_the_file_is_whole_after_each_part(stage, tmp_path):
    look = f"import json; figure('parts', len(json.load(open({str(tmp_path / 'out.json')!r}))['parts']))"
    _, parts = stage({"first": "raise SystemExit(1)", "second": look, "third": look})
    assert [parts[name]["figures"][0]["value"] for name in ("second", "third")] == [1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] == ["out.json"]


def test_a_part_may_say_all_in_its_last_line(stage):
    last = {"figures": [{"figure": "a", "value": 2.0, "unit": "ms", "bar": "<= 3", "met": True}], "more": [1]}
    _, parts = stage({"vllm": f"print({json.dumps(last)!r})"}, options=False)
    assert parts["vllm"]["figures"] == last["figures"]
    assert parts["vllm"]["result"] == last
    _, parts = stage({"vllm": """print('{"step": 1.5, "graph": true, "name": "x"}')"""}, options=False)
    assert parts["vllm"]["figures"] == [{"figure": "step", "value": 1.5}]


def test_parts_are_told_their_time_and_what_is_missing_is_left_out(stage):
    well, parts = stage({"told": "figure(' '.join(sys.argv[1:]), 0)", "gone": None}, limit=7, rehearse=True)
    assert well
    assert parts["told"]["figures"][0]["figure"] == "--seconds 7 --rehearse"
    assert parts["gone"]["notes"] == ["there is no gone.py"]
    _, parts = stage({"untold": "figure('a', 0)"}, rehearse=True, options=False)
    assert parts["untold"]["notes"] == ["not rehearsed"]


def test_the_command_line(monkeypatch, capsys):
    def conduct(*options, **machine):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        monkeypatch.setattr(gpu, "look", lambda seconds: {"gpu": None, "missing": [], **machine})
        return gpu.main()

    with pytest.raises(SystemExit):
        conduct("--only", "stepps")
    assert "--only takes some of tests,attention,steps,decode,vllm, got stepps" in capsys.readouterr().err
    assert conduct() == 2
    assert capsys.readouterr().out.startswith("there is no GPU that torch can use")
    assert conduct(gpu="A GPU", missing=["triton"]) == 2
    assert capsys.readouterr().out == f"{sys.executable} has no triton\n"


@pytest.fixture
def tested(tmp_path):
    """Runs the part of tests on fake ones, and returns its figures, failures and last line."""
    for folder in ("benchmarks", "tests"):
        (tmp_path / folder).mkdir()
    for name in ("gpu_tests.py", "gpu_report.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q --strict-markers\nmarkers =\n gpu: a\n slow: b\n")

    def run(name, content, *options):
        (tmp_path / "tests" / name).write_text(content)
        command = [sys.executable, str(tmp_path / "benchmarks" / "gpu_tests.py"), *options]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        said = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.splitlines()
        found = [line for line in map(gpu.parsed, said) if line is not None]
        figures = {x["figure"]: x["value"] for x in found if "figure" in x}
        return figures, [x["failure"] for x in found if "failure" in x], said[-1]

    return run


TESTS = """
import pytest
def test_last(): raise AssertionError("not as\\nwanted")
@pytest.mark.gpu
def test_good(): print("{")
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(6))
def test_some(n): assert n < 5, f"{n} is too much"
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
"""


def test_tests_that_need_a_gpu_come_first_and_failures_are_one_line(tested):
    one = ("--file", "test_gpu.py", "--seconds")
    _, failures, counts = tested("test_gpu.py", TESTS, *one, "60")
    assert counts == "counts: passed=6 failed=2 skipped=1"
    assert [x.split("::")[1] for x in failures] == [
        "test_some[5] failed: AssertionError: 5 is too much",
        "test_last failed: AssertionError: not as",
    ]
    *_, counts = tested("test_gpu.py", TESTS, *one, "60", "--share", "1", "2")
    assert counts == "counts: passed=3 failed=1"
    *_, counts = tested("test_gpu.py", TESTS, *one, "9")
    assert counts == "counts: left_out=8 skipped=1"


def test_tests_that_cannot_be_collected_or_crash(tested):
    figures, failures, _ = tested("test_triton.py", "import no_such_module", "--seconds", "60")
    assert figures == {"tests passed": 0, "tests failed": 1}
    assert failures == ["test_triton.py cannot be collected: E   ModuleNotFoundError: No module named 'no_such_module'"]
    figures, failures, _ = tested("test_triton.py", "import os; os._exit(7)", "--seconds", "60")
    assert figures == {"tests passed": 0, "tests failed": 1}
    assert failures[0].startswith("test_triton.py: failed (7)")
    figures, failures, _ = tested("test_triton.py", "import time; time.sleep(60)", "--seconds", "5")
    assert figures == {"tests passed": 0, "tests failed": 1}
    assert failures == ["test_triton.py: a test ran over its time, and its process was ended"]


@pytest.mark.slow
def test_a_rehearsal_of_all_parts(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    parts = json.loads(output.read_text())["parts"]
    assert [*parts] == ["tests", "attention", "steps", "decode", "vllm"]
    for name, part in parts.items():
        assert gpu.is_well(part), name
        assert not part["notes"] or name == "vllm", part["notes"]
        assert part["figures"] or name == "vllm"


def test_small_things(capsys):
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
    assert Clock(0.0).left() <= 0
    figure("a", 1 / 3, at_most=0.5)
    assert json.loads(capsys.readouterr().out) == {
        "figure": "a", "value": 0.33333, "unit": "", "bar": "<= 0.5", "met": True,
    }  # fmt: skip
    assert [part.limit for part in gpu.PARTS[:4]] == [90, 60, 100, 110]
    assert gpu.TOTAL < 360


def test_the_conductor_leaves_the_environment_as_it_is(monkeypatch):
    """Other tests of this process go on with interpreted kernels; the parts compile theirs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "attention"])
    monkeypatch.setattr(gpu, "look", lambda seconds: {"missing": ["torch"], "gpu": None})
    assert gpu.main() == 2
    assert dict(os.environ) == before
    assert "TRITON_INTERPRET" not in gpu.uninterpreted()
