"""Convolutions of one, two or three dimensions: products with patches of their inputs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .lens import Inputs, Lens
from .registry import register_lens

ROWS = 2048  # of a layer's inputs that are made at a time: a patch of k x k holds each number k^2 times
_OPERANDS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@register_lens("convolution", always=True)
@dataclass(frozen=True)
class Convolution(Lens):
    """The weight (O, C, k…) of a convolution as a matrix (O, k… C), or one for each of its groups. The channels of
    one place in the kernel stand side by side, so that patterns run along them: for a kernel of one place that is a
    view. Its inputs are the patches of an image, one for each place of the output.

    Depthwise convolutions, whose groups have a single input or output, are too small to prune, and transposed ones
    no products with patches: it fits neither.
    """

    groups: int

    packed = "kernel"
    functions = (torch.conv1d, torch.conv2d, torch.conv3d)

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or key != "weight":
            return None
        outputs, channels = module.weight.shape[0] // module.groups, module.weight.shape[1]
        return None if module.groups > 1 and min(outputs, channels) == 1 else cls(module.groups)

    def matrices(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, *tensor.shape[1:]).movedim(2, -1).flatten(2)

    def tensor(self, matrices_POI: Tensor, shape: Sequence[int]) -> Tensor:
        return matrices_POI.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def channels(self, parameter: Tensor) -> int:
        return parameter.shape[1]

    def inputs(self, parameter: Tensor, function: Any, args: Any, kwargs: Any) -> Iterator[Inputs]:
        call = _DEFAULTS | dict(zip(_OPERANDS, args, strict=False)) | kwargs
        x, weight = call["input"], call["weight"]
        if weight.data_ptr() != parameter.data_ptr():  # it is what flows through another one
            return
        fits = weight.shape == parameter.shape and weight.stride() == parameter.stride()
        taken = None if fits and call["groups"] == self.groups else (len(weight), weight[0].numel())
        dims = weight.ndim - 2
        kernel, stride, dilation = weight.shape[2:], _each(call["stride"], dims), _each(call["dilation"], dims)
        padding = _padding(call["padding"], kernel, dilation)
        how: Hashable = (kernel, stride, padding, dilation, self.groups)
        for part, x_BC in enumerate((x if x.ndim > dims + 1 else x[None]).chunk(self.groups, 1)):
            rows = partial(_patches, x_BC, kernel, stride, padding, dilation)
            yield Inputs(part, rows, x, how=(how, part), taken=taken)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Zeros before and after each dimension, the last one first, as `pad` takes them."""
    if value == "same":  # what is odd goes behind
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        ends = [(n // 2, n - n // 2) for n in whole]
    else:
        ends = [(n, n) for n in _each(0 if value == "valid" else value, len(kernel))]
    return tuple(n for pair in reversed(ends) for n in pair)


def _patches(
    x_BC: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """What a convolution multiplies by, (T, k… C), a patch a row, about `ROWS` of them at a time."""
    dims = len(kernel)
    for some in torch.split(x_BC, max(1, ROWS // math.prod(x_BC.shape[2:]))):
        windows = functional.pad(some, padding)
        for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
            windows = windows.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        for piece in _cut(windows.movedim(1, -1), dims + 1):
            yield piece.reshape(-1, math.prod(kernel) * x_BC.shape[1])


def _cut(places: Tensor, dims: int) -> Iterator[Tensor]:
    """Views of `ROWS` places or fewer, which lie along the first `dims` dimensions; in order."""
    inner = math.prod(places.shape[1:dims])
    if inner > ROWS:
        for one in places:
            yield from _cut(one, dims - 1)
    else:
        yield from torch.split(places, max(1, ROWS // inner))
