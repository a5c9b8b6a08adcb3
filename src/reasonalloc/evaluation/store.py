"""Results on disk: one file for one unit, written whole or not at all, so that any process may stop at any time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.grading import GRADERS, Grade
from reasonalloc.evaluation.questions import FIDELITY
from reasonalloc.evaluation.study import Batch, Study, Unit
from reasonalloc.files import write_atomically

Result = Answer | Reading
_EXECUTION = ("batch",)  # settings that may differ between runs of one study


class Store:
    """A folder: ``study.json``, ``results/ab/abcdef....json``, ``grades/`` likewise.

    Several processes, on several machines, may write to one folder: a result is never changed, and two writers of one
    unit write the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, study: Study) -> None:
        """Open the folder for a study.

        Raises:
            ValueError: the folder holds another study; what differs is named.
            OSError: the folder cannot be written to.
        """
        path = self.folder / "study.json"
        data = json.loads(json.dumps(study.to_dict()))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            fields = sorted(before.keys() | data.keys())
            different = [f for f in fields if before.get(f) != data.get(f) and f not in _EXECUTION]
            if different:
                raise ValueError(
                    f"{self.folder} holds another study (different: {', '.join(different)}): "
                    f"choose another folder, or resume with `reasonalloc eval --resume {self.folder}`"
                )
            return
        try:
            write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def study(self) -> Study:
        """The folder's study. Raises ``ValueError`` where there is none."""
        path = self.folder / "study.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no study (no study.json)")
        return Study.load(path)

    def missing(self, batch: Batch) -> bool:
        """Whether any of the batch's units has no result."""
        return not all(self._path("results", unit.key).exists() for unit in batch)

    def write(self, unit: Unit, result: Result) -> None:
        """Keep a result; an earlier one of the same unit stays."""
        path = self._path("results", unit.key)
        if not path.exists():
            value = {"unit": unit.identity(), "result": asdict(result)}
            write_atomically(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode())

    def read(self, unit: Unit) -> Result | None:
        """A unit's result; None if there is none yet."""
        path = self._path("results", unit.key)
        if not path.exists():
            return None
        kind = Reading if unit.grader == FIDELITY else Answer
        return kind(**json.loads(path.read_text(encoding="utf-8"))["result"])

    def grade(self, unit: Unit, answer: Answer) -> Grade:
        """The grade of a unit's answer, made once and kept."""
        path = self._path("grades", unit.key)
        if path.exists():
            return Grade(**json.loads(path.read_text(encoding="utf-8")))
        grade = GRADERS[unit.grader](unit.question.reference, answer.text)
        write_atomically(path, json.dumps(asdict(grade), ensure_ascii=False).encode())
        return grade

    def results(self) -> dict[str, Any]:
        """Every result file by its key, as it lies there."""
        return {path.stem: path.read_bytes() for path in sorted(self.folder.glob("results/*/*.json"))}

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.json"
