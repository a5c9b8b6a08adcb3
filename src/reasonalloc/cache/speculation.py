"""Tokens that may be taken back: what was observed of them is settled once it is known which of them stay."""

from __future__ import annotations

from dataclasses import dataclass, field

from reasonalloc.cache.queries import Queries
from reasonalloc.cache.step import Chunk

SPECULATED = 1024  # tokens of a forward pass that can be rolled back


@dataclass
class Speculation:
    """A chunk of speculated tokens.

    Attributes:
        chunk: what came.
        queries: of each layer that has run. A whole prompt's, of all layers, would be larger than the cache: only the
            last ones are held, unless all of them are needed.
    """

    chunk: Chunk
    queries: list[Queries] = field(default_factory=list)

    def hold(self, queries: Queries, needed: int | None) -> None:
        """A layer's queries; ``needed``: how many of the last ones are read when all tokens stay, None: all."""
        some = queries if needed is None else queries.last(needed + SPECULATED)
        copied = len(some) < len(queries)  # so that the others can be freed
        self.queries.append(Queries(some.states.clone(), some.real) if copied else some)

    def without_last(self, columns: int) -> tuple[Chunk, list[Queries]]:
        """What stays when so many tokens are taken back.

        Raises:
            ValueError: more tokens than the chunk has, or than SPECULATED.
        """
        known = min(self.chunk.columns, SPECULATED)
        if not 0 <= columns <= known:
            raise ValueError(f"cannot roll back {columns} tokens of a compressed cache, only the last {known}")
        if not columns:
            return self.chunk, self.queries
        if self.chunk.real is not None:
            raise ValueError("cannot roll back a padded chunk: decode speculatively with batch size 1")
        return self.chunk.without_last(columns), [queries.without_last(columns) for queries in self.queries]
