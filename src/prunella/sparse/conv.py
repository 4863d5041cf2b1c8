"""Convolutions in a packed model. In one and two dimensions they run packed, by strips or, where that was measured to
be faster, expanded call by call; those whose kernel has one place run as the linear layers that they are. The others
(three dimensions, other values than zeros around the picture) are expanded when they are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..compat import CONVOLUTIONS
from ..errors import ModelError
from ..grid import Grid
from .format import FLOATS, Packed, as_parameter, mask_of, pack, unpack
from .kernels import expand, library
from .linear import PackedModule, SparseLinear
from .measured import fastest
from .striped import LARGEST, Striped, dense_conv, sparse_conv

PLAIN = {kind: kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}  # which a class derived from it may change


def runs_packed(module: nn.Module) -> bool:
    """Is it a convolution that our kernels know: in one or two dimensions with zeros around the picture, or in three
    with a kernel of one place, one group and nothing around the picture?"""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).forward not in PLAIN.values():
        return False
    if of_one_place(module):
        return True
    small = math.prod(module.kernel_size) <= LARGEST and module.padding_mode == "zeros"
    return small and len(module.kernel_size) < 3 and library() is not None


def why_expanded() -> str:
    """What other convolutions lack to run packed."""
    if library() is None:
        return "without the C kernels those run packed whose kernel has one place"
    return (
        "those run packed that have one or two dimensions, zeros around the picture and at most"
        f" {LARGEST} places in their kernel"
    )


def of_one_place(conv: Any) -> bool:
    """Is it a product with single pixels?"""
    padding = conv.padding if isinstance(conv.padding, tuple) else ()  # "same" and "valid" add nothing to one place
    return set(conv.kernel_size) == {1} and conv.groups == 1 and not any(padding)


class SparseConv(SparseLinear):
    """A convolution whose weight stays packed. One whose kernel has one place is a linear layer at every place of the
    picture, or at every one that its stride meets.

    original: the dense convolution in whose place this stands, without a weight
    """

    def __init__(self, packed: Packed, conv: Any):
        super().__init__(packed, conv.bias)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.padding_mode, self.groups = conv.dilation, conv.padding_mode, conv.groups
        self.in_channels, self.out_channels = packed.columns // self.places * conv.groups, packed.rows
        self.one_place = of_one_place(conv)
        conv.weight = None
        self.original = (conv,)  # not as a module of its own

    def settle(self) -> None:
        if self.one_place or self.weight_values.is_meta:
            return
        if self.weight_values.device.type == "cpu":
            self.striped()
        else:
            self._kept()

    @property
    def weight(self) -> Tensor:
        return self.weight_in(None)

    def weight_in(self, dtype: torch.dtype | None) -> Tensor:
        return as_parameter(unpack(self._packed, dtype), {"kernel": self.kernel_size})

    @property
    def places(self) -> int:
        return math.prod(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, …) or (C, …) of any strides; what comes out lies in memory as the dense convolution's."""
        dims = len(self.kernel_size)
        channel = x.ndim - dims - 1
        if channel not in (0, 1) or x.shape[channel] != self.in_channels:
            raise ValueError(
                f"a convolution of {self.in_channels} channels and {dims} dimensions got an input of shape"
                f" {tuple(x.shape)}"
            )
        last, inner = self._last(x), self._is_inner(x)
        y = super().forward(x)
        return y.contiguous(memory_format=last) if inner and not x.is_contiguous() else y.contiguous()

    def _last(self, x: Tensor) -> Any:
        """The memory format of batches whose channels are the innermost; of a single picture there is none."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return formats.get(x.ndim) if x.ndim == len(self.kernel_size) + 2 else None

    def _is_inner(self, x: Tensor) -> bool:
        last = self._last(x)
        return last is not None and x.is_contiguous(memory_format=last)

    def product(self, x: Tensor) -> Tensor:
        """The convolution."""
        values, dims = self.weight_values, len(self.kernel_size)
        if torch.is_autocast_enabled(x.device.type) and values.is_floating_point():
            x = x.to(values.dtype)
        ways = {"striped": lambda: self._by_strips(x), "expanded": lambda: self._expanded(x)}
        if self.one_place and (dims == 3 or not self.for_many(x, x.numel() // max(1, self.in_channels))):
            return self._expanded(x)
        if not self.one_place and values.is_floating_point() and x.dtype in FLOATS and x.dtype != values.dtype:
            raise ValueError(f"a convolution whose weight is {values.dtype} got an input of {x.dtype}")
        if x.device.type not in ("cpu", "meta"):
            return self._by_kept(x)
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in FLOATS or not x.numel():
            return self._by_strips(x)
        if not self.one_place:
            self.striped()  # whichever way is taken: what is compiled cannot renew it
        about = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, x.dtype, self._is_inner(x))
        return fastest((*self.measured, *about, 1 << x.numel().bit_length()), ways)

    def _expanded(self, x: Tensor) -> Tensor:
        """By the dense weight; for one place and a few pixels row by row."""
        dims = len(self.kernel_size)
        if self.one_place:
            channel = x.ndim - dims - 1
            where: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
            return self._by_rows(x[where].movedim(channel, -1)).movedim(-1, channel)
        weight = as_parameter(expand(self._packed, x.dtype), {"kernel": self.kernel_size})
        bias = None if self.bias is None else self.bias.to(x.dtype)
        convolve = functional.conv1d if dims == 1 else functional.conv2d
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _by_strips(self, x: Tensor) -> Tensor:
        weight = self.striped()
        parts = (weight.values, weight.index, weight.starts, self.bias, weight.columns, weight.strip)
        return self._by(sparse_conv, x, parts, Striped)

    def _kept(self) -> Tensor:
        """The dense weight, which stays on devices that have no kernels for convolutions."""
        return self.made(Tensor, lambda: self.weight)

    def _by_kept(self, x: Tensor) -> Tensor:
        weight = self._kept()
        return self._by(dense_conv, x, (weight if weight.ndim == 4 else weight.unsqueeze(2), self.bias), Tensor)

    def _by(self, operator: Any, x: Tensor, parts: tuple[Any, ...], made: type) -> Tensor:
        """An operator of pictures; one dimension is pictures of one row."""
        dims = len(self.kernel_size)
        batch = x if x.ndim == dims + 2 else x.unsqueeze(0)
        before, after = self._around()
        if before != after:  # "same" about a kernel of an even size
            sides = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
            batch, before = functional.pad(batch, sides), [0] * dims
        flat = [1] * (2 - dims)
        how: tuple[Any, ...] = (
            [*flat, *self.kernel_size],
            [*flat, *self.stride],
            [*(0 for _ in flat), *before],
            [*flat, *self.dilation],
            self.groups,
        )
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            how = (*how, list(self._made[made].parts), list(self._made[made].versions))
        y: Tensor = operator(batch.unsqueeze(2) if flat else batch, *parts, *how)
        y = y.squeeze(2) if flat else y
        return y if x.ndim == dims + 2 else y.squeeze(0)

    def _around(self) -> tuple[list[int], list[int]]:
        """Zeros before and after a picture's sides."""
        if isinstance(self.padding, tuple):
            return list(self.padding), list(self.padding)
        if self.padding == "valid":
            return [0] * len(self.kernel_size), [0] * len(self.kernel_size)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [r // 2 for r in reach], [r - r // 2 for r in reach]

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The dense convolution."""
        (conv,) = self.original
        return _filled(conv, self.weight_in(dtype), self.bias)

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
