"""What a study found: grades of its answers, gathered by method and budget, and which differences are real."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.questions import FIDELITY
from reasonalloc.evaluation.statistics import (
    Comparison,
    Estimate,
    Floats,
    compare,
    correct,
    inferior,
    mean_score,
    mean_value,
)
from reasonalloc.evaluation.store import Result, Store
from reasonalloc.evaluation.study import RANDOM, Batch, Study, Unit, Variant

MARGIN = 2.0  # points that a method may lose and still be called no worse
_NAMED = 8  # incomplete cells in one message
_ABLATION = ("reasonalloc", "rkv", "reasonalloc-layer", "reasonalloc-head")
_Key = tuple[str, str, int | None]  # a cell's task, method, budget


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Attributes:
        name: in tables.
        unit: of differences, in sentences.
        scale: from the number to that unit.
        digits: behind the point.
        lower_is_better: of likelihoods.
        bounded: a share, in [0, 1].
    """

    name: str
    unit: str
    scale: float
    digits: int
    lower_is_better: bool = False
    bounded: bool = True

    def estimate(self, values: Floats) -> Estimate:
        """Mean over problems with its interval."""
        return mean_score(values) if self.bounded else mean_value(values)

    def text(self, found: Estimate, sign: str = "") -> str:
        """ "mean [low, high]"."""
        mean, low, high = (f"{self.scale * x:{sign}.{self.digits}f}" for x in astuple(found))
        return f"{mean} [{low}, {high}]"


ACCURACY = Metric("accuracy %", "points", 100, 1)
SCORE = Metric("score %", "points", 100, 1)
NLL = Metric("nll", "nats", 1, 4, lower_is_better=True, bounded=False)
KL = Metric("kl", "nats", 1, 4, lower_is_better=True, bounded=False)
AGREEMENT = Metric("agreement %", "points", 100, 1)


@dataclass(frozen=True)
class CellResult:
    """One method at one budget on one task.

    Attributes:
        task, method, budget: which; budget None: the full cache.
        problems: ids, in the order of the values.
        values: per problem, the mean over its samples: accuracy (share of answers wholly right) and score (share of an
            answer that is right); for a text that was read the mean over its tokens of nll, kl and agreement.
        kept: tokens per head held, mean over answers and steps.
        kv_bytes: of one answer's keys and values at their largest, mean over answers.
        tokens: written or read, mean.
        exposure: share of answers in which anything was evicted; None where results do not say.
        cut_off: share of answers that hit the length limit.
        unreadable: share of answers in which no answer could be found.
        ungradable: problems left out because their reference cannot be read.
        answers: how many.
    """

    task: str
    method: str
    budget: int | None
    problems: tuple[str, ...]
    values: Mapping[Metric, Floats]
    kept: float
    kv_bytes: float
    tokens: float
    exposure: float | None
    cut_off: float
    unreadable: float
    ungradable: int
    answers: int

    @cached_property
    def estimates(self) -> dict[Metric, Estimate]:
        """Of every metric the mean with its interval; one bootstrap, however many tables and pictures show it."""
        return {metric: metric.estimate(values) for metric, values in self.values.items()}


