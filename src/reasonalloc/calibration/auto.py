"""``profile="auto"``: the model's own profile, or one from the user's cache folder, calibrated once for each model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasonalloc.calibration import CalibrationSettings
from reasonalloc.calibration.calibrate import Progress, calibrate
from reasonalloc.engines.models import architecture, model_shape
from reasonalloc.engines.transformers.loading import load, to_stderr
from reasonalloc.files import cache_folder
from reasonalloc.policies.allocation import DemandProfile
from reasonalloc.policies.allocation.profile import SCHEMA
from reasonalloc.policies.compression import Compression

SETTINGS = CalibrationSettings(max_new_tokens=512, miss=("rkv",))
SHIPPED = "demand_profile.json"  # in a model's folder: comes before any calibration
_WEIGHTS = {".safetensors", ".bin", ".gguf"}


def auto_profile_path(config: Any) -> Path:
    """Where the profile of this model is kept: by its name, its revision or its files, and its architecture."""
    folder = Path(config.name_or_path).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.is_file() else []
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.suffix in _WEIGHTS]
    name = str(folder.resolve()) if files else config.name_or_path
    revision = getattr(config, "_commit_hash", None)
    known = [SCHEMA, name, revision, weights, vars(model_shape(config)), architecture(config)]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "profiles" / f"{folder.name or 'model'}-{key}.json"


def auto_profile(
    config: Any,
    compression: Compression,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = to_stderr,
) -> DemandProfile:
    """The model's profile; where there is none yet, calibrate on the eight built-in prompts and keep the result.

    A ``demand_profile.json`` in the model's folder is taken as it is.

    Args:
        config: the model's configuration.
        compression: what the profile is for.
        model, tokenizer: the model itself, if it is at hand. Else it is loaded from ``config.name_or_path``, for a
            while beside the user's own: calibrate beforehand where memory is short.
        progress: of a calibration, see ``calibrate``.
        say: gets a sentence when one begins.

    Raises:
        ValueError: the configuration does not say where the model is, it cannot be loaded from there, or the
            compression needs what only an explicit calibration measures.
    """
    shipped = Path(config.name_or_path).expanduser() / SHIPPED
    if config.name_or_path and shipped.is_file():
        return DemandProfile.load(shipped)
    for policy in (compression.layer_allocator, compression.head_allocator):
        options = policy.calibrate_options
        if options not in ("", *(f"--miss {scorer}" for scorer in SETTINGS.miss)):
            raise ValueError(
                f"profile='auto' measures demand and the miss curves of {', '.join(SETTINGS.miss)} only: "
                f"run `reasonalloc calibrate --model MODEL {options} -o profile.json` and pass profile='profile.json'"
            )
    path = auto_profile_path(config)
    if path.exists():
        return DemandProfile.load(path)
    if model is None or tokenizer is None:
        if not config.name_or_path:
            raise ValueError(
                "profile='auto' cannot tell where this model comes from (config.name_or_path is empty): "
                "calibrate it with `reasonalloc calibrate` or reasonalloc.calibrate and pass the profile"
            )
        model, tokenizer = load(config.name_or_path, say=say)
    say(f"calibrating {config.name_or_path or 'the model'} once (profile='auto'); kept in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    profile = calibrate(model, tokenizer, settings=SETTINGS, partial=partial, progress=progress)
    profile.save(path)
    partial.unlink(missing_ok=True)
    return profile
