"""A plan that is made, and its runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import pytree
from ..sparse import steps
from ..sparse.coded import Coded
from . import encoder, products, vision  # noqa: F401  (their rules)
from .graph import Graph
from .lower import Lowering, Step, Torch
from .memory import lay_out
from .values import Live, Loose, Plane
from .weights import Pruned

HALVES = (torch.bfloat16, torch.float16)


class Plan:
    """The forward pass of a network for inputs of one shape.

    size: floats of memory that a run takes
    """

    def __init__(self, graph: Graph, weights: Any):
        lowered = Lowering(graph, weights)
        self.actions, self.inputs, self.outputs = lowered.actions, lowered.inputs, lowered.outputs
        self.slots, self.dtypes, self.pack, self.keys = lowered.slots, lowered.dtypes, graph.pack, graph.keys
        self.size = lay_out({id(buffer): buffer for buffer in _buffers(lowered)}.values())

    def bound(self, memory: Tensor) -> Bound:
        return Bound(self, memory)


def _buffers(lowered: Lowering) -> list[Any]:
    found = []
    for action in lowered.actions:
        if isinstance(action, Step):
            found += [plane.buffer for plane in action.planes.values()]
        else:
            leaves = pytree.tree_leaves((action.args, action.kwargs, action.out))
            found += [one.buffer for one in leaves if isinstance(one, Live)]
    return found


class Bound:
    """A plan on one memory: what runs, one call after the other."""

    def __init__(self, plan: Plan, memory: Tensor):
        self.plan, self.memory = plan, memory
        self.slots: list[Any] = [None] * plan.slots
        self.kept: list[Any] = []
        self.calls: list[Callable[[], None]] = []
        waiting: list[Step] = []
        for action in plan.actions:
            if isinstance(action, Step):
                waiting.append(action)
                continue
            self._flush(waiting)
            self.calls.append(self._torch(action))
        self._flush(waiting)
        self.inputs = [None if one is None else one.slot for one in plan.inputs]
        self.outputs = [self._output(*one) for one in zip(plan.outputs, plan.dtypes, strict=True)]

    def run(self, flat: Sequence[Any]) -> Any:
        """The outputs, for arguments in the order of the plan's inputs."""
        for slot, value in zip(self.inputs, flat, strict=True):
            if slot is not None:
                self.slots[slot] = value
        for call in self.calls:
            call()
        given = [value for value in flat if isinstance(value, Tensor)]
        made = [output(given) for output in self.outputs]
        self.slots[:] = [None] * len(self.slots)
        return pytree.tree_unflatten(made, self.plan.pack)

    # --- steps in C

    def _flush(self, waiting: list[Step]) -> None:
        if waiting:
            self.calls.append(steps.Run([self._made(step) for step in waiting]))
            waiting.clear()

    def _made(self, step: Step) -> steps.Step:
        fields: dict[str, Any] = {name: self._value(plane) for name, plane in step.planes.items()}
        for name, value in step.fields.items():
            if isinstance(value, Pruned):
                self.kept.append(value)
                fields[name] = ctypes.addressof(value.struct)
            elif value is not None:
                fields[name] = int(value) if isinstance(value, bool) else value
        weight = step.fields.get("weight")
        if isinstance(weight, Pruned) and isinstance(weight.held, Coded):
            fields.pop("scale", None)  # which is in the code's values
        return steps.step(step.kind, **fields)

    def _value(self, plane: Plane) -> Any:
        address = self.memory.data_ptr() + 4 * (plane.buffer.start + plane.offset)
        return (address, plane.ld) if plane.ld else address

    # --- operators of torch

    def _torch(self, action: Torch) -> Callable[[], None]:
        target, form, out, slots = action.target, action.form, action.out, self.slots
        leaves, spec = pytree.tree_flatten((list(action.args), dict(action.kwargs)))
        leaves = [self._given(leaf, action.wide) for leaf in leaves]
        loose = [(at, leaf.slot) for at, leaf in enumerate(leaves) if isinstance(leaf, Loose)]
        wide = action.wide

        def arguments() -> Any:
            if not loose:
                return args, kwargs
            now = list(leaves)
            for at, slot in loose:
                value = slots[slot]
                now[at] = value.float() if wide and isinstance(value, Tensor) and value.dtype in HALVES else value
            return pytree.tree_unflatten(now, spec)

        args, kwargs = (None, None) if loose else pytree.tree_unflatten(leaves, spec)
        if isinstance(out, Live):
            view = out.on(self.memory)
            if form is None:

                def call() -> None:
                    args, kwargs = arguments()
                    view.copy_(target(*args, **kwargs))

            else:

                def call() -> None:
                    args, kwargs = arguments()
                    form(*args, **kwargs, out=view)

            return call
        places = pytree.tree_leaves(out)

        def call_loose() -> None:
            args, kwargs = arguments()
            made = target(*args, **kwargs)
            if len(places) == 1 and isinstance(made, Tensor):
                slots[places[0].slot] = made
                return
            for place, value in zip(places, pytree.tree_leaves(made), strict=True):
                if isinstance(place, Loose):
                    slots[place.slot] = value

        return call_loose

    def _given(self, leaf: Any, wide: bool) -> Any:
        if isinstance(leaf, Live):
            return leaf.on(self.memory)
        if wide and isinstance(leaf, Tensor) and leaf.dtype in HALVES:
            return leaf.float()
        return leaf

    # --- outputs

    def _output(self, value: Any, dtype: torch.dtype | None) -> Callable[[list[Tensor]], Any]:
        """What comes out is new, and nobody else's."""
        if isinstance(value, Live):
            view = value.on(self.memory)
            return lambda given: torch.empty(view.shape, dtype=dtype).copy_(view)
        if isinstance(value, Loose):
            slots, slot = self.slots, value.slot

            def loose(given: list[Tensor]) -> Tensor:
                made: Tensor = slots[slot].to(dtype)
                place = made.untyped_storage().data_ptr()
                shared = any(place == one.untyped_storage().data_ptr() for one in (*given, self.memory))
                return made.clone() if shared else made

            return loose
        if isinstance(value, Tensor):
            return lambda given: value.clone()
        return lambda given: value
