"""What a study found: tables, pictures, and sentences that say which differences are real."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.grading import Grade
from reasonalloc.evaluation.statistics import (
    Comparison,
    Estimate,
    Floats,
    compare,
    correct,
    mean_score,
    rank_among,
)
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import FULL, RANDOM, Batch, Study, Unit
from reasonalloc.files import write_atomically

BASELINE = "rkv"


@dataclass(frozen=True)
class CellResult:
    """One method at one budget on one task.

    Attributes:
        task, method, budget: which; budget None: the full cache.
        problems: ids, in the order of the scores.
        accuracy: per problem, share of samples that are wholly right.
        score: per problem, mean share of the answer that is right.
        kept: tokens per head held, mean over answers and steps.
        kv_bytes: largest share of keys and values that fell to one answer, mean over answers.
        tokens: written, mean.
        cut_off: share of answers that hit the length limit.
        unreadable: share of answers in which no answer could be found.
        answers: how many.
    """

    task: str
    method: str
    budget: int | None
    problems: tuple[str, ...]
    accuracy: Floats
    score: Floats
    kept: float
    kv_bytes: float
    tokens: float
    cut_off: float
    unreadable: float
    answers: int

    def metric(self, name: str) -> Floats:
        """ "accuracy" or "score"."""
        return self.score if name == "score" else self.accuracy


@dataclass(frozen=True)
class Findings:
    """All cells of a study, and what is missing.

    Attributes:
        study: what was asked.
        cells: what was found.
        missing: units without result.
        metric: what is compared: "accuracy" (all of an answer right) or "score" (share that is right).
    """

    study: Study
    cells: tuple[CellResult, ...]
    missing: int
    metric: str

    def of(self, task: str, budget: int | None = -1, control: bool = False) -> list[CellResult]:
        """Cells of a task, of one budget unless that is -1; named methods, or the random splits."""
        return [
            cell
            for cell in self.cells
            if cell.task == task and budget in (-1, cell.budget) and cell.method.startswith(RANDOM) == control
        ]

    def tasks(self) -> list[str]:
        """Names, in the study's order."""
        return list(dict.fromkeys(cell.task for cell in self.cells))


def collect(store: Store, study: Study, plan: Iterable[Batch], metric: str = "accuracy") -> Findings:
    """Grade what there is. Cells of which some answers are missing are judged by the problems that are complete."""
    groups: dict[tuple[str, str, int | None], list[tuple[Unit, Answer | None]]] = {}
    for batch in plan:
        for unit in batch:
            group = groups.setdefault((unit.task, unit.cell.method, unit.cell.budget), [])
            group.append((unit, store.read(unit)))
    cells = [_cell(store, *name, group) for name, group in groups.items()]
    missing = sum(found is None for group in groups.values() for _, found in group)
    order = {cell.method: i for i, cell in enumerate(study.cells())}
    found = sorted((c for c in cells if c is not None), key=lambda c: (c.task, c.budget or 0, order[c.method]))
    return Findings(study, tuple(found), missing, metric)


def _cell(
    store: Store, task: str, method: str, budget: int | None, group: list[tuple[Unit, Answer | None]]
) -> CellResult | None:
    problems: dict[str, list[tuple[Answer, Grade] | None]] = {}
    for unit, found in group:
        graded = None if found is None else (found, store.grade(unit, found))
        problems.setdefault(unit.question.id, []).append(graded)
    complete = {name: [x for x in rows if x is not None] for name, rows in sorted(problems.items()) if None not in rows}
    if not complete:
        return None
    rows = [row for rows in complete.values() for row in rows]
    return CellResult(
        task,
        method,
        budget,
        tuple(complete),
        np.array([np.mean([grade.correct for _, grade in rows]) for rows in complete.values()]),
        np.array([np.mean([grade.score for _, grade in rows]) for rows in complete.values()]),
        float(np.mean([found.kept_tokens for found, _ in rows])),
        float(np.mean([found.kv_bytes for found, _ in rows])),
        float(np.mean([found.tokens for found, _ in rows])),
        float(np.mean([not found.finished for found, _ in rows])),
        float(np.mean([grade.extracted is None for _, grade in rows])),
        len(rows),
    )


def comparisons(findings: Findings, task: str) -> dict[tuple[str, int], Comparison]:
    """Every method against the base line at the same budget, on the problems both have; corrected over the task."""
    found = {}
    for budget in findings.study.budgets:
        cells = {cell.method: cell for cell in findings.of(task, budget)}
        base = cells.get(BASELINE)
        for method, cell in cells.items():
            if base is not None and method != BASELINE:
                found[method, budget] = compare(*paired(cell, base, findings.metric))
    return dict(zip(found, correct(list(found.values())), strict=True))


def paired(first: CellResult, second: CellResult, metric: str) -> tuple[Floats, Floats]:
    """The scores of both on the problems that both have, in one order."""
    both = [name for name in first.problems if name in set(second.problems)]
    columns = []
    for cell in (first, second):
        at = {name: i for i, name in enumerate(cell.problems)}
        columns.append(cell.metric(metric)[[at[name] for name in both]])
    return columns[0], columns[1]


