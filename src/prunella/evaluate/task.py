"""A network on samples of any task, alone or beside another one on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import EndlessError, InputError
from ..foreign import blamed
from ..model.network import Model
from ..model.task import NO_ANSWERS, Task
from ..progress import Track, no_track
from ..report import Figure
from ..samples import Samples
from ..unlabelled import targeted
from .difference import paired
from .measure import scored
from .perplexity import answered

SOME = 256


def judge(
    model: Model,
    sources: Sequence[str],
    *,
    beside: Model | None = None,
    count: int | None = None,
    track: Track = no_track,
) -> list[dict[str, Any]]:
    """What the model's task says of it on samples of these sources, an entry each: the source, `Task.scores`, and where
    there is another model its scores (`beside`) and how far the figures are apart (`difference`), where they are means
    over samples. Scores that count changed answers count those that `beside` answers differently.

    Args:
        sources: names that the task reads; of none its own.
        count: the first so many samples of each; None: as many as the task takes (`Task.many`), and `SOME` of what has
            no end.
    Raises:
        InputError: a source that the task cannot read, or of which the two models make different samples.
    """
    task = model.task
    if beside is not None and beside.task.name != task.name:
        raise InputError(
            f"'{model.name}' is of task '{task.name}' and '{beside.name}' of '{beside.task.name}': they answer"
            " different questions, and cannot be compared."
        )
    found = []
    for source in sources or [task.source]:  # all of them, before the first is measured
        samples = _samples(model, task, source, count)
        if beside is not None and _samples(beside, beside.task, source, count).digest != samples.digest:
            raise InputError(
                f"'{model.name}' and '{beside.name}' make different samples of '{source}' (by another size,"
                " normalization or vocabulary): what they answer cannot be compared."
            )
        found.append((source, samples))
    return [_judged(model, beside, source, samples, track) for source, samples in found]


def _samples(model: Model, task: Task, source: str, count: int | None) -> Samples:
    if not task.reads(model):
        raise InputError(f"'{model.name}' comes without what it takes to read '{source}' for task '{task.name}'.")
    with blamed(type(task), f"task '{task.name}'"):
        try:
            samples = task.samples(model, source, count or task.many, test=True)
        except EndlessError:
            samples = task.samples(model, source, SOME, test=True)
        task.check(model, samples)
    return samples


def _judged(model: Model, beside: Model | None, source: str, samples: Samples, track: Track) -> dict[str, Any]:
    other, theirs, told = None, NO_ANSWERS, {}
    if any(map(model.task.lacks, samples.groups)):
        if beside is None:
            raise InputError(
                f"the samples of '{source}' have no labels: give --beside DENSE, by whose answers '{model.name}' can be"
                " measured, or samples with labels."
            )
        samples = targeted(beside, samples, track=track)
    if beside is not None:
        losses, theirs = answered(beside, samples, track=track)
        other = scored(beside, samples, losses, theirs)
    losses, answers = answered(model, samples, track=track)
    ours = scored(model, samples, losses, answers, theirs)
    if other is not None:
        told["beside"] = other
        one, two = Figure.of(ours), Figure.of(other)
        if one.name == two.name and len(one.each) == len(two.each) > 0:
            told["difference"] = asdict(paired(one.each, two.each))
    return {"source": source, **ours, **told}
