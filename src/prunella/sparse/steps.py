"""The structures of csrc/steps.h, field by field, and one call that runs a list of them.

    step("norm", x=(address, ld), y=(address, ld), weight=weight, channels=384, positions=128, eps=1e-12)

A value is the address of its first float and `ld`, the floats from a channel to the next; a weight is a tensor; fields
that are not named are 0 or NULL. What each step does stands in steps.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import library, succeed

ACTS = (
    "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish", "hardsigmoid", "tanh",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tensors that are packed and unpacked

_LONG, _POINTER, _DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_PAIR, _FOUR = _LONG * 2, _LONG * 4

# Of each kind, in the order of their numbers: its fields. `*x` is a value, x and x_ld; `&w` an address; `2n` two
# numbers, `4n` four; `.n` a double; all others are numbers.
_FIELDS = {
    "product": "&weight &scale &bias *x *y *residual residual_last act positions",
    "conv": "&weight &scale &bias *x *y *residual residual_last x_batch y_batch residual_batch act batch channels"
    " height width rows out_height out_width 2kernel 2stride 2pad 2dilation groups",
    "depthwise": "&weight &bias *x *y *residual residual_last act batch channels height width rows out_height"
    " out_width 2kernel 2stride 2pad 2dilation",
    "pool": "*x *y act batch channels height width out_height out_width 2kernel 2stride 2pad 2dilation mean count_pad",
    "mean": "*x *y act batch channels places",
    "scale": "*x *scale *y act batch channels places",
    "add": "*a *b *y act channels positions b_positions times",
    "map": "*x *y act channels positions",
    "norm": "*x *residual &weight &bias *y channels positions rms .eps",
    "attend": "*q *k *v *y &mask 4mask_stride batch heads kv_heads dim dim_v queries keys causal mask_boolean"
    " empty_nan .scale",
    "pack": "&x x_stride dtype *y channels positions",
    "unpack": "*x &y y_stride dtype channels positions",
}


class Step(ctypes.Structure):
    """One step. `held` keeps the memory of its weights."""

    held: tuple[Any, ...] = ()


def _structure(kind: str, number: int) -> type[Step]:
    fields: list[tuple[str, Any]] = [("kind", _LONG)]
    for word in _FIELDS[kind].split():
        mark, name = (word[0], word[1:]) if word[0] in "*&24." else ("", word)
        if mark == "*":
            fields += [(name, _POINTER), (f"{name}_ld", _LONG)]
        else:
            fields.append((name, {"&": _POINTER, "2": _PAIR, "4": _FOUR, ".": _DOUBLE}.get(mark, _LONG)))
    return type(kind, (Step,), {"_fields_": fields, "number": number})


STRUCTURES: dict[str, type[Step]] = {kind: _structure(kind, number) for number, kind in enumerate(_FIELDS)}


def step(kind: str, **fields: Any) -> Step:
    """A step of this kind.

    Args:
        fields: by name. Of a value (address, ld); of a weight a tensor, which is contiguous, or an address; of `act`
            its name, of `dtype` torch's, or a number; of several numbers a sequence.
    Raises ValueError if sizes do not go together.
    """
    made = STRUCTURES[kind]()
    made.kind = made.number  # type: ignore[attr-defined]
    held = []
    for name, value in fields.items():
        if name == "act" and isinstance(value, str):
            value = ACTS.index(value)
        elif isinstance(value, torch.dtype):
            value = DTYPES.index(value)
        elif isinstance(value, Tensor):
            if not value.is_contiguous():
                raise ValueError(f"{kind}: {name} is not contiguous")
            held.append(value)
            value = value.data_ptr()
        elif isinstance(value, tuple) and hasattr(made, f"{name}_ld"):
            value, ld = value
            setattr(made, f"{name}_ld", ld)
        elif isinstance(value, Sequence):
            value = type(getattr(made, name))(*value)
        setattr(made, name, value)
    made.held = tuple(held)
    _check(kind, made, {name: value for name, value in fields.items() if isinstance(value, Tensor)})
    return made


def run(steps: Sequence[Step], threads: int | None = None) -> None:
    """These steps, one after the other. Raises MemoryError."""
    Run(steps)(threads)


class Run:
    """Steps as one call takes them."""

    def __init__(self, steps: Sequence[Step]):
        kernels = library()
        assert kernels is not None
        self.call = kernels.prunella_plan
        self.call.argtypes = (_POINTER, _LONG, ctypes.c_int)
        self.steps = list(steps)
        self.pointers = (_POINTER * len(self.steps))(*[ctypes.addressof(one) for one in self.steps])

    def __call__(self, threads: int | None = None) -> None:
        succeed(self.call(self.pointers, len(self.steps), threads or torch.get_num_threads()))


# ---------------------------------------------------------------------------------------------------------
# Sizes that do not go together would be read or written beyond the end of memory.

_POSITIONS: dict[str, dict[str, Callable[[Any], int]]] = {
    "conv": {"x": lambda s: s.height * s.width, "y": lambda s: s.out_height * s.out_width},  # of a picture
    "pool": {"x": lambda s: s.batch * s.height * s.width, "y": lambda s: s.batch * s.out_height * s.out_width},
    "mean": {"x": lambda s: s.batch * s.places, "y": lambda s: s.batch},
    "scale": {"x": lambda s: s.batch * s.places, "y": lambda s: s.batch * s.places, "scale": lambda s: s.batch},
    "add": {"b": lambda s: s.b_positions},
    "attend": {
        "q": lambda s: s.batch * s.queries,
        "y": lambda s: s.batch * s.queries,
        "k": lambda s: s.batch * s.keys,
        "v": lambda s: s.batch * s.keys,
    },
}
_POSITIONS["depthwise"] = _POSITIONS["pool"]


def _check(kind: str, made: Any, weights: dict[str, Tensor]) -> None:
    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{kind}: {what}")

    sizes = {"batch", "channels", "height", "width", "rows", "out_height", "out_width", "places", "positions"}
    sizes |= {"b_positions", "heads", "kv_heads", "dim", "dim_v", "queries", "keys"}
    for name, _ in made._fields_:
        demand(name not in sizes or getattr(made, name) > 0, f"{name} is {getattr(made, name)}")
        if f"{name}_ld" in dict(made._fields_) and getattr(made, name):
            positions = (
                _POSITIONS.get(kind, {}).get(name) or _POSITIONS.get(kind, {}).get("y") or (lambda s: s.positions)
            )
            least = positions(made) if kind == "conv" else -(-positions(made) // 16) * 16  # which writes no further
            demand(getattr(made, f"{name}_ld") >= least, f"{name} has too small an ld")
    demand(0 <= getattr(made, "act", 0) < len(ACTS), "no such activation")
    if kind in ("conv", "depthwise", "pool"):
        for axis, (size, out) in enumerate(((made.height, made.out_height), (made.width, made.out_width))):
            demand(min(made.kernel[axis], made.stride[axis], made.dilation[axis]) > 0, "a window of no size")
            demand(made.pad[axis] >= 0, "padding below 0")
            begin = (out - 1) * made.stride[axis] - made.pad[axis]
            beyond = made.kernel[axis] * made.dilation[axis]  # a product beyond the picture is one with zeros
            demand(kind == "conv" or begin < size + beyond, "an output larger than its input")
    if kind == "depthwise":
        demand(made.rows % made.channels == 0, "filters that are no multiple of the channels")
        places = made.rows * made.kernel[0] * made.kernel[1]
        demand("weight" not in weights or weights["weight"].numel() == places, "a weight of another size")
        demand("bias" not in weights or weights["bias"].numel() == made.rows, "a bias of another size")
    if kind == "norm":
        demand(all(w.numel() == made.channels for w in weights.values()), "a weight of another size")
    if kind == "add":
        demand(made.positions % made.b_positions == 0, "positions that do not repeat")
    if kind == "attend":
        demand(made.heads % made.kv_heads == 0, "heads that cannot share those of the keys")
    if kind in ("pack", "unpack"):
        demand(0 <= made.dtype < len(DTYPES), "no such dtype")
        demand(getattr(made, "x_stride" if kind == "pack" else "y_stride") >= made.channels, "positions that overlap")
