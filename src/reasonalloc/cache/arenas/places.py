"""Where the tokens of one step go, in one layer."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from reasonalloc.cache.spans import Spans


@dataclass(frozen=True)
class Places:
    """One token of each of several requests.

    Attributes:
        slots: of the tokens, in the pool's ``keys`` and ``values``.
        ring: rows of the pool for their queries, the last ones of their requests.
        spans: of these requests, the new tokens included. Accumulated attention is not part of them.
        due: arenas that have decoded an interval with this token.
    """

    slots: Int[Tensor, "batch*heads"]
    ring: Int[Tensor, "batch*query_heads"]
    spans: Spans
    due: list[int]
