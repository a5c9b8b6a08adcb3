"""Survivors to their new slots: within a memory and in place, or from another memory.

``index[span, i]`` says which of a span's tokens becomes its ``i``-th; ascending, so that tokens keep their order.
Only the first ``kept[span]`` entries are read. All numbers of spans are int64, all of the index int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.kernels import launch

_TILE = 64  # tokens that are moved at once
_NUMBERS = 256  # the same, of one number each
_PROGRAMS = 264  # two for each multiprocessor of a large device
_LEAST_BYTES = 32  # of a token that a program moves: what memory reads at once
_WAVES = 16  # programs of a copy, in multiples of ``_PROGRAMS``: many enough for spans of unequal length


def move_within(
    memories: tuple[Float[Tensor, "slots dim"], ...],
    index: Int[Tensor, "spans width"],
    kept: Int[Tensor, "spans"],
    old_starts: Int[Tensor, "spans"],
    new_starts: Int[Tensor, "spans"],
    spans_per_segment: int,
) -> None:
    """Survivors to their new slots in the same memories, without scratch.

    Old and new layout keep spans and tokens in order. So a token that moves right can only overwrite tokens that move
    right, and one that moves left only such: the first kind goes from the end to the front, then the second from the
    front to the end.

    Args:
        memories: contiguous: keys and values.
        index, kept: of each span, see above.
        old_starts, new_starts: first slots, ascending inside a segment.
        spans_per_segment: as many consecutive spans are a segment; no token leaves its segment's slots.
    """
    spans = len(kept)
    if not spans:
        return
    index, kept, old_starts, new_starts = (x.contiguous() for x in (index, kept, old_starts, new_starts))
    segments = spans // spans_per_segment
    with launch.device_of(index):
        for first, second in _pairs(memories):
            kinds, dim = 1 if second is first else 2, first.shape[1]
            part = part_of(dim, first.element_size(), segments * kinds)
            parts = triton.cdiv(dim, part)
            _move[(segments, kinds * parts)](
                first, second, index, kept, old_starts, new_starts, index.shape[1], spans_per_segment, parts,
                dim=dim, PART=part, TILE=_TILE, num_warps=4, num_stages=1,
            )  # fmt: skip


def copy_between(
    source: Float[Tensor, "slots_there dim"],
    target: Float[Tensor, "slots dim"],
    first: Int[Tensor, "spans"],
    new_starts: Int[Tensor, "spans"],
    kept: Int[Tensor, "spans"],
    index: Int[Tensor, "spans width_of_index"] | None,
    width: int,
) -> None:
    """Tokens of one memory into another one.

    Args:
        source, target: contiguous, of one dtype, not the same memory.
        first: where each span's tokens begin in ``source``.
        new_starts: where they begin in ``target``.
        kept, index: of each span, see above; None: the first tokens.
        width: tokens that a span keeps at most.
    """
    spans = len(kept)
    if not spans:
        return
    chosen = None if index is None else index.contiguous()
    programs = programs_of(spans, width, _TILE)
    with launch.device_of(target):
        _copy[(spans * programs,)](
            source, target, first.contiguous(), new_starts.contiguous(), kept.contiguous(),
            kept if chosen is None else chosen, 0 if chosen is None else chosen.shape[1], programs,
            dim=source.shape[1], DIM=launch.padded(source.shape[1]), CHOSEN=chosen is not None, TILE=_TILE, num_warps=4,
        )  # fmt: skip


def move_numbers(
    memory: Int[Tensor, "places"] | Float[Tensor, "places"],
    index: Int[Tensor, "spans width_of_index"] | None,
    kept: Int[Tensor, "spans"],
    old: Int[Tensor, "spans"],
    new: Int[Tensor, "spans"],
    width: int,
    source: Tensor | None = None,
    settled: Int[Tensor, "spans"] | None = None,
    first: Int[Tensor, "spans"] | None = None,
) -> None:
    """One number of each token: its position, or the attention that it received.

    ``memory[new + i]`` becomes the number of token ``index[i]``. That of token ``j`` is ``source[old + j]``, or
    ``first + j`` where ``j >= settled``.

    Args:
        memory: int32 or float32.
        index, kept: of each span, see above; None: the first tokens.
        old: each span's first place in ``source``.
        new: its first place in ``memory``.
        width: tokens that a span keeps at most.
        source: of the memory's dtype, another memory; None: the memory itself, by way of scratch.
        settled, first: tokens of each span whose number is stored, and what the others' are counted from; both or none.
    """
    spans = len(kept)
    if not spans or not width:
        return
    kept, old, new = kept.contiguous(), old.contiguous(), new.contiguous()
    chosen = None if index is None else index.contiguous()
    programs = programs_of(spans, width, _NUMBERS)
    counted = (kept, kept) if settled is None or first is None else (settled.contiguous(), first.contiguous())
    numbers = (kept if chosen is None else chosen, 0 if chosen is None else chosen.shape[1])
    flags = {"CHOSEN": chosen is not None, "COUNTED": settled is not None, "TILE": _NUMBERS}
    grid = (spans * programs,)
    with launch.device_of(memory):
        if source is not None:
            _gather[grid](
                source, memory, *numbers, kept, old, new, *counted, 0, programs, **flags, PLACED=True, num_warps=4
            )
            return
        scratch = torch.empty(spans, width, dtype=memory.dtype, device=memory.device)
        _gather[grid](
            memory, scratch, *numbers, kept, old, new, *counted, width, programs, **flags, PLACED=False, num_warps=4
        )
        _place[grid](scratch, memory, kept, new, width, programs, TILE=_NUMBERS, num_warps=4)


def _pairs(memories: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Memories of equal width and dtype two by two: they move together. One alone is paired with itself."""
    first, second = memories[0], memories[-1]
    if len(memories) == 2 and first.shape[1] == second.shape[1] and first.dtype == second.dtype:
        return [(first, second)]
    return [(memory, memory) for memory in memories]


