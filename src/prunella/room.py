"""What is done where a device's memory runs out: fewer samples go through the blocks at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .errors import say
from .machine import forget
from .samples import Samples, size_of

if TYPE_CHECKING:
    from .stream import Stream


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
