"""``reasonalloc demo``: the built-in reasoner thinks in four caches; what that costs in memory and right answers."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from reasonalloc.cli.console import clear_errors, console, manner, wrote

if TYPE_CHECKING:
    from torch import Tensor

    from reasonalloc.cache.recorder import Recorder
    from reasonalloc.evaluation.answering import Answer
    from reasonalloc.evaluation.grading import Grade
    from reasonalloc.evaluation.questions import Question
    from reasonalloc.policies.compression import Compression

METHODS = ("full", "rkv", "reasonalloc", "lossalloc")
RECORDED = "reasonalloc"  # its heads are split anew in every round
TASKS = ("maps:12", "programs:24", "search:28")
LOSS_PROFILE = "loss_profile.json"  # made as profiles/README.md says
EACH = 8  # problems of every task
LONGEST = 500  # tokens of one answer; a mistaken search could go on for ever
EXCERPT = 16  # words shown before and after the place where the texts part


@dataclass(frozen=True)
class Asked:
    """A problem and how it is graded."""

    task: str
    grader: str
    question: Question


@dataclass(frozen=True)
class Run:
    """What one method did with all problems."""

    method: str
    answers: list[Answer]
    grades: list[Grade]
    seconds: float

    @property
    def right(self) -> int:
        """Problems with a wholly right answer."""
        return sum(grade.correct for grade in self.grades)

    @property
    def kv_bytes(self) -> float:
        """Bytes of one problem's keys and values at their largest, mean over problems."""
        return sum(found.kv_bytes for found in self.answers) / len(self.answers)


def demo(
    budget: Annotated[int, typer.Option("--budget", "-b", help="Tokens per KV head, on top of the question.")] = 80,
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two compressions.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for texts, record and picture.")] = Path(
        "demo-output"
    ),
) -> None:
    """See it work: the built-in reasoner thinks in four caches.

    It solves 24 problems with the full cache, equal budgets, the paper's split and budgets by loss curves.
    """
    with clear_errors():
        _run(budget, interval, output)


