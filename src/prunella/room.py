"""What is done where a device's memory runs out: fewer samples go through the blocks at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .calls import Calls
from .errors import say
from .hidden import Hidden
from .machine import forget
from .model.checkpoint import Source
from .model.network import Model
from .samples import Batch, Samples, size_of


class Stream(Protocol):
    """What is to be known of a stream."""

    model: Model
    checkpoint: Source | None
    calls: Calls
    batches: tuple[Batch, ...]
    halved: bool

    @property
    def order(self) -> str: ...

    @property
    def streams(self) -> list[Hidden]: ...


def fits(stream: Stream, batch: int, work: Callable[[], None]) -> bool:
    """Do this work with a batch of the stream, and say that it was done. If memory runs out, halve that batch and all
    that follow: the work is still to be done then, with each half.

    Raises torch.OutOfMemoryError for what cannot be halved: a single sample, or all of them in `layer` order.
    """
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        whole = stream.order == "layer" or size_of(stream.batches[batch]) == 1
        if whole or any(hidden.beside[batch] for hidden in stream.streams):
            raise
    forget(stream.model.device)  # here, where nothing holds on any more to what was begun
    if not stream.halved:
        half = -(-size_of(stream.batches[batch]) // 2)
        say(
            f"the memory of {stream.model.device} ran out: from here on {half} samples and not more go through a block"
            " at a time"
        )
    _halve(stream, batch)
    return False


def _halve(stream: Stream, start: int) -> None:
    """Halve the batches from this one on. How blocks are called with the halves is recorded anew."""
    stream.halved = True
    batches = list(stream.batches)
    with torch.no_grad(), stream.model.outside(head=False, checkpoint=stream.checkpoint):
        for index in range(len(batches) - 1, start - 1, -1):
            halves = list(Samples((batches[index],)).batches(max(1, -(-size_of(batches[index]) // 2))))
            batches[index : index + 1] = halves
            for hidden in stream.streams:
                hidden.split(index, [size_of(half) for half in halves], stream.calls.interface.batch)
                for number, half in enumerate(halves, index):
                    passed = hidden.states(number)
                    for stack in range(len(passed) + 1):
                        hidden.calls[number] += stream.calls.enter(half, passed[:stack])[1]
    stream.batches = tuple(batches)
