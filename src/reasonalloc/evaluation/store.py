"""Results on disk: one file for one unit, written whole or not at all, so that any process may stop at any time."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.grading import Grade, grader, grader_version
from reasonalloc.evaluation.questions import FIDELITY, Question, QuestionSet
from reasonalloc.evaluation.study import Batch, Study, Unit
from reasonalloc.files import write_atomically, write_once
from reasonalloc.policies.allocation import DemandProfile

Result = Answer | Reading


class Store:
    """A folder: ``study.json``, ``inputs.json`` (the model's fingerprint and the questions), perhaps
    ``demand_profile.json`` (what profile="auto" found), ``results/ab/abcdef....json``, and ``grades/`` likewise.

    Several processes, on several machines, may write to one folder: what is there is never changed, and two writers
    of one unit write the same. The first run settles model and questions; a later one with others is refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---- what is asked ----

    def check(self, study: Study) -> None:
        """Whether the folder is free, or holds this very study.

        Raises:
            ValueError: it holds another one; what differs is named.
        """
        path = self.folder / "study.json"
        if not path.exists():
            return
        stored = Study.from_dict(self._read("study.json"))  # perhaps of a version that had fewer settings
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
                write_once(self.folder / name, json.dumps(value, indent=1, ensure_ascii=False).encode())
            if profile is not None:
                write_once(self.folder / "demand_profile.json", profile.to_json())
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        before = self._read("inputs.json")
        names = {"model": "the model", "sets": "the questions"}
        changed = [what for name, what in names.items() if before[name] != inputs[name]]
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other inputs: {' and '.join(changed)} changed since; "
                "choose another folder"
            )

    def study(self) -> Study:
        """The folder's study. Raises ``ValueError`` where there is none."""
        if not (self.folder / "study.json").is_file():
            raise ValueError(f"{self.folder} holds no study (no study.json)")
        return Study.load(self.folder / "study.json")

    def sets(self) -> list[QuestionSet] | None:
        """The folder's questions; None before the first run."""
        if not (self.folder / "inputs.json").is_file():
            return None
        return [
            QuestionSet(found["name"], found["grader"], tuple(Question(**question) for question in found["questions"]))
            for found in self._read("inputs.json")["sets"]
        ]

    def profile(self) -> DemandProfile | None:
        """What profile="auto" stands for in this folder; None if that is not known yet."""
        path = self.folder / "demand_profile.json"
        return DemandProfile.load(path) if path.is_file() else None

    def plan(self, study: Study | None = None) -> list[Batch]:
        """All work of the folder's study, or of a part of it.

        Raises ``ValueError`` where there is none, or before the first run.
        """
        study, sets = study or self.study(), self.sets()
        if sets is None:
            raise ValueError(f"{self.folder} has not been begun: run `reasonalloc eval --resume -o {self.folder}`")
        return study.plan(self._read("inputs.json")["model"], sets, self.profile())

    # ---- what is found ----

    def missing(self, batch: Batch) -> bool:
        """Whether any of the batch's units has no result."""
        return not all(self._path("results", unit.key).exists() for unit in batch)

    def to_do(self, batch: Batch) -> Batch:
        """What of a batch is to be made: answers all together, if any is missing; of texts what has not been read."""
        if not self.missing(batch):
            return ()
        return tuple(unit for unit in batch if unit.grader != FIDELITY or self.missing((unit,)))

    def write(self, unit: Unit, result: Result) -> None:
        """Keep a result; an earlier one of the same unit stays."""
        value = {"unit": unit.identity(), "result": asdict(result)}
        content = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()
        write_once(self._path("results", unit.key), content)

    def read(self, unit: Unit) -> Result | None:
        """A unit's result; None if there is none yet."""
        path = self._path("results", unit.key)
        if not path.exists():
            return None
        kind = Reading if unit.grader == FIDELITY else Answer
        return kind(**json.loads(path.read_text(encoding="utf-8"))["result"])

    def grade(self, unit: Unit, answer: Answer) -> Grade:
        """The grade of a unit's answer: made once by each version of the grader, and kept where that is possible."""
        path, version = self._path("grades", unit.key), grader_version(unit.grader)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("grader", None) == version:
                return Grade(**kept)
        grade = grader(unit.grader)(unit.question.reference, answer.text)
        with suppress(OSError):  # a read-only folder can be reported on, too
            write_atomically(path, json.dumps({"grader": version, **asdict(grade)}, ensure_ascii=False).encode())
        return grade

    def results(self) -> dict[str, Any]:
        """Every result file by its key, as it lies there."""
        return {path.stem: path.read_bytes() for path in sorted(self.folder.glob("results/*/*.json"))}

    def _read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.json"
