"""Attention demand: how many tokens a query needs, and the demand profile of a model (its Reasoning Wave)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasonalloc.allocation.shape import ModelShape

SCHEMA = 1
Value = TypeVar("Value")


def attention_demand(weights: Float[Tensor, "*rows tokens"], rho: float) -> Float[Tensor, "*rows"]:
    """``N_rho`` of ReasonAlloc, section 4: the least number of tokens that hold ``rho`` of a row's attention.

    Args:
        weights: attention rows, each non-negative with sum 1; entries of absent tokens are 0.
        rho: share of the mass to cover, in (0, 1]; the paper uses 0.93.

    Returns:
        Whole numbers of tokens in the weights' dtype, at least 1.
    """
    covered = descending(weights).cumsum(-1)
    most = (weights > 0).sum(-1).clamp(min=1)  # rounding must not count absent tokens in
    return torch.minimum((covered < rho).sum(-1) + 1, most).to(weights.dtype)


def descending(x: Float[Tensor, "*rows items"]) -> Float[Tensor, "*rows items"]:
    """``x`` sorted along its last dimension, largest first; on the CPU by numpy, which is ten times as fast."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(x.detach().numpy(), axis=-1)).flip(-1)
    return x.sort(-1, descending=True).values


@dataclass(frozen=True)
class DemandProfile:
    """What the layers of one model ask for, measured offline; independent of any budget.

    Attributes:
        layers: mean demand per layer, in tokens (``N_rho`` averaged over queries, query heads and prompts).
        shape: the model's attention shape; a cache for another shape refuses the profile.
        model_type: the architecture's name in its configuration ("llama"), or "" where unknown.
        rho: share of attention mass that the demand covers.
    """

    layers: tuple[float, ...]
    shape: ModelShape
    model_type: str = ""
    rho: float = 0.93

    def __post_init__(self) -> None:
        if len(self.layers) != self.shape.layers:
            raise ValueError(
                f"the profile has {len(self.layers)} layer demands for a model of {self.shape.layers} layers"
            )
        if not all(math.isfinite(d) and d >= 0 for d in self.layers):
            raise ValueError(f"layer demands must be finite and not negative, got {list(self.layers)}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {self.rho}")

    def check(self, shape: ModelShape, model_type: str) -> None:
        """Raise ``ValueError``, naming every difference, if the profile is of another model."""
        own, other = (
            {"model_type": self.model_type, **vars(self.shape)},
            {"model_type": model_type, **vars(shape)},
        )
        if not self.model_type:  # a profile made by hand may leave the name out
            own.pop("model_type")
        different = [f"{key}: profile {own[key]!r}, model {other[key]!r}" for key in own if own[key] != other[key]]
        if different:
            raise ValueError(
                "the demand profile belongs to another model (" + "; ".join(different) + "); "
                "calibrate this model, or choose layers='uniform' or layers='dynamic', which need no profile"
            )

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values, as ``load`` reads them."""
        return {
            "schema": SCHEMA,
            "kind": "reasonalloc-demand-profile",
            "model": {"model_type": self.model_type, **vars(self.shape)},
            "rho": self.rho,
            "demand": {"layers": list(self.layers)},
        }

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
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{path}: expected a demand profile of schema {SCHEMA}, found {found!r}")
        read = _FieldReader(path, data)
        shape = {name: read(int, "model", name) for name in ("layers", "kv_heads", "query_heads", "head_dim")}
        return cls(
            layers=tuple(read(_floats, "demand", "layers")),
            shape=ModelShape(**shape),
            model_type=read(str, "model", "model_type"),
            rho=read(float, "rho"),
        )

    def tensor(self) -> Float[Tensor, "layers"]:
        """The layer demands as float64."""
        return torch.tensor(self.layers, dtype=torch.float64)


@dataclass(frozen=True)
class _FieldReader:
    """Reads one field of a JSON document; whatever is wrong with it, the error names the file and the field."""

    path: Path
    data: dict[str, Any]

    def __call__(self, kind: Callable[[Any], Value], *names: str) -> Value:
        value: Any = self.data
        try:
            for name in names:
                value = value[name]
            return kind(value)
        except (KeyError, TypeError, ValueError) as error:
            problem = "is missing" if isinstance(error, KeyError) else f"is wrong ({error})"
            raise ValueError(f"{self.path}: field {'.'.join(names)} of the demand profile {problem}") from error


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]
