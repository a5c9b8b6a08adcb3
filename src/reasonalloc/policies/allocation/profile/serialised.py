"""The profile's file: JSON, one line for each field and each prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from reasonalloc.files import read_json, sealed, unsealed
from reasonalloc.policies.allocation.profile.measurements import HISTOGRAM_EDGES, Floats, MissGrid, PromptDemand
from reasonalloc.policies.allocation.shape import ModelShape
from reasonalloc.policies.values import LARGEST, shown, whole_number

if TYPE_CHECKING:
    from reasonalloc.policies.allocation.profile.demand_profile import DemandProfile

SCHEMA = 2
KIND = "reasonalloc-demand-profile"
QUANTILES = (0.1, 0.5, 0.9)  # in the summary
Value = TypeVar("Value")


def to_document(profile: DemandProfile) -> dict[str, Any]:
    """The profile as plain JSON values; "summary" is for people and not read back."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "source": dict(profile.source),
        "model": {**vars(profile.shape), "architecture": dict(profile.architecture)},
        "settings": dict(profile.settings),
        "rhos": list(profile.rhos),
        "grids": {name: _grid(grid) for name, grid in profile.grids.items()},
        "summary": _summary(profile),
        "histogram": None if profile.histogram is None else _trimmed(profile.histogram),
        "prompts": [
            {
                "hash": prompt.hash,
                "task": prompt.task,
                "tokens": prompt.tokens,
                "rows": prompt.rows,
                "sums": _plain(prompt.sums),
                "sensitivity": None if prompt.sensitivity is None else _plain(prompt.sensitivity),
                "misses": {scorer: _plain(values) for scorer, values in prompt.misses.items()},
                **(
                    {"losses": {name: _plain(values) for name, values in prompt.losses.items()}}
                    if prompt.losses
                    else {}
                ),
            }
            for prompt in profile.prompts
        ],
    }


def _grid(grid: MissGrid) -> dict[str, Any]:
    found = {"budgets": list(grid.budgets), "interval": grid.interval}
    return {**found, "protect_prompt": True} if grid.protect_prompt else found


def to_text(document: dict[str, Any]) -> bytes:
    """A document as text."""
    fields = dict(document)
    prompts = ",\n".join(json.dumps(prompt, separators=(",", ":")) for prompt in fields.pop("prompts"))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items())
    return f'{{\n{lines},\n"prompts": [\n{prompts}\n]\n}}\n'.encode()


def to_file(document: dict[str, Any]) -> bytes:
    """A document as the text of a file: with its checksum."""
    return to_text(sealed(document))


def read_profile(path: Path) -> dict[str, Any]:
    """The arguments of ``DemandProfile`` that a file gives.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, not a demand profile of this schema, damaged, or a field is missing or wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no demand profile at {path}")
    document = read_json(path)
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if schema != SCHEMA or document.get("kind") != KIND:
        raise ValueError(f"expected a demand profile of schema {SCHEMA}, found {shown(schema)}")
    return profile_fields(unsealed(document))


def profile_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``DemandProfile`` that a document gives.

    Raises ``ValueError`` naming a missing or wrong field.
    """
    read = _FieldReader(document)
    names = ("layers", "kv_heads", "query_heads", "head_dim")
    prompts = tuple(_prompt(read, i) for i in range(len(read(list, "prompts"))))
    return {
        "shape": ModelShape(**{name: read(_whole, "model", name) for name in names}),
        "rhos": tuple(read(_floats, "rhos")),
        "prompts": prompts,
        "architecture": read(dict, "model", "architecture"),
        "histogram": read(lambda nested: _untrimmed(nested, [prompt.sums.shape for prompt in prompts]), "histogram"),
        "grids": {name: _read_grid(read, name) for name in read(dict, "grids")},
        "settings": read(dict, "settings"),
        "source": read(dict, "source"),
    }


