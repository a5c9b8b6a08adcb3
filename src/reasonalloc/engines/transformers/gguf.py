"""GGUF files: converting their weights takes minutes, so it is done once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from reasonalloc.engines.transformers.checkpoint import whole_model
from reasonalloc.files import cache_folder

Progress = Callable[[int, int], None]  # tensors done, of how many
Say = Callable[[str], None]
_BLOCK = 1 << 22  # bytes read at once


def check_packages() -> None:
    """Raise ``ImportError`` where a package is missing that transformers reads GGUF files with."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ImportError(f"models as .gguf files need {package}: pip install 'reasonalloc[gguf]'")


def load_gguf(
    path: Path, dtype_name: str, options: dict[str, Any], progress: Progress, say: Say, keep: bool = True
) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file: the converted ones if they were kept, else converted and kept now.

    Args:
        path: of the file.
        dtype_name: "auto", "float32", ...: weights of each type are kept by themselves.
        options: of ``from_pretrained``.
        progress: called as tensors are converted.
        say: gets a sentence about what is kept and where.
        keep: what was converted; False where this process has only a part of the model.

    Raises:
        Exception: whatever transformers raises for a file that it cannot read.
    """
    kept = kept_folder(path, dtype_name)
    if kept.is_dir():
        try:
            return _load_kept(kept, path, options)
        except Exception as error:  # safetensors, json and transformers have dozens of errors for damaged files
            say(f"the converted weights in {kept} cannot be read ({type(error).__name__}): converting {path} again")
            shutil.rmtree(kept, ignore_errors=True)
    with _watched(progress):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        network = whole_model(str(path.parent), **options, **_gguf_options(path.name))
    if not keep:
        return network, tokenizer
    try:
        _keep(network, tokenizer, kept)
    except OSError as error:
        say(f"the converted weights of {path} could not be kept: {error}")
    else:
        size = sum(file.stat().st_size for file in kept.iterdir())
        say(f"kept the converted weights of {path} for next time: {size / 1e6:.0f} MB in {kept}; delete it at any time")
    return network, tokenizer


def kept_folder(path: Path, dtype_name: str) -> Path:
    """Where the converted weights are kept: by the file's content, their type and what converts them."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    found.update(f" {dtype_name} {transformers.__version__} {_version('gguf')}".encode())
    return cache_folder() / "converted" / f"{path.stem}-{found.hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _load_kept(kept: Path, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    if (kept / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(kept))
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return whole_model(str(kept), **options), tokenizer


def _keep(network: Any, tokenizer: Any, kept: Path) -> None:
    """Write the folder whole or not at all. A tokenizer that would not come back the same is left out."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{kept.name}.") as unfinished:
        folder, words = Path(unfinished) / "model", Path(unfinished) / "tokenizer"
        architectures = network.config.architectures
        network.save_pretrained(folder)
        network.config.architectures = architectures  # save_pretrained sets it
        network.config.save_pretrained(folder)
        tokenizer.save_pretrained(words)
        if _same(tokenizer, AutoTokenizer.from_pretrained(str(words))):
            for file in words.iterdir():
                file.rename(folder / file.name)
        for file in folder.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        try:
            folder.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another process was faster
                raise


def _same(one: Any, other: Any) -> bool:
    def described(tokenizer: Any) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return backend and (backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)

    return described(one) is not None and described(one) == described(other)


@contextmanager
def _watched(progress: Progress) -> Iterator[None]:
    """Within, transformers' own bar is silent and ``progress`` is called instead."""
    try:
        from transformers import modeling_gguf_pytorch_utils as converter
    except ImportError:  # a version that converts elsewhere: its own bar is shown
        yield
        return
    own = vars(converter).get("tqdm")

    def counted(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        every = list(tensors)
        for i, tensor in enumerate(every):
            progress(i, len(every))
            yield tensor
        progress(len(every), len(every))

    if own is not None:
        vars(converter)["tqdm"] = counted
    try:
        yield
    finally:
        if own is not None:
            vars(converter)["tqdm"] = own


def _gguf_options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"gguf_file": name}
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.23 GGUF weights are always dequantised
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}
