"""The commands of evaluation: ``reasonalloc eval`` and ``reasonalloc report``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reasonalloc.console import clear_errors, console, errors

if TYPE_CHECKING:
    from reasonalloc.evaluation.store import Result, Store
    from reasonalloc.evaluation.study import Batch

DEFAULT_METHODS = "full,rkv,pyramid-rkv,reasonalloc"


def evaluate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; run again to go on.")],
    study: Annotated[
        Path | None, typer.Option(help="A study as JSON; --model and --data say where they lie here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study that the folder holds.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Local folder, .gguf file, or hub id.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="math500, aime24, aime25, gsm8k, maps:48, programs:56, search:72, recall:32; repeatable."),
    ] = None,
    fidelity: Annotated[
        list[str] | None,
        typer.Option(help="Read given solutions of a task with each cache instead of answering; repeatable."),
    ] = None,
    least_words: Annotated[int, typer.Option(min=0, help="With --fidelity: pass over shorter texts.")] = 0,
    methods: Annotated[str, typer.Option(help="Names, with commas; see `reasonalloc methods`.")] = DEFAULT_METHODS,
    budgets: Annotated[str, typer.Option(help="Tokens per KV head, with commas.")] = "128,256,512",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32768,
    count: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines with the questions, instead of the hub.")] = None,
    question_field: Annotated[str | None, typer.Option(help="In --data.")] = None,
    answer_field: Annotated[str | None, typer.Option(help="In --data.")] = None,
    profile: Annotated[str | None, typer.Option(help="Demand profile (JSON), or 'auto'.")] = None,
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two compressions.")] = 128,
    protect_prompt: Annotated[bool, typer.Option(help="Keep the prompt, on top of the budget.")] = False,
    random_splits: Annotated[int, typer.Option(min=0, help="Random splits of each budget, as a control.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    shard: Annotated[str | None, typer.Option(help="i/n: do every n-th batch from the i-th on (0/4 ... 3/4).")] = None,
    ray_workers: Annotated[int, typer.Option(min=0, help="Use so many Ray actors.")] = 0,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs of one Ray actor.")] = 1.0,
) -> None:
    """Let methods answer questions at several budgets; stop at any time and run again to go on."""
    with clear_errors():
        from reasonalloc.evaluation.executors import Worker, run_local, run_ray
        from reasonalloc.evaluation.executors import shard as shard_of
        from reasonalloc.evaluation.store import Store
        from reasonalloc.evaluation.study import Study

        store = Store(output)
        if resume:
            wanted = store.study()
        elif study is not None:
            wanted = Study.load(study).located(model, data)
        else:
            if model is None or not (task or fidelity):
                raise ValueError("name a --model and at least one --task or --fidelity, or a --study, or --resume")
            source = {
                "data": None if data is None else str(data),
                "question_field": question_field,
                "answer_field": answer_field,
                "count": count,
            }
            wanted = Study.from_dict(
                {
                    "model": model,
                    "tasks": [
                        *({"name": name, **source} for name in task or ()),
                        *(
                            {"name": name, **source, "fidelity": True, "least_words": least_words}
                            for name in fidelity or ()
                        ),
                    ],
                    "variants": [name.strip() for name in methods.split(",")],
                    "budgets": numbers(budgets, "--budgets"),
                    "samples": samples,
                    "sampling": {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens},
                    "common": {
                        "interval": interval,
                        **({"profile": profile} if profile else {}),
                        **({"prompt": "protect"} if protect_prompt else {}),
                    },
                    "random_splits": random_splits,
                    "dtype": dtype,
                    "seed": seed,
                    "batch": batch,
                }
            )
        part = None if shard is None else _shard(shard)
        store.begin(wanted)
        with errors.status(f"loading {wanted.model}"):
            worker = Worker(wanted, device)
        batches = worker.plan if part is None else shard_of(worker.plan, *part)
        with _Watch(store, batches) as watch:
            if ray_workers:
                run_ray(wanted, output, ray_workers, ray_gpus, watch.done)
            else:
                run_local(worker, store, batches, watch.done)
        console.print(f"{output}: done. `reasonalloc report {output}` says what was found", highlight=False)


def report(
    folder: Annotated[Path, typer.Argument(help="Of `reasonalloc eval`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report.")] = None,
    metric: Annotated[
        str, typer.Option(help="What is compared: accuracy (all of an answer right) or score (share of it).")
    ] = "accuracy",
) -> None:
    """Grade the answers; write report.html, report.md, report.csv and pictures."""
    with clear_errors():
        from reasonalloc.evaluation.executors import Worker
        from reasonalloc.evaluation.report import ACCURACY, SCORE, collect, markdown, write_report
        from reasonalloc.evaluation.store import Store

        if metric not in ("accuracy", "score"):
            raise ValueError(f"the metric is accuracy or score, got {metric!r}")
        store = Store(folder)
        study = store.study()
        with errors.status(f"loading {study.model}"):
            plan = Worker(study).plan
        findings = collect(store, study, plan, SCORE if metric == "score" else ACCURACY)
        if not findings.cells:
            raise ValueError(f"{folder} has no finished problem yet")
        paths = write_report(findings, output or folder / "report")
        console.print(markdown(findings), highlight=False, markup=False)
        console.print(f"wrote {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers with commas between them, got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    index, _, of = text.partition("/")
    if not index.isdigit() or not of.isdigit():
        raise ValueError(f"--shard is i/n, for instance 0/4, got {text!r}")
    return int(index), int(of)


class _Watch:
    """The live table: answers done, tokens a second, accuracy so far of each method."""

    def __init__(self, store: Store, batches: list[Batch]) -> None:
        self.store = store
        self.right: dict[str, list[bool]] = defaultdict(list)
        self.tokens, self.seconds = 0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[so_far]}"), console=errors)
        units = sum(map(len, batches))
        finished = units - sum(len(batch) for batch in batches if store.missing(batch))
        self.task = self.progress.add_task("answers", total=units, completed=finished, so_far="")

    def __enter__(self) -> _Watch:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def done(self, batch: Batch, results: list[Result], seconds: float) -> None:
        """Count a finished batch."""
        from reasonalloc.evaluation.answering import Answer

        for unit, found in zip(batch, results, strict=True):
            if isinstance(found, Answer):
                self.right[unit.cell.method].append(self.store.grade(unit, found).correct)
        self.tokens += sum(found.tokens for found in results)
        self.seconds += seconds
        so_far = ", ".join(f"{name} {sum(x) / len(x):.0%}" for name, x in list(self.right.items())[:5])
        self.progress.update(
            self.task, advance=len(batch), so_far=f"{self.tokens / self.seconds:.0f} tokens/s; {so_far}"
        )
