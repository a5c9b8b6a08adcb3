"""This checkout against another one (a git worktree of an older commit): a decoding step, and what a round adds.

    git worktree add /tmp/older COMMIT
    python benchmarks/versions.py --other /tmp/older

Both run at the same time in processes of their own, of which one works while the other waits: they take turns by
intervals of 128 steps, each pair in changed order, so that what the machine does in between meets both. Ratios are
this checkout's seconds over the other's, pair by pair: below 1 is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
CASES = {  # name: method, budget, batch, prompt
    "256, batch 1": ("rkv", 128, 1, 256),
    "256, batch 8": ("rkv", 128, 8, 256),
    "4K, batch 1": ("reasonalloc-head", 1024, 1, 4096),
    "4K, batch 8": ("reasonalloc-head", 1024, 8, 4096),
    "dynamic layers, batch 8": ("reasonalloc-dynamic", 128, 8, 256),
    "h2o, batch 8": ("h2o", 128, 8, 256),
}
INTERVAL = 128


def work(case: str, narrow: bool) -> None:
    """Set up, then measure an interval for each line of standard input. Public names alone: any version has them."""
    import torch
    from common import random_ids, random_model

    import reasonalloc as ra

    method, budget, batch, prompt = CASES[case]
    torch.set_num_threads(1)
    model = random_model(narrow=narrow)
    cache = ra.Cache(model.config, ra.Compression.method(method, budget, interval=INTERVAL))
    ids = random_ids(model, batch)
    with torch.no_grad():
        for part in random_ids(model, batch, prompt).split(256, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        print("ready", flush=True)
        for _ in sys.stdin:
            times = []
            for _ in range(INTERVAL):
                began = time.perf_counter()
                model(ids, past_key_values=cache)
                times.append(time.perf_counter() - began)
            step = statistics.median(times[:-1])
            print(json.dumps({"step": step, "round": times[-1] - step}), flush=True)


class Worker:
    """One checkout at work."""

    def __init__(self, source: Path, case: str, narrow: bool) -> None:
        command = [sys.executable, "-W", "ignore", str(HERE), "--work", case, *(["--narrow"] if narrow else [])]
        environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._line() == "ready", f"{source} does not start"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def interval(self) -> dict[str, float]:
        """Seconds of a step, and of what the round at the interval's end adds."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self._line())


def compare(other: Path, case: str, pairs: int, narrow: bool) -> dict[str, Any]:
    """Ratios of ``pairs`` pairs after one that does not count."""
    workers = [Worker(HERE.parents[1], case, narrow), Worker(other, case, narrow)]
    found: list[list[dict[str, float]]] = []
    for number in range(pairs + 1):
        order = (0, 1) if number % 2 else (1, 0)
        pair = {which: workers[which].interval() for which in order}
        found.append([pair[0], pair[1]])
    for worker in workers:
        worker.process.kill()
    result: dict[str, Any] = {}
    for name in ("step", "round"):
        ratios = sorted(mine[name] / theirs[name] for mine, theirs in found[1:])
        result[name] = {
            "ms": round(1e3 * statistics.median(mine[name] for mine, _ in found[1:]), 3),
            "other_ms": round(1e3 * statistics.median(theirs[name] for _, theirs in found[1:]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(x, 4) for x in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) > 1 else ratios,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--narrow", action="store_true", help="of the model only the cache has its size")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.narrow)
        return
    if options.other is None or not (options.other / "src" / "reasonalloc").is_dir():
        parser.error(f"--other must be a checkout of this repository, got {options.other}")
    from common import save

    revision = ["git", "-C", str(options.other), "rev-parse", "--short", "HEAD"]
    older = subprocess.run(revision, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    results = {}
    for case in options.cases:
        results[case] = compare(options.other, case, options.pairs, options.narrow)
        for name, found in results[case].items():
            low, high = found["quartiles"]
            print(
                f"{case}: a {name} takes {found['ms']} ms, {found['other_ms']} in {older}: {found['ratio']:.3f} times "
                f"(quartiles {low:.3f} to {high:.3f})",
                flush=True,
            )
    save(f"versions{'-narrow' if options.narrow else ''}", {"other": older, "pairs": options.pairs, **results})


if __name__ == "__main__":
    main()
