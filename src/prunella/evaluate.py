"""How good a model is: perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import NumericalError
from .load import Checkpoint, Model
from .stream import Track, no_track, through


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood per predicted token) over windows scored each on its own."""

    perplexity: float
    windows: int
    length: int
    nll: tuple[float, ...]  # mean per predicted token, window by window

    def as_dict(self) -> dict[str, float | int | list[float]]:
        return {
            "perplexity": self.perplexity,
            "windows": self.windows,
            "length": self.length,
            "nll": list(self.nll),
        }


def perplexity(
    model: Model, windows_NL: Tensor, *, checkpoint: Checkpoint | None = None, track: Track = no_track
) -> Perplexity:
    """Score the windows, (N, L) token ids, block by block, so that the model may be larger than memory.

    Args:
        checkpoint: read the weights from here in place of the model's own (its pruned version, say).
    Raises:
        NumericalError: the model gives NaN or infinity.
    """
    stream = through(model, windows_NL, checkpoint=checkpoint, track=track, what="perplexity")
    losses: list[float] = []
    with model.outside(checkpoint=checkpoint), torch.no_grad():
        for batch, ids_BL in enumerate(stream.batches):
            logits_BLV = stream.logits(batch)
            for ids_L, logits_LV in zip(ids_BL.to(logits_BLV.device), logits_BLV, strict=True):
                losses.append(nn.functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:]).item())
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise NumericalError(f"the perplexity of '{model.name}' is not finite: the model overflows or is damaged.")
    return Perplexity(math.exp(min(mean, 700.0)), len(losses), windows_NL.shape[1], tuple(losses))
