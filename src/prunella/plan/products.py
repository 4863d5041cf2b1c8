"""Linear layers and convolutions of one place as products, other convolutions, norms by known numbers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from ..sparse.striped import LARGEST
from .lower import Lowering, Torch, rule
from .nodes import aten, shape_of
from .tails import NORMS, Tail, prunella
from .values import Live, Plane


def pair(value: Any) -> list[int]:
    """One number for both sides of a picture, or one for each."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return numbers * 2 if len(numbers) == 1 else numbers


def end_of(node: fx.Node, tail: Tail) -> tuple[int, ...]:
    """The shape of what comes out behind the tail."""
    shape = shape_of(tail.nodes[-1] if tail.nodes else node)
    assert shape is not None
    return shape


def beside(lower: Lowering, tail: Tail) -> dict[str, Plane | None]:
    """The residual of a tail."""
    if tail.residual is None:
        return {"residual": None}
    return {"residual": lower.plane(lower.value(tail.residual), tail.beside)}


def with_bias(tail: Tail, bias: Any) -> Tail:
    """The tail behind a layer with a bias of its own, which its scale scales too."""
    if bias is None:
        return tail
    own = bias.double() if tail.scale is None else bias.double() * tail.scale
    return Tail(**{**tail.__dict__, "bias": own if tail.bias is None else own + tail.bias})


@rule(prunella.sparse_linear)
def sparse_linear(lower: Lowering, node: fx.Node, tail: Tail) -> Live:
    x, *parts = (lower.value(one) for one in node.args)
    return product(lower, node, tail, x, -1, parts, None)


