"""Generators and checkers of the tasks, against independent solvers."""

import itertools
import json
from collections import deque

import pytest
from typer.testing import CliRunner

from reasonalloc.cli.app import app
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
        problem = task.problem(seed, 12)
        listed, walkers = problem.question.split(" . ")
        roads = [road.split() for road in listed.split(" ; ")]
        assert len(roads) == 18
        assert len({a for a, *_ in roads}) == 18
        assert sum(road[1] == "end" for road in roads) == 3
        expected = []
        for walker, start in zip(walkers.split()[::2], walkers.split()[1::2], strict=True):
            place, tolls = start, []
            while True:
                ((_, after, *toll),) = [road for road in roads if road[0] == place]
                if after == "end":
                    break
                tolls.append(int(toll[0]))
                place = after
            expected += [walker, str(sum(tolls) % 11)]
        assert problem.answer.split() == expected
        used = {word for word in problem.thought.split() if word.startswith("x")}
        assert len(used) <= 12, "a distractor was visited"
    worse = problem.answer.split()
    worse[1] = str((int(worse[1]) + 1) % 11)
    assert task.score(problem.question, " ".join(worse)) == 0.9


def test_programs_by_python():
    """Python itself runs the program."""
    task = Programs()
    for seed in range(30):
        problem = task.problem(seed, 12)
        lines, asked = problem.question.split(" ? ")
        scope = {}
        for line in lines.split(" ; "):
            exec(line, {}, scope)
        assert problem.answer.split() == [w for name in asked.split() for w in (name, str(scope[name] % 11))]
        assert len(problem.thought.split(" . ")) == 12


def test_search_by_breadth_first():
    task = Search()
    for seed in range(30):
        problem = task.problem(seed, 16)
        cave, asked = problem.question.split(" . ")
        ways = {line.split(" : ")[0]: line.split(" : ")[1].split() for line in cave.split(" ; ")}
        assert len(ways) == 16
        _, start = asked.split()
        [goal] = [room for room, onward in ways.items() if onward == ["goal"]]
        paths = deque([[start]])
        while paths[0][-1] != goal:
            path = paths.popleft()
            paths += [[*path, room] for room in ways[path[-1]] if room != "end"]
        assert task.check(problem.question, " from ".join(reversed(paths[0])))
        assert problem.answer.split(" from ") == paths[0][::-1]
        if len(paths[0]) > 2:
            assert not task.check(problem.question, f"{goal} from {start}")


def test_search_backtracks():
    problem = Search().problem(0, 60)
    assert problem.thought.split().count("back") >= 5


@pytest.mark.parametrize(("name", "reference", "far"), [("maps", 48, 100), ("programs", 56, 140), ("search", 56, 130)])
def test_traces_reach_from_hundreds_to_thousands_of_words(name, reference, far):
    task = TASKS.create(name)
    for difficulty, least in ((reference, 600), (far, 1500)):
        lengths = [task.problem(seed, difficulty).trace_length for seed in range(32)]
        assert sum(lengths) / len(lengths) >= least


def test_misuse():
    with pytest.raises(ValueError, match="maps begins at difficulty 4, got 1"):
        Maps().problem(0, 1)
    with pytest.raises(ValueError, match="split must be"):
        Maps().problem(0, 4, "eval")
    with pytest.raises(ValueError, match="225 names are needed, there are 192; lower the difficulty"):
        Maps().problem(0, 150)
    for task in (Programs(), Search()):
        with pytest.raises(ValueError, match="300 names are needed"):
            task.problem(0, 300)
    with pytest.raises(ValueError, match="lines 1 or 2"):
        Maps(lines=3)
    with pytest.raises(ValueError, match="Did you mean 'maps'"):
        TASKS.create("map")
    for task, setting in itertools.product((Maps, Programs, Search), ({"nothing": 1},)):
        with pytest.raises(TypeError):
            task(**setting)


def test_problems_as_json_lines(tmp_path):
    """`reasonalloc problems` writes what the generators make, and names what is wrong."""
    path = tmp_path / "problems.jsonl"
    result = CliRunner().invoke(app, ["problems", "maps:6", "search:8", "--count", "2", "-o", str(path)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["maps:6", "maps:6", "search:8", "search:8"]
    made = TASKS.create("search").problem(1, 8, "train")
    assert [lines[3][key] for key in ("id", "prompt", "answer")] == ["train 1", made.question, made.answer]
    for wrong in ("maps", "mazes:6"):
        refused = CliRunner().invoke(app, ["problems", wrong, "-o", str(path)])
        assert refused.exit_code == 2
        assert wrong.partition(":")[0] in refused.output
