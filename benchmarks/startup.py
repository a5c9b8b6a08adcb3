"""What the command line costs before it works: seconds of its shortest runs.

    python benchmarks/startup.py [--runs 10]

Each run is a process of its own with warm file caches. Seconds of a CPU (user and system) stand beside those of the
clock: on a machine that does other work, they say more.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import reasonalloc": ["-c", "import reasonalloc"],
    "reasonalloc --version": ["-m", "reasonalloc", "--version"],
    "reasonalloc --help": ["-m", "reasonalloc", "--help"],
    "reasonalloc generate --help": ["-m", "reasonalloc", "generate", "--help"],
    "reasonalloc methods": ["-m", "reasonalloc", "methods"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds of one run: by the clock, and of a CPU."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    clock, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="of each command; their median is printed")
    runs = parser.parse_args().runs
    print(f"{'':30} seconds  of a CPU")
    for name, arguments in COMMANDS.items():
        measure(arguments)  # files come into memory
        clock, cpu = zip(*(measure(arguments) for _ in range(runs)), strict=True)
        print(f"{name:30} {statistics.median(clock):7.2f} {statistics.median(cpu):9.2f}")


if __name__ == "__main__":
    main()