@rule(aten.linear)
def linear(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    x, weight, bias = (*map(lower.value, node.args), None)[:3]
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return None
    return product(lower, node, with_bias(tail, bias), x, -1, weight, bias)


def ends(lower: Lowering, tail: Tail) -> dict[str, Any]:
    """What a step does at its end."""
    vector = lower.weights.vector
    return {"scale": vector(tail.scale), "bias": vector(tail.bias), "act": tail.act, "residual_last": tail.last}


def product(
    lower: Lowering, node: fx.Node, tail: Tail, x: Any, axis: int, weight: Tensor | list[Any], bias: Any
) -> Live:
    """act(scale * W x + bias + residual) of a packed weight, by its parts, or a dense one (O, I)."""
    x_plane, others = lower.plane(x, axis), beside(lower, tail)
    y = lower.new(end_of(node, tail), tail.axis)
    if isinstance(weight, Tensor):
        return _dense(lower, x_plane, weight, y, tail, others)
    fields = {"weight": lower.weights.packed(weight), "positions": x_plane.positions, **ends(lower, tail)}
    return lower.step("product", y, tail.axis, {"x": x_plane, **others}, **fields)


def _dense(lower: Lowering, x: Plane, weight: Tensor, y: Live, tail: Tail, others: dict[str, Plane | None]) -> Live:
    """The same by torch's product, and steps for what follows it."""
    dense_OI = lower.weights.dense(weight.flatten(1), tail.scale)
    bias = lower.weights.vector(tail.bias)
    to = lower.plane(y, tail.axis)
    out, into = matrix(x), matrix(to)
    if bias is None:
        lower.act(Torch(aten.mm.default, (dense_OI, out), {}, into, aten.mm.out))
    else:
        args = (bias.unsqueeze(1), dense_OI, out)
        lower.act(Torch(aten.addmm.default, args, {}, into, aten.addmm.out))
    return finish(lower, y, tail, others)


def finish(lower: Lowering, y: Live, tail: Tail, others: dict[str, Plane | None]) -> Live:
    """The activation and the residual of a tail, in place."""
    residual, plane = others["residual"], lower.plane(y, tail.axis)
    sizes = {"channels": plane.channels, "positions": plane.positions}
    act = tail.act
    if act != "none" and (residual is None or tail.last):
        lower.step("map", y, tail.axis, {"x": plane}, act=act, **sizes)
        act = "none"
    if residual is not None:
        lower.step("add", y, tail.axis, {"a": plane, "b": residual}, act=act, **sizes)
    return y


def matrix(plane: Plane) -> Live:
    """A plane as a matrix (channels, positions)."""
    shape, strides = (plane.channels, plane.positions), (plane.ld, 1)
    return Live(plane.buffer, plane.buffer.whole.as_strided(shape, strides, plane.offset))


@rule(aten.conv2d)
def conv2d(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    args = [lower.value(one) for one in node.args]
    x, weight, bias, stride, padding, dilation, groups = (*args, *[None, [1, 1], [0, 0], [1, 1], 1][len(args) - 2 :])
    shape, made = node.all_input_nodes[0].meta["val"].shape, shape_of(node)
    if not isinstance(weight, Tensor) or made is None or len(made) != 4 or len(shape) != 4:
        return None
    kernel, stride, dilation = list(weight.shape[2:]), pair(stride), pair(dilation)
    if isinstance(padding, str):
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if padding == "same" else [0, 0]
    padding, tail = pair(padding), with_bias(tail, bias)
    batch, channels, height, width = shape
    if kernel == [1, 1] and groups == 1 and not any(padding):
        if stride != [1, 1]:
            x = subsample(lower, x, shape, made, stride)
        return product(lower, node, tail, x, 1, weight, bias)
    sizes = {
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "rows": made[1],
        "out_height": made[2],
        "out_width": made[3],
        "kernel": kernel,
        "stride": stride,
        "pad": padding,
        "dilation": dilation,
    }
    if groups == channels:
        others, x_plane = beside(lower, tail), lower.plane(x, 1)
        y = lower.new(end_of(node, tail), tail.axis)
        fields = {
            "weight": lower.weights.dense(weight, tail.scale),
            "bias": lower.weights.vector(tail.bias),
            "act": tail.act,
        }
        return lower.step(
            "depthwise", y, tail.axis, {"x": x_plane, **others}, **fields, residual_last=tail.last, **sizes
        )
    if math.prod(kernel) > LARGEST or made[1] % groups:
        return None
    others, x_plane = beside(lower, tail), lower.plane(x, 1)
    y, places, out_places = lower.new(end_of(node, tail), tail.axis), height * width, made[2] * made[3]
    flat_OI = weight.movedim(1, -1).flatten(1)
    fields = {"weight": lower.weights.striped(flat_OI, math.prod(kernel)), "groups": groups, **ends(lower, tail)}
    fields |= {"x_batch": places, "y_batch": out_places, "residual_batch": out_places}
    return lower.step("conv", y, tail.axis, {"x": x_plane, **others}, **fields, **sizes)


def subsample(lower: Lowering, x: Any, shape: Any, made: tuple[int, ...], stride: list[int]) -> Live:
    """The places of a picture that a stride meets."""
    y = lower.new((shape[0], shape[1], *made[2:]), 1)
    names = ("batch", "channels", "height", "width")
    sizes: dict[str, Any] = dict(zip(names, shape, strict=True))
    sizes |= {"out_height": made[2], "out_width": made[3], "kernel": [1, 1], "stride": stride, "pad": [0, 0]}
    return lower.step("pool", y, 1, {"x": lower.plane(x, 1)}, act="none", dilation=[1, 1], mean=0, count_pad=0, **sizes)


@rule(*NORMS)
def norm(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """A norm by known numbers: a depthwise convolution of one place."""
    shape = shape_of(node)
    if tail.scale is None or shape is None or len(shape) < 2 or tail.axis != 1:
        return None
    others, x = beside(lower, tail), lower.plane(lower.value(node.args[0]), 1)
    y = lower.new(end_of(node, tail), tail.axis)
    one: dict[str, Any] = {"kernel": [1, 1], "stride": [1, 1], "pad": [0, 0], "dilation": [1, 1], "batch": 1}
    one |= {"channels": x.channels, "rows": x.channels, "height": 1, "out_height": 1}
    one |= {"width": x.positions, "out_width": x.positions}
    fields = {"weight": lower.weights.vector(tail.scale), "bias": lower.weights.vector(tail.bias), "act": tail.act}
    return lower.step("depthwise", y, tail.axis, {"x": x, **others}, **fields, residual_last=tail.last, **one)
