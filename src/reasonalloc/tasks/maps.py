"""Walks through a map that is given once, among roads that nobody needs."""

from __future__ import annotations

import random
from dataclasses import dataclass

from reasonalloc.tasks.task import TASKS, Problem, Task


@TASKS.register("maps")
@dataclass(frozen=True)
class Maps(Task):
    """Follow the roads: from each start, so many steps; where does the walk end?

    The map is a set of one-way roads ``a > b``, one from each place, in random order. Walks lead around one loop of
    ``difficulty`` places, which they pass several times; the other places, a share ``distractors`` of the loop's, are
    never visited. Memory pattern: every step looks up one entry of the question, most entries again and again, some
    never.

    Attributes:
        walks: starts in one question; the score is the share of ends that are right.
        laps: how often the walks together go around the loop, about.
        distractors: places off the loop, as a share of those on it.
        places: names to choose from; a map takes at most this many.
    """

    walks: int = 4
    laps: float = 4.0
    distractors: float = 0.5
    places: int = 128

    name = "maps"
    least = 2

    def __post_init__(self) -> None:
        if self.walks < 1 or self.laps <= 0 or self.distractors < 0 or self.places < 3:
            raise ValueError(f"walks, laps and places must be positive, distractors not negative, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Places, numbers of steps in digits, and the words between them."""
        return (*(f"p{i}" for i in range(self.places)), *map(str, range(10)), ">", ";", "from", "steps", ".", ":")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A map and its walks."""
        others = round(self.distractors * difficulty)
        if difficulty + others > self.places:
            raise ValueError(f"difficulty {difficulty} needs {difficulty + others} places, there are {self.places}")
        names = [f"p{i}" for i in rng.sample(range(self.places), difficulty + others)]
        loop, aside = names[:difficulty], names[difficulty:]
        roads = dict(zip(loop, [*loop[1:], loop[0]], strict=True))
        roads.update(zip(aside, rng.sample(aside, len(aside)), strict=True))
        order = rng.sample(names, len(names))
        mean = max(1, round(self.laps * difficulty / self.walks))
        starts = [(rng.choice(loop), rng.randint(max(1, mean // 2), mean + mean // 2)) for _ in range(self.walks)]
        edges = " ; ".join(f"{place} > {roads[place]}" for place in order)
        asked = " ; ".join(f"from {start} {_digits(steps)} steps" for start, steps in starts)
        thought, ends = [], []
        for start, steps in starts:
            thought.append(f"from {start} {_digits(steps)} steps :")
            place = start
            for _ in range(steps):
                thought.append(f"{place} > {roads[place]} ;")
                place = roads[place]
            thought.append(".")
            ends.append(place)
        return Problem(self.name, difficulty, f"{edges} . {asked}", " ".join(thought), " ".join(ends))

    def score(self, question: str, answer: str) -> float:
        """Share of walks whose end is right."""
        edges, asked = question.split(" . ")
        roads = dict(edge.split(" > ") for edge in edges.split(" ; "))
        given = answer.split()
        right, walks = 0, asked.split(" ; ")
        for i, walk in enumerate(walks):
            _, place, *digits, _ = walk.split()
            for _ in range(int("".join(digits))):
                place = roads[place]
            right += i < len(given) and given[i] == place
        return right / len(walks) if len(given) == len(walks) else 0.0


def _digits(number: int) -> str:
    """A number as one word for each digit."""
    return " ".join(str(number))
