"""Of few samples more."""

from __future__ import annotations

import torch

from ..errors import InputError, say
from ..foreign import blamed
from ..model.task import Task
from ..samples import Samples


def augmented(task: Task, samples: Samples, seed: int) -> Samples:
    """Samples, and behind those of each shape the same once more, changed at random as the task knows how."""
    generator = torch.Generator().manual_seed(seed)
    try:
        with blamed(type(task), f"task '{task.name}'"):
            more = [task.augment(group, generator) for group in samples.groups]
    except InputError:
        say(f"task '{task.name}' knows no augmentation: it is calibrated on the samples as they are")
        return samples
    return Samples(
        tuple(
            {key: torch.cat([tensor, changed[key]]) for key, tensor in group.items()}
            for group, changed in zip(samples.groups, more, strict=True)
        )
    )
