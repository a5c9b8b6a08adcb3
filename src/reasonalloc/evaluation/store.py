"""Results on disk: one file for one unit, written whole or not at all, so that any process may stop at any time."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.grading import Grade, grader, grader_version
from reasonalloc.evaluation.questions import FIDELITY, QuestionSet
from reasonalloc.evaluation.study import Batch, Study, Unit
from reasonalloc.files import CHECKSUM, digest, read_json, sealed, unsealed, write_atomically, write_once
from reasonalloc.policies.allocation import DemandProfile
from reasonalloc.policies.values import built

Result = Answer | Reading


@dataclass(frozen=True)
class _Inputs:
    """What ``inputs.json`` holds."""

    model: str
    sets: tuple[QuestionSet, ...]


class Store:
    """A folder: ``study.json``, ``inputs.json`` (the model's fingerprint and the questions), perhaps
    ``demand_profile.json`` (what profile="auto" found), ``results/ab/abcdef....json``, and ``grades/`` likewise.

    Several processes, on several machines, may write to one folder: what is there is never changed, and two writers
    of one unit write the same. The first run settles model and questions; a later one with others is refused.

    Every file holds a checksum of its content; those of older versions do not, and are read by their fields alone.
    A damaged result counts as missing, and is the one thing that is written anew. A damaged grade is made anew.

    Attributes:
        damaged: results' files that were looked at and found to be damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: set[Path] = set()
        self._sound: set[str] = set()  # keys of results that were looked at

    # ---- what is asked ----

    def check(self, study: Study) -> None:
        """Whether the folder is free, or holds this very study.

        Raises:
            ValueError: it holds another one; what differs is named.
        """
        if not (self.folder / "study.json").exists():
            return
        stored = self.study()  # perhaps of a version that had fewer settings
        before, now = (json.loads(json.dumps(found.to_dict())) for found in (stored, study))
        different = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if different:
            raise ValueError(
                f"{self.folder} holds another study (different: {', '.join(different)}): "
                f"choose another folder, or resume with `reasonalloc eval --resume -o {self.folder}`"
            )

    def begin(self, study: Study, model: str, sets: list[QuestionSet], profile: DemandProfile | None = None) -> None:
        """Open the folder for a study, or go on with it.

        Args:
            study: what is asked.
            model: the model's fingerprint.
            sets: the questions.
            profile: what profile="auto" stands for, if the study uses it. The folder's own, if it has one, is kept.

        Raises:
            ValueError: the folder holds another study, or the same for another model or other questions.
            OSError: the folder cannot be written to.
        """
        self.check(study)
        inputs = json.loads(json.dumps({"model": model, "sets": [asdict(found) for found in sets]}))
        files = {"study.json": study.to_dict(), "inputs.json": inputs}
        try:
            write_atomically(self.folder / ".writable", b"")
            (self.folder / ".writable").unlink(missing_ok=True)
            for name, value in files.items():
                write_once(self.folder / name, json.dumps(sealed(value), indent=1, ensure_ascii=False).encode())
            if profile is not None:
                write_once(self.folder / "demand_profile.json", profile.to_json())
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        before = json.loads(json.dumps(asdict(self._inputs())))
        names = {"model": "the model", "sets": "the questions"}
        changed = [what for name, what in names.items() if before[name] != inputs[name]]
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other inputs: {' and '.join(changed)} changed since; "
                "choose another folder"
            )

    def study(self) -> Study:
        """The folder's study. Raises ``ValueError`` where there is none, or a damaged one."""
        path = self.folder / "study.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no study (no study.json)")
        try:
            return Study.load(path)
        except ValueError as error:
            remedy = f"restore it, or delete it and run `reasonalloc eval -o {self.folder}` with all its options again"
            raise ValueError(f"{error}; {remedy}") from error

    def sets(self) -> list[QuestionSet] | None:
        """The folder's questions; None before the first run. Raises ``ValueError`` where their file is damaged."""
        return list(self._inputs().sets) if (self.folder / "inputs.json").is_file() else None

    def profile(self) -> DemandProfile | None:
        """What profile="auto" stands for in this folder; None if that is not known yet.

        Raises ``ValueError`` where its file is damaged.
        """
        path = self.folder / "demand_profile.json"
        return DemandProfile.load(path) if path.is_file() else None

    def plan(self, study: Study | None = None) -> list[Batch]:
        """All work of the folder's study, or of a part of it.

        Raises ``ValueError`` where there is none, or before the first run.
        """
        study, sets = study or self.study(), self.sets()
        if sets is None:
            raise ValueError(f"{self.folder} has not been begun: run `reasonalloc eval --resume -o {self.folder}`")
        return study.plan(self._inputs().model, sets, self.profile())

    # ---- what is found ----

    def missing(self, batch: Batch) -> bool:
        """Whether any of the batch's units has no result, or a damaged one."""
        there = [self._is_there(unit) for unit in batch]  # all are looked at, so that all damage is known
        return not all(there)

    def to_do(self, batch: Batch) -> Batch:
        """What of a batch is to be made: answers all together, if any is missing; of texts what has not been read."""
        if not self.missing(batch):
            return ()
        return tuple(unit for unit in batch if unit.grader != FIDELITY or self.missing((unit,)))

    def write(self, unit: Unit, result: Result) -> None:
        """Keep a result; an earlier one of the same unit stays, unless it is damaged."""
        path, there = self._path("results", unit.key), self._is_there(unit)
        document = sealed({"unit": unit.identity(), "result": asdict(result)})
        content = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()
        if path in self.damaged:
            write_atomically(path, content)
            self.damaged.discard(path)
        elif not there:
            write_once(path, content)

    def read(self, unit: Unit) -> Result | None:
        """A unit's result; None if there is none yet, or a damaged one."""
        return self._load(unit)

    def grade(self, unit: Unit, answer: Answer) -> Grade:
        """The grade of a unit's answer: made once by each version of the grader, and kept where that is possible.

        Not one that could not be made (``Grade.fault``): a slower machine than usual may have been the cause.
        """
        path = self._path("grades", unit.key)
        about = {"grader": grader_version(unit.grader), "answer": digest(answer.text)}
        with suppress(OSError, ValueError):  # none yet, or damaged: it is made anew
            stored = read_json(path)
            kept = unsealed(stored)
            if CHECKSUM in stored and {name: kept.pop(name, None) for name in about} == about:
                return built(Grade, kept)
        grade = grader(unit.grader)(unit.question.reference, answer.text)
        if grade.fault is not None:
            return grade
        content = json.dumps(sealed({**about, **asdict(grade)}), ensure_ascii=False).encode()
        with suppress(OSError):  # a read-only folder can be reported on, too
            write_atomically(path, content, lasting=False)
        return grade

    def damage(self) -> str:
        """How many damaged results were found, and which is one of them."""
        count = len(self.damaged)
        return f"{count} result{' is' if count == 1 else 's are'} damaged ({min(self.damaged)})" if count else ""

    def results(self) -> dict[str, Any]:
        """Every result file by its key, as it lies there."""
        return {path.stem: path.read_bytes() for path in sorted(self.folder.glob("results/*/*.json"))}

    def _load(self, unit: Unit) -> Result | None:
        path = self._path("results", unit.key)
        if not path.exists():
            return None
        try:
            found = _result(unit, read_json(path))
        except ValueError:
            self.damaged.add(path)
            return None
        self.damaged.discard(path)
        return found

    def _is_there(self, unit: Unit) -> bool:
        """Whether a unit has a sound result; each file is read once."""
        if unit.key not in self._sound and self._load(unit) is not None:
            self._sound.add(unit.key)
        return unit.key in self._sound and self._path("results", unit.key).exists()

    def _inputs(self) -> _Inputs:
        path = self.folder / "inputs.json"
        try:
            return built(_Inputs, unsealed(read_json(path)))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}; restore it, or delete it and run `reasonalloc eval --resume -o "
                f"{self.folder}`, which makes it anew"
            ) from error

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.json"


def _result(unit: Unit, content: Any) -> Result:
    """A unit's result, from its file. Raises ``ValueError`` for a file of another unit, and a damaged one."""
    document = unsealed(content)
    if set(document) != {"unit", "result"} or digest(document["unit"]) != unit.key:
        raise ValueError("the file holds no result of this unit")
    if unit.grader != FIDELITY:
        return built(Answer, document["result"])
    found = built(Reading, document["result"])
    if not 0 < len(found.nll) == len(found.kl) == len(found.agree):
        raise ValueError("the numbers of a text are of different length")
    return found
