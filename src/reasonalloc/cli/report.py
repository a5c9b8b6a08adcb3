"""``reasonalloc report``: what ``reasonalloc eval`` found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, console, wrote


def report(
    folder: Annotated[Path, typer.Argument(help="The folder that `reasonalloc eval` filled.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; default: FOLDER/report.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="What is compared: accuracy (all of an answer right) or score (share of it).")
    ] = "accuracy",
    baseline: Annotated[str | None, typer.Option(help="Compare with this method of the study, not its own.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Report on these methods of the study alone, with semicolons between them.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Percentage points that a method may lose and still be called not inferior.")
    ] = 2.0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Some answers are missing: report on the problems that all methods have.")
    ] = False,
) -> None:
    """Grade the answers of `reasonalloc eval` and compare methods.

    Writes report.html, report.md, report.csv, comparisons.csv and pictures. Needs neither model nor hub.
    """
    with clear_errors():
        from reasonalloc.evaluation.findings import ACCURACY, SCORE, collect
        from reasonalloc.evaluation.report import markdown, write_report
        from reasonalloc.evaluation.store import Store

        if metric not in ("accuracy", "score"):
            raise ValueError(f"the metric is accuracy or score, got {metric!r}")
        if not 0 <= margin <= 100:
            raise ValueError(f"the margin is 0 to 100 points, got {margin:g}")
        store, compared = Store(folder), SCORE if metric == "score" else ACCURACY
        whole = study = store.study()
        study = study if methods is None else study.only([name.strip() for name in methods.split(";")])
        study = study if baseline is None else replace(study, baseline=baseline)
        findings = collect(store, study, store.plan(study), compared, margin, partial)
        kept = {variant.name for variant in study.variants}
        passed_over = [variant.name for variant in whole.variants if variant.name not in kept]
        if whole.random_splits and not study.random_splits:
            passed_over.append(f"{whole.random_splits} random splits")
        other = whole.compared_with if study.compared_with != whole.compared_with else None
        findings = replace(findings, passed_over=tuple(passed_over), other_base=other or "")
        if not findings.tasks():
            raise ValueError(f"{folder} has no problem yet that can be judged for all methods")
        paths = write_report(findings, output or folder / "report")
        console.print(markdown(findings), soft_wrap=True)
        wrote(f"wrote {', '.join(map(str, paths))}")