@dataclass(frozen=True)
class Compared:
    """A method against another, on the problems that both have.

    Attributes:
        cell: the method at a budget.
        base: the base line at that budget, or the full cache.
        metric: of the values.
        comparison: cell minus base, in the metric's own number.
        problems: how many both have.
        margin: in points.
    """

    cell: CellResult
    base: CellResult
    metric: Metric
    comparison: Comparison
    problems: int
    margin: float

    @property
    def wins(self) -> int:
        """Problems on which the method is the better one."""
        return self.comparison.below if self.metric.lower_is_better else self.comparison.above

    @property
    def losses(self) -> int:
        """Problems on which the base is the better one."""
        return self.comparison.above if self.metric.lower_is_better else self.comparison.below

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the difference is real, else "undecided"."""
        if not self.comparison.real:
            return "undecided"
        return "better" if (self.comparison.difference.mean < 0) == self.metric.lower_is_better else "worse"

    @property
    def inferiority(self) -> str:
        """By the margin: "not inferior", "inferior" or "undecided"; empty for metrics that are no shares."""
        if not self.metric.bounded:
            return ""
        found = inferior(self.comparison.difference, self.margin / self.metric.scale)
        return "undecided" if found is None else "inferior" if found else "not inferior"


@dataclass(frozen=True)
class Interaction:
    """Whether the two levels of a split add up (the paper's ablation).

    Attributes:
        both: layers and heads.
        none, layers, heads: neither, and one of them.
        beyond: what ``both`` changes beyond the sum of what ``layers`` and ``heads`` change alone, with its interval.
        metric: of what.
    """

    both: CellResult
    none: CellResult
    layers: CellResult
    heads: CellResult
    beyond: Estimate
    metric: Metric

    @property
    def adds_up(self) -> bool:
        """Whether the interval holds zero."""
        return self.beyond.low <= 0 <= self.beyond.high


@dataclass(frozen=True)
class Findings:
    """All cells of a study, and what is missing.

    Attributes:
        study: what was asked.
        cells: what was found.
        missing: units without result.
        metric: by which answers are compared, ``ACCURACY`` or ``SCORE``; texts are by ``NLL``.
        left_out: tasks of which no problem can be judged for all methods.
        margin: of non-inferiority, in points.
        passed_over: methods of the folder's study that were not asked for.
        other_base: the base line of the folder's study, where another was asked for.
    """

    study: Study
    cells: tuple[CellResult, ...]
    missing: int
    metric: Metric
    left_out: tuple[str, ...] = ()
    margin: float = MARGIN
    passed_over: tuple[str, ...] = ()
    other_base: str = ""

    def of(self, task: str, budget: int | None = -1, control: bool = False) -> list[CellResult]:
        """Cells of a task, of one budget unless that is -1; named methods, or the random splits."""
        return [
            cell
            for cell in self.cells
            if cell.task == task and budget in (-1, cell.budget) and cell.method.startswith(RANDOM) == control
        ]

    def tasks(self) -> list[str]:
        """Names of those with a finished problem of a named method, in the study's order."""
        return list(dict.fromkeys(cell.task for cell in self.cells if not cell.method.startswith(RANDOM)))

    def full(self, task: str) -> CellResult | None:
        """The full cache's cell, if the study has one."""
        return next(iter(self.of(task, None)), None)

    def base(self, task: str, budget: int | None) -> CellResult | None:
        """The base line's cell at a budget."""
        return next((cell for cell in self.of(task, budget) if cell.method == self.study.compared_with), None)

    def metric_of(self, task: str) -> Metric:
        """What methods are compared by."""
        return NLL if task.startswith(FIDELITY) else self.metric

    @cached_property
    def comparisons(self) -> dict[str, list[Compared]]:
        """Of each task every method against the base line at its budget, then against the full cache.

        p-values are corrected over all of a task's comparisons with the base line, and over those with the full cache.
        """
        found = {}
        for task in self.tasks():
            cells = [cell for cell in self.of(task) if cell.budget is not None]
            lines = self._against([(cell, self.base(task, cell.budget)) for cell in cells])
            found[task] = [*lines, *self._against([(cell, self.full(task)) for cell in cells])]
        return found

    def interactions(self, task: str) -> list[Interaction]:
        """At every budget, of each of the study's ablations: methods that differ in their layers and heads alone."""
        metric, found = self.metric_of(task), list[Interaction]()
        for variant in self.study.variants:
            names = [_counterpart(self.study, variant, method) for method in _ABLATION]
            if variant.method != _ABLATION[0] or None in names:
                continue
            for budget in self.study.budgets:
                cells = [cell for name in names for cell in self.of(task, budget) if cell.method == name]
                if len(cells) < len(names):  # nothing is known of one of them yet
                    continue
                both, none, layers, heads = paired(cells, metric)
                if both.size > 1:
                    beyond = mean_value(both - layers - heads + none)
                    found.append(Interaction(cells[0], cells[1], cells[2], cells[3], beyond, metric))
        return found

    def _against(self, pairs: list[tuple[CellResult, CellResult | None]]) -> list[Compared]:
        found, made = [], []
        for cell, base in pairs:
            if base is None or cell is base:
                continue
            metric = self.metric_of(cell.task)
            first, second = paired([cell, base], metric)
            if first.size:
                found.append((cell, base, metric, first.size))
                made.append(compare(first, second, bounded=metric.bounded))
        return [
            Compared(cell, base, metric, comparison, size, self.margin)
            for (cell, base, metric, size), comparison in zip(found, correct(made), strict=True)
        ]


def collect(
    store: Store,
    study: Study,
    plan: Iterable[Batch],
    metric: Metric = ACCURACY,
    margin: float = MARGIN,
    partial: bool = False,
) -> Findings:
    """Read and grade what there is, each result once.

    All named methods of a task are judged by the same problems: all that were asked, or with ``partial`` those that
    all of them have answered in full. Random splits may have been asked fewer.

    Args:
        store: with the results.
        study: what was asked.
        plan: the store's.
        metric: by which answers are compared.
        margin: of non-inferiority, in points.
        partial: judge by what is there.

    Raises:
        ValueError: answers are missing, without ``partial``; of which cells is said.
    """
    units = [unit for batch in plan for unit in batch]
    gone = {unit.key for unit in units if store.missing((unit,))}
    if gone and not partial:
        raise ValueError(_incomplete(store, units, gone))
    unfinished = {(_key(unit), unit.question.id) for unit in units if unit.key in gone}
    shared = _shared(units, unfinished)
    groups: dict[_Key, dict[str, list[dict[str, float]]]] = {}
    for unit in units:
        problem = unit.question.id
        if problem in shared[unit.task] and (_key(unit), problem) not in unfinished:
            judged = _judge(store, unit, store.read(unit))  # type: ignore[arg-type]  # it is there
            groups.setdefault(_key(unit), {}).setdefault(problem, []).append(judged)
    order = {cell.method: i for i, cell in enumerate(study.cells)}
    cells = [found for key, problems in groups.items() if (found := _cell(*key, problems)) is not None]
    cells.sort(key=lambda cell: (cell.task, cell.budget or 0, order[cell.method]))
    judged_tasks = {cell.task for cell in cells if not cell.method.startswith(RANDOM)}
    left_out = tuple(task for task in shared if task not in judged_tasks)
    return Findings(study, tuple(cells), len(gone), metric, left_out, margin)


def _key(unit: Unit) -> _Key:
    return unit.task, unit.cell.method, unit.cell.budget


def _shared(units: list[Unit], unfinished: set[tuple[_Key, str]]) -> dict[str, set[str]]:
    """Of each task the problems that no named method has left unfinished."""
    shared: dict[str, set[str]] = {}
    for unit in units:
        shared.setdefault(unit.task, set()).add(unit.question.id)
    for (task, method, _), problem in unfinished:
        if not method.startswith(RANDOM):
            shared[task].discard(problem)
    return shared


def _incomplete(store: Store, units: list[Unit], gone: set[str]) -> str:
    """Which cells lack answers, and what can be done."""
    asked = Counter(_key(unit) for unit in units)
    lacking = Counter(_key(unit) for unit in units if unit.key in gone)
    cells = [
        f"{task} {method}{'' if budget is None else f' at budget {budget}'} "
        f"({asked[task, method, budget] - count} of {asked[task, method, budget]} answers)"
        for (task, method, budget), count in sorted(lacking.items(), key=lambda item: (*item[0][:2], item[0][2] or 0))
    ]
    more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
    damaged = f"; {store.damage()}" if store.damaged else ""
    return (
        f"{store.folder} is incomplete: {', '.join(cells[:_NAMED])}{more}{damaged}; run `reasonalloc eval --resume -o "
        f"{store.folder}`, or report with --partial on the problems that all methods have"
    )


def _cell(task: str, method: str, budget: int | None, problems: dict[str, list[dict[str, float]]]) -> CellResult | None:
    gradable = {name: rows for name, rows in sorted(problems.items()) if all(row["gradable"] for row in rows)}
    if not gradable:
        return None
    every = [row for rows in gradable.values() for row in rows]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in every]))

    return CellResult(
        task,
        method,
        budget,
        tuple(gradable),
        {
            metric: np.array([np.mean([row[metric.name] for row in rows]) for rows in gradable.values()])
            for metric in ((NLL, KL, AGREEMENT) if task.startswith(FIDELITY) else (ACCURACY, SCORE))
        },
        mean("kept"),
        mean("kv_bytes"),
        mean("tokens"),
        None if math.isnan(mean("evicted")) else mean("evicted"),
        mean("cut_off"),
        mean("unreadable"),
        len(problems) - len(gradable),
        len(every),
    )


