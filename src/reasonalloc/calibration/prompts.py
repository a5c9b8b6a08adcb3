"""Probe prompts: a small built-in set, or a user's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from reasonalloc.files import parse_json_lines, read_json_lines


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
    text = resources.files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return _prompts(parse_json_lines(text, "built-in"), "built-in", "prompt")


def read_prompts(path: str | Path, field: str = "prompt") -> list[ProbePrompt]:
    """Prompts from a JSON-lines file; each line an object with ``field``, and "task" where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, a line that is no such object, or a prompt that is there twice; the line is named.
    """
    path = Path(path)
    return _prompts(read_json_lines(path), str(path), field)


def _prompts(lines: list[tuple[int, dict[str, Any]]], name: str, field: str) -> list[ProbePrompt]:
    prompts: list[ProbePrompt] = []
    for number, data in lines:
        value = data.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{name}, line {number}: no text in field {field!r} (found: {', '.join(data)}); "
                "name the field of the question (--field)"
            )
        prompt = ProbePrompt(value, str(data.get("task", "")))
        if prompt.text in [other.text for other in prompts]:
            raise ValueError(f"{name}, line {number}: {prompt.text[:60]!r} is there twice")
        prompts.append(prompt)
    return prompts
