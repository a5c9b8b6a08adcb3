"""``reasonalloc profile show | study | compare | merge``: look at demand profiles, compare and merge them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reasonalloc.cli.console import clear_errors, console, wrote

if TYPE_CHECKING:
    from reasonalloc.calibration.stability import Stability
    from reasonalloc.policies.allocation import DemandProfile

profile_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at demand profiles, compare and merge them."
)

Budget = Annotated[int, typer.Option("--budget", "-b", min=1, help="Mean tokens per head that budgets are shown for.")]
Picture = Annotated[Path | None, typer.Option(help="Also draw it (.png).")]
File = Annotated[Path, typer.Argument(help="A profile made by `reasonalloc calibrate`.")]


@profile_app.command("show")
def show(profile: File, budget: Budget = 128, plot: Picture = None) -> None:
    """Print what was measured and the budgets that follow.

    The wave over layers with its bootstrap band, the heads' spread, and budgets.
    """
    with clear_errors():
        from reasonalloc.calibration.stability import bootstrap
        from reasonalloc.policies.allocation import DemandProfile

        found = DemandProfile.load(profile)
        bands = bootstrap(found, budget=budget)
        if plot is not None:
            from reasonalloc.evaluation.plots import plot_profile

            plot_profile(found, bands, plot)
        print_profile(found, bands)
        if plot is not None:
            wrote(f"wrote {plot}")


def print_profile(profile: DemandProfile, bands: Stability) -> None:
    """The tables of ``profile show``."""
    from reasonalloc.calibration.stability import head_skew

    rho, budget = profile.reference_rho, bands.budget
    error, heads = profile.layer_standard_error(rho), profile.head_demand(rho)
    tokens = sum(prompt.tokens for prompt in profile.prompts)
    name = profile.source.get("model") or profile.architecture.get("model_type") or "a model"
    table = Table(
        title=f"{name}: {len(profile.prompts)} prompts, {tokens} tokens generated, {profile.rows} positions measured",
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
    )
    skew, low, high = head_skew(profile, rho)
    between = f" [{low:.1f}, {high:.1f}]" if bands.prompts > 1 else ""
    console.print(
        f"inside a layer the neediest query head asks for {skew:.1f}{between} times as much as the least needy one "
        "(median over layers)",
    )
    for scorer in profile.grids:
        _print_curves(profile, scorer)
        for line in dict.fromkeys([*_by_losses(profile, scorer, budget), *_by_misses(profile, scorer, bands)]):
            console.print(line)
    advice = bands.advice()
    if advice:
        console.print(Text.assemble(("note:", "yellow"), f" {advice}."))


def _print_curves(profile: DemandProfile, scorer: str) -> None:
    """What a scorer's evictions cost at each budget."""
    grid, losses = profile.grids[scorer], scorer in profile.prompts[0].losses
    how = f"a round every {grid.interval} tokens" + (", the prompt protected" if grid.protect_prompt else "")
    console.print(f"what {scorer}'s evictions cost, by tokens per head ({how}):")
    table = Table()
    headings = ("budget", "attention on evicted tokens", *(("nats per token lost",) if losses else ()))
    for heading in headings:
        table.add_column(heading, justify="right")
    columns = [[f"{budget}" for budget in grid.budgets], [f"{x:.1%}" for x in profile.miss_curves(scorer).mean((1, 2))]]
    if losses:
        columns.append([f"{x:.3g}" for x in profile.loss_curves(scorer).sum((1, 2))])
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    console.print(table)


def _by_misses(profile: DemandProfile, scorer: str, bands: Stability) -> list[str]:
    """What ``missalloc`` makes of a profile and how far that can be trusted, or why it makes nothing of it."""
    import numpy as np

    from reasonalloc.calibration.stability import bootstrap_miss_curves

    try:
        split = bootstrap_miss_curves(profile, scorer, bands.budget)
    except ValueError as error:
        return [str(error)]
    median, most = float(np.median(split.widths)), float(split.widths.max())
    uncertain = (
        f"; uncertain: the {bands.level:.0%} band of a head's budget is {median:.0%} of it wide for the median head, "
        f"{most:.0%} for the least certain one"
    )
    return [
        f"budgets by miss curves (missalloc) at {bands.budget}: {split.budgets.min()} to {split.budgets.max()} tokens "
        f"per KV head{uncertain if bands.prompts > 1 else ''}"
    ]


def _by_losses(profile: DemandProfile, scorer: str, budget: int) -> list[str]:
    """What ``lossalloc`` makes of a profile, and whether it agrees with the wave; nothing without loss curves."""
    from reasonalloc.calibration.compare import correlation
    from reasonalloc.policies.allocation import LossCurveLayers
    from reasonalloc.policies.compression import Compression

    if scorer not in profile.prompts[0].losses:
        return []
    try:
        policy = LossCurveLayers(scorer=scorer)
        window = Compression(budget, scorer, layers="uniform", heads="uniform").kept_window
        budgets = policy.budgets(profile.shape, budget, window, profile)
        related, low, high = correlation(profile.layer_demand(profile.reference_rho), budgets.mean(1))
    except ValueError as error:
        return [str(error)]
    return [
        f"budgets by loss curves (lossalloc) at {budget}: {budgets.min()} to {budgets.max()} tokens per KV head; "
        f"layers' shares correlate with their demand by {related:.2f} [{low:.2f}, {high:.2f}]"
    ]


@profile_app.command("study")
def study(profile: File, budget: Budget = 128, plot: Picture = None) -> None:
    """Print what other settings would do to layer budgets.

    The settings are rho, the exponent gamma and the clip bounds.
    """
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
                f"[{choice.lower:g}, {choice.upper:g}]",
                f"{choice.budgets.min():.1f}",
                f"{choice.budgets.max():.1f}",
                f"{choice.moved:.1%}",
            )
        console.print(table)
        if plot is not None:
            wrote(f"wrote {plot}")


@profile_app.command("compare")
def compare_command(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles: one for each model and task.")],
    permutations: Annotated[int, typer.Option(min=1, help="Random relabellings of the test.")] = 9999,
    seed: Annotated[int, typer.Option(help="Of random numbers in relabelling.")] = 0,
) -> None:
    """Tell whether the wave is the model's or the task's.

    Prints distances, variance by level, and permutation tests.
    """
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
        )


@profile_app.command("merge")
def merge_command(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles of one model, measured alike.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The merged profile (.json).")],
) -> None:
    """Make one profile of several of one model.

    It is what measuring all their prompts together would have given.
    """
    with clear_errors():
        from reasonalloc.policies.allocation import DemandProfile, merge

        merged = merge([DemandProfile.load(path) for path in profiles], [str(path) for path in profiles])
        merged.save(output)
        wrote(f"wrote {output}: {len(merged.prompts)} prompts")


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
