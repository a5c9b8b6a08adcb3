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

from reasonalloc.evaluation.findings import NLL, CellResult, Compared, Findings, Interaction, Metric, paired
from reasonalloc.evaluation.statistics import least_problems, rank_among
from reasonalloc.files import write_atomically

_SELDOM = 0.5  # an exposure below is warned of
_VERDICTS = {"better": "is better than", "worse": "is worse than", "undecided": "cannot be told from"}


def sentences(findings: Findings, task: str) -> list[str]:
    """Which differences are real, in words; and which cells say little."""
    lines = _differences(findings, task)
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
    lines += [_sum_of_parts(found) for found in findings.interactions(task)]
    lines += [
        f"At budget {cell.budget}, {cell.method} evicted nothing in {1 - cell.exposure:.1%} of what it wrote or read: "
        "nothing in them depends on it, and its results say little about it."
        for cell in findings.of(task)
        if cell.budget is not None and cell.exposure is not None and cell.exposure < _SELDOM
    ]
    return lines


def _differences(findings: Findings, task: str) -> list[str]:
    """A sentence for each comparison; one for all where the problems are too few for any to be real."""
    compared = findings.comparisons[task]
    needed = 0
    for whole in (False, True):  # those with the base line, and those with the full cache, are corrected apart
        family = [found for found in compared if (found.base.budget is None) == whole]
        if family:
            least = least_problems(len(family))
            if any(found.problems >= least or found.comparison.real for found in family):
                return [_sentence(found) for found in compared]
            needed = max(needed, least)
    if not needed or any(found.inferiority not in ("", "undecided") for found in compared):
        return [_sentence(found) for found in compared]
    most = max(found.problems for found in compared)
    return [
        f"Too few problems ({most}): nothing can be told. With {needed} problems a method that is better on all of "
        "them could be told from another."
    ]


def _sentence(found: Compared) -> str:
    comparison, metric = found.comparison, found.metric
    base = "the full cache" if found.base.budget is None else found.base.method
    inferiority = {
        "": "",
        "undecided": f": undecided at a margin of {found.margin:g} points",
        "inferior": f": inferior by more than {found.margin:g} points",
        "not inferior": f": not inferior by more than {found.margin:g} points",
    }[found.inferiority]
    return (
        f"At budget {found.cell.budget}, {found.cell.method} {_VERDICTS[found.verdict]} {base} "
        f"({metric.text(comparison.difference, '+')} {metric.unit}, corrected p = {comparison.corrected:.2g}; "
        f"better on {found.wins} problems, worse on {found.losses}, sign test p = {comparison.sign_p:.2g})"
        f"{inferiority}."
    )


def _sum_of_parts(found: Interaction) -> str:
    metric = found.metric
    verdict = "add up, as far as this can show" if found.adds_up else "do not add up"
    return (
        f"At budget {found.both.budget}, {found.both.method} changes {metric.text(found.beyond, '+')} {metric.unit} "
        f"beyond the sum of {found.layers.method} and {found.heads.method}, each against {found.none.method}: their "
        f"effects {verdict} (not corrected)."
    )


def rows(findings: Findings, task: str) -> list[dict[str, str]]:
    """One line for each method and budget, as text."""
    full = findings.full(task)
    lines = []
    for cell in findings.of(task):
        line = {"method": cell.method, "budget": "-" if cell.budget is None else str(cell.budget)}
        line |= {metric.name: metric.text(estimate) for metric, estimate in cell.estimates.items()}
        ratio = "" if full is None else f" ({cell.tokens / full.tokens:.2f}x)"
        line |= {"mean length": f"{cell.tokens:.0f}{ratio}"}
        line |= {"exposure": "-" if cell.exposure is None else f"{cell.exposure:.1%}"}
        line |= {"kept tokens": f"{cell.kept:.0f}", "KV bytes": _bytes(cell.kv_bytes)}
        line |= {"of full": f"{cell.kv_bytes / full.kv_bytes:.1%}" if full is not None and full.kv_bytes else ""}
        line |= {"cut off": f"{cell.cut_off:.1%}", "unreadable": f"{cell.unreadable:.1%}"}
        lines.append({**line, "problems": str(len(cell.problems)), "answers": str(cell.answers)})
    return lines


