"""Straight-line programs: results that are written down once and used again, near and far."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from reasonalloc.tasks.task import DIGITS, MODULUS, NAMES, TASKS, Problem, Task

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@TASKS.register("programs")
@dataclass(frozen=True)
class Programs(Task):
    """Run a program of ``difficulty`` assignments ``v = x op y`` in whole numbers modulo 11.

    The thought restates each operand's value, so that every step looks up two earlier results: one in four is a number,
    of the others half are among the last ``near`` results and half anywhere before. Memory pattern: a working set
    that grows, with look-ups at all distances.

    Attributes:
        asked: how many values are asked for, the last one among them; the score is the share that is right.
        numbers: share of operands that are numbers.
        near: of the variables, half come from so many last results.
    """

    asked: int = 3
    numbers: float = 0.25
    near: int = 5

    name = "programs"
    least = 3

    def __post_init__(self) -> None:
        if self.asked < 1 or self.near < 1 or not 0 <= self.numbers <= 1:
            raise ValueError(f"asked and near must be positive, numbers a share, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Variables, residues, operations, and the words between them."""
        return (*NAMES, *DIGITS, *_OPERATIONS, "=", ";", ".", "->", "?")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A program, run."""
        names = self.draw_names(rng, difficulty)
        values: dict[str, int] = {}
        lines, thought = [], []
        for i, name in enumerate(names):
            sign = rng.choice(list(_OPERATIONS))
            left, right = (self._operand(rng, names[:i]) for _ in range(2))
            values[name] = _run(sign, left, right, values)
            lines.append(f"{name} = {left} {sign} {right}")
            shown = [f"{word} {word if word.isdigit() else values[word]}" for word in (left, right)]
            thought.append(f"{name} = {shown[0]} {sign} {shown[1]} -> {name} {values[name]} .")
        asked = [names[-1], *rng.sample(names[:-1], min(self.asked, difficulty) - 1)]
        question = f"{' ; '.join(lines)} ? {' '.join(asked)}"
        answer = " ".join(f"{name} {values[name]}" for name in asked)
        return Problem(self.name, difficulty, question, " ".join(thought), answer)

    def _operand(self, rng: random.Random, before: list[str]) -> str:
        if len(before) < 2 or rng.random() < self.numbers:
            return rng.choice(DIGITS)
        return rng.choice(before[-self.near :] if rng.random() < 0.5 else before)

    def score(self, question: str, answer: str) -> float:
        """Share of the asked values that are right."""
        program, asked = question.split(" ? ")
        values: dict[str, int] = {}
        for line in program.split(" ; "):
            name, _, left, sign, right = line.split()
            values[name] = _run(sign, left, right, values)
        expected = [(name, str(values[name])) for name in asked.split()]
        words = answer.split()
        if len(words) != 2 * len(expected):
            return 0.0
        given = zip(words[::2], words[1::2], strict=True)
        return sum(a == b for a, b in zip(expected, given, strict=True)) / len(expected)


def _run(sign: str, left: str, right: str, values: dict[str, int]) -> int:
    numbers = [int(word) if word.isdigit() else values[word] for word in (left, right)]
    return _OPERATIONS[sign](*numbers) % MODULUS
