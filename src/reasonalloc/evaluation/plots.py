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


def plot_budgets(recorder: Recorder, path: str | Path, sequence: int = 0) -> None:
    """Draw one sequence's head budgets over time (all layers) and over layers (last round) as a PNG.

    Raises:
        ValueError: nothing was recorded, no such sequence, or a path that is not a PNG.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(path, 11, 5.5)
    arrays = recorder.arrays()
    budgets = arrays["budgets"]  # rounds, layers, batch, heads
    if not 0 <= sequence < budgets.shape[2]:
        raise ValueError(f"the record has sequences 0 to {budgets.shape[2] - 1}, got {sequence}")
    budgets = budgets[:, :, sequence]
    rounds, layers, heads = budgets.shape
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
    _stairs(
        over_layers,
        last.max(1),
        baseline=last.min(1),
        fill=True,
        color="C0",
        alpha=0.25,
        label="least to most of a head",
    )
    _stairs(over_layers, last.mean(1), color="C0", linewidth=1.5, label="mean of the layer's heads")
    over_layers.axhline(float(last.mean()), color="grey", linestyle="--", linewidth=1, label="budget (mean)")
    over_layers.set_ylim(bottom=0)
    over_layers.set_xlabel("layer")
    over_layers.set_ylabel("tokens kept per head")
    over_layers.set_title(f"Budgets over layers after {arrays['step'][-1]} tokens")
    over_layers.legend(fontsize="small")

    _save(figure, path)


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
) -> bytes:
    """A PNG of each method's metric against the budget, with intervals, the full cache's band and random splits."""
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
        label = "random splits" if budget == min(control) else None
        axes.scatter([budget] * len(means), means, marker="_", color="black", alpha=0.4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("budget: tokens per key/value head")
    axes.set_ylabel(metric)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(title)
    figure.legend(fontsize="small", loc="outside right upper")
    return _png(figure)


def _figure(path: str | Path, width: float, height: float) -> Any:
    """An empty figure; fails before any drawing where it could not be saved."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"the picture is written as .png, got {Path(path).name!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reasonalloc[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _save(figure: Any, path: str | Path) -> None:
    write_atomically(Path(path), _png(figure))
