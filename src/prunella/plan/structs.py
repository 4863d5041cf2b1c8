"""The steps of csrc/steps.h as ctypes structures, field by field."""

from __future__ import annotations

import ctypes
from typing import Any

LONG, POINTER, DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
ACTS = ("none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish", "hardsigmoid", "tanh")
_WINDOW = ("kernel:2", "stride:2", "pad:2", "dilation:2")
_Y = ("*y", "y_ld")
_RESIDUAL = ("*residual", "residual_ld", "residual_last")
_PICTURE = ("act", "batch", "channels", "height", "width", "rows", "out_height", "out_width")
_FIELDS: dict[str, tuple[str, ...]] = {
    "product": ("*weight", "*scale", "*bias", "*x", "x_ld", *_Y, *_RESIDUAL, "act", "positions"),
    "conv": (
        *("*weight", "*scale", "*bias", "*x", "x_ld", *_Y, *_RESIDUAL, "x_batch", "y_batch", "residual_batch", *_PICTURE),
        *(*_WINDOW, "groups"),
    ),
    "depthwise": ("*weight", "*bias", "*x", "x_ld", *_Y, *_RESIDUAL, *_PICTURE, *_WINDOW),
    "pool": (
        *("*x", "x_ld", *_Y, "act", "batch", "channels", "height", "width", "out_height", "out_width"),
        *(*_WINDOW, "mean", "count_pad"),
    ),
    "mean": ("*x", "x_ld", *_Y, "act", "batch", "channels", "places"),
    "scale": ("*x", "x_ld", "*scale", "scale_ld", *_Y, "act", "batch", "channels", "places"),
    "add": ("*a", "a_ld", "*b", "b_ld", *_Y, "act", "channels", "positions"),
    "map": ("*x", "x_ld", *_Y, "act", "channels", "positions"),
    "norm": ("*x", "x_ld", *_RESIDUAL[:2], "*weight", "*bias", *_Y, "channels", "positions", "rms", ".eps"),
    "attend": (
        *("*q", "q_ld", "*k", "k_ld", "*v", "v_ld", *_Y, "*mask", "mask_stride:4"),
        *("batch", "heads", "kv_heads", "dim", "dim_v", "queries", "keys", "causal", ".scale"),
    ),
    "pack": ("*x", "x_stride", "dtype", *_Y, "channels", "positions"),
    "unpack": ("*x", "x_ld", "*y", "y_stride", "dtype", "channels", "positions"),
}
KINDS = tuple(_FIELDS)


def _field(name: str) -> tuple[str, Any]:
    if name[0] == "*":
        return name[1:], POINTER
    if name[0] == ".":
        return name[1:], DOUBLE
    name, _, count = name.partition(":")
    return name, LONG * int(count) if count else LONG


def _structure(kind: str) -> type[ctypes.Structure]:
    fields = [("kind", LONG), *map(_field, _FIELDS[kind])]
    return type(f"{kind.capitalize()}Step", (ctypes.Structure,), {"_fields_": fields})


STRUCTURES = {kind: _structure(kind) for kind in KINDS}
