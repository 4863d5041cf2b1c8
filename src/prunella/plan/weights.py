"""Weights as steps take them: packed ones prepared for many positions, dense ones in float32, numbers of channels;
batch norms folded into them. Made once for all plans of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sparse.format import Packed
from ..sparse.linear import SparseLinear
from ..sparse.striped import Striped, striped, striped_dense

TINY = torch.finfo(torch.float32).tiny


class Weights:
    """Of one network.

    flushed: how many weights and biases became zero because they were too small for normal numbers of float32, which
        processors compute with slowly
    """

    def __init__(self, network: nn.Module) -> None:
        self.modules = {
            module.weight_values.data_ptr(): module for module in network.modules() if isinstance(module, SparseLinear)
        }
        self.made: dict[Any, Any] = {}
        self.flushed = 0

    def vector(self, numbers: Tensor | None) -> Tensor | None:
        """One number for each channel."""
        return None if numbers is None else self._once("vector", numbers, None, self._flush)

    def dense(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """A weight (O, …), times a scale of each output."""

        def make(weight: Tensor) -> Tensor:
            if scale is None:
                return weight.float().contiguous()
            return self._flush(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))

        made: Tensor = self._once("dense", weight, scale, make)
        return made

    def packed(self, parts: list[Any]) -> Striped:
        """A packed weight, by the parts that `sparse_linear` takes: that of the module that holds them."""
        mask, offsets, values, scales, columns, group = parts
        module = self.modules.get(values.data_ptr())
        if module is not None:
            return module.striped()
        packed = Packed(mask, offsets, values, scales, columns, group)
        found: Striped = self._once("packed", values, None, lambda values: striped(packed))
        return found

    def striped(self, weight: Tensor, places: int = 1) -> Striped:
        """A dense weight (O, I) as a packed one."""
        found: Striped = self._once("striped", weight, None, lambda weight: striped_dense(weight, places))
        return found

    def _flush(self, numbers: Tensor) -> Tensor:
        made = numbers.to(torch.float32).contiguous().clone()
        small = (made.abs() < TINY) & (made != 0)
        count = int(small.sum())
        self.flushed += count
        return made.masked_fill_(small, 0.0) if count else made

    def _once(self, kind: str, weight: Tensor, scale: Tensor | None, make: Any) -> Any:
        """Not made again for the next shape of inputs. Small ones are known by their content, since they are computed
        for each graph anew."""
        key = (kind, _name(weight), None if scale is None else _name(scale))
        if key not in self.made:
            self.made[key] = weight, make(weight)  # kept, so that its address stays its own
        return self.made[key][1]


def _name(tensor: Tensor) -> Any:
    if tensor.numel() <= 1 << 14:
        return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.stride(), tensor.data_ptr(), tensor.dtype
