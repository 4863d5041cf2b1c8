"""Pruned weights made for many positions: products and convolutions where the work is arithmetic (csrc/striped.h).

    sparse_product  x W^T for many tokens
    sparse_conv     a convolution of pictures, of any kernel, stride, padding, dilation and groups

For a few tokens a weight is read once and memory is what counts (`kernels.sparse_linear`); for many each kept weight is
multiplied with all of them, and the processor's arithmetic is. Then columns are taken in strips whose inputs stay in
the first cache. A `Striped` weight lists the kept values as the packed one does, and where in its strip each stands in
one byte. Everything here is float32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ModelError
from .format import FLOATS, Packed, mask_of, unpack
from .kernels import check_floating, define, library
from .steps import run, step

STRIP = 96  # columns whose inputs, 128 positions of each, stay in the first or near the second cache
LARGEST = 256  # columns of a strip are counted in a byte


@dataclass(frozen=True, eq=False)
class Striped:
    """A pruned weight (O, I) in strips of columns; a convolution's has one row to an output, and the inputs of its
    group as columns.

    values: float32 (K), row by row and in each by column
    index:  uint8 (K): the column of each, counted from the first of its strip
    starts: int32 (O, strips + 1): where the values of a row begin in each strip, and where they end
    strip:  columns in a strip; the last may have fewer
    """

    values: Tensor
    index: Tensor
    starts: Tensor
    columns: int
    strip: int

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Bytes. The values of a matrix in float32 are the packed weight's own."""
        return self.values.nbytes + self.index.nbytes + self.starts.nbytes


