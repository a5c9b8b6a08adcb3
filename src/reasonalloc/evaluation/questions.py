"""Questions with known answers: from the Hugging Face hub, from a file, or made here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.recall import recall_question, recall_text
from reasonalloc.files import read_json_lines
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.values import shown
from reasonalloc.reasoner.text import ANSWER
from reasonalloc.tasks import TASKS, Problem, Split

MATH_PROMPT = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique within its set.
        prompt: the user's turn, without chat template.
        reference: what grading compares with; for built-in tasks the question itself, from which it is recomputed.
    """

    id: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are graded alike.

    Attributes:
        name: in tables.
        grader: as ``grading.grader`` takes it.
        questions: in their order.
    """

    name: str
    grader: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError(f"{self.name} has no questions")
        ids = [question.id for question in self.questions]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"{self.name}: the id {twice!r} appears more than once")

    def first(self, count: int | None) -> QuestionSet:
        """At most so many of them."""
        return self if count is None else QuestionSet(self.name, self.grader, self.questions[:count])

    def shuffled(self, seed: int) -> QuestionSet:
        """The same, in an order that follows from the seed and their ids alone, whatever order they had."""

        def place(question: Question) -> bytes:
            return hashlib.sha256(f"{seed} {question.id}".encode()).digest()

        return QuestionSet(self.name, self.grader, tuple(sorted(self.questions, key=place)))


@dataclass(frozen=True)
class HubSet:
    """Where a set lies on the Hugging Face hub."""

    path: str
    question: str
    answer: str
    solution: str
    split: str = "test"
    config: str | None = None


HUB_SETS = {
    "math500": HubSet("HuggingFaceH4/MATH-500", "problem", "answer", "solution"),
    "aime24": HubSet("HuggingFaceH4/aime_2024", "problem", "answer", "solution", "train"),
    "aime25": HubSet("math-ai/aime25", "problem", "answer", "answer"),
    "gsm8k": HubSet("openai/gsm8k", "question", "answer", "answer", "test", "main"),
}
_MADE = 100  # questions of a set that is made here, unless told
MATH, RECALL, FIDELITY = "math", "recall", "fidelity"


def load_questions(
    name: str,
    data: Path | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    count: int | None = None,
    split: Split = "test",
) -> QuestionSet:
    """A set by its name.

    Args:
        name: "math500", "aime24", "aime25" or "gsm8k" (from the hub, or from ``data``); any other name together with
            ``data``; a built-in task and its difficulty, "maps:48"; or "recall:N", with N facts.
        data: a JSON-lines file with the questions, instead of the hub.
        question_field, answer_field: its fields; None takes the known set's own, or "question" and "answer". A question
            is a text, or a chat of one turn; an answer a text, a number, or a list of several right ones, which must
            all be given, in any order.
        count: only so many, the first ones. Built-in tasks have as many as one likes: 100 by default.
        split: of a built-in task's problems; the set is called "maps:48 train" where it is not "test".

    Raises:
        ValueError: an unknown name, a difficulty that is none, data without the named fields or with others
            than texts and numbers in them, a split of other data.
        OSError: the hub or the file cannot be read.
        ImportError: ``datasets`` is missing.
    """
    if is_built_in(name):
        if data is not None:
            raise ValueError(f"{name} makes its own questions and takes no data file: choose another name for {data}")
        family, size = sized(name)
        if family == RECALL:
            _only_test(name, split)
            return _recall(name, size, _MADE if count is None else count)
        problems = _problems(family, size, count, split)
        questions = tuple(Question(id, p.question, p.question) for id, p in problems.items())
        return QuestionSet(_with_split(name, split), family, questions)
    _only_test(name, split)
    questions = tuple(
        # gsm8k: the number behind its explanation
        Question(id, MATH_PROMPT.format(question=question.strip()), answer.rpartition("####")[2].strip())
        for id, question, answer in _rows(name, data, question_field, answer_field, "answer")
    )
    return QuestionSet(name, MATH, questions).first(count)


def sized(name: str) -> tuple[str, int]:
    """Family and size of "maps:48". Raises ``ValueError`` where there is no size."""
    family, _, size = name.partition(":")
    if not size.isdigit():
        raise ValueError(f"{family} needs a size, for instance {family}:48, got {name!r}")
    return family, int(size)


def is_built_in(name: str) -> bool:
    """Whether the questions are made here: a task or recall, with or without its size."""
    family = name.partition(":")[0]
    return family in TASKS.names() or family == RECALL


def load_texts(
    name: str,
    data: Path | None = None,
    question_field: str | None = None,
    text_field: str | None = None,
    count: int | None = None,
    least_words: int = 0,
    split: Split = "test",
) -> QuestionSet:
    """Questions with a text that answers them, to be read rather than written: the set "fidelity:NAME".

    Args:
        name, data, question_field, count, split: as for ``load_questions``; built-in tasks bring their worked
            solutions, recall the lines that it asks for.
        text_field: None takes the known set's solutions, or "solution".
        least_words: texts of fewer words are passed over; of made ones, those among the first ``count``.

    Raises:
        as ``load_questions``.
    """
    family, _, size = name.partition(":")
    if data is None and family in TASKS.names() and size.isdigit():
        problems = _problems(family, int(size), count, split)
        name = _with_split(name, split)
        found = [Question(id, p.question, f"{p.thought} {ANSWER} {p.answer}") for id, p in problems.items()]
    elif data is None and family == RECALL and size.isdigit():
        _only_test(name, split)
        made = _recall(name, int(size), _MADE if count is None else count).questions
        found = [Question(q.id, q.prompt, recall_text(json.loads(q.reference))) for q in made]
    else:
        _only_test(name, split)
        found = [Question(*row) for row in _rows(name, data, question_field, text_field, "solution")]
    long = tuple(text for text in found if len(text.reference.split()) >= least_words)
    return QuestionSet(f"{FIDELITY}:{name}", FIDELITY, long).first(count)


def _rows(
    name: str, data: Path | None, question_field: str | None, wanted_field: str | None, wanted: str
) -> Iterable[tuple[str, str, str]]:
    """Id, question and what is wanted ("answer" or "solution") of every row; fields as for ``load_questions``."""
    known = HUB_SETS.get(name)
    fields = (
        question_field or str(getattr(known, "question", "question")),
        wanted_field or str(getattr(known, wanted, wanted)),
    )
    if data is not None:
        rows, source = read_json_lines(data), str(data)
    elif known is not None:
        rows, source = _hub_rows(known), known.path
    else:
        raise unknown_name("task", name, [*HUB_SETS, *(f"{task}:48" for task in TASKS.names())])
    seen = set[str]()
    for number, row in rows:
        for field in fields:
            if field not in row:
                raise ValueError(f"{source}, line {number}: no field {field!r}; there are {', '.join(map(str, row))}")
        at, (question, answer) = f"{source}, line {number}: field ", fields
        read = _answer if wanted == "answer" else _text
        name = "unique_id" if "unique_id" in row else "id"
        id = str(number) if row.get(name) is None else _text(f"{at}{name!r}", row[name])
        if id in seen:
            raise ValueError(
                f"{source}, line {number}: the id {id!r} appears more than once; give each question its own"
            )
        seen.add(id)
        yield id, _question(f"{at}{question!r}", row[question]), read(f"{at}{answer!r}", row[answer])


def _text(field: str, value: Any) -> str:
    """A text, or a number as text. Raises ``ValueError`` that begins with ``field`` for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{field} is empty; remove the line or fill it")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
        raise ValueError(f"{field} must be a text or a number, got {shown(value)}; remove the line or change it")
    if value != value:
        raise ValueError(f"{field} is NaN, no number; remove the line or fill it")
    return str(value)


