"""How sure one can be that one model is better than another on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..tasks.text import Perplexity


@dataclass(frozen=True)
class Difference:
    """How much higher one figure is than another, and the interval that holds 95% of what other samples of the same
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


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The mean of one figure minus that of the other over the same samples, and mean ± 1.96 s / sqrt(n), s being the
    deviation of the differences sample by sample (n - 1 below the line): what makes a sample hard for both cancels out.

    Of right and wrong answers, 1 and 0, only those count on which the two differ, b that one alone has right and c that
    the other has: the mean is (b - c) / n, and n s² near b + c, as in the test of Q. McNemar, Psychometrika 12, 1947.
    """
    apart_N = np.array(one, dtype=np.float64) - np.array(other, dtype=np.float64)
    mean = float(apart_N.mean())
    half = 1.96 * float(apart_N.std(ddof=1)) / math.sqrt(len(apart_N)) if len(apart_N) > 1 else math.inf
    return Difference(mean, mean - half, mean + half)
