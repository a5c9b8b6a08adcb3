"""Part of ``make gpu``: the tests that need a GPU, uninterpreted, and those of the kernels, which run on either.

They are dealt out to several processes, which run at the same time: most of it is Triton compiling. Those that need a
GPU come first. What has not begun when the time is over is left out, and counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_report import Clock, failure, figure

TESTS = Path(__file__).resolve().parents[1] / "tests"
FILES = {"test_gpu.py": 8, "test_triton.py": 1, "test_*kernels.py": 2}  # and how many processes share each
DEVICE = "REASONALLOC_TEST_DEVICE"  # read by tests/test_gpu.py
QUICK = "padded or deepcopy or beams"  # of test_gpu.py, for a rehearsal
SLOWEST = 10.0  # seconds that a test may take; none is begun with less
COUNTS = "counts:"


class Reporter:
    """A plugin of pytest: tests that need a GPU first, failures in one line each, none begun when time is over."""

    def __init__(self, name: str, share: tuple[int, int], seconds: float) -> None:
        self.name, self.share, self.clock, self.counts = name, share, Clock(seconds), Counter[str]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        first, of = self.share
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None and "on_a_gpu" not in item.name)
        items[:] = items[first::of]

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
            print()  # after pytest's dots
            failure(f"{test} failed: {reason[:200]}")
            print(report.longreprtext[-3000:], flush=True)
        elif report.skipped:
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            self.counts["left out" if "no time" in reason else "skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            print()
            failure(f"{self.name} cannot be collected: {str(report.longrepr).strip().splitlines()[-1][:200]}")


def run(path: str, share: tuple[int, int], seconds: float, rehearse: bool) -> int:
    """Every ``share[1]``-th of a file's tests, in this process."""
    import pytest

    reporter = Reporter(path, share, seconds)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-m", "gpu or not slow", "--no-header", "--no-summary"]
    options += ["-k", QUICK if rehearse else "not compile"]
    code = pytest.main([*options, str(TESTS / path)], plugins=[reporter])
    counts = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in reporter.counts.items())
    print(f"\n{COUNTS} {counts}", flush=True)
    return int(code)


class Job:
    """A process that runs a share of a file's tests."""

    def __init__(self, name: str, share: tuple[int, int], seconds: float, rehearse: bool) -> None:
        self.name, self._said = name, tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if rehearse:
            environment[DEVICE] = "cpu"
        command = [sys.executable, __file__, "--file", name, "--share", *map(str, share), "--seconds", f"{seconds:.0f}"]
        self._process = subprocess.Popen(
            [*command, *["--rehearse"] * rehearse], stdout=self._said, stderr=subprocess.STDOUT, env=environment
        )

    def counts(self, seconds: float) -> Counter[str]:
        """Wait so long for its end, and say what it said."""
        found: Counter[str] = Counter()
        try:
            self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            found["failed"] += 1
            failure(f"{self.name}: a test ran over its time, and its process was ended")
        self._said.seek(0)
        lines = self._said.read().splitlines()
        for line in lines:
            if not line.startswith(COUNTS):
                print(line)
        ended = [line.removeprefix(COUNTS).split() for line in lines if line.startswith(COUNTS)]
        for one in ended[-1] if ended else ():
            name, _, count = one.rpartition("=")
            found[name.replace("_", " ")] += int(count)
        if not ended and not found:
            found["failed"] += 1
            failure(f"{self.name}: failed ({self._process.returncode}): {(lines or ['it said nothing'])[-1][:200]}")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        return run(options.file, tuple(options.share), options.seconds, options.rehearse)
    clock = Clock(options.seconds - 3)
    jobs = []
    for pattern, processes in FILES.items():
        for path in sorted(TESTS.glob(pattern)):
            if not options.rehearse:
                shares = [(first, processes) for first in range(processes)]
            else:
                shares = [(0, 1)] if path.name == "test_gpu.py" else []
            jobs += [Job(path.name, share, clock.left() - 2, options.rehearse) for share in shares]
    counts: Counter[str] = Counter()
    for job in jobs:
        counts += job.counts(clock.left())
    figure("tests passed", counts["passed"], at_least=1)
    figure("tests failed", counts["failed"], at_most=0)
    for what in ("skipped", "left out"):
        if counts[what]:
            figure(f"tests {what}", counts[what], at_most=0 if what == "left out" else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
