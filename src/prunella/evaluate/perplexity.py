"""How good a model is: perplexity, and how sure one can be of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibrate import check_windows
from ..errors import NumericalError
from ..model.checkpoint import Source
from ..model.network import Model
from ..progress import Track, no_track
from ..stream import Stream, through


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on windows of text, each scored on its own.

    perplexity: exp of the mean of `nll`
    windows:    how many
    length:     tokens in each
    nll:        negative log-likelihood of each window, its mean over the tokens that are predicted
    """

    perplexity: float
    windows: int
    length: int
    nll: tuple[float, ...]

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """As plain data, ready for JSON."""
        return {
            "perplexity": self.perplexity,
            "windows": self.windows,
            "length": self.length,
            "nll": list(self.nll),
        }


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
    stream = through(model, windows_NL, checkpoint=checkpoint, track=track, what="perplexity")
    every = losses(stream, checkpoint)
    mean = sum(every) / len(every)
    if not math.isfinite(mean):
        reason = _culprit(model, windows_NL, checkpoint)
        raise NumericalError(f"the perplexity of '{model.name}' is not finite: {reason}.")
    return Perplexity(math.exp(min(mean, 700.0)), len(every), windows_NL.shape[1], tuple(every))


def losses(stream: Stream, checkpoint: Source | None = None) -> list[float]:
    """Mean negative log-likelihood per predicted token of each window that has passed all blocks."""
    out: list[float] = []
    with stream.model.outside(checkpoint=checkpoint), torch.no_grad():
        for batch, ids_BL in enumerate(stream.batches):
            logits_BLV = stream.logits(batch)
            for ids_L, logits_LV in zip(ids_BL.to(logits_BLV.device), logits_BLV, strict=True):
                out.append(nn.functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:]).item())
    return out


def _culprit(model: Model, windows_NL: Tensor, checkpoint: Source | None) -> str:
    """The tensor that is damaged or, if none is, the block that overflows first."""

    def damaged(inside: str | None) -> str | None:
        for name, parameter in model.network.named_parameters():
            if model.block_of(name) == inside and not parameter.is_meta and not torch.isfinite(parameter).all():
                return f"tensor '{name}' holds NaN or infinity"
        return None

    with model.outside(checkpoint=checkpoint):
        if found := damaged(None):
            return found
    stream = Stream(model, windows_NL)
    for _, block in model.walk(checkpoint):
        if found := damaged(block.name):
            return found
        stream.advance(block)
        if not all(torch.isfinite(stream.hidden[b]).all() for b in range(len(stream.batches))):
            return f"block '{block.name}' overflows on this text; use --dtype float32 or bfloat16"
    return "its head overflows on this text; use --dtype float32 or bfloat16"
