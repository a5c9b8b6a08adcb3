"""Record what the cache keeps: ``python tests/golden/record.py [--only kept|drawn] [--check]``.

``--check`` writes nothing. It computes every scenario in other ways (float64, another attention backend, noise on the
weights) and lists those whose outcome depends on it: they would also depend on a machine's rounding, and need another
seed in ``scenarios.SEEDS``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from golden.scenarios import FILES, Variant
from golden.store import FOLDER, difference, outcome, save

SINGLE = {"rows": Variant(attention="rows"), "noise": Variant(noise=1e-6)}
VARIANTS = {
    "kept": {**SINGLE, "float64": Variant(torch.float64), "float64 noise": Variant(torch.float64, noise=1e-6)},
    "drawn": SINGLE,  # what is drawn depends on the dtype
}


def fragile(scenario, expected, variants):
    """How the variants' outcomes differ from the expected one, those that do."""
    found = {name: difference(expected, outcome(scenario.play(variant))) for name, variant in variants.items()}
    return {name: text for name, text in found.items() if text is not None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FILES), help="one of the files")
    parser.add_argument("--check", action="store_true", help="list scenarios that depend on rounding")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in [arguments.only] if arguments.only else FILES:
        began = time.perf_counter()
        outcomes = {}
        for scenario in FILES[name]:
            outcomes[scenario.name] = outcome(scenario.play(Variant()))
            if arguments.check:
                for variant, text in fragile(scenario, outcomes[scenario.name], VARIANTS[name]).items():
                    failed += 1
                    print(f"{scenario.name}: {variant}: {text}")
        print(f"{name}: {len(outcomes)} scenarios, {time.perf_counter() - began:.0f} s")
        if not arguments.check:
            path = FOLDER / f"{name}.npz"
            save(path, outcomes)
            print(f"{path.name}: {path.stat().st_size} bytes")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
