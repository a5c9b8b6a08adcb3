"""What all commands share: where they print, and how they end on an error that the user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)


def fail(message: object) -> NoReturn:
    """End with one clear sentence and exit status 2."""
    errors.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that a user can cause into one sentence."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(error)