def _run(budget: int, interval: int, output: Path) -> None:
    """Let every method answer the same problems; print tables, and write texts, figures, record and picture."""
    import torch

    from reasonalloc.cache.recorder import Recorder
    from reasonalloc.engines.transformers.loading import BUILT_IN, load, quiet
    from reasonalloc.evaluation.answering import Sampling, answer
    from reasonalloc.evaluation.grading import grader

    compressions = {name: _compression(name, budget, interval) for name in METHODS}  # a wrong setting fails here
    quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # two threads of one core only wait for each other
    network, tokenizer = load(BUILT_IN, "float32", "cpu")
    asked = _problems()
    wrote(
        f"{len(asked)} problems ({', '.join(TASKS)}), greedy, with the built-in reasoner; beside the question {budget} "
        f"tokens per head stay, all others are evicted every {interval} tokens"
    )
    runs = []
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("longest {task.fields[step]} tokens"), console=console, disable=manner.quiet
    ) as progress:
        for name, compression in compressions.items():
            bar = progress.add_task(name, total=len(asked), step=0)
            began = time.perf_counter()
            answers = answer(
                network,
                tokenizer,
                [item.question.prompt for item in asked],
                compression,
                Sampling(0.0, 1.0, LONGEST),
                on_step=_Bar(progress, bar, len(asked)),
            )
            progress.update(bar, completed=len(asked))
            grades = [
                grader(item.grader)(item.question.reference, found.text)
                for item, found in zip(asked, answers, strict=True)
            ]
            runs.append(Run(name, answers, grades, time.perf_counter() - began))
    recorder = Recorder(tokens=True)  # of one problem: sequences leave the batch above as they finish
    prompts = [asked[-1].question.prompt]
    answer(network, tokenizer, prompts, compressions[RECORDED], Sampling(0.0, 1.0, LONGEST), recorder=recorder)
    _save(asked, runs, recorder, output)
    console.print(_table(asked, runs))
    console.print(_parting(asked, runs))
    wrote(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if recorder.routings:
        wrote(f"open {output / 'view.html'} in a browser: what the heads kept of the last problem, what they forgot")


def _problems() -> list[Asked]:
    """The first problems of each task, never seen in training."""
    from reasonalloc.evaluation.questions import load_questions

    sets = [load_questions(task, count=EACH) for task in TASKS]
    return [Asked(found.name, found.grader, question) for found in sets for question in found.questions]


def _compression(name: str, budget: int, interval: int) -> Compression:
    from reasonalloc.engines.transformers.loading import built_in_folder
    from reasonalloc.policies.compression import AUTO_PROFILE, Compression

    if name == "full":
        return Compression.method(name)
    profiles = {"reasonalloc": AUTO_PROFILE, "lossalloc": str(built_in_folder().parent / LOSS_PROFILE)}
    profile = {"profile": profiles[name]} if name in profiles else {}
    return Compression.method(name, budget, interval=interval, prompt="protect", **profile)


class _Bar:
    """Moves a method's progress bar as its sequences finish."""

    def __init__(self, progress: Progress, bar: Any, total: int) -> None:
        self.progress, self.bar, self.total, self.step = progress, bar, total, 0

    def __call__(self, rows: Tensor, tokens: Tensor) -> None:
        self.step += 1
        if self.step % 16 == 0:
            self.progress.update(self.bar, completed=self.total - len(rows), step=self.step)


def _table(asked: list[Asked], runs: list[Run]) -> Table:
    table = Table(
        title="The same problems, four ways to cache",
        caption="maps, programs, search: wholly right answers. values: share of right values.\n"
        "kept: tokens per KV head, mean over decoding steps: question, budget, and\n"
        "what came since the last eviction.\n"
        "KV kB: a problem's keys and values at their largest, mean.",
        caption_justify="left",
    )
    table.add_column("method")
    for heading in (*(task.partition(":")[0] for task in TASKS), "values", "kept", "KV kB", "of full"):
        table.add_column(heading, justify="right")
    for item in runs:
        each = [
            sum(grade.correct for where, grade in zip(asked, item.grades, strict=True) if where.task == task)
            for task in TASKS
        ]
        kept = sum(found.kept_tokens for found in item.answers) / len(item.answers)
        table.add_row(
            item.method,
            *(f"{count}/{EACH}" for count in each),
            f"{sum(grade.score for grade in item.grades) / len(asked):.0%}",
            f"{kept:.0f}",
            f"{item.kv_bytes / 1e3:.0f}",
            f"{item.kv_bytes / runs[0].kv_bytes:.0%}",
        )
    return table


def _parting(asked: list[Asked], runs: list[Run]) -> Table | str:
    """One problem on which the methods part: their texts around the first word that differs from the full cache's."""
    found: list[tuple[tuple[bool, int], int]] = []
    for i in range(len(asked)):
        verdicts = [one.grades[i].correct for one in runs]
        if verdicts[0] and not all(verdicts):  # rather one that the last method solves, and on which most texts differ
            found.append(((verdicts[-1], len({one.answers[i].text for one in runs})), -i))
    if found:
        i = -max(found)[1]
        return _side_by_side(asked[i], i, runs)
    return "All methods give the same verdicts on these problems."


def _side_by_side(item: Asked, i: int, runs: list[Run]) -> Table:
    words = {one.method: one.answers[i].text.split() for one in runs}
    full = words[runs[0].method]
    parts = {name: _first_difference(text, full) for name, text in words.items()}
    table = Table(
        title=f"Where they part: {item.task}, problem {item.question.id}, {len(full)} words in full", show_lines=True
    )
    table.add_column("method", no_wrap=True)
    table.add_column("same\nwords", justify="right")
    table.add_column("verdict")
    table.add_column("text around the first other word")
    for one in runs:
        at, text = parts[one.method], words[one.method]
        around = Text("... " + " ".join(text[max(0, at - EXCERPT) : at]) + " ")
        around.append(" ".join(text[at : at + EXCERPT]) or "(the end)", style="bold red" if at < len(full) else "")
        verdict = "right" if one.grades[i].correct else "wrong" if one.answers[i].finished else "no end"
        table.add_row(one.method, str(at), verdict, around)
    return table


def _first_difference(text: list[str], full: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(text, full, strict=False)) if a != b), min(len(text), len(full)))


def _save(asked: list[Asked], runs: list[Run], recorder: Recorder, output: Path) -> None:
    from reasonalloc.files import write_atomically
    from reasonalloc.pages.view import view

    texts = [
        {
            "task": item.task,
            "question": item.question.prompt,
            "answers": {
                one.method: {**asdict(one.answers[i]), "right": one.grades[i].correct, "score": one.grades[i].score}
                for one in runs
            },
        }
        for i, item in enumerate(asked)
    ]
    figures = {one.method: {"right": one.right, "kv_bytes": one.kv_bytes, "seconds": one.seconds} for one in runs}
    write_atomically(output / "texts.json", json.dumps(texts, indent=1).encode())
    write_atomically(output / "figures.json", json.dumps(figures, indent=1).encode())
    if recorder.routings:
        recorder.save(output / "routing.json")
        view(recorder, output / "view.html", title=f"{RECORDED}, {asked[-1].task}, problem {asked[-1].question.id}")
        with suppress(ImportError):  # the picture is an extra
            from reasonalloc.evaluation.plots import plot_budgets

            plot_budgets(recorder, output / "budgets.png")
