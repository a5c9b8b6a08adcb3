"""Who does the work: this process, one of several shards, or Ray's actors. All on one store, and all may be stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasonalloc.compression import AUTO_PROFILE, Compression
from reasonalloc.engines.transformers.auto_profile import auto_profile
from reasonalloc.engines.transformers.loading import load, quiet
from reasonalloc.evaluation.answering import answer
from reasonalloc.evaluation.fidelity import Reading, make_trace, read_alike
from reasonalloc.evaluation.questions import FIDELITY
from reasonalloc.evaluation.store import Result, Store
from reasonalloc.evaluation.study import Batch, Study, digest

Done = Callable[[Batch, list[Result], float], None]  # a batch, its results, the seconds it took


class Worker:
    """A loaded model that answers batches of one study."""

    def __init__(self, study: Study, device: str = "auto") -> None:
        quiet()
        self.study = study
        self.model, self.tokenizer = load(study.model, study.dtype, device)
        self.plan = study.plan(fingerprint(self.model), self._resolve)

    def _resolve(self, compression: Compression) -> Compression:
        if compression.profile != AUTO_PROFILE:
            return compression
        return compression.replace(profile=auto_profile(self.model.config, compression, self.model, self.tokenizer))

    def run(self, batch: Batch) -> list[Result]:
        """Results of a batch; sampling is seeded by the batch itself."""
        if batch[0].grader == FIDELITY:
            return list(self._read(batch))
        seed = int(digest([unit.key for unit in batch])[:12], 16)
        prompts = [unit.question.prompt for unit in batch]
        return list(answer(self.model, self.tokenizer, prompts, batch[0].cell.compression, batch[0].sampling, seed))

    def _read(self, batch: Batch) -> list[Reading]:
        question, most = batch[0].question, batch[0].sampling.max_new_tokens
        trace = make_trace(self.tokenizer, question.id, question.prompt, question.reference, most)
        return read_alike(self.model, trace, [unit.cell.compression for unit in batch])


def fingerprint(model: Any) -> str:
    """Tells models apart: a hash over every parameter's name, shape, type and some of its values."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


def shard(plan: list[Batch], index: int, of: int) -> list[Batch]:
    """Every ``of``-th batch, from ``index`` on. Raises ``ValueError`` for a shard that is none."""
    if not 0 <= index < of:
        raise ValueError(f"shards are numbered 0/{of} to {of - 1}/{of}, got {index}/{of}")
    return plan[index::of]


def run_local(worker: Worker, store: Store, batches: list[Batch], done: Done) -> None:
    """One batch after another in this process, those that are missing; whole batches, as they were planned."""
    for batch in batches:
        if store.missing(batch):
            began = time.perf_counter()
            results = worker.run(batch)
            for unit, found in zip(batch, results, strict=True):
                store.write(unit, found)
            done(batch, results, time.perf_counter() - began)


def run_ray(study: Study, folder: Path, workers: int, gpus: float, done: Done, attempts: int = 3) -> None:
    """Ray actors, each with a model of its own, on as many machines as the cluster has; they share the folder.

    A batch whose actor dies is given to another, at most ``attempts`` times.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: a batch lost its actor ``attempts`` times.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("this executor needs Ray: pip install 'reasonalloc[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    actor_class = ray.remote(num_gpus=gpus, max_restarts=0)(_RayWorker)
    pool = {i: actor_class.remote(study.to_dict(), str(folder)) for i in range(workers)}
    count = ray.get(pool[0].batches.remote())
    waiting, tries = list(range(count)), dict.fromkeys(range(count), 0)
    running: dict[Any, tuple[int, int]] = {}
    idle = list(pool)
    while waiting or running:
        while idle and waiting:
            i, index = idle.pop(), waiting.pop(0)
            running[pool[i].run.remote(index)] = (i, index)
        ready, _ = ray.wait(list(running), num_returns=1)
        i, index = running.pop(ready[0])
        idle.append(i)
        try:
            found = ray.get(ready[0])
        except ray.exceptions.RayActorError as error:
            tries[index] += 1
            if tries[index] == attempts:
                raise RuntimeError(
                    f"batch {index} lost its worker {attempts} times: is its memory too small?"
                ) from error
            waiting.insert(0, index)
            pool[i] = actor_class.remote(study.to_dict(), str(folder))
            continue
        if found is not None:
            done(*found)


class _RayWorker:
    """What runs inside a Ray actor."""

    def __init__(self, study: dict[str, Any], folder: str) -> None:
        self.worker, self.store = Worker(Study.from_dict(study)), Store(Path(folder))

    def batches(self) -> int:
        """How many batches the plan has."""
        return len(self.worker.plan)

    def run(self, index: int) -> tuple[Batch, list[Result], float] | None:
        """Do one batch; None if it was done already."""
        finished: list[tuple[Batch, list[Result], float]] = []
        run_local(self.worker, self.store, [self.worker.plan[index]], lambda *batch: finished.append(batch))
        return finished[0] if finished else None
