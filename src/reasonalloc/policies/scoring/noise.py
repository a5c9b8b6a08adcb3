"""Random numbers without a state: each is a function of what it is for, whatever else is drawn, where and when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BITS = 64
_MANTISSA = 23  # bits of a draw; with half a step added, all draws are float32 numbers inside (0, 1)
_LAYER_STRIDE = 1_000_003  # more rows than a batch has
_NO_HEAD = -1  # in a head's place where the numbers are not of a head


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of ``x``."""
    x &= (1 << _BITS) - 1
    return x - (1 << _BITS) if x >> (_BITS - 1) else x


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Noise:
    """The random numbers of one round, for every row of a batch.

    Counter-based, by the output function of splitmix64 (Steele, Lea and Flood, 2014) in int64 arithmetic that wraps:
    no state, no wait for the device, the same integers on every device. A row's numbers depend neither on the other
    rows nor on padding.

    Attributes:
        seed: any whole number; its low 64 bits count.
        stream: tells rows apart that draw independently, see ``stream_of``.
        round: tells apart the rounds of a row: the tokens that it has seen so far.

    Raises:
        ValueError: ``stream`` and ``round`` do not have one number for each row.
    """

    seed: int
    stream: Int[Tensor, "batch"]
    round: Int[Tensor, "batch"]

    def __post_init__(self) -> None:
        if self.stream.dim() != 1 or self.stream.shape != self.round.shape:
            raise ValueError(
                "stream and round are one number for each row, "
                f"got shapes {tuple(self.stream.shape)} and {tuple(self.round.shape)}"
            )

    def uniform(self, positions: Int[Tensor, "batch heads tokens"]) -> Float[Tensor, "batch heads tokens"]:
        """Uniform in (0, 1), ends excluded, float32: one number for each row, head and position."""
        heads = torch.arange(positions.shape[1], device=positions.device)
        return _fraction(_absorb(_absorb(self._rows()[:, None], heads)[..., None], positions.long()))

    def normal(self, rows: int, columns: int) -> Float[Tensor, "batch rows columns"]:
        """A matrix of standard normal numbers for each row of the batch, float32; independent of ``uniform``."""
        entries = torch.arange(rows * columns, device=self.stream.device)
        uniform = _fraction(_absorb(_absorb(self._rows(), _NO_HEAD)[:, None], entries))
        return (torch.erfinv(2 * uniform - 1) * 2**0.5).view(-1, rows, columns)

    def _rows(self) -> Int[Tensor, "batch"]:
        seeded = _absorb(torch.zeros_like(self.stream, dtype=torch.int64), _signed(self.seed))
        return _absorb(_absorb(seeded, self.stream.long()), self.round.long())


def stream_of(layer: int | Int[Tensor, "batch"], row: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """The stream of a row of the batch (its index as long as it has it) in a layer."""
    return layer * _LAYER_STRIDE + row


def _absorb(state: Tensor, number: Tensor | int) -> Tensor:
    """The state after one more number: another one for each, and each bit of it depends on all before."""
    x = (state ^ number) + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted right as if unsigned."""
    return (x >> by) & ((1 << (_BITS - by)) - 1)


def _fraction(x: Tensor) -> Tensor:
    """The highest bits as a number inside (0, 1), exact."""
    return (_shifted(x, _BITS - _MANTISSA).to(torch.float32) + 0.5) * 2.0**-_MANTISSA