class StripedWeight(ctypes.Structure):
    """striped_t of csrc/steps.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "strip", "strips")),
        *((name, ctypes.c_void_p) for name in ("values", "index", "starts", "code")),
        ("ends", ctypes.c_int64),
    ]


def striped(packed: Packed, places: int = 1) -> Striped:
    """A packed weight for many positions.

    Args:
        places: of a convolution, how many its kernel has: the packed columns are all channels of one place after the
            other's, those of a strip all places of a few channels
    """
    if places > 1 or packed.scales is not None:
        return _striped(unpack(packed, torch.float32), mask_of(packed.mask, packed.columns), places)
    values = packed.values[: int(packed.offsets[-1])].float()  # which are those of the packed weight itself
    return _listed(values, mask_of(packed.mask, packed.columns), _strip(packed.columns, places))


def striped_dense(weight_OI: Tensor, places: int = 1) -> Striped:
    """The same of a weight that is not packed, what is zero in it left out."""
    return _striped(weight_OI.float(), weight_OI != 0, places)


def _striped(weight_OI: Tensor, mask_OI: Tensor, places: int) -> Striped:
    strip = _strip(weight_OI.shape[1], places)
    weight_OI, mask_OI = (in_strips(matrix, places, strip // places) for matrix in (weight_OI, mask_OI))
    return _listed(weight_OI[mask_OI], mask_OI, strip)


def in_strips(weight_OI: Tensor, places: int, together: int) -> Tensor:
    """A matrix (O, I) with its columns in the order of strips of so many channels."""
    if places == 1:
        return weight_OI
    return weight_OI[:, torch.from_numpy(_order_of(weight_OI.shape[1] // places, places, together))]


def _strip(columns: int, places: int) -> int:
    """How many columns a strip has: all strips alike, and whole channels of a convolution."""
    if places > LARGEST:
        raise ValueError(f"a kernel of {places} places is too large")
    channels = max(1, columns // places)
    strips = -(-channels // max(1, STRIP // places))
    return -(-channels // strips) * places


def _order_of(channels: int, places: int, together: int) -> np.ndarray[Any, Any]:
    """The packed columns (place, channel) in the order of strips of so many channels."""
    order = np.arange(places * channels).reshape(places, channels)
    return np.concatenate([order[:, c : c + together].ravel() for c in range(0, channels, together)])


def _listed(values: Tensor, mask_OI: Tensor, strip: int) -> Striped:
    rows, columns = mask_OI.shape
    strips = -(-columns // strip)
    index = (torch.arange(columns, device=mask_OI.device) % strip).to(torch.uint8).expand(rows, -1)[mask_OI]
    kept = functional.pad(mask_OI, (0, strips * strip - columns)).view(rows, strips, strip).sum(2)
    ends = kept.flatten().cumsum(0).view(rows, strips)
    starts = torch.cat([ends[:, :1] - kept[:, :1], ends], 1).to(torch.int32)
    return Striped(values.contiguous(), index, starts.contiguous(), columns, strip)


# ---------------------------------------------------------------------------------------------------------
# The same in torch, where no kernels were compiled, and to compare with


def dense_weight(weight: Striped) -> Tensor:
    """The weight (O, I), its columns in the order of the strips."""
    counts = (weight.starts[:, 1:] - weight.starts[:, :-1]).flatten().long()
    rows, device = weight.rows, weight.values.device
    first = (
        torch.arange(weight.starts.shape[1] - 1, device=device).repeat(rows).repeat_interleave(counts) * weight.strip
    )
    row = torch.arange(rows, device=device).repeat_interleave((weight.starts[:, -1] - weight.starts[:, 0]).long())
    weight_OI = torch.zeros(rows, weight.columns, device=device)
    weight_OI[row, first + weight.index.long()] = weight.values
    return weight_OI


def kernel_weight(weight: Striped, kernel: Sequence[int]) -> Tensor:
    """A convolution's weight (O, C, k…)."""
    places = math.prod(kernel)
    channels = weight.columns // places
    order = torch.from_numpy(_order_of(channels, places, weight.strip // places))
    weight_OI = torch.empty(weight.rows, weight.columns, device=weight.values.device)
    weight_OI[:, order] = dense_weight(weight)
    return weight_OI.view(weight.rows, *kernel, channels).movedim(-1, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------
# Operators


def leading(positions: int) -> int:
    """How far apart the channels of so many positions lie, in floats: an odd multiple of 16, so that they fall into
    different sets of the caches."""
    vectors = -(-positions // 16)
    return (vectors + 1 - vectors % 2) * 16


def _weight_of(
    values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, columns: int, strip: int
) -> StripedWeight:
    """The parts as C takes them. Raises ValueError where they do not fit; what they hold is trusted: `striped` made
    it."""
    parts = ((values, torch.float32, 1), (index, torch.uint8, 1), (starts, torch.int32, 2))
    if (
        any(part.dtype != dtype or part.ndim != ndim or not part.is_contiguous() for part, dtype, ndim in parts)
        or values.shape != index.shape
        or not 0 < strip <= LARGEST
        or columns < 1
        or starts.shape[1] != -(-columns // strip) + 1
        or (bias is not None and bias.shape != starts.shape[:1])
    ):
        raise ValueError(
            f"the parts of a striped weight do not fit: values {tuple(values.shape)}, index {tuple(index.shape)},"
            f" starts {tuple(starts.shape)}, {columns} columns in strips of {strip}"
            + ("" if bias is None else f", bias {tuple(bias.shape)}")
        )
    rows, strips = starts.shape[0], starts.shape[1] - 1
    return StripedWeight(rows, columns, strip, strips, values.data_ptr(), index.data_ptr(), starts.data_ptr())


def weight_of(weight: Striped) -> StripedWeight:
    """A weight as C takes it, while `weight` lives."""
    return _weight_of(weight.values, weight.index, weight.starts, None, weight.columns, weight.strip)


def _product(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, columns: int, strip: int
) -> Tensor:
    check_floating(x)
    weight_OI = dense_weight(Striped(values, index, starts, columns, strip))
    return functional.linear(x, weight_OI.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _product_cpu(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, columns: int, strip: int
) -> Tensor:
    weight = _weight_of(values, index, starts, bias, columns, strip)
    if not x.ndim or x.shape[-1] != columns:
        raise ValueError(f"a product with {columns} columns got an input of shape {tuple(x.shape)}")
    positions, shape = x.numel() // columns, (*x.shape[:-1], weight.rows)
    if library() is None or x.dtype not in FLOATS or not positions:
        return _product(x, values, index, starts, bias, columns, strip)
    ld, x, y = leading(positions), x.contiguous(), x.new_empty(shape)
    x_IT, y_OT = torch.empty(columns, ld), torch.empty(weight.rows, ld)
    by_channel = {"x": (x_IT.data_ptr(), ld), "y": (y_OT.data_ptr(), ld)}
    sizes = {"positions": positions, "dtype": x.dtype}
    run(
        [
            step("pack", x=x, x_stride=columns, y=by_channel["x"], channels=columns, **sizes),
            step(
                "product",
                weight=ctypes.addressof(weight),
                bias=None if bias is None else bias.float().contiguous(),
                **by_channel,
                positions=positions,
            ),
            step("unpack", x=by_channel["y"], y=y, y_stride=weight.rows, channels=weight.rows, **sizes),
        ]
    )
    return y


def _conv(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, columns: int, strip: int, *how: Any
) -> Tensor:
    check_floating(x)
    return _dense_conv(x, kernel_weight(Striped(values, index, starts, columns, strip), how[0]), bias, *how)


def _dense_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    parts: list[Tensor] | None = None,
    versions: list[int] | None = None,
) -> Tensor:
    _check_unchanged(parts, versions)
    bias = None if bias is None else bias.to(x.dtype)
    return functional.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups).contiguous()


def _check_unchanged(parts: list[Tensor] | None, versions: list[int] | None) -> None:
    """Raises ModelError where one of these tensors is of another version."""
    if parts and versions and [part._version for part in parts] != list(versions):
        raise ModelError(
            "a packed weight was changed after its network was compiled: run the network once without torch.compile."
        )


def _out(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    return (size + 2 * pad - (kernel - 1) * dilation - 1) // stride + 1


def _conv_cpu(x: Tensor, values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    columns, strip, kernel, stride, padding, dilation, groups, *made_of = how
    weight = _weight_of(values, index, starts, bias, columns, strip)
    pairs = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
    places = math.prod(kernel)
    if (
        any(len(pair) != 2 or min(pair) < least for pair, least in pairs)
        or strip % places
        or columns % places
        or groups < 1
        or weight.rows % groups
    ):
        raise ValueError(
            f"no convolution: {weight.rows} outputs in {groups} groups, kernel {kernel}, stride {stride}, padding"
            f" {padding}, dilation {dilation}, strips of {strip}"
        )
    if x.ndim != 4 or x.shape[1] != columns // places * groups:
        raise ValueError(
            f"a convolution of {columns // places * groups} channels got an input of shape {tuple(x.shape)}"
        )
    batch, channels, *size = x.shape
    out = [_out(*one) for one in zip(size, kernel, stride, padding, dilation, strict=True)]
    if library() is None or x.dtype not in FLOATS or min(out) < 1 or not batch:
        return _conv(x, values, index, starts, bias, *how)
    if made_of:
        _check_unchanged(*made_of)
    x_NCHW = x.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty(batch, weight.rows, *out)
    area, made = size[0] * size[1], out[0] * out[1]
    conv = step(
        "conv",
        weight=ctypes.addressof(weight),
        bias=bias,
        x=(x_NCHW.data_ptr(), area),
        y=(y.data_ptr(), made),
        x_batch=channels * area,
        y_batch=weight.rows * made,
        batch=batch,
        channels=channels,
        height=size[0],
        width=size[1],
        rows=weight.rows,
        out_height=out[0],
        out_width=out[1],
        kernel=kernel,
        stride=stride,
        pad=padding,
        dilation=dilation,
        groups=groups,
    )
    run([conv])
    return y.to(x.dtype)


def _product_like(x: Tensor, values: Tensor, index: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], starts.shape[0]))


def _conv_like(x: Tensor, values: Tensor, index: Tensor, starts: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    return _dense_conv_like(x, starts, bias, *how[2:])


def _dense_conv_like(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    kernel, stride, padding, dilation, *_ = how
    out = [_out(*one) for one in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *out))


_STRIPED = "Tensor x, Tensor values, Tensor index, Tensor starts, Tensor? bias"
define("sparse_product", f"{_STRIPED}, int columns, int strip", _product, {"CPU": _product_cpu}, _product_like)
define(
    "sparse_conv",
    f"{_STRIPED}, int columns, int strip, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor[]? parts=None, int[]? versions=None",
    _conv,
    {"CPU": _conv_cpu},
    _conv_like,
)

define(
    "dense_conv",
    "Tensor x, Tensor weight, Tensor? bias, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor[]? parts=None, int[]? versions=None",
    _dense_conv,
    {},
    _dense_conv_like,
)

sparse_product = torch.ops.prunella.sparse_product
sparse_conv = torch.ops.prunella.sparse_conv
dense_conv = torch.ops.prunella.dense_conv
