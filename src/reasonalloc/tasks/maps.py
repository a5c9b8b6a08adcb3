"""Walks through a map that is given once, among roads that nobody needs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from reasonalloc.tasks.task import DIGITS, MODULUS, NAMES, TASKS, Problem, Task


@TASKS.register("maps")
@dataclass(frozen=True)
class Maps(Task):
    """Follow the roads from each start to the end of the line: what do the tolls add up to?

    ``a b 5`` is a one-way road from a to b with a toll of 5; ``z end`` says that no road leaves z. The roads form
    ``lines`` of ``difficulty`` places in all, on which the walks begin anywhere, and one more line of distractors that
    is never entered; all are listed in random order. Tolls add up modulo 11, and the thought writes the sum after
    every road. Memory pattern: every step looks up one entry of the question; those near the end of a line again and
    again, others once, a third of them never.

    Attributes:
        walks: starts in one question, or as many as there are places; the score is the share of sums that are right.
        lines: that are walked on.
        distractors: places on the line that is never entered, as a share of the others.
    """

    walks: int = 10
    lines: int = 2
    distractors: float = 0.5

    name = "maps"
    least = 4

    def __post_init__(self) -> None:
        if self.walks < 1 or not 1 <= self.lines <= self.least // 2 or self.distractors < 0:
            raise ValueError(f"walks must be positive, lines 1 or 2, distractors not negative, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Places, numbers, and the words between them."""
        return (*NAMES, *DIGITS, ";", "start", "from", ":", "=", "end", "->", ".")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A map and its walks."""
        places = self.draw_names(rng, difficulty + round(self.distractors * difficulty))
        walked, aside = places[:difficulty], places[difficulty:]
        lines = [line for line in (*(walked[i :: self.lines] for i in range(self.lines)), aside) if line]
        roads = {a: [b, rng.choice(DIGITS)] for line in lines for a, b in pairwise(line)}
        roads.update({line[-1]: ["end"] for line in lines})
        starts = rng.sample(walked, min(self.walks, difficulty))
        listed = " ; ".join(" ".join([a, *roads[a]]) for a in rng.sample(places, len(places)))
        walks = [_walk(roads, start) for start in starts]
        thought = " ".join(text for text, _ in walks)
        answer = " ".join(f"{start} {total}" for start, (_, total) in zip(starts, walks, strict=True))
        return Problem(self.name, difficulty, f"{listed} . start {' '.join(starts)}", thought, answer)

    def score(self, question: str, answer: str) -> float:
        """Share of walks whose sum is right."""
        listed, asked = question.split(" . start ")
        roads = {a: way for a, *way in (road.split() for road in listed.split(" ; "))}
        expected = [(start, _walk(roads, start)[1]) for start in asked.split()]
        words = answer.split()
        given = list(zip(words[::2], words[1::2], strict=False))
        if len(words) != 2 * len(expected):
            return 0.0
        return sum((a, str(b)) == pair for (a, b), pair in zip(expected, given, strict=True)) / len(expected)


def _walk(roads: dict[str, list[str]], start: str) -> tuple[str, int]:
    """A walk in words, and the sum of its tolls."""
    place, total, words = start, 0, [f"from {start} :"]
    while roads[place] != ["end"]:
        after, toll = roads[place]
        total = (total + int(toll)) % MODULUS
        words.append(f"{place} {after} {toll} = {total} ;")
        place = after
    return f"{' '.join(words)} {place} end -> {start} {total} .", total
