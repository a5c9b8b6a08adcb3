"""What all commands share: where they print, and how they end on an error that the user can mend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

console = Console()
errors = Console(stderr=True)
EVERY = 60.0  # seconds between two lines of progress, at least


def fail(message: object) -> NoReturn:
    """End with one clear sentence and exit status 2."""
    errors.print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that a user can cause into one sentence."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(error)


class Progress:
    """How far long work has come, on stderr: a bar on a terminal, elsewhere a line now and then.

    Lines come at the start, at the end, and between them at most one in ``EVERY`` seconds.

    Args:
        name: of what is counted, for instance "answers".
        total: how many there are.
        done: how many were there before.
        said: what stands behind the count, asked whenever it is shown.
        hidden: show nothing.
        clock: seconds, from any origin.
        to: where it is shown.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        said: Callable[[], str] = lambda: "",
        hidden: bool = False,
        clock: Callable[[], float] = time.monotonic,
        to: Console = errors,
    ) -> None:
        self.name, self.total, self.before, self.done = name, total, done, done
        self._said, self._clock, self._to = said, clock, to
        self._lines = not (hidden or to.is_terminal)
        rest = TextColumn("{task.fields[said]}", markup=False, table_column=Column(ratio=1))
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), rest)
        self._bar = Bar(*columns, console=to, disable=hidden or self._lines, expand=True)
        self._task = self._bar.add_task(name, total=total, completed=done, said="")
        self._began = self._shown = 0.0
        self._last = ""

    def __enter__(self) -> Progress:
        self._began = self._clock()
        self._bar.start()
        self._show()
        return self

    def __exit__(self, *error: Any) -> None:
        self._show()
        self._bar.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._began

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.tick()

    def tick(self) -> None:
        """Something has happened that ``said`` may tell."""
        if not self._lines or self._clock() - self._shown >= EVERY:
            self._show()

    def _show(self) -> None:
        said = "; ".join(filter(None, (self._left(), self._said())))
        self._bar.update(self._task, completed=self.done, said=said)
        line = f"{self.name}: {self.done} of {self.total} done" + (f"; {said}" if said else "")
        if self._lines and line != self._last:
            self._to.print(line, highlight=False, markup=False, soft_wrap=True)
            self._shown, self._last = self._clock(), line

    def _left(self) -> str:
        """Time left, at the pace since the work began; empty where there is no pace yet, or nothing left."""
        made = self.done - self.before
        if not made or self.done >= self.total:
            return ""
        return f"{duration((self.total - self.done) * self.elapsed / made)} left"


def duration(seconds: float) -> str:
    """In the two largest units that say something: "42 s", "12 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
