"""Where the host waits for a device: seldom.

On a CPU a number is there once it is computed, and a look at it costs nothing. On an accelerator every look (`item`,
`bool`, `cpu`) waits for all that was queued before it, while nothing new is queued. So what has to hold is demanded,
what is only to be said stays there until it is fetched, and both are looked at once in a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .machine import pinned, pins, queued

Failure = Callable[[], Exception]


class Again(Exception):
    """What was taken for granted does not hold: the same has to be done again, with a look at each step."""


_waiting: list[tuple[Tensor, Failure]] | None = None  # what has been demanded since the last look; None: look at once
_granted = False


@contextlib.contextmanager
def together(again: bool = False) -> Iterator[None]:
    """What is demanded inside of a device is looked at by the next `fetch`, or else in the end; also where something
    else fails, which may have come of it. `again`: all of it can be done once more, so that what nearly always holds
    is taken for granted (`holds`); where it does not, Again is raised."""
    global _waiting, _granted
    before = _waiting, _granted
    _waiting, _granted = [] if _waiting is None else _waiting, again
    try:
        try:
            yield
        finally:
            fetch(())
    finally:
        _waiting, _granted = before


def demand(good: Tensor, failure: Failure) -> None:
    """Raise what `failure` makes where `good`, a single bool, is False: now on a CPU, else see `together`."""
    if _waiting is not None and good.device.type != "cpu":
        _waiting.append((good, failure))
    elif not good:
        raise failure()


def holds(good: Tensor) -> bool:
    """Is it True? Inside `together(again=True)` a device is not asked: it is taken for granted."""
    if _granted and good.device.type != "cpu":
        demand(good, Again)
        return True
    return bool(good)


def seldom(values: Tensor, count: int, every: int) -> bool:
    """Is it time to look at these? On a CPU always; at a device after each `every` times, `count` of which are over.
    What is done in between has to change nothing then."""
    return values.device.type == "cpu" or count % every == every - 1


def either(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """One tensor or the other, as `where`, a single bool, says: `torch.where`, but that a CPU copies neither."""
    if where.device.type == "cpu":
        return one if where else other
    return torch.where(where, one, other)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """These tensors on the host, by one copy of all their bytes; what was demanded before goes with them, and raises
    if it does not hold."""
    pending = list(_waiting or ())
    if _waiting is not None:
        _waiting.clear()
    every = [*(good for good, _ in pending), *tensors]
    away = [tensor for tensor in every if tensor.device.type != "cpu"]
    if away:
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in away]).cpu()
        parts = torch.split(flat, [tensor.nbytes for tensor in away])
        # Copies, for each to begin where its dtype may.
        here = {id(t): part.clone().view(t.dtype).view(t.shape) for t, part in zip(away, parts, strict=True)}
        every = [here.get(id(tensor), tensor) for tensor in every]
    for good, (_, failure) in zip(every, pending, strict=False):
        if not good:
            raise failure()
    return every[len(pending) :]


def sent(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Let these tensors come to the host; what returns them there, and waits for that where it is called, which may be
    in another thread. Where the host's memory can be pinned nothing waits before."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None or not pins(device):
        here = fetch(tensors)
        return lambda: here
    there = [t if t.device.type == "cpu" else pinned(t).copy_(t, non_blocking=True) for t in tensors]
    wait = queued(device)

    def arrived() -> list[Tensor]:
        wait()
        return there

    return arrived


def number(value: Tensor) -> Tensor | float:
    """A single value to compute with: on a CPU the number, on a device a tensor as exact, which nobody waits for. MPS
    has no tensor as exact, and is waited for."""
    return value.item() if value.device.type in ("cpu", "mps") else value.double()
