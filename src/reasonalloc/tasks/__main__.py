"""Problems as JSON lines, for calibration or for a training of one's own.

python -m reasonalloc.tasks maps:48 programs:56 search:72 --count 8 --split train -o problems.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.console import clear_errors
from reasonalloc.files import write_atomically
from reasonalloc.tasks import TASKS


def main(
    tasks: Annotated[list[str], typer.Argument(help="TASK:DIFFICULTY, for instance maps:48.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (.jsonl).")],
    count: Annotated[int, typer.Option(min=1, help="Problems of each.")] = 8,
    split: Annotated[str, typer.Option(help="train or test; they never share a question.")] = "train",
) -> None:
    """Write problems: task, prompt (the question), thought (a worked solution), answer."""
    with clear_errors():
        lines = []
        for wanted in tasks:
            name, _, size = wanted.partition(":")
            if not size.isdigit():
                raise ValueError(f"a task is given as TASK:DIFFICULTY, for instance maps:48, got {wanted!r}")
            for seed in range(count):
                problem = TASKS.create(name).problem(seed, int(size), split)  # type: ignore[arg-type]
                lines.append({"task": wanted, "id": f"{split} {seed}", "prompt": problem.question,
                              "thought": problem.thought, "answer": problem.answer})  # fmt: skip
        write_atomically(output, "".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
    typer.run(main)
