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
        shift: HostInts | int = 0,
    ) -> Spans:
        """From the host's numbers; ``shift`` leads from a row's slots to its places in ``received``: ``[rows]``."""
        places = starts + (shift if isinstance(shift, int) else shift[:, None])
        first, count, begin = (on_device(x, keys.device) for x in (starts, lengths, places))
        return cls(keys, values, received, first, count, begin, int(lengths.max(initial=0)))

    @property
    def rows(self) -> int:
        """Rows: sequences or requests."""
        return int(self.lengths_device.shape[0])

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return int(self.lengths_device.shape[1])

    @property
    def starts(self) -> HostInts:
        """On the host; on a CPU the same memory, elsewhere it waits for the device."""
        return self.starts_device.cpu().numpy()

    @property
    def lengths(self) -> HostInts:
        """Likewise."""
        return self.lengths_device.cpu().numpy()

    @property
    def received_starts(self) -> HostInts:
        """Likewise."""
        return self.received_starts_device.cpu().numpy()
