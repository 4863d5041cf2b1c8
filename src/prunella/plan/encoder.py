"""Steps of encoders: norms over the channels of each position, and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .graph import aten, packet
from .lower import VALUES, Lowering, Torch, rule
from .products import end_of
from .tails import Tail, shape_of
from .values import Buffer, Live, Loose, Plane, plane_of

MATMULS = {aten.matmul, aten.bmm}


@rule(aten.layer_norm, aten.rms_norm)
def norm(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """Over the last axis."""
    rms = packet(node) is aten.rms_norm
    args = [*map(lower.value, node.args), *[None, None, None, None, None][len(node.args) :]]
    x, over, weight = args[:3]
    bias, eps = (None, args[3]) if rms else (args[3], 1e-5 if args[4] is None else args[4])
    if (
        not isinstance(x, VALUES)
        or len(over) != 1
        or not all(one is None or isinstance(one, Tensor) for one in (weight, bias))
        or len(x.shape) < 2
    ):
        return None
    plane, axis = lower.plane(x, -1), len(x.shape) - 1
    fields = {"weight": lower.weights.vector(weight), "bias": lower.weights.vector(bias), "rms": int(rms)}
    fields["eps"] = torch.finfo(torch.float32).eps if eps is None else float(eps)
    y = lower.new(end_of(node, tail), axis)
    return lower.step("norm", y, axis, {"x": plane}, channels=plane.channels, positions=plane.positions, **fields)


@rule(aten.scaled_dot_product_attention)
def attention(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    q, k, v, mask, dropout, causal = [*map(lower.value, node.args), *[None, 0.0, False][len(node.args) - 3 :]]
    options = {name: lower.value(value) for name, value in node.kwargs.items()}
    mask, dropout = options.pop("attn_mask", mask), options.pop("dropout_p", dropout)
    causal, scale = options.pop("is_causal", causal), options.pop("scale", None)
    grouped = options.pop("enable_gqa", False)
    shapes = [tuple(one.shape) for one in (q, k, v)]
    if options or dropout or any(len(shape) != 4 for shape in shapes) or not isinstance(q, VALUES):
        return None
    (batch, heads, queries, dim), (_, kv_heads, keys, _), (*_, dim_v) = shapes
    if shapes[1] != (batch, kv_heads, keys, dim) or shapes[2] != (batch, kv_heads, keys, dim_v):
        return None
    if (heads != kv_heads and not grouped) or heads % kv_heads or min(batch, keys, queries, dim, dim_v) < 1:
        return None
    planes = {name: _heads(lower, one) for name, one in (("q", q), ("k", k), ("v", v))}
    fields: dict[str, Any] = {"mask": None, "mask_stride": [0, 0, 0, 0]}
    if mask is not None:
        found = _mask(lower, mask, (batch, heads, queries, keys))
        if isinstance(found, Live):
            planes["mask"] = Plane(found.buffer, 0, 0, 0, 0)
            del fields["mask"]
            fields["mask_stride"] = _strides(found.meta)
        elif found is not None:
            fields |= {"mask": found, "mask_stride": _strides(found)}
    wide = lower.new((batch, queries, heads * dim_v), 2)
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "dim": dim, "dim_v": dim_v}
    sizes |= {"queries": queries, "keys": keys, "causal": int(causal)}
    scale = dim**-0.5 if scale is None else float(scale)
    lower.step("attend", wide, 2, dict(planes), scale=scale, **fields, **sizes)
    return Live(wide.buffer, wide.meta.view(batch, queries, heads, dim_v).transpose(1, 2))


def _heads(lower: Lowering, value: Any) -> Plane:
    """(batch, heads, tokens, dim) as heads * dim channels."""
    batch, heads, tokens, dim = value.shape
    if isinstance(value, Live):
        try:
            flat = value.meta.permute(1, 3, 0, 2).view(heads * dim, batch * tokens)
            found = plane_of(Live(value.buffer, flat), 0)
        except RuntimeError:
            found = None
        if found is not None:
            return found
    wide = lower.new((batch, tokens, heads * dim), 2)
    target = wide.meta.view(batch, tokens, heads, dim).transpose(1, 2)
    lower.act(Torch(_float, (value,), {}, Live(wide.buffer, target)))
    found = plane_of(wide, 2)
    assert found is not None
    return found


def _float(x: Tensor) -> Tensor:
    return x


def _mask(lower: Lowering, mask: Any, shape: tuple[int, ...]) -> Tensor | Live | None:
    """What is added to the scores, with one entry along axes where all are the same; its queries follow one another.
    None: it hides nothing."""
    rank = len(mask.shape)
    alike = mask.alike if isinstance(mask, Loose) else _constant(mask)
    keep = tuple(1 if axis in alike else size for axis, size in enumerate(mask.shape))
    if isinstance(mask, Tensor):
        made = added(mask, keep)
        return None if not bool(made.any()) else made.transpose(-1, -2).contiguous().transpose(-1, -2)
    sizes = (*[1] * (4 - rank), *keep)
    buffer = Buffer(max(16, sizes[0] * sizes[1] * sizes[2] * sizes[3]) + 64)
    whole = buffer.whole[: sizes[0] * sizes[1] * sizes[2] * sizes[3]]
    live = Live(buffer, whole.view(sizes[0], sizes[1], sizes[3], sizes[2]).transpose(2, 3))
    lower.act(Torch(added, (mask, keep), {}, live))
    return live


def _constant(mask: Any) -> set[int]:
    return {axis for axis, size in enumerate(mask.shape) if size > 1 and isinstance(mask, Tensor) and not mask.stride(axis)}


def added(mask: Tensor, keep: tuple[int, ...]) -> Tensor:
    """A mask (…, queries, keys) as numbers to add, with `keep` entries along each axis. True: is seen."""
    for axis, size in enumerate(keep):
        mask = mask.narrow(axis, 0, size)
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.float()


def _strides(mask: Tensor) -> list[int]:
    """Of batch, head, query and key; 0 where there is one for all."""
    found = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return [0] * (4 - len(found)) + found


# ---------------------------------------------------------------------------------------------------------
# Attention that is written out


def join_attention(graph: fx.Graph) -> None:
    """softmax(q k^T scale + mask) v, written as products, becomes one node."""
    for node in list(graph.nodes):
        if packet(node) not in MATMULS or not isinstance(node.args[0], fx.Node):
            continue
        scores = node.args[0]
        if packet(scores) not in (aten.softmax, aten._softmax) or not _only(scores, node):
            continue
        parts = _scores(scores)
        if parts is None:
            continue
        q, k, mask, scale = parts
        shape = shape_of(node)
        if shape is None or len(shape) != 4 or not isinstance(node.args[1], fx.Node):
            continue
        with graph.inserting_before(node):
            turned = graph.call_function(aten.transpose.int, (k, -2, -1))
            turned.meta["val"] = k.meta["val"].transpose(-2, -1)
            options = {"attn_mask": mask, "scale": scale}
            joined = graph.call_function(
                aten.scaled_dot_product_attention.default, (q, turned, node.args[1]), options
            )
            joined.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(joined)
    graph.eliminate_dead_code()


def _only(node: fx.Node, user: fx.Node) -> bool:
    return set(node.users) == {user}


def _scores(softmax: fx.Node) -> tuple[fx.Node, fx.Node, Any, float] | None:
    """(q, k^T, mask, scale) of a softmax over the last axis."""
    at, axis = softmax.args[:2]
    shape = shape_of(softmax)
    if shape is None or len(shape) != 4 or axis not in (-1, 3) or not isinstance(at, fx.Node) or not _only(at, softmax):
        return None
    mask, scale = None, 1.0
    if packet(at) is aten.add and len(at.args) == 2 and not at.kwargs:
        sides = [one for one in at.args if isinstance(one, fx.Node)]
        before = [one for one in sides if _only(one, at) and shape_of(one) == shape and _leads_to_product(one)]
        if len(sides) != 2 or not before:
            return None
        mask = sides[1] if before[0] is sides[0] else sides[0]
        at = before[0]
        given = mask.meta.get("val")
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return None
    if packet(at) in (aten.mul, aten.div) and isinstance(at.args[1], int | float) and isinstance(at.args[0], fx.Node):
        factor = float(at.args[1])
        scale = factor if packet(at) is aten.mul else 1 / factor
        if not _only(at.args[0], at):
            return None
        at = at.args[0]
    if packet(at) not in MATMULS or not all(isinstance(one, fx.Node) for one in at.args):
        return None
    q, k = at.args
    if len(shape_of(q) or ()) != 4 or len(shape_of(k) or ()) != 4:  # type: ignore[arg-type]
        return None
    return q, k, mask, scale  # type: ignore[return-value]


def _leads_to_product(node: fx.Node) -> bool:
    if packet(node) in (aten.mul, aten.div) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return packet(node) in MATMULS
