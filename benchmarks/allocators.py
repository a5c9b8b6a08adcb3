"""Allocators against each other at equal totals: how much worse a text is predicted with a compressed cache.

    python benchmarks/allocators.py --model FOLDER --data math500.jsonl --profile profiles/smollm2-135m.json

Teacher-forced negative log-likelihood of given solutions (not used in calibration), for every scorer, allocator and
budget, paired by text. Each text's line is written as it is finished: interrupted runs go on where they were.
Random splits of the same total are the control: an allocator is only good if it beats most of them.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import machine

import reasonalloc as ra
from reasonalloc.allocation import MissCurveHeads, MissCurveLayers
from reasonalloc.allocation.miss import MissCurveBudgets
from reasonalloc.allocation.offline_heads import OfflineHeads, OfflineLayers
from reasonalloc.allocation.profile import differences
from reasonalloc.engines.transformers.loading import load, quiet
from reasonalloc.evaluation import read_traces, teacher_force
from reasonalloc.files import write_atomically

# name: layers, heads
ALLOCATORS: dict[str, tuple[Any, Any]] = {
    "uniform": ("uniform", "uniform"),
    "pyramid": ("pyramid", "uniform"),
    "wave": ("wave", "uniform"),
    "threshold": ("uniform", "threshold"),
    "wave+threshold": ("wave", "threshold"),
    "dynamic+threshold": ("dynamic", "threshold"),
    "miss-curve": ("miss-curve", "miss-curve"),
}
BY_SENSITIVITY: dict[str, tuple[Any, Any]] = {
    "sensitivity": ("sensitivity", "sensitivity"),
    "miss-curve by sensitivity": (MissCurveLayers(sensitivity_exponent=0.5), MissCurveHeads(sensitivity_exponent=0.5)),
}


@dataclass(frozen=True)
class Shuffled(MissCurveBudgets):
    """The miss curves' own budgets, dealt out to the heads of the model at random: as uneven, but uninformed."""

    seed: int = 0

    def split(self, shape: ra.ModelShape, budget: int, window: int, profile: ra.DemandProfile) -> np.ndarray[Any, Any]:
        budgets = super().split(shape, budget, window, profile)
        return np.random.default_rng(self.seed).permutation(budgets.flatten()).reshape(budgets.shape)


class ShuffledLayers(Shuffled, OfflineLayers):
    pass


class ShuffledHeads(Shuffled, OfflineHeads):
    pass


def configurations(options: argparse.Namespace) -> dict[str, ra.Compression]:
    """Every compression of the study by its name "scorer/allocator/budget"."""
    profile = ra.DemandProfile.load(options.profile)
    sensitivity = options.sensitivity_profile and ra.DemandProfile.load(options.sensitivity_profile)
    wanted: dict[str, ra.Compression] = {}
    for budget in options.budgets:
        for scorer in options.scorers:
            random = {
                f"random {i}": (ShuffledLayers(seed=i), ShuffledHeads(seed=i))
                for i in range(options.random_splits if budget in options.random_budgets else 0)
            }
            named = {name: ALLOCATORS[name] for name in options.allocators}
            chosen = {name: (*pair, profile) for name, pair in {**named, **random}.items()}
            if sensitivity:
                chosen.update({name: (*pair, sensitivity) for name, pair in BY_SENSITIVITY.items()})
            for name, (layers, heads, source) in chosen.items():
                wanted[f"{scorer}/{name}/{budget}"] = ra.Compression(
                    budget, scorer, layers, heads, profile=source, interval=options.interval
                )
        literal = [name for name in options.allocators if name.endswith("threshold") and "rkv" in options.scorers]
        for name in literal:
            layers, heads = ALLOCATORS[name]
            wanted[f"rkv-literal/{name}/{budget}"] = ra.Compression(
                budget, ra.RKV(per_token=False), layers, heads, profile=profile, interval=options.interval
            )
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--sensitivity-profile", type=Path, help="a profile with loss sensitivity and miss curves")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--scorers", nargs="+", default=["rkv", "h2o"])
    parser.add_argument("--allocators", nargs="+", choices=list(ALLOCATORS), default=list(ALLOCATORS))
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--traces", type=int, default=24)
    parser.add_argument("--least", type=int, default=500, help="tokens of a solution")
    parser.add_argument("--most", type=int, default=800, help="tokens of a solution")
    parser.add_argument("--random-splits", type=int, default=8, help="shuffled miss-curve budgets, for each scorer")
    parser.add_argument("--random-budgets", type=int, nargs="*", default=[64], help="at these budgets only")
    parser.add_argument("--model-name", help="in the results, instead of the path")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "allocators.jsonl")
    options = parser.parse_args()
    quiet()
    wanted = configurations(options)
    model, tokenizer = load(options.model, "float32")
    traces = read_traces(options.data, tokenizer, least=options.least, most=options.most)[: options.traces]
    setting = {
        "model": options.model_name or options.model,
        "interval": options.interval,
        "profile": digest(options.profile),
        "sensitivity_profile": options.sensitivity_profile and digest(options.sensitivity_profile),
        "machine": machine(),
    }
    rows = finished(options.output, setting)
    for number, trace in enumerate(traces):
        row = rows.setdefault(trace.name, {"trace": trace.name, "tokens": len(trace.answer), "nll": {}, "kl": {}})
        missing = [name for name in wanted if name not in row["nll"]]
        if not missing:
            continue
        full = teacher_force(model, trace, ra.Compression.method("full"), keep_log_probs=True)
        row["full"] = float(full.nll.mean())
        for name in missing:
            found = teacher_force(model, trace, wanted[name], full)
            assert found.kl is not None
            row["nll"][name], row["kl"][name] = float(found.nll.mean()), float(found.kl.mean())
        lines = [json.dumps(setting), *(json.dumps(row) for row in rows.values())]
        write_atomically(options.output, "\n".join(lines).encode() + b"\n")
        print(f"{number + 1} of {len(traces)} texts", flush=True)
    table = report([rows[trace.name] for trace in traces], list(wanted))
    write_atomically(options.output.with_suffix(".md"), table.encode())
    print(table)


