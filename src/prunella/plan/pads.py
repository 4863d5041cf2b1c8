"""Zeros around pictures that a node of its own puts there, as networks from TensorFlow do: the convolution after it
finds them outside of the picture."""

from __future__ import annotations

import math

from torch import Tensor, fx

from ..sparse.striped import LARGEST, sparse_conv
from .nodes import aten, packet, shape_of

PADS = "pads"  # in the meta of a convolution: zeros above and to the left of its input, beside its own


def join_pads(graph: fx.Graph) -> None:
    """Let convolutions read what was there before zeros were put around it."""
    for node in list(graph.nodes):
        pads = _pads(node)
        if pads is None or not node.users or not all(_takes(user, node) for user in node.users):
            continue
        for user in list(node.users):
            user.replace_input_with(node, node.args[0])
            user.meta[PADS] = pads
    graph.eliminate_dead_code()


def _pads(node: fx.Node) -> tuple[int, int] | None:
    """(above, left) of a node that puts zeros around the pictures of a batch."""
    if packet(node) not in (aten.pad, aten.constant_pad_nd) or len(shape_of(node) or ()) != 4:
        return None
    x, sizes, *rest = node.args
    mode = rest[0] if packet(node) is aten.pad and rest else "constant"
    value = (rest[1:] if packet(node) is aten.pad else rest) or [0]
    if mode != "constant" or value[0] not in (None, 0) or not isinstance(x, fx.Node) or len(sizes) != 4:  # type: ignore[arg-type]
        return None
    left, _, above, _ = sizes  # type: ignore[misc,str-unpack]
    return (above, left) if min(sizes) >= 0 else None  # type: ignore[type-var,arg-type,return-value]


def _takes(node: fx.Node, pad: fx.Node) -> bool:
    """Is it a convolution that there is surely a step for, and is the padded picture its input alone?"""
    if node.args[0] is not pad or pad in (*node.args[1:], *node.kwargs.values()) or PADS in node.meta:
        return False
    if packet(node) is sparse_conv:
        return True
    if packet(node) is not aten.conv2d or not isinstance(node.args[1], fx.Node):
        return False
    weight = node.args[1].meta.get("val")
    padding = node.args[4] if len(node.args) > 4 else [0, 0]
    places = math.prod(weight.shape[2:]) if isinstance(weight, Tensor) else 0
    return node.args[1].op == "placeholder" and not isinstance(padding, str) and 1 < places <= LARGEST
