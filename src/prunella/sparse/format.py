"""One packed weight: the kept values row by row, a bit for each place, and where each row begins. And one that is
rounded to 8 bits, nothing left out.

docs/format.md specifies the layout. Shapes: O outputs, I inputs, W words of 64 weights in a row, G scales in a row,
K kept values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError, ModelError
from ..grid import Grid, fit

VERSION = 1
PAD = 128  # zeros after the last value, so that a kernel may always read a whole vector
SPAN = 128  # the groups of inputs with a scale of their own are multiples of this
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MARK = (0,)  # the shape of a tensor that says that a model is packed
ORDER = (
    "order"  # in the metadata of the last file: the names of the plain model's tensors, in the order of its one file
)
PARTS = ("weight_mask", "weight_offsets", "weight_values", "weight_scales")


@dataclass(frozen=True)
class Packed:
    """A pruned weight (O, I).

    mask:    uint8 (O, 8 W): bit i % 8 of byte i // 8 says whether weight i of the row is kept
    offsets: int32 (O + 1): where each row begins in the values; the last is K
    values:  K values and PAD zeros: a floating-point dtype, int8, or uint8 with two 4-bit values a byte
    scales:  bfloat16 (O, G) for integer values, else None
    columns: I
    group:   inputs to a scale, a multiple of SPAN; 0: one scale to a row
    """

    mask: Tensor
    offsets: Tensor
    values: Tensor
    scales: Tensor | None
    columns: int
    group: int = 0

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def bits(self) -> int | None:
        return {torch.int8: 8, torch.uint8: 4}.get(self.values.dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by the ends of their names."""
        tensors = zip(PARTS, (self.mask, self.offsets, self.values, self.scales), strict=True)
        return {name: tensor for name, tensor in tensors if tensor is not None}


@dataclass(frozen=True)
class Rounded:
    """A weight (O, I) of which nothing is left out, in 8 bits.

    values: int8 (O, I)
    scales: bfloat16 (O, G)
    group:  inputs to a scale, a multiple of SPAN; 0: one scale to a row
    """

    values: Tensor
    scales: Tensor
    group: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by the ends of their names."""
        return {"weight_values": self.values, "weight_scales": self.scales}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        return (self.values * Grid(8, self.group, self.scales).spread(self.values.shape[1])).to(dtype)


def round_weight(weight_OI: Tensor, group: int = SPAN) -> Rounded:
    """Round a weight to 8 bits, a scale for every `group` inputs of a row. Raises NumericalError if a weight is NaN or
    infinite."""
    step = max(1, (1 << 24) // max(1, weight_OI.shape[1]))  # rows at a time: all of a head in float32 would be much
    parts = []
    for tile_RI in torch.split(weight_OI, step):
        grid = fit(tile_RI, 8, group)
        parts.append((grid.codes(tile_RI).to(torch.int8), grid.scale_OG))
    values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(values.cpu(), scales.cpu(), grid.group)


def rounded_shapes(rows: int, columns: int, group: int) -> dict[str, tuple[int, int]]:
    """The shapes of the parts of a `Rounded` weight (rows, columns)."""
    return {"weight_values": (rows, columns), "weight_scales": (rows, groups(columns, group))}


def rounded_of_parts(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], group: int) -> Rounded:
    """A checked `Rounded` from its stored parts. Raises ModelError, naming the tensor."""
    group = group if group < shape[1] else 0
    dtypes = {"weight_values": torch.int8, "weight_scales": torch.bfloat16}
    for part, wanted in rounded_shapes(*shape, group).items():
        found = parts.get(part)
        if found is None or found.dtype != dtypes[part] or tuple(found.shape) != wanted:
            was = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
            raise ModelError(
                f"packed tensor '{name}.{part}' is {was}, but the model wants {dtypes[part]} of shape {wanted}. Pack"
                " the model again."
            )
    if not torch.isfinite(parts["weight_scales"]).all():
        raise ModelError(
            f"packed tensor '{name}.weight_scales' is damaged: a scale is NaN or infinite. Pack the model again."
        )
    return Rounded(parts["weight_values"], parts["weight_scales"], group)


def module_names(name: str, about: Mapping[str, Any]) -> list[str]:
    """The modules that an entry of quantization_config.modules stands for: itself, or a mixture's experts."""
    return [f"{name}.{e}" for e in range(about["experts"])] if "experts" in about else [name]


def parameter_name(name: str, about: Mapping[str, Any]) -> str:
    """The tensor that a plain model has in place of such an entry."""
    return name if "experts" in about else f"{name}.weight"


