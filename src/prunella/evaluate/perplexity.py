"""How good a model is: perplexity, and how sure one can be of a difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..calibrate import check_windows
from ..errors import NumericalError
from ..model.checkpoint import Source
from ..model.network import Model
from ..progress import Track, no_track
from ..samples import Samples, on
from ..stream import Stream, through
from ..tasks.text import Perplexity


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
    figure = model.task.figure
    every = losses(through(model, samples, checkpoint=checkpoint, track=track, what=figure), checkpoint)
    if not math.isfinite(sum(every)):
        reason = _culprit(model, samples, checkpoint)
        raise NumericalError(f"the {figure} of '{model.name}' is not finite: {reason}.")
    return every


def losses(stream: Stream, checkpoint: Source | None = None) -> list[float]:
    """The task's loss of each sample that has passed all blocks."""
    model, out = stream.model, list[float]()
    with model.outside(checkpoint=checkpoint), torch.no_grad():
        for number, batch in enumerate(stream.batches):
            out += model.task.losses(stream.outputs(number), on(batch, model.device)).tolist()
    return out


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
