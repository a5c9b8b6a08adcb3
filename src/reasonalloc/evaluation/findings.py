"""What a study found: grades of its answers, gathered by method and budget, and which differences are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np

from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.questions import FIDELITY
from reasonalloc.evaluation.statistics import Comparison, Estimate, Floats, compare, correct, mean_score, mean_value
from reasonalloc.evaluation.store import Result, Store
from reasonalloc.evaluation.study import RANDOM, Batch, Study, Unit

Cell = tuple[str, int]  # method, budget


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
        return _estimate(values.tobytes(), self.bounded)

    def text(self, found: Estimate, sign: str = "") -> str:
        """ "mean [low, high]"."""
        mean, low, high = (f"{self.scale * x:{sign}.{self.digits}f}" for x in astuple(found))
        return f"{mean} [{low}, {high}]"


@lru_cache(maxsize=1024)
def _estimate(values: bytes, bounded: bool) -> Estimate:
    """One bootstrap, however many tables and pictures show it."""
    numbers = np.frombuffer(values)
    return mean_score(numbers) if bounded else mean_value(numbers)


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
    cut_off: float
    unreadable: float
    ungradable: int
    answers: int


@dataclass(frozen=True)
class Findings:
    """All cells of a study, and what is missing.

    Attributes:
        study: what was asked.
        cells: what was found.
        missing: units without result.
        metric: by which answers are compared, ``ACCURACY`` or ``SCORE``; texts are by ``NLL``.
    """

    study: Study
    cells: tuple[CellResult, ...]
    missing: int
    metric: Metric

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


def collect(store: Store, study: Study, plan: Iterable[Batch], metric: Metric = ACCURACY) -> Findings:
    """Grade what there is. Cells of which some answers are missing are judged by the problems that are complete."""
    groups: dict[tuple[str, str, int | None], dict[str, list[dict[str, float] | None]]] = {}
    for batch in plan:
        for unit in batch:
            problems = groups.setdefault((unit.task, unit.cell.method, unit.cell.budget), {})
            found = store.read(unit)
            judged = None if found is None else _judge(store, unit, found)
            problems.setdefault(unit.question.id, []).append(judged)
    cells = [_cell(*name, problems) for name, problems in groups.items()]
    missing = sum(row is None for problems in groups.values() for rows in problems.values() for row in rows)
    order = {cell.method: i for i, cell in enumerate(study.cells)}
    found_cells = sorted((c for c in cells if c is not None), key=lambda c: (c.task, c.budget or 0, order[c.method]))
    return Findings(study, tuple(found_cells), missing, metric)


def _cell(
    task: str, method: str, budget: int | None, problems: dict[str, list[dict[str, float] | None]]
) -> CellResult | None:
    finished = {name: [row for row in rows if row is not None] for name, rows in problems.items() if None not in rows}
    complete = {name: rows for name, rows in sorted(finished.items()) if all(row["gradable"] for row in rows)}
    if not complete:
        return None
    every = [row for rows in complete.values() for row in rows]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in every]))

    return CellResult(
        task,
        method,
        budget,
        tuple(complete),
        {
            metric: np.array([np.mean([row[metric.name] for row in rows]) for rows in complete.values()])
            for metric in ((NLL, KL, AGREEMENT) if task.startswith(FIDELITY) else (ACCURACY, SCORE))
        },
        mean("kept"),
        mean("kv_bytes"),
        mean("tokens"),
        mean("cut_off"),
        mean("unreadable"),
        len(finished) - len(complete),
        len(every),
    )


def _judge(store: Store, unit: Unit, found: Result) -> dict[str, float]:
    """One result in numbers."""
    cost = {"kept": found.kept_tokens, "kv_bytes": found.kv_bytes, "tokens": found.tokens}
    if isinstance(found, Reading):
        means = [float(np.mean(values)) for values in (found.nll, found.kl, np.array(found.agree))]
        judged = dict(zip((NLL.name, KL.name, AGREEMENT.name), means, strict=True))
        return {**judged, **cost, "cut_off": 0.0, "unreadable": 0.0, "gradable": 1.0}
    grade = store.grade(unit, found)
    judged = {ACCURACY.name: float(grade.correct), SCORE.name: grade.score}
    unread = grade.gradable and grade.extracted is None
    states = {"cut_off": float(not found.finished), "unreadable": float(unread), "gradable": float(grade.gradable)}
    return {**judged, **cost, **states}


def comparisons(findings: Findings, task: str, against: CellResult | None = None) -> dict[Cell, Comparison]:
    """Every method against the base line at its budget, or against one cell, on the problems that both have.

    p-values are corrected over all comparisons that one call makes.
    """
    found, metric = {}, findings.metric_of(task)
    for cell in findings.of(task):
        base = against or findings.base(task, cell.budget)
        if base is None or cell is base or cell.budget is None:
            continue
        first, second = paired([cell, base], metric)
        if first.size:
            found[cell.method, cell.budget] = compare(first, second, bounded=metric.bounded)
    return dict(zip(found, correct(list(found.values())), strict=True))


def paired(cells: list[CellResult], metric: Metric) -> list[Floats]:
    """The values of all on the problems that all have, in one order."""
    both = set.intersection(*(set(cell.problems) for cell in cells))
    return [cell.values[metric][[i for i, name in enumerate(cell.problems) if name in both]] for cell in cells]
