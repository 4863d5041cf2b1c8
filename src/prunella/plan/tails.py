"""What follows a product or a convolution and can be done with it: norms of its channels by numbers that are known, an
activation, an addition.

A tail is done where its last node stands: all that it needs is computed by then.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import storage_of
from ..sparse.kernels import sparse_linear
from ..sparse.striped import sparse_conv
from .graph import Graph
from .nodes import aten, floats, packet, shape_of

NORMS = {aten.batch_norm, aten._native_batch_norm_legit_no_training}
ACTS = {
    aten.relu: "relu",
    aten.relu6: "relu6",
    aten.silu: "silu",
    aten.sigmoid: "sigmoid",
    aten.hardswish: "hardswish",
    aten.hardsigmoid: "hardsigmoid",
    aten.tanh: "tanh",
}
LINEAR = {sparse_linear, aten.linear}  # whose channels are on the last axis of what they put out
CONV = {sparse_conv, aten.conv2d}  # on axis 1
ACT_ONLY = {aten.add, aten.mul, aten.adaptive_avg_pool2d, aten.mean, aten.max_pool2d, aten.avg_pool2d}


@dataclass(frozen=True)
class Tail:
    """y = act(scale * x + bias + residual), or act(scale * x + bias) + residual if `last`.

    nodes: what it does, in order, behind the node that puts out x
    scale, bias: float64 (channels), or None
    axis:  of the channels in what comes out
    beside: of the channels in the residual
    """

    nodes: tuple[fx.Node, ...] = ()
    axis: int = 0
    scale: Tensor | None = None
    bias: Tensor | None = None
    act: str = "none"
    residual: fx.Node | None = None
    last: bool = False
    beside: int = 0

    @property
    def affine(self) -> bool:
        """May a scale or a bias still be folded into it?"""
        return self.act == "none" and self.residual is None


@dataclass
class Tails:
    """Of all nodes of a graph.

    of:    the tail of each node that has one
    inner: nodes that are done with one that comes after them
    """

    of: dict[fx.Node, Tail] = field(default_factory=dict)
    start: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inner: set[fx.Node] = field(default_factory=set)


def find_tails(graph: Graph) -> Tails:
    """What follows the producers of a graph and can be done with them."""
    found = Tails()
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken:
            continue
        shape = shape_of(node)
        if shape is None or not shape:
            continue
        kind = packet(node)
        if kind in LINEAR:
            tail, folds = Tail(axis=len(shape) - 1), True
        elif kind in CONV:
            tail, folds = Tail(axis=len(shape) - 3), True
        elif kind in NORMS:
            normed = _with_norm(Tail(axis=1), node, graph.known)
            if normed is None:
                continue
            tail, folds = normed, True
        elif kind in ACT_ONLY:
            tail, folds = Tail(axis=-1), False
        else:
            continue
        tail = _follow(node, tail, graph.known, taken, folds)
        if tail.nodes:
            found.of[node], found.start[tail.nodes[-1]] = tail, node
            found.inner |= {node, *tail.nodes[:-1]}
            taken |= set(tail.nodes)
        elif folds:
            found.of[node] = tail
    return found


def _follow(node: fx.Node, tail: Tail, known: dict[fx.Node, Any], taken: set[fx.Node], folds: bool) -> Tail:
    at = node
    while len(at.users) == 1:
        (user,) = at.users
        if user.op != "call_function" or user in taken or shape_of(user) is None:
            break
        longer = _with(tail, at, user, known) if folds else _with_act(tail, user)
        if longer is None:
            break
        at = user
        tail = replace(longer, nodes=(*tail.nodes, user))
    return _ended(tail)


def _ended(tail: Tail) -> Tail:
    """Nothing, where it ends with a norm whose result is not taken out of it."""
    if tail.nodes and packet(tail.nodes[-1]) is aten._native_batch_norm_legit_no_training:
        return Tail(axis=tail.axis)
    return tail


def _with(tail: Tail, at: fx.Node, user: fx.Node, known: dict[fx.Node, Any]) -> Tail | None:
    """The tail with one more node; None where it cannot be part of it."""
    kind = packet(user)
    if kind in NORMS and tail.affine and user.args[0] is at:
        return _with_norm(tail, user, known)
    if (
        user.target is operator.getitem
        and user.args[1] == 0
        and packet(at) is aten._native_batch_norm_legit_no_training
    ):
        return tail
    if kind in (aten.permute, aten.transpose, aten.movedim, aten.unsqueeze, aten.squeeze, aten.view, aten.reshape):
        return _moved(tail, at, user)
    if kind in (aten.add, aten.mul, aten.div) and user.args[0] is not user.args[1]:
        return _with_arithmetic(tail, at, user, known)
    return _with_act(tail, user)


def _with_act(tail: Tail, user: fx.Node) -> Tail | None:
    act = act_of(user)
    if act is None or tail.act != "none" or (user.args and len(user.all_input_nodes) != 1):
        return None
    return replace(tail, act=act)


def act_of(node: fx.Node) -> str | None:
    """The activation that a node is, of those that steps can do."""
    kind, args = packet(node), node.args
    if kind is aten.gelu:
        exact = node.kwargs.get("approximate", args[1] if len(args) > 1 else "none") == "none"
        return "gelu" if exact else "gelu_tanh"
    if kind in (aten.hardtanh, aten.clamp):
        low, high = [*args[1:], *((None, None) if kind is aten.clamp else (-1, 1))][:2]
        if node.kwargs or low != 0:
            return None
        return "relu" if high is None else "relu6" if high == 6 else None
    return ACTS.get(kind)


def _with_norm(tail: Tail, user: fx.Node, known: dict[fx.Node, Any]) -> Tail | None:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, its channels on axis 1."""
    args: tuple[Any, ...] = user.args
    weight, bias, mean, var = (known.get(one) if isinstance(one, fx.Node) else one for one in args[1:5])
    training, eps = (args[5], args[7]) if packet(user) is aten.batch_norm else (False, args[6])
    if tail.axis != 1 or training or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return _folded(tail, scale, shift if bias is None else shift + bias.double())


