"""What a call multiplies by: of a function of torch and its arguments, the matrices and the inputs that they meet."""

from __future__ import annotations

import contextlib
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .compat import GROUPED_PRODUCT

_MATMUL, _LINEAR = "matmul", "linear"
# How a function multiplies, where its operands stand and what they are called.
_PRODUCTS: dict[Any, tuple[str, int, tuple[str, str]]] = {
    functional.linear: (_LINEAR, 0, ("input", "weight")),
    torch.matmul: (_MATMUL, 0, ("input", "other")),
    Tensor.matmul: (_MATMUL, 0, ("self", "other")),
    Tensor.__matmul__: (_MATMUL, 0, ("self", "other")),
    torch.mm: (_MATMUL, 0, ("input", "mat2")),
    Tensor.mm: (_MATMUL, 0, ("self", "mat2")),
    torch.bmm: (_MATMUL, 0, ("input", "mat2")),
    Tensor.bmm: (_MATMUL, 0, ("self", "mat2")),
    torch.addmm: (_MATMUL, 1, ("mat1", "mat2")),
    Tensor.addmm: (_MATMUL, 1, ("mat1", "mat2")),
    torch.baddbmm: (_MATMUL, 1, ("batch1", "batch2")),
    Tensor.baddbmm: (_MATMUL, 1, ("batch1", "batch2")),
}
_GROUPED = {f for f in (GROUPED_PRODUCT, getattr(functional, "grouped_mm", None)) if f is not None}
FUNCTIONS = frozenset({torch.einsum, *_GROUPED, *_PRODUCTS})  # whose calls `products` reads


@dataclass(frozen=True)
class Product:
    """One matrix (O, I) of a product, and the inputs that it meets.

    source: the tensor that they come from, and `batched` whether other matrices take part in the product
    """

    source: Tensor
    batched: bool
    weight_OI: Tensor
    x: Callable[[], Tensor]  # (T, I)


def products(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], known: Callable[[Tensor], bool]
) -> Iterator[Product]:
    """The matrices that a call multiplies by, of those operands that are `known`."""
    if function is torch.einsum:
        yield from _einsum(args, known)
    elif function in _GROUPED:
        yield from _grouped(args, kwargs, known)
    elif function in _PRODUCTS:
        kind, at, names = _PRODUCTS[function]
        operands = [args[at + i] if at + i < len(args) else kwargs.get(names[i]) for i in (0, 1)]
        left, right = operands
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.ndim < 2 or right.ndim < 2:
            return
        if known(right):  # x W
            yield from _matrices(left, left, right if kind == _LINEAR else right.mT)
        elif known(left):  # W x, weight times columns of inputs (Mamba's dt_proj)
            yield from _matrices(right, right if kind == _LINEAR else right.mT, left)


def _matrices(source: Tensor, x: Tensor, weight: Tensor) -> Iterator[Product]:
    """Of a weight (…, O, I) that meets inputs (…, T, I), with what stands before broadcast."""
    width = weight.shape[-1]
    if weight.ndim == 2:
        yield Product(source, False, weight, lambda: x.reshape(-1, width))
        return
    before: tuple[int, ...] = torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2])  # type: ignore[no-untyped-call]
    whole = x.expand(*before, *x.shape[-2:])
    weight = weight.view(*[1] * (len(before) - weight.ndim + 2), *weight.shape)
    sizes = weight.shape[:-2]

    def inputs(place: tuple[int, ...]) -> Tensor:
        where = tuple(slice(None) if n == 1 else i for i, n in zip(place, sizes, strict=True))
        return whole[where].reshape(-1, width)

    for place in product(*(range(n) for n in sizes)):
        yield Product(source, math.prod(sizes) > 1, weight[place], partial(inputs, place))


def _grouped(args: Sequence[Any], kwargs: Mapping[str, Any], known: Callable[[Tensor], bool]) -> Iterator[Product]:
    """x (T, I) in groups that end at `offs`, each with its own matrix (I, O)."""
    names = (("input", "mat_a", "self"), ("mat2", "mat_b"), ("offs",))
    x, weight, ends = (
        args[i] if i < len(args) else next((kwargs[name] for name in names[i] if name in kwargs), None)
        for i in range(3)
    )
    if x is None or weight is None or ends is None or weight.ndim != 3 or x.ndim != 2 or not known(weight):
        return
    start = 0
    for e, end in enumerate(ends.tolist()):
        yield Product(x, True, weight[e].mT, partial(x.__getitem__, slice(start, end)))
        start = end


def _einsum(args: Sequence[Any], known: Callable[[Tensor], bool]) -> Iterator[Product]:
    """Of two operands, read by their letters."""
    equation, operands = args[0], args[1:] if len(args) != 2 else args[1]
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return
    left, out = equation.replace(" ", "").split("->")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    letters = []
    for term, operand in zip(left.split(","), operands, strict=True):
        rest = operand.ndim - len(term.replace("...", "")) if "..." in term else 0
        letters.append(term.replace("...", "".join(unused[:rest][::-1])))
    longest = max((t.ndim - len(term.replace("...", "")) for t, term in zip(operands, left.split(","), strict=True)))
    out = out.replace("...", "".join(unused[: max(0, longest)][::-1]))
    for w, x in ((1, 0), (0, 1)):
        if not known(operands[w]):
            continue
        both = [c for c in letters[w] if c in letters[x]]
        batch, inputs = [c for c in both if c in out], [c for c in both if c not in out]
        outputs = [c for c in letters[w] if c not in both]
        tokens = [c for c in letters[x] if c not in both]
        if not inputs or not outputs or any(c not in out for c in (*outputs, *tokens)):
            return
        size = dict(zip(letters[w], operands[w].shape, strict=True))
        weight = operands[w].permute([letters[w].index(c) for c in (*batch, *outputs, *inputs)])
        shape = [size[c] for c in batch]
        width = math.prod(size[c] for c in inputs)
        with contextlib.suppress(RuntimeError):  # a weight whose dimensions do not fold is no matrix in memory
            weight = weight.view(*shape, -1, width)
            order = [letters[x].index(c) for c in (*batch, *tokens, *inputs)]
            yield from _matrices(operands[x], operands[x].permute(order).reshape(*shape, -1, width), weight)
        return
