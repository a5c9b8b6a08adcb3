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

    The arrays and tensors are filled in place from step to step, and made anew when a round moves the spans.

    Attributes:
        keys, values: ``[slots, dim]`` in the model's dtype.
        received: ``[places]`` float32, accumulated attention, or None if it is not tracked.
        starts, lengths, capacities: ``[rows, heads]`` on the host: first slot, tokens, slots of each span.
        starts_device, lengths_device: the same where the keys are.
        received_starts, received_starts_device: likewise, the place in ``received`` of each span's first token.
        chunks: the spans cut into chunks, if the attention backend wants that prepared.
    """

    keys: Float[Tensor, "slots dim"]
    values: Float[Tensor, "slots value_dim"]
    received: Float[Tensor, "places"] | None
    starts: HostInts
    lengths: HostInts
    capacities: HostInts
    starts_device: Int[Tensor, "rows heads"]
    lengths_device: Int[Tensor, "rows heads"]
    received_starts: HostInts
    received_starts_device: Int[Tensor, "rows heads"]
    chunks: LayerChunks | None = None

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "slots dim"],
        values: Float[Tensor, "slots value_dim"],
        received: Float[Tensor, "places"] | None,
        starts: HostInts,
        lengths: HostInts,
        capacities: HostInts,
        shift: HostInts | int = 0,
    ) -> Spans:
        """From the host's numbers; ``shift`` leads from a row's slots to its places in ``received``: ``[rows]``."""
        places = starts + (shift if isinstance(shift, int) else shift[:, None])
        sent = [on_device(x, keys.device) for x in (starts, lengths, places)]
        return cls(keys, values, received, starts, lengths, capacities, sent[0], sent[1], places, sent[2])

    @property
    def rows(self) -> int:
        """Rows: sequences or requests."""
        return int(self.lengths.shape[0])

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return int(self.lengths.shape[1])
