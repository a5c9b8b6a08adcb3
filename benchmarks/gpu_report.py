"""What a part of ``make gpu`` tells the conductor: a JSON object a line. Needs nothing but Python."""

import json
import time
from typing import Any

FIGURE, NOTE, FAILURE = "figure", "note", "failure"


def figure(
    name: str, value: float, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
) -> None:
    """A number, and the bar that it is held to, if there is one."""
    bar, met = "", None
    if at_most is not None:
        bar, met = f"<= {at_most:g}", value <= at_most
    elif at_least is not None:
        bar, met = f">= {at_least:g}", value >= at_least
    _tell({FIGURE: name, "value": float(f"{value:.5g}"), "unit": unit, "bar": bar, "met": met})


def note(text: str) -> None:
    """A sentence: what was left out, and why."""
    _tell({NOTE: text})


def failure(text: str) -> None:
    """A sentence: what has failed."""
    _tell({FAILURE: text})


def one_line(error: BaseException) -> str:
    """An error's kind and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Clock:
    """How much of a part's time is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
