"""Units of measure beside numbers: taken off, and compared where both sides name one."""

from __future__ import annotations

import re

_SPELLINGS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "l": "l liter litre",
    "ml": "ml milliliter millilitre",
    "gal": "gal gallon",
    "dollar": "dollar usd",
    "cent": "cent",
    "euro": "euro eur",
    "yen": "yen jpy",
    "rupee": "rupee",
    "degree": "degree deg",
    "radian": "radian rad",
    "mph": "mph",
    "km/h": "km/h kmh kph kmph",
    "m/s": "m/s",
    "ft/s": "ft/s",
    "": "unit",
}
_UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_MONEY = re.compile(r"\\?\$|[€£¥₹]")
_POWER = r"(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?"
_AFTER = r"(?<=[\d})])\s*"
_IN_TEXT = re.compile(_AFTER + r"\\text\{([^{}$]*?)(\^\{?\d\}?)?\s*\}" + _POWER)
_PLAIN_NAMES = sorted((name for name in _UNITS if len(name) > 1), key=len, reverse=True)
_SQUARE = r"(?:(?:square|sq|cubic|cu)\.?\s+)?"
_PLAIN = re.compile(rf"(?<=[\d}})])\s*(?<![a-zA-Z\\])({_SQUARE}(?:{'|'.join(_PLAIN_NAMES)})s?)\.?{_POWER}(?![\w\\^])")
_THINGS = re.compile(r"^(-?[\d,]*\.?\d+) ([A-Za-z-]{4,}(?: [A-Za-z-]+)*)$")  # "15 oranges"
_TEMPERATURE = re.compile(r"\^\\circ\s*(?:\\text\{\s*([CFK])\s*\}|([CF])(?![a-zA-Z]))")
_DEGREES = re.compile(r"\^\\circ\s*")
# Words after a number that say another number, or less than a number.
_NO_UNIT = re.compile(
    r"\b(and|or|more|less|least|most|than|not|no|about|to|through|between|if|when|where|for|choose|mod|modulo|base|times|"
    r"over|squared|cubed|percent|pct|percentage|[ap]\.?m|is|are|greater|fewer|remainder|r|half|i|e|x|y|n|k)\b|[\d=<>+*]",
    re.IGNORECASE,
)


def _unit(words: str) -> str:
    """The unit's own name; the words themselves where they are no unit known here."""
    plain = re.sub(r"\b(square|sq|cubic|cu)\b\.?", "", words.lower()).replace(".", "").strip()
    return _UNITS.get(plain) or _UNITS.get(plain.removesuffix("s"), "")


def without_units(answer: str) -> tuple[str, tuple[str, ...]]:
    """An answer in one notation less units after numbers and signs of money, and the known units in their order.

    Words after a number that are no known unit ("15 oranges") go, too, unless they might change its value.
    """
    units = [_CURRENCIES[sign] for sign in _MONEY.findall(answer)]
    answer = _MONEY.sub("", answer)

    def take(found: re.Match[str]) -> str:
        words = found[1].strip()
        if _NO_UNIT.search(words):
            return found[0]
        units.append(_unit(words))
        return " "

    answer = _IN_TEXT.sub(take, answer)
    answer = _PLAIN.sub(take, answer)
    things = _THINGS.match(answer)
    if things and not _NO_UNIT.search(things[2]):
        answer = things[1]
    temperature = _TEMPERATURE.search(answer)
    if temperature:
        units.append(temperature[1] or temperature[2])
    answer = _DEGREES.sub("", _TEMPERATURE.sub("", answer))
    return answer.strip(), tuple(unit for unit in units if unit)


def contradict(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether both name units, and not the same."""
    return bool(one) and bool(other) and set(one).isdisjoint(other)
