"""Pictures of budgets and demand profiles (extra ``reasonalloc[plot]``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.cache.recorder import Recorder
from reasonalloc.calibration.operator_study import Choice, RhoEffect
from reasonalloc.calibration.stability import Stability
from reasonalloc.files import write_atomically
from reasonalloc.policies.allocation import DemandProfile

Interval = tuple[float, float, float]  # mean, low, high
_NOT_ROUTED = "lightgrey"


def plot_budgets(recorder: Recorder, path: str | Path, sequence: int = 0) -> None:
    """Draw what one sequence's heads hold after every routing round, and each layer's after the last, as a PNG.

    Raises:
        ValueError: the record does not fit into arrays (see ``Recorder.arrays``), no such sequence, or a path that is
            not a PNG.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(path, 11, 5.5)
    arrays = recorder.arrays()
    batch = arrays["kept"].shape[2]
    if not 0 <= sequence < batch:
        raise ValueError(f"the record has sequences 0 to {batch - 1}, got {sequence}")
    _draw_budgets(figure, arrays, sequence)
    if batch > 1:
        figure.suptitle(f"Sequence {sequence} (of 0 to {batch - 1})", fontsize="medium")
    _save(figure, path)


def _draw_budgets(figure: Any, arrays: dict[str, Any], sequence: int) -> None:
    """Both panels. Where a layer has not routed yet nothing is drawn; the legend says what the ground means.

    ``arrays`` are those of ``Recorder.arrays``.
    """
    import numpy as np
    from matplotlib.patches import Patch

    def drawn(name: str) -> Any:
        values = arrays[name][:, :, sequence]
        return np.where(values < 0, np.nan, values)

    steps, kept = arrays["step"], drawn("kept")
    rounds, layers, heads = kept.shape
    over_time, over_layers = figure.subplots(1, 2, width_ratios=(3, 2))

    # A cell reaches from its round to the next; the last one is as wide as most are, for the record knows no end.
    gap = int(np.median(np.diff(steps))) if rounds > 1 else 1
    edges = [*steps, steps[-1] + gap]
    rows = kept.reshape(rounds, layers * heads).T
    image = over_time.pcolormesh(edges, range(layers * heads + 1), rows, cmap="viridis")
    over_time.set_facecolor(_NOT_ROUTED)
    ticks = [steps[0]]  # rounds, as many as there is room for
    for step in steps:
        if step - ticks[-1] >= (edges[-1] - steps[0]) / 9:
            ticks.append(step)
    over_time.set_xticks(ticks, [str(step) for step in ticks])
    every = max(1, layers // 15)
    over_time.set_yticks([heads * i + heads / 2 for i in range(0, layers, every)], range(0, layers, every))
    over_time.set_xlabel("tokens seen (a cell begins at its routing round)")
    over_time.set_ylabel(f"layer ({heads} heads each)")
    over_time.set_title("Tokens held by each head")
    figure.colorbar(image, ax=over_time, label="tokens held after the layer's last routing")

    last = kept[-1]
    most, least, mean = last.max(1), last.min(1), last.mean(1)
    _stairs(over_layers, most, baseline=least, fill=True, color="C0", alpha=0.25, label="held: least to most of a head")
    _stairs(over_layers, mean, color="C0", linewidth=1.5, label="held: mean of the layer's heads")
    budget = drawn("total")[-1] / heads
    label = "budget: mean of the layer's heads" + " (a protected prompt on top)" * bool((mean > budget).any())
    _stairs(over_layers, budget, color="C1", linestyle="--", linewidth=1.2, label=label)
    for layer in np.flatnonzero(np.isnan(budget)):
        over_layers.axvspan(layer - 0.5, layer + 0.5, color=_NOT_ROUTED, linewidth=0)
    over_layers.set_xlim(-0.5, layers - 0.5)
    over_layers.set_ylim(bottom=0)
    over_layers.set_xlabel("layer")
    over_layers.set_ylabel("tokens per head")
    over_layers.set_title(f"After the round at {steps[-1]} tokens")
    handles, _ = over_layers.get_legend_handles_labels()
    if np.isnan(kept).any():
        handles.append(Patch(color=_NOT_ROUTED, label="nothing evicted yet: every token seen is held"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")


def plot_profile(profile: DemandProfile, stability: Stability, path: str | Path) -> None:
    """Draw the wave with its bootstrap band, each query head's demand, and (where measured) the miss curves, as a PNG.

    Raises:
        ValueError: a path that is not a PNG.
        ImportError: matplotlib is not installed.
    """
    scorers = list(profile.grids)
    figure = _figure(path, 11 + 4 * bool(scorers), 4.6)
    wave, heat, *misses = figure.subplots(1, 2 + bool(scorers), squeeze=False)[0]
    layers, rho = range(profile.shape.layers), profile.reference_rho
    wave.fill_between(layers, stability.wave_low, stability.wave_high, alpha=0.3, label=f"{stability.level:.0%} band")
    wave.plot(layers, stability.wave, marker="o", markersize=3, label=f"mean over {len(profile.prompts)} prompts")
    wave.set(xlabel="layer", ylabel=f"tokens that hold {rho:.0%} of the attention", title="Demand over layers")
    wave.set_ylim(bottom=0)
    _number(wave.xaxis)
    wave.legend(fontsize="small")

    from matplotlib.colors import LogNorm

    demand = profile.head_demand(rho)
    least = max(float(demand.min()), 0.5)
    norm = LogNorm(least, max(float(demand.max()), 2 * least))
    image = heat.imshow(demand, aspect="auto", interpolation="nearest", origin="lower", cmap="viridis", norm=norm)
    heat.set(xlabel="query head", ylabel="layer", title="Demand over heads")
    _number(heat.xaxis, heat.yaxis)
    figure.colorbar(image, ax=heat, label="tokens (logarithmic)")

    for axes in misses:
        for scorer in scorers:
            curves = profile.miss_curves(scorer)
            flat = curves.reshape(len(curves), -1)
            (line,) = axes.plot(profile.grids[scorer].budgets, flat.mean(1), marker="o", label=f"{scorer}: mean")
            low, high = _quartiles(flat)
            axes.fill_between(profile.grids[scorer].budgets, low, high, alpha=0.2, color=line.get_color())
        axes.set(
            xscale="log",
            xlabel="tokens kept per head",
            ylabel="share of attention on evicted tokens",
            title="Miss curves (band: middle half of the KV heads)",
        )
        ticks = sorted({budget for grid in profile.grids.values() for budget in grid.budgets})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize="small")
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    _save(figure, path)


def plot_operator_study(rhos: Sequence[RhoEffect], choices: Sequence[Choice], budget: int, path: str | Path) -> None:
    """Draw layer budgets for each rho, and for each exponent and clip, as a PNG.

    Raises:
        ValueError: a path that is not a PNG.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(path, 12, 4.6)
    by_rho, by_exponent = figure.subplots(1, 2, sharey=True)
    for effect in rhos:
        _stairs(by_rho, effect.choice.budgets, linewidth=1.5, label=f"{effect.choice.rho:g}")
    by_rho.set(xlabel="layer", ylabel="tokens per head", title=f"Budgets by rho (mean {budget})")
    bounds = list(dict.fromkeys((choice.lower, choice.upper) for choice in choices))
    styles = dict(zip(bounds, ("-", "--", "-.", ":") * len(bounds), strict=False))
    exponents = list(dict.fromkeys(choice.exponent for choice in choices))
    for choice in choices:
        bound = (choice.lower, choice.upper)
        by_exponent.plot(
            choice.budgets,
            styles[bound],
            color=f"C{exponents.index(choice.exponent)}",
            linewidth=1,
            label=f"{choice.exponent:g}" if bound == bounds[0] else None,
        )
    lines = "  ".join(f"{style} [{low:g}, {high:g}]" for (low, high), style in styles.items())
    by_exponent.set(xlabel="layer", title=f"Budgets by exponent and clip (line: {lines})")
    by_exponent.title.set_fontsize("medium")
    _number(by_exponent.xaxis)
    for axes, title in ((by_rho, "rho"), (by_exponent, "exponent")):
        axes.legend(fontsize="small", title=title)
        axes.set_ylim(bottom=0)
    _save(figure, path)


def _stairs(axes: Any, by_layer: Any, baseline: Any = None, **style: Any) -> None:
    """One value a layer, each as wide as its layer; down to ``baseline`` if there is one."""
    axes.stairs(by_layer, [layer - 0.5 for layer in range(len(by_layer) + 1)], baseline=baseline, **style)
    _number(axes.xaxis)


def _number(*axes: Any) -> None:
    """Layers and heads are counted: no ticks between them, however few there are."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def _quartiles(x: Any) -> Any:
    import numpy as np

    return np.quantile(x, [0.25, 0.75], axis=1)


def draw_curves(
    series: dict[str, list[tuple[int, Interval]]],
    full: Interval | None,
    control: dict[int, list[float]],
    title: str,
    metric: str,
    from_zero: bool,
) -> Any:
    """A figure of each method's metric against the budget, with intervals, the full cache's band and random splits."""
    figure = _figure("curves.png", 9.5, 5)
    axes = figure.subplots()
    budgets = sorted({budget for points in series.values() for budget, _ in points})
    if full is not None:
        axes.axhspan(full[1], full[2], color="grey", alpha=0.15)
        axes.axhline(full[0], color="grey", linestyle="--", linewidth=1, label="full cache")
    for i, (method, points) in enumerate(series.items()):
        shift = 1 + 0.012 * (i - len(series) / 2)  # so that intervals do not cover each other
        x = [budget * shift for budget, _ in points]
        y = [mean for _, (mean, _, _) in points]
        below = [mean - low for _, (mean, low, _) in points]
        above = [high - mean for _, (mean, _, high) in points]
        axes.errorbar(
            x, y, yerr=[below, above], marker="osD^vP*X"[i % 8], markersize=4, linewidth=1, capsize=2, label=method
        )
    for budget, means in control.items():
        label = "random splits of the same total,\nR-KV's scores" if budget == min(control) else None
        axes.scatter([budget] * len(means), means, marker="_", color="black", alpha=0.4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    if len(budgets) == 1:  # else the methods' small shifts would fill the picture
        axes.set_xlim(budgets[0] / 2**0.5, budgets[0] * 2**0.5)
    axes.set_xlabel("budget: tokens per key/value head")
    axes.set_ylabel(metric)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(title)
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _figure(path: str | Path, width: float, height: float) -> Any:
    """An empty figure; fails before any drawing where it could not be saved."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"the picture is written as .png, got {Path(path).name!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reasonalloc[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _save(figure: Any, path: str | Path) -> None:
    write_atomically(Path(path), png(figure))
