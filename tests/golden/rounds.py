"""One moment of a scenario, and how it is noticed that something was forgotten."""

from dataclasses import dataclass

import numpy as np

from golden.access import Kept


@dataclass(frozen=True)
class Round:
    """What is held after a forward pass in which something was forgotten, or at a scenario's end.

    Attributes:
        step: forward passes so far; at the end of a loop of transformers' own, the text's length.
        rows: the rows' numbers: of the batch that began, or arenas.
        kept: ``[layer][row][head]``, positions.
    """

    step: int
    rows: list[int]
    kept: Kept


class Watch:
    """Compares what every head holds with all that it held before and all that came since."""

    def __init__(self):
        self.before = None

    def forgot(self, kept: Kept, new: list[int]) -> bool:
        """Whether something is missing, ``new`` tokens having come into every row since the last call."""
        lengths = np.array([[[len(head) for head in row] for row in layer] for layer in kept])
        before = 0 if self.before is None else self.before
        expected = before + np.array(new)[:, None]
        self.before = lengths
        return bool((lengths != expected).any())

    def select(self, rows: list[int]) -> None:
        """The batch's rows were chosen anew."""
        self.before = self.before[:, rows]
