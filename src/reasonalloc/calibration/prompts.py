"""Probe prompts: a small built-in set, or a user's own file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class ProbePrompt:
    """A question that the model answers while it is measured.

    Attributes:
        text: the question, without any chat template.
        task: a label, for comparisons.
    """

    text: str
    task: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the text (hexadecimal)."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def built_in_prompts() -> list[ProbePrompt]:
    """The eight prompts of this package: two each of mathematics, logic, code and planning."""
    return _parse(
        resources.files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8"), "built-in", "prompt"
    )


def read_prompts(path: str | Path, field: str = "prompt") -> list[ProbePrompt]:
    """Prompts from a JSON-lines file; each line an object with ``field``, and "task" where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, a line that is no such object, or a prompt that is there twice; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}")
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path), field)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _parse(text: str, name: str, field: str) -> list[ProbePrompt]:
    prompts: list[ProbePrompt] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from error
        value = data.get(field) if isinstance(data, dict) else None
        if not isinstance(value, str) or not value.strip():
            there = ", ".join(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{name}, line {number}: no text in field {field!r} (found: {there}); name the field")
        prompt = ProbePrompt(value, str(data.get("task", "")))
        if prompt.text in [other.text for other in prompts]:
            raise ValueError(f"{name}, line {number}: {prompt.text[:60]!r} is there twice")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts
