"""How a later stack of blocks hangs on what left those before it: what a gradient passes on its way back from one to
the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Calls, marked
from .samples import Batch
from .standins import StandIns
from .trees import map_tuples


class Crossing:
    """Of one sample: a stack's first hidden state, and the arguments of its blocks, as functions of the states that
    left the stacks before it (a decoder attends to what its encoder put out; pictures stand among the tokens of a
    text).

    calls: how the stack's blocks are called
    """

    def __init__(self, calls: Calls, batch: Batch, states: Sequence[Tensor]):
        """The model's parameters outside its blocks must be loaded. `states`: what left each stack before this one."""
        self._states = [state.detach().requires_grad_() for state in states]
        stand_ins = StandIns(calls.model, calls.interface, self._states)
        stand_ins.pass_through(batch, gradient=True)
        self._entering = stand_ins.entering
        first = calls.model.spans[len(states)].start
        self.calls = dict(enumerate(marked(stand_ins), first))
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # arguments that hang on the states, and their gradients

    def call(self, index: int) -> tuple[Call, list[tuple[Tensor, Tensor]]]:
        """How block `index` is called, with leaves in place of the arguments that hang on the states: pairs of both."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            return pairs.setdefault(id(value), (value, value.detach().requires_grad_()))[1]

        call = self.calls[index]
        args = tuple(map_tuples(value, leaf) for value in call.args)
        kwargs = {name: map_tuples(value, leaf) for name, value in call.kwargs.items()}
        return replace(call, args=args, kwargs=kwargs), list(pairs.values())

    def gather(self, argument: Tensor, gradient: Tensor) -> None:
        """One block's gradient of such an argument; those of all blocks add up."""
        if id(argument) in self._made:
            gradient = self._made[id(argument)][1] + gradient
        self._made[id(argument)] = argument, gradient

    def back(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of the states, from that of the first hidden state and of all arguments."""
        outputs = [*self._made.values()]
        if self._entering.requires_grad:
            outputs.append((self._entering, gradient))
        if not outputs:
            return [torch.zeros_like(state) for state in self._states]
        made, gradients = zip(*outputs, strict=True)
        return list(torch.autograd.grad(made, self._states, gradients, allow_unused=True, materialize_grads=True))
