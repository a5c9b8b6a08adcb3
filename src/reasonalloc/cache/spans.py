"""Spans of token slots: what attention while decoding reads, and appends to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

HostInts = npt.NDArray[np.int64]


def on_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The host's numbers on a device, without waiting for it; on the CPU the same memory."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


class Spans:
    """Keys and values in slots, of which each (sequence, head) owns one contiguous span.

    Lengths and starts are mirrored on the host: between compressions they grow by known amounts, so nothing in the
    decode loop has to wait for the device.

    Attributes:
        keys, values: ``[slots, dim]`` in the model's dtype.
        received: ``[slots]`` float32, accumulated attention, or None if it is not tracked.
        starts, lengths, capacities: ``[batch, heads]`` on the host: first slot, live tokens, slots of each span.
        starts_device, lengths_device: the same where the keys are.
    """

    def __init__(
        self,
        keys: Float[Tensor, "slots dim"],
        values: Float[Tensor, "slots value_dim"],
        received: Float[Tensor, "slots"] | None,
        starts: HostInts,
        lengths: HostInts,
        capacities: HostInts,
        mirrored: tuple[Int[Tensor, "batch heads"], Int[Tensor, "batch heads"]] | None = None,
    ) -> None:
        """``mirrored``: starts and lengths on the device, where they are there already."""
        self.device = keys.device
        self.keys, self.values, self.received = keys, values, received
        if mirrored is None:
            self._place(starts, lengths, capacities)
        else:
            self.starts, self.lengths, self.capacities = starts, lengths, capacities
            self.starts_device, self.lengths_device = mirrored

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.lengths.shape[0])

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return int(self.lengths.shape[1])

    @property
    def slots(self) -> int:
        """Token slots, over all spans."""
        return int(self.keys.shape[0])

    def append(
        self, keys: Float[Tensor, "batch heads 1 dim"], values: Float[Tensor, "batch heads 1 value_dim"]
    ) -> None:
        """Add one token to every span. The caller has made room."""
        slots = (self.starts_device + self.lengths_device).flatten()
        self.keys.index_copy_(0, slots, keys.reshape(-1, keys.shape[-1]))
        self.values.index_copy_(0, slots, values.reshape(-1, values.shape[-1]))
        if self.received is not None:
            self.received.index_fill_(0, slots, 0.0)
        self._advance(np.ones(self.batch, dtype=np.int64))

    def _advance(self, counts: HostInts) -> None:
        self.lengths += counts[:, None]
        if self.device.type != "cpu":  # on the CPU the device's view shares the host's memory
            self.lengths_device += on_device(counts, self.device)[:, None]

    def _place(self, starts: HostInts, lengths: HostInts, capacities: HostInts) -> None:
        self.starts, self.lengths, self.capacities = starts, lengths, capacities
        self.starts_device = on_device(starts, self.device)
        self.lengths_device = on_device(lengths, self.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (copy.deepcopy, pickle) has its own numbers, and its device's view must be of these."""
        self.__dict__.update(state)
        self._place(self.starts, self.lengths, self.capacities)
