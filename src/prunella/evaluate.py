"""How good a model is: perplexity, and how sure one can be of a difference."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .calibrate import check_windows
from .errors import NumericalError
from .model.checkpoint import Checkpoint
from .model.network import Model
from .stream import Stream, Track, no_track, through


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
    model: Model, windows_NL: Tensor, *, checkpoint: Checkpoint | None = None, track: Track = no_track
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


def losses(stream: Stream, checkpoint: Checkpoint | None = None) -> list[float]:
    """Mean negative log-likelihood per predicted token of each window that has passed all blocks."""
    out: list[float] = []
    with stream.model.outside(checkpoint=checkpoint), torch.no_grad():
        for batch, ids_BL in enumerate(stream.batches):
            logits_BLV = stream.logits(batch)
            for ids_L, logits_LV in zip(ids_BL.to(logits_BLV.device), logits_BLV, strict=True):
                out.append(nn.functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:]).item())
    return out


# ---------------------------------------------------------------------------------------------------------
# Two models on the same windows


@dataclass(frozen=True)
class Difference:
    """How much higher one perplexity is than another, and the interval that holds 95% of what other texts of the same
    kind would show."""

    difference: float
    low: float
    high: float


_DRAWN = 1 << 21  # windows that are drawn at a time


def difference(one: Perplexity, other: Perplexity, *, draws: int = 10_000, seed: int = 0) -> Difference:
    """The perplexity of `one` minus that of `other`, measured on the same windows, with a paired bootstrap: windows are
    drawn with replacement, the same for both, and the interval holds the middle 95% of the differences. What makes a
    window hard for both models cancels out.

    B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    nll_2N = np.array([one.nll, other.nll])
    count = nll_2N.shape[1]
    random, step = np.random.default_rng(seed), max(1, _DRAWN // count)
    chunks = [min(step, draws - first) for first in range(0, draws, step)]
    means_2D = np.concatenate([nll_2N[:, random.integers(count, size=(d, count))].mean(2) for d in chunks], 1)
    apart_D = np.exp(means_2D[0]) - np.exp(means_2D[1])
    low, high = np.quantile(apart_D, (0.025, 0.975))
    return Difference(one.perplexity - other.perplexity, float(low), float(high))


# ---------------------------------------------------------------------------------------------------------
# Does a text hold what a model was calibrated on?

GRAM = 13  # tokens in a row: hardly ever the same in two texts by chance
_SAMPLE = 64  # of so many of these one is remembered


def fingerprint(windows_NL: Tensor) -> str:
    """Hashes of a sample of all runs of 13 tokens in the windows, 4 bytes each, base64: about a twelfth of a byte for a
    token. The sample depends on the runs alone, so that two texts sample what they share alike."""
    return base64.b64encode(_grams(windows_NL).astype("<u4").tobytes()).decode()


def joined(*known: str) -> str:
    """The fingerprint of several texts together."""
    grams = [np.frombuffer(base64.b64decode(one), dtype="<u4") for one in known]
    return base64.b64encode(np.unique(np.concatenate(grams)).tobytes()).decode() if any(known) else ""


def overlap(known: str, windows_NL: Tensor) -> float | None:
    """The share of the runs of 13 tokens in the windows that are in the text of a fingerprint too; None where the
    windows are too short to tell."""
    grams = _grams(windows_NL)
    seen = np.frombuffer(base64.b64decode(known), dtype="<u4")
    return float(np.isin(grams, seen).mean()) if len(grams) else None


def _grams(windows_NL: Tensor) -> np.ndarray:
    ids_NL = windows_NL.cpu().numpy().astype(np.uint64)
    runs = ids_NL.shape[1] - GRAM + 1
    if runs < 1:
        return np.empty(0, np.uint32)
    hash_NR = np.zeros((len(ids_NL), runs), np.uint64)
    for j in range(GRAM):  # a polynomial of the tokens modulo 2^64
        hash_NR = hash_NR * np.uint64(0x9E3779B97F4A7C15) + ids_NL[:, j : j + runs]
    hash_NR = (hash_NR ^ hash_NR >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
    high_NR = (hash_NR >> np.uint64(32)).astype(np.uint32)
    return np.unique(high_NR[high_NR % _SAMPLE == 0])


def _culprit(model: Model, windows_NL: Tensor, checkpoint: Checkpoint | None) -> str:
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
    for index, name in enumerate(model.blocks):
        with model.block(index, checkpoint) as block:
            if found := damaged(name):
                return found
            stream.advance(index, block)
        if not all(torch.isfinite(stream.hidden[b]).all() for b in range(len(stream.batches))):
            return f"block '{name}' overflows on this text; use --dtype float32 or bfloat16"
    return "its head overflows on this text; use --dtype float32 or bfloat16"
