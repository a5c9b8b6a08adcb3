"""A record of tokens: when each head let go of each token, how tokens were scored, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonalloc.cache.packed import MOST_BYTES, smallest

HELD = -1  # stands in ``let_go`` for a token that the head still holds
NO_SCORE = 255  # stands in ``scores`` for a token that no head scored in the round

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Text:
    """The tokens of one sequence, padding left out.

    Attributes:
        ids: their numbers in the tokenizer.
        pieces: what each of them adds to the text.
        prompt: how many of them are the prompt.

    Raises:
        ValueError: the parts do not fit together.
    """

    ids: list[int]
    pieces: list[str]
    prompt: int

    def __post_init__(self) -> None:
        numbers = isinstance(self.ids, list) and all(type(x) is int for x in self.ids)
        names = isinstance(self.pieces, list) and all(type(x) is str for x in self.pieces)
        if not numbers or not names or len(self.ids) != len(self.pieces):
            raise ValueError("a text needs whole numbers as ids, and as many strings as pieces")
        if type(self.prompt) is not int or not 0 <= self.prompt <= len(self.ids):
            raise ValueError(f"a text of {len(self.ids)} tokens cannot have a prompt of {self.prompt!r}")

    @classmethod
    def of(cls, tokenizer: Any, ids: list[int], prompt: int) -> Text:
        """Decode each token behind the one before it: alone, many tokenizers drop its leading space."""

        def decode(some: list[list[int]]) -> list[str]:
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return [tokenizer.decode(part, **options) for part in some]

        alone = decode([[token] for token in ids])
        pairs = decode([ids[i : i + 2] for i in range(len(ids) - 1)])
        pieces = alone[:1]
        for before, own, pair in zip(alone, alone[1:], pairs, strict=False):
            pieces.append(pair[len(before) :] if pair.startswith(before) else own)
        return cls(ids, pieces, prompt)


class TokenRecord:
    """When each head let go of each token of a batch.

    A token that was evicted never returns, so one number says all: the step of the round that evicted it. Tokens are
    counted as in ``LayerTokens.positions``: by their index in their own sequence, padding left out.

    Attributes:
        rows: of each routing of the recorder, which sequences of the first batch its rows are.
        seen: of each routing, how many tokens each of these sequences had, padding left out.
        steps: of each round, ascending; as ``Recorder.arrays()["step"]``.
        texts: of each sequence, once the user has given them.
    """

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.seen: list[list[int]] = []
        self.steps: list[int] = []
        self.texts: list[Text] = []
        self._let_go = np.empty((0, 0, 0, 0), dtype=np.int32)
        self._present: list[int] | None = None  # the sequences that the cache's rows are now
        self._batch = 0  # sequences of the first batch
        self._is_over = False
        self._scores: list[Ints] = []  # of each round but the present one
        self._sums = self._counts = np.zeros((0, 0))  # of the present round

    # ---- what a cache tells ----

    def open(self, layers: int, heads: int) -> None:
        """A cache of so many layers and heads begins, or begins anew: what was recorded is a whole generation."""
        self._is_over = bool(self.steps) or self._present is not None
        if not self._is_over:
            self._let_go = np.empty((layers, 0, heads, 0), dtype=np.int32)

    def select(self, rows: Sequence[int], count: int) -> None:
        """Of ``count`` rows these are kept, in this order.

        Raises:
            ValueError: some are repeated.
        """
        if len(set(rows)) < len(rows):
            raise ValueError(
                "a recorder of tokens follows each sequence to its end, and here sequences are copied (beams): "
                "generate without beams, or record with Recorder(), without tokens"
            )
        present = self._rows(count)
        self._present = [present[row] for row in rows]

    def begin(self, step: int, rows: int) -> None:
        """A round of ``rows`` rows begins.

        Raises:
            ValueError: it is another generation's.
        """
        if self._is_over or (self.steps and step < self.steps[-1]):
            raise ValueError(
                "this recorder holds the tokens of another generation: give each generation a Recorder of its own"
            )
        self._rows(rows)
        if not self.steps:
            self._let_go = np.empty((len(self._let_go), self._batch, self._let_go.shape[2], 0), dtype=np.int32)
        if not self.steps or step > self.steps[-1]:
            self._settle()
            self.steps.append(step)
            self._sums = self._counts = np.zeros((self._let_go.shape[1], 0))

    def score(self, rows: Ints, positions: Ints, scores: npt.NDArray[np.floating[Any]]) -> None:
        """How the tokens of some layers rank, before the round.

        Args:
            rows: ``[rows]``, which rows of the cache.
            positions: ``[layers * rows, heads, tokens]``.
            scores: likewise; infinite for tokens that stay or go without being asked for their score.
        """
        asked = np.isfinite(scores)
        order = np.where(asked, -scores.astype(np.float64), np.inf).argsort(-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)  # 0: the best
        worst = np.maximum(asked.sum(-1, keepdims=True) - 1, 1)
        percent = 100.0 * (1 - rank / worst)
        sequences = np.tile(self._sequences(rows), len(scores) // len(rows))
        which = np.broadcast_to(sequences[:, None, None], scores.shape)[asked]
        room = max(int(positions[asked].max(initial=-1)) + 1, self._sums.shape[1])
        self._sums, self._counts = (_wider(x, room, 0) for x in (self._sums, self._counts))
        for memory, weights in ((self._sums, percent[asked]), (self._counts, None)):
            flat = np.bincount(which * room + positions[asked], weights, memory.size)
            memory += flat.reshape(memory.shape)

    def note(self, rows: Ints, layers: Ints, seen: Ints, positions: Ints, lengths: Ints) -> None:
        """What some layers hold after the round.

        Args:
            rows: ``[rows]``, which rows of the cache.
            layers: ``[layers]``, the model's numbers.
            seen: ``[rows]``, tokens so far, padding left out.
            positions: ``[layers, rows, heads, tokens]``.
            lengths: ``[layers, rows, heads]``, how many of these there are.
        """
        room = int(seen.max(initial=0))
        if room > self._let_go.shape[-1]:
            self._let_go = _wider(self._let_go, max(room, 2 * self._let_go.shape[-1]), HELD)
        sequences = self._sequences(rows)
        of = (layers[:, None], sequences)
        come = self._let_go[..., :room]  # without the room that is kept for later tokens
        when = come[of]
        is_token = np.arange(positions.shape[-1]) < lengths[..., None]
        stays = np.zeros(when.shape, dtype=bool)
        layer, row, head, _ = is_token.nonzero()
        stays[layer, row, head, positions[is_token]] = True
        has_come = np.arange(when.shape[-1]) < seen[:, None, None]
        when[has_come & ~stays & (when == HELD)] = len(self.steps) - 1
        come[of] = when
        self.rows += [sequences.tolist()] * len(layers)
        self.seen += [seen.tolist()] * len(layers)

    # ---- what is read ----

    def row_of(self, routing: int, sequence: int) -> int | None:
        """Which row a sequence was in a routing of the recorder; None: it was not in it."""
        rows = self.rows[routing]
        return rows.index(sequence) if sequence in rows else None

    @property
    def let_go(self) -> Ints:
        """``[layers, sequences, heads, tokens]`` int32: which of ``steps`` evicted the token (from 0), or ``HELD``.

        Tokens up to the last that came before the last round; where a sequence is shorter, ``HELD``.
        """
        longest = max((max(seen, default=0) for seen in self.seen), default=0)
        return self._let_go[..., :longest]

    @property
    def scores(self) -> Ints:
        """``[rounds, sequences, tokens]`` uint8, in percent: where the tokens stood in the round, or ``NO_SCORE``.

        100 is the best and 0 the worst of the tokens that a head ranked by score in this round; the newest ones and a
        prompt that is kept are not ranked. A token's number is the mean over the heads that ranked it, of all layers.
        """
        self._settle()
        found = np.full((len(self._scores), *self.let_go.shape[1::2]), NO_SCORE, dtype=np.uint8)
        for i, scores in enumerate(self._scores):
            width = min(scores.shape[1], found.shape[2])
            found[i, :, :width] = scores[:, :width]
        return found

    def set_texts(self, texts: Iterable[Text]) -> None:
        """What the tokens of each sequence are.

        Raises:
            ValueError: of other sequences, or shorter than what the cache has seen.
        """
        texts = list(texts)
        sequences = self._let_go.shape[1]
        if self.steps and len(texts) != sequences:
            raise ValueError(f"the record is of {sequences} sequences, and the text of {len(texts)}")
        for rows, seen in zip(self.rows, self.seen, strict=True):
            for sequence, count in zip(rows, seen, strict=True):
                if len(texts[sequence].ids) < count:
                    raise ValueError(
                        f"the text of sequence {sequence} has {len(texts[sequence].ids)} tokens, and the cache had "
                        f"seen {count}: pass all that generate returned, prompt included"
                    )
        self.texts = texts

    # ---- files ----

    def document(self) -> dict[str, Any]:
        """Everything but the two arrays, as JSON."""
        return {"rows": self.rows, "seen": self.seen, "steps": self.steps, "texts": [vars(text) for text in self.texts]}

    def arrays(self) -> dict[str, Ints]:
        """The two arrays as files hold them; ``let_go`` plus one, in as few bytes as it fits in.

        Raises:
            ValueError: one is larger than a file may hold.
        """
        arrays = {"let_go": smallest(self.let_go + 1), "scores": self.scores}
        for name, array in arrays.items():
            if array.nbytes > MOST_BYTES:
                raise ValueError(
                    f"the recorded tokens ({name}) take {array.nbytes} bytes, and a file holds at most {MOST_BYTES} of "
                    "them: record fewer sequences at a time"
                )
        return arrays

    @classmethod
    def of(cls, document: Any, let_go: Ints, scores: Ints) -> TokenRecord:
        """What ``document`` and ``arrays`` were made of.

        Raises:
            ValueError: they do not fit together.
        """
        names = {"rows", "seen", "steps", "texts"}
        if not isinstance(document, dict) or set(document) != names or not isinstance(document["texts"], list):
            raise ValueError(f"tokens need {', '.join(sorted(names))}")
        record = cls()
        record.rows, record.seen, record.steps = document["rows"], document["seen"], document["steps"]
        _check(record.rows, record.seen, record.steps, let_go, scores)
        record._let_go, record._scores = let_go.astype(np.int32), list(scores)
        record._let_go -= 1
        record._is_over = True
        record.set_texts(_text(entry) for entry in document["texts"]) if document["texts"] else None
        return record

    # ---- parts ----

    def _rows(self, count: int) -> list[int]:
        """Which sequences the cache's rows are; before anything was told, ``count`` of them."""
        if self._present is None:
            self._present, self._batch = list(range(count)), count
        return self._present

    def _sequences(self, rows: Ints) -> Ints:
        assert self._present is not None
        return np.array(self._present, dtype=np.int64)[rows]

    def _settle(self) -> None:
        """The present round is over: keep its scores as whole percent."""
        if len(self._scores) < len(self.steps):
            mean = np.divide(self._sums, self._counts, out=np.full(self._sums.shape, np.nan), where=self._counts > 0)
            self._scores.append(np.where(np.isnan(mean), NO_SCORE, np.nan_to_num(mean).round()).astype(np.uint8))


