"""Does it hold that a network's blocks can be run one by one? Tried before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, Calls, Key
from .errors import first_line
from .linalg import apart
from .model.cut import Argument, Interface, alike, overwrites
from .model.network import Model
from .samples import Batch, Samples, rows_of, size_of
from .standins import StandIns, not_one_by_one
from .trees import items, tensors
from .waits import demand, together

TOLERANCE = 0.02  # of what a block adds to its input: how far its replay may be from the original


def examine(model: Model, samples: Samples) -> Interface:
    """How the model's blocks are called, found out and tried on two different batches of two samples.

    The first, a middle and the last block of each stack are replayed and compared with what they give inside the
    model's own forward pass, in which all other blocks hand on what they get; where more than that state travels, or
    another stack follows, all blocks are. The task may ask more of a block (`Task.check_block`). Raises ModelError,
    naming the architecture, where any of this does not hold. The model's parameters outside its blocks must be loaded.
    """
    batches = _two(samples)
    interface = Interface({}, {}, 0, False, alike(model.network, model.blocks), overwrites(model.network, model.blocks))
    states: list[list[Any]] = [[] for _ in batches]
    for stack, span in enumerate(model.spans):
        marked = StandIns(model, interface, states[0], mark=True)
        marked.pass_through(batches[0], on=stack == len(model.spans) - 1)
        taken = {**interface.takes, stack: _taken(model.network, marked, span.start)}
        interface = replace(interface, takes=taken, batch=_batch_dimension(model, marked, batches[0], states[0]))
        interface = _tried(model, interface, batches, states)
    return interface


def _two(samples: Samples) -> list[Batch]:
    """Two different batches of two samples: the first two, and the last two or, of few, others made of them."""
    two = {key: torch.cat([tensor[:2]] * 2)[:2] for key, tensor in samples.groups[0].items()}
    last = samples.groups[-1]
    if len(samples) > 3 and size_of(last) > 1:
        return [two, {key: tensor[-2:] for key, tensor in last.items()}]
    # Other whole numbers than tokens may say what fits what (the shape of a picture, say): they stay as they are.
    turned = {key for key, t in two.items() if t.ndim > 1 and (t.is_floating_point() or key.endswith("input_ids"))}
    return [two, {key: (tensor.flip(1) if key in turned else tensor).flip(0) for key, tensor in two.items()}]


def _tried(model: Model, interface: Interface, batches: list[Batch], states: list[list[Any]]) -> Interface:
    """Replays blocks of the next stack. What left it is added to the states, where another stack follows."""
    network, stack = model.network, len(states[0])
    span = model.spans[stack]
    calls = Calls(model, interface)
    entered = [calls.enter(*given) for given in zip(batches, states, strict=True)]
    travels = bool(interface.takes[stack]) or any(
        key[0] == "container" and not items(value) for key, value in entered[0][1][0].start.items()
    )
    if travels or stack < len(model.spans) - 1:  # a block alone would miss what those before it leave
        for batch, (hidden, found), before in zip(batches, entered, states, strict=True):
            own = StandIns(model, interface, before, real=span, load=True)
            own.pass_through(batch)
            beside: dict[Key, Any] = {}
            for index, call in zip(span, found, strict=True):
                with model.block(index) as block, together():
                    hidden, beside = _compared(network, index, own, call, block, hidden, beside, twice=True)
            before.append(own.gave[span.stop - 1])
        return replace(interface, stateful=interface.stateful or travels)
    kinds: set[int] = set()  # of blocks that have run twice: one of each is enough
    for index in sorted({span.start, (span.start + span.stop - 1) // 2, span.stop - 1}):
        with model.block(index) as block, together():
            for batch, (_, found), before in zip(batches, entered, states, strict=True):
                own = StandIns(model, interface, before, real={index})
                own.pass_through(batch)
                twice = interface.alike[index] not in kinds
                _compared(network, index, own, found[index - span.start], block, own.met[index], {}, twice=twice)
                kinds.add(interface.alike[index])

            def within(batch: Batch, index: int = index) -> tuple[Tensor, Any]:
                own = StandIns(model, interface, states[0], real={index})
                own.pass_through(batch)
                return own.met[index], own.gave[index]

            model.task.check_block(network, index, within, batches[0], interface.batch)
    return interface


def _compared(
    network: nn.Module,
    index: int,
    own: StandIns,
    call: Call,
    block: nn.Module,
    hidden: Tensor,
    beside: Mapping[Key, Any],
    *,
    twice: bool,
) -> tuple[Any, dict[Key, Any]]:
    """Replay a block, maybe twice. Raises ModelError where it gives something else than inside the network, or the
    second time."""
    before = hidden.clone()
    with torch.no_grad():
        replayed, after = call.run(block, hidden, beside)
        try:
            again = tensors(call.run(block, hidden.clone(), beside)[0] if twice else replayed)
        except RuntimeError as error:
            raise not_one_by_one(network, f"block {index} does not run twice: {first_line(error)}") from error

    def hold(good: Tensor, what: str) -> None:
        demand(good, lambda: not_one_by_one(network, f"block {index} {what}"))

    gave, gives = tensors(own.gave[index]), tensors(replayed)
    hold(~((before != hidden).any() & before.isfinite().all()), "overwrites what it is given")
    alone, each = "gives something else on its own than inside the model", "gives something else each time it is run"
    hold(torch.tensor(len(gave) == len(gives)), alone)
    for a, b in zip(gave, gives, strict=True):
        hold(_close(a, b, before), alone)
    for a, b in zip(gives, again, strict=True):
        hold(_close(a, b, before), f"{each} (has it a cache?)")
    return replayed, after


def _close(gave: Tensor, replayed: Tensor, before: Tensor) -> Tensor:
    """Is what a block gives the same but for rounding, which is small beside what it adds to its input?"""
    if (gave.shape, gave.dtype) != (replayed.shape, replayed.dtype):
        return torch.tensor(False)
    same = (gave == replayed).all()
    if same.device.type == "cpu" and same:
        return same
    added = apart(gave, before if before.shape == gave.shape else torch.zeros_like(gave))
    return same | ~gave.isfinite().all() | (apart(gave, replayed) <= TOLERANCE * added)


def _taken(network: nn.Module, marked: StandIns, start: int) -> dict[Argument, int]:
    """Which arguments are an output of the block before. Raises ModelError where such an output goes elsewhere."""
    takes: dict[Argument, int] = {}
    for place, (args, kwargs, *_) in enumerate(marked.raw[1:], 1):
        marks = {id(mark): number for number, mark in marked.marks[place - 1].items()}
        arguments: list[tuple[Argument, Any]] = [*enumerate(args), *kwargs.items()]
        for path, value in arguments:
            if id(value) in marks:
                takes[path] = marks[id(value)]
            elif _has_nan(value):
                raise not_one_by_one(
                    network, f"argument '{path}' of block {start + place} is made of an earlier block's"
                )
    if (
        marked.marks
        and marked.marks[-1]
        and not _has_nan(marked.entering)
        and any(map(_has_nan, tensors(marked.reached)))
    ):
        raise not_one_by_one(network, "more than one thing that its last block puts out is used")
    return takes


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _batch_dimension(model: Model, marked: StandIns, two: Batch, states: list[Any]) -> int:
    one = {key: tensor[:1] for key, tensor in two.items()}
    left = [rows_of(state, marked.interface.batch, 2, 0) for state in states]
    alone = StandIns(model, marked.interface, left, mark=True)
    alone.pass_through(one)
    sizes = list(zip(marked.entering.shape, alone.entering.shape, strict=True))
    apart = [dimension for dimension, (a, b) in enumerate(sizes) if a != b]
    if (
        len(apart) != 1
        or sizes[apart[0]][0] != 2 * sizes[apart[0]][1]
        or (marked.stack and apart[0] != marked.interface.batch)
    ):
        raise not_one_by_one(model.network, "its hidden state has no dimension of its own for the samples of a batch")
    return apart[0]
