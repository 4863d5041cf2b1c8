"""Watching the products of a network with its layers' weights."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .compat import COMPOSED, composed, version_of
from .errors import DefectError
from .layers import Slot
from .lenses import Chunks, Inputs
from .phases import phase
from .types import Stats
from .waits import fetch

SAMPLE = 512  # calibration tokens on which the error of each layer is measured


class Stop(Exception):
    """The forward pass has shown all that was wanted."""


class Watch(TorchFunctionMode):
    """Sees every product of a block's inputs with one of its layers' weights, before it is made.

    `see(layer name, inputs as rows (T, I), are they the same as at the layer before)`. Modules are not watched, so it
    does not matter which kind of module, if any, makes the product. A product that takes a layer's weight for a matrix
    of another shape is a defect.
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
        if function in COMPOSED:
            return composed(self, function, args, kwargs)
        if function in self.functions:
            for slot, names in self._within(args, kwargs):
                met = [f for f in slot.lens.inputs(slot.tensor, function, args, kwargs) if f.part in names]
                own = _own([found.chunks for found in met if found.batched])
                for found in met:
                    self._show(names[found.part], slot, found, own.pop(0) if found.batched else None)
        return function(*args, **kwargs)

    def _within(self, args: Any, kwargs: Any) -> list[tuple[Slot, dict[int, str]]]:
        """The watched parameters of which the arguments are, or are a part."""
        found = {}
        for operand in _tensors((*args, *kwargs.values())):
            for start, held in self.held.get(operand.untyped_storage().data_ptr(), {}).items():
                if 0 <= operand.data_ptr() - start < held[0].tensor.nbytes:
                    found[start] = held
        return list(found.values())

    def _show(self, name: str, slot: Slot, found: Inputs, own: Sequence[Tensor] | None) -> None:
        if found.taken is not None:
            raise DefectError(
                f"layer '{name}' was taken for a matrix {slot.shape} (outputs, inputs), but the model multiplies by"
                f" {found.taken} of its weights: leave it out with --skip '{name}'"
            )
        source, version = found.source, version_of(found.source)

        def rows() -> Iterator[Tensor]:
            for x_TI in found.chunks():
                if version_of(source) != version:  # they are made later than the call, and of what it was given
                    raise DefectError(f"what enters layer '{name}' is overwritten before it was seen: skip it")
                yield x_TI.detach()

        if own is not None:
            rows = lambda: (x_TI.detach() for x_TI in own if len(x_TI))  # noqa: E731
        if not source.numel() or (own is not None and not any(map(len, own))):
            return
        same = self.last is not None and source is self.last[0] and (version, found.how) == self.last[1:]
        self.last = (source, version, found.how)
        self.see(name, rows, same and found.how is not None and not found.batched)


def _own(met: Sequence[Chunks]) -> list[list[Tensor]]:
    """The tokens of each expert, where those of others come as zeros. How many these are a device is asked once."""
    chunks = [list(rows()) for rows in met]
    every = [x_TI for some in chunks for x_TI in some]
    if every and every[0].device.type != "cpu":
        filled = [x_TI.any(1) for x_TI in every]
        counts = fetch([here_T.count_nonzero() for here_T in filled])
        first = [(~here_T).byte().sort(stable=True).indices[: int(n)] for here_T, n in zip(filled, counts, strict=True)]
        every = [x_TI[at] for x_TI, at in zip(every, first, strict=True)]
    else:
        every = [x_TI[x_TI.any(1)] for x_TI in every]
    found = iter(every)
    return [[next(found) for _ in some] for some in chunks]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def stats_of(rows: Chunks, needs: Collection[str], sample: int = 0, dense: Chunks | None = None) -> Stats:
    """The statistics (`Stats.of`) of a layer's inputs in one call, `rows` (T, I) chunk by chunk; `dense` is what the
    dense model has in their place. Of all rows, `sample` evenly spread ones are kept."""
    beside = itertools.repeat(None) if dense is None else dense()
    whole, every = Stats(), 1
    kept: list[Tensor] = []  # every so many-th of the rows: at least `sample`, and a few times that
    for x_TI, y_TI in zip(rows(), beside, strict=dense is not None):
        while sum(len(some_TI) for some_TI in kept) > 2 * sample:
            kept, every = [torch.cat(kept)[::2].clone()], 2 * every
        if sample:
            kept.append(x_TI if every == 1 else x_TI[-whole.tokens % every :: every].clone())
        whole += Stats.of(x_TI, needs, 0, y_TI)
    if kept:
        several_TI = kept[0] if len(kept) == 1 else torch.cat(kept)
        whole = replace(whole, sample_TI=several_TI[:: max(1, len(several_TI) // sample)][:sample].clone())
    return whole


class Gather:
    """Makes statistics of what is seen, batch by batch: `Watch(slots, gather.see)`.

    stats:  {layer: its statistics}; of layers fed by the same tensor, only the first has them
    leader: {layer: the layer that has its statistics}, for all that were seen
    dense:  what the dense model has in place of the inputs of this batch, {layer: rows (T, I)}; used up
    sample: how many tokens of this batch are kept. Of a layer that no token reached before, SAMPLE always
    seen:   how often each layer was seen in this batch, {layer: times}
    known:  how many of these times count already: an attempt at this batch ended after them
    """

    def __init__(self, needs: Collection[str]):
        self.needs = needs
        self.stats: dict[str, Stats] = {}
        self.leader: dict[str, str] = {}
        self.dense: dict[str, Chunks] = {}
        self.sample = SAMPLE
        self.seen: Counter[str] = Counter()
        self.known: Mapping[str, int] = {}
        self._previous = ""

    @phase("statistics")
    def see(self, name: str, rows: Chunks, same: bool) -> None:
        if not same:
            self._previous = name
            if self.seen[name] >= self.known.get(name, 0):
                sample = self.sample or (SAMPLE if name not in self.stats else 0)
                new = stats_of(rows, self.needs, sample, self.dense.pop(name, None))
                self.stats[name] = self.stats[name] + new if name in self.stats else new
            self.seen[name] += 1
        self.leader[name] = self._previous


def check_seen(block: str, seen: Collection[str], active: Mapping[str, Slot]) -> None:
    """Raises DefectError for a layer whose product was not seen. Of a parameter with several matrices, such as the
    experts of a mixture, one is enough: the router need not pick them all."""
    reached = {active[name].key for name in seen}
    unseen = [name for name, slot in active.items() if slot.key not in reached]
    if unseen:
        short = dict.fromkeys(name.removeprefix(f"{block}.") for name in unseen)
        raise DefectError(
            f"layer '{unseen[0]}' was not seen at work while its block ran, so nothing is known of its inputs: leave it"
            f" out with {' '.join(f'--skip {name}' for name in short)}"
        )


def run_to(at: str | None, module: nn.Module, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """What a module puts out with these weights in place of its own; or what its submodule `at` does, where the pass
    then ends."""
    out: Any = None

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal out
        out = output
        raise Stop

    watched = contextlib.nullcontext() if at is None else module.get_submodule(at).register_forward_hook(stop)
    with contextlib.suppress(Stop), watched:
        out = torch.func.functional_call(module, dict(weights), args, kwargs)
    return out
