"""What a node of a graph is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..compat import schema_of

aten = torch.ops.aten


def packet(node: fx.Node) -> Any:
    """The operator of a node, whichever of its forms is called: `torch.ops.aten.add` for `add.Tensor`."""
    return getattr(node.target, "overloadpacket", node.target)


def is_view(node: fx.Node) -> bool:
    """Does the operator give a view of its first argument?"""
    schema = schema_of(node.target)
    return schema is not None and any(
        argument.alias_info is not None and not argument.alias_info.is_write for argument in schema.arguments
    )


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of what a node puts out, if that is a tensor."""
    made = node.meta.get("val")
    if isinstance(made, list | tuple) and made and packet(node) is aten._native_batch_norm_legit_no_training:
        made = made[0]
    return tuple(map(int, made.shape)) if isinstance(made, Tensor) else None


def floats(node: fx.Node) -> bool:
    """Does a node put out a floating-point tensor?"""
    made = node.meta.get("val")
    return isinstance(made, Tensor) and made.is_floating_point()
