"""The drawings of concepts.md: ``python docs/drawings.py``. Everything in them is computed by the library itself.

The built-in reasoner reads a problem and its worked solution, token by token, in real caches; profiles are those of
``profiles/``. Colours are of middling brightness on no ground, so that the drawings can be read on light and on dark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import reasonalloc as ra
from reasonalloc.engines.transformers.loading import BUILT_IN, load
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.policies.allocation import attention_demand
from reasonalloc.reasoner import prompt_text, solution_text
from reasonalloc.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "docs/images/concepts"
INK, GRID = "#7f8893", "#7f889355"
BLUE, ORANGE, GREEN, RED, PURPLE = "#4c8dd6", "#e0892b", "#2fa37c", "#d9534f", "#9b72cf"
BUDGET, INTERVAL, WINDOW = 48, 32, 8


def main() -> None:
    """Draw all of them."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "reasonalloc",  # the same file every time
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )
    PLACE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problem = Problem()
    budget(problem)
    interval(problem)
    window(problem)
    pin(problem)
    threshold(problem)
    demand(problem)
    wave()
    robust()
    miss()
    sensitivity()
    loss()


class Problem:
    """A problem of the test split with its worked solution, read by the reasoner."""

    def __init__(self) -> None:
        self.model, tokenizer = load(BUILT_IN, dtype="float32", device="cpu")
        solved = TASKS.create("programs").problem(seed=0, difficulty=24)
        self.prompt = tokenizer(prompt_text(solved), return_tensors="pt").input_ids
        self.solution = tokenizer(solution_text(solved), return_tensors="pt").input_ids

    @property
    def tokens(self) -> int:
        """Of prompt and solution."""
        return self.prompt.shape[1] + self.solution.shape[1]

    def read(self, look: Callable[[ra.Cache, int], None] = lambda cache, step: None, **asked: Any) -> ra.Cache:
        """Read all of it in a cache; ``look`` is called after every step with how many tokens were read."""
        compression = ra.Compression(**{"budget": BUDGET, "interval": INTERVAL, "window": WINDOW, **asked})
        cache = ra.Cache(self.model.config, compression)
        seen = 0
        with torch.no_grad():
            for ids in [self.prompt, *self.solution.split(1, 1)]:
                self.model(ids, **{CACHE_ARGUMENT: cache})
                seen += ids.shape[1]
                look(cache, seen)
        return cache


def held(cache: ra.Cache, layer: int, head: int) -> np.ndarray:
    """Positions of the tokens that a head holds."""
    tokens = cache.ragged.tokens(layer)
    return tokens.positions[0, head, : int(tokens.lengths[0, head])].numpy()


def budget(problem: Problem) -> None:
    """What each head holds right after a round, next to the budget."""
    found: list[np.ndarray] = []
    rounds: list[int] = []

    def look(cache: ra.Cache, seen: int) -> None:
        if cache.stats().compressions > len(rounds):
            rounds.append(seen)
            found.append(np.array(cache.stats().kept)[:, 0])

    problem.read(look)
    kept = found[-1]
    figure, axes = drawing(7.2, 2.5)
    layers, heads = kept.shape
    at = [layer * (heads + 1) + head for layer in range(layers) for head in range(heads)]
    axes.bar(at, kept.ravel(), width=0.8, color=BLUE)
    level(axes, BUDGET, -0.7, at[-1] + 0.7, f"budget {BUDGET}:\nthe mean")
    assert kept.mean() == BUDGET
    axes.set_xticks(
        [layer * (heads + 1) + (heads - 1) / 2 for layer in range(layers)], [f"layer {i}" for i in range(layers)]
    )
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="tokens held")
    axes.set_xlim(-0.7, at[-1] + 4.4)
    save(figure, "budget")


