"""Search with backtracking: dead ends fill the thought, and only the open ways matter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from reasonalloc.tasks.task import TASKS, Problem, Task


@TASKS.register("search")
@dataclass(frozen=True)
class Search(Task):
    """Find a way through a graph of ``difficulty`` nodes, first branch first, going back at dead ends.

    The graph is a random tree with some more edges, listed by node. The thought says at every node where one can still
    go; a node that leads nowhere is left for good. Memory pattern: what was found in a dead end is never needed again,
    the branches still open are, much later.

    Attributes:
        nodes: names to choose from; a graph takes at most this many.
        shortcuts: edges beside the tree's, as a share of the nodes.
    """

    nodes: int = 256
    shortcuts: float = 0.1

    name = "search"
    least = 4

    def __post_init__(self) -> None:
        if self.nodes < 4 or self.shortcuts < 0:
            raise ValueError(f"nodes must be at least 4 and shortcuts not negative, got {self}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Nodes, and the words between them."""
        return (*(f"n{i}" for i in range(self.nodes)), ":", ";", ".", "from", "to", "at", "go", "back", "end", "found")

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A graph, searched in the order in which it lists neighbours."""
        if difficulty > self.nodes:
            raise ValueError(f"difficulty {difficulty} needs as many nodes, there are {self.nodes}")
        names = [f"n{i}" for i in rng.sample(range(self.nodes), difficulty)]
        edges = {(names[rng.randrange(max(0, i - 6), i)], names[i]) for i in range(1, difficulty)}
        for _ in range(round(self.shortcuts * difficulty)):
            one, other = rng.sample(names, 2)
            if (other, one) not in edges:
                edges.add((one, other))
        ordered = sorted(edges)
        neighbours: dict[str, list[str]] = {name: [] for name in names}
        for one, other in rng.sample(ordered, len(ordered)):
            neighbours[one].append(other)
            neighbours[other].append(one)
        start, goal = names[0], rng.choice(names[difficulty // 2 :])
        lines = " ; ".join(f"{name} : {' '.join(neighbours[name])}" for name in rng.sample(names, difficulty))
        thought, path = _explore(neighbours, start, goal)
        return Problem(self.name, difficulty, f"{lines} . from {start} to {goal}", thought, " ".join(path))

    def score(self, question: str, answer: str) -> float:
        """1 for any way from start to goal along edges that visits no node twice, else 0."""
        graph, asked = question.split(" . ")
        neighbours = {}
        for line in graph.split(" ; "):
            node, others = line.split(" : ")
            neighbours[node] = set(others.split())
        _, start, _, goal = asked.split()
        way = answer.split()
        right = (
            len(way) > 1
            and (way[0], way[-1]) == (start, goal)
            and len(set(way)) == len(way)
            and all(other in neighbours.get(one, ()) for one, other in pairwise(way))
        )
        return float(right)


def _explore(neighbours: dict[str, list[str]], start: str, goal: str) -> tuple[str, list[str]]:
    """Depth first, in words: where one is, where one can still go from there, and which way is taken."""
    path, seen, words = [start], {start}, []
    while path[-1] != goal:
        here = path[-1]
        open_ways = [node for node in neighbours[here] if node not in seen]
        words += ["at", here, ":", *(open_ways or ["end"]), ";"]
        if open_ways:
            path.append(open_ways[0])
            seen.add(open_ways[0])
            words += ["go", open_ways[0], "."]
        else:
            path.pop()
            words += ["back", path[-1], "."]
    return " ".join([*words, "found", goal]), path
