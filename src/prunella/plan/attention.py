"""Attention that is written out as products: found in a graph and made one node."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .nodes import aten, packet, shape_of

MATMULS = {aten.matmul, aten.bmm}


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
            joined = graph.call_function(aten.scaled_dot_product_attention.default, (q, turned, node.args[1]), options)
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