def interval(problem: Problem) -> None:
    """Tokens held over the steps."""
    steps: list[int] = []
    kept: list[np.ndarray] = []

    def look(cache: ra.Cache, seen: int) -> None:
        steps.append(seen)
        kept.append(np.array(cache.stats().kept)[:, 0])

    problem.read(look, layers="uniform")
    lines = np.array(kept)
    figure, axes = drawing(7.2, 2.6)
    axes.plot(steps, steps, color=INK, linestyle=":", label="full cache")
    axes.plot(steps, lines.mean((1, 2)), color=BLUE, linewidth=2, label="mean over all heads")
    layer, head = np.unravel_index(lines[-1].argmin(), lines[-1].shape)
    axes.plot(steps, lines[:, layer, head], color=GREEN, linewidth=1, label="the head that keeps least")
    level(axes, BUDGET, steps[0], steps[-1], "budget")
    level(axes, BUDGET + INTERVAL, steps[0], steps[-1], "budget + interval")
    axes.set(xlabel="tokens of the text so far", ylabel="tokens held", ylim=(0, 230))
    axes.set_xlim(steps[0], steps[-1] + 75)
    axes.legend(loc="upper right")
    save(figure, "interval")


def strips(axes: Any, rows: list[np.ndarray], tokens: int, marked: Callable[[np.ndarray], np.ndarray]) -> None:
    """One row of ticks for each head: the tokens that it holds, some of them marked."""
    for row, positions in enumerate(rows):
        y = len(rows) - 1 - row
        axes.barh(y, tokens, height=0.62, left=0, color=GRID, linewidth=0)
        special = marked(positions)
        for chosen, colour in ((positions[~special], BLUE), (positions[special], ORANGE)):
            axes.bar(chosen, 0.62, width=1.0, bottom=y - 0.31, align="edge", color=colour, linewidth=0)
    axes.set(xlim=(0, tokens), ylim=(-0.6, len(rows) - 0.4), xlabel="position in the text")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def window(problem: Problem) -> None:
    """The positions that the heads of one layer hold after a round."""
    kept: list[list[np.ndarray]] = []
    ends: list[int] = []

    def look(cache: ra.Cache, seen: int) -> None:
        if cache.stats().compressions > len(kept):
            kept.append([held(cache, 1, head) for head in range(cache.shape.kv_heads)])
            ends.append(seen)

    problem.read(look)
    rows, end = kept[-1], ends[-1]
    figure, axes = drawing(7.2, 2.1)
    strips(axes, rows, end, lambda positions: positions >= end - WINDOW)
    axes.set_yticks(range(len(rows)), [f"head {head}" for head in reversed(range(len(rows)))])
    axes.set_title(f"orange: the window, the newest {WINDOW} tokens, in every head", fontsize=10, loc="left")
    save(figure, "window")


def pin(problem: Problem) -> None:
    """What one head holds of the prompt under the three settings."""
    names, rows = ("compete", "pin", "protect"), []
    for prompt in names:
        cache = problem.read(prompt=prompt)
        rows.append(held(cache, 1, 0))
    length = problem.prompt.shape[1]
    figure, axes = drawing(7.2, 1.9)
    strips(axes, rows, problem.tokens, lambda positions: positions < length)
    axes.set_yticks(range(3), [f'"{name}"' for name in reversed(names)])
    axes.set_title(f"orange: of the prompt ({length} tokens), budget {BUDGET}", fontsize=10, loc="left")
    save(figure, "pin")


class Watched(ra.ThresholdHeads):
    """ReasonAlloc's head routing, that remembers the last layer-by-layer question and its answer."""

    asked: tuple[torch.Tensor, torch.Tensor] | None = None
    answered: ra.HeadSplit | None = None

    def allocate(self, scores: Any, lengths: Any, total: Any, least: Any) -> ra.HeadSplit:
        """The same split, noted."""
        split = super().allocate(scores, lengths, total, least)
        Watched.asked, Watched.answered = (scores.clone(), lengths.clone()), split
        return split


