"""The commands about demand profiles: ``calibrate``, and ``profile show | study | compare | merge``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reasonalloc.calibration.settings import MISS_BUDGETS, SENSITIVITY_WINDOW
from reasonalloc.cli.console import clear_errors, console, errors

if TYPE_CHECKING:
    from reasonalloc.calibration.stability import Stability
    from reasonalloc.policies.allocation import DemandProfile

profile_app = typer.Typer(no_args_is_help=True, help="Look at demand profiles, compare and merge them.")

Budget = Annotated[int, typer.Option("--budget", "-b", min=1, help="Mean tokens per head that budgets are shown for.")]
Picture = Annotated[Path | None, typer.Option(help="Draw it, too (.png).")]
File = Annotated[Path, typer.Argument(help="A profile made by `reasonalloc calibrate`.")]


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", help="Local folder, .gguf file, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile (.json).")],
    name: Annotated[str | None, typer.Option(help="The model's name in the profile; default: its path or id.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Your own questions (.jsonl); default: 8 built-in ones.")] = None,
    field: Annotated[str, typer.Option(help="Field of the question in that file.")] = "prompt",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest chain of thought.")] = 1024,
    miss: Annotated[list[str] | None, typer.Option(help="Also miss curves of this scorer (may be repeated).")] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Also each KV head's loss sensitivity (reads every answer layers x heads / 2 times)."
        ),
    ] = False,
    miss_budgets: Annotated[str, typer.Option(help="Budgets of the miss curves, ascending, by commas.")] = ",".join(
        map(str, MISS_BUDGETS)
    ),
    interval: Annotated[int, typer.Option(min=1, help="Decoded tokens between two simulated compressions.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 4,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Measure a model's demand profile while it answers some questions.

    An interrupted calibration goes on where it was: run the same command again.
    """
    with clear_errors():
        from reasonalloc.calibration import CalibrationSettings, built_in_prompts, read_prompts
        from reasonalloc.calibration.calibrate import calibrate as run_calibration
        from reasonalloc.calibration.stability import bootstrap
        from reasonalloc.engines.transformers.loading import load, quiet
        from reasonalloc.files import write_atomically

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
            miss_budgets=_whole_numbers(miss_budgets),
            interval=interval,
            sensitivity_window=SENSITIVITY_WINDOW if sensitivity else None,
        )
        questions = (built_in_prompts() if prompts is None else read_prompts(prompts, field))[:limit]
        partial = output.with_name(output.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        quiet()
        with errors.status(f"loading {model}"):
            network, tokenizer = load(model, dtype, device)
        if partial.exists():
            errors.print(f"going on with {partial}", highlight=False)
        with _progress() as progress:
            task = progress.add_task(f"calibrating on {len(questions)} questions", total=None)
            profile = run_calibration(
                network,
                tokenizer,
                questions,
                settings,
                partial=partial,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if name is not None:
            profile = replace(profile, source={**profile.source, "model": name})
        write_atomically(output, profile.to_json())
        partial.unlink(missing_ok=True)
        _show(profile, bootstrap(profile))
        console.print(f"wrote {output}", highlight=False)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--miss-budgets takes whole numbers separated by commas, got {text!r}") from error


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    return Progress(*columns, TimeRemainingColumn(), console=errors)


@profile_app.command("show")
def show(profile: File, budget: Budget = 128, plot: Picture = None) -> None:
    """The wave with its bootstrap band, the heads' spread, and the budgets that follow."""
    with clear_errors():
        from reasonalloc.calibration.stability import bootstrap
        from reasonalloc.policies.allocation import DemandProfile

        found = DemandProfile.load(profile)
        bands = bootstrap(found, budget=budget)
        if plot is not None:
            from reasonalloc.evaluation.plots import plot_profile

            plot_profile(found, bands, plot)
        _show(found, bands)
        if plot is not None:
            console.print(f"wrote {plot}", highlight=False)


def _show(profile: DemandProfile, bands: Stability) -> None:
    import numpy as np

    from reasonalloc.calibration.stability import bootstrap_miss_curves

    rho, budget = profile.reference_rho, bands.budget
    error, heads = profile.layer_standard_error(rho), profile.head_demand(rho)
    tokens = sum(prompt.tokens for prompt in profile.prompts)
    name = profile.source.get("model") or profile.architecture.get("model_type") or "a model"
    table = Table(
        title=f"{escape(str(name))}: {len(profile.prompts)} prompts, {tokens} tokens generated, "
        f"{profile.rows} positions measured",
    )
    for heading in ("layer", "demand", "± s.e.", "band", "heads", "budget", "band"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in range(profile.shape.layers):
        table.add_row(
            str(layer),
            f"{bands.wave[layer]:.1f}",
            _or_dash(error[layer], "{:.1f}"),
            f"{bands.wave_low[layer]:.0f} to {bands.wave_high[layer]:.0f}" if bands.prompts > 1 else "-",
            f"{heads[layer].min():.0f} to {heads[layer].max():.0f}",
            f"{bands.budgets[layer]:.1f}",
            f"{bands.budget_low[layer]:.0f} to {bands.budget_high[layer]:.0f}" if bands.prompts > 1 else "-",
        )
    console.print(table)
    console.print(
        f"demand: tokens that hold {rho:.0%} of a position's attention, mean over positions and query heads; "
        f"heads: least and most of a query head; budget: tokens per head of layers='wave' at a mean of {budget}. "
        f"Bands: {bands.level:.0%}, by bootstrap over prompts.",
        highlight=False,
    )
    for scorer, grid in profile.grids.items():
        mean = profile.miss_curves(scorer).mean((1, 2))
        curve = "  ".join(f"{b}: {m:.1%}" for b, m in zip(grid.budgets, mean, strict=True))
        console.print(f"attention on tokens that {scorer} had evicted, by budget: {curve}", highlight=False)
        try:
            split = bootstrap_miss_curves(profile, scorer, budget)
        except ValueError as error:
            console.print(f"  {error}", highlight=False)
        else:
            console.print(
                f"  miss-curve budgets at {budget}: {split.budgets.min()} to {split.budgets.max()} tokens per KV head; "
                f"{bands.level:.0%} bands {float(np.median(split.widths)):.0%} of the budget wide in the median, "
                f"{float(split.widths.max()):.0%} at most",
                highlight=False,
            )
    advice = bands.advice()
    if advice:
        console.print(f"[yellow]note:[/] {advice}.", highlight=False)


@profile_app.command("study")
def study(profile: File, budget: Budget = 128, plot: Picture = None) -> None:
    """What rho, the exponent gamma and the clip bounds do to the layer budgets."""
    with clear_errors():
        from reasonalloc.calibration.operator_study import operator_effects, rho_effects
        from reasonalloc.policies.allocation import DemandProfile

        found = DemandProfile.load(profile)
        rhos, choices = rho_effects(found, budget), operator_effects(found, budget)
        if plot is not None:
            from reasonalloc.evaluation.plots import plot_operator_study

            plot_operator_study(rhos, choices, budget, plot)
        table = Table(title=f"rho (against {found.reference_rho:g}), budget {budget}")
        for heading in ("rho", "W1 of the waves", "Spearman", "least", "most", "tokens moved"):
            table.add_column(heading, justify="right")
        for effect in rhos:
            choice = effect.choice
            table.add_row(
                f"{choice.rho:g}",
                f"{effect.distance:.4f}",
                f"{effect.correlation:.3f}",
                f"{choice.budgets.min():.1f}",
                f"{choice.budgets.max():.1f}",
                f"{choice.moved:.1%}",
            )
        console.print(table)
        table = Table(title=f"exponent and clip (against 0.5 and [0.25, 2]), budget {budget}")
        for heading in ("exponent", "clip", "least", "most", "tokens moved"):
            table.add_column(heading, justify="right")
        for choice in choices:
            table.add_row(
                f"{choice.exponent:g}",
                escape(f"[{choice.lower:g}, {choice.upper:g}]"),
                f"{choice.budgets.min():.1f}",
                f"{choice.budgets.max():.1f}",
                f"{choice.moved:.1%}",
            )
        console.print(table)
        if plot is not None:
            console.print(f"wrote {plot}", highlight=False)


@profile_app.command("compare")
def compare_command(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles: one for each model and task.")],
    permutations: Annotated[int, typer.Option(min=1, help="Random relabellings of the test.")] = 9999,
    seed: Annotated[int, typer.Option(help="Of the relabellings.")] = 0,
) -> None:
    """Does the wave belong to the model or to the task? Distances, variance by level, permutation tests."""
    with clear_errors():
        from reasonalloc.calibration.compare import compare
        from reasonalloc.policies.allocation import DemandProfile

        names = _short_names(profiles)
        found = compare([DemandProfile.load(path) for path in profiles], names, permutations=permutations, seed=seed)
        table = Table("", *names, title="Wasserstein-1 between waves over relative depth")
        for name, row in zip(names, found.matrix, strict=True):
            table.add_row(name, *(f"{value:.4f}" for value in row))
        console.print(table)
        table = Table(title="Where waves differ")
        for heading in ("level", "distance", "effect", "variance", "p", "least p"):
            table.add_column(heading, justify="right")
        for level in found.levels:
            table.add_row(
                level.name,
                f"{level.distance:.4f}",
                _or_dash(level.ratio, "{:.2f}x"),
                f"{level.share:.1%}",
                _or_dash(level.p, "{:.4f}"),
                _or_dash(level.least_p, "{:.4f}"),
            )
        console.print(table)
        console.print(
            "distance: mean W1 of two prompts that differ at this level and not above; effect: over that of the level "
            "below; variance: share of the sum of squares; p: permutation test of the level's labels, one sided; "
            "least p: the smallest that so few members can give; -: relabelling would change nothing.\n"
            "Texts of different length differ, too: compare tasks at a --max-new-tokens that all texts reach.",
            highlight=False,
        )


@profile_app.command("merge")
def merge_command(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles of one model, measured alike.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The merged profile (.json).")],
) -> None:
    """Make one profile of several: what measuring all their prompts together would have given."""
    with clear_errors():
        from reasonalloc.files import write_atomically
        from reasonalloc.policies.allocation import DemandProfile, merge

        merged = merge([DemandProfile.load(path) for path in profiles])
        write_atomically(output, merged.to_json())
        console.print(f"wrote {output}: {len(merged.prompts)} prompts", highlight=False)


def _short_names(paths: list[Path]) -> list[str]:
    """File names without what all begin with; with their folders where two are alike."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        return [str(path) for path in paths]
    parts = [name.split("-") for name in names]
    while len({words[0] for words in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [words[1:] for words in parts]
    return ["-".join(words) for words in parts]


def _or_dash(value: float, pattern: str) -> str:
    return "-" if value != value else pattern.format(value)
