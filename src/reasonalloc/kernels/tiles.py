"""Tiles of a matrix, as all kernels load them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from reasonalloc.kernels.launch import INTERPRETED


def widens(dtype: torch.dtype) -> bool:
    """Whether tiles are made float32 before they are multiplied: the interpreter multiplies nothing narrower well."""
    return INTERPRETED and dtype != torch.float32


@triton.jit
def load_tile(source, at, there, width: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    """Rows ``at`` of a matrix of ``width`` columns; zeros where ``there`` is false, and in columns up to ``WIDTH``."""
    column = tl.arange(0, WIDTH)[None, :]
    tile = tl.load(source + at[:, None] * width + column, mask=there[:, None] & (column < width), other=0.0)
    return tile.to(tl.float32) if WIDEN else tile
