"""Whether what comes is the continuation of what a cache holds. What is not is refused, never answered wrongly.

A cache gets keys and values of new tokens only: ``generate`` cuts off what the cache has seen already, by its length
alone. So a cache remembers the ids of its text, which it finds in the model's own call, and compares them with the
text that ``generate`` was given. Where there are no ids, masks and positions must agree.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import HostInts

_REMEDY = "pass a new cache, or call reset() on this one"
GENERATE = inspect.unwrap(GenerationMixin.generate).__code__  # what a frame of ``generate`` runs


@dataclass(frozen=True)
class Call:
    """A call of ``generate``: what it was given.

    Attributes:
        text: ``[rows, tokens]``, ids, padding included.
        config: of this call alone: ``generate`` makes a copy each time.
        mask_columns: columns of the attention mask; None if unknown. More than the text's where only the text's newest
            tokens were passed.
    """

    text: Int[Tensor, "rows tokens"]
    config: GenerationConfig
    mask_columns: int | None


@dataclass(frozen=True)
class Origin:
    """Where new tokens come from.

    Attributes:
        ids: ``[rows, columns]``, theirs; None where the model was given something else (embeddings).
        call: the call of ``generate`` that is at work, if there is one.
    """

    ids: Int[Tensor, "rows columns"] | None
    call: Call | None

    @classmethod
    def find(cls, rows: int, columns: int) -> Origin:
        """Look among the functions that are at work: the model's has the new ids, transformers' ``generate`` its text.

        Neither is handed to a cache. Both names are part of transformers' public interface.
        """
        ids = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is GENERATE:
                return cls(ids, _call(frame))
            if ids is None and code.co_name == "forward" and "input_ids" in code.co_varnames:
                found = frame.f_locals.get("input_ids")
                if isinstance(found, Tensor) and found.shape == (rows, columns):
                    ids = found
            frame = frame.f_back
        return cls(ids, None)


def _call(frame: FrameType) -> Call | None:
    given = frame.f_locals
    text, config = given.get("input_ids"), given.get("generation_config")
    if not isinstance(text, Tensor) or text.ndim != 2 or not text.shape[1] or config is None:
        return None
    mask = given.get("model_kwargs", {}).get("attention_mask")
    # Since 5.24 a mask without padding is not passed on, and only its length is noted.
    return Call(text, config, getattr(config, "_mask_length", None) if mask is None else int(mask.shape[1]))


class Continuation:
    """What a cache knows of the text in it.

    Attributes:
        visible: ``[rows, room]``, False where a column of the text is padding; columns that are still to come are
            True. None while there is no padding.
        ids: ``[rows, room]``, of all columns that the cache has seen; None before the first, or if some were not to
            be had.
    """

    def __init__(self) -> None:
        self.visible: Bool[Tensor, "rows room"] | None = None
        self.ids: Int[Tensor, "rows room"] | None = None
        self._config: GenerationConfig | None = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat and reorder sequences."""
        index = list(rows)
        self.ids = None if self.ids is None else self.ids[index]
        self.visible = None if self.visible is None else self.visible[index]
        if self.visible is not None and bool(self.visible.all()):
            self.visible = None

    def note(self, real: Tensor | None, ids: Tensor | None, seen: int, columns: int) -> None:
        """Remember what comes.

        Args:
            real: ``[rows, columns]``, False where it is padding; None: nowhere.
            ids: ``[rows, columns]``; None if they are not known.
            seen: columns in the cache, without them.
            columns: how many.
        """
        end = seen + columns
        if real is not None:
            self.visible = _with_room(self.visible, real, end, True)
            self.visible[:, seen:end] = real
        if ids is None or (seen and self.ids is None):
            self.ids = None
            return
        self.ids = _with_room(self.ids, ids, end, 0)
        self.ids[:, seen:end] = ids

    # ---- masks ----

    def read(self, mask: Tensor | None, rows: int, columns: int, seen: int) -> Bool[Tensor, "rows columns"] | None:
        """Which of the new tokens are real, and whether the mask shows all that is cached.

        Args:
            mask: ``[rows or 1, 1, queries, seen + columns]`` boolean, or None: everything is visible.
            rows: of the cache.
            columns: new tokens of each, padding included.
            seen: columns in the cache.

        Returns:
            False where a new token may be padding; None: there is none.

        Raises:
            ValueError: a mask of numbers, one that differs from head to head, or one that hides cached tokens that
                are no padding, or shows padding.
        """
        if mask is None:
            if self.visible is not None:
                raise ValueError(
                    "the cached batch has padding, and no attention mask hides it: pass attention_mask for the whole "
                    "text, cached tokens included"
                )
            return None
        if mask.dtype != torch.bool:
            raise ValueError(
                f"a ragged cache reads boolean attention masks only, got {mask.dtype}; pass a 2-D padding mask (if "
                "you did, the model makes masks of its own and cannot be served)"
            )
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(
                f"a ragged cache reads one attention mask for all heads, got shape {tuple(mask.shape)}; pass a 2-D "
                "padding mask (if you did, the model makes masks of its own and cannot be served)"
            )
        if columns == 1 and seen:  # decoding; one wait for the device
            shown, wanted = mask[:, 0, -1], self._visible(seen + 1)
            if shown.shape[1] == seen + 1 and (shown.all() if wanted is None else torch.equal(shown, wanted)):
                return None
        mask = mask[:, 0].expand(rows, -1, -1)
        # The last query sees every real new token. A copy, so that the mask of a chunk can be freed.
        real = mask[:, -1, -columns:].clone()
        if seen:
            self._check(mask, real, seen)
        return real

    def _check(self, mask: Bool[Tensor, "rows queries all"], real: Bool[Tensor, "rows columns"], seen: int) -> None:
        columns = real.shape[1]
        past = self._visible(seen)
        if past is None:
            past = torch.ones(len(mask), seen, dtype=torch.bool, device=mask.device)
        fits = mask.shape[-1] == seen + columns
        if not fits or bool((mask[..., :seen] != past[:, None]).any() | _not_causal(mask[:, -columns:, seen:], real)):
            raise ValueError(
                "the attention mask hides tokens that are cached, or shows padding or later tokens: a ragged cache can "
                "hide nothing but the padding that it was told of when those tokens came (what a finished sequence was "
                "filled up with counts as tokens); pass the 2-D padding mask of the whole text"
            )

    def _visible(self, columns: int) -> Bool[Tensor, "rows columns"] | None:
        """What a mask of so many columns must show; None: everything."""
        if self.visible is None:
            return None
        self.visible = _with_room(self.visible, self.visible, columns, True)
        return self.visible[:, :columns]

    # ---- texts ----

    def check_call(self, origin: Origin, seen: int, columns: int) -> None:
        """What ``generate`` hands over must go on with the cached text.

        Args:
            origin: of the new tokens.
            seen: columns in the cache.
            columns: new ones.

        Raises:
            ValueError: it is another text, or no longer one; the mask is of another length; or ``generate`` hands over
                other tokens than those that follow, because it was told not to use a cache, or because it does.
        """
        call = origin.call
        if call is None:
            return
        width = int(call.text.shape[1])
        whole = call.mask_columns in (None, width)  # otherwise its newest tokens only
        begins = call.config is not self._config
        if begins and call.config.use_cache is False:
            raise ValueError(
                "use_cache=False and a cache were passed, by which each step would store the whole text again: "
                "pass use_cache=True, or no cache"
            )
        if begins and seen and whole:
            self._check_text(call.text, seen)
        if begins and seen and not whole and call.mask_columns != seen + width:
            raise ValueError(
                f"the attention mask has {call.mask_columns} columns, but the cache holds {seen} tokens and {width} "
                f"come: pass the mask of the whole text, {seen + width} columns"
            )
        if seen and whole and seen < width:
            follow = call.text[:, seen : seen + columns]
            ids = None if origin.ids is None else origin.ids[:, : follow.shape[1]].to(follow.device)
            if columns >= width or (ids is not None and not torch.equal(ids, follow)):
                raise ValueError(
                    f"generate hands over again some of the {seen} tokens that the cache holds, as it does in assisted "
                    f"decoding: pass the new tokens alone, with the attention mask of the whole text, {width} columns; "
                    f"or {_REMEDY}"
                )
        self._config = call.config

    def _check_text(self, text: Int[Tensor, "rows tokens"], seen: int) -> None:
        width = int(text.shape[1])
        if self.ids is not None:
            shared = min(seen, width)
            old, new = self.ids[:, :shared], text[:, :shared].to(self.ids.device)
            differs = old != new
            visible = self._visible(shared)
            if visible is not None:
                differs &= visible.to(differs.device)
            if bool(differs.any()):
                row, column = differs.nonzero()[0].tolist()
                raise ValueError(
                    f"the cache holds {seen} tokens of another text: sequence {row} differs from token {column} on, so "
                    f"this is not its continuation; {_REMEDY} (to pass new tokens only, pass the attention mask of the "
                    f"whole text, {seen + width} columns)"
                )
        if width <= seen:
            raise ValueError(no_new_tokens(seen))

    def check_positions(self, positions: object, chunk: Chunk, seen: HostInts, columns: int) -> None:
        """The first new token's position must be the number of tokens that the cache has seen of the row.

        Counted with padding or without: a model that is not told of positions counts columns.

        Args:
            positions: ``[rows or 1, columns]``; whatever else a model calls positions is not checked.
            chunk: the new tokens.
            seen: ``[rows]``, tokens in the cache.
            columns: in the cache.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != chunk.columns:
            return
        positions = positions.expand(len(chunk.rows), -1)
        first = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        if chunk.real is not None:
            first = chunk.real.to(positions.device, torch.uint8).argmax(1)
        found = torch.stack([positions.gather(1, first[:, None])[:, 0], first]).tolist()
        for row, (position, at, known, new) in enumerate(
            zip(*found, seen.tolist(), chunk.counts.tolist(), strict=True)
        ):
            if new and position not in (known, columns + at):
                raise ValueError(
                    f"the new tokens of sequence {row} begin at position {position}, but the cache holds {known} "
                    f"tokens of it: this is not the continuation of the cached text; {_REMEDY}"
                )


def _not_causal(mask: Bool[Tensor, "rows queries columns"], real: Bool[Tensor, "rows columns"]) -> Tensor:
    """Whether a real token sees padding or later tokens, or does not see an earlier one."""
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=mask.device).tril()
    return ((mask != (causal & real[:, None])) & real[..., None]).any()


def no_new_tokens(seen: int) -> str:
    """What to say of a text that is no longer than the cached one."""
    return (
        f"there are no new tokens: the text is no longer than the {seen} tokens that the cache has seen, so this is "
        f"not its continuation; {_REMEDY}"
    )


def _with_room(memory: Tensor | None, like: Tensor, columns: int, fill: int) -> Tensor:
    """``memory`` ``[rows, room]`` with room for so many columns; new room is made like ``like``, doubling."""
    room = 0 if memory is None else memory.shape[1]
    if memory is not None and room >= columns:
        return memory
    larger = like.new_full((len(like), max(columns, 2 * room)), fill)
    if memory is not None:
        larger[:, :room] = memory
    return larger
