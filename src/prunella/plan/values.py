"""The values of a plan: float32, each channel's positions one after the other, in one memory that all share.

While a plan is made they have no memory: each is a tensor on the meta device, whose shape, strides and offset say where
its elements will lie. A transposed, split or sliced value is another tensor of the same storage, as torch makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compat import storage_of
from ..sparse.striped import leading

LANES = 16  # floats to a vector, and to a cache line
BEHIND = 64  # floats behind a value that may be read


@dataclass(eq=False)
class Buffer:
    """A stretch of the memory.

    size:  floats
    whole: the meta tensor of all of it
    first, last: numbers of the actions that write it first and read it last
    start: where it lies, in floats, once memory is laid out
    """

    size: int
    whole: Tensor = field(init=False)
    first: int = -1
    last: int = -1
    start: int = -1

    def __post_init__(self) -> None:
        self.whole = torch.empty(self.size, device="meta")

    def use(self, action: int) -> None:
        self.first = action if self.first < 0 else self.first
        self.last = max(self.last, action)


@dataclass(frozen=True, eq=False)
class Live:
    """A value, or a view of one."""

    buffer: Buffer
    meta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    def on(self, memory: Tensor) -> Tensor:
        """The view on the memory (floats)."""
        offset = self.buffer.start + self.meta.storage_offset()
        return memory.as_strided(self.meta.shape, self.meta.stride(), offset)


@dataclass(frozen=True, eq=False)
class Loose:
    """What torch makes anew in each run, at a place of its own: any dtype.

    slot:  its number among these
    shape, dtype: what it is like
    alike: axes along which all of its entries are the same, as is known
    holds: buffers whose memory it may lie in
    """

    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    alike: frozenset[int] = frozenset()
    holds: frozenset[Buffer] = frozenset()


@dataclass(frozen=True, eq=False)
class Plane:
    """A value as the steps see it: channel c begins at `offset + c * ld` of the buffer, in floats."""

    buffer: Buffer
    offset: int
    ld: int
    channels: int
    positions: int


def new_value(shape: Sequence[int], axis: int) -> Live:
    """A value whose channels are on this axis."""
    axis %= len(shape)
    channels, positions = shape[axis], math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
    ld = leading(positions)
    buffer = Buffer(channels * ld + BEHIND)
    strides, step = [0] * len(shape), 1
    for at in reversed(range(len(shape))):
        if at == axis:
            strides[at] = ld
        else:
            strides[at], step = step, step * shape[at]
    return Live(buffer, buffer.whole.as_strided(tuple(shape), strides))


def plane_of(live: Live, axis: int) -> Plane | None:
    """The value with its channels on this axis, if it lies so: all other axes one after another without gaps."""
    shape, strides = live.meta.shape, live.meta.stride()
    axis %= len(shape)
    step = 1
    for at in reversed(range(len(shape))):
        if at != axis and shape[at] != 1:
            if strides[at] != step:
                return None
            step *= shape[at]
    ld = int(strides[axis]) if shape[axis] > 1 else max(leading(step), strides[axis])
    if ld < -(-step // LANES) * LANES:
        return None
    return Plane(live.buffer, live.meta.storage_offset(), ld, shape[axis], step)


def channel_axis(live: Live) -> int | None:
    """The axis of a value's channels; None where it does not lie channel by channel."""
    strides = live.meta.stride()
    for axis in sorted(range(len(strides)), key=lambda at: -strides[at] * (live.shape[at] > 1)):
        if plane_of(live, axis) is not None:
            return axis
    return None


def find_views(made: object, buffers: dict[int, Buffer]) -> object:
    """What an operator made of meta tensors, as values; None where something is no view of a value."""
    if isinstance(made, Tensor):
        buffer = buffers.get(storage_of(made))
        return None if buffer is None else Live(buffer, made)
    if isinstance(made, list | tuple):
        found = [find_views(one, buffers) for one in made]
        return None if any(one is None for one in found) else found
    return None
