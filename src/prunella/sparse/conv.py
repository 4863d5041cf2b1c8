"""Convolutions in a packed model: those whose kernel has one place run packed, as the linear layers that they are; the
others are expanded when they are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import CONVOLUTIONS
from ..errors import ModelError
from ..grid import Grid
from .format import Packed, as_parameter, mask_of, pack, unpack
from .linear import PackedModule, SparseLinear

PLAIN = {kind: kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}  # which a class derived from it may change


def runs_packed(module: nn.Module) -> bool:
    """Is it a convolution that is a product with single pixels: a kernel of one place, one group, nothing around the
    picture?"""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).forward not in PLAIN.values():
        return False
    padding = module.padding if isinstance(module.padding, tuple) else ()  # "same" and "valid" add nothing to one place
    return set(module.kernel_size) == {1} and module.groups == 1 and not any(padding)


class SparseConv(SparseLinear):
    """A convolution whose kernel has one place, its weight packed: a linear layer at every place of the picture, or at
    every one that its stride meets.

    original: the dense convolution in whose place this stands, without a weight
    """

    def __init__(self, packed: Packed, conv: Any):
        super().__init__(packed, conv.bias)
        self.in_channels, self.out_channels, self.groups = packed.columns, packed.rows, 1
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.padding_mode = conv.dilation, conv.padding_mode
        conv.weight = None
        self.original = (conv,)  # not as a module of its own

    @property
    def weight(self) -> Tensor:
        return as_parameter(unpack(self._packed), {"kernel": self.kernel_size})

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, …) or (C, …) of any strides; what comes out lies in memory as the dense convolution's."""
        dims = len(self.kernel_size)
        channel = x.ndim - dims - 1
        if channel not in (0, 1) or x.shape[channel] != self.in_features:
            raise ValueError(
                f"a convolution of {self.in_features} channels and {dims} dimensions got an input of shape"
                f" {tuple(x.shape)}"
            )
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)
        inner = x.ndim == dims + 2 and last is not None and x.is_contiguous(memory_format=last)
        where: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        met = x[where]
        y = super().forward(met.movedim(channel, -1)).movedim(-1, channel)
        return y if inner and not x.is_contiguous() else y.contiguous()

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The dense convolution."""
        (conv,) = self.original
        return _filled(conv, self.weight.to(dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"


@dataclass(frozen=True)
class PackedAs:
    """How the weight of an expanded convolution is stored, all but its values, for it to be stored so again."""

    mask: Tensor
    bits: int | None
    group: int
    scales: Tensor | None

    def pack(self, name: str, weight: Tensor) -> Packed:
        """Raises ModelError for a weight that has been changed in a way that cannot be stored so."""
        weight_OI = weight.detach().cpu().movedim(1, -1).flatten(1)
        mask_OI = mask_of(self.mask, weight_OI.shape[1])
        grid = None if self.scales is None or self.bits is None else Grid(self.bits, self.group, self.scales)
        if bool(((weight_OI != 0) & ~mask_OI).any()) or (grid and not torch.equal(grid.round(weight_OI), weight_OI)):
            raise ModelError(f"'{name}' was changed since it was loaded, and is not what was packed: pack it anew.")
        return pack(weight_OI.contiguous(), mask_OI, self.bits, self.group, grid=grid)


class ExpandedConv(PackedModule):
    """What stands for a convolution while its packed weight is loaded, and is a dense one after that (`plain`).

    original: the dense convolution, without a weight
    """

    weight_mask: Tensor
    weight_offsets: Tensor

    def __init__(self, packed: Packed, conv: Any):
        super().__init__(packed, packed.rows, packed.columns, conv.bias)
        self.dtype_of_weight = conv.weight.dtype
        conv.weight = None
        self.original = (conv,)

    def packed(self, name: str = "weight") -> Packed:
        """The weight, checked. Raises ModelError, naming the tensor, if it is damaged."""
        return SparseLinear.packed(self, name)  # type: ignore[arg-type]

    @property
    def _packed(self) -> Packed:
        parts = (self.weight_mask, self.weight_offsets, self.weight_values, self.weight_scales)
        return Packed(*parts, self.in_features, self.group)

    def plain(self) -> nn.Module:
        """The dense convolution, which knows how it is stored (`packed_as`)."""
        (conv,) = self.original
        packed, kernel = self._packed, tuple(conv.kernel_size)
        if packed.mask.is_meta:
            weight_OI = packed.mask.new_empty((packed.rows, packed.columns), dtype=self.dtype_of_weight)
        else:
            weight_OI = unpack(packed, self.dtype_of_weight)
            scales = None if packed.scales is None else packed.scales.cpu()
            conv.packed_as = PackedAs(packed.mask.cpu(), packed.bits, packed.group, scales)
        return _filled(conv, as_parameter(weight_OI, {"kernel": kernel}), self.bias)


def packed_module(packed: Packed, module: Any) -> PackedModule:
    """What takes the place of a linear layer, GPT-2's transposed one or a convolution, whose weight is packed."""
    if module.weight.ndim > 2:
        return SparseConv(packed, module) if runs_packed(module) else ExpandedConv(packed, module)
    return SparseLinear(packed, module.bias, transposed=not isinstance(module, nn.Linear))


def check_fits(name: str, about: Mapping[str, Any], module: Any) -> None:
    """Raises ModelError where the packed weight of this name is not of the module's shape."""
    shape = tuple(module.weight.shape)
    if len(shape) > 2:
        wanted, groups = (shape[0], math.prod(shape[1:])), module.groups
    else:
        wanted, groups = (shape if isinstance(module, nn.Linear) else shape[::-1]), 1
    found = tuple(about["shape"])
    if found != wanted or tuple(about.get("kernel", ())) != shape[2:] or about.get("groups", 1) != groups:
        raise ModelError(
            f"packed weight '{name}' has shape {found}{_of_kernel(about)}, but the model wants {wanted}"
            f"{_of_kernel({'kernel': shape[2:], 'groups': groups})}."
        )


def _of_kernel(about: Mapping[str, Any]) -> str:
    kernel = "x".join(map(str, about.get("kernel", ())))
    return f" (kernel {kernel}, groups {about.get('groups', 1)})" if kernel else ""


def has_only_a_weight(module: nn.Module) -> bool:
    """Is it a convolution with a weight, maybe a bias, and nothing else that would have to be loaded?"""
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return isinstance(module, CONVOLUTIONS) and own <= {"weight", "bias"} and not list(module.children())


def _filled(conv: Any, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = bias
    filled: nn.Module = conv.eval()
    return filled
