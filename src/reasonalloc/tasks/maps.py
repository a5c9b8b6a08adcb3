"""Walks through a map that is given once, among roads that nobody needs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from reasonalloc.tasks.task import DIGITS, MODULUS, NAMES, TASKS, Problem, Task

_WALKERS = tuple("abcdefghij")


@TASKS.register("maps")
@dataclass(frozen=True)
class Maps(Task):
    """Follow the roads to the end of the line for each walker: what do the tolls add up to?

    ``x1 x2 5`` is a one-way road from x1 to x2 with a toll of 5; ``x9 end`` says that no road leaves x9. The roads form
    ``lines`` of ``difficulty`` places in all, on which the walkers a, b, c, ... begin anywhere, and one more line of
    distractors that is never entered; all are listed in random order. Tolls add up modulo 11; ``x1 x2 5 a 7`` in the
    thought says that a has paid 7 so far. Memory pattern: every step looks up one entry of the question; those near
    the end of a line again and again, others once, a third of them never.

    Attributes:
        walks: walkers in one question, or as many as there are places; the score is the share of right sums.
        lines: that are walked on.
        distractors: places on the line that is never entered, as a share of the others.
    """

    walks: int = 10
    lines: int = 2
    distractors: float = 0.5

    name = "maps"
    least = 4

    def __post_init__(self) -> None:
        if not 1 <= self.walks <= len(_WALKERS) or not 1 <= self.lines <= self.least // 2 or self.distractors < 0:
            raise ValueError(f"walks must be 1 to {len(_WALKERS)}, lines 1 or 2, distractors not negative, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Places, numbers, and the words between them."""
        return (*NAMES, *DIGITS, *_WALKERS, ";", ":", "end", "->", ".")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A map and its walks."""
        places = self.draw_names(rng, difficulty + round(self.distractors * difficulty))
        walked, aside = places[:difficulty], places[difficulty:]
        lines = [line for line in (*(walked[i :: self.lines] for i in range(self.lines)), aside) if line]
        roads = {a: [b, rng.choice(DIGITS)] for line in lines for a, b in pairwise(line)}
        roads.update({line[-1]: ["end"] for line in lines})
        starts = rng.sample(walked, min(self.walks, difficulty))
        listed = " ; ".join(" ".join([a, *roads[a]]) for a in rng.sample(places, len(places)))
        walkers = dict(zip(_WALKERS, starts, strict=False))
        walks = [_walk(roads, walker, start) for walker, start in walkers.items()]
        thought = " ".join(text for text, _ in walks)
        answer = " ".join(f"{walker} {total}" for walker, (_, total) in zip(walkers, walks, strict=True))
        asked = " ".join(f"{walker} {start}" for walker, start in walkers.items())
        return Problem(self.name, difficulty, f"{listed} . {asked}", thought, answer)

    def score(self, question: str, answer: str) -> float:
        """Share of walks whose sum is right."""
        listed, asked = question.split(" . ")
        roads = {a: way for a, *way in (road.split() for road in listed.split(" ; "))}
        walkers = asked.split()[::2]
        expected = [str(_walk(roads, *walker)[1]) for walker in zip(walkers, asked.split()[1::2], strict=True)]
        words = answer.split()
        if words[::2] != walkers or len(words) % 2:
            return 0.0
        return sum(a == b for a, b in zip(expected, words[1::2], strict=True)) / len(expected)


def _walk(roads: dict[str, list[str]], walker: str, start: str) -> tuple[str, int]:
    """A walk in words, and the sum of its tolls."""
    place, total, words = start, 0, [f"{walker} {start} :"]
    while roads[place] != ["end"]:
        after, toll = roads[place]
        total = (total + int(toll)) % MODULUS
        words.append(f"{place} {after} {toll} {walker} {total} ;")
        place = after
    return f"{' '.join(words)} {place} end -> {walker} {total} .", total
