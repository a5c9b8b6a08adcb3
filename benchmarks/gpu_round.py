"""Where a round's time goes on a GPU: each kernel's share, by torch's profiler.

    PYTHONPATH=src python3 benchmarks/gpu_round.py [--batch 64] [--method reasonalloc-head] [--rehearse]

Llama-8B's shape, as in ``gpu_steps.py``. Only the round is profiled, so what is left of it beside its kernels is the
GPU's waiting for the host. Not a part of ``make gpu``: it is looked at before a change.
"""

import argparse
from collections import defaultdict
from typing import Any

import torch
from common import random_model
from gpu_model import TINY, Recorded, Sizes, count_to_a_round, fill, filled, timed
from torch.profiler import ProfilerActivity, profile

SHOWN = 16
ROUNDS = 3


def kernels(found: Any) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kernel."""
    rows: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            rows[event.name].append(event.device_time_total / 1e3)
    return {name: (sum(times), len(times)) for name, times in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--method", default="reasonalloc-head")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    sizes = TINY if options.rehearse else Sizes()
    batch = 2 if options.rehearse else options.batch
    model = random_model(sizes.shape, device=sizes.device, dtype=sizes.dtype)
    cache = filled(model, options.method, batch, sizes)
    recorded = Recorded(model, cache, batch, sizes.budget)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    for kind in ("walk", "random"):
        for _ in range(ROUNDS):  # the first one compiles
            count_to_a_round(cache.ragged)
            fill(cache.ragged, kind)
            step, _ = recorded.milliseconds(1)
            whole, host = timed(recorded.step, sizes.where)
        count_to_a_round(cache.ragged)
        fill(cache.ragged, kind)
        recorded.milliseconds(1)
        with profile(activities=activities) as found:
            timed(recorded.step, sizes.where)
        of_round = kernels(found)
        print(f"\n{options.method}, batch {batch}, {kind}: a round {whole - step:.2f} ms beside a step of {step:.2f}")
        print(f"host {host:.2f} ms; all kernels, the step's among them {sum(t for t, _ in of_round.values()):.2f} ms")
        for name, (time, launches) in sorted(of_round.items(), key=lambda item: -item[1][0])[:SHOWN]:
            print(f"{time:9.3f} ms {launches:5d}  {name[:90]}")


if __name__ == "__main__":
    main()
