"""What a study found: tables, pictures, and sentences that say which differences are real."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.questions import FIDELITY
from reasonalloc.evaluation.statistics import (
    Comparison,
    Estimate,
    Floats,
    compare,
    correct,
    mean_score,
    mean_value,
    rank_among,
)
from reasonalloc.evaluation.store import Result, Store
from reasonalloc.evaluation.study import RANDOM, Batch, Study, Unit
from reasonalloc.files import write_atomically

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


def sentences(findings: Findings, task: str) -> list[str]:
    """Which differences are real, in words."""
    full = findings.full(task)
    lines = _verdicts(findings, task, comparisons(findings, task), str(findings.study.compared_with))
    if full is not None:
        lines += _verdicts(findings, task, comparisons(findings, task, full), "the full cache")
    metric = findings.metric_of(task)
    for budget in findings.study.budgets:
        control = findings.of(task, budget, control=True)
        for cell in findings.of(task, budget) if control else []:
            # On the problems that all of them have, so that like is compared with like.
            own, *others = paired([cell, *control], metric)
            if own.size:
                sign = -1 if metric.lower_is_better else 1
                rank, places = rank_among(sign * float(own.mean()), [sign * float(other.mean()) for other in others])
                lines.append(
                    f"At budget {budget}, {cell.method} ({metric.scale * own.mean():.{metric.digits}f}) takes place "
                    f"{rank} of {places} among random splits of the same total with R-KV's scores, on {own.size} "
                    "problems (ties count against it)."
                )
    return lines


def _verdicts(findings: Findings, task: str, found: dict[Cell, Comparison], base: str) -> list[str]:
    lines, metric = [], findings.metric_of(task)
    for (method, budget), comparison in found.items():
        better = (comparison.difference.mean < 0) == metric.lower_is_better
        verdict = f"is {'better' if better else 'worse'} than" if comparison.real else "cannot be told from"
        lines.append(
            f"At budget {budget}, {method} {verdict} {base} "
            f"({metric.text(comparison.difference, '+')} {metric.unit}, corrected p = {comparison.corrected:.2g})."
        )
    return lines


def rows(findings: Findings, task: str) -> list[dict[str, str]]:
    """One line for each method and budget, as text."""
    full = findings.full(task)
    lines = []
    for cell in findings.of(task):
        line = {"method": cell.method, "budget": "-" if cell.budget is None else str(cell.budget)}
        line |= {metric.name: metric.text(metric.estimate(values)) for metric, values in cell.values.items()}
        line |= {"kept tokens": f"{cell.kept:.0f}", "KV bytes": f"{cell.kv_bytes:.0f}"}
        line |= {"of full": "" if full is None else f"{cell.kv_bytes / full.kv_bytes:.1%}"}
        line |= {"tokens": f"{cell.tokens:.0f}", "cut off": f"{cell.cut_off:.1%}"}
        line |= {"unreadable": f"{cell.unreadable:.1%}", "problems": str(len(cell.problems))}
        lines.append({**line, "answers": str(cell.answers)})
    return lines


def markdown(findings: Findings) -> str:
    """Tables and sentences."""
    parts = [f"# {findings.study.model}", "", _preamble(findings)]
    for task in findings.tasks():
        table = rows(findings, task)
        parts += ["", f"## {task}", "", "| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
        parts += ["| " + " | ".join(line.values()) + " |" for line in table]
        parts += ["", *(f"- {sentence}" for sentence in sentences(findings, task))]
    return "\n".join(parts) + "\n"


def _preamble(findings: Findings) -> str:
    study, sampling = findings.study, findings.study.sampling
    how = f"temperature {sampling.temperature}, top-p {sampling.top_p}" if sampling.temperature else "greedy"
    text = (
        f"{study.samples} answer(s) to each question, {how}, at most {sampling.max_new_tokens} tokens. Intervals: "
        f"95 %, bootstrap over problems. Comparisons: paired by problem ({findings.metric.name} of answers, {NLL.name} "
        "of texts that are read), sign-flip test, Holm's correction over all of a task's comparisons with the same "
        "method. accuracy: all of the answer right; score: share of it. nll: negative log-likelihood of the text, nats "
        "per token; kl: from the full cache's distribution; agreement: same likeliest token. kept tokens: per head, "
        "mean over layers, heads, and decoding steps; KV bytes: the largest share of the cache that fell to one "
        "answer, free slots included."
    )
    if findings.missing:
        text += f" **Incomplete: {findings.missing} answers are missing.**"
    ungradable = {cell.task: cell.ungradable for cell in findings.cells if cell.ungradable}
    for task, count in ungradable.items():
        text += f" **{task}: {count} problem(s) left out, whose reference answer cannot be read.**"
    return text


def to_csv(findings: Findings) -> str:
    """Every number of every cell on a line of its own, random splits included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["task", "method", "budget", "quantity", "mean", "low", "high", "problems", "answers"])
    for cell in findings.cells:
        name = (cell.task, cell.method, "" if cell.budget is None else cell.budget)
        size = (len(cell.problems), cell.answers)
        for metric, values in cell.values.items():
            estimate = astuple(metric.estimate(values))
            writer.writerow([*name, metric.name.removesuffix(" %"), *(f"{x:.6g}" for x in estimate), *size])
        for quantity in ("kept", "kv_bytes", "tokens", "cut_off", "unreadable"):
            writer.writerow([*name, quantity, f"{getattr(cell, quantity):.6g}", "", "", *size])
    return out.getvalue()


