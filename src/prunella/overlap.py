"""Does a text hold what a model was calibrated on?"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

GRAM = 13  # tokens in a row: hardly ever the same in two texts by chance
_SAMPLE = 64  # of so many of these one is remembered


def fingerprint(windows_NL: Tensor) -> str:
    """Hashes of a sample of all runs of 13 tokens in the windows, 4 bytes each, base64: about a twelfth of a byte for a
    token. The sample depends on the runs alone, so that two texts sample what they share alike."""
    return base64.b64encode(_grams(windows_NL).astype("<u4").tobytes()).decode()


def fingerprint_of(hashes: Iterable[int]) -> str:
    """The same of samples that are not text, from a hash of 4 bytes of each."""
    return base64.b64encode(np.unique(np.fromiter(hashes, dtype="<u4")).tobytes()).decode()


def known_among(known: Iterable[int], hashes: Sequence[int]) -> list[bool]:
    """Which of these samples are among others, by their hashes."""
    seen = set(known)
    return [number in seen for number in hashes]


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