def _wider(memory: Any, width: int, fill: int) -> Any:
    """The same, with room for ``width`` tokens."""
    larger = np.full((*memory.shape[:-1], width), fill, dtype=memory.dtype)
    larger[..., : memory.shape[-1]] = memory
    return larger


def _text(entry: Any) -> Text:
    if not isinstance(entry, dict) or set(entry) != {"ids", "pieces", "prompt"}:
        raise ValueError("a text needs ids, pieces and prompt")
    return Text(**entry)


def _check(rows: Any, seen: Any, steps: Any, let_go: Ints, scores: Ints) -> None:
    """Raise ``ValueError`` where the parts of a record do not fit together."""
    tables = all(
        isinstance(x, list) and all(isinstance(y, list) and all(type(z) is int and z >= 0 for z in y) for y in x)
        for x in (rows, seen, [steps])
    )
    if not tables or [len(x) for x in rows] != [len(x) for x in seen]:
        raise ValueError("the rows of its tokens do not fit together")
    if let_go.ndim != 4 or scores.ndim != 3 or let_go.dtype.kind != "u" or scores.dtype != np.uint8:
        raise ValueError("the arrays of its tokens are of the wrong kind")
    if scores.shape != (len(steps), *let_go.shape[1::2]) or steps != sorted(set(steps)):
        raise ValueError("the arrays of its tokens do not fit together")
    longest = max((x for y in seen for x in y), default=0)
    if any(x >= let_go.shape[1] for y in rows for x in y) or longest != let_go.shape[3]:
        raise ValueError("its tokens are of more sequences, or of longer or shorter ones, than its arrays")
    if let_go.max(initial=0) > len(steps) or any(((x > 100) & (x != NO_SCORE)).any() for x in scores):
        raise ValueError("its tokens have numbers that cannot be")
