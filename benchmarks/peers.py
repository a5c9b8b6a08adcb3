"""Against kvpress, the best-known library: tokens per second and bytes at equal budget and interval, in one run.

    python benchmarks/peers.py [--batch 8] [--budget 128] [--tokens 2048] [--rounds 3]

kvpress asks for an older transformers, so it gets an environment of its own, which this script makes (in the user's
cache folder). Each generation is a process of its own; methods take turns within a round, and ratios are taken within
a round. Memory is taken in a short run of its own, because watching costs time. Random weights in SmolLM2's shape:
neither speed nor bytes depend on them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from common import SMOLLM2, save
from resident import ENVIRONMENT

from reasonalloc.files import cache_folder

PEER = "kvpress==0.5.5"
Contender = tuple[str, str]
FULL = ("transformers", "full")
CONTENDERS: tuple[Contender, ...] = (
    ("reasonalloc", "reasonalloc"),
    ("reasonalloc", "snapkv"),
    ("reasonalloc", "knorm"),
    ("kvpress", "snapkv"),
    ("kvpress", "knorm"),
    FULL,
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
    parser.add_argument("--libraries", nargs="+", default=["reasonalloc", "kvpress", "transformers"])
    options = vars(parser.parse_args())
    rounds, libraries = options.pop("rounds"), options.pop("libraries")
    pythons = {name: peer_python() if name == "kvpress" else sys.executable for name in libraries}
    worker = str(Path(__file__).parent / "peer_worker.py")
    settings = [text for name, value in options.items() for text in (f"--{name}", str(value))]

    def run(library: str, method: str, *more: str, **environment: str) -> dict[str, Any]:
        command = [pythons[library], worker, library, method, "--shape", json.dumps(SMOLLM2), *settings, *more]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        return dict(json.loads(done.stdout.splitlines()[-1]))

    contenders = [contender for contender in CONTENDERS if contender[0] in libraries]
    few = str(options["budget"] + 2 * options["interval"] + 2)  # two compressions tell the peak of any number
    growths = {
        contender: run(*contender, "--watch-memory", "--tokens", few, **ENVIRONMENT)["peak_growth"]
        for contender in contenders
    }
    found: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):  # nobody is always first
            if contender != FULL or number == 0:  # it takes as long as all the others together
                found[contender].append(run(*contender))
                seconds = found[contender][-1]["seconds"]
                print(f"round {number + 1}: {' '.join(contender):24s} {seconds:7.1f} s", flush=True)
        save("peers", {**options, "watched_tokens": int(few), "rows": table(found, growths)})  # a round is not lost


def table(found: dict[Contender, list[dict[str, Any]]], growths: dict[Contender, int]) -> list[dict[str, Any]]:
    """A row a contender, printed, too."""
    rows = []
    for contender, results in found.items():
        speed = statistics.median(result["tokens"] / result["seconds"] for result in results)
        # Against ours with the same scorer, round by round.
        ours = found.get(("reasonalloc", contender[1])) or next(iter(found.values()))
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, results, strict=False)]
        rows.append({"library": contender[0], "method": contender[1], "ours_is_faster_by": ratios,
                     "peak_growth": growths[contender], "runs": results})  # fmt: skip
        print(
            f"{' '.join(contender):24s} {speed:8.1f} tokens/s   {results[0]['kv_bytes'] / 1e6:7.1f} MB held   "
            f"process grew by {growths[contender] / 1e6:7.1f} MB   reasonalloc with its scorer is "
            f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
