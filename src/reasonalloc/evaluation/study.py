"""A study: which methods answer which questions at which budgets. One JSON file, and the plan of work it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.answering import Sampling
from reasonalloc.evaluation.questions import (
    FIDELITY,
    Question,
    QuestionSet,
    is_built_in,
    load_questions,
    load_texts,
)
from reasonalloc.files import digest, read_json, unsealed
from reasonalloc.policies.allocation import DemandProfile
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.policies.methods import METHODS
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.values import built, shown, tokens
from reasonalloc.tasks import Split

FULL = "full"
RANDOM = "random-split"
BASELINE = "rkv"
MOST = 10_000  # samples, and random splits
READ_TOGETHER = 8  # texts, at most
# Their tokens, at most: the full cache's distributions of all are held, for each token four bytes a word that it knows.
READ_LENGTH = 4096


@dataclass(frozen=True)
class TaskSource:
    """Where questions come from; see ``load_questions``, and ``load_texts`` with ``fidelity``.

    Attributes:
        fidelity: given texts are read with each cache, instead of answers being written.
        least_words: of such a text; shorter ones are passed over.
        shuffle_seed: the first ``count`` questions after a shuffle with this seed; None: in the set's own order.
        split: of a built-in task's problems: "test", or "train" to choose settings without having seen the test's.
    """

    name: str
    data: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    count: int | None = None
    fidelity: bool = False
    least_words: int = 0
    shuffle_seed: int | None = None
    split: Split = "test"

    def __post_init__(self) -> None:
        if self.shuffle_seed is not None and is_built_in(self.name):
            raise ValueError(f"{self.name} makes its own questions at random: remove shuffle_seed {self.shuffle_seed}")

    def load(self) -> QuestionSet:
        """The questions."""
        data = None if self.data is None else Path(self.data)
        fields = (self.question_field, self.answer_field, self.count if self.shuffle_seed is None else None)
        if self.fidelity:
            found = load_texts(self.name, data, *fields, self.least_words, self.split)
        else:
            found = load_questions(self.name, data, *fields, self.split)
        return found if self.shuffle_seed is None else found.shuffled(self.shuffle_seed).first(self.count)


@dataclass(frozen=True)
class Variant:
    """A method, perhaps with changes.

    Attributes:
        name: in tables.
        method: a name in ``METHODS``.
        changes: fields of ``Compression`` in place of the method's own; policies as {"name": ..., settings}.
    """

    name: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, list(METHODS))
        if "budget" in self.changes:
            raise ValueError(f"{self.name}: budgets are the study's, not a change of one method")

    def compression(self, budget: int | None, common: Mapping[str, Any]) -> Compression:
        """The cache's configuration."""
        fields = {**common, **self.changes}
        if isinstance(fields.get("profile"), str) and fields["profile"] != AUTO_PROFILE:
            fields["profile"] = _profile(fields["profile"])
        return Compression.method(self.method, budget, **fields)


