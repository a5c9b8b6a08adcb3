"""What tensor parallelism costs in quality: heads routed on each of two ranks alone, or by one split over both.

    python benchmarks/ranks.py [--texts 20] [--budgets 72 200]

The built-in reasoner (four KV heads) reads texts of the test split with R-KV and threshold routing: all heads of a
layer together, as on one device; two and two among themselves ("rank"); and two and two, each pair in half of the
memory, by one split over the four ("global"). One process plays both ranks. Loss in nats a token, differences paired
by text.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from common import save
from jaxtyping import Float, Int
from torch import Tensor

import reasonalloc as ra
from reasonalloc.engines.transformers.loading import load
from reasonalloc.evaluation.fidelity import make_trace, teacher_force
from reasonalloc.evaluation.statistics import compare, correct, mean_value
from reasonalloc.policies.allocation import HeadAllocator
from reasonalloc.policies.allocation.heads import HeadSplit
from reasonalloc.policies.allocation.ranks import within_rank
from reasonalloc.tasks import TASKS

RANKS, INTERVAL = 2, 32
FAMILIES = {"maps": 48, "programs": 56}


@dataclass(frozen=True)
class OnRanks(HeadAllocator):
    """What ``RANKS`` ranks do, in one process: each has an equal part of the memory."""

    inner: HeadAllocator
    routing: str

    def allocate(
        self,
        scores: Float[Tensor, "batch heads tokens"],
        lengths: Int[Tensor, "batch heads"],
        total: Int[Tensor, "batch"],  # noqa: F821
        least: Any,
    ) -> HeadSplit:
        """Head budgets of all ranks, side by side."""
        every = self.inner.allocate(scores, lengths, total, least)
        parts = []
        for wish, own, held in zip(*(x.chunk(RANKS, 1) for x in (every.budgets, scores, lengths)), strict=True):
            if self.routing == "rank":
                parts.append(self.inner.allocate(own, held, total // RANKS, least).budgets)
            else:
                parts.append(within_rank(wish, held, total // RANKS, least))
        return HeadSplit(torch.cat(parts, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=[72, 200])
    options = parser.parse_args()
    model, tokenizer = load("reasonalloc/reasoner", "float32")
    rows = []
    for family, size in FAMILIES.items():
        task = TASKS.create(family)
        problems = [task.problem(seed, size) for seed in range(options.texts)]
        traces = [make_trace(tokenizer, "", p.question, f"{p.thought} <answer> {p.answer}", 1200) for p in problems]
        for budget in options.budgets:
            whole = ra.Compression.method("reasonalloc-head", budget, interval=INTERVAL, prompt="protect")
            variants = {"one device": whole}
            for routing in ("rank", "global"):
                variants[routing] = whole.replace(heads=OnRanks(whole.head_allocator, routing))
            losses = {
                name: np.array([teacher_force(model, trace, variant).nll.mean() for trace in traces])
                for name, variant in variants.items()
            }
            found = correct([compare(losses[name], losses["one device"], bounded=False) for name in ("rank", "global")])
            print(f"{family}:{size} budget {budget}: one device {losses['one device'].mean():.4f} nats", end="")
            for name, comparison in zip(("rank", "global"), found, strict=True):
                gap = comparison.difference
                print(
                    f"; {name} {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], p {comparison.corrected:.2g}", end=""
                )
            print(flush=True)
            row = {"task": f"{family}:{size}", "budget": budget, "one_device": asdict(mean_value(losses["one device"]))}
            differences = {"rank": asdict(found[0]), "global": asdict(found[1])}
            rows.append({**row, "differences": differences, "losses": {k: v.tolist() for k, v in losses.items()}})
    save("ranks", {**vars(options), "interval": INTERVAL, "ranks": RANKS, "rows": rows})


if __name__ == "__main__":
    main()
