"""Where the values of a plan lie: a stretch that nobody reads any more is given to the next one."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from .values import BEHIND, LANES, Buffer

_PAGE = 1 << 21  # bytes of a large page


def lay_out(buffers: Iterable[Buffer]) -> int:
    """Give each buffer its start; returns how many floats all of them take. Large ones are laid first, each into the
    lowest gap that it fits in while it is used."""
    laid: list[Buffer] = []
    size = 0
    for buffer in sorted(buffers, key=lambda one: (-one.size, one.first)):
        room = -(-buffer.size // LANES) * LANES
        at = 0
        for other in sorted((one for one in laid if _meet(one, buffer)), key=lambda one: one.start):
            if at + room <= other.start:
                break
            at = max(at, other.start + -(-other.size // LANES) * LANES)
        buffer.start = at
        laid.append(buffer)
        size = max(size, at + room)
    return size + BEHIND


def _meet(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def memory(size: int) -> Tensor:
    """So many floats, zero, on pages as large as the system has."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size)
    taken = mmap.mmap(-1, size * 4 + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    taken.madvise(mmap.MADV_HUGEPAGE)
    at = -torch.frombuffer(taken, dtype=torch.uint8).data_ptr() % _PAGE
    return torch.frombuffer(taken, dtype=torch.float32, count=size, offset=at)  # which holds `taken`
