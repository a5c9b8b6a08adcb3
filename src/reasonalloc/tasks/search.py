"""Search with backtracking: dead ends fill the thought, and only the open ways matter."""

from __future__ import annotations

import random
from dataclasses import dataclass

from reasonalloc.tasks.task import NAMES, TASKS, Problem, Task


@TASKS.register("search")
@dataclass(frozen=True)
class Search(Task):
    """Find the way to the goal in a cave of ``difficulty`` rooms, first branch first, going back at dead ends.

    The cave is a random tree; each room's onward rooms are listed, the rooms in random order, "goal" in the one that
    is looked for. The thought says on entering a room where one can go, and on coming back the list from the room one
    comes from: ``back x3 from x1 : x3 x8 ; go x8 from x1 .``; the answer is the way home, ``x8 from x1 from x2``.
    Memory pattern: what was found in a dead end is never needed again, the open branches are, much later.

    Attributes:
        branches: rooms that one room leads to, at most.
        deep: a new room hangs at one of so many last ones, so that small numbers make deep caves.
        far: the goal is entered after this share of the rooms, at the earliest.
    """

    branches: int = 3
    deep: int = 6
    far: float = 0.5

    name = "search"
    least = 4

    def __post_init__(self) -> None:
        if self.branches < 2 or self.deep < 1 or not 0 <= self.far < 1:
            raise ValueError(f"branches must be at least 2, deep at least 1, far in [0, 1), got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Rooms, and the words between them."""
        return (*NAMES, ":", ";", ".", "start", "goal", "at", "go", "from", "back", "end", "found")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A cave, searched in the order in which it lists the ways."""
        rooms = self.draw_names(rng, difficulty)
        ways: dict[str, list[str]] = {room: [] for room in rooms}
        for i in range(1, difficulty):
            open_rooms = [room for room in rooms[max(0, i - self.deep) : i] if len(ways[room]) < self.branches]
            ways[rng.choice(open_rooms)].append(rooms[i])
        start = rooms[0]
        entered = _entered(ways, start)
        goal = rng.choice(entered[max(1, int(self.far * difficulty)) :])
        ways[goal] = ["goal"]  # rooms behind it are in the question, but nobody gets there
        lines = " ; ".join(_onward(ways, room) for room in rng.sample(rooms, difficulty))
        thought, path = _explore(ways, start, goal)
        home = " from ".join(reversed(path))
        return Problem(self.name, difficulty, f"{lines} . start {start}", thought, home)

    def score(self, question: str, answer: str) -> float:
        """1 for the way home from the goal to the start, else 0. In a tree there is one."""
        cave, asked = question.split(" . ")
        came_from = {}
        for line in cave.split(" ; "):
            room, ways = line.split(" : ")
            came_from.update(dict.fromkeys(ways.split(), room))
        _, start = asked.split()
        way = [came_from.pop("goal")]
        while way[-1] != start:
            way.append(came_from[way[-1]])
        return float(answer.split(" from ") == way)


def _entered(ways: dict[str, list[str]], start: str) -> list[str]:
    """All rooms in the order in which the search enters them."""
    entered, waiting = [], [start]
    while waiting:
        entered.append(waiting.pop())
        waiting += reversed(ways[entered[-1]])
    return entered


def _onward(ways: dict[str, list[str]], room: str) -> str:
    """A room and where one can go from it."""
    return f"{room} : {' '.join(ways[room] or ['end'])}"


def _explore(ways: dict[str, list[str]], start: str, goal: str) -> tuple[str, list[str]]:
    """Depth first, in words: where one is, where one can go from there, which way is taken; and the way to the goal."""
    path, words = [start], [f"at {_onward(ways, start)} ;"]
    left = {room: list(onward) for room, onward in ways.items()}
    while path[-1] != goal:
        here = path[-1]
        if left[here]:
            path.append(left[here].pop(0))
            words.append(f"go {path[-1]} from {here} . at {_onward(ways, path[-1])} ;")
        else:
            path.pop()
            words.append(f"back {here} from {path[-1]} : {' '.join([here, *left[path[-1]]])} ;")
    return f"{' '.join(words)} found {goal}", path
