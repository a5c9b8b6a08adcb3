"""Against kvpress, the best-known library: tokens per second and bytes at equal budget and interval, in one run.

    python benchmarks/peers.py [--batch 8] [--budget 128] [--tokens 2048] [--rounds 3]

kvpress asks for an older transformers, so it gets an environment of its own, which this script makes (in the user's
cache folder). Each generation is a process of its own; methods take turns within a round, and ratios are taken within
a round. Random weights in SmolLM2's shape: neither speed nor bytes depend on them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from common import SMOLLM2, save

from reasonalloc.files import cache_folder

PEER = "kvpress==0.5.5"
CONTENDERS = (
    ("reasonalloc", "reasonalloc"),
    ("reasonalloc", "snapkv"),
    ("reasonalloc", "knorm"),
    ("kvpress", "snapkv"),
    ("kvpress", "knorm"),
    ("transformers", "full"),
)


def peer_python() -> str:
    """The interpreter of an environment that has kvpress and this torch."""
    folder = cache_folder() / PEER
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import kvpress"], capture_output=True).returncode if python.exists() else True:
        print(f"making an environment with {PEER} in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        torch_release = torch.__version__.partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch_release}", PEER], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {"batch": 8, "budget": 128, "interval": 128, "tokens": 2048, "prompt": 64, "threads": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    pythons = {"reasonalloc": sys.executable, "transformers": sys.executable, "kvpress": peer_python()}
    worker = str(Path(__file__).parent / "peer_worker.py")
    settings = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
    for number in range(rounds):
        for library, method in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):  # nobody is always first
            command = [pythons[library], worker, library, method, "--shape", json.dumps(SMOLLM2), *settings]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found[library, method].append(result)
            print(f"round {number + 1}: {library:12s} {method:12s} {result['seconds']:7.1f} s", flush=True)
    rows = []
    ours = found[CONTENDERS[0]]
    full = found["transformers", "full"]
    for (library, method), results in found.items():
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, results, strict=True)]
        speed = statistics.median(result["tokens"] / result["seconds"] for result in results)
        own = [base["seconds"] / mine["seconds"] for base, mine in zip(full, results, strict=True)]
        held = results[0]["kv_bytes"]
        rows.append({"library": library, "method": method, "reasonalloc_is_faster_by": ratios,
                     "times_full": own, "runs": results})  # fmt: skip
        print(
            f"{library:12s} {method:12s} {speed:8.1f} tokens/s   {held / 1e6:7.1f} MB   reasonalloc is "
            f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}); it is "
            f"{statistics.median(own):.2f} x the full cache (ours)"
        )
    save("peers", {**options, "rows": rows})


if __name__ == "__main__":
    main()