def threshold(problem: Problem) -> None:
    """The scores of a layer's heads, best first, and where the pooled threshold cuts them."""
    problem.read(heads=Watched())
    assert Watched.asked is not None
    assert Watched.answered is not None
    assert Watched.answered.threshold is not None
    scores, lengths = Watched.asked
    layer = 1 if len(scores) > 1 else 0
    cut = float(Watched.answered.threshold[layer])
    figure, axes = drawing(7.2, 2.9)
    ends = []
    for head, colour in enumerate((BLUE, GREEN, PURPLE, RED)):
        own = scores[layer, head, : int(lengths[layer, head])]
        judged = np.sort(own[torch.isfinite(own)].numpy())[::-1]
        count = int((own >= cut).sum())
        budget_ = int(Watched.answered.budgets[layer, head])
        above = int((judged >= cut).sum())
        axes.plot(
            np.arange(1, len(judged) + 1),
            judged,
            color=colour,
            linewidth=1.6,
            label=f"head {head}: demand {count}, budget {budget_}",
        )
        axes.plot([above], [judged[above - 1] if above else judged[0]], "o", color=colour, markersize=5)
        ends.append(len(judged))
    level(axes, cut, 0, max(ends), "threshold")
    axes.set(xlabel="tokens of a head, best score first (window left out)", ylabel="score")
    axes.set_xlim(0, max(ends) * 1.16)
    axes.legend(loc="upper right")
    save(figure, "threshold")