def sentences(findings: Findings, task: str) -> list[str]:
    """Which differences are real, in words."""
    lines = []
    for (method, budget), found in comparisons(findings, task).items():
        d = found.difference
        size = (
            f"{100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], corrected p = {found.corrected:.2g}"
        )
        if found.real:
            verdict = f"is {'better' if d.mean > 0 else 'worse'} than {BASELINE}"
        else:
            verdict = f"cannot be told from {BASELINE}"
        lines.append(f"At budget {budget}, {method} {verdict} ({size}).")
    for budget in findings.study.budgets:
        control = findings.of(task, budget, control=True)
        for cell in findings.of(task, budget) if control else []:
            # On the problems that the random splits were given, so that like is compared with like.
            own = float(paired(cell, control[0], findings.metric)[0].mean())
            rank, places = rank_among(own, [float(c.metric(findings.metric).mean()) for c in control])
            lines.append(
                f"At budget {budget}, {cell.method} ({own:.1%}) takes place {rank} of {places} among random splits of "
                f"the same total with R-KV's scores, on {len(control[0].problems)} problems."
            )
    return lines


def _text(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def rows(findings: Findings, task: str) -> list[dict[str, str]]:
    """One line for each method and budget, as text."""
    full = next((cell for cell in findings.of(task) if cell.budget is None), None)
    lines = []
    for cell in findings.of(task):
        share = "" if full is None else f"{cell.kv_bytes / full.kv_bytes:.1%}"
        lines.append(
            {
                "method": cell.method,
                "budget": "-" if cell.budget is None else str(cell.budget),
                "accuracy %": _text(mean_score(cell.accuracy)),
                "score %": _text(mean_score(cell.score)),
                "kept tokens": f"{cell.kept:.0f}",
                "KV bytes": f"{cell.kv_bytes:.0f}",
                "of full": share,
                "tokens": f"{cell.tokens:.0f}",
                "cut off": f"{cell.cut_off:.1%}",
                "unreadable": f"{cell.unreadable:.1%}",
                "problems": str(len(cell.problems)),
                "answers": str(cell.answers),
            }
        )
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
        f"{study.samples} answer(s) to each question, {how}, at most {sampling.max_new_tokens} tokens. "
        f"Intervals: 95 %, bootstrap over problems. Comparisons: paired by problem, on {findings.metric}, sign-flip "
        "test, Holm's correction over all comparisons of a task. accuracy: all of the answer right; score: share of "
        "it. kept tokens: per head, mean over layers, heads and decoding steps; KV bytes: the largest share of the "
        "cache that fell to one answer, free slots included."
    )
    if findings.missing:
        text += f" **Incomplete: {findings.missing} answers are missing.**"
    return text


def to_csv(findings: Findings) -> str:
    """Every cell, random splits included, with plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("accuracy", "score")
    head = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["task", "method", "budget", *head, "kept_tokens", "kv_bytes", "tokens", "cut_off", "unreadable",
                     "problems", "answers"])  # fmt: skip
    for cell in findings.cells:
        estimates = [mean_score(cell.metric(name)) for name in names]
        numbers = [f"{value:.6g}" for e in estimates for value in (e.mean, e.low, e.high)]
        costs = [f"{value:.6g}" for value in (cell.kept, cell.kv_bytes, cell.tokens, cell.cut_off, cell.unreadable)]
        budget = "" if cell.budget is None else cell.budget
        writer.writerow([cell.task, cell.method, budget, *numbers, *costs, len(cell.problems), cell.answers])
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
            parts.append(f"<img alt='{findings.metric} against budget' src='data:image/png;base64,{encoded}'>")
        table = rows(findings, task)
        parts.append("<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in table[0]) + "</tr>")
        for line in table:
            parts.append("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in line.values()) + "</tr>")
        parts.append("</table><ul>")
        parts += [f"<li>{html.escape(sentence)}</li>" for sentence in sentences(findings, task)]
        parts.append("</ul>")
    return "\n".join(parts) + "</html>\n"


def curves(findings: Findings, task: str) -> dict[str, Any]:
    """What a picture of a task needs: method -> [(budget, interval)], the full cache, the random splits."""
    series: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    full = None
    for cell in findings.of(task):
        estimate = astuple(mean_score(cell.metric(findings.metric)))
        if cell.method == FULL or cell.budget is None:
            full = estimate
        else:
            series.setdefault(cell.method, []).append((cell.budget, estimate))
    control: dict[int, list[float]] = {}
    for cell in findings.of(task, control=True):
        control.setdefault(int(cell.budget or 0), []).append(float(cell.metric(findings.metric).mean()))
    return {"series": series, "full": full, "control": control}


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """report.html, report.md, report.csv, and a PNG for each task where matplotlib is there."""
    pictures: dict[str, bytes] = {}
    try:
        from reasonalloc.plots import draw_curves

        for task in findings.tasks():
            pictures[task] = draw_curves(**curves(findings, task), title=task, metric=findings.metric)
    except ImportError:
        pass  # the pictures are an extra
    files = {
        "report.md": markdown(findings).encode(),
        "report.csv": to_csv(findings).encode(),
        "report.html": to_html(findings, pictures).encode(),
        **{f"{task.replace(':', '-')}.png": png for task, png in pictures.items()},
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
