"""Recall: facts far back in a long text. For general models, whose mathematics may be too weak to be measured."""

from __future__ import annotations

import random

_THINGS = """
    box bridge bucket candle carpet clock cup door drum fence flag garden hammer harbour kettle key ladder lamp letter
    map mirror mill needle oven paddle pencil piano pillow plate quilt ribbon rope saddle scarf shelf shovel spoon stove
    table tent tower train trumpet umbrella vase violin wagon well wheel window
""".split()  # noqa: SIM905 (a list of fifty strings reads worse)
_COLOURS = ("amber", "black", "blue", "brown", "copper", "green", "grey", "ivory", "orange", "purple", "red", "silver")
_REMARKS = (
    "Nothing else was noted at that hour.",
    "It rained a little, and the street stayed empty.",
    "The next visitor came only after lunch.",
    "Somebody had left the lights on again.",
    "The guard wrote this down and went on.",
    "All the papers were in order.",
)
ASKED = 4
_LINE = "The number of {thing} is {number}."


def recall_question(seed: int, facts: int) -> tuple[str, dict[str, str]]:
    """A long report of ``facts`` numbered things and remarks between them, and what some of the numbers were.

    Returns:
        The prompt, which ends with the question, and the answers by thing: {"the red box": "4711"}.

    Raises:
        ValueError: more facts than there are things, or less than are asked for.
    """
    pairs = [f"the {colour} {thing}" for thing in _THINGS for colour in _COLOURS]
    if not ASKED <= facts <= len(pairs):
        raise ValueError(f"recall takes {ASKED} to {len(pairs)} facts, got {facts}")
    rng = random.Random(f"recall {facts} {seed}")
    numbers = {thing: str(rng.randrange(1000, 10000)) for thing in rng.sample(pairs, facts)}
    report = " ".join(
        f"{_LINE.format(thing=thing, number=number)} {rng.choice(_REMARKS)}" for thing, number in numbers.items()
    )
    asked = rng.sample(list(numbers), ASKED)
    question = (
        f"Read this report.\n\n{report}\n\nWhat are the numbers of {', '.join(asked[:-1])} and {asked[-1]}? "
        "Give one line for each, in this form: The number of ... is ..."
    )
    return question, {thing: numbers[thing] for thing in asked}


def recall_text(answers: dict[str, str]) -> str:
    """What a model that remembers everything writes: one line for each thing that was asked for."""
    return "\n".join(_LINE.format(thing=thing, number=number) for thing, number in answers.items())
