"""Pruned weights made for many positions: products and convolutions where the work is arithmetic (csrc/striped.h).

    sparse_product  x W^T for many tokens
    sparse_conv     a convolution of pictures, of any kernel, stride, padding, dilation and groups

For a few tokens a weight is read once and memory is what counts (`kernels.sparse_linear`); for many each kept weight is
multiplied with all of them, and the processor's arithmetic is. Then columns are taken in strips whose inputs stay in the first
cache. A `Striped` weight lists the kept values as the packed one does, and where in its strip each stands in one byte.
Everything here is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .format import Packed, mask_of, unpack
from .kernels import library, succeed

STRIP = 96  # columns whose inputs, 128 positions of each, stay in the first or near the second cache
LARGEST = 256  # columns of a strip are counted in a byte


@dataclass(frozen=True)
class Striped:
    """A pruned weight (O, I) in strips of columns; a convolution's has one row to an output, and the inputs of its group as
    columns.

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
        """Bytes beside those of the packed weight, whose values these are where that has float32 ones."""
        return self.values.nbytes + self.index.nbytes + self.starts.nbytes


class StripedWeight(ctypes.Structure):
    """striped_t of csrc/steps.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "strip", "strips")),
        *((name, ctypes.c_void_p) for name in ("values", "index", "starts")),
    ]


def striped(packed: Packed, places: int = 1) -> Striped:
    """A packed weight for many positions.

    Args:
        places: of a convolution, how many its kernel has: the packed columns are all channels of one place after the
            other's, those of a strip all places of a few channels
    """
    mask_OI, columns = mask_of(packed.mask, packed.columns), packed.columns
    if places == 1 and packed.scales is None:
        values = packed.values[: int(packed.offsets[-1])].float()
    else:
        weight_OI = unpack(packed, torch.float32)
        order = torch.from_numpy(_order(columns // places, places, _strip(columns, places) // places))
        mask_OI = mask_OI[:, order]
        values = weight_OI[:, order][mask_OI]
    return _striped(values, mask_OI, _strip(columns, places))


def striped_dense(weight_OI: Tensor, places: int = 1) -> Striped:
    """The same of a weight that is not packed, what is zero in it left out."""
    columns = weight_OI.shape[1]
    if places > 1:
        weight_OI = weight_OI[:, torch.from_numpy(_order(columns // places, places, _strip(columns, places) // places))]
    mask_OI = weight_OI != 0
    return _striped(weight_OI.float()[mask_OI], mask_OI, _strip(columns, places))


def _strip(columns: int, places: int) -> int:
    """How many columns a strip has: all strips alike, and whole channels of a convolution."""
    if places > LARGEST:
        raise ValueError(f"a kernel of {places} places is too large")
    channels = max(1, columns // places)
    strips = -(-channels // max(1, STRIP // places))
    return -(-channels // strips) * places


def _order(channels: int, places: int, together: int) -> np.ndarray[Any, Any]:
    """The packed columns (place, channel) in the order of strips of so many channels."""
    order = np.arange(places * channels).reshape(places, channels)
    return np.concatenate([order[:, c : c + together].ravel() for c in range(0, channels, together)])


def _striped(values: Tensor, mask_OI: Tensor, strip: int) -> Striped:
    rows, columns = mask_OI.shape
    strips = -(-columns // strip)
    index = (torch.arange(columns) % strip).to(torch.uint8).expand(rows, -1)[mask_OI]
    kept = functional.pad(mask_OI, (0, strips * strip - columns)).view(rows, strips, strip).sum(2)
    ends = kept.flatten().cumsum(0).view(rows, strips)
    starts = torch.cat([ends[:, :1] - kept[:, :1], ends], 1).to(torch.int32)
    return Striped(values.contiguous(), index, starts.contiguous(), columns, strip)


# ---------------------------------------------------------------------------------------------------------
# The same in torch, where no kernels were compiled, and to compare with


def dense_weight(weight: Striped) -> Tensor:
    """The weight (O, I), its columns in the order of the strips."""
    counts = (weight.starts[:, 1:] - weight.starts[:, :-1]).flatten().long()
    first = torch.arange(weight.starts.shape[1] - 1).repeat(weight.rows).repeat_interleave(counts) * weight.strip
    row = torch.arange(weight.rows).repeat_interleave((weight.starts[:, -1] - weight.starts[:, 0]).long())
    weight_OI = torch.zeros(weight.rows, weight.columns)
    weight_OI[row, first + weight.index.long()] = weight.values
    return weight_OI


def kernel_weight(weight: Striped, kernel: Sequence[int]) -> Tensor:
    """A convolution's weight (O, C, k…)."""
    places = int(np.prod(kernel))
    channels = weight.columns // places
    order = torch.from_numpy(_order(channels, places, weight.strip // places))
    weight_OI = torch.empty(weight.rows, weight.columns)
    weight_OI[:, order] = dense_weight(weight)
    return weight_OI.view(weight.rows, *kernel, channels).movedim(-1, 1).contiguous()
