"""What a run measures before and after: its task's scores on held-out samples, and something that the model makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.checkpoint import Source
from ..model.network import Model
from ..progress import Track
from ..recipe import Recipe
from ..samples import Samples
from ..save import Output
from ..texts import same_text
from .perplexity import measured


def held_out(model: Model, recipe: Recipe, used: int) -> Samples | None:
    """The samples to evaluate on: none of the calibration's, which took at most `used` of its source (`Task.size`)."""
    wanted = recipe.evaluate
    if wanted.source is None or not model.task.reads(model):
        return None
    skip = used if same_text(recipe.calibration.source, wanted.source) else 0
    task = recipe.make_task(wanted.length)
    found = task.samples(model, wanted.source, wanted.windows, used=skip, seed=recipe.seed, test=True)
    task.check(model, found)
    return found


def held_out_windows(model: Model, recipe: Recipe, used: int) -> Tensor | None:
    """As `held_out`, of text: the windows of token ids."""
    found = held_out(model, recipe, used)
    return None if found is None else found.groups[0]["input_ids"]


def whole_name(source: str) -> str:
    """A source as it can be found from anywhere."""
    return os.path.abspath(source) if Path(source).is_file() else source


def measure(
    model: Model,
    recipe: Recipe,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
) -> dict[str, Any]:
    """The task's scores on held-out samples and something that the model makes; of the weights in `checkpoint`, if one
    is given."""
    task = model.task
    figure = {} if task.figure == "perplexity" else {"figure": task.figure}
    if samples is None:
        return {**figure, **task.scores(model, Samples(()), ()), "sample": None}
    samples = Samples.of(samples)
    losses = measured(model, samples, checkpoint=checkpoint, track=track)
    scores = task.scores(model, samples, losses)
    return {"source": recipe.evaluate.source, **figure, **scores, "sample": task.specimen(model, checkpoint)}


def measure_once(
    out: Output | None,
    side: str,
    model: Model,
    recipe: Recipe,
    samples: Samples | Tensor | None,
    checkpoint: Source | None,
    track: Track,
) -> dict[str, Any]:
    """As `measure`; a run that resumes does not measure the same side (dense, pruned, …) on the same samples again."""
    key = side if samples is None else f"{side} on {digest(samples)}"
    found = out.notes.get(key) if out else None
    if found is None:
        found = measure(model, recipe, samples, checkpoint, track)
        if out and samples is not None:
            out.note(key, found)
    return dict(found)


def digest(samples: Samples | Tensor) -> str:
    """The same for the same samples, and for no others."""
    return Samples.of(samples).digest
