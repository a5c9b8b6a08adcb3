"""Straight-line programs: results that are written down once and used again, near and far."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from reasonalloc.tasks.task import TASKS, Problem, Task

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@TASKS.register("programs")
@dataclass(frozen=True)
class Programs(Task):
    """Run a program of ``difficulty`` assignments ``v = x op y`` in whole numbers modulo ``modulus``.

    The thought restates each operand's value, so that every step looks up two earlier results: one in four is a number,
    of the others half are among the last ``near`` results and half anywhere before. Memory pattern: a working set
    that grows, with look-ups at all distances.

    Attributes:
        modulus: a prime.
        variables: names to choose from; a program takes at most this many.
        asked: how many values are asked for, the last one among them; the score is the share that is right.
        numbers: share of operands that are numbers.
        near: of the variables, half come from so many last results.
    """

    modulus: int = 11
    variables: int = 256
    asked: int = 3
    numbers: float = 0.25
    near: int = 5

    name = "programs"
    least = 3

    def __post_init__(self) -> None:
        if self.modulus < 2 or self.variables < 3 or self.asked < 1 or self.near < 1 or not 0 <= self.numbers <= 1:
            raise ValueError(f"modulus, variables, asked, near must be positive, numbers a share, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Variables, residues, operations, and the words between them."""
        variables = (f"v{i}" for i in range(self.variables))
        return (*variables, *map(str, range(self.modulus)), *_OPERATIONS, "=", ";", ".", "->", "?")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A program, run."""
        if difficulty > self.variables:
            raise ValueError(f"difficulty {difficulty} needs as many variables, there are {self.variables}")
        names = [f"v{i}" for i in rng.sample(range(self.variables), difficulty)]
        values: dict[str, int] = {}
        lines, thought = [], []
        for i, name in enumerate(names):
            sign = rng.choice(list(_OPERATIONS))
            left, right = (self._operand(rng, names[:i]) for _ in range(2))
            values[name] = self._run(sign, left, right, values)
            lines.append(f"{name} = {left} {sign} {right}")
            shown = [word if word.isdigit() else f"{word} {values[word]}" for word in (left, right)]
            thought.append(f"{name} = {shown[0]} {sign} {shown[1]} -> {values[name]} .")
        asked = [names[-1], *rng.sample(names[:-1], min(self.asked, difficulty) - 1)]
        question = f"{' ; '.join(lines)} ? {' '.join(asked)}"
        answer = " ".join(str(values[name]) for name in asked)
        return Problem(self.name, difficulty, question, " ".join(thought), answer)

    def _operand(self, rng: random.Random, before: list[str]) -> str:
        if len(before) < 2 or rng.random() < self.numbers:
            return str(rng.randrange(self.modulus))
        return rng.choice(before[-self.near :] if rng.random() < 0.5 else before)

    def _run(self, sign: str, left: str, right: str, values: dict[str, int]) -> int:
        numbers = [int(word) if word.isdigit() else values[word] for word in (left, right)]
        return _OPERATIONS[sign](*numbers) % self.modulus

    def score(self, question: str, answer: str) -> float:
        """Share of the asked values that are right."""
        program, asked = question.split(" ? ")
        values: dict[str, int] = {}
        for line in program.split(" ; "):
            name, _, left, sign, right = line.split()
            values[name] = self._run(sign, left, right, values)
        expected, given = [str(values[name]) for name in asked.split()], answer.split()
        if len(given) != len(expected):
            return 0.0
        return sum(a == b for a, b in zip(expected, given, strict=True)) / len(expected)
