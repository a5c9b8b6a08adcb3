"""``reasonalloc calibrate``: measure a model's demand profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from reasonalloc.cli.console import Calibrating, Loading, clear_errors, say, wrote
from reasonalloc.cli.options import Device, Dtype, Temperature, TopP, whole_numbers
from reasonalloc.cli.profile import print_profile


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, hub id, or reasonalloc/reasoner.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile (.json).")],
    name: Annotated[str | None, typer.Option(help="The model's name in the profile; default: its path or id.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Your own questions (.jsonl); default: 8 built-in ones.")] = None,
    field: Annotated[str, typer.Option(help="Field of the question in that file.")] = "prompt",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    miss: Annotated[
        list[str] | None, typer.Option(help="Also miss curves of this scorer, for missalloc (may be repeated).")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(help="Also miss and loss curves of this scorer, for lossalloc (may be repeated)."),
    ] = None,
    loss_points: Annotated[int, typer.Option(min=1, help="With --loss: passes over every answer for each budget.")] = 2,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also each KV head's loss sensitivity, for sensitivity (reads all answers layers x heads / 2 times).",
        ),
    ] = False,
    miss_budgets: Annotated[
        str, typer.Option(help="Budgets of the miss curves, ascending, with commas.")
    ] = "16,24,32,48,64,96,128,192,256,384,512",
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two simulated compressions.")] = 128,
    protect_prompt: Annotated[
        bool, typer.Option("--protect-prompt", help="Simulate with the prompt kept on top of the budget.")
    ] = False,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="Of random numbers in sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 4,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure where a model needs its memory: a demand profile.

    The model answers some questions, and how many tokens each head attends to is counted. An interrupted calibration
    goes on where it was: run the same command again.
    """
    with clear_errors():
        from reasonalloc.calibration import CalibrationSettings, built_in_prompts, read_prompts
        from reasonalloc.calibration.calibrate import calibrate as run_calibration
        from reasonalloc.calibration.settings import SENSITIVITY_WINDOW
        from reasonalloc.calibration.stability import bootstrap
        from reasonalloc.engines.transformers.loading import load, quiet

        if output.suffix != ".json":
            raise ValueError(f"a profile is saved as .json, got {output.name!r}")
        if output.exists() and not force:
            raise ValueError(f"{output} exists; pass --force to replace it")
        settings = CalibrationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            miss=tuple(miss or ()),
            loss=tuple(loss or ()),
            loss_points=loss_points,
            miss_budgets=tuple(whole_numbers(miss_budgets, "--miss-budgets")),
            interval=interval,
            protect_prompt=protect_prompt,
            sensitivity_window=SENSITIVITY_WINDOW if sensitivity else None,
        )
        if protect_prompt and not settings.simulated:
            raise ValueError(
                "--protect-prompt is how eviction is simulated, and nothing is: add --miss or --loss SCORER"
            )
        questions = (built_in_prompts() if prompts is None else read_prompts(prompts, field))[:limit]
        partial = output.with_name(output.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        quiet()
        with Loading(model) as loading:
            network, tokenizer = load(model, dtype, device, progress=loading.progress, say=say)
        if partial.exists():
            say(f"going on with {partial}")
        with Calibrating() as shown:
            profile = run_calibration(network, tokenizer, questions, settings, partial=partial, progress=shown.report)
        if name is not None:
            profile = replace(profile, source={**profile.source, "model": name})
        profile.save(output)
        partial.unlink(missing_ok=True)
        print_profile(profile, bootstrap(profile))
        wrote(f"wrote {output}")
