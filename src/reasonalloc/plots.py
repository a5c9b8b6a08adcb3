"""Pictures of budgets (extra ``reasonalloc[plot]``)."""

from __future__ import annotations

import io
from pathlib import Path

from reasonalloc.recorder import Recorder, write_atomically


def plot_budgets(recorder: Recorder, path: str | Path, sequence: int = 0) -> None:
    """Draw one sequence's head budgets over time (all layers) and over layers (last round) as a PNG.

    Raises:
        ValueError: nothing was recorded, no such sequence, or a path that is not a PNG.
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is written as .png, got {path.name!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reasonalloc[plot]'") from error
    arrays = recorder.arrays()
    budgets = arrays["budgets"]  # rounds, layers, batch, heads
    if not 0 <= sequence < budgets.shape[2]:
        raise ValueError(f"the record has sequences 0 to {budgets.shape[2] - 1}, got {sequence}")
    budgets = budgets[:, :, sequence]
    rounds, layers, heads = budgets.shape
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    over_time, over_layers = figure.subplots(1, 2, width_ratios=(3, 2))

    rows = budgets.reshape(rounds, layers * heads).T
    image = over_time.imshow(rows, aspect="auto", interpolation="nearest", origin="lower", cmap="viridis")
    step = max(1, rounds // 8)
    over_time.set_xticks(range(0, rounds, step), [str(s) for s in arrays["step"][::step]])
    every = max(1, layers // 15)
    over_time.set_yticks([heads * i + (heads - 1) / 2 for i in range(0, layers, every)], range(0, layers, every))
    over_time.set_xlabel("tokens seen at the routing round")
    over_time.set_ylabel(f"layer ({heads} heads each)")
    over_time.set_title("Head budgets over time")
    figure.colorbar(image, ax=over_time, label="tokens kept")

    last = budgets[-1]
    index = range(layers)
    over_layers.fill_between(index, last.min(1), last.max(1), alpha=0.25, step="mid", label="least to most of a head")
    over_layers.step(index, last.mean(1), where="mid", label="mean of the layer's heads")
    over_layers.axhline(float(last.mean()), color="grey", linestyle="--", linewidth=1, label="budget (mean)")
    over_layers.set_ylim(bottom=0)
    over_layers.set_xlabel("layer")
    over_layers.set_ylabel("tokens kept per head")
    over_layers.set_title(f"Budgets over layers after {arrays['step'][-1]} tokens")
    over_layers.legend(fontsize="small")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
