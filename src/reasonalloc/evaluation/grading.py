"""Grading raw texts: what the answer is, and how much of it is right. Never part of generation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from reasonalloc.evaluation.questions import MATH, RECALL
from reasonalloc.mathematics.judging import JUDGE, LIMIT
from reasonalloc.reasoner import read
from reasonalloc.tasks import TASKS

_VERSION = 3  # of the graders in this file
THOUGHT_ENDS = ("</think>", "<|end_of_thought|>", "[/THINK]")  # what reasoning models write before the answer


@dataclass(frozen=True)
class Grade:
    """What a text is worth.

    Attributes:
        extracted: the answer found in it; None if there is none that can be read.
        score: share of it that is right, in [0, 1].
        gradable: False where the reference itself cannot be read; such a problem says nothing about any method.
        fault: why a text was not judged; None where it was.
    """

    extracted: str | None
    score: float
    gradable: bool = True
    fault: str | None = None

    @property
    def correct(self) -> bool:
        """Whether all of it is right."""
        return self.score == 1.0


def after_thought(text: str) -> str:
    """What follows the last end of a thought; all of the text where there is none."""
    return min((text.rpartition(mark)[2] for mark in THOUGHT_ENDS), key=len)


def grade_math(reference: str, text: str) -> Grade:
    """By math-verify: the last box, or the final expression where there is none, equal to the reference as mathematics.

    What cannot be judged in ``mathematics.judging.LIMIT`` seconds is not right, and the grade says so.

    Raises:
        ImportError: math-verify is missing.
    """
    _math_verify()
    verdict = JUDGE.ask(reference, after_thought(text))
    if verdict is not None:
        return Grade(**verdict)
    too_long = f"not judged in {LIMIT:g} seconds or the memory there is"
    if JUDGE.ask(reference, r"\boxed{1}") is None:  # nor is the simplest answer
        return Grade(None, 0.0, gradable=False, fault=f"the reference was {too_long}")
    return Grade(None, 0.0, fault=f"the answer was {too_long}")


def _math_verify() -> str:
    """Its version."""
    try:
        return version("math-verify")
    except PackageNotFoundError as error:
        raise ImportError("grading mathematics needs math-verify: pip install 'reasonalloc[eval]'") from error


def grade_recall(reference: str, text: str) -> Grade:
    """Share of the things whose number is the first one said after their name."""
    said = after_thought(text).lower()
    found = {}
    for thing in json.loads(reference):
        number = re.search(re.escape(thing) + r"\D{0,20}(\d+)", said)
        if number:
            found[thing] = number[1]
    right = sum(found.get(thing) == number for thing, number in json.loads(reference).items())
    return Grade(json.dumps(found) if found else None, right / len(json.loads(reference)))


def _grade_task(name: str) -> Callable[[str, str], Grade]:
    task = TASKS.create(name)

    def grade(question: str, text: str) -> Grade:
        answer = read(text).answer
        return Grade(answer, 0.0 if answer is None else task.score(question, answer))

    return grade


_OWN: dict[str, Callable[[str, str], Grade]] = {MATH: grade_math, RECALL: grade_recall}


def grader(name: str) -> Callable[[str, str], Grade]:
    """From reference and text to a grade: "math", "recall", or a task's own checker.

    Raises:
        ValueError: an unknown name.
    """
    return _OWN[name] if name in _OWN else _grade_task(name)


def grader_version(name: str) -> str:
    """What a stored grade was made by; another version grades anew.

    Raises:
        ImportError: what the grader needs is missing.
    """
    if name != MATH:
        return f"reasonalloc {_VERSION}"
    return f"reasonalloc {_VERSION}, math-verify {_math_verify()}"
