"""The few numbers about a model that budgets depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Counts of a decoder with full attention in every layer, as one process holds it.

    Attributes:
        layers: decoder layers.
        kv_heads: key/value heads per layer.
        query_heads: query heads per layer, a multiple of ``kv_heads``.
        head_dim: channels per head.

    Raises:
        ValueError: a count below 1, or query heads that the key/value heads do not share evenly, when constructed.
    """

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads do not share {self.kv_heads} key/value heads evenly")

    def split(self, ranks: int) -> ModelShape:
        """What each of several tensor-parallel ranks holds: all layers, an equal part of the heads.

        Raises:
            ValueError: the heads cannot be split so.
        """
        if ranks < 1 or self.kv_heads % ranks:
            raise ValueError(f"{self.kv_heads} key/value heads cannot be split over {ranks} tensor-parallel ranks")
        return ModelShape(self.layers, self.kv_heads // ranks, self.query_heads // ranks, self.head_dim)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.kv_heads
