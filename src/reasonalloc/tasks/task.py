"""What a task is: problems by seed, with a worked solution, and a checker that knows the question alone."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from reasonalloc.policies.registry import Registry

Split = Literal["train", "test"]
_TEST_SHARE = 8  # one question in so many belongs to the test split
_ATTEMPTS = 1000

NAMES = tuple(f"x{i}" for i in range(192))  # places, variables, nodes: one stock for all families
MODULUS = 11  # numbers are residues of this prime, so that every number is one word
DIGITS = tuple(map(str, range(MODULUS)))


@dataclass(frozen=True)
class Problem:
    """One problem; all texts are words separated by single blanks.

    Attributes:
        task: name of the family.
        difficulty: the family's own measure of size.
        question: all that a solver is told.
        thought: a worked solution.
        answer: what ``Task.check`` accepts.
    """

    task: str
    difficulty: int
    question: str
    thought: str
    answer: str

    @property
    def trace_length(self) -> int:
        """Words that a solver writes: thought and answer."""
        return len(self.thought.split()) + len(self.answer.split())


class Task(ABC):
    """A family of problems. Implementations are frozen dataclasses of their settings.

    Attributes:
        name: in ``TASKS``.
        least: the smallest difficulty.
    """

    name: str
    least: int = 1

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that a problem of this family may hold."""

    @abstractmethod
    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A problem of either split."""

    @abstractmethod
    def score(self, question: str, answer: str) -> float:
        """Share of the answer's parts that are right, in [0, 1], recomputed from the question alone.

        Whatever a model may have written is an answer; what cannot be read scores 0.
        """

    def check(self, question: str, answer: str) -> bool:
        """Whether all of the answer is right."""
        return self.score(question, answer) == 1.0

    def draw_names(self, rng: random.Random, count: int) -> list[str]:
        """So many different names.

        Raises:
            ValueError: there are not so many.
        """
        if count > len(NAMES):
            raise ValueError(f"{self.name}: {count} names are needed, there are {len(NAMES)}; lower the difficulty")
        return rng.sample(NAMES, count)

    def problem(self, seed: int, difficulty: int, split: Split = "test") -> Problem:
        """The problem of this seed: always the same, and never in the other split.

        Raises:
            ValueError: a difficulty below ``least``, or an unknown split.
        """
        if difficulty < self.least:
            raise ValueError(f"{self.name} begins at difficulty {self.least}, got {difficulty}")
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        rng = random.Random(f"{self.name} {difficulty} {split} {seed}")
        for _ in range(_ATTEMPTS):
            problem = self.draw(rng, difficulty)
            if split_of(problem.question) == split:
                return problem
        raise ValueError(f"{self.name} has too few different problems of difficulty {difficulty} for two splits")


def split_of(question: str) -> Split:
    """The split a question belongs to, by a hash of its text: training can never see a test question."""
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


TASKS: Registry[Task] = Registry("task", "reasonalloc.tasks", Task)
