"""Part of ``make gpu``: the tests that need a GPU, uninterpreted, and those of the kernels, which run on either.

Each file of tests is a process of its own; they run at the same time, as most of it is Triton compiling. Those that
need a GPU come first. A test that has not begun when the time is over is left out, and named.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_report import Clock, figure, note

TESTS = Path(__file__).resolve().parents[1] / "tests"
FILES = ("test_gpu.py", "test_triton.py", "test_*kernels.py")
DEVICE = "REASONALLOC_TEST_DEVICE"  # read by tests/test_gpu.py
QUICK = "padded or deepcopy or beams"  # of test_gpu.py, for a rehearsal
SLOWEST = 10.0  # seconds that a test may take; none is begun with less
COUNTS = "counts:"


class Reporter:
    """A plugin of pytest: tests that need a GPU first, failures in one line each, none begun when time is over."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.clock, self.counts = name, Clock(seconds), Counter[str]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None and "on_a_gpu" not in item.name)

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if self.clock.left() < SLOWEST:
            pytest.skip("no time was left")

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.split("/")[-1]
        if report.failed:
            self.counts["failed"] += 1
            said = str(report.longrepr).strip().splitlines()
            reason = next((x[1:].strip() for x in said if x.startswith("E ")), said[-1] if said else "")
            note(f"{test} failed: {reason[:200]}")
            print(report.longreprtext[-3000:], flush=True)
        elif report.skipped:
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            self.counts["left out" if "no time" in reason else "skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            note(f"{self.name} cannot be collected: {str(report.longrepr).strip().splitlines()[-1][:200]}")


def run(path: str, seconds: float, rehearse: bool) -> int:
    """One file's tests, in this process."""
    import pytest

    reporter = Reporter(path, seconds)
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu or not slow", "--tb=short", "--no-header", "--no-summary"]
    if rehearse:
        options += ["-k", QUICK]
    else:
        options += ["-k", "not compile"]
    code = pytest.main([*options, str(TESTS / path)], plugins=[reporter])
    counts = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in reporter.counts.items())
    print(f"{COUNTS} {counts}", flush=True)
    return int(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        return run(options.file, options.seconds, options.rehearse)
    clock = Clock(options.seconds - 3)
    found = sorted({path.name for pattern in FILES for path in TESTS.glob(pattern)})
    if options.rehearse:
        found = [name for name in found if name == "test_gpu.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if options.rehearse:
        environment[DEVICE] = "cpu"
    running = {}
    for name in found:
        command = [sys.executable, __file__, "--file", name, "--seconds", f"{clock.left() - 2:.0f}"]
        command += ["--rehearse"] * options.rehearse
        running[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
    counts: Counter[str] = Counter()
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(1.0, clock.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            counts["failed"] += 1
            note(f"{name}: ran over its time, and was ended")
        lines = said.splitlines()
        sys.stdout.write("".join(f"{line}\n" for line in lines if not line.startswith(COUNTS)))
        ended = [line.removeprefix(COUNTS).split() for line in lines if line.startswith(COUNTS)]
        for one in ended[-1] if ended else ():
            what, _, count = one.rpartition("=")
            counts[what.replace("_", " ")] += int(count)
        if not ended and process.returncode is not None and process.returncode > 0:
            counts["failed"] += 1
            note(f"{name}: failed: {(lines or ['it said nothing'])[-1][:200]}")
    figure("tests passed", counts["passed"])
    figure("tests failed", counts["failed"], at_most=0)
    for what in ("skipped", "left out"):
        if counts[what]:
            figure(f"tests {what}", counts[what], at_most=0 if what == "left out" else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
