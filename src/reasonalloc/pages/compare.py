"""Two records of one prompt: where their texts part, and what each method had forgotten there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reasonalloc.cache.packed import smallest
from reasonalloc.cache.recorder import Recorder
from reasonalloc.cache.token_record import Text
from reasonalloc.pages.assembly import write_page
from reasonalloc.pages.history import Ints, Tokens, load, tokens_of

_BEYOND = 80  # tokens shown behind the place where the texts part
_LONGEST_WORD = 12  # tokens


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: of its file, or "first" and "second".
        about: the method and its settings, in words.
        text: its tokens.
        heads: of all layers together.
        round: how many rounds had taken place before the first other token was chosen.
        holders: ``[tokens]``, how many heads held each of the common tokens then.
    """

    name: str
    about: str
    text: Text
    heads: int
    round: int
    holders: Ints

    @property
    def forgotten(self) -> int:
        """Common tokens that no head held."""
        return int((self.holders == 0).sum())


@dataclass(frozen=True)
class Comparison:
    """What two records have in common, and what they had forgotten where they part.

    Attributes:
        common: leading tokens that are the same, prompt included.
        sides: the two.
    """

    common: int
    sides: tuple[Side, Side]

    @property
    def is_same(self) -> bool:
        """Whether the texts do not part."""
        return all(len(side.text.ids) == self.common for side in self.sides)

    def kept(self, side: int) -> list[int]:
        """Positions that at least half of this side's heads held, and fewer of the other's; in the text's order."""
        own, other = (x.holders / x.heads for x in (self.sides[side], self.sides[1 - side]))
        return [int(i) for i in np.flatnonzero((own >= 0.5) & (other < 0.5))]

    def sources(self, side: int) -> list[int]:
        """Positions at which the token that this side wrote next had stood before: it may have been read there."""
        ids = self.sides[side].text.ids
        return [i for i in range(self.common) if len(ids) > self.common and ids[i] == ids[self.common]]

    def __str__(self) -> str:
        first, second = self.sides
        written = self.common - first.text.prompt
        lost = f"{first.forgotten} in {first.name}, {second.forgotten} in {second.name}"
        held = f"held by no head, of {self.common} tokens: {lost}"
        if self.is_same:
            return f"the texts are the same: {written} tokens behind the prompt\n{held}"
        words = ", ".join(f"{side.name} {self._goes_on(side.text.pieces)}" for side in self.sides)
        return f"the texts are the same for {written} tokens behind the prompt\nthen {words}\n{held} (at that moment)"

    def _goes_on(self, pieces: list[str]) -> str:
        """What a side does where the texts part: the word that it writes there, up to the next space."""
        rest = pieces[self.common : self.common + _LONGEST_WORD]
        if not rest:
            return "ends"
        end = next((i for i, piece in enumerate(rest) if i and piece[:1].isspace()), len(rest))
        return f"writes {''.join(rest[:end])!r}"


def compare(
    first: Recorder | str | Path, second: Recorder | str | Path, path: str | Path | None = "compare.html"
) -> Comparison:
    """Compare two records of one prompt, each of one sequence, and write a page of it.

    Args:
        first, second: recorders, or files of them, with tokens and text (``Recorder(tokens=True)``,
            ``Recorder.set_text``).
        path: of the page, ending in .html; None: no page.

    Raises:
        FileNotFoundError: there is no such record.
        ValueError: a record without tokens or text, other prompts or tokenizers, or another suffix.
    """
    names = _names(first, second)
    records = [_told(load(record), name) for record, name in zip((first, second), names, strict=True)]
    tokens = [tokens_of(record, 0) for record in records]
    texts = [record.tokens.texts[0] for record in records if record.tokens is not None]
    _check_same(texts[0], texts[1], names)
    common = _common(texts[0].ids, texts[1].ids)
    sides = [
        _side(name, record.about, found, text, common)
        for name, record, found, text in zip(names, records, tokens, texts, strict=True)
    ]
    result = Comparison(common, (sides[0], sides[1]))
    if path is not None:
        _write(path, result)
    return result


def _names(first: Recorder | str | Path, second: Recorder | str | Path) -> tuple[str, str]:
    """What the two are called: by their files' names, with folders where these are the same."""
    if isinstance(first, Recorder) or isinstance(second, Recorder):
        return "first", "second"
    a, b = Path(first), Path(second)
    return (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))


def _told(recorder: Recorder, name: str) -> Recorder:
    """The recorder, if it has the text of one sequence."""
    if recorder.tokens is None or not recorder.tokens.texts:
        raise ValueError(
            f"the record {name!r} has no text: record with `reasonalloc generate --record`, or with "
            "Recorder(tokens=True) and set_text"
        )
    if len(recorder.tokens.texts) > 1:
        raise ValueError(f"the record {name!r} is of {len(recorder.tokens.texts)} sequences: compare records of one")
    return recorder


def _check_same(first: Text, second: Text, names: tuple[str, str]) -> None:
    """Raise ``ValueError`` where the records are of different prompts or tokenizers."""
    prompts = [(text.ids[: text.prompt], text.pieces[: text.prompt]) for text in (first, second)]
    if prompts[0] == prompts[1]:
        return
    if "".join(prompts[0][1]) == "".join(prompts[1][1]) or prompts[0][0] == prompts[1][0]:
        raise ValueError(
            f"the records {names[0]!r} and {names[1]!r} are of different tokenizers, which read the prompt in other "
            "tokens: compare runs of one model"
        )
    at = _common(prompts[0][0], prompts[1][0])
    ends = [[*pieces, "(the end)"][at] for _, pieces in prompts]
    raise ValueError(
        f"the records are of different prompts: at token {at}, {names[0]!r} has {ends[0]!r} and {names[1]!r} has "
        f"{ends[1]!r}; compare runs of one prompt"
    )


def _common(first: list[int], second: list[int]) -> int:
    same = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(same, min(len(first), len(second)))


def _side(name: str, about: str, tokens: Tokens, text: Text, common: int) -> Side:
    """What the heads held when the token behind the common ones was chosen.

    Its scores were computed in the pass of the token before it, and a round at the end of this pass came too late.
    """
    rounds = int((tokens.seen < common).sum())
    holders = np.full(common, tokens.heads)
    known = tokens.holders(rounds - 1)[:common]
    holders[: len(known)] = known
    return Side(name, about, text, tokens.heads, rounds, holders)


def _write(path: str | Path, result: Comparison) -> None:
    until = result.common + _BEYOND
    facts = {
        "common": result.common,
        "prompt": result.sides[0].text.prompt,
        "isSame": result.is_same,
        "sides": [
            {
                "name": side.name,
                "about": side.about,
                "pieces": side.text.pieces[:until],
                "length": len(side.text.ids),
                "heads": side.heads,
                "round": side.round,
                "kept": result.kept(i),
                "sources": result.sources(i),
            }
            for i, side in enumerate(result.sides)
        ],
    }
    write_page(path, "compare", facts, {f"holders{i}": smallest(side.holders) for i, side in enumerate(result.sides)})
