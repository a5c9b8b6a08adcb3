"""The page of one record: where memory went, and what was forgotten."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from reasonalloc.cache.packed import smallest
from reasonalloc.cache.recorder import Recorder
from reasonalloc.pages.assembly import write_page
from reasonalloc.pages.history import History, Ints, Tokens, history, load


def view(
    record: Recorder | str | Path, path: str | Path = "routing.html", *, sequence: int = 0, title: str = ""
) -> None:
    """Write an HTML page of a record: heads and layers over time, and the text with what every head still holds.

    The page is one file, and needs no network. The text is there if tokens were recorded
    (``Recorder(tokens=True)``) and named (``Recorder.set_text``).

    Args:
        record: a recorder, also while its cache goes on, or the file of one.
        path: of the page, ending in .html.
        sequence: which sequence of the batch.
        title: of the page; empty: the method and its settings.

    Raises:
        FileNotFoundError: there is no such record.
        ValueError: the file is no record, nothing was evicted, there is no such sequence, or another suffix.
    """
    recorder = load(record)
    found = history(recorder, sequence)
    tokens = found.tokens
    facts: dict[str, Any] = {
        "title": title,
        "about": found.about,
        "file": "" if isinstance(record, Recorder) else Path(record).name,
        "sequence": sequence,
        "entryBytes": recorder.entry_bytes,
        "recordsTokens": tokens is not None,
        "pieces": None if tokens is None or tokens.text is None else tokens.text.pieces,
        "isPromptBeside": _is_prompt_beside(recorder),
        "prompt": 0 if tokens is None or tokens.text is None else tokens.text.prompt,
        "threshold": [[_number(x) for x in row] for row in found.threshold.tolist()],
    }
    # 0 stands for "not yet" where a layer has not routed.
    arrays = {name: smallest(getattr(found, name) + 1) for name in ("budgets", "before", "kept")}
    arrays["seen"] = smallest(found.seen)
    if tokens is not None:
        arrays["lived"], arrays["scores"] = _lived(tokens, found), tokens.scores
    write_page(path, "view", facts, arrays)


def _is_prompt_beside(recorder: Recorder) -> bool:
    """Whether heads held more than their budget when they had just routed: a kept prompt comes on top of it."""
    return any((np.array(routing.kept) > np.array(routing.budgets)).any() for routing in recorder.routings)


def _lived(tokens: Tokens, found: History) -> Ints:
    """``[layers, heads, tokens]``: how many rounds a head has held a token, after the first that the token was in.

    The largest number of its kind: the head held it after the last round. Small numbers deflate best.
    """
    born = np.searchsorted(found.seen, np.arange(tokens.let_go.shape[-1]), side="right")
    kind = np.uint8 if found.rounds < 255 else np.uint16
    return np.where(tokens.let_go == found.rounds, np.iinfo(kind).max, tokens.let_go - born).astype(kind)


def _number(x: float) -> float | str | None:
    """Four digits of it, as JSON has it."""
    if math.isnan(x):
        return None
    return float(f"{x:.4g}") if math.isfinite(x) else str(x)
