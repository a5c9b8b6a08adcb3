"""The command line: ``reasonalloc generate | calibrate | profile | eval | report | methods | plot | demo``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from reasonalloc.cli.console import clear_errors, console, errors
from reasonalloc.cli.evaluation import evaluate, problems, report
from reasonalloc.cli.profiles import calibrate, profile_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reasoning models in a small, fixed KV cache.")
plot_app = typer.Typer(no_args_is_help=True, help="Draw what was recorded.")
app.add_typer(plot_app, name="plot")
app.add_typer(profile_app, name="profile")
app.command()(calibrate)
app.command("eval")(evaluate)
app.command()(report)
app.command()(problems)


@app.command()
def generate(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, hub id, or reasonalloc/reasoner.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads standard input.")],
    budget: Annotated[int | None, typer.Option("--budget", "-b", help="Tokens per KV head, on average.")] = None,
    method: Annotated[str, typer.Option(help="See `reasonalloc methods`.")] = "reasonalloc",
    profile: Annotated[
        str | None, typer.Option(help="Demand profile (JSON), or 'auto': calibrate once and keep it.")
    ] = None,
    interval: Annotated[int, typer.Option(help="Decoded tokens between two compressions.")] = 128,
    protect_prompt: Annotated[bool, typer.Option(help="Keep the prompt, on top of the budget.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="For sampling and for scorers that draw.")] = 0,
    raw: Annotated[bool, typer.Option(help="Do not use the model's chat template.")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes.")] = False,
    record: Annotated[Path | None, typer.Option(help="Save every routing (.json or .npz).")] = None,
    stats: Annotated[Path | None, typer.Option(help="Save the cache's statistics (JSON).")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Answer one prompt inside a bounded KV cache."""
    with clear_errors():
        if record is not None and record.suffix not in (".json", ".npz"):
            raise ValueError(f"--record is saved as .json or .npz, got {record.name!r}")
        from reasonalloc.policies.compression import Compression

        overrides: dict[str, Any] = {"interval": interval, "seed": seed}
        if protect_prompt:
            overrides["prompt"] = "protect"
        if profile is not None:
            overrides["profile"] = profile
        compression = Compression.method(method, budget, **overrides)
        question = sys.stdin.read() if prompt == "-" else prompt
        _generate(
            model,
            question,
            compression,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            raw,
            stream,
            record,
            stats,
            dtype,
            device,
        )


def _generate(
    model: str,
    question: str,
    compression: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
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
    from reasonalloc.engines.models import CACHE_ARGUMENT
    from reasonalloc.engines.transformers import Cache
    from reasonalloc.engines.transformers.loading import encode, load, quiet
    from reasonalloc.files import write_atomically
    from reasonalloc.policies.compression import AUTO_PROFILE

    quiet()
    with errors.status(f"loading {model}"):
        network, tokenizer = load(model, dtype, device)
    if compression.profile == AUTO_PROFILE:
        compression = compression.replace(profile=auto_profile(network.config, compression, network, tokenizer))
    recorder = Recorder() if record else None
    cache = Cache(network.config, compression, recorder=recorder)
    inputs = encode(tokenizer, [question], not raw, network.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    began = time.perf_counter()
    out = network.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - began
    answer = out[0, inputs["input_ids"].shape[1] :]
    if not stream:
        print(tokenizer.decode(answer, skip_special_tokens=True))
    found = cache.stats()
    errors.print(f"\n{len(answer)} tokens in {seconds:.1f} s ({len(answer) / seconds:.1f} tokens/s)", highlight=False)
    errors.print("\n".join(str(found).splitlines()[:4]), highlight=False)
    if stats is not None:
        write_atomically(stats, json.dumps(found.to_dict()).encode())
    if recorder is not None and record is not None:
        recorder.save(record)


@app.command()
def methods() -> None:
    """List the methods by name, with their scorer and allocators."""
    from reasonalloc.policies.methods import METHODS

    table = Table(box=None)
    for heading in ("method", "scorer", "layers", "heads"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for name, method in METHODS.items():
        fixed = method.fixed if name != "full" else {}
        layers = fixed.get("layers", "" if name == "full" else "wave/dynamic")
        table.add_row(name, fixed.get("scorer", ""), layers, fixed.get("heads", ""), method.summary)
    console.print(table)
    console.print("wave/dynamic: wave where a profile is given, else measured while decoding", highlight=False)


@plot_app.command("budgets")
def plot_budgets_command(
    record: Annotated[Path, typer.Argument(help="A record of `generate --record` (.json or .npz).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture.")] = Path("budgets.png"),
    sequence: Annotated[int, typer.Option(min=0, help="Which sequence of the batch.")] = 0,
) -> None:
    """Draw the tokens that heads hold, over time and over layers."""
    with clear_errors():
        from reasonalloc.cache.recorder import Recorder
        from reasonalloc.evaluation.plots import plot_budgets

        plot_budgets(Recorder.load(record), output, sequence)
        console.print(f"wrote {output}", highlight=False)


@app.command()
def demo(
    budget: Annotated[int, typer.Option("--budget", "-b", help="Tokens per KV head, beside the question.")] = 80,
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two compressions.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for texts, record and picture.")] = Path(
        "demo-output"
    ),
) -> None:
    """24 problems for the built-in reasoner with the full cache, R-KV, PyramidKV's layers and ReasonAlloc."""
    with clear_errors():
        from reasonalloc.cli.demo import run

        run(budget, interval, output, console)


if __name__ == "__main__":
    app()