@dataclass(frozen=True)
class Study:
    """All that decides the results.

    Attributes:
        model: local folder, .gguf file or hub id.
        tasks: the questions.
        variants: the methods.
        budgets: tokens per key/value head; "full" takes none.
        samples: answers to each question; 1 when decoding greedily.
        sampling: how tokens are chosen.
        common: fields of ``Compression`` for all methods: interval, profile, prompt, ...
        interval_share: the interval as a share of the budget, at least one token; None: as ``common`` says.
        random_splits: so many random splits of each budget, as a control: R-KV's scores, heads and layers at random.
        random_budgets: the budgets that get them; None: all.
        random_count: on so many of each task's questions, the first ones; None: on all.
        baseline: the method that the others are compared with; None: "rkv", or the first that is not the full cache.
        dtype: of the model.
        seed: of sampling.
        batch: answers that are decoded together; of texts that are read, at most ``READ_TOGETHER``. Which ones those
            are follows from the study alone, so that results do not depend on where or when they are made.
    """

    model: str
    tasks: tuple[TaskSource, ...]
    variants: tuple[Variant, ...]
    budgets: tuple[int, ...]
    samples: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    common: Mapping[str, Any] = field(default_factory=dict)
    interval_share: float | None = None
    random_splits: int = 0
    random_budgets: tuple[int, ...] | None = None
    random_count: int | None = None
    baseline: str | None = None
    dtype: str = "auto"
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "random_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("samples", "random_splits"):
            if getattr(self, name) > MOST:
                raise ValueError(f"{name} must be at most {MOST}, got {getattr(self, name)}")
        for budget in self.budgets:
            tokens("an entry of budgets", budget, 1)
        if self.interval_share is not None:
            if not 0 < self.interval_share <= MOST:
                raise ValueError(f"interval_share must be positive, got {self.interval_share} (at most {MOST})")
            if "interval" in self.common:
                raise ValueError("interval_share and an interval in common exclude each other: remove one")
        if self.random_splits < 0:
            raise ValueError(f"random_splits must not be negative, got {self.random_splits}")
        if not self.tasks or not self.variants:
            raise ValueError("a study needs at least one task and one method")
        if self.samples > 1 and not self.sampling.temperature:
            raise ValueError(f"greedy answers are all alike: {self.samples} samples need a temperature above 0")
        tasks = [f"{'fidelity:' if t.fidelity else ''}{t.name} {t.split}" for t in self.tasks]
        methods = [v.name for v in self.variants]
        for kind, names in (("task", tasks), ("method", methods), ("budget", list(map(str, self.budgets)))):
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind}s of one name: {', '.join(names)}")
        if any(name.startswith(RANDOM) for name in methods):
            raise ValueError(f"method names that begin with {RANDOM!r} are kept for the control: {', '.join(methods)}")
        if self.baseline is not None and self.baseline not in methods:
            raise unknown_name("baseline among the study's methods", self.baseline, methods)
        if self.baseline is not None and next(v for v in self.variants if v.name == self.baseline).method == FULL:
            raise ValueError("the base line must have a budget; every method is compared with the full cache anyway")
        if not self.budgets and any(variant.method != FULL for variant in self.variants):
            raise ValueError("a study needs at least one budget")
        if set(self.random_budgets or ()) - set(self.budgets):
            raise ValueError(f"random_budgets {self.random_budgets} must be among the budgets {self.budgets}")
        self._made(min(1, self.random_splits))  # a wrong setting fails here

    @classmethod
    def load(cls, path: Path) -> Study:
        """From its JSON file. Raises ``ValueError`` where that is no study, or damaged; the file is named."""
        if not path.is_file():
            raise ValueError(f"there is no study at {path}")
        try:
            return cls.from_dict(unsealed(read_json(path)))
        except ValueError as error:
            raise ValueError(f"{path} is no study, or damaged: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """From plain JSON values; tasks and methods may be given by name alone. Raises ``ValueError``."""

        def by_name(kind: str, entry: Callable[[str], dict[str, Any]]) -> Any:
            found = data.get(kind)
            return [entry(x) if isinstance(x, str) else x for x in found] if isinstance(found, list | tuple) else found

        if not isinstance(data, Mapping):
            raise ValueError(f"a study is a JSON object, got {shown(data)}")
        tasks = by_name("tasks", lambda name: {"name": name})
        variants = by_name("variants", lambda name: {"name": name, "method": name})
        try:
            return built(cls, {**data, "tasks": tasks, "variants": variants})
        except TypeError as error:  # of a Compression's fields
            raise ValueError(f"this is no study: {error}") from error

    def located(self, model: str | None = None, data: Path | None = None) -> Study:
        """The same study with its model, and its tasks' data, where they lie on this machine."""
        tasks = self.tasks if data is None else tuple(replace(task, data=str(data)) for task in self.tasks)
        return replace(self, model=model or self.model, tasks=tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def only(self, methods: Sequence[str]) -> Study:
        """The same study with these of its methods alone, and without random splits.

        Raises ``ValueError`` for a name that it does not have.
        """
        names = [variant.name for variant in self.variants]
        for name in methods:
            if name not in names:
                raise unknown_name("method among the study's", name, names)
        kept = tuple(variant for variant in self.variants if variant.name in methods)
        baseline = self.baseline if self.baseline in methods else None
        return replace(self, variants=kept, random_splits=0, random_budgets=None, baseline=baseline)

    @property
    def compared_with(self) -> str | None:
        """The base line's name; None if there is only the full cache."""
        names = [variant.name for variant in self.variants if variant.method != FULL]
        return self.baseline or (BASELINE if BASELINE in names else names[0] if names else None)

    def load_questions(self) -> list[QuestionSet]:
        """The questions of all tasks. Raises as ``load_questions``."""
        return [task.load() for task in self.tasks]

    def extent(self, sets: list[QuestionSet]) -> str:
        """How much work all of it is, in words: how many answers and readings, of what, and how long they may be.

        Args:
            sets: what ``load_questions`` found.
        """
        random = sum(cell.method.startswith(RANDOM) for cell in self.cells)
        parts = []
        for read, one, many in ((False, "answer", "question"), (True, "reading", "text")):
            asked = [found for found in sets if (found.grader == FIDELITY) == read]
            few = [found.first(self.random_count) for found in asked]
            samples = 1 if read else self.samples
            total, factors = 0, []
            for questions, caches, name in ((asked, len(self.cells) - random, "cache"), (few, random, "random split")):
                count = sum(len(found.questions) for found in questions)
                if count * caches:
                    total += count * samples * caches
                    sizes = [(count, many), *([] if read else [(samples, "sample")]), (caches, name)]
                    factors.append(" x ".join(_counted(*size) for size in sizes))
            if total:
                parts.append(f"{_counted(total, one)}: {' + '.join(factors)}")
        return f"{'; '.join(parts)}, of at most {_counted(self.sampling.max_new_tokens, 'token')} each"

    @cached_property
    def cells(self) -> list[Cell]:
        """Every method at every budget."""
        return self._made(self.random_splits)

    def _made(self, random_splits: int) -> list[Cell]:
        cells = []
        for variant in self.variants:
            for budget in (None,) if variant.method == FULL else self.budgets:
                cells.append(Cell(variant.name, budget, variant.compression(budget, self._common(budget))))
        for budget in self.budgets if self.random_budgets is None else self.random_budgets:
            for i in range(random_splits):
                split = {"name": RANDOM, "split_seed": i}
                variant = Variant(f"{RANDOM} {i}", "rkv", {"layers": split, "heads": split})
                cells.append(Cell(variant.name, budget, variant.compression(budget, self._common(budget))))
        return cells

    def _common(self, budget: int | None) -> Mapping[str, Any]:
        """``common``, with the budget's own interval where that is a share of it."""
        if budget is None or self.interval_share is None:
            return self.common
        return {**self.common, "interval": max(1, round(self.interval_share * budget))}

    def plan(self, model: str, sets: list[QuestionSet], profile: DemandProfile | None = None) -> list[Batch]:
        """All work, in batches: the longest prompts first, methods and budgets mixed.

        Texts that are read are in one batch with all caches, so that the full cache reads them only once.

        Args:
            model: the model's fingerprint, which goes into every unit's key.
            sets: what ``load_questions`` found.
            profile: in place of profile="auto".
        """
        cells = [cell.resolved(profile) for cell in self.cells]
        batches: list[Batch] = []
        for questions in sets:
            read = questions.grader == FIDELITY
            columns = [self._units(model, questions, cell, 1 if read else self.samples) for cell in cells]
            if read:
                for group in self._together(questions):
                    batches.append(tuple(unit for column in columns for unit in column if unit.question.id in group))
            else:
                for units in columns:
                    units.sort(key=lambda unit: -len(unit.question.prompt))
                    batches += [tuple(units[i : i + self.batch]) for i in range(0, len(units), self.batch)]
        # By key where prompts are equally long: else every shard would get the same few methods.
        return sorted(batches, key=lambda batch: (-len(batch[0].question.prompt), batch[0].key))

    def _together(self, questions: QuestionSet) -> list[set[str]]:
        """Ids of texts that are read side by side, those of like length."""
        groups: list[set[str]] = []
        length = 0
        for text in sorted(questions.questions, key=lambda question: -len(question.reference)):
            own = min(len(text.reference), self.sampling.max_new_tokens)  # no more tokens than letters
            length += own
            if not groups or len(groups[-1]) == min(self.batch, READ_TOGETHER) or length > READ_LENGTH:
                groups.append(set())
                length = own
            groups[-1].add(text.id)
        return groups

    def _units(self, model: str, questions: QuestionSet, cell: Cell, samples: int) -> list[Unit]:
        few = questions.first(self.random_count) if cell.method.startswith(RANDOM) else questions
        return [
            Unit(model, cell, few.name, few.grader, question, sample, self.sampling, self.dtype, self.seed)
            for question in few.questions
            for sample in range(samples)
        ]


@dataclass(frozen=True)
class Cell:
    """One method at one budget."""

    method: str
    budget: int | None
    compression: Compression

    def resolved(self, profile: DemandProfile | None) -> Cell:
        """With this profile where the compression says "auto"."""
        if self.compression.profile != AUTO_PROFILE:
            return self
        return replace(self, compression=self.compression.replace(profile=profile))

    @cached_property
    def description(self) -> dict[str, Any]:
        """The compression as plain JSON values."""
        return self.compression.describe()


@dataclass(frozen=True)
class Unit:
    """One answer to be made, and all that it depends on."""

    model: str
    cell: Cell
    task: str
    grader: str
    question: Question
    sample: int
    sampling: Sampling
    dtype: str
    seed: int

    def identity(self) -> dict[str, Any]:
        """Plain JSON values; what they do not hold cannot change the answer."""
        return {
            "model": self.model,
            "method": self.cell.method,
            "compression": self.cell.description,
            "task": self.task,
            "question": self.question.id,
            "prompt": self.question.prompt,
            "reference": self.question.reference,
            "sample": self.sample,
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "seed": self.seed,
        }

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity's canonical JSON, shortened."""
        return digest(self.identity())


Batch = tuple[Unit, ...]


def _counted(count: int, name: str) -> str:
    """ "1 answer", "1,320 answers"."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


@lru_cache(maxsize=8)
def _profile(path: str) -> DemandProfile:
    """A profile, read once for all cells."""
    return DemandProfile.load(path)
