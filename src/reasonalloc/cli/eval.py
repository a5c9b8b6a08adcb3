"""``reasonalloc eval``: methods answer questions at several budgets."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonalloc.cli.console import Calibrating, Loading, Progress, clear_errors, duration, say, wrote
from reasonalloc.cli.options import (
    KEEPING,
    Device,
    Dtype,
    PinPrompt,
    ProtectPrompt,
    Temperature,
    TopP,
    Window,
    asked_by,
    given,
    prompt_of,
    whole_numbers,
)

if TYPE_CHECKING:
    from reasonalloc.evaluation.store import Result, Store
    from reasonalloc.evaluation.study import Batch, Study, Unit

DEFAULT_METHODS = "full,rkv,pyramid-rkv,reasonalloc"


def evaluate(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; run again to go on.")],
    study: Annotated[
        Path | None, typer.Option(help="A study as JSON; --model and --data say where they lie here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study that the folder holds.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, .gguf file, hub id, or reasonalloc/reasoner.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="math500, aime24, aime25, gsm8k, maps:48, programs:56, search:56, recall:32 (may be repeated)."
        ),
    ] = None,
    fidelity: Annotated[
        list[str] | None,
        typer.Option(help="Read given solutions of a task with each cache instead of answering (may be repeated)."),
    ] = None,
    least_words: Annotated[int, typer.Option(min=0, help="With --fidelity: leave out texts of fewer words.")] = 0,
    methods: Annotated[str, typer.Option(help="Names, with commas; see `reasonalloc methods`.")] = DEFAULT_METHODS,
    budgets: Annotated[str, typer.Option(help="Tokens per KV head, with commas.")] = "128,256,512",
    baseline: Annotated[
        str | None, typer.Option(help="The method that others are compared with; default: rkv if it is there.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 8,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer or text, in tokens.")] = 32768,
    count: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task; default: all, of a built-in task 100.")
    ] = None,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Draw those --count questions at random, by this seed; default: the first ones.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines with the questions, instead of the hub.")] = None,
    question_field: Annotated[
        str | None, typer.Option(help="Field of the question in --data; default: the known set's, or 'question'.")
    ] = None,
    answer_field: Annotated[
        str | None, typer.Option(help="Field of the answer in --data; default: the known set's, or 'answer'.")
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="With --fidelity: field of the text in --data; default: the known set's, or 'solution'."),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Demand profile (JSON), or 'auto'.")] = None,
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two compressions.")] = 128,
    window: Window = None,
    protect_prompt: ProtectPrompt = False,
    pin_prompt: PinPrompt = False,
    random_splits: Annotated[int, typer.Option(min=0, help="Random splits of each budget, as a control.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 16,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of random numbers in sampling.")] = 0,
    device: Device = "auto",
    shard: Annotated[
        str | None, typer.Option(help="i/n: this process does part i of n, counted from 0 (0/4 ... 3/4).")
    ] = None,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="Share the model among processes: torchrun --nproc-per-node N -m reasonalloc eval ...",
        ),
    ] = False,
    ray_workers: Annotated[int, typer.Option(min=0, help="Ray actors that share the work; 0: without Ray.")] = 0,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs of one Ray actor.")] = 1.0,
) -> None:
    """Let methods answer questions at several budgets.

    Stop at any time; the same command goes on where it was. Then see `reasonalloc report`.
    """
    with clear_errors():
        from reasonalloc.evaluation.store import Store
        from reasonalloc.evaluation.study import Study

        if resume or study:
            _refuse(context, _WITH_RESUME if resume else _WITH_STUDY)
        store = Store(output)
        if resume:
            wanted = store.study()
        elif study is not None:
            wanted = Study.load(study).located(model, data)
        else:
            if model is None or not (task or fidelity):
                raise ValueError("name a --model and at least one --task or --fidelity, or a --study, or --resume")
            tasks = _tasks(
                task or [],
                fidelity or [],
                data,
                question_field,
                answer_field,
                text_field,
                count,
                least_words,
                shuffle_seed,
            )
            wanted = Study.from_dict(
                {
                    "model": model,
                    "tasks": tasks,
                    **_caches(context, model, methods, budgets),
                    "baseline": baseline,
                    "samples": samples,
                    "sampling": {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens},
                    "common": {
                        "interval": interval,
                        **({"window": window} if window is not None else {}),
                        **({"profile": profile} if profile else {}),
                        **prompt_of(protect_prompt, pin_prompt),
                    },
                    "random_splits": random_splits,
                    "dtype": dtype,
                    "seed": seed,
                    "batch": batch,
                }
            )
        if shard and ray_workers:
            raise ValueError("--shard and --ray-workers are two ways to share the work: choose one")
        if tensor_parallel and ray_workers:
            raise ValueError("--tensor-parallel works in torchrun's processes, --ray-workers start their own: choose")
        _run(store, wanted, device, None if shard is None else _shard(shard), ray_workers, ray_gpus, tensor_parallel)
        wrote(f"{output}: done. `reasonalloc report {output}` says what was found")


def _run(
    store: Store,
    study: Study,
    device: str,
    part: tuple[int, int] | None,
    ray_workers: int,
    ray_gpus: float,
    tensor_parallel: bool,
) -> None:
    from reasonalloc.evaluation.executors import Worker, run_local, run_ray, shard
    from reasonalloc.evaluation.grading import grader, grader_version
    from reasonalloc.evaluation.questions import FIDELITY

    store.check(study)
    if tensor_parallel:
        from reasonalloc.cache.totals import check_ranks

        for cell in study.cells:
            check_ranks(cell.compression)
    if part is not None:
        shard([], *part)  # a wrong one fails before anything is loaded
    sets = store.sets() or study.load_questions()
    for found in sets:
        if found.grader != FIDELITY:
            grader(found.grader)
            grader_version(found.grader)  # what is missing for grading is said now, not after hours
    with Loading(study.model) as loading:
        where = "cpu" if ray_workers else device  # the GPUs are the actors'
        worker = Worker(study, where, tensor_parallel, loading.progress, say)
    if worker.writes:
        say(study.extent(sets))
        beyond = worker.beyond_positions(study, sets)
        if beyond:
            say(f"note: {beyond}")
    with Calibrating() as shown:
        profile = store.profile() or worker.auto_profile(study, shown.report, say)
    store.begin(study, worker.fingerprint, sets, profile)
    plan = store.plan()
    batches = plan if part is None else shard(plan, *part)
    watch = _Watch(store, batches, hidden=not worker.writes)
    if store.damaged:
        say(f"{store.damage()}: made anew")
    with watch:
        if ray_workers:
            run_ray(study, store, plan, ray_workers, ray_gpus, watch.done, device)
        else:
            run_local(worker, store, batches, watch.done, watch.written)


_ANYWHERE = {"tensor_parallel", "output", "device", "shard", "ray_workers", "ray_gpus"}
_WITH_RESUME = {*_ANYWHERE, "resume"}
_WITH_STUDY = {*_ANYWHERE, "study", "model", "data"}


def _refuse(context: typer.Context, allowed: set[str]) -> None:
    """Options beside a study that would change nothing are an error."""
    wrong = [f"--{name.replace('_', '-')}" for name in given(context) if name not in allowed]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} would have no effect: the study says all that decides the results")


def _caches(context: typer.Context, model: str, methods: str, budgets: str) -> dict[str, Any]:
    """A study's methods and budgets; without an option that says which, what the model's own folder asks for."""
    if not {*KEEPING, "methods", "budgets"} & {*given(context)}:
        from reasonalloc.evaluation.study import FULL
        from reasonalloc.policies.written import DEFAULT_METHOD

        found = asked_by(model)
        if found is not None:
            field, compression = found
            method = field.get("method", DEFAULT_METHOD)
            if method == FULL:
                return {"variants": [FULL], "budgets": []}
            changes = {name: value for name, value in field.items() if name not in ("method", "budget")}
            own = {"name": method, "method": method, "changes": changes}
            return {"variants": [FULL, own], "budgets": [compression.budget]}
    return {
        "variants": [name.strip() for name in methods.split(",")],
        "budgets": whole_numbers(budgets, "--budgets"),
    }


def _tasks(
    answer: list[str],
    read: list[str],
    data: Path | None,
    question_field: str | None,
    answer_field: str | None,
    text_field: str | None,
    count: int | None,
    least_words: int,
    shuffle_seed: int | None,
) -> list[dict[str, Any]]:
    if data is not None and len({*answer, *read}) > 1:
        raise ValueError(f"--data is one set of questions, got several: {', '.join([*answer, *read])}; use a --study")
    place = None if data is None else str(data)
    source = {"data": place, "question_field": question_field, "count": count, "shuffle_seed": shuffle_seed}
    written = [{"name": name, **source, "answer_field": answer_field} for name in answer]
    texts = {"answer_field": text_field, "fidelity": True, "least_words": least_words}
    return [*written, *({"name": name, **source, **texts} for name in read)]


def _shard(text: str) -> tuple[int, int]:
    index, _, of = text.partition("/")
    if not index.isdigit() or not of.isdigit():
        raise ValueError(f"--shard is i/n, for instance 0/4, got {text!r}")
    return int(index), int(of)


class _Watch:
    """Progress of a shard: answers done, time left, tokens a second, accuracy so far of each method.

    What the folder held before counts, in answers and accuracies; pace and time left are this session's.
    """

    def __init__(
        self, store: Store, batches: list[Batch], hidden: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.right = store, defaultdict[str, list[bool]](list)
        self.tokens = self.within = 0  # of finished batches, and of the one at work
        units = finished = 0
        for batch in [] if hidden else batches:
            left = store.to_do(batch)
            units, finished = units + len(batch), finished + len(batch) - len(left)
            for unit in batch if not left else ():
                self._grade(unit)
        self.longest = max((unit.sampling.max_new_tokens for batch in batches for unit in batch), default=0)
        self.progress = Progress("answers", units, finished, self._said, hidden, clock, left=self._left)

    def __enter__(self) -> _Watch:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)

    def done(self, batch: Batch, results: list[Result], seconds: float) -> None:
        """Count a finished batch."""
        for unit in batch:
            self._grade(unit)
        self.tokens, self.within = self.tokens + sum(found.tokens for found in results), 0
        self.progress.advance(len(batch))

    def written(self, tokens: int) -> None:
        """So many more tokens in the batch at work."""
        self.within += tokens
        self.progress.tick()

    def _grade(self, unit: Unit) -> None:
        """Count a stored answer of a named method. Its grade is kept, so that nothing is graded twice."""
        from reasonalloc.evaluation.answering import Answer
        from reasonalloc.evaluation.questions import FIDELITY
        from reasonalloc.evaluation.study import RANDOM

        if unit.grader == FIDELITY or unit.cell.method.startswith(RANDOM):
            return
        with suppress(Exception):  # whatever an answer does to its grader, the run goes on
            found = self.store.read(unit)
            if isinstance(found, Answer):
                self.right[unit.cell.method].append(self.store.grade(unit, found).correct)

    def _left(self) -> str:
        """Before the first batch of this session ends: the time left if all answers are as long as they may be."""
        if self.progress.done > self.progress.before or not self.within:
            return ""
        tokens = (self.progress.total - self.progress.done) * self.longest - self.within
        return f"at most {duration(max(0, tokens) * self.progress.elapsed / self.within)} left at this pace"

    def _said(self) -> str:
        tokens = self.tokens + self.within
        pace = f"{tokens / self.progress.elapsed:.0f} tokens/s in this session" if tokens else ""
        right = ", ".join(f"{name} {sum(x) / len(x):.0%}" for name, x in self.right.items())
        return "; ".join(filter(None, (pace, right and f"right so far: {right}")))
