"""A lens of a third party: a one-dimensional convolution is a product with patches of its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella import Inputs, Lens, register_lens


@register_lens("patches")
@dataclass(frozen=True)
class Patches(Lens):
    """The weight (O, C, K) of nn.Conv1d as a matrix (O, K C) a group. Channels stand side by side, so that an N:M
    pattern runs along them: which is no view of the weight."""

    groups: int
    stride: int
    padding: int
    dilation: int

    functions = (torch.conv1d,)

    @classmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        if not isinstance(module, nn.Conv1d) or key != "weight" or isinstance(module.padding, str):
            return None
        return cls(module.groups, module.stride[0], module.padding[0], module.dilation[0])

    def matrices(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.groups, -1)).mT.flatten(2)

    def tensor(self, matrices_POI: Tensor, shape: Sequence[int]) -> Tensor:
        return matrices_POI.unflatten(2, (shape[2], shape[1])).mT.reshape(*shape)

    def inputs(self, parameter: Tensor, function: Any, args: Any, kwargs: Any) -> Iterator[Inputs]:
        x_BCL = args[0]
        for part, x in enumerate(x_BCL.chunk(self.groups, 1)):
            yield Inputs(part, partial(self.patches, x, parameter.shape[2]), x_BCL, how=(self, parameter.shape, part))

    def patches(self, x_BCL: Tensor, kernel: int) -> Iterator[Tensor]:
        padded = functional.pad(x_BCL, (self.padding, self.padding))
        windows_BCTK = padded.unfold(2, (kernel - 1) * self.dilation + 1, self.stride)[..., :: self.dilation]
        for window_CTK in windows_BCTK:  # a sample at a time
            yield window_CTK.permute(1, 2, 0).flatten(1)
