"""Steps of networks that see pictures: pooling, means, gates, sums and activations."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .lower import VALUES, Lowering, rule
from .nodes import aten, floats, packet, shape_of
from .products import end_of, given, pair, window
from .tails import ACTS, Tail, act_of
from .values import Live, channel_axis


@rule(aten.max_pool2d, aten.avg_pool2d)
def pool(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """The largest, or the mean, of windows of pictures (B, C, H, W), where padding and rounding are plain."""
    mean = packet(node) is aten.avg_pool2d
    defaults: list[Any] = [None, None, [], 0, False, True, None] if mean else [None, None, [], 0, 1, False]
    args = given(lower, node, defaults)
    x, kernel, stride, padding = args[:4]
    made = shape_of(node)
    if made is None or len(x.shape) != 4 or node.kwargs or (mean and (args[4] or args[6] is not None)):
        return None
    y = lower.new(end_of(node, tail), 1)
    sizes = window(x, made, pair(kernel), pair(stride or kernel), pair(padding), pair(1 if mean else args[4]))
    del sizes["rows"]
    counts = {"mean": int(mean), "count_pad": int(bool(mean and args[5]))}
    return lower.step("pool", y, 1, {"x": lower.plane(x, 1)}, act=tail.act, **counts, **sizes)


@rule(aten.adaptive_avg_pool2d)
def adaptive(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """The mean over all places of pictures (B, C, H, W), as pooling to one place."""
    x, size = map(lower.value, node.args)
    if len(x.shape) != 4 or pair(size) != [1, 1]:
        return None
    return _mean(lower, node, tail, x, 1, 1)


@rule(aten.mean)
def mean(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """The mean over all places of each sample."""
    x, axes, keep = given(lower, node, [None, None, False])[:3]
    if not isinstance(x, Live) or node.kwargs or len(node.args) > 3 or not isinstance(axes, list | tuple):
        return None
    rank = len(x.shape)
    gone = {axis % rank for axis in axes}
    left = [axis for axis in range(1, rank) if axis not in gone]
    if not gone or 0 in gone or len(left) != 1:
        return None
    return _mean(lower, node, tail, x, left[0], left[0] if keep else 1)


def _mean(lower: Lowering, node: fx.Node, tail: Tail, x: Any, axis: int, to: int) -> Live:
    plane = lower.plane(x, axis)
    batch = x.shape[0]
    y = lower.new(end_of(node, tail), to)
    sizes = {"batch": batch, "channels": plane.channels, "places": plane.positions // max(1, batch)}
    return lower.step("mean", y, to, {"x": plane}, act=tail.act, **sizes)


@rule(aten.mul)
def gate(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """Each channel of each picture by a number of its own."""
    pair_of = [lower.value(one) for one in node.args]
    if node.kwargs or not all(isinstance(one, VALUES) for one in pair_of):
        return None
    x, scale = sorted(pair_of, key=lambda one: -math.prod(one.shape))
    rank = len(x.shape)
    if not isinstance(x, Live) or len(scale.shape) != rank or rank < 3 or not floats(node):
        return None
    axes = [axis for axis in range(1, rank) if scale.shape[axis] == x.shape[axis] != 1]
    ones = all(scale.shape[axis] == 1 for axis in range(1, rank) if axis not in axes)
    if len(axes) != 1 or not ones or scale.shape[0] != x.shape[0] or x.shape != shape_of(node):
        return None
    (axis,) = axes
    plane, numbers = lower.plane(x, axis), lower.plane(scale, axis)
    y = lower.new(end_of(node, tail), axis)
    sizes = {"batch": x.shape[0], "channels": plane.channels, "places": plane.positions // x.shape[0]}
    return lower.step("scale", y, axis, {"x": plane, "scale": numbers}, act=tail.act, **sizes)


@rule(aten.add)
def add(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """The sum of two values of one shape, with the activation behind it."""
    terms = [lower.value(one) for one in node.args]
    if node.kwargs or len(terms) != 2 or not floats(node) or not all(isinstance(one, VALUES) for one in terms):
        return None
    shape = shape_of(node)
    if any(tuple(one.shape) != shape for one in terms):
        return None
    axis = next((a for one in terms if isinstance(one, Live) and (a := channel_axis(one)) is not None), None)
    if axis is None:
        return None
    first, second = (lower.plane(one, axis) for one in terms)
    sizes = {"channels": first.channels, "positions": first.positions, "b_positions": first.positions}
    y = lower.new(end_of(node, tail), axis)
    return lower.step("add", y, axis, {"a": first, "b": second}, act=tail.act, **sizes)


@rule(*ACTS, aten.gelu, aten.hardtanh, aten.clamp)
def activation(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """An activation by itself, which no step before it could do."""
    x, act = lower.value(node.args[0]), act_of(node)
    if act is None or not isinstance(x, Live) or (axis := channel_axis(x)) is None:
        return None
    plane = lower.plane(x, axis)
    y = lower.new(x.shape, axis)
    return lower.step("map", y, axis, {"x": plane}, act=act, channels=plane.channels, positions=plane.positions)
