"""From a graph to a list of actions: steps in C, and torch's own operators on views where no step exists."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import OPERATOR, composite, pytree, schema_of, storage_of
from .graph import Graph
from .nodes import aten, floats, is_view, packet, shape_of
from .tails import Tail, Tails, find_tails
from .values import Buffer, Live, Loose, Plane, channel_axis, find_views, new_value, plane_of

VALUES = (Live, Loose)


@dataclass(frozen=True, eq=False)
class Step:
    """One step of csrc/steps.h.

    planes:  the values that it reads and writes, by the names of its fields
    fields:  its other fields: numbers, lists of numbers, tensors and prepared weights
    """

    kind: str
    planes: dict[str, Plane]
    fields: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Torch:
    """An operator of torch, its arguments as values of the plan.

    out:  where the result goes: a loose value or several (an operator may make more than one tensor), or a live one,
          into which it is copied
    form: the same operator with `out=`, where it writes the live value itself
    wide: half precision among its arguments becomes float32
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    form: Callable[..., Any] | None = None
    wide: bool = False


Action = Step | Torch
Rule = Callable[["Lowering", fx.Node, Tail], Any]
RULES: dict[Any, Rule] = {}  # filled by the files with rules


def rule(*kinds: Any) -> Callable[[Rule], Rule]:
    """What is done for these operators. A rule gives the value of the node, or of the last one of its tail; None where
    it has no steps for it."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return add


class Lowering:
    """A graph on its way to actions."""

    def __init__(self, graph: Graph, weights: Any):
        self.graph, self.weights = graph, weights
        self.actions: list[Action] = []
        self.buffers: dict[int, Buffer] = {}
        self.env: dict[fx.Node, Any] = dict(graph.known)
        self.slots = 0
        self.planes: dict[tuple[Any, int], Live] = {}  # loose values that were brought into the memory
        self.masks: dict[Any, Live] = {}  # as attention takes them
        self.inputs: list[Loose | None] = []
        for node in graph.inputs:
            like = None if node is None else node.meta["val"]
            self.inputs.append(None if like is None else self.loose(tuple(like.shape), like.dtype))
            if node is not None:
                self.env[node] = self.inputs[-1]
        self.tails: Tails = find_tails(graph)
        for node in graph.nodes:
            if node not in self.tails.inner:
                self._run(node)
        self.outputs = [self.env[one] if isinstance(one, fx.Node) else one for one in graph.outputs]
        like = [one.meta.get("val") if isinstance(one, fx.Node) else None for one in graph.outputs]
        self.dtypes = [one.dtype if isinstance(one, Tensor) else None for one in like]
        for value in self.outputs:
            self._reads(value, len(self.actions))

    # --- values

    def loose(self, shape: tuple[int, ...], dtype: torch.dtype, **about: Any) -> Loose:
        self.slots += 1
        return Loose(self.slots - 1, shape, dtype, **about)

    def new(self, shape: Sequence[int], axis: int) -> Live:
        live = new_value(shape, axis)
        self.buffers[storage_of(live.meta)] = live.buffer
        return live

    def value(self, node: Any) -> Any:
        return self.env[node] if isinstance(node, fx.Node) else node

    def plane(self, value: Any, axis: int) -> Plane:
        """A value with its channels on this axis: as it lies, else a copy."""
        live = self.live(value, axis)
        found = plane_of(live, axis)
        assert found is not None
        return found

    def live(self, value: Any, axis: int) -> Live:
        if isinstance(value, Live) and plane_of(value, axis) is not None:
            return value
        shape = tuple(value.shape)
        key = (value, axis % len(shape))
        if key not in self.planes:
            self.planes[key] = made = self.new(shape, axis)
            self.act(Torch(_same, (value,), {}, made))
        return self.planes[key]

    # --- actions

    def act(self, action: Action) -> None:
        number = len(self.actions)
        if isinstance(action, Step):
            for plane in action.planes.values():
                plane.buffer.use(number)
        else:
            self._reads((action.args, action.kwargs, action.out), number)
        self.actions.append(action)

    def step(self, kind: str, y: Live, axis: int, planes: dict[str, Plane | None], **fields: Any) -> Live:
        """A step that writes y, its channels on this axis."""
        to = plane_of(y, axis)
        assert to is not None
        read = {name: plane for name, plane in planes.items() if plane is not None}
        self.act(Step(kind, {**read, "y": to}, fields))
        return y

    def _reads(self, values: Any, number: int) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Live):
                value.buffer.use(number)
            elif isinstance(value, Loose):
                for buffer in value.holds:
                    buffer.use(number)

    # --- nodes

    def _run(self, node: fx.Node) -> None:
        start = self.tails.start.get(node, node)
        tail = self.tails.of.get(start) or Tail(axis=-1)
        made = RULES.get(packet(start))
        value = None if made is None else made(self, start, tail)
        if value is not None:
            self.env[node] = value
            return
        for one in (start, *tail.nodes):  # none for all of it
            simple = None if one is start and start is node else RULES.get(packet(one))
            alone = simple(self, one, Tail(axis=-1)) if simple is not None and one is not start else None
            self.env[one] = self.by_torch(one) if alone is None else alone

    def by_torch(self, node: fx.Node) -> Any:
        """The node itself: a view of values where it is one, else torch's operator."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        leaves = pytree.tree_leaves((args, kwargs))
        lives = [one for one in leaves if isinstance(one, Live)]
        if node.target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]  # type: ignore[index]
        if not lives and not any(isinstance(one, Loose) for one in leaves):
            return self.slotted(node, args, kwargs, frozenset())
        if lives and is_view(node):
            metas = pytree.tree_map_only(Live, lambda live: live.meta, (args, kwargs))
            try:
                found = find_views(node.target(*metas[0], **metas[1]), self.buffers)  # type: ignore[operator]
            except (RuntimeError, NotImplementedError):
                found = None
            if found is not None:
                return found
        if lives and packet(node) in (aten._to_copy, aten.to) and floats(node):
            return lives[0]
        return self._placed(node, args, kwargs, lives) or self.slotted(
            node, args, kwargs, frozenset(live.buffer for live in lives) if _may_alias(node) else frozenset()
        )

    def _placed(self, node: fx.Node, args: Any, kwargs: Any, lives: list[Live]) -> Live | None:
        """The result of an operator on each element, in the memory, as the values that it reads lie."""
        shape, form = shape_of(node), out_form(node.target)
        if form is None or shape is None or not lives or not floats(node):
            return None
        pointwise = torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
        if not pointwise and packet(node) is not aten.cat:
            return None
        like = next((live for live in lives if len(live.shape) == len(shape) and channel_axis(live) is not None), None)
        if like is None or (pointwise and like.shape != shape):
            return None
        axis = channel_axis(like)
        assert axis is not None
        y = self.new(shape, axis)
        self.act(Torch(node.target, args, kwargs, y, form, wide=True))  # type: ignore[arg-type]
        return y

    def slotted(self, node: fx.Node, args: Any, kwargs: Any, holds: frozenset[Buffer]) -> Any:
        """By torch, into a place of its own."""
        for one in pytree.tree_leaves((args, kwargs)):
            if isinstance(one, Loose):
                holds |= one.holds if _may_alias(node) else frozenset()
        made = node.meta.get("val")
        alike = self._alike(node, args) if isinstance(made, Tensor) else frozenset()

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self.loose(tuple(value.shape), value.dtype, alike=alike, holds=holds)

        out = pytree.tree_map(place, made)
        wide = any(isinstance(one, Live) for one in pytree.tree_leaves((args, kwargs)))
        self.act(Torch(node.target, args, kwargs, out, wide=wide))  # type: ignore[arg-type]
        return out

    def _alike(self, node: fx.Node, args: Any) -> frozenset[int]:
        """Axes of the result along which all entries are the same, whatever the inputs."""
        shape = shape_of(node) or ()
        tags = getattr(node.target, "tags", ())
        sizes = {axis for axis in range(len(shape)) if shape[axis] > 1}
        if torch.Tag.pointwise in tags or packet(node) in (aten.expand, aten._to_copy):
            return frozenset(
                axis for axis in sizes if all(_alike_in(one, axis - len(shape)) for one in pytree.tree_leaves(args))
            )
        return frozenset()


def _alike_in(value: Any, axis: int) -> bool:
    """Are a value's entries the same along this axis, counted from behind?"""
    if not isinstance(value, Tensor | Loose | Live) or axis < -len(value.shape) or value.shape[axis] == 1:
        return True
    if isinstance(value, Loose):
        return axis + len(value.shape) in value.alike
    return isinstance(value, Tensor) and value.stride(axis) == 0


def _same(x: Tensor) -> Tensor:
    return x


def _may_alias(node: fx.Node) -> bool:
    """May the result lie in the memory of an argument?"""
    target: Any = node.target
    if not isinstance(target, OPERATOR) or is_view(node):
        return True
    return composite(target)


@functools.cache
def out_form(target: Any) -> Any:
    """The same operator with `out=`, if there is one."""
    if not isinstance(target, OPERATOR):
        return None
    wanted = [(a.name, str(a.type)) for a in schema_of(target).arguments]
    for name in target.overloadpacket.overloads():
        form = getattr(target.overloadpacket, name)
        arguments = schema_of(form).arguments
        if sum(a.is_out for a in arguments) == 1 and wanted == [
            (a.name, str(a.type)) for a in arguments if not a.is_out
        ]:
            return form
    return None
