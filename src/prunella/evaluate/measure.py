"""What a run measures before and after: its task's scores on held-out samples, and something that the model makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..foreign import blamed
from ..model.checkpoint import Source
from ..model.network import Model
from ..model.task import NO_ANSWERS, Answers, Task
from ..progress import Track
from ..samples import Samples
from ..save import Output
from .perplexity import answered


def whole_name(source: str) -> str:
    """A source as it can be found from anywhere."""
    return os.path.abspath(source) if Path(source).is_file() else source


def measure(
    model: Model,
    source: str | None,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
    dense: Answers = NO_ANSWERS,
) -> tuple[dict[str, Any], Answers]:
    """The task's scores on held-out samples, of a source of this name, and something that the model makes; of the
    weights in `checkpoint`, if one is given. And what the network answered; `dense` are the dense network's answers."""
    task = model.task
    if samples is None:
        return {**_figure(task), **task.scores(model, Samples(()), ()), "sample": None}, NO_ANSWERS
    samples = Samples.of(samples)
    losses, answers = answered(model, samples, checkpoint=checkpoint, track=track)
    scores = scored(model, samples, losses, answers, dense)
    return {"source": source, **scores, "sample": task.specimen(model, checkpoint)}, answers


def scored(
    model: Model, samples: Samples, losses: Sequence[float], answers: Answers, dense: Answers = NO_ANSWERS
) -> dict[str, Any]:
    """What the task makes of losses and answers, with the name of what counts."""
    task = model.task
    told: dict[str, Any] = {"answers": answers, "dense": dense} if answers else {}
    with blamed(type(task), f"task '{task.name}'"):
        return {**_figure(task), **task.scores(model, samples, losses, **told)}


def _figure(task: Task) -> dict[str, Any]:
    """What counts, and how it is read; of perplexity everybody knows."""
    if task.figure == "perplexity":
        return {}
    more = {"higher": task.higher, "unit": task.unit}
    return {"figure": task.figure, **{key: value for key, value in more.items() if value}}


def measure_once(
    out: Output | None,
    side: str,
    model: Model,
    source: str | None,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
    answers: dict[str, Answers] | None = None,
) -> dict[str, Any]:
    """As `measure`; a run that resumes does not measure the same side (dense, pruned, …) on the same samples again.

    answers: of the sides that were measured before, to which this one's are added; those of `dense` are the ones that
             others are compared with.
    """
    told = {} if answers is None else answers
    key = side if samples is None else f"{side} on {digest(samples)}"
    found = out.notes.get(key) if out else None
    file = None if out is None else out.partial / f"{side}.answers"
    if found is not None and file is not None and file.is_file():
        told[side] = load_file(file)
    if found is None:
        found, told[side] = measure(model, source, samples, checkpoint, track, told.get("dense", NO_ANSWERS))
        if out and file and samples is not None:
            if told[side]:
                out.put_aside(file.name, told[side])
            out.note(key, found)
    return dict(found)


def digest(samples: Samples | Tensor) -> str:
    """The same for the same samples, and for no others."""
    return Samples.of(samples).digest
