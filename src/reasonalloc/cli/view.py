"""``reasonalloc view``: a page of what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, wrote


def view(
    record: Annotated[Path, typer.Argument(help="A record of `generate --record` (.json or .npz).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default: beside the record, as .html.")
    ] = None,
    sequence: Annotated[int, typer.Option(min=0, help="Which sequence of the batch.")] = 0,
) -> None:
    """Make a page of a record: what was kept and what was forgotten."""
    with clear_errors():
        from reasonalloc.pages.view import view as write_view

        path = record.with_suffix(".html") if output is None else output
        write_view(record, path, sequence=sequence)
        wrote(f"wrote {path}: open it in a browser")
