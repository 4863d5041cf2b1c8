"""Calling the blocks of a network as the network does.

How a block is called is not hard-coded. `Calls` runs the network once for each batch with a stand-in for every block
(standins.py), which keeps the arguments (masks, rotary embeddings, …) and hands its input on unchanged; after that a
block can be run on its own. Beside the hidden state other things may travel from block to block: a second output that
the next block takes, a dictionary that blocks write into. They are kept beside the hidden state, so that a block is a
function of what comes in. Arguments that are the same for two batches are kept once.

A network with several stacks (encoder, then decoder) is recorded stack by stack: how a later one is called, and what
enters it, is known when the hidden states have left those before it. A network that is no chain is one block, whose
hidden state is its input and then all that it puts out.

Whether all this holds is not assumed: `examine` compares replayed blocks with what they give inside the network's own
forward pass before anything is made of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .model.cut import Interface
from .model.network import Model
from .samples import Batch, size_of
from .standins import StandIns, argument
from .trees import Shared, first, is_container, map_tensors, map_tuples, same_items, tensors

Key = tuple[str, int]  # of something that travels beside the hidden state


@dataclass(frozen=True)
class _Place:
    """Stands among the arguments where something that travels is put in."""

    key: Key


@dataclass(frozen=True)
class _Kept:
    """Stands among the arguments for a tensor that waits somewhere else than where it is used."""

    tensor: Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of one block beside its input.

    by_name: the name that the hidden state is passed by, or None where it is the first argument
    shape:   of the hidden state
    start:   of what travels beside the hidden state, what is there before the first block
    takes:   outputs that travel on
    copies:  the block works in place: it is given a copy of the hidden state
    whole:   all that the block puts out is its output: it is the whole network
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str | None
    shape: torch.Size
    start: dict[Key, Any] = field(default_factory=dict)
    takes: Collection[int] = ()
    copies: bool = False
    whole: bool = False

    def arguments(
        self, hidden: Tensor, beside: Mapping[Key, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[Key, Any]]:
        """Arguments and keyword arguments for the block, and the containers among them, which are copies: a block may
        write into them. Raises ModelError for a hidden state of another shape than the recorded one."""
        if hidden.shape != self.shape:
            raise ModelError(
                f"a block is given a hidden state {tuple(hidden.shape)} where the network gives it one of"
                f" {tuple(self.shape)}: blocks that look alike put out different shapes, and cannot be run one by one."
            )
        held: dict[Key, Any] = {}

        def back(value: Tensor) -> Tensor:
            return value.to(hidden.device, non_blocking=True)

        def fill(value: Any) -> Any:
            if isinstance(value, _Kept):
                return back(value.tensor)
            if not isinstance(value, _Place):
                return value
            if value.key not in held:
                now = map_tensors(beside[value.key], back) if value.key in beside else self.start[value.key]
                held[value.key] = copy.copy(now) if is_container(now) else now
            return held[value.key]

        args = tuple(map_tuples(value, fill) for value in self.args)
        kwargs = {name: map_tuples(value, fill) for name, value in self.kwargs.items()}
        own = hidden.clone() if self.copies else hidden
        if self.by_name is None:
            args = (own, *args)
        else:
            kwargs[self.by_name] = own
        return args, kwargs, held

    def run(self, block: nn.Module, hidden: Tensor, beside: Mapping[Key, Any]) -> tuple[Any, dict[Key, Any]]:
        """The block's output, and what travels on beside it."""
        args, kwargs, held = self.arguments(hidden, beside)
        out = block(*args, **kwargs)
        after = dict(beside)
        for key, value in held.items():
            if key[0] == "container" and (key in beside or not same_items(value, self.start[key])):
                after[key] = value
        for number in self.takes:
            after["output", number] = out[number]
        return out if self.whole else first(out), after