def demand(problem: Problem) -> None:
    """How much attention the best tokens hold, for a broad and for a narrow head."""
    problem.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = problem.model(torch.cat([problem.prompt, problem.solution], 1), output_attentions=True).attentions
    problem.model.set_attn_implementation("reasonalloc")
    rows = torch.cat([layer[0] for layer in found])[:, -INTERVAL:]  # [heads of all layers, queries, tokens]
    mean = attention_demand(rows, 0.93).mean(-1)
    figure, axes = drawing(7.2, 2.6)
    order = mean.argsort()
    for share, colour, name in ((7, BLUE, "a broad head"), (4, GREEN, "a narrow head")):
        row = rows[order[len(order) * share // 8], -1]
        count = int(attention_demand(row, 0.93))
        axes.plot(
            range(1, len(row) + 1),
            row.sort(descending=True).values.cumsum(0),
            color=colour,
            linewidth=2,
            label=f"{name}: N = {count} tokens",
        )
        axes.plot([count, count], [0, 0.93], color=colour, linestyle=":", linewidth=1.2)
    axes.axhline(0.93, color=ORANGE, linestyle="--", linewidth=1.2)
    axes.text(30, 0.91, "rho = 0.93", color=ORANGE, va="top")
    axes.set(xlabel="tokens, the most attended first", ylabel="share of attention", ylim=(0, 1.03), xscale="log")
    axes.set_xlim(1, rows.shape[-1])
    axes.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axes.minorticks_off()
    axes.legend(loc="center", bbox_to_anchor=(0.33, 0.6))
    save(figure, "demand")


def wave() -> None:
    """Demand over layers of two models."""
    figure, axes = drawing(7.2, 2.6)
    for name, label, colour in (
        ("smollm2-135m", "SmolLM2-135M", BLUE),
        ("qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B", GREEN),
    ):
        profile = ra.DemandProfile.load(ROOT / f"profiles/{name}.json")
        waves = profile.layer_demand()
        axes.plot(waves / waves.mean(), marker="o", markersize=3, color=colour, label=label)
    axes.axhline(1, color=INK, linestyle=":", linewidth=1)
    axes.set(xlabel="layer", ylabel="demand, mean = 1", ylim=(0, None))
    axes.legend(loc="upper right")
    save(figure, "wave")


def robust() -> None:
    """R(.) on a measured wave: raw shares, and what comes out."""
    profile = ra.DemandProfile.load(ROOT / "profiles/smollm2-135m.json")
    shape, tokens = profile.shape, 128
    raw = profile.layer_demand()
    total = shape.layers * shape.kv_heads * tokens
    given = ra.robustify(torch.from_numpy(raw), total).numpy() / (shape.kv_heads * tokens)
    assert round(float(given.sum() * shape.kv_heads * tokens)) == total
    figure, axes = drawing(7.2, 2.7)
    at = np.arange(shape.layers)
    axes.bar(at - 0.2, raw / raw.mean(), width=0.4, color=INK, alpha=0.45, label="demand")
    axes.bar(at + 0.2, given, width=0.4, color=BLUE, label="R(demand): the layer's budget")
    level(axes, 0.25, -0.8, shape.layers - 0.4, "lower 0.25")
    level(axes, 2, -0.8, shape.layers - 0.4, "upper 2")
    axes.set(xlabel="layer", ylabel="share, mean = 1")
    axes.set_xlim(-0.8, shape.layers + 3.8)
    axes.legend(loc="upper center", ncols=2)
    save(figure, "robust")


def curves(name: str, values: np.ndarray, budgets: tuple[int, ...], ylabel: str) -> None:
    """Curves of all heads; named are those with most at the smallest budget, the tenth and the median."""
    flat = values.reshape(len(values), -1)
    heads = values.shape[2]
    figure, axes = drawing(7.2, 2.7)
    axes.plot(budgets, flat, color=INK, alpha=0.14, linewidth=0.8)
    order = flat[0].argsort()[::-1]
    for which, colour, label in (
        (order[0], RED, "most"),
        (order[9], PURPLE, "tenth"),
        (order[len(order) // 2], BLUE, "median"),
    ):
        axes.plot(
            budgets,
            flat[:, which],
            color=colour,
            linewidth=2,
            label=f"{label}: layer {which // heads}, head {which % heads}",
        )
    axes.set(xscale="log", xlabel="tokens kept in a head", ylabel=ylabel)
    axes.set_xticks(budgets, [str(found) for found in budgets])
    axes.minorticks_off()
    axes.legend(loc="upper right")
    save(figure, name)


def miss() -> None:
    """What R-KV's evictions would have missed, by budget."""
    profile = ra.DemandProfile.load(ROOT / "profiles/smollm2-135m.json")
    curves("miss", profile.miss_curves("rkv"), profile.grids["rkv"].budgets, "attention missed")


def loss() -> None:
    """What each head adds to the divergence from the full cache, by budget."""
    profile = ra.DemandProfile.load(ROOT / "profiles/qwen2.5-coder-1.5b.json")
    curves("loss", profile.loss_curves("rkv"), profile.grids["rkv"].budgets, "nats per token")


def sensitivity() -> None:
    """What forgetting in one head alone costs."""
    profile = ra.DemandProfile.load(ROOT / "profiles/qwen2.5-coder-1.5b-sensitivity.json")
    values = profile.loss_sensitivity()
    figure, axes = drawing(7.2, 2.5)
    heads = values.shape[1]
    for head, colour in zip(range(heads), (BLUE, GREEN, PURPLE, RED), strict=False):
        at = np.arange(len(values)) + (head - (heads - 1) / 2) * 0.8 / heads
        axes.bar(at, values[:, head], width=0.8 / heads, color=colour, label=f"head {head}")
    axes.set(xlabel="layer", ylabel="rise of the loss, nats")
    axes.legend(loc="upper left", ncols=2)
    save(figure, "sensitivity")


def level(axes: Any, height: float, left: float, right: float, text: str) -> None:
    """A dashed line with its name at the right end."""
    axes.plot([left, right], [height, height], color=ORANGE, linestyle="--", linewidth=1.2)
    axes.annotate(text, (right, height), (4, 0), textcoords="offset points", color=ORANGE, va="center", fontsize=9)


def drawing(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: Any, name: str) -> None:
    """Write it as SVG, the same bytes every time."""
    path = PLACE / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
