"""Records made from numbers, without a model."""

from __future__ import annotations

import numpy as np

from reasonalloc import Recorder
from reasonalloc.cache.recorder import Routing
from reasonalloc.cache.token_record import Text, TokenRecord


def made(let_go: np.ndarray, seen: list[int], pieces: list[str], prompt: int, about: str = "") -> Recorder:
    """One sequence whose heads let go as ``let_go`` says: ``[layers, heads, tokens]``, a round (from 0) or -1."""
    layers, _, tokens = let_go.shape
    recorder = Recorder(tokens=True)
    recorder.layers, recorder.about = layers, about
    rounds = len(seen)
    for i, count in enumerate(seen):
        held = ((let_go[..., :count] == -1) | (let_go[..., :count] >= i)).sum(-1)
        kept = ((let_go[..., :count] == -1) | (let_go[..., :count] > i)).sum(-1)
        for layer in range(layers):
            total, tables = int(kept[layer].sum()), ([kept[layer].tolist()], [kept[layer].tolist()])
            recorder.add(Routing(count, layer, [total], *tables, [held[layer].tolist()], [0.25 + i]))
    words = {word: i for i, word in enumerate(sorted(set(pieces)))}
    document = {
        "rows": [[0]] * rounds * layers,
        "seen": [[count] for count in seen for _ in range(layers)],
        "steps": seen,
        "texts": [{"ids": [words[word] for word in pieces], "pieces": pieces, "prompt": prompt}],
    }
    scores = np.random.default_rng(0).integers(0, 101, (rounds, 1, tokens)).astype(np.uint8)
    scores[np.arange(tokens) >= np.array(seen)[:, None, None]] = 255
    recorder.tokens = TokenRecord.of(document, (let_go[:, None] + 1).astype(np.uint16), scores)
    return recorder


def forgetting(layers: int, heads: int, seen: list[int], chance: float, seed: int = 0) -> np.ndarray:
    """Heads that let go of every token with this chance in every round, each by itself: what deflates worst."""
    rng = np.random.default_rng(seed)
    born = np.searchsorted(seen, np.arange(seen[-1]), side="right")
    when = born + rng.geometric(chance, (layers, heads, seen[-1])) - 1
    return np.where(when < len(seen), when, -1)


def words(count: int) -> list[str]:
    """A text of many words."""
    some = ("the", " number", " of", " paths", " is", ",", " so", " x", " =", " 7", ".", "\n", " let", " us", " check")
    return [some[i] for i in np.random.default_rng(1).integers(len(some), size=count)]


def text_of(ids: list[int], prompt: int) -> Text:
    """Numbers as a text."""
    return Text(ids, [f" {i}" for i in ids], prompt)
