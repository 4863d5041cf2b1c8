"""The modules of a packed model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError
from .format import Packed, Rounded, of_parts, unpack
from .kernels import FEW, dense_linear, library, sparse_linear
from .measured import fastest
from .striped import Striped, sparse_product, striped

T = TypeVar("T")


class Made(NamedTuple):
    """What was made of a weight, of which parts, and how often each of these had been changed then."""

    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]
    thing: Any


class Cache(dict[type, Made]):
    """What was made of a weight, by kind. A class of its own: torch.export, which puts attributes back as they were,
    takes it for one thing and does not look into it."""


class TrainingError(ModelError):
    """A packed model was to be trained."""

    def __init__(self) -> None:
        super().__init__(
            "a packed model cannot be trained: unpack it first (prunella unpack DIR -o OUT), train that, and pack it"
            " again."
        )


class PackedModule(nn.Module):
    """A layer with a weight (out_features, in_features) that no gradient can reach: its parts are buffers.

    `weight` makes it dense anew each time it is read, for code that looks at it.
    """

    weight_values: Tensor
    weight_scales: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: Packed | Rounded, rows: int, columns: int, bias_O: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features, self.group = rows, columns, weight.group
        for name, part in {**weight.parts(), "weight_scales": weight.scales}.items():  # None where there are none
            self.register_buffer(name, part)
        self.register_parameter("bias", bias_O)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Untrainable.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        raise NotImplementedError

    def settle(self) -> None:
        """Make what will be needed again and again, once the weight lies where it is to stay."""

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise TrainingError
        return super().train(mode)

    def extra_repr(self) -> str:
        bits = {torch.int8: "int8", torch.uint8: "int4"}.get(self.weight_values.dtype, str(self.weight_values.dtype))
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """As any module moves and casts, but the scales keep their dtype, which is part of the format."""
        scales = self.weight_scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.weight_scales is not None and self.weight_scales.dtype != scales.dtype:
            self.weight_scales = scales.to(self.weight_scales.device)
        return self


class SparseLinear(PackedModule):
    """A linear layer whose weight (out_features, in_features) stays packed.

    `transposed`: the dense module was GPT-2's Conv1D, whose weight is (I, O).
    """

    weight_mask: Tensor
    weight_offsets: Tensor

    def __init__(self, packed: Packed, bias_O: nn.Parameter | None = None, transposed: bool = False):
        super().__init__(packed, packed.rows, packed.columns, bias_O)
        self.transposed = transposed
        self._made = Cache()

    def packed(self, name: str = "weight") -> Packed:
        """The weight, checked. Raises ModelError, naming the tensor, if it is damaged."""
        return of_parts(name, self._packed.parts(), self.in_features, self.group)

    @property
    def _packed(self) -> Packed:
        parts = (self.weight_mask, self.weight_offsets, self.weight_values, self.weight_scales)
        return Packed(*parts, self.in_features, self.group)

    @property
    def weight(self) -> Tensor:
        return self.weight_in(None)

    def weight_in(self, dtype: torch.dtype | None) -> Tensor:
        """The dense weight; one in integers is not rounded to bfloat16 before."""
        weight_OI = unpack(self._packed, dtype)
        return weight_OI.T if self.transposed else weight_OI

    def product(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and self.weight_values.is_floating_point():
            x = x.to(self.weight_values.dtype)
        if self.for_many(x, x.numel() // max(1, self.in_features)):
            tokens = x.numel() // self.in_features
            ways = {"striped": lambda: self._by_strips(x), "expanded": lambda: self._by_rows(x)}
            return fastest((*self.measured, 1 << tokens.bit_length()), ways)
        return self._by_rows(x)

    def _by_rows(self, x: Tensor) -> Tensor:
        """Row by row for a few tokens; for many the weight is expanded."""
        y: Tensor = sparse_linear(
            x,
            self.weight_mask,
            self.weight_offsets,
            self.weight_values,
            self.weight_scales,
            self.in_features,
            self.group,
        )
        return y if self.bias is None else y + self.bias

    def _by_strips(self, x: Tensor) -> Tensor:
        weight = self.striped()
        parts = (weight.values, weight.index, weight.starts)
        y: Tensor = sparse_product(x, *parts, self.bias, weight.columns, weight.strip)
        return y

    def for_many(self, x: Tensor, positions: int) -> bool:
        """May so many positions be multiplied by strips, whose sums and products are float32? Not while x is traced:
        what is the fastest way is measured."""
        return (
            positions > FEW
            and not torch.compiler.is_compiling()
            and type(x) is Tensor
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and self.weight_values.dtype == torch.float32
            and library() is not None
        )

    @property
    def measured(self) -> tuple[Any, ...]:
        """What the fastest way depends on beside the number of positions: shape, kept weights in 20ths, threads."""
        kept = self.weight_values.numel() * 20 // max(1, self.out_features * self.in_features)
        return type(self).__name__, self.out_features, self.in_features, kept, torch.get_num_threads()

    def striped(self) -> Striped:
        """The weight for many positions."""
        return self.made(Striped, lambda: striped(self._packed, self.places))

    def forget_strips(self) -> None:
        """Give back what `striped` took, until it is asked for again."""
        self._made.pop(Striped, None)

    def made(self, kind: type[T], make: Callable[[], T]) -> T:
        """What is made of the weight when it is first asked for, and made anew when the weight has changed. While the
        module is traced nobody can see whether it has: operators are told what it was made of."""
        found = self._made.get(kind)  # once: another thread may forget it
        if found is None or not (torch.compiler.is_compiling() or self._holds(found)):
            with torch.inference_mode(False):
                for name, part in self._buffers.items():
                    if part is not None and part.is_inference():  # which would not count its changes
                        self._buffers[name] = part.clone()
                parts = tuple(part for part in self._buffers.values() if part is not None)
                found = self._made[kind] = Made(parts, tuple(part._version for part in parts), make())
        thing: T = found.thing
        return thing

    def _holds(self, made: Made) -> bool:
        """Is it of the weight as it is now?"""
        parts = [part for part in self._buffers.values() if part is not None]
        return len(parts) == len(made.parts) and all(
            part is then and part._version == version
            for part, then, version in zip(parts, made.parts, made.versions, strict=True)
        )

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not all(map(self._holds, list(self._made.values()))):
            self._made = Cache()
            self.settle()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": Cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.settle()

    @property
    def places(self) -> int:
        """How many places the kernel of a convolution has."""
        return 1


class SparseExpert(SparseLinear):
    """An expert of a mixture, in place of its slice of a 3-D parameter.

    The parameter becomes a list of these. The architecture's own forward (experts_implementation "eager") does with
    the list what it did with the parameter, `linear(x, weight[e])` or `x @ weight[e]`, and so routing, activations
    and biases stay its business.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(args) == 2:
            x, expert = args
            if isinstance(expert, cls) and expert.transposed == (function is not functional.linear) and not kwargs:
                return expert(x)
        raise ModelError(f"the experts of this architecture cannot run packed ({function}): unpack the model first.")


class _Untrainable(torch.autograd.Function):
    """Looking at the outputs of a packed model with gradients enabled is fine; asking for gradients is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedModule) -> Tensor:
        ctx.shape = x.shape
        return module.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return no_gradient(gradients[0], ctx.shape), None


@torch.library.custom_op("prunella::no_gradient", mutates_args=())
def no_gradient(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Refuses. An operator, since torch.compile looks at the backward pass of what it only runs forward."""
    raise TrainingError


@no_gradient.register_fake
def _(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    return gradient.new_empty(tuple(shape))


class DenseLinear(nn.Linear):
    """A linear layer that stays dense in a packed model, such as the output head: one token at memory speed."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type != "cpu"
            or self.weight.dtype != torch.bfloat16
            or (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        ):
            return functional.linear(x, self.weight, self.bias)
        y: Tensor = dense_linear(x, self.weight)
        return y if self.bias is None else y + self.bias
