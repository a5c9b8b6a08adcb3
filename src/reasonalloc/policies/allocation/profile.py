"""The demand profile: what calibration measured on one model, prompt by prompt, and what allocators read from it.

Everything is kept as sums per prompt, so that profiles merge exactly, and intervals come from a bootstrap over prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from reasonalloc.policies.allocation.shape import ModelShape

SCHEMA = 2
KIND = "reasonalloc-demand-profile"
PAPER_RHO = 0.93
QUANTILES = (0.1, 0.5, 0.9)
# Upper edges of the histogram of N_rho: single tokens up to 16, then four bins an octave, up to 2 ** 24 tokens.
HISTOGRAM_EDGES: tuple[int, ...] = (*range(1, 17), *(int(2 ** (4 + step / 4)) for step in range(1, 81)))

Floats = np.ndarray[Any, np.dtype[np.float64]]
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class PromptDemand:
    """What one prompt's chain of thought asked for.

    Attributes:
        hash: SHA-256 of the prompt's text (hexadecimal).
        rows: decode positions that were measured.
        sums: ``N_rho`` summed over the positions, for each rho, layer and query head (whole numbers).
        misses: for each simulated scorer the attention mass that fell on tokens it had evicted, summed over the
            positions, at each of its grid's budgets, per layer and key/value head (mean over its query heads).
        task: a label, for comparisons.
        tokens: generated tokens.
        sensitivity: rise of the answer's negative log-likelihood, in nats over all its tokens, when one key/value head
            alone keeps only a short window; None if it was not measured.
    """

    hash: str
    rows: int
    sums: Float[Floats, "rhos layers query_heads"]
    misses: Mapping[str, Float[Floats, "budgets layers kv_heads"]] = field(default_factory=dict)
    task: str = ""
    tokens: int = 0
    sensitivity: Float[Floats, "layers kv_heads"] | None = None


@dataclass(frozen=True)
class MissGrid:
    """Where a scorer's miss curves were simulated.

    Attributes:
        budgets: tokens per head, ascending.
        interval: decoded tokens between two simulated compressions.
    """

    budgets: tuple[int, ...]
    interval: int

    def __post_init__(self) -> None:
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"budgets of miss curves must be positive and ascending, got {list(self.budgets)}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")


@dataclass(frozen=True, eq=False)
class DemandProfile:
    """The calibration artefact of one model: attention demand, and miss curves where they were asked for.

    Independent of any budget: allocators compute budgets from it for any total.

    Attributes:
        shape: the model's attention shape; a cache for another shape refuses the profile.
        rhos: shares of attention mass that demand was measured for, ascending.
        prompts: one record for each prompt, in the order of their hashes.
        architecture: what else tells models apart ("model_type", "hidden_size", ...); empty for a profile by hand.
        histogram: how many rows of each layer and query head fell into each bin of ``HISTOGRAM_EDGES``, for the
            rho nearest the paper's; None for a profile by hand.
        grids: where the miss curves of each scorer were simulated.
        settings: how it was measured; merged profiles must agree on it.
        source: the model's name and revision, its dtype, the library's version. A cache does not look at it; profiles
            of different sources are not merged.
    """

    shape: ModelShape
    rhos: tuple[float, ...]
    prompts: tuple[PromptDemand, ...]
    architecture: Mapping[str, Any] = field(default_factory=dict)
    histogram: Int[np.ndarray[Any, Any], "layers query_heads bins"] | None = None
    grids: Mapping[str, MissGrid] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(sorted(self.prompts, key=lambda prompt: prompt.hash)))
        check_rhos(self.rhos)
        if not self.prompts:
            raise ValueError("prompts are missing: a profile needs at least one")
        twice = [a.hash for a, b in pairwise(self.prompts) if a.hash == b.hash]
        if twice:
            raise ValueError(f"prompts counted twice: {', '.join(twice)}")
        for prompt in self.prompts:
            self._check_prompt(prompt)
        if len({prompt.sensitivity is None for prompt in self.prompts}) > 1:
            raise ValueError("sensitivity was measured on some prompts only")
        if self.histogram is not None:
            wanted = (self.shape.layers, self.shape.query_heads, len(HISTOGRAM_EDGES))
            if self.histogram.shape != wanted:
                raise ValueError(f"histogram has shape {self.histogram.shape}, expected {wanted}")

    def _check_prompt(self, prompt: PromptDemand) -> None:
        wanted = (len(self.rhos), self.shape.layers, self.shape.query_heads)
        if prompt.sums.shape != wanted:
            raise ValueError(
                f"sums of prompt {prompt.hash[:8]} have shape {prompt.sums.shape}, "
                f"expected {wanted} (rhos, layers, query heads)"
            )
        if prompt.rows < 1:
            raise ValueError(f"rows of prompt {prompt.hash[:8]} must be at least 1, got {prompt.rows}")
        if set(prompt.misses) != set(self.grids):
            raise ValueError(
                f"misses of prompt {prompt.hash[:8]} are of {sorted(prompt.misses)}, not {sorted(self.grids)}"
            )
        for name, values in (("sums", prompt.sums), *((f"misses.{name}", v) for name, v in prompt.misses.items())):
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"{name} of prompt {prompt.hash[:8]} must be finite and not negative")
        heads = (self.shape.layers, self.shape.kv_heads)
        if prompt.sensitivity is not None and (
            prompt.sensitivity.shape != heads or not np.isfinite(prompt.sensitivity).all()
        ):
            raise ValueError(f"sensitivity of prompt {prompt.hash[:8]} must be {heads[0]} x {heads[1]} finite numbers")
        for scorer, values in prompt.misses.items():
            wanted = (len(self.grids[scorer].budgets), self.shape.layers, self.shape.kv_heads)
            if values.shape != wanted:
                raise ValueError(f"misses.{scorer} have shape {values.shape}, expected {wanted}")

    @classmethod
    def of_layers(
        cls, layers: Sequence[float], shape: ModelShape, model_type: str = "", rho: float = PAPER_RHO
    ) -> DemandProfile:
        """A profile by hand: one demand in tokens for each layer, the same for its heads.

        Raises:
            ValueError: another number of layers than the model has, or a negative or non-finite demand.
        """
        if len(layers) != shape.layers:
            raise ValueError(f"the profile has {len(layers)} layer demands for a model of {shape.layers} layers")
        if not all(math.isfinite(d) and d >= 0 for d in layers):
            raise ValueError(f"layer demands must be finite and not negative, got {list(layers)}")
        sums = np.repeat(np.array(layers, dtype=np.float64)[None, :, None], shape.query_heads, 2)
        architecture = {"model_type": model_type} if model_type else {}
        return cls(shape, (rho,), (PromptDemand("by hand", 1, sums),), architecture)

    # ---- what allocators and readers ask ----

    def rho_index(self, rho: float) -> int:
        """Where ``rho`` stands in ``rhos``. Raises ``ValueError`` naming those that were measured."""
        near = [i for i, known in enumerate(self.rhos) if abs(known - rho) < 1e-9]
        if not near:
            raise ValueError(f"the profile has no demand for rho={rho}; measured: {', '.join(map(str, self.rhos))}")
        return near[0]

    @property
    def reference_rho(self) -> float:
        """The measured rho nearest the paper's 0.93: that of the histogram."""
        return min(self.rhos, key=lambda rho: abs(rho - PAPER_RHO))

    @property
    def rows(self) -> int:
        """Decode positions measured, over all prompts."""
        return sum(prompt.rows for prompt in self.prompts)

    def head_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers query_heads"]:
        """Mean ``N_rho`` of each query head over all measured positions, in tokens."""
        at = self.rho_index(rho)
        return _total([prompt.sums[at] for prompt in self.prompts]) / self.rows

    def kv_head_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers kv_heads"]:
        """Mean ``N_rho`` of each key/value head: the mean of its query heads."""
        return self.head_demand(rho).reshape(self.shape.layers, self.shape.kv_heads, -1).mean(-1)

    def layer_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "layers"]:
        """Mean ``N_rho`` of each layer over positions and query heads: the Reasoning Wave, in tokens."""
        at = self.rho_index(rho)
        total = _total([prompt.sums[at].sum(-1) for prompt in self.prompts])
        return total / (self.rows * self.shape.query_heads)

    def prompt_layer_demand(self, rho: float = PAPER_RHO) -> Float[Floats, "prompts layers"]:
        """Each prompt's own wave."""
        at = self.rho_index(rho)
        return np.stack([prompt.sums[at].mean(-1) / prompt.rows for prompt in self.prompts])

    def layer_standard_error(self, rho: float = PAPER_RHO) -> Float[Floats, "layers"]:
        """Standard error of ``layer_demand`` over prompts (as a ratio of sums); NaN for a single prompt."""
        at, n = self.rho_index(rho), len(self.prompts)
        if n < 2:
            return np.full(self.shape.layers, math.nan)
        rows = np.array([prompt.rows for prompt in self.prompts], dtype=np.float64)
        sums = np.stack([prompt.sums[at].mean(-1) for prompt in self.prompts])
        residual = sums - rows[:, None] * self.layer_demand(rho)
        return np.sqrt((residual**2).sum(0) * n / (n - 1)) / rows.sum()

    def quantiles(self, shares: Sequence[float] = QUANTILES) -> Float[Floats, "shares layers query_heads"]:
        """Quantiles of ``N_rho`` over positions at ``reference_rho``, as the upper edge of the histogram's bin.

        Raises ``ValueError`` for a profile without a histogram.
        """
        if self.histogram is None:
            raise ValueError("a profile by hand has no quantiles")
        covered = self.histogram.cumsum(-1) / self.histogram.sum(-1, keepdims=True)
        edges = np.array(HISTOGRAM_EDGES, dtype=np.float64)
        return np.stack([edges[(covered < share).sum(-1).clip(max=len(edges) - 1)] for share in shares])

    def miss_curves(self, scorer: str) -> Float[Floats, "budgets layers kv_heads"]:
        """Mean share of attention that falls on evicted tokens, at the budgets of ``grids[scorer]``.

        Raises ``ValueError`` if the profile has no curves of that scorer.
        """
        if scorer not in self.grids:
            raise ValueError(
                f"the profile has no miss curves of {scorer!r} (it has: {', '.join(self.grids) or 'none'}); "
                f"calibrate with --miss {scorer}"
            )
        return _total([prompt.misses[scorer] for prompt in self.prompts]) / self.rows

    def loss_sensitivity(self) -> Float[Floats, "layers kv_heads"]:
        """Rise of the loss per token when one head alone forgets, in nats; negative where forgetting helps.

        Raises ``ValueError`` if it was not measured.
        """
        parts = [prompt.sensitivity for prompt in self.prompts if prompt.sensitivity is not None]
        if not parts:
            raise ValueError("the profile has no loss sensitivity; calibrate with --sensitivity")
        return _total(parts) / sum(prompt.tokens for prompt in self.prompts)

    def check(self, shape: ModelShape, architecture: Mapping[str, Any]) -> None:
        """Raise ``ValueError``, naming every difference, if the profile is of another model."""
        own, other = ({**vars(self.shape), **self.architecture}, {**vars(shape), **architecture})
        different = differences(own, {key: other.get(key) for key in own}, "profile", "model")
        if different:
            raise ValueError(
                f"the demand profile belongs to another model ({different}); "
                "pass this model's own (`reasonalloc calibrate` makes it), or choose a method that needs none"
            )

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values, as ``load`` reads them; "summary" is for people and ignored there."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "source": dict(self.source),
            "model": {**vars(self.shape), "architecture": dict(self.architecture)},
            "settings": dict(self.settings),
            "rhos": list(self.rhos),
            "grids": {name: {"budgets": list(g.budgets), "interval": g.interval} for name, g in self.grids.items()},
            "summary": self._summary(),
            "histogram": None if self.histogram is None else _trimmed(self.histogram),
            "prompts": [
                {
                    "hash": prompt.hash,
                    "task": prompt.task,
                    "tokens": prompt.tokens,
                    "rows": prompt.rows,
                    "sums": _plain(prompt.sums),
                    "sensitivity": None if prompt.sensitivity is None else _plain(prompt.sensitivity),
                    "misses": {scorer: _plain(values) for scorer, values in prompt.misses.items()},
                }
                for prompt in self.prompts
            ],
        }

    def _summary(self) -> dict[str, Any]:
        rho = self.reference_rho
        error = self.layer_standard_error(rho)
        found = {
            "rho": rho,
            "rows": self.rows,
            "layer_demand": self.layer_demand(rho).round(4).tolist(),
            "layer_standard_error": None if np.isnan(error).any() else error.round(4).tolist(),
            "kv_head_demand": self.kv_head_demand(rho).round(4).tolist(),
        }
        if self.histogram is not None:
            found["query_head_quantiles"] = {
                str(share): values.astype(int).tolist()
                for share, values in zip(QUANTILES, self.quantiles(), strict=True)
            }
        return found

    def to_json(self) -> bytes:
        """``to_dict`` as the text of a file: one line for each field and each prompt."""
        data = self.to_dict()
        prompts = ",\n".join(json.dumps(prompt, separators=(",", ":")) for prompt in data.pop("prompts"))
        fields = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items())
        return f'{{\n{fields},\n"prompts": [\n{prompts}\n]\n}}\n'.encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's text (hexadecimal)."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> DemandProfile:
        """Read a profile from JSON.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not JSON, another schema, or a missing or wrong field; the message names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no demand profile at {path}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a demand profile: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
        if schema != SCHEMA or data.get("kind") != KIND:
            raise ValueError(
                f"{path}: expected a demand profile of schema {SCHEMA}, found {schema!r}; calibrate the model again"
            )
        try:
            return cls._from_fields(_FieldReader(path, data))
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    @classmethod
    def _from_fields(cls, read: _FieldReader) -> DemandProfile:
        shape = {name: read(int, "model", name) for name in ("layers", "kv_heads", "query_heads", "head_dim")}
        grids = {
            name: MissGrid(tuple(read(_ints, "grids", name, "budgets")), read(int, "grids", name, "interval"))
            for name in read(dict, "grids")
        }
        prompts = tuple(
            PromptDemand(
                hash=read(str, "prompts", i, "hash"),
                rows=read(int, "prompts", i, "rows"),
                sums=read(_array, "prompts", i, "sums"),
                misses={
                    name: read(_array, "prompts", i, "misses", name) for name in read(dict, "prompts", i, "misses")
                },
                task=read(str, "prompts", i, "task"),
                tokens=read(int, "prompts", i, "tokens"),
                sensitivity=read(_array_or_none, "prompts", i, "sensitivity"),
            )
            for i in range(len(read(list, "prompts")))
        )
        return cls(
            shape=ModelShape(**shape),
            rhos=tuple(read(_floats, "rhos")),
            prompts=prompts,
            architecture=read(dict, "model", "architecture"),
            histogram=read(_untrimmed, "histogram"),
            grids=grids,
            settings=read(dict, "settings"),
            source=read(dict, "source"),
        )


def check_rhos(rhos: Sequence[float]) -> None:
    """Validate shares of attention mass; raises ``ValueError``."""
    if not rhos or list(rhos) != sorted(set(rhos)) or not all(0 < rho <= 1 for rho in rhos):
        raise ValueError(f"rhos must be ascending shares in (0, 1], got {list(rhos)}")


def merge(profiles: Sequence[DemandProfile]) -> DemandProfile:
    """One profile of all prompts: to the last digit what measuring them together would have given.

    Raises:
        ValueError: nothing to merge, different models or settings (every difference is named), or a prompt that
            is in two of them.
    """
    if not profiles:
        raise ValueError("there is no profile to merge")
    first = profiles[0]
    for other in profiles[1:]:
        other.check(first.shape, first.architecture)
        own, theirs = _measured_with(first), _measured_with(other)
        different = differences(own, theirs, "one", "other")
        if different:
            raise ValueError(f"profiles measured differently cannot be merged ({different})")
    histograms = [profile.histogram for profile in profiles if profile.histogram is not None]
    return DemandProfile(
        first.shape,
        first.rhos,
        tuple(prompt for profile in profiles for prompt in profile.prompts),
        first.architecture,
        np.sum(histograms, axis=0) if len(histograms) == len(profiles) else None,
        first.grids,
        first.settings,
        first.source,
    )


def _measured_with(profile: DemandProfile) -> dict[str, Any]:
    grids = {f"miss {name}": vars(grid) for name, grid in profile.grids.items()}
    return {**profile.source, **profile.settings, "rhos": profile.rhos, **grids}


def differences(own: Mapping[str, Any], other: Mapping[str, Any], own_name: str, other_name: str) -> str:
    """Every key whose values differ, in words; empty if none does."""
    keys = [*own, *(key for key in other if key not in own)]
    return "; ".join(
        f"{key}: {own_name} {own.get(key)!r}, {other_name} {other.get(key)!r}"
        for key in keys
        if own.get(key) != other.get(key)
    )


def _total(parts: Sequence[Floats]) -> Floats:
    """Sum in the given order; with prompts in the order of their hashes, the same however profiles were merged."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def _plain(values: Floats) -> Any:
    """Nested lists; whole numbers as integers."""
    nested = values.tolist()

    def convert(x: Any) -> Any:
        if isinstance(x, list):
            return [convert(y) for y in x]
        return int(x) if x.is_integer() else x

    return convert(nested)


