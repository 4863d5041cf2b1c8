"""What a run measures before and after: its task's scores on held-out samples, and something that the model makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.checkpoint import Source
from ..model.network import Model
from ..progress import Track
from ..samples import Samples
from ..save import Output
from .perplexity import measured


def whole_name(source: str) -> str:
    """A source as it can be found from anywhere."""
    return os.path.abspath(source) if Path(source).is_file() else source


def measure(
    model: Model,
    source: str | None,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
) -> dict[str, Any]:
    """The task's scores on held-out samples, of a source of this name, and something that the model makes; of the
    weights in `checkpoint`, if one is given."""
    task = model.task
    figure = {} if task.figure == "perplexity" else {"figure": task.figure}
    if samples is None:
        return {**figure, **task.scores(model, Samples(()), ()), "sample": None}
    samples = Samples.of(samples)
    losses = measured(model, samples, checkpoint=checkpoint, track=track)
    scores = task.scores(model, samples, losses)
    return {"source": source, **figure, **scores, "sample": task.specimen(model, checkpoint)}


def measure_once(
    out: Output | None,
    side: str,
    model: Model,
    source: str | None,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
) -> dict[str, Any]:
    """As `measure`; a run that resumes does not measure the same side (dense, pruned, …) on the same samples again."""
    key = side if samples is None else f"{side} on {digest(samples)}"
    found = out.notes.get(key) if out else None
    if found is None:
        found = measure(model, source, samples, checkpoint, track)
        if out and samples is not None:
            out.note(key, found)
    return dict(found)


def digest(samples: Samples | Tensor) -> str:
    """The same for the same samples, and for no others."""
    return Samples.of(samples).digest
