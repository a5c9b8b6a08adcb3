"""``reasonalloc compare``: where two methods' texts part, and what each had forgotten there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, wrote


def compare(
    first: Annotated[Path, typer.Argument(help="A record of `generate --record`.")],
    second: Annotated[Path, typer.Argument(help="A record of the same prompt, with another method.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("compare.html"),
) -> None:
    """Compare two records of one prompt: where their texts part.

    The page also shows what each had forgotten there.
    """
    with clear_errors():
        from reasonalloc.pages.compare import compare as compare_records

        print(compare_records(first, second, output))
        wrote(f"wrote {output}: open it in a browser")
