"""Calibrating a transformers model: it answers the probe prompts with its full cache, and is watched meanwhile."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from reasonalloc.calibration import CalibrationSettings, DemandProbe, ProbePrompt, built_in_prompts
from reasonalloc.calibration.loss_curves import loss_curves
from reasonalloc.calibration.probe import nine_digits
from reasonalloc.calibration.sensitivity import loss_sensitivity
from reasonalloc.engines.models import architecture, model_shape
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.loading import encode, end_tokens, model_name
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.policies.allocation import DemandProfile, PromptDemand, merge
from reasonalloc.policies.allocation.profile import differences
from reasonalloc.policies.compression import Compression
from reasonalloc.version import __version__

Progress = Callable[[str, int, int], None]  # what, how much of it is done, of how much at most
PROMPTS, WRITING, LOSS, SENSITIVITY = "prompts", "writing", "loss curves", "sensitivity"


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[ProbePrompt] | None = None,
    settings: CalibrationSettings | None = None,
    *,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> DemandProfile:
    """Measure a model's demand profile while it generates its own chains of thought (ReasonAlloc, section 4).

    Args:
        model: with attn_implementation="reasonalloc".
        tokenizer: its tokenizer; a chat template is used where there is one.
        prompts: what it is asked; None takes the eight built-in prompts.
        settings: how; None takes the defaults.
        partial: a file that holds what is finished after every batch. If it is there, it is gone on with; it is
            the caller's to delete.
        progress: called with (what, done, at most) as it goes: for "prompts" that are wholly measured, and for the
            phases "writing" (tokens), "loss curves" and "sensitivity", each in steps that take about equally long.
            At first once for each of them.

    Raises:
        UnsupportedModelError: see ``Cache``.
        ValueError: no prompts, a prompt twice or of one token, only texts too short to measure, or a partial
            file of another model or other settings.
    """
    settings = settings or CalibrationSettings()
    prompts = built_in_prompts() if prompts is None else list(prompts)
    if not prompts:
        raise ValueError("there is no prompt to calibrate on")
    texts = [prompt.text for prompt in prompts]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ValueError(f"prompts that are there twice would count twice; remove one of {twice[0][:60]!r}")
    parts = [] if partial is None or not partial.exists() else [_resume(partial, model, settings)]
    finished = {prompt.hash for part in parts for prompt in part.prompts}
    if finished - {prompt.hash for prompt in prompts}:
        raise ValueError(f"{partial} was begun with other prompts; delete it to start again")
    meter = _Meter(progress, settings, len(prompts), len(finished), model_shape(model.config).layers)
    for first in range(0, len(prompts), settings.batch_size):
        group = prompts[first : first + settings.batch_size]
        batch = [prompt for prompt in group if prompt.hash not in finished]
        if batch:
            measured = _measure(model, tokenizer, batch, settings, meter)
            parts = [merge([*parts, measured])] if measured is not None else parts
            if partial is not None and parts:
                parts[0].save(partial)
            meter.batch_done(len(batch))
    if not parts:
        raise ValueError(
            f"nothing to measure: every text ended before it had {settings.least_tokens} tokens; "
            "allow more new tokens, or ask longer questions"
        )
    return parts[0]


class _Meter:
    """Progress: what is done of each phase, in steps; for every prompt as many as it may take at most."""

    def __init__(
        self, progress: Progress | None, settings: CalibrationSettings, prompts: int, finished: int, layers: int
    ) -> None:
        self.progress, self.prompts, self.finished = progress, prompts, finished
        self.each = {WRITING: settings.max_new_tokens}
        if settings.loss:
            self.each[LOSS] = len(settings.loss) * len(settings.miss_budgets)
        if settings.sensitivity_window is not None:
            self.each[SENSITIVITY] = layers * (layers + 1) // 2  # under test is a layer, and all above it run
        self.batch_done(0)

    def advance(self, phase: str, steps: int) -> None:
        """So many steps of the current batch are done."""
        if self.progress is not None:
            self.progress(phase, self.finished * self.each[phase] + steps, self.prompts * self.each[phase])

    def batch_done(self, prompts: int) -> None:
        """A batch is finished, however many steps it needed."""
        self.finished += prompts
        for phase in self.each:
            self.advance(phase, 0)
        if self.progress is not None:
            self.progress(PROMPTS, self.finished, self.prompts)


def _resume(partial: Path, model: Any, settings: CalibrationSettings) -> DemandProfile:
    try:
        found = DemandProfile.load(partial)
        found.check(model_shape(model.config), architecture(model.config))
    except ValueError as error:
        raise ValueError(f"cannot go on with {partial}; delete it to start again ({error})") from error
    changed = differences(
        {**found.source, **found.settings, "rhos": found.rhos, "miss": dict(found.grids)},
        {**_source(model), **settings.describe(), "rhos": settings.rhos, "miss": settings.grids},
        "begun with",
        "now",
    )
    if changed:
        raise ValueError(f"{partial} was begun with other settings ({changed}); delete it to start again")
    return found


def _source(model: Any) -> dict[str, Any]:
    return {
        "model": model_name(model.config),
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "library": __version__,
    }


def _measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[ProbePrompt],
    settings: CalibrationSettings,
    meter: _Meter,
) -> DemandProfile | None:
    """The profile of one batch of prompts; None if every text was too short to measure."""
    shape = model_shape(model.config)
    probe_settings = settings.probe()
    probe = DemandProbe(shape, probe_settings)
    cache = Cache(model.config, Compression(None, interval=probe_settings.block), probe=probe)
    inputs = encode(tokenizer, [prompt.text for prompt in prompts], True, model.device)
    if inputs["input_ids"].shape[1] < 2:
        raise ValueError(f"a prompt of one token cannot be measured: {prompts[0].text!r}")
    answers = _generate(model, inputs, cache, probe, prompts, settings, meter)
    records = probe.results([p.hash for p in prompts], [p.task for p in prompts], [len(a) for a in answers])
    short = [prompt.text for prompt, record in zip(prompts, records, strict=True) if not record.rows]
    if short:
        warnings.warn(
            f"{len(short)} of {len(prompts)} texts ended before they had {settings.least_tokens} tokens and do not "
            f"count, the first to {short[0][:60]!r}",
            stacklevel=3,
        )
    records = _with_losses(model, inputs, records, answers, settings, meter)
    records = [record for record in records if record.rows]
    if not records:
        return None
    return DemandProfile(
        shape=shape,
        rhos=settings.rhos,
        prompts=tuple(records),
        architecture=architecture(model.config),
        histogram=probe.histogram,
        grids=settings.grids,
        settings=settings.describe(),
        source=_source(model),
    )


@torch.no_grad()
def _generate(
    model: Any,
    inputs: dict[str, Tensor],
    cache: Cache,
    probe: DemandProbe,
    prompts: Sequence[ProbePrompt],
    settings: CalibrationSettings,
    meter: _Meter,
) -> list[list[int]]:
    """Decode until every sequence has ended; returns the tokens that each was given.

    A finished sequence stays in the batch up to the end of the probe's block, so that blocks begin and end at the same
    steps for all; the probe is told where it ended.
    """
    draw = _Draw(prompts, settings, model.device)
    ends = end_tokens(model.generation_config) or end_tokens(model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    running = set(alive)
    mask = inputs["attention_mask"]
    logits = model(
        **inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_ARGUMENT: cache}, logits_to_keep=1
    ).logits
    position = mask.sum(-1, keepdim=True)
    for step in range(settings.max_new_tokens):
        tokens = draw(logits[:, -1], alive)
        for row, token in zip(alive, tokens, strict=True):
            if row not in running:
                continue
            answers[row].append(token)
            if token in ends:
                running.discard(row)
                probe.finish(row, step)
        if not running:
            break
        if step % probe.settings.block == 0 and step and len(running) < len(alive):
            keep = [i for i, row in enumerate(alive) if row in running]
            alive, tokens = [alive[i] for i in keep], [tokens[i] for i in keep]
            mask, position = mask[keep], position[keep]
            cache.batch_select_indices(torch.tensor(keep))
            probe.select_sequences(keep)
        ids = torch.tensor(tokens, device=model.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            ids, attention_mask=mask, position_ids=position, **{CACHE_ARGUMENT: cache}, logits_to_keep=1
        ).logits
        position = position + 1
        meter.advance(WRITING, (step + 1) * len(prompts))
    meter.advance(WRITING, settings.max_new_tokens * len(prompts))
    cache.ragged.flush()
    return answers


def _with_losses(
    model: Any,
    inputs: dict[str, Tensor],
    records: list[PromptDemand],
    answers: list[list[int]],
    settings: CalibrationSettings,
    meter: _Meter,
) -> list[PromptDemand]:
    """The records with what each answer loses when heads forget: loss curves and loss sensitivity."""
    found: list[PromptDemand] = []
    layers = model_shape(model.config).layers

    def steps(phase: str, sizes: Iterator[int]) -> Callable[[], None]:
        """Called after each of these many steps of one measurement of one answer."""
        done = len(found) * meter.each[phase]

        def advance() -> None:
            nonlocal done
            done += next(sizes)
            meter.advance(phase, done)

        return advance

    for i, record in enumerate(records):
        if not record.rows:  # a text too short to count
            found.append(record)
            continue
        prompt = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        ids = torch.cat([prompt, torch.tensor(answers[i], device=prompt.device)])
        if settings.loss:
            grids = {scorer: settings.grids[scorer] for scorer in settings.loss}
            advance = steps(LOSS, repeat(1))
            losses = loss_curves(model, ids, len(answers[i]), grids, settings.loss_points, advance)
            record = replace(record, losses={scorer: nine_digits(curves) for scorer, curves in losses.items()})
        if settings.sensitivity_window is not None:
            advance = steps(SENSITIVITY, iter(range(layers, 0, -1)))
            rises = loss_sensitivity(model, ids, len(answers[i]), settings.sensitivity_window, advance)
            record = replace(record, sensitivity=rises.numpy())
        found.append(record)
    return found


def _seed(seed: int, prompt: str) -> int:
    """Each prompt draws from a stream of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:7], "big")


class _Draw:
    """Greedy or sampled tokens; each sequence has random numbers of its own, whatever batch it is in."""

    def __init__(self, prompts: Sequence[ProbePrompt], settings: CalibrationSettings, device: torch.device) -> None:
        self.greedy = not settings.temperature
        self.generators = []
        for prompt in prompts:
            generator = torch.Generator(device=device)
            self.generators.append(generator.manual_seed(_seed(settings.seed, prompt.hash)))
        self.warpers = transformers.LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(transformers.TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                self.warpers.append(transformers.TopPLogitsWarper(settings.top_p))

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        if self.greedy:
            return logits.argmax(-1).tolist()
        chances = self.warpers(None, logits.float()).softmax(-1)
        chances = chances.to(self.generators[0].device)  # of a sharded model the logits may be elsewhere
        drawn = [torch.multinomial(chances[i], 1, generator=self.generators[row]) for i, row in enumerate(rows)]
        return torch.cat(drawn).tolist()
