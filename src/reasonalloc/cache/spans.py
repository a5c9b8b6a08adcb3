"""What attention reads of one layer: spans of token slots."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.table import HostInts, on_device
from reasonalloc.kernels.chunks import LayerChunks


@dataclass(frozen=True, eq=False)
class Spans:
    """Keys and values in slots, of which each (row, head) owns one contiguous span.

    The tensors are filled in place from step to step.

    Attributes:
        keys, values: ``[slots, dim]`` in the model's dtype.
        received: ``[places]`` float32, accumulated attention, or None if it is not tracked.
        starts_device, lengths_device: ``[rows, heads]`` int64 where the keys are: first slot and tokens of each span.
        received_starts_device: likewise, the place in ``received`` of each span's first token.
        longest: tokens that no span has more of, as far as the host knows it.
        chunks: the spans cut into chunks, if the attention backend wants that prepared.
    """

    keys: Float[Tensor, "slots dim"]
    values: Float[Tensor, "slots value_dim"]
    received: Float[Tensor, "places"] | None
    starts_device: Int[Tensor, "rows heads"]
    lengths_device: Int[Tensor, "rows heads"]
    received_starts_device: Int[Tensor, "rows heads"]
    longest: int
    chunks: LayerChunks | None = None

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "slots dim"],
        values: Float[Tensor, "slots value_dim"],
        received: Float[Tensor, "places"] | None,
        starts: HostInts,
        lengths: HostInts,
    ) -> Spans:
        """From the host's numbers, ``[rows, heads]``; a slot is its own place in ``received``."""
        first, count = (on_device(x, keys.device) for x in (starts, lengths))
        return cls(keys, values, received, first, count, first, int(lengths.max(initial=0)))

    def __post_init__(self) -> None:
        if self.starts_device.device.type == "cpu":  # the same memory, looked at once for many steps
            own = (self.starts_device, self.lengths_device, self.received_starts_device)
            object.__setattr__(self, "_on_host", tuple(x.numpy() for x in own))

    @property
    def rows(self) -> int:
        """Rows: sequences or requests."""
        return int(self.lengths_device.shape[0])

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return int(self.lengths_device.shape[1])

    @property
    def on_host(self) -> tuple[HostInts, HostInts, HostInts]:
        """Starts, lengths and places in ``received`` on the host; not on a CPU, it waits for the device."""
        known: tuple[HostInts, HostInts, HostInts] | None = getattr(self, "_on_host", None)
        if known is not None:
            return known
        own = (self.starts_device, self.lengths_device, self.received_starts_device)
        starts, lengths, places = (x.cpu().numpy() for x in own)
        return starts, lengths, places