def _question(field: str, value: Any) -> str:
    """A text, also of a chat's only turn: [{"role": "user", "content": ...}]. Raises ``ValueError``."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "user":
        return _text(f"{field}, content", value[0].get("content"))
    if isinstance(value, list):
        raise ValueError(
            f"{field} must be a text, or a chat of the user's one turn, got {shown(value)}: answers follow one turn; "
            "remove the line or change it"
        )
    return _text(field, value)


def _answer(field: str, value: Any) -> str:
    """A text, or several right answers in any order, as mathematics writes them: "5, 6". Raises ``ValueError``."""
    if not isinstance(value, list):
        return _text(field, value)
    answers = [_text(field, answer) for answer in value]
    if not answers:
        raise ValueError(f"{field} is empty; remove the line or fill it")
    for answer in answers:
        outside, inside = answer, ""
        while outside != inside:  # brackets vanish from the inside out
            inside, outside = outside, re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", outside)
        if len(answers) > 1 and "," in outside:
            raise ValueError(
                f"{field}: one of several answers cannot hold a comma, got {shown(answer)}; write it without"
            )
    return ", ".join(answers)


def _hub_rows(source: HubSet) -> list[tuple[int, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "reading from the hub needs datasets: pip install 'reasonalloc[eval]', or pass --data"
        ) from error
    try:
        return list(enumerate(load_dataset(source.path, source.config, split=source.split), 1))
    except Exception as error:  # the client's errors are of many kinds
        raise OSError(
            f"cannot read {source.path} from the hub ({type(error).__name__}: {error}); pass the questions as a "
            "JSON-lines file with --data"
        ) from error


def _problems(family: str, difficulty: int, count: int | None, split: Split) -> dict[str, Problem]:
    """The first problems of a split, by id."""
    task = TASKS.create(family)
    return {str(seed): task.problem(seed, difficulty, split) for seed in range(_MADE if count is None else count)}


def _with_split(name: str, split: Split) -> str:
    return name if split == "test" else f"{name} {split}"


def _only_test(name: str, split: Split) -> None:
    if split != "test":
        raise ValueError(f"{name} has no split {split!r}: only built-in tasks ({', '.join(TASKS.names())}) have two")


def _recall(name: str, facts: int, count: int) -> QuestionSet:
    made = [recall_question(seed, facts) for seed in range(count)]
    questions = (Question(str(seed), prompt, json.dumps(answers)) for seed, (prompt, answers) in enumerate(made))
    return QuestionSet(name, RECALL, tuple(questions))
