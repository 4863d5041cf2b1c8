"""How a parameter of a module is read as matrices, and written back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..products import FUNCTIONS, products

Chunks = Callable[[], Iterator[Tensor]]  # the rows (T, I) of a layer's inputs, some at a time, made when asked for


@dataclass(frozen=True)
class Inputs:
    """What one of a parameter's matrices meets in a call.

    part:    which of them
    chunks:  the inputs, an output of the matrix a row
    source:  the tensor that they are made of
    how:     two layers whose inputs have one `source` and equal `how` see the same rows; None: they are like no others
    batched: other matrices take part in the product, and rows that belong to them come as zeros
    taken:   the shape (O, I) that the call sees in the matrix, if it is not that of the lens
    """

    part: int
    chunks: Chunks
    source: Tensor
    how: Hashable = None
    batched: bool = False
    taken: tuple[int, ...] | None = None


class Lens(ABC):
    """How a parameter is read as matrices (O, I), each a layer to prune: what turns an input into an output is
    x_TI @ weight_OI.T. A lens is made by `of` for one parameter and knows nothing of its values.

    transposed: the parameter holds its matrices as (I, O)
    routed:     which rows meet a matrix depends on what they hold, as with a mixture's experts
    packed:     what packed weights can take the place of: the whole `module`, or the parameter, by a `list` of them; or
                a convolution, by one weight whose rows are those of all its matrices (`kernel`); None: it stays dense
                in a packed model
    functions:  those of torch whose calls use the parameter
    """

    transposed: bool = False
    routed: bool = False
    packed: Literal["module", "list", "kernel"] | None = None
    functions: Collection[Any] = ()

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module, key: str) -> Lens | None:
        """The lens for the parameter `key` of a module; None where this one does not fit."""

    @abstractmethod
    def matrices(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as its matrices (P, O, I), sharing memory where that can be;
        differentiable."""

    @abstractmethod
    def tensor(self, matrices_POI: Tensor, shape: Sequence[int]) -> Tensor:
        """The other way: from all matrices to a tensor of the parameter's shape; differentiable."""

    @abstractmethod
    def inputs(self, parameter: Tensor, function: Any, args: Any, kwargs: Any) -> Iterator[Inputs]:
        """What the matrices meet in a call of one of `functions`, before it is made; the parameter, or a view of it, is
        among the arguments."""

    def shape(self, parameter: Tensor) -> tuple[int, int, int]:
        """How many matrices there are, their outputs and inputs: (P, O, I)."""
        parts, rows, columns = self.matrices(torch.empty(parameter.shape, device="meta")).shape
        return parts, rows, columns

    def channels(self, parameter: Tensor) -> int:
        """How many inputs of a row stand side by side that a pattern may take together: all of them, or the channels at
        one place of a kernel."""
        return self.shape(parameter)[2]

    def numbered(self, parameter: Tensor) -> bool:
        """Do the names of its layers have a number?"""
        return self.shape(parameter)[0] > 1

    def write(self, tensor: Tensor, part: int, weight_OI: Tensor) -> None:
        """Put a matrix into a tensor of the parameter's shape."""
        matrices = self.matrices(tensor)
        matrices[part].copy_(weight_OI)
        if matrices.data_ptr() != tensor.data_ptr():  # it was no view
            tensor.copy_(self.tensor(matrices, tensor.shape))

    def put(self, parameter: Tensor, weights: Mapping[int, Tensor]) -> Tensor:
        """A new parameter with these of its matrices, {part: weight_OI}, in place of its own; differentiable in
        them."""
        matrices = self.matrices(parameter)
        given = torch.stack(list(weights.values())) if len(matrices) > 1 else next(iter(weights.values()))[None]
        if len(matrices) > 1:
            given = matrices.index_copy(0, torch.tensor(list(weights), device=parameter.device), given)
        return self.tensor(given, parameter.shape)

    def bias(self, module: nn.Module, key: str, part: int) -> Tensor | None:
        """The bias (O,) that is added to a matrix's outputs, if there is one."""
        bias = getattr(module, "bias" if key == "weight" else f"{key}_bias", None)
        parts, rows, _ = self.shape(getattr(module, key))
        return bias.reshape(parts, -1)[part] if isinstance(bias, Tensor) and bias.numel() == parts * rows else None


@dataclass(frozen=True)
class Stored(Lens):
    """Matrices that lie one behind the other in memory, and are factors of products.

    rows, columns: of each, as it is stored
    """

    rows: int
    columns: int
    transposed: bool = False

    functions = FUNCTIONS

    def matrices(self, tensor: Tensor) -> Tensor:
        matrices = tensor.view(-1, self.rows, self.columns)
        return matrices.mT if self.transposed else matrices

    def tensor(self, matrices_POI: Tensor, shape: Sequence[int]) -> Tensor:
        return (matrices_POI.mT if self.transposed else matrices_POI).reshape(*shape)

    def shape(self, parameter: Tensor) -> tuple[int, int, int]:
        parts = parameter.numel() // (self.rows * self.columns)
        return (parts, self.columns, self.rows) if self.transposed else (parts, self.rows, self.columns)

    def numbered(self, parameter: Tensor) -> bool:
        return parameter.ndim > 2 or parameter.numel() > self.rows * self.columns

    def inputs(self, parameter: Tensor, function: Any, args: Any, kwargs: Any) -> Iterator[Inputs]:
        whole = self.matrices(parameter)
        start, size = parameter.data_ptr(), self.rows * self.columns * parameter.element_size()

        def known(tensor: Tensor) -> bool:
            return 0 <= tensor.data_ptr() - start < len(whole) * size

        for found in products(function, args, kwargs, known):
            part, rest = divmod(found.weight_OI.data_ptr() - start, size)
            if rest:
                continue
            matrix = found.weight_OI
            fits = (matrix.shape, matrix.stride()) == (whole.shape[1:], whole.stride()[1:])
            yield Inputs(
                part,
                lambda x=found.x: iter((x(),)),  # type: ignore[misc]
                found.source,
                how="rows",
                batched=found.batched,
                taken=None if fits else tuple(matrix.shape),
            )