def _trimmed(histogram: np.ndarray[Any, Any]) -> list[list[list[int]]]:
    """Counts without the empty bins at each end of the list."""
    return [[np.trim_zeros(head, "b").tolist() for head in layer] for layer in histogram]


def _untrimmed(nested: Any) -> np.ndarray[Any, Any] | None:
    if nested is None:
        return None
    bins = len(HISTOGRAM_EDGES)
    return np.array([[[*_ints(head), *[0] * (bins - len(head))] for head in layer] for layer in nested], dtype=np.int64)


@dataclass(frozen=True)
class _FieldReader:
    """Reads one field of a JSON document; whatever is wrong with it, the error names the file and the field."""

    path: Path
    data: dict[str, Any]

    def __call__(self, kind: Callable[[Any], Value], *names: str | int) -> Value:
        value: Any = self.data
        try:
            for name in names:
                value = value[name]
            if kind in (dict, list, str) and not isinstance(value, kind):
                raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
            return kind(value)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            problem = "is missing" if isinstance(error, KeyError) else f"is wrong ({error})"
            raise ValueError(
                f"{self.path}: field {'.'.join(map(str, names))} of the demand profile {problem}"
            ) from error


def _array(values: Any) -> Floats:
    return np.array(values, dtype=np.float64)


def _array_or_none(values: Any) -> Floats | None:
    return None if values is None else _array(values)


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
