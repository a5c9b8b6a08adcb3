"""``reasonalloc plot``: pictures of what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, wrote

plot_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Draw what was recorded.")


@plot_app.command("budgets")
def plot_budgets_command(
    record: Annotated[Path, typer.Argument(help="A record of `generate --record` (.json or .npz).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture.")] = Path("budgets.png"),
    sequence: Annotated[int, typer.Option(min=0, help="Which sequence of the batch.")] = 0,
) -> None:
    """Draw the tokens that heads hold, over time and over layers."""
    with clear_errors():
        from reasonalloc.cache.recorder import Recorder
        from reasonalloc.evaluation.plots import plot_budgets

        plot_budgets(Recorder.load(record), output, sequence)
        wrote(f"wrote {output}")
