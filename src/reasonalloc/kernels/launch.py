"""Where and how Triton's kernels are launched. Importing this does not import Triton."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU; its matrix product cannot read bfloat16
LEAST_WIDTH = 16  # of a side of a matrix product on tensor cores


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def serve(device: torch.device) -> bool:
    """Whether the kernels run on this device: on CUDA, where Triton is installed."""
    return device.type == "cuda" and _installed()


def padded(width: int) -> int:
    """The next power of two, at least what a matrix product takes."""
    return max(LEAST_WIDTH, 1 << max(0, width - 1).bit_length())


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors': make it theirs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