def _bytes(count: float) -> str:
    """In kB, MB or GB: "954 kB", "1.25 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def markdown(findings: Findings) -> str:
    """Tables and sentences, and below them what their words mean."""
    parts = [f"# {findings.study.model}", "", _asked(findings)]
    parts += [line for warning in _warnings(findings) for line in ("", f"**{warning}**")]
    for task in findings.tasks():
        table = rows(findings, task)
        parts += ["", f"## {task}", "", "| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
        parts += ["| " + " | ".join(line.values()) + " |" for line in table]
        parts += ["", *(f"- {sentence}" for sentence in sentences(findings, task))]
    parts += ["", "## What the words mean", ""]
    parts += [f"- **{word}**: {meaning}" for word, meaning in _meanings(findings).items()]
    return "\n".join(parts) + "\n"


def _asked(findings: Findings) -> str:
    study, sampling = findings.study, findings.study.sampling
    how = f"temperature {sampling.temperature}, top-p {sampling.top_p}" if sampling.temperature else "greedy"
    return f"{study.samples} answer(s) to each question, {how}, at most {sampling.max_new_tokens} tokens."


def _meanings(findings: Findings) -> dict[str, str]:
    """Of every word in tables and sentences what it means."""
    return {
        "[low, high]": "the 95 % interval of a mean, by bootstrap over problems.",
        "comparisons": f"paired by problem ({findings.metric.name} of answers, {NLL.name} of texts that are read): "
        "sign-flip test of the mean, Holm's correction over all of a task's comparisons with the same method; beside "
        "it the exact sign test over the problems that differ, not corrected.",
        "not inferior": f"by more than {findings.margin:g} points: all of the difference's interval lies above "
        f"-{findings.margin:g}; inferior: all of it lies below; not corrected.",
        "accuracy, score": "all of the answer right; share of it that is right.",
        "nll, kl, agreement": "negative log-likelihood of a text that is read, nats per token; divergence from the "
        "full cache's distribution; how often the likeliest token is the same.",
        "mean length": "tokens of an answer or text, and how many times the full cache's; tight budgets lengthen "
        "traces, so that accuracy may be paid for in tokens.",
        "exposure": "share of answers in which anything was evicted; a budget that nobody reached proves nothing.",
        "kept tokens": "per head, mean over layers, heads, and decoding steps.",
        "KV bytes": "the most that one answer held, free slots of its own included, mean over answers; 1 kB is 1,000 "
        "bytes.",
        "cut off": "share of answers that the length limit ended; they count as they stand, mostly as wrong.",
        "unreadable": "share of answers in which no result could be found; they count as wrong. An answer that was "
        "cut off before its result is both.",
    }


def _warnings(findings: Findings) -> list[str]:
    """What readers must know before the first number."""
    found = []
    if findings.missing:
        found.append(
            f"INCOMPLETE: {findings.missing} answers are missing; every task is judged by the problems that all its "
            "methods have."
        )
    if findings.other_base:
        found.append(
            f"Compared with {findings.study.compared_with}; the study's own base line is {findings.other_base}."
        )
    if findings.passed_over:
        found.append(f"Not reported, though the study has them: {'; '.join(findings.passed_over)}.")
    found += [f"{task} is left out: no problem can be judged for all methods." for task in findings.left_out]
    ungradable = {cell.task: cell.ungradable for cell in findings.cells if cell.ungradable}
    return found + [
        f"{task}: {count} problem(s) left out, whose reference answer cannot be read."
        for task, count in ungradable.items()
    ]


def to_csv(findings: Findings) -> str:
    """Every number of every cell on a line of its own, random splits included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["task", "method", "budget", "quantity", "mean", "low", "high", "problems", "answers"])
    for cell in findings.cells:
        name = (cell.task, cell.method, "" if cell.budget is None else cell.budget)
        size = (len(cell.problems), cell.answers)
        for metric, estimate in cell.estimates.items():
            writer.writerow([*name, _plain(metric), *(f"{x:.6g}" for x in astuple(estimate)), *size])
        for quantity in ("kept", "kv_bytes", "tokens", "exposure", "cut_off", "unreadable"):
            value = getattr(cell, quantity)
            writer.writerow([*name, quantity, "" if value is None else f"{value:.6g}", "", "", *size])
    return out.getvalue()


