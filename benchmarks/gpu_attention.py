"""Part of ``make gpu``: ``attention.py`` at several batches, as shares of a copy's bytes per second."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from gpu_report import Clock, failure, figure, note

HERE = Path(__file__).resolve().parent
SHARES = {8: None, 64: 90.0, 256: 97.0}  # per cent of a copy
REAL = ("--shape", "llama-8b", "--device", "cuda", "--dtype", "bfloat16", "--budget", "1024")
TINY = ("--budget", "16", "--repeats", "1")
LEAST = 5.0  # seconds


def measure(batch: int, rehearse: bool, seconds: float) -> None:
    """One batch, in a process of its own."""
    options = TINY if rehearse else REAL
    found = HERE / "results" / ("attention-cpu-float32-16.json" if rehearse else "attention-cuda-bfloat16-1024.json")
    found.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "attention.py"), *options, "--batch", str(batch)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        failure(f"attention, batch {batch}: ran over its {seconds:.0f} seconds")
        return
    said = done.stdout.strip().splitlines() or ["it said nothing"]
    for line in said:
        if "left out" in line:
            note(f"attention, batch {batch}: {line[:200]}")
    if "OutOfMemoryError" in done.stdout:
        note(f"attention, batch {batch}: left out, the GPU has too little memory")
        return
    if done.returncode or not found.exists():
        failure(f"attention, batch {batch}: failed ({done.returncode}): {said[-1][:200]}")
        return
    shares = json.loads(found.read_text())["share_of_copy"]
    for name, of_rounds in shares.items():
        bar = None if rehearse or name != "ragged, triton" else SHARES[batch]
        figure(f"attention, batch {batch}, {name}", 100 * statistics.median(of_rounds), "% of a copy", at_least=bar)
    if rehearse:
        found.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    clock = Clock(options.seconds - 2)
    for batch in (2,) if options.rehearse else (64, 256, 8):
        if clock.left() < LEAST:
            note(f"attention, batch {batch}: left out, no time was left")
        else:
            measure(batch, options.rehearse, clock.left())


if __name__ == "__main__":
    main()
