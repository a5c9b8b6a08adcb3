"""What training opens with: bare look-ups, which every family needs before it can learn anything else."""

from __future__ import annotations

import random

from reasonalloc.tasks.task import DIGITS, NAMES

_VALUES = (*NAMES, *DIGITS)
_BRIDGES = ((), (":",), ("from",))  # what may stand between a name and its values
VOCABULARY = (*_VALUES, *(word for bridge in _BRIDGES for word in bridge), ";")


def lookups(rng: random.Random, size: int) -> tuple[list[str], list[str], list[bool]]:
    """``size`` records such as ``x5 7 x2 ;``, ``x3 : x8 ;`` or ``x9 from x1 ;``, of one to three values; then twice as
    many of them, said again.

    Half of what is said again are look-ups, whereas in a family's problems they are rare: found there only after
    thousands of steps or not at all, they are found here in some two hundred.

    Returns:
        Words of the question, words of the thought, and for each of these whether the question settles it: the name
        that begins a record is anyone's choice.

    Raises:
        ValueError: there are not so many names.
    """
    if size > len(NAMES):
        raise ValueError(f"{size} look-ups need as many names, there are {len(NAMES)}")
    records = {
        name: [*rng.choice(_BRIDGES), *rng.choices(_VALUES, k=rng.randint(1, 3))] for name in rng.sample(NAMES, size)
    }
    question = [word for name, values in records.items() for word in (name, *values, ";")]
    thought, settled = [], []
    for name in rng.choices(list(records), k=2 * size):
        thought += [name, *records[name], ";"]
        settled += [False, *(True for _ in records[name]), True]
    return question, thought, settled
