"""Whether an answer is the reference: math-verify's judgement, with what it passes over decided first."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from reasonalloc.mathematics.finding import last_box
from reasonalloc.mathematics.notation import COUNTS, ascii_signs, tidy
from reasonalloc.mathematics.units import contradict, without_units

_BASED = re.compile(r"\(?\s*(-?[0-9A-Z]+)\s*\)?\s*_\s*\{?\s*(?:\\text\{\s*)?(\w+)\s*\}*")
_BASED_IN_WORDS = re.compile(r"(-?[0-9A-Z]+)\s*(?:\\text\{)?\s*\(?\s*(?:in )?base\s*\}?[ -]*(\w+)\s*\)?\s*\}?", re.I)
_BASES = {**{name: base for base, name in enumerate(COUNTS)}, "sixteen": 16}
_LETTER = re.compile(r"(?:(?i:option|choice)\s+)?(?:\(([A-J])\)|([A-J])[).:]|([A-J])$)(?=\s|$).*", re.DOTALL)
_OF_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_OR = re.compile(r"\s*(?:\\text\{\s*or\s*\}|(?<![a-zA-Z])or(?![a-zA-Z])|\\lor(?![a-zA-Z])|\\vee(?![a-zA-Z]))\s*")
_HALF_OF_DAY = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*\(?([ap])\.?\s*m\.?\)?", re.IGNORECASE)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?")
_BOUND = re.compile(
    r"\b(or (?:more|less|fewer|greater)|at (?:least|most)|(?:more|less|fewer|greater) than|not)\b", re.IGNORECASE
)
_ACCURACY = 1e-5  # relative, of numbers that are not equal exactly: 0.333333 is 1/3, 0.3333 is not


@dataclass(frozen=True)
class Verdict:
    """What ``judge`` says; attributes as of ``evaluation.grading.Grade``."""

    extracted: str | None
    score: float
    gradable: bool = True
    fault: str | None = None


@dataclass(frozen=True)
class _Read:
    """An answer: in one notation, less its units, as expressions of sympy or text."""

    text: str
    bare: str
    units: tuple[str, ...]
    parsed: tuple[Any, ...]


def judge(reference: str, text: str) -> dict[str, Any]:
    """The grade of what follows a thought, as a dictionary. May take forever: see ``judging``."""
    gold = _reference(reference)
    if not gold.parsed:
        return asdict(Verdict(None, 0.0, gradable=False))
    boxed = last_box(text)
    said, parsed = (boxed, ()) if boxed is not None else _said(text)
    if not said:
        return asdict(Verdict(None, 0.0))
    found = _read(said, parsed)
    return asdict(Verdict(said if found.parsed else None, float(bool(found.parsed) and _equal(gold, found))))


@lru_cache(maxsize=256)
def _reference(reference: str) -> _Read:
    return _read(reference)


def _said(text: str) -> tuple[str, tuple[Any, ...]]:
    """The last expression of a text without a box, as math-verify finds it: written and parsed."""
    from math_verify import parse

    text = ascii_signs(text)
    found = parse(text, parsing_timeout=None)
    if not found:
        return "", ()
    said = str(found[-1])
    if said.isdigit():  # math-verify stops at a base
        last = list(re.finditer(rf"(?<!\d){said}(?!\d)(_\{{?\w+\}}?)?", text))
        said += (last[-1][1] or "") if last else ""
    return said, tuple(found[:-1])


def _read(answer: str, parsed: tuple[Any, ...] = ()) -> _Read:
    from math_verify import LatexExtractionConfig, parse

    text = tidy(answer)
    bare, units = without_units(text)
    bare = re.sub(r"^([^=<>]*\d[^=<>a-zA-Z]*)=\s*([a-zA-Z])$", r"\2=\1", bare)  # 5 = x
    parts = _OR.split(bare)
    if len(parts) > 1 and all(re.search(r"[<>]|\\[lg]eq?(?![a-zA-Z])", part) for part in parts):
        parsed = (*parsed, *_union(parts))
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    found = parse(rf"\boxed{{{bare}}}", extraction_config=config, parsing_timeout=None) if bare else []
    return _Read(text, bare, units, (*parsed, *found))


def _union(relations: list[str]) -> tuple[Any, ...]:
    """The numbers of which one of the relations is true, as a set; nothing where they are no such relations."""
    from math_verify import parse
    from sympy import Union

    parsed = [parse(rf"\boxed{{{relation}}}", parsing_timeout=None) for relation in relations]
    try:
        return (Union(*(found[0].as_set() for found in parsed)),) if all(_solved(found[0]) for found in parsed) else ()
    except Exception:  # sympy's errors are of many kinds
        return ()


def _equal(gold: _Read, found: _Read) -> bool:
    if _plain(gold.text) == _plain(found.text):
        return True
    for decide in (_letters, _bases, _times):
        decided = decide(gold.text, found.text)
        if decided is not None:
            return decided
    if bool(_BOUND.search(gold.text)) != bool(_BOUND.search(found.text)):
        return False
    if contradict(gold.units, found.units) or {_kind(gold.bare), _kind(found.bare)} == {"set", "tuple"}:
        return False
    if _verify(gold.parsed, found.parsed):
        return True
    percents = gold.bare.endswith("%"), found.bare.endswith("%")
    if percents[0] != percents[1]:  # MATH writes percents with and without their sign
        without = [_read(read.bare.rstrip("%").rstrip("\\")) for read in (gold, found)]
        return _verify(without[0].parsed, without[1].parsed)
    return False


def _plain(text: str) -> str:
    """Text without spaces, \\text and article; of words also without capitals."""
    text = re.sub(r"^(?:an?|the) ", "", _OF_TEXT.sub(r"\1", text).strip(), flags=re.IGNORECASE)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\s", "", text)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2}[A-Za-z0-9'-]*", text) else text


def _letters(gold: str, found: str) -> bool | None:
    """Choices from a list; None where the reference is no such letter, or the answer has none."""
    one, other = (_OF_TEXT.sub(r"\1", text).strip() for text in (gold, found))
    chosen = [_LETTER.fullmatch(text) for text in (one, other)]
    if len(one) > 3 or chosen[0] is None or chosen[1] is None:
        return None
    return chosen[0][chosen[0].lastindex or 0] == chosen[1][chosen[1].lastindex or 0]


def _bases(gold: str, found: str) -> bool | None:
    """Numbers of which one names its base. An answer without one has the reference's; a reference's is ten."""
    one, other = _based(gold), _based(found)
    if one is None and other is None:
        return None
    if one is not None and other is not None:
        return (one[0].lstrip("0"), one[1]) == (other[0].lstrip("0"), other[1])
    if one is not None:
        plain = found.replace(" ", "").replace(",", "")
        return one[0] == plain.rpartition("=")[2]
    assert other is not None
    return gold.replace(",", "") == str(int(*other))


def _based(text: str) -> tuple[str, int] | None:
    """Digits and base of 52_8; None of anything else."""
    text = text.rpartition("=")[2].strip()
    found = _BASED.fullmatch(text) or _BASED_IN_WORDS.fullmatch(text)
    if found is None:
        return None
    digits, base = found[1], _BASES.get(found[2].lower()) or (int(found[2]) if found[2].isdecimal() else 0)
    try:
        int(digits, base if base >= 2 else 99)
    except ValueError:
        return None
    return (digits, base) if digits.lstrip("-").isdecimal() or base > 10 else None


def _times(gold: str, found: str) -> bool | None:
    """Times of a day with its half; None where the reference names none."""
    one, other = (_HALF_OF_DAY.fullmatch(_OF_TEXT.sub(r"\1", text).strip()) for text in (gold, found))
    if one is None:
        return None
    said = other or _CLOCK.fullmatch(_OF_TEXT.sub(r"\1", found).strip())
    if said is None:
        return False
    half = other is None or one[3].lower() == other[3].lower()
    return half and (int(one[1]), int(one[2] or 0)) == (int(said[1]), int(said[2] or 0))


def _kind(text: str) -> str:
    """ "set" of {..}, "tuple" of (..), "" of anything else or of one element."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])\s*", "", text).strip()
    if "," not in text:
        return ""
    inside = text[1:-1]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set"
    balanced = text.startswith("(") and text.endswith(")") and not re.search(r"\)[^(]*\(", inside)
    return "tuple" if balanced else ""


def _verify(gold: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
    from math_verify import verify

    return any(
        verify([one], [other], allow_set_relation_comp=_solved(other), timeout_seconds=None) and _accurate(one, other)
        for one in gold
        for other in found
    )


def _solved(relation: Any) -> bool:
    """Whether it is one like x > 3 or 1 < x < 5: that says which numbers are meant, where x^2 > 9 only asks."""
    from sympy.core.relational import Relational

    parts = [relation] if isinstance(relation, Relational) else getattr(relation, "_unsorted_args", ())
    return bool(parts) and all(
        isinstance(part, Relational)
        and len(part.free_symbols) == 1
        and (part.lhs.is_Symbol or part.rhs.is_Symbol)
        and (part.lhs.is_number or part.rhs.is_number)
        for part in parts
    )


def _accurate(one: Any, other: Any) -> bool:
    """Whether two numbers that math-verify takes for equal are so however small they are."""
    try:
        first, second = complex(one.doit().evalf()), complex(other.doit().evalf())
    except Exception:  # no numbers: nothing to say
        return True
    return abs(first - second) <= _ACCURACY * max(abs(first), abs(second)) or one == other