def _folded(tail: Tail, scale: Tensor | None, shift: Tensor | None) -> Tail:
    """With a scale, and after it a shift, of each channel."""
    bias = tail.bias
    if scale is not None:
        bias = None if bias is None else bias * scale
        tail = replace(tail, scale=scale if tail.scale is None else tail.scale * scale)
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return replace(tail, bias=bias)


def _with_arithmetic(tail: Tail, at: fx.Node, user: fx.Node, known: dict[fx.Node, Any]) -> Tail | None:
    kind, shape = packet(user), shape_of(user)
    other = user.args[1] if user.args[0] is at else user.args[0]
    if user.kwargs or len(user.args) != 2 or shape is None or (kind is aten.div and other is user.args[0]):
        return None
    value = known.get(other) if isinstance(other, fx.Node) else other
    if value is not None:
        numbers = by_channel(value, shape, tail.axis)
        if numbers is None or not tail.affine or shape != shape_of(at):
            return None
        if kind is aten.add:
            return _folded(tail, None, numbers)
        return _folded(tail, numbers if kind is aten.mul else 1 / numbers, None)
    if (
        kind is not aten.add
        or tail.residual is not None
        or not isinstance(other, fx.Node)
        or shape_of(other) != shape
        or shape != shape_of(at)
        or not floats(other)
    ):
        return None
    return replace(tail, residual=other, last=tail.act != "none", beside=tail.axis)


def by_channel(value: Any, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """A number, or a tensor that is the same all along the other axes of this shape, as numbers (channels)."""
    channels = shape[axis]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full((channels,), float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim > len(shape):
        return None
    if value.numel() == 1:
        return value.double().reshape(1).expand(channels)
    at = axis % len(shape) - (len(shape) - value.ndim)
    if at < 0 or value.numel() != channels or value.shape[at] != channels:
        return None
    return value.double().reshape(channels)


def _moved(tail: Tail, at: fx.Node, user: fx.Node) -> Tail | None:
    """With its axes in another order, or with others of one entry. The places keep theirs."""
    before, after = shape_of(at), shape_of(user)
    if before is None or after is None:
        return None
    far = 2 * math.prod(before)  # from a channel to the next: as values lie, whatever their sizes
    strides, step = [0] * len(before), 1
    for axis in reversed(range(len(before))):
        strides[axis] = far if axis == tail.axis else step
        step *= 1 if axis == tail.axis else before[axis]
    probe = torch.empty_strided(before, strides, device="meta")
    try:
        moved = user.target(probe, *user.args[1:], **user.kwargs)  # type: ignore[operator]
    except RuntimeError:
        return None
    if not isinstance(moved, Tensor) or storage_of(moved) != storage_of(probe):
        return None
    step, found = 1, None
    for axis in reversed(range(moved.ndim)):
        size, stride = moved.shape[axis], moved.stride(axis)
        if stride >= far and size == before[tail.axis] and found is None:
            found = axis
        elif size != 1:
            if stride != step:
                return None
            step *= size
    if found is None:
        return None
    return replace(tail, axis=found)
