"""Linear layers and convolutions of one place as products, other convolutions, norms by known numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..sparse.coded import Ends
from ..sparse.kernels import sparse_linear
from ..sparse.striped import LARGEST, Striped, sparse_conv
from .lower import Lowering, Torch, rule
from .nodes import aten, shape_of
from .pads import PADS
from .tails import NORMS, Tail
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


def given(lower: Lowering, node: fx.Node, defaults: list[Any]) -> list[Any]:
    """The positional arguments of a node, with those that it leaves out."""
    return [*map(lower.value, node.args), *defaults[len(node.args) :]]


@rule(sparse_linear)
def packed_linear(lower: Lowering, node: fx.Node, tail: Tail) -> Live:
    """A packed linear layer, by its operator."""
    x, *parts = (lower.value(one) for one in node.args)
    return product(lower, node, tail, x, -1, parts)


@rule(aten.linear)
def linear(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """A dense linear layer with known weights."""
    x, weight, bias = given(lower, node, [None, None, None])
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return None
    return product(lower, node, with_bias(tail, bias), x, -1, weight)


def ends(lower: Lowering, tail: Tail) -> dict[str, Any]:
    """What a step does at its end."""
    vector = lower.weights.vector
    return {"scale": vector(tail.scale), "bias": vector(tail.bias), "act": tail.act, "residual_last": tail.last}


def product(lower: Lowering, node: fx.Node, tail: Tail, x: Any, axis: int, weight: Tensor | list[Any]) -> Live:
    """act(scale * W x + bias + residual) of a packed weight, by its parts, or a dense one (O, I)."""
    x_plane, others = lower.plane(x, axis), beside(lower, tail)
    y = lower.new(end_of(node, tail), tail.axis)
    if isinstance(weight, Tensor):
        return _dense(lower, x_plane, weight, y, tail, others)
    fields = {"positions": x_plane.positions, **ends(lower, tail)}
    own = ends_of(tail, others["residual"], lower.plane(y, tail.axis))
    fields["weight"] = lower.weights.packed(weight, x_plane.positions, fields["scale"], own)
    return lower.step("product", y, tail.axis, {"x": x_plane, **others}, **fields)


def ends_of(tail: Tail, residual: Plane | None, y: Plane) -> Ends:
    """What code can do of a tail: an addition first, then what cuts off."""
    adds = residual is not None and residual.ld == y.ld and (tail.act == "none" or not tail.last)
    cuts = tail.act in ("relu", "relu6") and (residual is None or adds)
    return Ends(tail.act if cuts else "none", adds)


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
        lower.step("add", y, tail.axis, {"a": plane, "b": residual}, act=act, b_positions=plane.positions, **sizes)
    return y


def matrix(plane: Plane) -> Live:
    """A plane as a matrix (channels, positions)."""
    shape, strides = (plane.channels, plane.positions), (plane.ld, 1)
    return Live(plane.buffer, plane.buffer.whole.as_strided(shape, strides, plane.offset))


@rule(aten.conv2d)
def conv2d(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """A dense convolution with known weights: a product, depthwise, or by strips."""
    defaults: list[Any] = [None, None, None, [1, 1], [0, 0], [1, 1], 1]
    x, weight, bias, stride, padding, dilation, groups = given(lower, node, defaults)
    made = shape_of(node)
    if not isinstance(weight, Tensor) or made is None or len(made) != 4 or len(x.shape) != 4:
        return None
    kernel, stride, dilation = list(weight.shape[2:]), pair(stride), pair(dilation)
    if isinstance(padding, str):
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if padding == "same" else [0, 0]
    padding, tail = _before(node, pair(padding)), with_bias(tail, bias)
    if kernel == [1, 1] and groups == 1 and not any(padding):
        x = x if stride == [1, 1] else subsample(lower, x, made, stride)
        return product(lower, node, tail, x, 1, weight)
    sizes = window(x, made, kernel, stride, padding, dilation)
    if groups == x.shape[1]:
        fields = {"weight": lower.weights.dense(weight, tail.scale), **ends(lower, tail)}
        del fields["scale"]
        return picture(lower, "depthwise", node, tail, x, {**fields, **sizes})
    if math.prod(kernel) > LARGEST:
        return None
    flat_OI = weight.movedim(1, -1).flatten(1)
    fields = {
        "weight": lower.weights.striped(flat_OI, math.prod(kernel), _places(made)),
        "groups": groups,
        **ends(lower, tail),
    }
    return picture(lower, "conv", node, tail, x, {**fields, **sizes})


@rule(sparse_conv)
def packed_conv(lower: Lowering, node: fx.Node, tail: Tail) -> Live:
    """A packed convolution, by its operator."""
    x, values, index, starts, bias, columns, strip, kernel, stride, padding, dilation, groups, *_ = map(
        lower.value, node.args
    )
    made, tail = shape_of(node), with_bias(tail, bias)
    assert made is not None
    strips = Striped(values, index, starts, columns, strip)
    weight = lower.weights.conv(strips, kernel, groups, _places(made), lower.weights.vector(tail.scale))
    sizes = window(x, made, kernel, stride, _before(node, pair(padding)), dilation)
    return picture(lower, "conv", node, tail, x, {"weight": weight, "groups": groups, **ends(lower, tail), **sizes})


def _before(node: fx.Node, padding: list[int]) -> list[int]:
    """Zeros above and to the left of a picture; those behind it follow from the size of the output."""
    return [own + more for own, more in zip(padding, node.meta.get(PADS, (0, 0)), strict=True)]


def _places(made: Sequence[int]) -> int:
    """Of all pictures (B, C, H, W)."""
    return made[0] * made[2] * made[3]


def window(x: Any, made: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    """The sizes of a convolution or of pooling."""
    names = ("batch", "channels", "height", "width")
    sizes: dict[str, Any] = dict(zip(names, x.shape, strict=True))
    sizes |= {"rows": made[1], "out_height": made[2], "out_width": made[3]}
    sizes |= {"kernel": list(kernel), "stride": list(stride), "pad": list(padding), "dilation": list(dilation)}
    return sizes


def picture(lower: Lowering, kind: str, node: fx.Node, tail: Tail, x: Any, fields: dict[str, Any]) -> Live:
    """A convolution of x (B, C, H, W)."""
    others, x_plane = beside(lower, tail), lower.plane(x, 1)
    y = lower.new(end_of(node, tail), tail.axis)
    if kind == "conv":
        after = fields["out_height"] * fields["out_width"]
        fields |= {"x_batch": fields["height"] * fields["width"], "y_batch": after, "residual_batch": after}
    return lower.step(kind, y, tail.axis, {"x": x_plane, **others}, **fields)


def subsample(lower: Lowering, x: Any, made: tuple[int, ...], stride: list[int]) -> Live:
    """The places of a picture that a stride meets: the largest of each window of one."""
    sizes = window(x, made, [1, 1], stride, [0, 0], [1, 1])
    del sizes["rows"]
    y = lower.new((*x.shape[:2], *made[2:]), 1)
    return lower.step("pool", y, 1, {"x": lower.plane(x, 1)}, act="none", mean=0, count_pad=0, **sizes)


@rule(*NORMS)
def norm(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """A norm by known numbers: a depthwise convolution of one place."""
    shape = shape_of(node)
    if tail.scale is None or shape is None or len(shape) < 2 or tail.axis != 1:
        return None
    others, x = beside(lower, tail), lower.plane(lower.value(node.args[0]), 1)
    y = lower.new(end_of(node, tail), tail.axis)
    one: dict[str, Any] = dict.fromkeys(("batch", "height", "out_height"), 1)
    one |= {"kernel": [1, 1], "stride": [1, 1], "pad": [0, 0], "dilation": [1, 1]}
    one |= dict.fromkeys(("channels", "rows"), x.channels) | dict.fromkeys(("width", "out_width"), x.positions)
    fields = {"weight": lower.weights.vector(tail.scale), **ends(lower, tail)}
    del fields["scale"]
    return lower.step("depthwise", y, tail.axis, {"x": x, **others}, **fields, **one)