def to_html(findings: Findings, pictures: dict[str, bytes]) -> str:
    """One file that needs no other."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>reasonalloc report</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}</style>",
        f"<h1>{html.escape(findings.study.model)}</h1><p>{html.escape(_preamble(findings)).replace('**', '')}</p>",
    ]
    for task in findings.tasks():
        parts.append(f"<h2>{html.escape(task)}</h2>")
        if task in pictures:
            encoded = base64.b64encode(pictures[task]).decode()
            parts.append(
                f"<img alt='{findings.metric_of(task).name} against budget' src='data:image/png;base64,{encoded}'>"
            )
        table = rows(findings, task)
        parts.append("<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in table[0]) + "</tr>")
        for line in table:
            parts.append("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in line.values()) + "</tr>")
        parts.append("</table><ul>")
        parts += [f"<li>{html.escape(sentence)}</li>" for sentence in sentences(findings, task)]
        parts.append("</ul>")
    return "\n".join(parts) + "</html>\n"


def curves(findings: Findings, task: str) -> dict[str, Any]:
    """What a picture of a task needs: method -> [(budget, interval)], the full cache, the random splits.

    Likelihoods differ more between texts than between methods: they are drawn as what a text loses to the full cache.
    """
    metric, full = findings.metric_of(task), findings.full(task)
    origin = None if metric.bounded else full
    series: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    for cell in findings.of(task):
        if cell.budget is not None:
            series.setdefault(cell.method, []).append((cell.budget, _interval(cell, origin, metric)))
    control: dict[int, list[float]] = {}
    level = 0.0 if origin is None else float(origin.values[metric].mean())
    for cell in findings.of(task, control=True):
        control.setdefault(int(cell.budget or 0), []).append(
            metric.scale * (_comparable(findings, cell, metric) - level)
        )
    return {"series": series, "full": full and _interval(full, origin, metric), "control": control, "title": task,
            "metric": metric.name if origin is None else f"{metric.name}, {metric.unit} above the full cache's",
            "from_zero": metric.bounded}  # fmt: skip


def _interval(cell: CellResult, origin: CellResult | None, metric: Metric) -> tuple[float, ...]:
    """Mean and interval of a cell, or of its difference from another on the problems that both have."""
    values = cell.values[metric]
    if origin is not None:
        own, others = paired([cell, origin], metric)
        values = own - others
    return tuple(metric.scale * x for x in astuple(metric.estimate(values)))


def _comparable(findings: Findings, cell: CellResult, metric: Metric) -> float:
    """A random split's mean as if it had been asked all that the base line was: by the difference on what both have."""
    base = findings.base(cell.task, cell.budget)
    if base is not None:
        own, others = paired([cell, base], metric)
        if own.size:
            return float(base.values[metric].mean() + (own - others).mean())
    return float(cell.values[metric].mean())


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """report.html, report.md, report.csv; with matplotlib, a PNG for each task that was asked with budgets."""
    pictures: dict[str, bytes] = {}
    try:
        from reasonalloc.evaluation.plots import draw_curves

        for task in findings.tasks():
            if any(cell.budget is not None for cell in findings.of(task)):
                pictures[task] = draw_curves(**curves(findings, task))
    except ImportError:
        pass  # the pictures are an extra
    files = {
        "report.md": markdown(findings).encode(),
        "report.csv": to_csv(findings).encode(),
        "report.html": to_html(findings, pictures).encode(),
        **{f"{re.sub('[: ]', '-', task)}.png": png for task, png in pictures.items()},
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
