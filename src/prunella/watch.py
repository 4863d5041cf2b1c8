"""Watching the products of a network with its layers' weights."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .compat import version_of
from .errors import DefectError
from .layers import Slot
from .lenses import Chunks, Inputs
from .types import Stats

SAMPLE = 512  # calibration tokens on which the error of each layer is measured


class Stop(Exception):
    """The forward pass has shown all that was wanted."""


class Watch(TorchFunctionMode):
    """Sees every product of a block's inputs with one of its layers' weights, before it is made.

    `see(layer name, inputs as rows (T, I), are they the same as at the layer before)`. Watching the products and not
    the modules makes one case of all that a lens can read. A product that meets a layer's weight in another shape, or
    along its other side, is a defect.
    """

    def __init__(self, slots: Mapping[str, Slot], see: Callable[[str, Chunks, bool], None]):
        super().__init__()
        # {storage: {address: (a slot of the parameter, its layers by part)}}
        self.held: dict[int, dict[int, tuple[Slot, dict[int, str]]]] = {}
        for name, slot in slots.items():
            of = self.held.setdefault(slot.tensor.untyped_storage().data_ptr(), {})
            of.setdefault(slot.tensor.data_ptr(), (slot, {}))[1][slot.part or 0] = name
        self.functions = frozenset().union(*(slot.lens.functions for slot in slots.values()))
        self.see = see
        self.last: tuple[Tensor, int, Any] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.functions:
            for slot, names in self._within(args, kwargs):
                for found in slot.lens.inputs(slot.tensor, function, args, kwargs):
                    if found.part in names:
                        self._show(names[found.part], slot, found)
        return function(*args, **kwargs)

    def _within(self, args: Any, kwargs: Any) -> list[tuple[Slot, dict[int, str]]]:
        """The parameters that are among the arguments, whole or in part."""
        found = {}
        for operand in _tensors((*args, *kwargs.values())):
            for start, held in self.held.get(operand.untyped_storage().data_ptr(), {}).items():
                if 0 <= operand.data_ptr() - start < held[0].tensor.nbytes:
                    found[start] = held
        return list(found.values())

    def _show(self, name: str, slot: Slot, found: Inputs) -> None:
        if found.taken is not None:
            raise DefectError(
                f"layer '{name}' was taken for a matrix {slot.shape} (outputs, inputs), but the model multiplies by"
                f" {found.taken} of its weights: leave it out with --skip '{name}'"
            )
        source, version = found.source, version_of(found.source)
        rows: Chunks = lambda: (x_TI.detach() for x_TI in found.chunks())  # noqa: E731
        if found.batched:  # the tokens of other experts come as zeros
            own = [x_TI[x_TI.any(1)] for x_TI in rows()]
            rows = lambda: (x_TI for x_TI in own if len(x_TI))  # noqa: E731
        if not source.numel() or (found.batched and not any(map(len, own))):
            return
        same = self.last is not None and source is self.last[0] and (version, found.how) == self.last[1:]
        self.last = (source, version, found.how)
        self.see(name, rows, same and found.how is not None and not found.batched)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def stats_of(rows: Chunks, needs: Collection[str], sample: int = 0, dense: Chunks | None = None) -> Stats:
    """The statistics of a layer's inputs in one call, as `Stats.of` makes them of the rows (T, I), chunk by chunk;
    `sample` of them are kept, evenly spread. `dense` is what the dense model has in their place."""
    beside = itertools.repeat(None) if dense is None else dense()
    made = [Stats.of(x_TI, needs, sample, y_TI) for x_TI, y_TI in zip(rows(), beside, strict=dense is not None)]
    whole = functools.reduce(operator.add, made)
    if len(made) > 1 and whole.sample_TI is not None:
        stride = max(1, len(whole.sample_TI) // sample)
        whole = replace(whole, sample_TI=whole.sample_TI[::stride][:sample].clone())
    return whole


class Gather:
    """Makes statistics of what is seen, batch by batch: `Watch(slots, gather.see)`.

    stats:  of layers, {name: its statistics}; of those fed by the same tensor, of the first of them
    leader: which one that is, {layer: layer}, of all that were seen
    dense:  what the dense model has in place of the inputs of this batch, {layer: rows (T, I)}; used up
    first:  is it the first batch? The sample of tokens comes from there
    """

    def __init__(self, needs: Collection[str]):
        self.needs = needs
        self.stats: dict[str, Stats] = {}
        self.leader: dict[str, str] = {}
        self.dense: dict[str, Chunks] = {}
        self.first = True
        self._previous = ""

    def see(self, name: str, rows: Chunks, same: bool) -> None:
        if not same:
            self._previous = name
            sample = SAMPLE if self.first or name not in self.stats else 0
            new = stats_of(rows, self.needs, sample, self.dense.pop(name, None))
            self.stats[name] = self.stats[name] + new if name in self.stats else new
        self.leader[name] = self._previous
