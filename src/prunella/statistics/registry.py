"""The registry of statistics, and how a function becomes one.

Third parties register their own: `@register_statistic("mine")` in a file of theirs, which a step of the same file needs
by its name, `needs={"mine"}`, and one of another file as `path/to/file.py:mine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, unknown
from ..foreign import call
from ..machine import at_a_time

CHUNK = 2048  # tokens at a time on a CPU: few enough to stay in the cache while several statistics read them
OUTPUTS = frozenset({"targets", "dense"})  # what else a step may need: outputs of blocks
BATCHES = (["x_TI"], ["x_TI", "dense_TI"], ["gradient_NOI"])  # what a statistic may be a function of
Merge = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Statistic:
    """A registered function of one batch; `register_statistic` says what its fields mean."""

    name: str
    function: Callable[..., Tensor]
    takes: frozenset[str]
    merge: Merge
    implies: frozenset[str]
    chunks: bool

    def of(self, batch: Tensor, **beside: Tensor | None) -> Tensor:
        """Its value for one batch. Raises StepError where a function that does not come with Prunella fails."""
        value: Tensor = call(self, f"statistic '{self.name}'", Tensor, batch, beside)
        return value


statistics: dict[str, Statistic] = {}


def concatenate(one: Tensor, other: Tensor) -> Tensor:
    """How values merge of which there is one for each sample, along the first dimension."""
    return torch.cat((one, other))


def register_statistic(
    name: str, *, merge: Merge = torch.add, implies: Iterable[str] = (), chunks: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function a statistic: a decorator.

    The names of its arguments say what it is a function of: `x_TI`, the inputs of a layer on one batch of tokens; these
    and `dense_TI`, what the dense model has in place of them (None where that is the same), which then runs beside; or
    `gradient_NOI`, the gradient of the loss in the layer's weight, of each sample, for steps that work on the way back
    (`order: back`). It returns a tensor, and changes none in place.

    Args:
        name: what steps call it in their `needs`, and read it by: `layer.stats["name"]`.
        merge: of the values of two batches, the value of both: a sum if nothing else is said, `torch.maximum`, …
        implies: other statistics that come with it.
        chunks: it is given `x_TI` in float32, and a few thousand tokens at a time: those that say so share one pass.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        takes = list(inspect.signature(function).parameters)
        if takes not in BATCHES or (chunks and takes != ["x_TI"]):
            raise TypeError(
                f"statistic '{name}' takes ({', '.join(takes)}), not x_TI, with or without dense_TI, or"
                " gradient_NOI alone; in chunks, x_TI alone"
            )
        known = statistics.get(name)
        if name in OUTPUTS or (known is not None and known.function.__module__ != function.__module__):
            raise ValueError(f"there is a statistic '{name}' already: choose another name")
        statistics[name] = Statistic(name, function, frozenset(takes), merge, frozenset(implies), chunks)
        return function

    return add


def whole(needs: Iterable[str]) -> list[Statistic]:
    """The statistics among what a step needs, and those that they imply. Raises InputError for an unknown one."""
    names: list[str] = []
    left = [name for name in sorted(needs) if name not in OUTPUTS]
    while left:
        if (name := left.pop()) not in statistics:
            raise InputError(unknown("statistic", name, statistics))
        if name not in names:
            names.append(name)
            left += statistics[name].implies
    return [statistics[name] for name in names]


def taking(batch: str, needs: Iterable[str]) -> frozenset[str]:
    """Those of the needed statistics that are functions of it: `dense_TI`, `gradient_NOI`."""
    return frozenset(statistic.name for statistic in whole(needs) if batch in statistic.takes)


def of_inputs(needs: Iterable[str], x_TI: Tensor, dense_TI: Tensor | None = None) -> dict[str, Tensor]:
    """The needed statistics of one batch of tokens, {name: value}. Raises InputError for those of gradients."""
    values: dict[str, Tensor] = {}
    found = whole(needs)
    if chunked := [statistic for statistic in found if statistic.chunks]:
        for x in torch.split(x_TI, at_a_time(CHUNK, x_TI.device)):
            x = x.float()
            values = merged(values, {statistic.name: statistic.of(x) for statistic in chunked})
    for statistic in found:
        if "gradient_NOI" in statistic.takes:
            raise InputError(
                f"'{statistic.name}' is made of gradients, which there are only on the way back: not here."
            )
        if not statistic.chunks:
            beside = {"dense_TI": dense_TI} if "dense_TI" in statistic.takes else {}
            values[statistic.name] = statistic.of(x_TI, **beside)
    return values


def of_gradients(needs: Iterable[str], gradient_NOI: Tensor) -> dict[str, Tensor]:
    """The needed statistics of gradients of some samples, {name: value}."""
    found = [statistic for statistic in whole(needs) if "gradient_NOI" in statistic.takes]
    return {statistic.name: statistic.of(gradient_NOI) for statistic in found}


def merged(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of two batches as those of both."""
    both = {name: statistics[name].merge(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}
