"""Ways to estimate the statistics of a batch norm.

Third parties register their own: `@estimates("mine")` in a file of theirs, then
`--set batch_norm=path/to/mine.py:mine`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from .errors import InputError, unknown
from .foreign import call
from .registry import Method, checked, lookup

KIND = "way to estimate batch norms"
AUTO = ("reset", "correct")  # the ways that are tried where nobody chose one
Statistics = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,), float64


@dataclass(frozen=True)
class Moments:
    """What entered a norm, by channel, over all samples and positions: float64, on the host."""

    count: int
    sum_C: Tensor
    sumsq_C: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_C + other.sum_C, self.sumsq_C + other.sumsq_C)

    @property
    def mean_C(self) -> Tensor:
        return self.sum_C / self.count

    @property
    def variance_C(self) -> Tensor:
        """Of n values divided by n - 1, as torch keeps it."""
        return (self.sumsq_C - self.sum_C * self.mean_C).clamp_min(0) / (self.count - 1)


@dataclass(frozen=True)
class Norm:
    """One batch norm, for a way to estimate its statistics.

    mean_C, variance_C: its statistics as they are
    epsilon: what is added to the variance
    dense:   what enters it in the dense network
    pruned:  what enters it in the pruned one
    """

    name: str
    mean_C: Tensor
    variance_C: Tensor
    epsilon: float
    dense: Moments
    pruned: Moments


Way = Callable[[Norm], Statistics]
ways: dict[str, Method] = {}


def estimates(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a way to estimate the statistics of a batch norm: a decorator.

    The function is given a `Norm` and returns its new mean and variance, two tensors (C,). Its keyword arguments are
    the way's options, with their types and defaults.

    Args:
        name: what users call it, as `batch_norm` of a recipe.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))
        if typing.get_type_hints(function).get(first) is not Norm:
            raise TypeError(f"the first argument of the way '{name}' to estimate batch norms must be annotated as Norm")
        ways[name] = Method(name, frozenset(), function, per_layer=False)
        return function

    return add


@estimates("reset")
def reset(norm: Norm) -> Statistics:
    """The mean and variance of what enters the norm now, and nothing of what they were.

    Over all samples and positions at once: what torch's own norm gathers in training mode with momentum=None from one
    batch of all samples.
    """
    return norm.pruned.mean_C, norm.pruned.variance_C


@estimates("momentum")
def momentum(norm: Norm, *, share: Annotated[float, Field(gt=0, le=1)] = 0.5) -> Statistics:
    """From the old statistics towards those of `reset`: (1 - share) old + share new.

    Args:
        share: how far; 1 is `reset`.
    """
    mean_C, variance_C = reset(norm)
    return norm.mean_C.lerp(mean_C, share), norm.variance_C.lerp(variance_C, share)


@estimates("correct")
def correct(norm: Norm) -> Statistics:
    """What gives the norm's output the mean and deviation that it has in the dense network, channel by channel.

    Let a, b be mean and variance of the inputs in the pruned network, A, B those in the dense one, and m, v + e the
    statistics with which the norm divides there. Its output has there the mean g (A - m) / sqrt(v + e) + h and the
    deviation |g| sqrt(B / (v + e)); with

        v' + e = (v + e) b / B        m' = a - (A - m) sqrt(b / B)

    it has them here too. Both networks see the same samples, and what these have of their own cancels: where
    pruning changed nothing, nothing changes. A channel that does not vary, here or there, keeps its variance, and one
    that hardly varies here gets no variance below 0.
    """
    a_C, b_C, dense = norm.pruned.mean_C, norm.pruned.variance_C, norm.dense
    varies_C = (b_C > 0) & (dense.variance_C > 0)
    ratio_C = torch.where(varies_C, b_C / dense.variance_C, torch.ones_like(b_C))
    variance_C = (norm.variance_C + norm.epsilon) * ratio_C - norm.epsilon
    return a_C - (dense.mean_C - norm.mean_C) * ratio_C.sqrt(), variance_C.clamp_min(0)


def make_way(name: str, options: Mapping[str, Any] | None = None) -> Way:
    """The registered way `name`, or the one that `path/to/file.py:name` registers, ready to use. Raises InputError for
    an unknown name, an unknown option or a wrong value."""
    if ".py:" not in name and name not in ways:
        raise InputError(unknown(KIND, name, ["auto", "keep", *ways]))
    method = lookup(KIND, ways, name)
    chosen = checked(KIND, method, options or {})

    def estimate(norm: Norm) -> Statistics:
        mean_C, variance_C = call(method, f"way '{name}' at batch norm '{norm.name}'", tuple, norm, chosen)
        return mean_C, variance_C

    return estimate


def make_ways(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Way]:
    """What a recipe's `batch_norm` has to be tried: `keep` nothing, `auto` several. Raises InputError."""
    if name in ("auto", "keep"):
        if options:
            raise InputError(f"batch_norm: {name} has no options.")
        return {key: make_way(key) for key in (AUTO if name == "auto" else ())}
    return {name: make_way(name, options)}
