"""``reasonalloc generate``: one prompt, answered inside a bounded KV cache."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonalloc.cli.console import Calibrating, Loading, clear_errors, say
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
)

if TYPE_CHECKING:
    from reasonalloc.cache.stats import CacheStats
    from reasonalloc.policies.compression import Compression


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, hub id, or reasonalloc/reasoner.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads standard input.")],
    budget: Annotated[
        int | None, typer.Option("--budget", "-b", help="Tokens per KV head, on average. All methods but full need it.")
    ] = None,
    method: Annotated[str, typer.Option(help="See `reasonalloc methods`.")] = "reasonalloc",
    profile: Annotated[
        str | None, typer.Option(help="Demand profile (JSON), or 'auto': calibrate once and keep it.")
    ] = None,
    interval: Annotated[int, typer.Option(help="Decoded tokens between two compressions.")] = 128,
    window: Window = None,
    protect_prompt: ProtectPrompt = False,
    pin_prompt: PinPrompt = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="Of random numbers: sampling, and scorers that draw.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Save what was kept and what was evicted, with the text, for `view` (.json or .npz)."),
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="Save the cache's statistics (JSON).")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer one prompt inside a bounded KV cache.

    Without an option that says what to keep, a model's generation_config.json decides, if it has a field "reasonalloc".
    """
    with clear_errors():
        if record is not None and record.suffix not in (".json", ".npz"):
            raise ValueError(f"--record is saved as .json or .npz, got {record.name!r}")
        from reasonalloc.policies.compression import Compression

        overrides: dict[str, Any] = {"interval": interval, "seed": seed, **prompt_of(protect_prompt, pin_prompt)}
        if window is not None:
            overrides["window"] = window
        if profile is not None:
            overrides["profile"] = profile
        options = {*given(context)}
        found = None if KEEPING & options else asked_by(model)
        asked = None if found is None else found[1]
        if asked is not None and "seed" in options:
            asked = asked.replace(seed=seed)
        compression = asked or Compression.method(method, budget, **overrides)
        question = sys.stdin.read() if prompt == "-" else prompt
        generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature:
            generation.update(temperature=temperature, top_p=top_p)
        _answer(model, question, compression, generation, seed, raw, stream, record, stats, dtype, device)


def _answer(
    model: str,
    question: str,
    compression: Compression,
    generation: dict[str, Any],
    seed: int,
    raw: bool,
    stream: bool,
    record: Path | None,
    stats: Path | None,
    dtype: str,
    device: str,
) -> None:
    import torch
    import transformers

    from reasonalloc.cache.recorder import Recorder
    from reasonalloc.calibration.auto import auto_profile
    from reasonalloc.engines.models import beyond_positions
    from reasonalloc.engines.transformers import Cache
    from reasonalloc.engines.transformers.loading import encode, end_tokens, load, quiet
    from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
    from reasonalloc.files import write_atomically
    from reasonalloc.policies.compression import AUTO_PROFILE

    quiet()
    with Loading(model) as loading:
        network, tokenizer = load(model, dtype, device, progress=loading.progress, say=say)
    if compression.profile == AUTO_PROFILE:
        with Calibrating() as shown:
            profile = auto_profile(network.config, compression, network, tokenizer, shown.report, say)
        compression = compression.replace(profile=profile)
    recorder = Recorder(tokens=True) if record else None
    cache = Cache(network.config, compression, recorder=recorder)
    inputs = encode(tokenizer, [question], not raw, network.device)
    beyond = beyond_positions(network.config, inputs["input_ids"].shape[1], generation["max_new_tokens"])
    if beyond:
        say(f"note: {beyond}")
    torch.manual_seed(seed)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    began = time.perf_counter()
    out = network.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # whatever the model was saved with after its training
        **generation,
    )
    seconds = time.perf_counter() - began
    answer = out[0, inputs["input_ids"].shape[1] :]
    if not stream:
        print(tokenizer.decode(answer, skip_special_tokens=True))
    found = cache.stats()
    most = generation["max_new_tokens"]
    cut = len(answer) == most and int(answer[-1]) not in end_tokens(network.generation_config)
    stopped = f"; stopped at --max-new-tokens {most}" if cut else ""
    say(f"\n{len(answer)} tokens in {seconds:.1f} s ({len(answer) / seconds:.1f} tokens/s){stopped}")
    say(_summary(found, compression, inputs["input_ids"].shape[1]))
    if stats is not None:
        write_atomically(stats, json.dumps(found.to_dict()).encode())
    if recorder is not None and record is not None:
        recorder.set_text(tokenizer, out, inputs["attention_mask"])
        recorder.save(record)


def _summary(found: CacheStats, compression: Compression, prompt: int) -> str:
    """What the cache holds in the end, beside what a full one would: four lines, of a full cache two."""
    from reasonalloc.cache.stats import size_text

    held, full = size_text(found.kv_bytes), size_text(found.full_bytes)
    if compression.budget is None:
        return (
            f"full cache: nothing is evicted (attention: {found.backend})\n"
            f"keys and values {full} for {found.seen} tokens ({held} with free slots)"
        )
    beside = {
        "compete": f", in which the prompt's {prompt} tokens compete",
        "protect": f" beside the prompt's {prompt} tokens",
        "pin": f", {min(prompt, compression.most_pinned)} of them for the prompt's {prompt} tokens",
    }[compression.prompt]
    kept = [tokens for layer in found.kept for row in layer for tokens in row]
    rounds = f"evicted {found.compressions} times" if found.compressions else "nothing was evicted"
    policies = ", ".join(f"{name} {policy}" for name, policy in found.method.items())
    return (
        f"budget {compression.budget} (+ up to {compression.interval} between rounds){beside}\n"
        f"kept tokens per head: min {min(kept)}, mean {sum(kept) / len(kept):.1f}, max {max(kept)}; {rounds}\n"
        f"keys and values {held}; a full cache of this text takes {full} ({found.kv_bytes / found.full_bytes:.0%})\n"
        f"{policies}; attention: {found.backend}"
    )
