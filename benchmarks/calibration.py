"""What calibration costs: its time, and its memory beyond the same generation unwatched.

    python benchmarks/calibration.py --model FOLDER [--max-new-tokens 512] [--miss rkv]

Each runs in a process of its own; memory is the peak of the resident set.
"""

import argparse
import json
import resource
import time
from typing import Any

import torch
from common import in_own_processes, save

import reasonalloc as ra
from reasonalloc.calibration import built_in_prompts, calibrate
from reasonalloc.calibration.probe import DemandProbe
from reasonalloc.engines.transformers.loading import load


class Unwatched(DemandProbe):
    """Looks at nothing; one row for each sequence, so that the rest of the run goes its way."""

    def observe(self, *args: Any) -> None:
        if self._sums is None:
            self._start(len(args[1].lengths))  # its keys would be gathered
            self._rows += 1


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(options.model, "float32", "cpu")
    settings = ra.CalibrationSettings(max_new_tokens=options.max_new_tokens, miss=tuple(options.miss or ()))
    with torch.no_grad():
        model(torch.ones(4, 100, dtype=torch.long), use_cache=False, logits_to_keep=1)
    if kind == "unwatched":
        calibrate.DemandProbe = Unwatched  # type: ignore[misc]
    began = time.perf_counter()
    profile = ra.calibrate(model, tokenizer, built_in_prompts(), settings)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": sum(prompt.tokens for prompt in profile.prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder, .gguf or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--miss", action="append")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    results = in_own_processes(("unwatched", "calibrate"))
    extra = results["calibrate"]["peak_mb"] - results["unwatched"]["peak_mb"]
    slower = results["calibrate"]["seconds"] / results["unwatched"]["seconds"]
    print(f"extra memory {extra:.0f} MB, {slower:.2f} times the time of the same generation unwatched")
    save("calibration", {"max_new_tokens": options.max_new_tokens, "miss": options.miss or [], **results})


if __name__ == "__main__":
    main()
