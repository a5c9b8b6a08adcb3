"""What a record says of one sequence, as arrays over rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonalloc.cache.recorder import Recorder, Routing
from reasonalloc.cache.token_record import Text

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Tokens:
    """What is known of a sequence's tokens.

    Attributes:
        seen: ``[rounds]``, tokens of the sequence at each round, padding left out.
        let_go: ``[layers, heads, tokens]``, the number of the round that evicted the token, counted from 0; as many as
            there are rounds where the head still held it after the last one.
        scores: ``[rounds, tokens]``, as ``TokenRecord.scores``.
        text: None if it was never given.
    """

    seen: Ints
    let_go: Ints
    scores: Ints
    text: Text | None

    @property
    def heads(self) -> int:
        """Heads of all layers together."""
        return self.let_go.shape[0] * self.let_go.shape[1]

    def holders(self, round: int) -> Ints:
        """``[tokens]``, how many heads hold each token after a round; before the first one (-1), all of them."""
        found: Ints = (self.let_go > round).sum((0, 1))
        return found

    def kept(self) -> Ints:
        """``[rounds, layers, heads]``, how many tokens are held after each round."""
        return np.stack([(self.let_go[..., :count] > i).sum(-1) for i, count in enumerate(self.seen.tolist())])


@dataclass(frozen=True)
class History:
    """One sequence of a record.

    Attributes:
        about: the method and its settings, in words.
        seen: ``[rounds]``, tokens of the sequence at each round; where tokens were not recorded, padding included.
        budgets, before: ``[rounds, layers, heads]``, budgets, and what was held before the layer's last routing; -1
            where the layer has not routed yet.
        kept: likewise, what is held after the round. Where tokens were not recorded, after the layer's last routing.
        threshold: ``[rounds, layers]``, NaN where there is none.
        tokens: None if they were not recorded.
    """

    about: str
    seen: Ints
    budgets: Ints
    before: Ints
    kept: Ints
    threshold: npt.NDArray[np.float64]
    tokens: Tokens | None

    @property
    def rounds(self) -> int:
        """Rounds that the sequence was in."""
        return len(self.seen)


def load(record: Recorder | str | Path) -> Recorder:
    """A recorder, or what one has saved."""
    return record if isinstance(record, Recorder) else Recorder.load(record)


def history(recorder: Recorder, sequence: int) -> History:
    """What a recorder knows of one sequence of its batch.

    Raises:
        ValueError: there is no such sequence, nothing was recorded of it, or the record does not fit into arrays (see
            ``Recorder.arrays``).
    """
    routings = recorder.routings  # waits for the device
    tokens = None if recorder.tokens is None else tokens_of(recorder, sequence)
    if tokens is None:
        recorder.arrays()  # says what is wrong with the whole batch
        _check_sequence(sequence, routings[0].shape[0])
    own = Recorder()
    own.layers = recorder.layers
    for i, routing in enumerate(routings):
        row = sequence if recorder.tokens is None else recorder.tokens.row_of(i, sequence)
        if row is not None:
            own.add(_of_row(routing, row))
    arrays = {name: array[:, :, 0] if array.ndim > 2 else array for name, array in own.arrays().items()}
    return History(
        recorder.about,
        arrays["step"] if tokens is None else tokens.seen,
        arrays["budgets"],
        arrays["held"],
        arrays["kept"] if tokens is None else tokens.kept(),
        arrays.get("threshold", np.full(arrays["total"].shape, np.nan)),
        tokens,
    )


def tokens_of(recorder: Recorder, sequence: int) -> Tokens:
    """What a recorder of tokens knows of one sequence: only the rounds that it was in count.

    Raises:
        ValueError: there is no such sequence.
    """
    record, seen = recorder.tokens, {}
    assert record is not None
    for i, routing in enumerate(recorder.routings):
        row = record.row_of(i, sequence)
        if row is not None:
            seen[routing.step] = record.seen[i][row]
    _check_sequence(sequence, record.let_go.shape[1] or len(record.texts) or 1)
    steps, longest = np.array(sorted(seen), dtype=np.int64), max(seen.values(), default=0)
    let_go = record.let_go[:, sequence, :, :longest] if seen else np.zeros((*record.let_go.shape[::2], 0), np.int64)
    is_own = np.isin(record.steps, steps)
    own_number = np.append(is_own.cumsum() - is_own, len(steps))  # of each round of the batch; HELD is the last one
    numbered = own_number[let_go]
    scores = record.scores[is_own][:, sequence, :longest] if seen else np.zeros((0, 0), np.uint8)
    text = record.texts[sequence] if record.texts else None
    return Tokens(np.array([seen[step] for step in steps.tolist()], np.int64), numbered, scores, text)


def _check_sequence(sequence: int, count: int) -> None:
    if not 0 <= sequence < count:
        raise ValueError(f"the record has sequences 0 to {count - 1}, got {sequence}")


def _of_row(routing: Routing, row: int) -> Routing:
    tables = {name: [getattr(routing, name)[row]] for name in ("total", "budgets", "kept", "held")}
    threshold = None if routing.threshold is None else [routing.threshold[row]]
    return Routing(routing.step, routing.layer, **tables, threshold=threshold)
