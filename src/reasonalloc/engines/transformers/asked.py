"""The compression that a model's ``generation_config.json`` asks for, by its field ``reasonalloc``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from reasonalloc.engines.transformers.loading import local_path, on_hub
from reasonalloc.engines.transformers.names import FIELD
from reasonalloc.files import read_json
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.policies.written import compression_of

FILE = "generation_config.json"


def field_of(model: Any) -> Any:
    """What the field holds; None if there is none.

    ``model.generation_config`` counts. Where it has no such attribute, the file beside the model is read: transformers
    drops unknown fields of a file that says ``"_from_model_config": true``.
    """
    config = model.generation_config
    if hasattr(config, FIELD):
        return getattr(config, FIELD)
    return saved_field(model.config.name_or_path, _revision(model.config))


def compression_of_name(model: str, revision: str | None = None) -> tuple[dict[str, Any], Compression] | None:
    """What the field of a model that is not loaded asks for; None if it has none.

    Args:
        model: as for ``load``.
        revision: on the hub.

    Returns:
        The field, a profile in it as a path, and what it stands for.

    Raises:
        ValueError: there is no such model, or as ``compression_asked``.
    """
    path = local_path(model)
    source, local = (model, not on_hub(model)) if path is None else (str(path), True)
    field = saved_field(source, revision, local)
    if field is None:
        return None
    found = with_profile(field, source, revision, local)
    return found, compression_of(found, where(source))


def saved_field(source: str, revision: str | None = None, local: bool = False) -> Any:
    """What the field holds in the file beside a model; None if there is none.

    Args:
        source: the model's folder, or hub id.
        revision: on the hub.
        local: ask nothing of the hub.

    Raises:
        ValueError: the file is damaged.
    """
    path = _beside(source, FILE, revision, local) if source else None
    if path is None:
        return None
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found.get(FIELD) if isinstance(found, Mapping) else None


def compression_asked(field: Any, config: Any) -> Compression:
    """What the field of a loaded model stands for.

    Args:
        field: what ``field_of`` found.
        config: ``model.config``: a profile is looked for beside the model.

    Raises:
        ValueError: an unknown field, a bad value, or no such profile. One sentence that names file and field.
    """
    source = config.name_or_path
    return compression_of(with_profile(field, source, _revision(config)), where(source))


def with_profile(field: Any, source: str, revision: str | None = None, local: bool = False) -> Any:
    """The field's value, its profile as the path of a file beside the model.

    Raises:
        ValueError: there is none.
    """
    name = field.get("profile") if isinstance(field, Mapping) else None
    if not isinstance(name, str) or name == AUTO_PROFILE:
        return field
    path = _beside(source, name, revision, local)
    if path is None:
        raise ValueError(
            f"{where(source)}: there is no profile {name!r} beside the model, where it is looked for: put the file "
            "there, or write its whole path"
        )
    return {**field, "profile": str(path)}


def where(source: str) -> str:
    """The field's place, for messages."""
    return f"field {FIELD!r} in {FILE} of {source or 'the model'}"


def _revision(config: Any) -> str | None:
    return getattr(config, "_commit_hash", None)


def _beside(source: str, name: str, revision: str | None, local: bool) -> Path | None:
    """A file beside a model, or in the working folder for a model from nowhere; None if there is none."""
    folder = Path(source).expanduser()
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir() or Path(name).is_absolute():
        found = folder / name
        return found if found.is_file() else None
    try:
        return Path(cached_file(source, name, revision=revision, local_files_only=local))
    except OSError:
        return None
