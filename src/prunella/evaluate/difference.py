"""How sure one can be that one model is better than another on the same windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..tasks.text import Perplexity


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
