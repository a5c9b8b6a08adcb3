"""``reasonalloc report``: what ``reasonalloc eval`` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, console


def report(
    folder: Annotated[Path, typer.Argument(help="Of `reasonalloc eval`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Its folder; FOLDER/report otherwise.")] = None,
    metric: Annotated[
        str, typer.Option(help="What is compared: accuracy (all of an answer right) or score (share of it).")
    ] = "accuracy",
) -> None:
    """Grade the answers; write report.html, report.md, report.csv and pictures. Needs neither model nor hub."""
    with clear_errors():
        from reasonalloc.evaluation.findings import ACCURACY, SCORE, collect
        from reasonalloc.evaluation.report import markdown, write_report
        from reasonalloc.evaluation.store import Store

        if metric not in ("accuracy", "score"):
            raise ValueError(f"the metric is accuracy or score, got {metric!r}")
        store = Store(folder)
        findings = collect(store, store.study(), store.plan(), SCORE if metric == "score" else ACCURACY)
        if not findings.tasks():
            raise ValueError(f"{folder} has no finished problem yet")
        paths = write_report(findings, output or folder / "report")
        console.print(markdown(findings), highlight=False, markup=False, soft_wrap=True)
        console.print(f"wrote {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