def digest(path: Path) -> str:
    """A file's name and the beginning of its hash."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def finished(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Texts that an earlier run with the same settings has finished."""
    if not path.exists():
        return {}
    before, *rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    different = differences(before, setting, "before", "now")
    if different:
        raise SystemExit(f"{path} was begun with other settings ({different}): use another --output")
    return {row["trace"]: row for row in rows}


def report(rows: list[dict[str, Any]], names: list[str], draws: int = 10_000) -> str:
    """Markdown: rise of the NLL over the full cache with equal budgets, and paired differences to it."""
    full = np.array([row["full"] for row in rows])
    picks = np.random.default_rng(0).integers(0, len(rows), (draws, len(rows)))
    split = [name.split("/") for name in names]
    allocators = [a for a in dict.fromkeys(a for _, a, _ in split) if a != "uniform" and not a.startswith("random")]
    lines = [
        f"{len(rows)} texts, {sum(row['tokens'] for row in rows)} tokens; full cache {full.mean():.4f} nats per token. "
        "Column uniform: rise over the full cache. Others: difference to uniform, paired by text, with the 95 % "
        "interval of a bootstrap over texts; negative is better. Last column: the miss curves' budgets dealt out at "
        "random.",
        "",
        f"| scorer | budget | uniform | {' | '.join(allocators)} | random deals |",
        "|---" * (len(allocators) + 4) + "|",
    ]
    for scorer, budget in dict.fromkeys((s, b) for s, _, b in split):
        base = _nll(rows, f"{scorer.removesuffix('-literal')}/uniform/{budget}")
        cells = [_difference(rows, f"{scorer}/{a}/{budget}", base, picks) for a in allocators]
        deals = [
            float((_nll(rows, name) - base).mean())
            for name in names
            if name.startswith(f"{scorer}/random ") and name.endswith(f"/{budget}")
        ]
        spread = f"{min(deals):+.4f} to {max(deals):+.4f} ({len(deals)})" if deals else ""
        rise = f"{(base - full).mean():.4f}" if "literal" not in scorer else ""
        lines.append(f"| {scorer} | {budget} | {rise} | {' | '.join(cells)} | {spread} |")
    return "\n".join(lines) + "\n"


def _nll(rows: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    return np.array([row["nll"][name] for row in rows])


def _difference(rows: list[dict[str, Any]], name: str, base: np.ndarray[Any, Any], picks: np.ndarray[Any, Any]) -> str:
    if any(name not in row["nll"] for row in rows):
        return ""
    paired = _nll(rows, name) - base
    low, high = np.quantile(paired[picks].mean(1), [0.025, 0.975])
    return f"{paired.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
