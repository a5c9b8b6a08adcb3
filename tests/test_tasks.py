"""Generators and checkers of the tasks, against independent solvers."""

import itertools
from collections import deque

import pytest

from reasonalloc.tasks import TASKS, Maps, Programs, Search, split_of

FAMILIES = {"maps": (4, 16, 48), "programs": (4, 20, 60), "search": (5, 24, 80)}
CASES = [(name, difficulty) for name, sizes in FAMILIES.items() for difficulty in sizes]


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_problems_are_right_seeded_and_split(name, difficulty):
    task = TASKS.create(name)
    questions = {}
    for split in ("train", "test"):
        problems = [task.problem(seed, difficulty, split) for seed in range(25)]
        assert problems == [task.problem(seed, difficulty, split) for seed in range(25)]
        for problem in problems:
            assert task.check(problem.question, problem.answer)
            assert split_of(problem.question) == split
            words = f"{problem.question} {problem.thought} {problem.answer}".split(" ")
            assert set(words) <= set(task.vocabulary)
            assert (problem.task, problem.difficulty) == (name, difficulty)
        questions[split] = {problem.question for problem in problems}
        assert len(questions[split]) > 20
    assert not questions["train"] & questions["test"]


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_answers_are_refused(name):
    task = TASKS.create(name)
    problem = task.problem(0, FAMILIES[name][1])
    words = problem.answer.split()
    for wrong in (
        "",
        "nonsense",
        " ".join(words[:-1]),
        " ".join([*words, words[-1]]),
        " ".join(words[:1] * len(words)),
    ):
        assert not task.check(problem.question, wrong), wrong


def test_maps_by_walking():
    task = Maps()
    for seed in range(20):
        problem = task.problem(seed, 10)
        roads = [edge.split(" > ") for edge in problem.question.split(" . ")[0].split(" ; ")]
        assert len(roads) == 15
        assert len({a for a, _ in roads}) == len({b for _, b in roads}) == 15
        ends = []
        for walk in problem.question.split(" . ")[1].split(" ; "):
            words = walk.split()
            place = words[1]
            for _ in range(int("".join(words[2:-1]))):
                (place,) = [b for a, b in roads if a == place]
            ends.append(place)
        assert problem.answer == " ".join(ends)
        visited = {word for word in problem.thought.split() if word.startswith("p")}
        assert len(visited) <= 10, "a distractor was visited"
    worse = problem.answer.split()
    worse[0] = next(a for a, _ in roads if a != worse[0])
    assert task.score(problem.question, " ".join(worse)) == 0.75


def test_programs_by_python():
    """Python itself runs the program."""
    task = Programs()
    for seed in range(30):
        problem = task.problem(seed, 12)
        lines, asked = problem.question.split(" ? ")
        scope = {}
        for line in lines.split(" ; "):
            exec(line, {}, scope)
        assert problem.answer.split() == [str(scope[name] % 11) for name in asked.split()]
        assert len(problem.thought.split(" . ")) == 12


def test_search_by_breadth_first():
    """A way that the generator did not find itself is accepted, too."""
    task, other = Search(shortcuts=0.5), 0
    for seed in range(30):
        problem = task.problem(seed, 16)
        graph, asked = problem.question.split(" . ")
        neighbours = {line.split(" : ")[0]: line.split(" : ")[1].split() for line in graph.split(" ; ")}
        assert all(a in neighbours[b] for a in neighbours for b in neighbours[a])
        _, start, _, goal = asked.split()
        ways, seen = deque([[start]]), {start}
        while ways[0][-1] != goal:
            way = ways.popleft()
            for node in neighbours[way[-1]]:
                if node not in seen:
                    seen.add(node)
                    ways.append([*way, node])
        shortest = " ".join(ways[0])
        assert task.check(problem.question, shortest)
        other += shortest != problem.answer
        jump = " ".join([start, goal])
        assert task.check(problem.question, jump) == (goal in neighbours[start])
    assert other > 0


def test_search_backtracks():
    problem = Search().problem(0, 60)
    assert problem.thought.split().count("back") >= 5


@pytest.mark.parametrize("name", FAMILIES)
def test_traces_reach_from_hundreds_to_thousands_of_words(name):
    task = TASKS.create(name)
    largest = {"maps": 84, "programs": 256, "search": 256}[name]
    lengths = [max(task.problem(seed, d).trace_length for seed in range(8)) for d in (largest // 4, largest)]
    assert lengths[0] >= 300
    assert lengths[1] >= 1200


def test_misuse():
    with pytest.raises(ValueError, match="maps begins at difficulty 2, got 1"):
        Maps().problem(0, 1)
    with pytest.raises(ValueError, match="split must be"):
        Maps().problem(0, 4, "eval")
    with pytest.raises(ValueError, match="needs 150 places, there are 128"):
        Maps().problem(0, 100)
    with pytest.raises(ValueError, match="needs as many variables"):
        Programs().problem(0, 300)
    with pytest.raises(ValueError, match="needs as many nodes"):
        Search().problem(0, 300)
    with pytest.raises(ValueError, match="Did you mean 'maps'"):
        TASKS.create("map")
    for task, setting in itertools.product((Maps, Programs, Search), ({"nothing": 1},)):
        with pytest.raises(TypeError):
            task(**setting)
