"""README's picture: right answers against the memory of keys and values, from the reports in ``results/``.

python benchmarks/front_picture.py          # writes docs/images/answers.png
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
TASKS = {"GSM8K (250 questions)": "qwen-1.5b-gsm8k", "MATH-500 (150 problems)": "qwen-1.5b-math500"}
METHODS = {
    "lossalloc": ("budgets by loss curves (lossalloc)", "#1b7837"),
    "rkv": ("equal budgets (rkv)", "#b35806"),
    "reasonalloc": ("the paper's split (reasonalloc)", "#6a51a3"),
    "random-pin": ("random eviction, prompt kept (random-pin)", "#888888"),
}
TO = ROOT / "docs" / "images" / "answers.png"


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (title, folder) in zip(panels, TASKS.items(), strict=True):
        with (ROOT / "results" / folder / "report.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["quantity"] in ("accuracy", "kv_bytes")]
        found = {(row["method"], row["budget"], row["quantity"]): row for row in rows}
        whole = float(found["full", "", "kv_bytes"]["mean"])
        full = found["full", "", "accuracy"]
        panel.axhspan(100 * float(full["low"]), 100 * float(full["high"]), color="#3366aa", alpha=0.12, lw=0)
        panel.axhline(100 * float(full["mean"]), color="#3366aa", label="full cache (100 % of the memory)")
        for method, (label, colour) in METHODS.items():
            points = sorted(
                (100 * float(found[name, budget, "kv_bytes"]["mean"]) / whole, row)
                for (name, budget, quantity), row in found.items()
                if name == method and quantity == "accuracy"
            )
            x, y, low, high = zip(
                *((at, *(100 * float(row[name]) for name in ("mean", "low", "high"))) for at, row in points),
                strict=True,
            )
            bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            panel.errorbar(x, y, yerr=bars, color=colour, marker="o", capsize=3, label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("keys and values, % of the full cache's bytes")
        panel.set_xlim(0, 40)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("right answers, %")
    panels[0].set_ylim(0, None)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(TO, dpi=110)
    print(f"wrote {TO.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
