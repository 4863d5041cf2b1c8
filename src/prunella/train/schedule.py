"""Schedules: what changes while a network trains. Which weights go is not their business.

Third parties register their own: `@register_schedule("mine")` in a file of theirs, then `path/to/mine.py:mine`.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ..foreign import call
from ..registry import Method, checked, lookup


class Schedule:
    """What changes while a network trains for `steps` steps; `t` counts those that are done.

    As it stands, nothing changes: a subclass says what does.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def sparsity(self, t: int) -> float | None:
        """Before step t: how sparse the layers are to be from here on, as a share of what is wanted of each in the end
        (0 is dense, 1 all of it); None: the masks stay."""
        return None

    def rate(self, t: int) -> float:
        """By how much the learning rates of step t are multiplied."""
        return 1.0

    def gradient(self, run: Callable[[], Tensor], weights: Mapping[str, nn.Parameter]) -> Tensor:
        """Leave the gradients of a step in the weights that train, and return its loss.

        Args:
            run: adds the gradients at the weights as they are now, of all samples of the step, and returns the loss. A
                method of two passes calls it twice, at other weights, and puts the weights back.
            weights: what trains, by name.
        """
        return run()

    def accept(self, divergence: Callable[[], float]) -> bool:
        """Do new masks stay? If not, those before them do.

        Args:
            divergence: how much higher the loss of the held-out samples is with the new masks than with the old ones; a
                function, since it takes two passes over them.
        """
        return True

    def final(self, t: int) -> str | None:
        """After t steps: the name under which this network may be the best one; None: it may not, as where it is not
        as sparse as it is to be. What the training gives is the best one called `final`."""
        return "final"

    def state(self) -> dict[str, Any]:
        """What has to be known to go on, as plain data."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


def rise_and_fall(t: int, steps: int, rise: int) -> float:
    """From 0 to 1 in the first `rise` steps, then linearly to 0."""
    if t < rise:
        return t / max(1, rise)
    return max(0.0, (steps - t) / max(1, steps - rise))


# ---------------------------------------------------------------------------------------------------------
# The registry

schedules: dict[str, Method] = {}


def register_schedule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a schedule: a decorator.

    The function is called with the number of steps and returns a `Schedule`. Its keyword arguments are the schedule's
    options, with their types and defaults.

    Args:
        name: what users call it.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))
        if typing.get_type_hints(function).get(first) is not int:
            raise TypeError(f"the first argument of schedule '{name}' must be annotated as int, the number of steps")
        schedules[name] = Method(name, frozenset(), function, per_layer=False)
        return function

    return add


def make_schedule(name: str, steps: int, options: Mapping[str, Any] | None = None) -> Schedule:
    """The schedule of a training of so many steps. Raises InputError for an unknown name, an unknown option or a wrong
    value."""
    method = lookup("schedule", schedules, name)
    made: Schedule = call(method, f"schedule '{name}'", Schedule, steps, checked("schedule", method, options or {}))
    return made


# ---------------------------------------------------------------------------------------------------------
# Those that come with Prunella

Warmup = Annotated[float, Field(ge=0, lt=1)]


class _Constant(Schedule):
    def __init__(self, steps: int, warmup: float):
        super().__init__(steps)
        self.warmup = warmup

    def rate(self, t: int) -> float:
        return rise_and_fall(t, self.steps, math.ceil(self.warmup * self.steps))


@register_schedule("constant")
def constant(steps: int, *, warmup: Warmup = 0.1) -> Schedule:
    """The masks stay as they are: healing.

    Args:
        warmup: share of the steps over which the learning rate rises from 0; then it falls linearly to 0.
    """
    return _Constant(steps, warmup)


class _Iterative(_Constant):
    def __init__(self, steps: int, rounds: int, warmup: float):
        super().__init__(steps, warmup)
        self.starts = [k * steps // rounds for k in range(rounds)] + [steps]

    def _round(self, t: int) -> int:
        return max(k for k, start in enumerate(self.starts[:-1]) if start <= t)

    def sparsity(self, t: int) -> float | None:
        if t not in self.starts[:-1]:
            return None
        return 1 - (1 - (self._round(t) + 1) / (len(self.starts) - 1)) ** 3

    def rate(self, t: int) -> float:
        start, end = self.starts[(k := self._round(t))], self.starts[k + 1]
        return rise_and_fall(t - start, end - start, math.ceil(self.warmup * (end - start)))

    def final(self, t: int) -> str | None:
        return "final" if t > self.starts[-2] else None


@register_schedule("imp")
def imp(steps: int, *, rounds: PositiveInt = 1, warmup: Warmup = 0.1) -> Schedule:
    """Iterative magnitude pruning: in K rounds, round k prunes to s (1 - (1 - k/K)^3) and trains.

    Large steps come first, and the last one ends at the sparsity s that is wanted. The learning rate rises and falls in
    every round.

    Args:
        rounds: K.
        warmup: share of the steps of a round over which the learning rate rises from 0; then it falls linearly to 0.

    Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    return _Iterative(steps, rounds, warmup)