def comparisons_csv(findings: Findings) -> str:
    """Every comparison on a line of its own; differences as in ``to_csv``, the margin in points."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["task", "base", "method", "budget", "difference", "low", "high", "p", "corrected", "wins", "losses", "sign p",
         "verdict", "margin", "inferiority", "metric", "problems"]
    )  # fmt: skip
    for task in findings.tasks():
        for found in findings.comparisons[task]:
            made = found.comparison
            numbers = (f"{x:.6g}" for x in (*astuple(made.difference), made.p, made.corrected))
            name = (task, found.base.method, found.cell.method, found.cell.budget)
            margin = f"{found.margin:g}" if found.inferiority else ""
            last = (found.verdict, margin, found.inferiority, _plain(found.metric), found.problems)
            writer.writerow([*name, *numbers, found.wins, found.losses, f"{made.sign_p:.6g}", *last])
    return out.getvalue()


def _plain(metric: Metric) -> str:
    """A metric's name in files, where shares are no percentages."""
    return metric.name.removesuffix(" %")


def to_html(findings: Findings, pictures: dict[str, bytes]) -> str:
    """One file that needs no other."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>reasonalloc report</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}</style>",
        f"<h1>{html.escape(findings.study.model)}</h1><p>{html.escape(_asked(findings))}</p>",
        *(f"<p><strong>{html.escape(warning)}</strong></p>" for warning in _warnings(findings)),
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
    parts.append("<h2>What the words mean</h2><dl>")
    parts += [f"<dt>{html.escape(w)}</dt><dd>{html.escape(m)}</dd>" for w, m in _meanings(findings).items()]
    parts.append("</dl>")
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
    if origin is None:
        estimate = cell.estimates[metric]
    else:
        own, others = paired([cell, origin], metric)
        estimate = metric.estimate(own - others)
    return tuple(metric.scale * x for x in astuple(estimate))


def _comparable(findings: Findings, cell: CellResult, metric: Metric) -> float:
    """A random split's mean as if it had been asked all that the base line was: by the difference on what both have."""
    base = findings.base(cell.task, cell.budget)
    if base is not None:
        own, others = paired([cell, base], metric)
        if own.size:
            return float(base.values[metric].mean() + (own - others).mean())
    return float(cell.values[metric].mean())


def picture_name(task: str) -> str:
    """A task's name as a file's: nothing in it leads to another folder."""
    return re.sub(r"[^\w.+,()=-]", "-", task)


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """report.html, report.md, report.csv, comparisons.csv; with matplotlib, a PNG of each task asked with budgets."""
    pictures: dict[str, bytes] = {}
    try:
        from reasonalloc.evaluation.plots import draw_curves, png

        for task in findings.tasks():
            if any(cell.budget is not None for cell in findings.of(task)):
                pictures[task] = png(draw_curves(**curves(findings, task)))
    except ImportError:
        pass  # the pictures are an extra
    files = {
        "report.md": markdown(findings).encode(),
        "report.csv": to_csv(findings).encode(),
        "comparisons.csv": comparisons_csv(findings).encode(),
        "report.html": to_html(findings, pictures).encode(),
        **{f"{picture_name(task)}.png": png for task, png in pictures.items()},
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