class Calls:
    """Recordings of how the model calls its blocks, one for each batch, and what flows in and out.

    The model's parameters outside its blocks must be loaded while `enter`, `record_windows` and `outputs` are used.
    `shelf(bytes)` says where arguments that differ from batch to batch wait until they are used, so many bytes for all
    `total` samples.
    """

    def __init__(
        self,
        model: Model,
        interface: Interface,
        shelf: Callable[[int], Callable[[Any], Any]] | None = None,
        total: int = 0,
    ):
        self.model = model
        self.interface = interface
        self.shelf = shelf
        self.total = total
        self._puts: dict[int, Callable[[Any], Any]] = {}  # of each stack
        self.batches: list[list[Call]] = []  # of the stream's hidden states
        self.windows: list[list[Call]] = []
        self.several: dict[tuple[int, ...], list[Call]] = {}  # samples that run together, by their numbers
        self._firsts: dict[Any, list[Call]] = {}

    def enter(self, batch: Batch, states: Sequence[Any] = ()) -> tuple[Tensor, list[Call]]:
        """The hidden state that enters the first block for this batch, and how the blocks are called; those of a later
        stack, with the states that left the stacks before it."""
        stand_ins = StandIns(self.model, self.interface, states)
        stand_ins.pass_through(batch)
        calls = marked(stand_ins)
        known = self._firsts.setdefault((len(states), *((k, v.shape) for k, v in batch.items())), calls)
        if known is not calls:
            shared = Shared()
            calls = [
                replace(
                    call,
                    args=shared(call.args, old.args),
                    kwargs=shared(call.kwargs, old.kwargs),
                    start=shared(call.start, old.start),
                )
                for call, old in zip(calls, known, strict=True)
            ]
            if shared.apart and self.shelf is not None:
                calls = self._put_away(calls, shared.apart, size_of(batch), len(states))
        return stand_ins.entering, calls

    def record_windows(self, samples: Iterable[Batch], states: Callable[[int], Sequence[Any]] = lambda n: ()) -> None:
        """Record how the blocks are called on each sample alone; those of the next stack, if some are recorded, with
        the states of sample n that left the stacks before it."""
        new = [self.enter(one, states(n))[1] for n, one in enumerate(samples)]
        self.windows = [[*old, *more] for old, more in zip(self.windows or [[] for _ in new], new, strict=True)]

    def _put_away(self, calls: list[Call], apart: Mapping[int, Tensor], samples: int, stack: int) -> list[Call]:
        """Calls with those of their tensors on the shelf that no other batch has."""
        if stack not in self._puts:
            assert self.shelf is not None
            nbytes = sum(tensor.numel() * tensor.element_size() for tensor in apart.values())
            self._puts[stack] = self.shelf(nbytes // samples * self.total)
        put_on = self._puts[stack]

        def away(value: Any) -> Any:
            if id(value) not in apart or (put := put_on(value)) is value:
                return value
            return _Kept(put)

        return [
            replace(
                call,
                args=tuple(map_tuples(value, away) for value in call.args),
                kwargs={name: map_tuples(value, away) for name, value in call.kwargs.items()},
            )
            for call in calls
        ]

    def outputs(self, batch: Batch, states: Sequence[Any], **options: Any) -> Any:
        """What the model makes of what the last block of each stack put out: its norm, its head and all. It can be
        differentiated where a state asks for that. `options` go to the network's forward pass."""
        gradient = any(tensor.requires_grad for tensor in tensors(tuple(states)))
        with torch.set_grad_enabled(gradient), StandIns(self.model, self.interface, states).installed():
            return self.model.run(batch, **options)


def marked(stand_ins: StandIns) -> list[Call]:
    """Calls, with places where the arguments hold what travels from block to block."""
    interface, model = stand_ins.interface, stand_ins.model
    takes = interface.takes.get(stand_ins.stack, {})
    numbers: dict[int, int] = {}
    start: dict[Key, Any] = {}
    if stand_ins.raw:
        args, kwargs, *_ = stand_ins.raw[0]
        start = {("output", number): argument(args, kwargs, path) for path, number in takes.items()}

    def mark(value: Any) -> Any:
        if not is_container(value):
            return value
        key = "container", numbers.setdefault(id(value), len(numbers))
        start.setdefault(key, value)
        return _Place(key)

    calls = []
    for index, (args, kwargs, by_name, shape) in zip(model.spans[stand_ins.stack], stand_ins.raw, strict=True):
        marked = [map_tuples(value, mark) for value in args]
        named = {name: map_tuples(value, mark) for name, value in kwargs.items()}
        for path, number in takes.items():
            place = _Place(("output", number))
            if isinstance(path, str):
                named[path] = place
            elif path < len(marked):
                marked[path] = place
        copies = index in interface.overwrites
        given = tuple(takes.values())
        calls.append(Call(tuple(marked), named, by_name, shape, start, given, copies, model.undivided))
    return calls
