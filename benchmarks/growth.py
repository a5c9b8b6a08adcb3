"""Growth: seconds per decoding step and bytes of keys and values over context, batch, heads and budget, as curves.

    python benchmarks/growth.py [--layers 8] [--repeats 3]

One of the four is varied at a time, the others stay at context 4096, batch 8, 3 heads, budget 128. The model's own
layers are narrow, so that nearly all that is measured is the cache. The full cache and the bounded one take turns.
"""

import argparse
import statistics
from typing import Any

import torch
from common import RESULTS, full_cache, random_ids, random_model, save, seconds_per_step

import reasonalloc as ra
from reasonalloc.engines.transformers.cache import kv_bytes

BASE = {"context": 4096, "batch": 8, "heads": 3, "budget": 128}
AXES = {
    "context": (512, 1024, 2048, 4096, 8192, 16384),
    "batch": (1, 2, 4, 8, 16, 32),
    "heads": (1, 2, 3, 4, 6, 8),
    "budget": (64, 128, 256, 512, 1024, 2048),
}
GROUP, INTERVAL, FULL_STEPS = 3, 128, 8


def measure(point: dict[str, int], layers: int, repeats: int) -> dict[str, Any]:
    """Seconds per step and bytes of both caches."""
    heads: dict[str, Any] = {"num_attention_heads": GROUP * point["heads"], "num_key_value_heads": point["heads"]}
    model = random_model(narrow=True, num_hidden_layers=layers, **heads)
    bounded = ra.Cache(model.config, ra.Compression.method("reasonalloc", point["budget"], interval=INTERVAL))
    ids, prompt = random_ids(model, point["batch"]), random_ids(model, point["batch"], point["budget"] + 1)
    seconds_per_step(model, bounded, prompt, 1)
    seconds_per_step(model, bounded, ids, INTERVAL)
    full = full_cache(model, point["batch"], point["context"])
    seconds_per_step(model, full, ids, 2)
    times: dict[str, list[float]] = {"full": [], "reasonalloc": []}
    for _ in range(repeats):
        full.crop(point["context"] - full.get_seq_length())
        times["full"].append(seconds_per_step(model, full, ids, FULL_STEPS))
        times["reasonalloc"].append(seconds_per_step(model, bounded, ids, INTERVAL))
    return {"seconds": times, "kv_bytes": {"full": kv_bytes(full), "reasonalloc": kv_bytes(bounded)}}


def draw(found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Two rows of panels: time above, bytes below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, len(found), sharex="col", squeeze=False)
    for column, (axis, points) in enumerate(found.items()):
        for name, colour in (("full", "grey"), ("reasonalloc", "tab:blue")):
            milliseconds = [[1e3 * s for s in point["seconds"][name]] for point in points.values()]
            megabytes = [point["kv_bytes"][name] / 1e6 for point in points.values()]
            middle = [statistics.median(x) for x in milliseconds]
            panels[0][column].plot(list(points), middle, "o-", color=colour, label=name)
            low, high = [min(x) for x in milliseconds], [max(x) for x in milliseconds]
            panels[0][column].fill_between(list(points), low, high, color=colour, alpha=0.2)
            panels[1][column].plot(list(points), megabytes, "o-", color=colour, label=name)
        for row, label in enumerate(("ms per step", "MB of keys and values")):
            panels[row][column].set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
            panels[row][column].set_xticks(list(points), [str(x) for x in points])
            panels[row][column].minorticks_off()
        panels[1][column].set_xlabel(axis)
    panels[0][0].legend()
    figure.savefig(RESULTS / "growth.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for axis in options.axes:
        found[axis] = {}
        for value in AXES[axis]:
            point = measure({**BASE, axis: value}, options.layers, options.repeats)
            found[axis][value] = point
            ms = {name: 1e3 * statistics.median(seconds) for name, seconds in point["seconds"].items()}
            held = {name: size / 1e6 for name, size in point["kv_bytes"].items()}
            print(
                f"{axis:8s} {value:6d}   full {ms['full']:8.2f} ms {held['full']:8.1f} MB   "
                f"reasonalloc {ms['reasonalloc']:8.2f} ms {held['reasonalloc']:8.1f} MB",
                flush=True,
            )
    save("growth", {**vars(options), "base": BASE, "axes": found})
    draw(found)


if __name__ == "__main__":
    main()
