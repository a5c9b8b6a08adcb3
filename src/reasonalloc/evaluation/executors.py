"""Who does the work: this process, one of several shards, or Ray's actors. All on one store, and all may be stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reasonalloc.calibration.auto import auto_profile
from reasonalloc.calibration.calibrate import Progress
from reasonalloc.engines.models import beyond_positions
from reasonalloc.engines.transformers.loading import encode, load, quiet, ranks, to_stderr
from reasonalloc.evaluation.answering import answer
from reasonalloc.evaluation.fidelity import Reading, make_trace, read_alike
from reasonalloc.evaluation.questions import FIDELITY, QuestionSet
from reasonalloc.evaluation.store import Result, Store
from reasonalloc.evaluation.study import Batch, Study, Unit, digest
from reasonalloc.policies.allocation import DemandProfile
from reasonalloc.policies.compression import AUTO_PROFILE

_ATTEMPTS = 3
# Settings of a configuration that depend on where and how it was loaded, not on what the model computes.
_INCIDENTAL = {"_name_or_path", "name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype"}
Done = Callable[[Batch, list[Result], float], None]  # a batch, its results, the seconds it took
Written = Callable[[int], None]  # so many more tokens were written or read, within a batch
Keep = Callable[[Unit, Result], None]


class Worker:
    """A loaded model that works on batches of a study; with ``tensor_parallel``, one rank's part of it.

    ``progress`` and ``say`` are those of ``load``.

    Attributes:
        together: whether several ranks share the model.
        writes: whether this one keeps and shows what they find.
    """

    def __init__(
        self,
        study: Study,
        device: str = "auto",
        tensor_parallel: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        quiet()
        self.model, self.tokenizer = load(study.model, study.dtype, device, tensor_parallel, progress, say)
        self.together = ranks(self.model) > 1
        self.writes = not self.together or torch.distributed.get_rank() == 0
        self.fingerprint = fingerprint(self.model, self.tokenizer)

    def beyond_positions(self, study: Study, sets: list[QuestionSet]) -> str:
        """What to say where answers may pass the model's last position; "" where they cannot."""
        prompts = [question.prompt for found in sets if found.grader != FIDELITY for question in found.questions]
        if not prompts:
            return ""
        longest = encode(self.tokenizer, prompts, True, torch.device("cpu"))["input_ids"].shape[1]
        return beyond_positions(self.model.config, longest, study.sampling.max_new_tokens)

    def auto_profile(
        self, study: Study, progress: Progress | None = None, say: Callable[[str], None] = to_stderr
    ) -> DemandProfile | None:
        """What profile="auto" stands for, see ``auto_profile``; None if the study does not use it."""
        found = [cell.compression for cell in study.cells if cell.compression.profile == AUTO_PROFILE]
        if found and self.together:
            raise ValueError(
                "ranks of a tensor-parallel model cannot calibrate it: run `reasonalloc calibrate` on one machine "
                "that holds it whole (device_map will do) and pass --profile FILE"
            )
        if not found:
            return None
        return auto_profile(self.model.config, found[0], self.model, self.tokenizer, progress, say)

    def run(self, batch: Batch, keep: Keep, written: Written = lambda tokens: None) -> list[Result]:
        """Results of a batch, each kept as soon as it is there; sampling is seeded by the batch itself."""
        if batch[0].grader == FIDELITY:
            return list(self._read(batch, keep, written))
        first, seed = batch[0], int(digest([unit.key for unit in batch])[:12], 16)
        prompts = [unit.question.prompt for unit in batch]

        def on_step(rows: torch.Tensor, tokens: torch.Tensor) -> None:
            written(len(rows))

        made = answer(
            self.model, self.tokenizer, prompts, first.cell.compression, first.sampling, seed, on_step=on_step
        )
        for unit, found in zip(batch, made, strict=True):
            keep(unit, found)
        return list(made)

    def _read(self, batch: Batch, keep: Keep, written: Written) -> list[Reading]:
        most = batch[0].sampling.max_new_tokens
        questions = {unit.question.id: unit.question for unit in batch}
        traces = [make_trace(self.tokenizer, q.id, q.prompt, q.reference, most) for q in questions.values()]
        row = {name: i for i, name in enumerate(questions)}
        cells: dict[tuple[str, int | None], list[int]] = {}
        for i, unit in enumerate(batch):
            cells.setdefault((unit.cell.method, unit.cell.budget), []).append(i)
        compressions = [batch[units[0]].cell.compression for units in cells.values()]
        rows = [[row[batch[i].question.id] for i in units] for units in cells.values()]
        made: dict[int, Reading] = {}
        for units, found in zip(cells.values(), read_alike(self.model, traces, compressions, rows), strict=True):
            for i, reading in zip(units, found, strict=True):
                made[i] = reading
                keep(batch[i], reading)
            written(sum(reading.tokens for reading in found))
        return [made[i] for i in range(len(batch))]


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Tells models apart: a hash over every parameter's name, shape, type and some of its values, over the
    architecture's settings, the chat template and the vocabulary; and over the number of tensor-parallel ranks, which
    route alone and so are another method."""
    found = hashlib.sha256(f"{ranks(model)} ranks".encode() if ranks(model) > 1 else b"")
    for name, weight in model.state_dict().items():
        flat = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).flatten()  # ranks' parts joined
        some = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    vocabulary = sorted(tokenizer.get_vocab().items())
    found.update(json.dumps([config, tokenizer.chat_template, vocabulary], sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def shard(plan: list[Batch], index: int, of: int) -> list[Batch]:
    """Every ``of``-th batch, from ``index`` on. Raises ``ValueError`` for a shard that is none."""
    if not 0 <= index < of:
        raise ValueError(f"shards are numbered 0/{of} to {of - 1}/{of}, got {index}/{of}")
    return plan[index::of]


def run_local(
    worker: Worker, store: Store, batches: list[Batch], done: Done, written: Written = lambda tokens: None
) -> None:
    """One batch after another in this process, those that are missing. Answers are made in whole batches, as they were
    planned; of texts that are read, only what is missing.

    Of the ranks that share a model each runs this. The first one decides what is missing, and writes.
    """
    if worker.together:
        wanted = [[i for i, batch in enumerate(batches) if store.missing(batch)]]
        torch.distributed.broadcast_object_list(wanted)
        batches = [batches[i] for i in wanted[0]]
    for batch in batches:
        if worker.together or store.missing(batch):
            began = time.perf_counter()
            batch = batch if worker.together else store.to_do(batch)
            results = worker.run(batch, store.write if worker.writes else lambda unit, found: None, written)
            if worker.writes:
                done(batch, results, time.perf_counter() - began)


def run_ray(
    study: Study, store: Store, plan: list[Batch], workers: int, gpus: float, done: Done, device: str = "auto"
) -> None:
    """Ray actors, each with a model of its own, on as many machines as the cluster has; they share the folder.

    A batch whose actor dies is given to another; what loses its actor three times is set aside until all else is done.

    Args:
        study: what is asked.
        store: begun, on a file system that all machines share.
        plan: the store's.
        workers: how many actors.
        gpus: GPUs of each.
        done: called for every batch, as it finishes.
        device: of the actors' models.

    Raises:
        ImportError: Ray is missing.
        OSError: the cluster is too small, or batches lost their actor time and again; which ones is said.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("this executor needs Ray: pip install 'reasonalloc[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    there = ray.cluster_resources().get("GPU", 0)
    if workers * gpus > there:
        raise OSError(f"{workers} workers of {gpus} GPUs need {workers * gpus}, the cluster has {there}: ask for less")
    actor = ray.remote(num_gpus=gpus, max_restarts=0)(_RayWorker)
    batches = [i for i, batch in enumerate(plan) if store.missing(batch)]
    if Path(study.model).exists():  # actors start in another folder
        study = study.located(str(Path(study.model).absolute()))
    pool = _Pool(lambda: actor.remote(study, str(store.folder.absolute()), device), min(workers, len(batches)))
    lost = pool.work(batches, done)
    if lost:
        raise OSError(f"{len(lost)} batches lost their worker {_ATTEMPTS} times: is its memory too small? ({lost})")


class _Pool:
    """Actors, and what each is working on."""

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        self.make, self.idle = make, [make() for _ in range(size)]
        self.running: dict[Any, tuple[Any, int]] = {}

    def work(self, batches: list[int], done: Done) -> list[int]:
        """Do all batches; returns those that lost their actor too often."""
        import ray

        waiting, tries = list(batches), dict.fromkeys(batches, 0)
        lost: list[int] = []
        while waiting or self.running:
            while self.idle and waiting:
                actor, index = self.idle.pop(), waiting.pop(0)
                self.running[actor.run.remote(index)] = (actor, index)
            (ready, *_), _ = ray.wait(list(self.running), num_returns=1)
            actor, index = self.running.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayActorError:
                tries[index] += 1
                (waiting if tries[index] < _ATTEMPTS else lost).append(index)
                self.idle.append(self.make())
                continue
            self.idle.append(actor)
            if found is not None:
                done(*found)
        return lost


class _RayWorker:
    """What runs inside a Ray actor."""

    def __init__(self, study: Study, folder: str, device: str) -> None:
        self.worker, self.store = Worker(study, device), Store(Path(folder))
        self.plan = self.store.plan()

    def run(self, index: int) -> tuple[Batch, list[Result], float] | None:
        """Do one batch; None if it was done already."""
        finished: list[tuple[Batch, list[Result], float]] = []
        run_local(self.worker, self.store, [self.plan[index]], lambda *batch: finished.append(batch))
        return finished[0] if finished else None