def _judge(store: Store, unit: Unit, found: Result) -> dict[str, float]:
    """One result in numbers; ``evicted`` is NaN where the result does not say."""
    evicted = math.nan if found.evicted is None else float(found.evicted)
    cost = {"kept": found.kept_tokens, "kv_bytes": found.kv_bytes, "tokens": found.tokens, "evicted": evicted}
    if isinstance(found, Reading):
        means = [float(np.mean(values)) for values in (found.nll, found.kl, np.array(found.agree))]
        judged = dict(zip((NLL.name, KL.name, AGREEMENT.name), means, strict=True))
        return {**judged, **cost, "cut_off": 0.0, "unreadable": 0.0, "gradable": 1.0}
    grade = store.grade(unit, found)
    judged = {ACCURACY.name: float(grade.correct), SCORE.name: grade.score}
    unread = grade.gradable and grade.extracted is None
    states = {"cut_off": float(not found.finished), "unreadable": float(unread), "gradable": float(grade.gradable)}
    return {**judged, **cost, **states}


def _counterpart(study: Study, variant: Variant, method: str) -> str | None:
    """The variant of another method with the same changes; one that reads no profile need not name it."""

    def without_profile(found: Variant) -> dict[str, object]:
        return {name: value for name, value in found.changes.items() if name != "profile"}

    for found in study.variants:
        profile = found.changes.get("profile", variant.changes.get("profile"))
        alike = without_profile(found) == without_profile(variant) and profile == variant.changes.get("profile")
        if found.method == method and alike:
            return found.name
    return None


def paired(cells: list[CellResult], metric: Metric) -> list[Floats]:
    """The values of all on the problems that all have, in one order."""
    both = set.intersection(*(set(cell.problems) for cell in cells))
    return [cell.values[metric][[i for i, name in enumerate(cell.problems) if name in both]] for cell in cells]
