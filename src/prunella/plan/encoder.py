"""Steps of encoders: norms over the channels of each position, and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .lower import VALUES, Lowering, Torch, rule
from .nodes import aten, packet
from .products import end_of, given
from .tails import Tail
from .values import Buffer, Live, Loose, Plane, plane_of


@rule(aten.layer_norm, aten.rms_norm)
def norm(lower: Lowering, node: fx.Node, tail: Tail) -> Live | None:
    """Over the last axis."""
    rms = packet(node) is aten.rms_norm
    args = given(lower, node, [None] * 5)
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
    """softmax(scale q k^T + mask) v of q (B, H, Tq, D), k and v (B, Hkv, Tk, D), without dropout."""
    q, k, v, mask, dropout, causal = given(lower, node, [None, None, None, None, 0.0, False])
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
            fields |= {"mask": found, "mask_stride": _strides(found.transpose(2, 3))}
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
        made = added(mask, keep).view(*[1] * (4 - rank), *keep)
        return made.transpose(2, 3).contiguous() if bool(made.any()) else None
    if (known := lower.masks.get(mask)) is not None:
        return known
    sizes = (*[1] * (4 - rank), *keep)
    buffer = Buffer(max(16, sizes[0] * sizes[1] * sizes[2] * sizes[3]) + 64)
    whole = buffer.whole[: sizes[0] * sizes[1] * sizes[2] * sizes[3]]
    live = Live(buffer, whole.view(sizes[0], sizes[1], sizes[3], sizes[2]).transpose(2, 3))
    lower.act(Torch(added, (mask, keep), {}, live))
    lower.masks[mask] = live
    return live


def _constant(mask: Any) -> set[int]:
    return {
        axis for axis, size in enumerate(mask.shape) if size > 1 and isinstance(mask, Tensor) and not mask.stride(axis)
    }


def added(mask: Tensor, keep: tuple[int, ...]) -> Tensor:
    """A mask (…, queries, keys) as numbers to add, with `keep` entries along each axis. True: is seen."""
    for axis, size in enumerate(keep):
        mask = mask.narrow(axis, 0, size)
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.float()


def _strides(mask: Tensor) -> list[int]:
    """Of batch, head, query and key; 0 where there is one for all."""
    return [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
