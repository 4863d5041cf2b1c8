"""How good a model is: perplexity, and how sure one can be of a difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..calibrate import check_windows
from ..errors import NumericalError, StepError
from ..model.checkpoint import Source
from ..model.network import Model
from ..model.task import Answers
from ..progress import Track, no_track
from ..samples import Samples, on
from ..stream import Stream
from ..tasks.text import Perplexity
from ..unlabelled import each_output, through
from ..waits import fetch


def perplexity(
    model: Model, windows_NL: Tensor, *, checkpoint: Source | None = None, track: Track = no_track
) -> Perplexity:
    """The model's perplexity, measured block by block, so that the model may be larger than memory.

    Args:
        model: from `load_model` or `wrap_model`.
        windows_NL: token ids, one window a row.
        checkpoint: read the weights from here in place of the model's own (its pruned version, say).
        track: wraps the loop over blocks, `track(range, what, total)`, to show progress.

    Raises:
        InputError: the windows are not of the model's tokens, or longer than it has positions.
        NumericalError: the model gives NaN or infinity.
    """
    check_windows(model, windows_NL)
    return Perplexity.of(
        measured(model, Samples.of(windows_NL), checkpoint=checkpoint, track=track), windows_NL.shape[1]
    )


def measured(
    model: Model, samples: Samples, *, checkpoint: Source | None = None, track: Track = no_track
) -> list[float]:
    """The task's loss of each sample, as `perplexity` makes it of windows. Raises NumericalError."""
    return answered(model, samples, checkpoint=checkpoint, track=track)[0]


def answered(
    model: Model, samples: Samples, *, checkpoint: Source | None = None, track: Track = no_track
) -> tuple[list[float], Answers]:
    """The task's loss of each sample, and what the task wants to know of the outputs beside (`Task.answers`), on the
    CPU. Raises NumericalError."""
    figure, answers = model.task.figure, dict[str, list[Tensor]]()
    stream = through(model, samples, checkpoint=checkpoint, track=track, what=figure)
    every = losses(stream, checkpoint, answers)
    if not math.isfinite(sum(every)):
        reason = _culprit(model, samples, checkpoint)
        raise NumericalError(f"the {figure} of '{model.name}' is not finite: {reason}.")
    for what, some in answers.items():
        if len({(tensor.dtype, tensor.shape[1:]) for tensor in some}) != 1:
            raise StepError(
                f"task '{model.task.name}': answers '{what}' are not of one shape and dtype for all samples."
            )
    return every, {what: torch.cat(some) for what, some in answers.items()}


def losses(
    stream: Stream, checkpoint: Source | None = None, answers: dict[str, list[Tensor]] | None = None
) -> list[float]:
    """The task's loss of each sample that has passed all blocks; `answers` takes what else the task wants to know,
    batch by batch."""
    model, every = stream.model, list[Tensor]()

    def score(number: int) -> None:
        batch, outputs = on(stream.batches[number], model.device), stream.outputs(number)
        found = model.task.losses(outputs, batch)
        told = {} if answers is None else {w: t.detach().cpu() for w, t in model.task.answers(outputs, batch).items()}
        every.append(found)
        for what, tensor in told.items():
            if tensor.shape[:1] != found.shape:
                raise StepError(
                    f"task '{model.task.name}': answers '{what}' of shape {tuple(tensor.shape)} for {len(found)}"
                    " samples: a sample is a row."
                )
            if answers is not None:
                answers.setdefault(what, []).append(tensor)

    each_output(stream, score, checkpoint)
    return [loss for some in fetch(every) for loss in some.tolist()]


def _culprit(model: Model, samples: Samples, checkpoint: Source | None) -> str:
    """The tensor that is damaged or, if none is, the block that overflows first."""

    def damaged(inside: str | None) -> str | None:
        for name, parameter in model.network.named_parameters():
            if model.block_of(name) == inside and not parameter.is_meta and not torch.isfinite(parameter).all():
                return f"tensor '{name}' holds NaN or infinity"
        return None

    with model.outside(checkpoint=checkpoint):
        if found := damaged(None):
            return found
    stream = Stream(model, samples)
    for _, block in model.walk(checkpoint):
        if found := damaged(block.name):
            return found
        stream.advance(block)
        if not all(torch.isfinite(stream.hidden[b]).all() for b in range(len(stream.batches))):
            return f"block '{block.name}' overflows on this text; use --dtype float32 or bfloat16"
    return "its head overflows on this text; use --dtype float32 or bfloat16"
