"""The processes of a run, as torchrun or accelerate started them: obtained where they are needed, not passed.

    team().main      # does this process write, and speak?
    team().size      # 1 where nobody started several

One process is a team too, and all that a team does is then nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .compat import forget_accelerator

T = TypeVar("T")
DEVICE = "ACCELERATE_TORCH_DEVICE"


@dataclass(frozen=True)
class Team:
    """The processes of a run; every one of them calls each method, in the same order.

    rank: which one this is, from 0
    size: how many there are
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Is this the one that writes and speaks?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in each of them."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """What every process has, in their order, in each of them; anything that pickles."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """What the main process has, in all of them; anything that pickles."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def share(self, items: Sequence[T], costs: Sequence[float] | None = None) -> list[T]:
        """This process's share of items, each of which goes to one process, in order: every n-th; with `costs` so that
        the sums of all shares are near each other, the dearest item first to whoever has least."""
        if costs is None:
            return list(items[self.rank :: self.size])
        loads, owners = [0.0] * self.size, [0] * len(items)
        for n in sorted(range(len(items)), key=lambda n: -costs[n]):
            owners[n] = loads.index(min(loads))
            loads[owners[n]] += costs[n]
        return [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]


def team(device: torch.device | None = None) -> Team:
    """The processes of this run. With a device they meet there, if they have not yet: all of them have to ask."""
    if device is not None:
        meet(device)
    if not dist.is_available() or not dist.is_initialized():
        return Team()
    return Team(dist.get_rank(), dist.get_world_size())


def meet(device: torch.device) -> torch.device:
    """Let the processes meet, as accelerate finds them; the device that it gives to this one."""
    from accelerate import PartialState

    with told(device):
        for _ in range(2):
            # Others wait while one measures.
            state: Any = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))
            found: torch.device = state.device
            if found.type == device.type and (_several() or device.index in (None, found.index)):
                break
            forget_accelerator()  # a run before this one was on another device
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _several() -> bool:
    """Were several processes started? Each has its own GPU then, by its number."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def told(device: torch.device) -> Iterator[None]:
    """Accelerate hears of this device meanwhile, unless it finds it by itself."""
    known = device.type == "cpu" or (device.type == "cuda" and (device.index is None or _several()))
    if known or DEVICE in os.environ:
        yield
        return
    os.environ[DEVICE] = str(device)
    try:
        yield
    finally:
        del os.environ[DEVICE]
