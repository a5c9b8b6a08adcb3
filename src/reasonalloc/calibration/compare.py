"""Comparing profiles: does the wave belong to the model or to the task?

The distance between two demand curves is Wasserstein-1 between the curves, normalised to sum 1, over relative depth in
[0, 1] (layer l of L stands at (l + 1/2) / L), so that models of different depth compare. Variation is split over three
levels - prompts within a task, tasks within a model, models - as in a nested PERMANOVA (Anderson 2001): sums of squared
distances within groups, tested by permuting the labels of one level below. Wasserstein-1 is no Euclidean distance, so a
level's share can come out slightly negative; and groups that differ in spread alone can be told apart, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import pearsonr, wasserstein_distance

from reasonalloc.policies.allocation import DemandProfile
from reasonalloc.policies.allocation.profile import Floats


def correlation(first: Float[Floats, "values"], second: Float[Floats, "values"]) -> tuple[float, float, float]:
    """Pearson's correlation and its 95 % interval, by Fisher's z.

    Raises ``ValueError`` for fewer than four values, or where all of a side are equal.
    """
    if len(first) < 4 or not np.ptp(first) or not np.ptp(second):
        raise ValueError(f"a correlation needs four values that differ, got {len(first)}")
    found = pearsonr(first, second)
    interval = found.confidence_interval(0.95)
    return float(found.statistic), float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Level:
    """One level of the comparison.

    Attributes:
        name: "prompts", "tasks" or "models".
        distance: mean distance of two prompts that differ at this level and at none above.
        share: this level's share of the sum of squares.
        ratio: effect size: ``distance`` over that of the level below; NaN for prompts.
        p: of "this level's labels mean nothing", by permutation, one sided; NaN where relabelling changes nothing
            (one prompt a task, one task a model).
        least_p: the smallest p that this many members can give: no evidence can be stronger.
    """

    name: str
    distance: float
    share: float
    ratio: float
    p: float
    least_p: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        names: of the profiles.
        matrix: Wasserstein-1 between the profiles' waves, each over all its prompts.
        levels: prompts, tasks, models; a level without two members is left out.
    """

    names: tuple[str, ...]
    matrix: Float[Floats, "profiles profiles"]
    levels: tuple[Level, ...]


def wave_distance(a: Float[Floats, "layers_a"], b: Float[Floats, "layers_b"]) -> float:
    """Wasserstein-1 between two demand curves over relative depth, each normalised to sum 1."""
    places = [(np.arange(len(curve)) + 0.5) / len(curve) for curve in (a, b)]
    return float(wasserstein_distance(*places, a, b))


def compare(
    profiles: Sequence[DemandProfile],
    names: Sequence[str],
    rho: float | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Distances between profiles, and how much of them is due to prompts, tasks and models.

    Args:
        profiles: one for each model and task.
        names: of the profiles.
        rho: share of attention mass; None is the first profile's nearest to the paper's.
        permutations: random relabellings; p-values are no smaller than 1 / (permutations + 1).
        seed: of the relabellings.

    Raises:
        ValueError: fewer than two profiles, or a rho that one of them does not have.
    """
    if len(profiles) < 2:
        raise ValueError(f"there is nothing to compare: {len(profiles)} profile")
    rho = profiles[0].reference_rho if rho is None else rho
    waves = [profile.layer_demand(rho) for profile in profiles]
    matrix = np.array([[wave_distance(a, b) for b in waves] for a in waves])
    curves = [curve for profile in profiles for curve in profile.prompt_layer_demand(rho)]
    tasks = np.array([i for i, profile in enumerate(profiles) for _ in profile.prompts])
    model_of = np.array(_models(profiles))
    squares = np.zeros((len(curves), len(curves)))
    for i, a in enumerate(curves):
        for j in range(i):
            squares[i, j] = squares[j, i] = wave_distance(a, curves[j]) ** 2
    return Comparison(tuple(names), matrix, _levels(squares, tasks, model_of, permutations, seed))


def _models(profiles: Sequence[DemandProfile]) -> list[int]:
    """Which profiles are of one model: same shape, architecture and name."""
    keys = [(p.shape, dict(p.architecture), p.source.get("model")) for p in profiles]
    return [keys.index(key) for key in keys]


def _levels(
    squares: Floats, tasks: np.ndarray[Any, Any], model_of: np.ndarray[Any, Any], permutations: int, seed: int
) -> tuple[Level, ...]:
    rng = np.random.default_rng(seed)
    models = model_of[tasks]
    same_task, same_model = tasks[:, None] == tasks, models[:, None] == models
    apart = ~np.eye(len(tasks), dtype=bool)
    distances = np.sqrt(squares)
    total = squares.sum() / 2 / len(tasks)
    within_tasks, within_models = _within(squares, tasks), _within(squares, models)
    pairs = {
        "prompts": (same_task & apart, within_tasks),
        "tasks": (same_model & ~same_task, within_models - within_tasks),
        "models": (~same_model, total - within_models),
    }
    levels: list[Level] = []
    for name, (where, sum_of_squares) in pairs.items():
        if not where.any():
            continue
        distance = float(distances[where].mean())
        ratio = distance / levels[-1].distance if levels else float("nan")
        if name == "tasks":
            p, least = _permute(squares, tasks, permutations, lambda: _shuffled(rng, tasks, models))
        elif name == "models":
            p, least = _permute(squares, models, permutations, lambda: rng.permutation(model_of)[tasks])
        else:
            p = least = float("nan")
        levels.append(Level(name, distance, float(sum_of_squares / total), ratio, p, least))
    return tuple(levels)


def _within(squares: Floats, labels: np.ndarray[Any, Any]) -> float:
    """Sum of squares within groups: pairwise squared distances over group size, each pair once."""
    same = labels[:, None] == labels
    return float((squares * same / same.sum(1)[:, None]).sum() / 2)


def _shuffled(
    rng: np.random.Generator, labels: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Labels permuted inside each group."""
    shuffled = labels.copy()
    for group in np.unique(groups):
        inside = groups == group
        shuffled[inside] = rng.permutation(labels[inside])
    return shuffled


def _permute(
    squares: Floats, labels: np.ndarray[Any, Any], permutations: int, draw: Callable[[], np.ndarray[Any, Any]]
) -> tuple[float, float]:
    """Share of relabellings with groups at least as tight as the true ones, itself counted; and the least share."""
    observed = _within(squares, labels)
    tight, partitions = 0, {_partition(labels)}
    for _ in range(permutations):
        drawn = draw()
        partitions.add(_partition(drawn))
        tight += _within(squares, drawn) <= observed * (1 + 1e-12)
    if len(partitions) == 1:
        return float("nan"), float("nan")
    return (tight + 1) / (permutations + 1), max(1 / len(partitions), 1 / (permutations + 1))


def _partition(labels: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """Who is with whom, whatever the labels are called."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(int(label), i) for i, label in enumerate(labels))
