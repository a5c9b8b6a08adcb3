"""What all commands share: where they print, how they show progress, and how they end on an error.

Nothing that is printed is markup: both consoles print square brackets as they are.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
EVERY = 60.0  # seconds between two lines of progress, at least
_ENOUGH = 100  # a phase's pace is known when one part of so many is done: the first step takes longer
USERS = (ValueError, OSError, ImportError)  # what this package raises for what its users can mend


@dataclass
class Manner:
    """How this run speaks: the options before the command.

    Attributes:
        debug: show tracebacks.
        quiet: show results and errors alone.
    """

    debug: bool = False
    quiet: bool = False


manner = Manner()


def say(text: str) -> None:
    """A line on stderr about what is going on; nothing if quiet."""
    if not manner.quiet:
        errors.print(text, soft_wrap=True)


def wrote(text: str) -> None:
    """A line on stdout about what was written; nothing if quiet."""
    if not manner.quiet:
        console.print(text, soft_wrap=True)


def fail(message: object, status: int = 2) -> NoReturn:
    """End with one clear sentence."""
    if manner.debug:
        errors.print(traceback.format_exc().rstrip(), soft_wrap=True)
    errors.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def clear_errors() -> Iterator[None]:
    """End in one sentence: with status 2 on what a user can mend, with status 1 on what is a bug."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if _out_of_memory(error):
            fail(
                f"out of memory: {_first_line(error)}. Ask for less (a smaller model, budget, batch or answer), or for "
                "another --device"
            )
        if isinstance(error, USERS):
            fail(error if str(error) else type(error).__name__)
        remedy = "what is above" if manner.debug else "what `reasonalloc --debug ...` prints"
        fail(
            f"{type(error).__name__}: {_first_line(error)}. This is a bug of reasonalloc: please report it, with this "
            f"command and {remedy}",
            status=1,
        )


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from reasonalloc.engines.transformers.loading import out_of_memory

    return out_of_memory(error)


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no more is known")


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
        left: the time left, in words, where the pace since the work began does not tell it.
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
        left: Callable[[], str] = lambda: "",
    ) -> None:
        self.name, self.total, self.before, self.done = name, total, done, done
        self._said, self._clock, self._to, self._other_left = said, clock, to, left
        hidden = hidden or manner.quiet
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
            self._to.print(Text(line), soft_wrap=True)
            self._shown, self._last = self._clock(), line

    def _left(self) -> str:
        """Time left, as it was said or at the pace since the work began; empty where there is no pace yet."""
        if self.done >= self.total:
            return ""
        other, made = self._other_left(), self.done - self.before
        if other or not made:
            return other
        return f"{duration((self.total - self.done) * self.elapsed / made)} left"


class Loading:
    """Signs of life while a model is loaded, on stderr: a spinner, and progress while a GGUF file is converted."""

    def __init__(self, model: str, hidden: bool = False) -> None:
        self._hidden = hidden or manner.quiet
        self._status = errors.status(Text(f"loading {model}"))
        self._converting: Progress | None = None

    def __enter__(self) -> Loading:
        if not self._hidden:
            self._status.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._status.stop()
        if self._converting is not None:
            self._converting.__exit__(*error)

    def progress(self, done: int, total: int) -> None:
        """So many tensors of a GGUF file are converted."""
        if self._converting is None:
            self._status.stop()  # two things that move cannot share a terminal
            self._converting = Progress("converted tensors", total, hidden=self._hidden).__enter__()
        self._converting.advance(done - self._converting.done)


class Calibrating:
    """How far a calibration has come, on stderr, from its first report on."""

    def __init__(self) -> None:
        self._phases = Phases()
        self._prompts: Progress | None = None

    def __enter__(self) -> Calibrating:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._prompts is not None:
            self._prompts.__exit__(*error)

    def report(self, what: str, done: int, total: int) -> None:
        """What ``calibrate`` reports: prompts that are done, and phases."""
        if what != "prompts":
            self._phases.report(what, done, total)
            if self._prompts is not None:
                self._prompts.tick()
        elif self._prompts is None:
            self._prompts = Progress(what, total, done, self._phases.said, left=self._phases.left).__enter__()
        else:
            self._prompts.advance(done - self._prompts.done)


class Phases:
    """Time left of work in several phases that take turns, each at a pace of its own.

    Args:
        clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self.now = clock, clock(), ""
        self._there: dict[str, tuple[int, int]] = {}  # of each phase: how much is done, of how much
        self._pace: dict[str, tuple[int, float]] = {}  # how much was done here, in how many seconds

    def report(self, phase: str, done: int, total: int) -> None:
        """So much of a phase is done; what was done before its first report does not count for its pace."""
        now = self._clock()
        made, seconds = self._pace.get(phase, (0, 0.0))
        if phase in self._there:
            made, seconds, self.now = made + done - self._there[phase][0], seconds + now - self._last, phase
        self._there[phase], self._pace[phase] = (done, total), (made, seconds)
        self._last = now

    def said(self) -> str:
        """The phase at work, and how much of it is done; empty before the work, and after it."""
        done, total = self._there.get(self.now, (0, 0))
        return f"{self.now} {done / total:.0%} done" if done < total else ""

    def left(self) -> str:
        """Time left; which phases that leaves out, as long as their pace is not known."""
        unfinished = [phase for phase, (done, total) in self._there.items() if done < total]
        timed = [phase for phase in unfinished if self._pace[phase][0] >= self._there[phase][1] / _ENOUGH]
        if not timed:
            return ""
        seconds = sum(
            (self._there[phase][1] - self._there[phase][0]) * self._pace[phase][1] / self._pace[phase][0]
            for phase in timed
        )
        unknown = [phase for phase in unfinished if phase not in timed]
        beyond = f" for {' and '.join(timed)}, and {' and '.join(unknown)} beyond that" if unknown else ""
        return f"{duration(seconds)} left{beyond}"


def duration(seconds: float) -> str:
    """In the two largest units that say something: "42 s", "12 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
