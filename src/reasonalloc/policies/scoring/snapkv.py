"""SnapKV at decode time."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reasonalloc.policies.scoring.scorer import Observation, Scorer, register_scorer
from reasonalloc.policies.scoring.window_attention import check_kernel, pooled_importance


@register_scorer("snapkv")
@dataclass(frozen=True)
class SnapKV(Scorer):
    """SnapKV applied while decoding, as the R-KV paper's base line has it: R-KV's importance alone (lambda = 1).

    SnapKV itself (arXiv 2404.14469) compresses a prompt once; it sums over its queries and pools by average.

    Attributes:
        kernel: width of the max pooling, in tokens; odd.

    Raises:
        ValueError: an even kernel, or one below 1, when constructed.
    """

    kernel: int = 7

    observed_queries = 8

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def score(self, seen: Observation) -> Float[Tensor, "batch heads tokens"]:
        """Pooled attention of the last queries."""
        return pooled_importance(seen, self.kernel)
