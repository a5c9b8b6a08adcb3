"""``reasonalloc problems``: problems of the built-in tasks, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import clear_errors, wrote


def problems(
    tasks: Annotated[
        list[str], typer.Argument(help="TASK:DIFFICULTY, for instance maps:48, programs:56 or search:56.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (.jsonl).")],
    count: Annotated[int, typer.Option(min=1, help="Problems of each.")] = 8,
    split: Annotated[str, typer.Option(help="train or test; they never share a question.")] = "train",
) -> None:
    """Write problems of the built-in tasks as JSON lines.

    Each line has task, id, prompt, thought (a worked solution) and answer.
    """
    with clear_errors():
        from reasonalloc.evaluation.questions import sized
        from reasonalloc.files import write_atomically
        from reasonalloc.tasks import TASKS

        lines = []
        for wanted in tasks:
            name, size = sized(wanted)
            made = [TASKS.create(name).problem(seed, size, split) for seed in range(count)]  # type: ignore[arg-type]
            lines += [
                {"task": wanted, "id": f"{split} {seed}", "prompt": problem.question, "thought": problem.thought}
                | {"answer": problem.answer}
                for seed, problem in enumerate(made)
            ]
        write_atomically(output, "".join(json.dumps(line) + "\n" for line in lines).encode())
        wrote(f"wrote {len(lines)} problems to {output}")