@dataclass(frozen=True)
class _FieldReader:
    """Reads one field of a document; whatever is wrong with it, the error names the field."""

    document: dict[str, Any]

    def __call__(self, kind: Callable[[Any], Value], *names: str | int) -> Value:
        value: Any = self.document
        try:
            for name in names:
                value = value[name]
            if kind in (dict, list, str) and not isinstance(value, kind):
                raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
            return kind(value)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            problem = "is missing" if isinstance(error, KeyError) else f"is wrong ({error})"
            raise ValueError(f"field {'.'.join(map(str, names))} of the demand profile {problem}") from error


def _read_grid(read: _FieldReader, name: str) -> MissGrid:
    protect = "protect_prompt" in read(dict, "grids", name) and read(_truth, "grids", name, "protect_prompt")
    return MissGrid(tuple(read(_ints, "grids", name, "budgets")), read(_whole, "grids", name, "interval"), protect)


def _prompt(read: _FieldReader, i: int) -> PromptDemand:
    losses = read(dict, "prompts", i, "losses") if "losses" in read(dict, "prompts", i) else {}
    return PromptDemand(
        hash=read(str, "prompts", i, "hash"),
        rows=read(_whole, "prompts", i, "rows"),
        sums=read(_array, "prompts", i, "sums"),
        misses={name: read(_array, "prompts", i, "misses", name) for name in read(dict, "prompts", i, "misses")},
        task=read(str, "prompts", i, "task"),
        tokens=read(_whole, "prompts", i, "tokens"),
        sensitivity=read(_array_or_none, "prompts", i, "sensitivity"),
        losses={name: read(_array, "prompts", i, "losses", name) for name in losses},
    )


def _summary(profile: DemandProfile) -> dict[str, Any]:
    rho = profile.reference_rho
    error = profile.layer_standard_error(rho)
    found = {
        "rho": rho,
        "rows": profile.rows,
        "layer_demand": profile.layer_demand(rho).round(4).tolist(),
        "layer_standard_error": None if np.isnan(error).any() else error.round(4).tolist(),
        "kv_head_demand": profile.kv_head_demand(rho).round(4).tolist(),
    }
    if profile.histogram is not None:
        found["query_head_quantiles"] = {
            str(share): values.astype(int).tolist()
            for share, values in zip(QUANTILES, profile.quantiles(QUANTILES), strict=True)
        }
    return found


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


def _untrimmed(nested: Any, sums: list[tuple[int, ...]]) -> np.ndarray[Any, Any] | None:
    """The histogram with all its bins; it must have the layers and heads of the prompts' sums, by their shapes.

    Nothing is made of a size that the file only claims: every head has numbers there, and numbers here.
    """
    if nested is None:
        return None
    lists = isinstance(nested, list) and all(isinstance(layer, list) for layer in nested)
    found = (len(nested), *{len(layer) for layer in nested}) if lists else ()
    if {shape[1:] for shape in sums} != {found} or len(found) != 2:
        raise ValueError("it must have the layers and query heads of all sums")
    counted = np.zeros((*found, len(HISTOGRAM_EDGES)), dtype=np.int64)
    for layer, heads in enumerate(nested):
        for head, counts in enumerate(heads):
            counted[layer, head, : len(counts)] = _ints(counts)
    if (counted < 0).any() or not counted.any(-1).all():
        raise ValueError("counts of a head must not be negative, nor all 0")
    return counted


def _array(values: Any) -> Floats:
    found = np.array(values) if values else np.zeros(0)
    if found.dtype.kind not in "iuf":
        raise ValueError("numbers are needed")
    found = found.astype(np.float64)
    if not (np.abs(found) < LARGEST).all():
        raise ValueError("numbers must be below 2 ** 63")
    return found


def _whole(value: Any) -> int:
    number = whole_number(value)
    if not abs(number) < LARGEST:
        raise ValueError(f"{shown(value)} is not below 2 ** 63")
    return number


def _floats(values: Any) -> list[float]:
    found = _array(values)
    if found.ndim != 1:
        raise ValueError("a list of numbers is needed")
    return list(found.tolist())


def _array_or_none(values: Any) -> Floats | None:
    return None if values is None else _array(values)


def _ints(values: Any) -> list[int]:
    return [_whole(value) for value in values]


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{shown(value)} is neither true nor false")
    return value
