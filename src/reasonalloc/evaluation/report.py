"""The report of a study's findings: sentences, tables and pictures, as markdown, HTML and CSV."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from dataclasses import astuple
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.findings import NLL, Cell, CellResult, Findings, Metric, comparisons, paired
from reasonalloc.evaluation.statistics import Comparison, rank_among
from reasonalloc.files import write_atomically


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
