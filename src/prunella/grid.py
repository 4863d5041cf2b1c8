"""The grids of quantized weights: which they are, and which fits best. The packed format stores exactly these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .errors import NumericalError
from .waits import demand

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the largest weight, at which clipping is tried


@dataclass(frozen=True)
class Grid:
    """A weight's values are integers times scales, and zero is one of them.

    bits:     8, 4 or 3: the integers run from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1
    group:    inputs of a row that share a scale; 0: all of them
    scale_OG: bfloat16, G groups to a row, the last one short where `group` does not divide the inputs
    """

    bits: int
    group: int
    scale_OG: Tensor

    def on(self, device: torch.device) -> Grid:
        """The same grid, there."""
        return Grid(self.bits, self.group, self.scale_OG.to(device))

    def spread(self, columns: int) -> Tensor:
        """Each weight's scale, float32 (O, I)."""
        return self.scale_OG.float().repeat_interleave(self.group or columns, 1)[:, :columns]

    def codes(self, weight_OI: Tensor) -> Tensor:
        """The integers nearest to a weight, in float32."""
        return nearest(weight_OI.float(), self.spread(weight_OI.shape[1]), self.bits)

    def round(self, weight_OI: Tensor) -> Tensor:
        """The nearest weight on the grid, in the dtype of `weight_OI`. Rounding twice changes nothing: the nearest
        multiple of what a multiple was cast to is that multiple."""
        rounded_OI = self.codes(weight_OI) * self.spread(weight_OI.shape[1])
        return rounded_OI.to(weight_OI.dtype).add_(0)  # no negative zeros: an integer has none


def fit(weight_OI: Tensor, bits: int, group: int) -> Grid:
    """The grid that rounds a weight, zeros where it is pruned, best: of a few that clip more or less of the largest
    weight of a group, the one with the least squared error. With 8 bits clipping never pays. Raises NumericalError
    if a weight is NaN or infinite."""
    weight_OI = weight_OI.float()
    demand(torch.isfinite(weight_OI).all(), lambda: NumericalError("a weight to quantize is NaN or infinite."))
    columns = weight_OI.shape[1]
    group = group if group < columns else 0
    size = group or columns
    weight_OGI = functional.pad(weight_OI, (0, -columns % size)).view(len(weight_OI), -1, size)
    top_OG1 = weight_OGI.abs().amax(2, keepdim=True)
    best_OG1, least_OG1 = torch.zeros_like(top_OG1), torch.full_like(top_OG1, torch.inf)
    for share in SHARES if bits < 8 else SHARES[:1]:
        scale_OG1 = _up(top_OG1 * (share / limit(bits))).float()
        error_OGI = nearest(weight_OGI, scale_OG1, bits).mul_(scale_OG1).sub_(weight_OGI)
        error_OG1 = error_OGI.square_().sum(2, keepdim=True)
        best_OG1 = torch.where(error_OG1 < least_OG1, scale_OG1, best_OG1)
        least_OG1 = torch.minimum(error_OG1, least_OG1)
    return Grid(bits, group, best_OG1.squeeze(2).to(torch.bfloat16))


def limit(bits: int) -> int:
    """The largest integer of a grid."""
    return (1 << bits - 1) - 1


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers whose multiples of `scale` are nearest to `weight`."""
    return (weight / scale.clamp_min(1e-38)).round_().clamp_(-limit(bits), limit(bits))


def _up(scale: Tensor) -> Tensor:
    """To bfloat16, never below: values are rounded to multiples of the scale as it is stored."""
    near = scale.to(torch.bfloat16)
    return torch.where(near.float() < scale, (near.view(torch.int16) + 1).view(torch.bfloat16), near)
