"""Whether what comes is the continuation of what a cache holds. What is not is refused, never answered wrongly.

A cache gets new tokens only: the model cuts off what the cache has seen already, by its length alone. So the text
itself is looked at where it can be had: ``generate`` has it. Elsewhere lengths, positions and masks must agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import HostInts

_REMEDY = "pass the whole text so far, or a new cache, or call reset() on this one"
_LOOPS = {"_prefill", "_assisted_decoding"}  # of transformers' generate: their ``input_ids`` is the text so far


class Continuation:
    """What a cache knows of the text in it.

    Attributes:
        padding: ``[rows, columns]``, False where a column of the text is padding; None while there is none. Columns
            beyond it are not padding.
        text: ``[rows, tokens]``, ids of the last prompt that ``generate`` brought, padding included, if it did.
    """

    def __init__(self) -> None:
        self.padding: Bool[Tensor, "rows columns"] | None = None
        self.text: Int[Tensor, "rows tokens"] | None = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences."""
        index = list(rows)
        self.padding = None if self.padding is None else self.padding[index]
        if self.padding is not None and bool(self.padding.all()):
            self.padding = None
        self.text = self.text[index] if self.text is not None and max(index, default=0) < len(self.text) else None

    def read(self, mask: Tensor | None, rows: HostInts, columns: int, seen: int) -> Chunk:
        """Which of the new tokens are real, and whether the mask shows all that is cached.

        Args:
            mask: ``[rows or 1, 1, queries, seen + columns]`` boolean, or None: everything is visible.
            rows: of the cache.
            columns: new tokens of each, padding included.
            seen: columns in the cache.

        Raises:
            ValueError: a mask of numbers, or one that hides cached tokens that are no padding, or shows padding.
        """
        if mask is None:
            if self.padding is not None:
                raise ValueError(
                    "the cached batch has padding, and no attention mask was passed: pass attention_mask for the whole "
                    "text, cached tokens included"
                )
            return Chunk.of(rows, columns)
        if mask.dtype != torch.bool:
            raise ValueError("a ragged cache reads boolean attention masks only; pass a 2-D padding mask")
        mask = mask[:, 0].expand(len(rows), -1, -1)
        # The last query sees every real new token. A copy, so that the mask of a chunk can be freed.
        chunk = Chunk.masked(rows, mask[:, -1, -columns:].clone())
        if seen:
            self._check(mask, chunk, seen)
        self._note(chunk, seen)
        return chunk

    def _check(self, mask: Bool[Tensor, "rows queries all"], chunk: Chunk, seen: int) -> None:
        past = torch.ones(len(mask), seen, dtype=torch.bool, device=mask.device)
        if self.padding is not None:
            width = min(seen, self.padding.shape[1])
            past[:, :width] = self.padding[:, :width]
        real = torch.ones_like(mask[:, 0, -chunk.columns :]) if chunk.real is None else chunk.real
        causal = torch.ones(chunk.columns, chunk.columns, dtype=torch.bool, device=mask.device).tril()
        wanted = torch.cat([past[:, None].expand(-1, chunk.columns, -1), causal & real[:, None]], 2)
        if mask.shape[-1] != wanted.shape[-1] or bool(((mask[:, -chunk.columns :] != wanted) & real[..., None]).any()):
            raise ValueError(
                "the attention mask hides tokens that are cached, or shows padding or later tokens: a ragged cache can "
                "hide nothing but the padding that it was told of when those tokens came; "
                "pass the 2-D padding mask of the whole text"
            )

    def _note(self, chunk: Chunk, seen: int) -> None:
        """Remember the chunk's padding."""
        if chunk.real is None:
            return
        known = torch.ones(len(chunk.real), seen, dtype=torch.bool, device=chunk.real.device)
        if self.padding is not None:
            width = min(seen, self.padding.shape[1])
            known[:, :width] = self.padding[:, :width]
        self.padding = torch.cat([known, chunk.real], 1)

    def check_positions(self, positions: object, chunk: Chunk, seen: HostInts, columns: int) -> None:
        """The first new token's position must be the number of tokens that the cache has seen of the row.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != chunk.columns:
            return
        positions = positions.expand(len(chunk.rows), -1)
        first = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        if chunk.real is not None:
            first = chunk.real.to(torch.uint8).argmax(1)
        found = positions.gather(1, first[:, None])[:, 0].tolist()
        for row, (position, known, new) in enumerate(zip(found, seen.tolist(), chunk.counts.tolist(), strict=True)):
            if new and position not in (known, columns):
                raise ValueError(
                    f"the new tokens of sequence {row} begin at position {position}, but the cache holds {known} "
                    f"tokens of it: this is not the continuation of the cached text; {_REMEDY}"
                )

    def check_text(self, seen: int, columns: int) -> int | None:
        """Compare the text that ``generate`` is going on with to the one it began with.

        Args:
            seen: columns in the cache.
            columns: new ones.

        Returns:
            Tokens of the text that ``generate`` has so far, padding included; None where it is not known.

        Raises:
            ValueError: they differ.
        """
        text = _text_of_generate()
        if text is None:
            return None
        if seen and text.shape[1] < seen + columns:  # new tokens only: they are no other text's beginning
            return None
        old, self.text = self.text, text
        if seen and old is not None:
            shared = min(old.shape[1], text.shape[1])
            if len(old) == len(text) and not torch.equal(old[:, :shared].to(text.device), text[:, :shared]):
                row = int((old[:, :shared].to(text.device) != text[:, :shared]).any(1).nonzero()[0])
                raise ValueError(
                    f"the cache holds {seen} tokens of another text (sequence {row} begins otherwise): this is not its "
                    f"continuation; {_REMEDY}"
                )
        return int(text.shape[1])


def _text_of_generate() -> Tensor | None:
    """The ids that transformers' generation loop is working on, if one of its loops called."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _LOOPS:
            text = frame.f_locals.get("input_ids")
            return text if isinstance(text, Tensor) and text.ndim == 2 else None
        frame = frame.f_back  # type: ignore[assignment]
    return None
