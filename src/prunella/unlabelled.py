"""What samples that have no target of their own are compared with: what the dense network makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import say
from .model.checkpoint import Source
from .model.network import Model
from .progress import Track, no_track
from .samples import TARGET, Batch, Samples, on, size_of
from .stream import Stream


def through(
    model: Model, samples: Samples | Tensor, *, checkpoint: Source | None = None, track: Track = no_track, what: str
) -> Stream:
    """A stream with no steps: all samples through all blocks, one block in memory at a time."""
    stream = Stream(model, samples, checkpoint=checkpoint)
    for _, block in model.walk(checkpoint, track=track, what=what):
        stream.advance(block)
    return stream


def each_output(stream: Stream, work: Callable[[int], None], checkpoint: Source | None = None) -> None:
    """Do this work with each batch of samples that has passed all blocks; smaller batches follow where the memory of
    the device runs out. What lies outside of the blocks is loaded meanwhile."""
    number = 0
    with torch.no_grad():
        while number < len(stream.batches):
            # Loaded anew where batches were halved, after which what that needed of it is gone.
            with stream.model.outside(checkpoint=checkpoint):
                while number < len(stream.batches) and stream.fits(number, lambda n=number: work(n)):  # type: ignore[misc]
                    number += 1


def targeted(model: Model, samples: Samples, *, checkpoint: Source | None = None, track: Track = no_track) -> Samples:
    """Samples whose loss can be told: those that lack a target (`Task.lacks`) get one of what this model, which has to
    be the dense one, puts out for them (`Task.target`). It is streamed over them once."""
    lacking = tuple(group for group in samples.groups if model.task.lacks(group))
    if not lacking:
        return samples
    say(f"{sum(map(size_of, lacking))} samples come without a target: their loss is of what the dense network answers")
    return _answered_by(model, samples, lacking, checkpoint, track)


def compared(model: Model, samples: Samples, *, track: Track = no_track) -> Samples | None:
    """The same samples with what this model, which has to be the dense one, puts out for them in the place of their
    labels; None where they have none, or where the task can do nothing without."""
    task = model.task
    bare = Samples(tuple({k: t for k, t in group.items() if k not in task.labels} for group in samples.groups))
    labelled = any(len(group) > len(other) for group, other in zip(samples.groups, bare.groups, strict=True))
    if not labelled or not all(map(task.lacks, bare.groups)):
        return None
    return _answered_by(model, bare, bare.groups, None, track)


def _answered_by(
    model: Model, samples: Samples, lacking: tuple[Batch, ...], checkpoint: Source | None, track: Track
) -> Samples:
    """Samples with a target for those groups that lack one."""
    task = model.task
    stream = through(model, Samples(lacking), checkpoint=checkpoint, track=track, what="targets")
    rows: list[Tensor] = []

    def take(number: int) -> None:
        batch = on(stream.batches[number], model.device)
        rows.extend(task.target(stream.outputs(number), batch).cpu())

    each_output(stream, take, checkpoint)
    following = iter(rows)
    return Samples(
        tuple(
            {**group, TARGET: torch.stack([next(following) for _ in range(size_of(group))])}
            if any(group is one for one in lacking)
            else group
            for group in samples.groups
        )
    )
