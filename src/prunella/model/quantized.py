"""Weights that another tool has quantized: FP8 with scales is read, the rest is known by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError

READ = ("fp8", "fbgemm_fp8", "compressed-tensors")  # methods of config.json whose floating-point weights can be read
SCALES = ("_scale_inv", "_scale")  # what follows the name of an FP8 weight: its values are multiplied by this
_OF_INPUTS = ("input_scale", "activation_scale", "input_activation_scale", "input_scale_ub")  # beside such a weight
_PARTS = {  # tensors that stand where a plain checkpoint has `weight`
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "bitmask": "compressed-tensors",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
}


def foreign(names: Collection[str]) -> str | None:
    """The kind of quantization that the names of tensors give away; None if they give away none."""
    return next((_PARTS[part] for name in names if (part := name.rpartition(".")[2]) in _PARTS), None)


def find_scales(codes: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """Given {tensor: dtype code}: {FP8 weight: its scale}, and the names of all tensors that only serve such weights
    (their scales, and the scales of their inputs)."""
    scales: dict[str, str] = {}
    beside: set[str] = set()
    for name, code in codes.items():
        if not code.startswith("F8_E") or code == "F8_E8M0" or name.endswith(SCALES):
            continue
        scale = next((name + s for s in SCALES if codes.get(name + s, "")[:2] in ("F3", "BF", "F1", "F8")), None)
        if scale is None:
            continue
        scales[name] = scale
        module = name.rpartition(".")[0]
        beside |= {scale, *(key for part in _OF_INPUTS if (key := f"{module}.{part}") in codes)}
    return scales, beside


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor | None:
    """An FP8 weight (…, O, I) times its scale, in bfloat16: one number, one to a row (O, 1), or one to each block of
    (`block`, or what the shapes show: 128, or equal parts). None where the shapes do not fit."""
    s = scale.float()
    if s.numel() == 1:
        return (weight.float() * s.reshape(())).to(torch.bfloat16)
    if s.ndim == 1:
        s = s[:, None]
    if weight.ndim < 2 or s.shape[:-2] != weight.shape[:-2]:
        return None
    for axis in (-2, -1):
        size, count = weight.shape[axis], s.shape[axis]
        wide = (block[axis] if block else 128, 128, -(-size // count))
        width = next((w for w in wide if -(-size // w) == count), None) if count > 1 else size
        if width is None:
            return None
        s = s.repeat_interleave(width, axis).narrow(axis, 0, size)
    return (weight.float() * s).to(torch.bfloat16)


class Scaled:
    """A lazy FP8 tensor that is dequantized when it is read, as a slice of a safetensors file is."""

    def __init__(self, name: str, weight: Any, scale: Any, block: tuple[int, int] | None):
        self.name, self.weight, self.scale, self.block = name, weight, scale, block

    def __getitem__(self, index: Any) -> Tensor:
        weight, scale = self.weight[...], self.scale[...]
        values = dequantize(weight, scale, self.block)
        if values is None:
            raise ModelError(
                f"the scale of '{self.name}' has shape {tuple(scale.shape)}, which fits no blocks of"
                f" {tuple(weight.shape)}."
            )
        return values[index]