def as_parameter(weight_OI: Tensor, about: Mapping[str, Any]) -> Tensor:
    """A packed weight as the plain model's parameter: (I, O) where that is transposed, (O, C, k…) of a convolution,
    whose packed columns are the C channels of one place in its kernel after the other."""
    if "kernel" in about:
        return weight_OI.reshape(len(weight_OI), *about["kernel"], -1).movedim(-1, 1).contiguous()
    return weight_OI.T if about.get("transposed") else weight_OI


def layer_names(name: str, about: Mapping[str, Any]) -> list[str]:
    """The layers whose weights an entry holds, as masks and grids name them, in the order of their rows: one for each
    expert, and for each group of a convolution."""
    layer = about.get("layer", name)
    if "groups" in about:
        return [f"{layer}.weight.{g}" for g in range(about["groups"])]
    return [layer + module.removeprefix(name) for module in module_names(name, about)]


def words(columns: int) -> int:
    """64-bit words in a row of the mask."""
    return -(-columns // 64)


def groups(columns: int, group: int) -> int:
    """Scales to a row."""
    return -(-columns // group) if group else 1


def stored_bits(grid: Grid) -> int:
    """How wide the values of a grid are stored: 3 bits as 4."""
    return 8 if grid.bits == 8 else 4


def check_options(bits: int | None, group: int) -> None:
    """Raises InputError for what cannot be packed."""
    if bits not in (None, 8, 4):
        raise InputError(f"--bits {bits}: packed values have 8 or 4 bits, or without --bits the model's own dtype.")
    if group < 0 or group % SPAN:
        raise InputError(f"--group {group}: groups are multiples of {SPAN} inputs, or 0 for one scale a row.")


def pack(
    weight_OI: Tensor, mask_OI: Tensor, bits: int | None = None, group: int = SPAN, *, grid: Grid | None = None
) -> Packed:
    """Pack a weight whose entries outside of the mask are zero.

    Args:
        bits: None keeps the values as they are, and unpacking gives the same bytes; 8 or 4 rounds them to
            integers with a scale for every `group` inputs of a row (0: for a row).
        grid: what the values are multiples of already, in place of `bits` and `group`: unpacking gives the
            same bytes. 3 bits are stored as 4.
    Raises:
        InputError: `bits` or `group` cannot be packed.
        NumericalError: a value to round is NaN or infinite.
    """
    check_options(bits, group)
    rows, columns = weight_OI.shape
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = mask_OI.sum(1).cumsum(0)
    if offsets[-1] >= 1 << 31:
        raise InputError(
            f"a weight of {rows}x{columns} keeps {int(offsets[-1])} values: at most 2^31 - 1 can be packed."
        )
    mask = _as_bits(mask_OI)
    if grid is None and bits is not None:
        grid = fit(weight_OI * mask_OI, bits, group)
    values_K = weight_OI[mask_OI] if grid is None else grid.codes(weight_OI)[mask_OI].to(torch.int8)
    values = torch.cat([values_K.cpu(), torch.zeros(PAD, dtype=values_K.dtype)])
    if grid is not None and stored_bits(grid) == 4:
        values = torch.cat([values, torch.zeros(len(values) % 2, dtype=torch.int8)]).view(torch.uint8) & 15
        values = values[::2] | values[1::2] << 4
    scales, group = (None, 0) if grid is None else (grid.scale_OG.cpu(), grid.group)
    return Packed(mask, offsets.to(torch.int32), values, scales, columns, group)


def _as_bits(mask_OI: Tensor) -> Tensor:
    """A mask as bytes on the host, a row in whole words of 64 columns, the first in the lowest bit of the first."""
    rows, columns = mask_OI.shape
    width = words(columns) * 64
    if mask_OI.device.type == "cpu":
        padded_OI = np.zeros((rows, width), dtype=bool)
        padded_OI[:, :columns] = mask_OI.numpy()
        return torch.from_numpy(np.packbits(padded_OI, axis=1, bitorder="little"))
    worth = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask_OI.device)
    bytes_OB8 = functional.pad(mask_OI.contiguous().view(torch.uint8), (0, width - columns)).view(rows, -1, 8)
    return (bytes_OB8 * worth).sum(2, dtype=torch.uint8).cpu()


# ---------------------------------------------------------------------------------------------------------
# Back again, in plain torch: on any device, and where no kernels were compiled


def mask_of(mask: Tensor, columns: int) -> Tensor:
    """The mask as booleans (O, I)."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(2) >> bits & 1).view(len(mask), -1)[:, :columns].bool()


def unpack(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I), zeros where the mask has none; integer values times their scales in `dtype`."""
    mask_OI = mask_of(packed.mask, packed.columns)
    values = packed.values
    count = len(values) - PAD if packed.bits != 4 else int(packed.offsets[-1])  # no number is read where shapes say it
    if packed.bits == 4:
        nibbles = torch.stack((values & 15, values >> 4), 1).flatten()
        values = (nibbles ^ 8).to(torch.int8) - 8
    kept_K = values[:count]
    if packed.scales is None:
        weight_OI = torch.zeros(mask_OI.shape, dtype=kept_K.dtype, device=kept_K.device)
        weight_OI[mask_OI] = kept_K
        return weight_OI if dtype is None else weight_OI.to(dtype)
    weight_OI = torch.zeros(mask_OI.shape, device=kept_K.device)
    weight_OI[mask_OI] = kept_K.float()
    weight_OI *= Grid(packed.bits or 0, packed.group, packed.scales).spread(packed.columns)
    return weight_OI.to(dtype or torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------
# What every packed tensor must pass before it is used


def expected(rows: int, columns: int, count: int, bits: int | None, group: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the parts of a weight (rows, columns) with `count` values kept."""
    length = count + PAD if bits != 4 else -(-(count + PAD) // 2)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_mask": (rows, words(columns) * 8),
        "weight_offsets": (rows + 1,),
        "weight_values": (length,),
    }
    return shapes if bits is None else {**shapes, "weight_scales": (rows, groups(columns, group))}


def check(name: str, packed: Packed) -> None:
    """Raises ModelError, naming the tensor, where the parts of a packed weight do not fit together."""

    def refuse(part: str, reason: str) -> None:
        raise ModelError(f"packed tensor '{name}.{part}' is damaged: {reason}. Pack the model again.")

    rows, columns = packed.rows, packed.columns
    offsets = packed.offsets.cpu().numpy().astype(np.int64)
    count = int(offsets[-1])
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        refuse("weight_offsets", "the beginnings of its rows are out of order")
    if np.diff(offsets).max(initial=0) > columns:
        refuse("weight_offsets", f"a row of {columns} weights cannot hold {np.diff(offsets).max()} values")
    for part, shape in expected(rows, columns, count, packed.bits, packed.group).items():
        found = packed.parts().get(part)
        if found is None or tuple(found.shape) != shape:
            was = "missing" if found is None else f"{tuple(found.shape)}"
            refuse(part, f"its shape is {was}, but the other parts want {shape}")
    kept_O = np.bitwise_count(packed.mask.cpu().numpy().view(np.uint64)).sum(1, dtype=np.int64)
    if (kept_O != np.diff(offsets)).any():
        row = int(np.argmax(kept_O != np.diff(offsets)))
        refuse(
            "weight_mask",
            f"row {row} keeps {kept_O[row]} weights by its mask and {np.diff(offsets)[row]} by its offsets",
        )
    tail = packed.mask[:, columns // 8 :].clone()
    tail[:, :1] >>= columns % 8
    if tail.any():
        refuse("weight_mask", f"it keeps weights beyond the last of {columns} columns")
    values = packed.values.view(torch.uint8)
    used = count * packed.values.element_size() if packed.bits != 4 else -(-count // 2)
    if values[used:].any() or (packed.bits == 4 and count % 2 and int(values[used - 1]) >> 4):
        refuse("weight_values", "there is something in the padding after the last value")
    if packed.scales is not None and not torch.isfinite(packed.scales).all():
        refuse("weight_scales", "a scale is NaN or infinite")


def of_parts(name: str, parts: Mapping[str, Tensor], columns: int, group: int) -> Packed:
    """A checked `Packed` from its stored parts. Raises ModelError."""
    dtypes: dict[str, tuple[torch.dtype, ...]] = {
        "weight_mask": (torch.uint8,),
        "weight_offsets": (torch.int32,),
        "weight_values": (*FLOATS, torch.int8, torch.uint8),
        "weight_scales": (torch.bfloat16,),
    }
    ranks = {"weight_mask": 2, "weight_offsets": 1, "weight_values": 1, "weight_scales": 2}
    for part in PARTS[:3]:
        if part not in parts:
            raise ModelError(f"packed tensor '{name}.{part}' is missing.")
    for part, tensor in parts.items():
        if tensor.dtype not in dtypes[part] or tensor.ndim != ranks[part] or not tensor.numel():
            raise ModelError(
                f"packed tensor '{name}.{part}' is damaged: {tensor.dtype} of shape {tuple(tensor.shape)} cannot be"
                " that part of a packed weight. Pack the model again."
            )
    scales = parts.get("weight_scales")
    if (scales is not None) != (parts["weight_values"].dtype in (torch.int8, torch.uint8)):
        raise ModelError(f"packed tensor '{name}' has scales without integer values, or the reverse.")
    packed = Packed(
        parts["weight_mask"],
        parts["weight_offsets"],
        parts["weight_values"],
        scales,
        columns,
        group if scales is not None and group < columns else 0,
    )
    check(name, packed)
    return packed
