"""The table of methods: what a name in Python, on the command line or in a study means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One named method: the fields of ``Compression`` that it sets, and a line that says what it is."""

    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)
    by_budget: Callable[[int], dict[str, Any]] | None = None

    def fields(self, budget: int) -> dict[str, Any]:
        """The ``Compression`` fields that the method sets at this budget, without what a prompt has pinned of it."""
        return {**self.fixed, **(self.by_budget(budget) if self.by_budget else {})}


def _uniform(summary: str, scorer: str, by_budget: Callable[[int], dict[str, Any]] | None = None) -> Method:
    return Method(summary, {"scorer": scorer, "layers": "uniform", "heads": "uniform"}, by_budget)


METHODS: dict[str, Method] = {
    "full": Method("keep every token", {"layers": "uniform", "heads": "uniform"}),
    "snapkv": _uniform("SnapKV at decode time, equal budgets", "snapkv"),
    "rkv": _uniform("R-KV, equal budgets", "rkv"),
    "h2o": _uniform("H2O: half heavy hitters, half newest", "h2o", lambda budget: {"window": budget // 2}),
    "streaming": _uniform("StreamingLLM: 4 sinks and the newest", "streaming"),
    "tova": _uniform("TOVA: what the last query looks at", "tova"),
    "knorm": _uniform("keys of small norm", "knorm"),
    "vase": _uniform("VaSE: large values kept, the rest drawn by attention", "vase"),
    "vase-queryfree": _uniform("VaSE without queries: sinks, and random sketches of keys and values", "vase-queryfree"),
    "random": _uniform("random eviction, the control", "random"),
    "random-pin": Method(
        "random eviction, the prompt kept inside the budget: the null hypothesis",
        {"scorer": "random", "layers": "uniform", "heads": "uniform", "prompt": "pin"},
    ),
    "pyramid-rkv": Method("R-KV, PyramidKV's layers", {"scorer": "rkv", "layers": "pyramid", "heads": "uniform"}),
    "adakv-rkv": Method("R-KV, AdaKV's heads", {"scorer": "rkv", "layers": "uniform", "heads": "adakv"}),
    "reasonalloc": Method("ReasonAlloc: layers by demand, heads by threshold", {"scorer": "rkv", "heads": "threshold"}),
    "reasonalloc-layer": Method("ReasonAlloc's layers, equal heads", {"scorer": "rkv", "heads": "uniform"}),
    "reasonalloc-head": Method(
        "equal layers, ReasonAlloc's heads", {"scorer": "rkv", "layers": "uniform", "heads": "threshold"}
    ),
    "missalloc": Method(
        "budgets of all heads by their miss curves (not in the paper)",
        {"scorer": "rkv", "layers": "miss-curve", "heads": "miss-curve"},
    ),
    "lossalloc": Method(
        "budgets of all heads by their loss curves (not in the paper)",
        {"scorer": "rkv", "layers": "loss-curve", "heads": "loss-curve"},
    ),
    "sensitivity": Method(
        "budgets of all heads by loss sensitivity (not in the paper)",
        {"scorer": "rkv", "layers": "sensitivity", "heads": "sensitivity"},
    ),
    "reasonalloc-dynamic": Method(
        "ReasonAlloc, layers measured while decoding",
        {"scorer": "rkv", "layers": "dynamic", "heads": "threshold"},
    ),
}
"""Every method by its name. ``Compression.method("rkv", budget=256)`` makes one; ``reasonalloc methods`` lists them."""
