"""One notation for what is written in many ways: signs outside of ASCII, spaces, numbers, units."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# ---- signs ----

_SIGNS = {
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict.fromkeys("−–‐‑﹣－", "-"),  # noqa: RUF001
    **dict.fromkeys("∕⁄", "/"),  # noqa: RUF001
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("‘’′", "'"),  # noqa: RUF001
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("≤⩽", r"\le "),
    **dict.fromkeys("≥⩾", r"\ge "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    "×": r"\times ",  # noqa: RUF001
    "÷": r"\div ",
    "∞": r"\infty ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",  # noqa: RUF001
    "∩": r"\cap ",
    "∈": r"\in ",
    "ℝ": r"\mathbb{R}",  # noqa: RUF001
    "∣": "|",  # noqa: RUF001
    "π": r"\pi ",
    "θ": r"\theta ",
    "α": r"\alpha ",  # noqa: RUF001
    "β": r"\beta ",
    "φ": r"\phi ",
    "λ": r"\lambda ",
    "ω": r"\omega ",
    "¢": r"\text{cents}",
}
_SIGNS_OF_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans({**_SIGNS_OF_FULL_WIDTH, **_SIGNS})
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?|[a-zA-Z]|\\[a-zA-Z]+|\{[^{}]*\}|\([^()]*\))")


def ascii_signs(text: str) -> str:
    """LaTeX commands in the place of mathematical signs outside of ASCII, plain spaces in that of all others."""
    if text.isascii():
        return text
    text = re.sub("[¼-¾⅐-⅞↉]", _vulgar, text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda m: "_{" + "".join(_LOWERED[c] for c in m[0]) + "}", text)
    return _ROOT.sub(_root, text.translate(_TABLE))


def _vulgar(found: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _root(found: re.Match[str]) -> str:
    inside = found[2].removeprefix("{").removesuffix("}") if found[2].startswith("{") else found[2]
    return (r"\sqrt{" if found[1] == "√" else r"\sqrt[3]{") + inside + "}"


# ---- commands ----

_COMMANDS = [
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace|medspace|thickspace|hfill)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|[bB]igg?[lrm]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}"), r"\\text{\1}"),
    (re.compile(r"\\(?:mbox|hbox|text(?:bf|it|rm|sf|tt|sc|normal))\s*\{"), r"\\text{"),
    (re.compile(r"\\math(?:rm|bf|it|sf|tt)\s*\{(?!\s*[Td]\s*\})"), r"\\text{"),
    (re.compile(r"\\text\s+\{"), r"\\text{"),
    (
        re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z])|\{\s*\\degree\s*\})|\\degrees?(?![a-zA-Z])"),
        r"^\\circ ",
    ),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\geqslant(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\leqslant(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"^\\text\{\s*(\\?\$?-?\d[\d,.]*%?)(?:\s+([^{}]*))?\}$"), r"\1 \\text{\2}"),
    (re.compile(r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}"), r"\\text{\1/\2}"),
    (re.compile(r"\\text\{([^{}]*)\}\s*/\s*\\text\{([^{}]*)\}"), r"\\text{\1/\2}"),
    (re.compile(r"^(?:\\text\{)?\s*(?:the )?(?:final )?answer(?: is|:| is:)\s*\}?", re.IGNORECASE), ""),
    (re.compile(r"\\text\{\s*(?:percent|pct)\s*\}|\\textpercent(?![a-zA-Z])"), r"\\%"),
    (re.compile(r"\\(?:text)?color\{[^{}]*\}|\\checkmark(?![a-zA-Z])|^\s*(?:=|\\approx(?![a-zA-Z]))"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\textdollar(?![a-zA-Z])"), r"\\$"),
    (re.compile(r"\\\(|\\\)|\\\[|(?<!\\)\\\]"), " "),
    (re.compile(r"^\*\*|\*\*$"), ""),
    (re.compile(r"\*\*(\w+)"), r"^{\1}"),
    (re.compile(r"(?<!\\)\bpi\b"), r"\\pi "),
]

# ---- numbers ----

_WORDS = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
COUNTS = [
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
]
_COUNT = re.compile(rf"(?:\\text\{{)?\s*({'|'.join(COUNTS)})\s*\}}?", re.IGNORECASE)
_IN_BRACES = re.compile(r"(?<![\d.,])\d{1,3}(?:\{,\}\d{3})+(?!\d)")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
_DOTTED = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.])")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_EXPONENT = re.compile(r"(?<![\w.}])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")
_MIXED = re.compile(r"(?<![\d./}])(\d+) +(\d+)/(\d+)(?![\d/.])")
_PERIODIC = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_LARGE = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:\\text\{{\s*)?({'|'.join(_WORDS)})s?\b(?:\s*\}})?", re.IGNORECASE)


def _mixed(found: re.Match[str]) -> str:
    whole, above, below = found.groups()
    return rf"{whole}\frac{{{above}}}{{{below}}}" if 0 < int(above) < int(below) else found[0]


def _periodic(found: re.Match[str]) -> str:
    whole, first, period = found.groups()
    unit = 10 ** len(first)
    value = Fraction(int(whole + first or "0"), unit) + Fraction(int(period), unit * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _together(found: re.Match[str]) -> str:
    return re.sub(r"\D", "", found[0])


def tidy(answer: str) -> str:
    """An answer in one notation: signs, spaces, commands and numbers.

    Groups of three digits after a comma, ``{,}`` or a space, and after several dots, are thousands. ``{,}`` before
    other digits is a decimal comma. A plain comma between other numbers lists them, as in MATH: "1,5" is 1 and 5.
    """
    table = "matrix" in answer or "array" in answer  # where \\\\ and spaces part rows and columns
    answer = ascii_signs(answer).strip()
    if not table:
        answer = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", answer)
    for pattern, replacement in _COMMANDS:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"\s+", " ", re.sub(r"\{\s*,\s*\}", "{,}", answer))
    answer = _DECIMAL_COMMA.sub(".", _DOTTED.sub(_together, _IN_BRACES.sub(_together, answer)))
    if not table:
        answer = _MIXED.sub(_mixed, _SPACED.sub(_together, answer))
    answer = _PERIODIC.sub(_periodic, _EXPONENT.sub(r"\1 \\times 10^{\2}", answer))
    answer = _LARGE.sub(lambda m: rf"{m[1]} \times {_WORDS[m[2].lower()]}", answer)
    answer = answer.strip().rstrip(".,;:").strip()
    count = _COUNT.fullmatch(answer)
    return str(COUNTS.index(count[1].lower())) if count else answer
