"""2:4 weights on sparse tensor cores, for many tokens at once.

The tensor cores of NVIDIA GPUs (compute capability 8.0 and later) skip the zeros of a 2:4 weight, where it is
compressed as they want it: torch's semi-structured tensors, through cuSPARSELt or CUTLASS. That form cannot be made
from the packed one in place, nor do our kernels for few tokens read it. So it is a second copy, as large as the first
(0.56 of the dense weight; both together are larger than the dense weight), and nobody gets it without asking:

>>> from prunella.sparse.semi import add_semi_structured            # doctest: +SKIP
>>> extra = add_semi_structured(model)                              # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .format import mask_of
from .linear import SparseLinear

MANY = 64  # from so many tokens on


class SemiStructuredLinear(SparseLinear):
    """A `SparseLinear` with a second copy of its 2:4 weight, which many tokens at once are multiplied with.

    The copy is no part of the state dict, and is gone when the module is moved or cast.
    """

    copy: Tensor

    def product(self, x: Tensor) -> Tensor:
        if x.numel() < MANY * self.in_features or x.dtype != self.copy.dtype:
            return super().product(x)
        y = functional.linear(x.reshape(-1, self.in_features), self.copy).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        del self.copy
        self.__class__ = SparseLinear  # type: ignore[assignment]
        return self._apply(fn, recurse)


def add_semi_structured(model: nn.Module) -> int:
    """Give every 2:4 `SparseLinear` of a model on a GPU its second copy, for prompts and batches.

    Weights that are not 2:4, not float16 or bfloat16, or whose shape or GPU the libraries do not take stay as they
    are.

    Returns:
        The bytes of memory that this takes.
    """
    extra = 0
    for module in model.modules():
        if type(module) is not SparseLinear or not is_two_of_four(module):
            continue
        copy = _compress(module.weight)
        if copy is not None:
            module.__class__ = SemiStructuredLinear
            module.__dict__["copy"] = copy
            extra += sum(getattr(copy, name).nbytes for name in copy.__tensor_flatten__()[0])
    return extra


def is_two_of_four(module: SparseLinear) -> bool:
    """Does each group of four weights keep at most two, of 16 bits each?"""
    if module.weight_values.dtype not in (torch.float16, torch.bfloat16) or module.in_features % 4:
        return False
    kept_OI = mask_of(module.weight_mask, module.in_features)
    return int(kept_OI.view(len(kept_OI), -1, 4).sum(2).max()) <= 2


def _compress(weight_OI: Tensor) -> Any:
    """The semi-structured tensor, or None where torch cannot make or multiply it."""
    if not weight_OI.is_cuda or torch.cuda.get_device_capability(weight_OI.device) < (8, 0):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is a prototype, torch says
        try:
            copy = torch.sparse.to_sparse_semi_structured(weight_OI.contiguous())
            functional.linear(weight_OI.new_zeros((MANY, weight_OI.shape[1])), copy)
        except RuntimeError:  # neither library has kernels for this shape on this GPU
            return None
    return copy