def part_of(dim: int, element_size: int, segments: int) -> int:
    """Channels of one program: all, or fewer where that many segments are too few for the device."""
    part = triton.next_power_of_2(dim)
    while segments * triton.cdiv(dim, part) < _PROGRAMS and part * element_size > _LEAST_BYTES:
        part //= 2
    return part


def programs_of(spans: int, width: int, tile: int) -> int:
    """How many programs share a span's tiles, of ``width`` tokens at most: how long it is, only the device knows."""
    return max(1, min(triton.cdiv(width, tile), _WAVES * _PROGRAMS // spans))


@triton.jit(do_not_specialize=["width", "spans", "parts"])
def _move(
    first, second, index, kept, old_starts, new_starts, width, spans, parts,
    dim: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some channels of one segment. A tile of tokens is read whole before it is written."""
    segment = tl.program_id(0)
    kind, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    memory = first
    if kind == 1:
        memory = second
    c = part * PART + tl.arange(0, PART)
    has_channel = (c < dim)[None, :]
    for back in range(spans):
        span = segment * spans + spans - 1 - back
        old, new = tl.load(old_starts + span), tl.load(new_starts + span)
        shift = new - old
        if shift > 0:
            count = tl.load(kept + span).to(tl.int32)
            chosen = index + span.to(tl.int64) * width
            source, target = memory + old * dim, memory + new * dim
            at = (tl.cdiv(count, TILE) - 1) * TILE
            while at >= 0:
                if tl.load(chosen + at) - at < shift:
                    t = at + tl.arange(0, TILE)
                    here = tl.load(chosen + t, mask=t < count, other=0)
                    goes = ((t < count) & (here - t < shift))[:, None] & has_channel
                    x = tl.load(source + here[:, None] * dim + c[None, :], mask=goes)
                    tl.debug_barrier()
                    tl.store(target + t[:, None] * dim + c[None, :], x, mask=goes)
                at -= TILE
    for ahead in range(spans):
        span = segment * spans + ahead
        old, new = tl.load(old_starts + span), tl.load(new_starts + span)
        shift = new - old
        count = tl.load(kept + span).to(tl.int32)
        chosen = index + span.to(tl.int64) * width
        source, target = memory + old * dim, memory + new * dim
        at = 0
        while at < count:
            last = tl.minimum(at + TILE, count) - 1
            if tl.load(chosen + last) - last > shift:
                t = at + tl.arange(0, TILE)
                here = tl.load(chosen + t, mask=t < count, other=0)
                goes = ((t < count) & (here - t > shift))[:, None] & has_channel
                x = tl.load(source + here[:, None] * dim + c[None, :], mask=goes)
                tl.debug_barrier()
                tl.store(target + t[:, None] * dim + c[None, :], x, mask=goes)
            at += TILE


@triton.jit(do_not_specialize=["width", "programs"])
def _copy(
    source, target, first, new_starts, kept, index, width, programs,
    dim: tl.constexpr, DIM: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every ``programs``-th tile of a span."""
    span, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    count = tl.load(kept + span).to(tl.int32)
    come_from = source + tl.load(first + span) * dim
    go_to = target + tl.load(new_starts + span) * dim
    d = tl.arange(0, DIM)
    for at in range(program * TILE, count, programs * TILE):
        t = at + tl.arange(0, TILE)
        here = t
        if CHOSEN:
            here = tl.load(index + span.to(tl.int64) * width + t, mask=t < count, other=0)
        there = (t < count)[:, None] & (d < dim)[None, :]
        x = tl.load(come_from + here[:, None] * dim + d[None, :], mask=there)
        tl.store(go_to + t[:, None] * dim + d[None, :], x, mask=there)


@triton.jit(do_not_specialize=["width", "stride", "programs"])
def _gather(
    source, target, index, width, kept, old, new, settled, counted_from, stride, programs,
    CHOSEN: tl.constexpr, COUNTED: tl.constexpr, PLACED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Numbers of a span's tokens to its row of the scratch (``stride``), or, PLACED, to their new places."""
    span, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    count = tl.load(kept + span).to(tl.int32)
    come_from = source + tl.load(old + span)
    go_to = target + (tl.load(new + span) if PLACED else span.to(tl.int64) * stride)
    for at in range(program * TILE, count, programs * TILE):
        t = at + tl.arange(0, TILE)
        here = t
        if CHOSEN:
            here = tl.load(index + span.to(tl.int64) * width + t, mask=t < count, other=0)
        if COUNTED:
            stored = here < tl.load(settled + span)
            number = tl.load(come_from + here, mask=(t < count) & stored, other=0)
            number = tl.where(stored, number, (tl.load(counted_from + span) + here).to(number.dtype))
        else:
            number = tl.load(come_from + here, mask=t < count, other=0)
        tl.store(go_to + t, number, mask=t < count)


@triton.jit(do_not_specialize=["stride", "programs"])
def _place(scratch, memory, kept, new, stride, programs, TILE: tl.constexpr):
    """Numbers from a span's row of the scratch to their new places."""
    span, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    count = tl.load(kept + span).to(tl.int32)
    go_to = memory + tl.load(new + span)
    for at in range(program * TILE, count, programs * TILE):
        t = at + tl.arange(0, TILE)
        tl.store(go_to + t, tl.load(scratch + span.to(tl.int64) * stride + t, mask=t < count), mask=t < count)
