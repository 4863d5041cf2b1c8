"""The products with packed weights as torch operators, `torch.ops.prunella`.

    sparse_linear   x W^T for a packed W: in C for few tokens; for many, tiles of rows are expanded in C and
                    multiplied by torch; on GPUs the same in Triton (gpu.py)
    rounded_linear  the same for a W of 8 bits of which nothing is left out
    dense_linear    x W^T for a dense bfloat16 W and few tokens, at the speed of memory (torch's own product of one
                    token reaches half of it)

Where the C kernels were not compiled, where Triton is missing, and on other devices, torch does all the work; that
is slow, and said aloud.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import native
from ..errors import InputError, say, unknown
from ..fast import differentiable
from .arguments import KINDS, rounded_arguments, rows_of_tile, sparse_arguments, weight_arguments
from .format import FLOATS, Packed, Rounded, unpack
from .measured import forget

FEW = 16  # up to so many tokens a row is multiplied as it is expanded
TILE = 1 << 26  # bytes of dense weights that are expanded at a time for more: torch's product likes large ones best

_PAGE = 1 << 21  # bytes of a large page

POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_WEIGHT = (INT, LONG, LONG, POINTER, POINTER, POINTER, LONG, POINTER, LONG)
_SIGNATURES = {
    "prunella_product": (*_WEIGHT, POINTER, POINTER, INT, LONG, INT),
    "prunella_expand": (*_WEIGHT, LONG, LONG, POINTER, INT, INT),
    "prunella_dense": (LONG, LONG, POINTER, POINTER, POINTER, INT, LONG, INT),
    "prunella_block_in": (*[POINTER] * 7, INT),
    "prunella_block_out": (*[POINTER] * 5, LONG, POINTER, POINTER, INT),
    "prunella_blocks": (POINTER, LONG, *[POINTER] * 4, LONG, POINTER, INT),
    "prunella_plan": (POINTER, LONG, INT),
    "prunella_generate": (POINTER, *[LONG] * 5, POINTER, LONG, POINTER, POINTER),
    "prunella_seal": (POINTER, LONG),
    "prunella_unseal": (POINTER, LONG),
    "prunella_read": (POINTER, LONG, INT),
    "prunella_use": (ctypes.c_char_p,),
    "prunella_isa": (INT,),
    "prunella_has": (INT,),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels for the best instructions of this processor; None, said once, where there are none."""
    found = native.library()
    if found is None:
        say("the C kernels were not compiled (no C compiler when Prunella was installed): packed models run slowly")
        return None
    for name, types in _SIGNATURES.items():
        getattr(found, name).argtypes = types
    found.prunella_read.restype = ctypes.c_uint64
    found.prunella_isa.restype = ctypes.c_char_p
    found.prunella_generate.restype = LONG
    found.prunella_seal.restype = POINTER
    if found.prunella_isa(found.prunella_use(None)) == b"portable":
        say(
            "this processor has none of the instructions that the C kernels are written for (AVX2, AVX-512, NEON):"
            " packed models run slowly"
        )
    return found


def instructions() -> list[str]:
    """The instruction sets that kernels were compiled for and this processor has, best first."""
    kernels = library()
    if kernels is None:
        return []
    names: list[str] = []
    while name := kernels.prunella_isa(len(names)):
        names.append(name.decode())
    return [name for number, name in enumerate(names) if kernels.prunella_has(number)]


def use(name: str | None = None) -> None:
    """Run on these instructions from now on; None: the best. Raises InputError if this processor lacks them."""
    kernels = library()
    if kernels is not None and kernels.prunella_use(name.encode() if name else None) < 0:
        raise InputError(unknown("instruction set", str(name), instructions()))
    forget()  # which ways were the fastest


def read_bandwidth(data: Tensor) -> int:
    """A sum over the bytes of `data` by as many threads as torch uses: only to time how fast it can be read."""
    kernels = library()
    if kernels is None:
        return int(data.view(torch.uint8).sum(dtype=torch.int64))
    total: int = kernels.prunella_read(data.data_ptr(), data.numel() * data.element_size(), torch.get_num_threads())
    return total


def resident(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies of these tensors side by side in one stretch of memory, on pages as large as the system has: where pages
    are small, finding them takes a fifth of the time in which a weight is read. (A tensor that was loaded from a file
    may still lie in it, at an odd address.)"""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        yield from (tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
        return
    memory = mmap.mmap(-1, sum(t.nbytes + 64 for t in tensors) + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    at = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    for tensor in tensors:
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)  # holds `memory`
        yield copy.view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 64) * 64


# ---------------------------------------------------------------------------------------------------------
# Operators


def _multiply(kernels: ctypes.CDLL, x: Tensor, weight: tuple[Any, ...]) -> Tensor:
    """x W^T for a weight as the C functions take it."""
    rows, columns, x = weight[1], weight[2], x.contiguous()
    shape, tokens = (*x.shape[:-1], rows), x.numel() // columns
    kind, threads = KINDS[x.dtype], torch.get_num_threads()
    if tokens <= FEW:
        y = x.new_empty(shape)
        succeed(kernels.prunella_product(*weight, x.data_ptr(), y.data_ptr(), kind, tokens, threads))
        return y
    step = rows_of_tile(rows, columns, x, TILE)
    take = _new_tile if differentiable(x) else _kept_tile  # torch remembers the tile for the gradient of x
    parts_TR = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        tile_RI = take((last - first) * columns * x.element_size()).view(x.dtype).view(-1, columns)
        succeed(kernels.prunella_expand(*weight, first, last, tile_RI.data_ptr(), kind, threads))
        parts_TR.append(functional.linear(x.view(tokens, columns), tile_RI))
    return (parts_TR[0] if len(parts_TR) == 1 else torch.cat(parts_TR, 1)).view(shape)


def expand(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (O, I), dense, as `unpack` makes it. Raises ValueError where its parts do not fit."""
    kernels = library()
    if kernels is None or packed.values.device.type != "cpu":
        return unpack(packed, dtype)
    parts = (packed.mask, packed.offsets, packed.values, packed.scales, packed.columns, packed.group)
    weight = weight_arguments(dtype, *parts)
    weight_OI = torch.empty(packed.rows, packed.columns, dtype=dtype)
    to, threads = weight_OI.data_ptr(), torch.get_num_threads()
    succeed(kernels.prunella_expand(*weight, 0, packed.rows, to, KINDS[dtype], threads))
    return weight_OI


def _new_tile(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


class _Kept(threading.local):
    tile: Tensor | None = None


_kept = _Kept()


def _kept_tile(size: int) -> Tensor:
    """So many bytes, this thread's own, kept for the next time (up to TILE of them in each thread): to take them from
    the system again and again would cost more than to expand a weight into them."""
    if _kept.tile is None or len(_kept.tile) < size:
        _kept.tile = _new_tile(size)
    return _kept.tile[:size]


def check_floating(x: Tensor) -> None:
    """Raises ValueError for integers, whose dtype would cut off what a weight is."""
    if not x.is_floating_point():
        raise ValueError(f"a packed weight is multiplied with floating-point numbers, not {x.dtype}")


def _sparse(
    x: Tensor, mask: Tensor, offsets: Tensor, values: Tensor, scales: Tensor | None, columns: int, group: int
) -> Tensor:
    """x W^T by torch."""
    check_floating(x)
    return functional.linear(x, unpack(Packed(mask, offsets, values, scales, columns, group), x.dtype))


def _rounded(x: Tensor, values: Tensor, scales: Tensor, group: int) -> Tensor:
    """x W^T by torch."""
    check_floating(x)
    rows, columns = values.shape
    step = rows_of_tile(rows, columns, x, TILE)
    tiles = [Rounded(values[r : r + step], scales[r : r + step], group) for r in range(0, rows, step)]
    return torch.cat([functional.linear(x, tile.dense(x.dtype)) for tile in tiles], -1)


def _on_cpu(by_torch: Callable[..., Tensor], arguments: Callable[..., tuple[Any, ...]], values: int) -> Any:
    """The operator in C, for a weight of these parts, of which number `values` has the values."""

    def run(x: Tensor, *parts: Any) -> Tensor:
        kernels = library()
        if kernels is None or x.dtype not in FLOATS or not parts[values].numel():
            return by_torch(x, *parts)
        return _multiply(kernels, x, arguments(x, *parts))

    return run


def _on_gpu(by_torch: Callable[..., Tensor], name: str, values: int) -> Any:
    """The operator in Triton."""

    def run(x: Tensor, *parts: Any) -> Tensor:
        gpu = _gpu()
        if gpu is None or x.dtype not in FLOATS or not parts[values].numel():
            return by_torch(x, *parts)
        y: Tensor = getattr(gpu, name)(x, *parts)
        return y

    return run


@functools.cache
def _gpu() -> ModuleType | None:
    """gpu.py; None, said once, where Triton is missing."""
    try:
        from . import gpu
    except ImportError:
        say("Triton is not installed (it comes with PyTorch for CUDA): packed models run slowly on this GPU")
        return None
    return gpu


def _dense_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:
    kernels = library()
    tokens = x.numel() // max(1, x.shape[-1])
    if (
        kernels is None
        or tokens > 4
        or x.dtype != torch.bfloat16
        or weight.dtype != torch.bfloat16
        or weight.ndim != 2
        or x.shape[-1] != weight.shape[1]
        or not weight.is_contiguous()
    ):
        return functional.linear(x, weight)
    rows, columns = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    succeed(
        kernels.prunella_dense(
            rows, columns, weight.data_ptr(), x.data_ptr(), y.data_ptr(), 1, tokens, torch.get_num_threads()
        )
    )
    return y


def _shape(x: Tensor, first: Tensor, *parts: Any) -> Tensor:
    """What the product is like: the second of a sparse weight's parts has one entry more than rows."""
    rows = parts[0].shape[0] - 1 if len(parts) > 2 else first.shape[0]
    return x.new_empty((*x.shape[:-1], rows))


def succeed(code: int) -> None:
    """What a C function returned. Raises MemoryError."""
    if code == -2:
        raise MemoryError("no memory for the activations of a packed product")
    assert code == 0, code


# Defined by hand and not by torch.library.custom_op, whose wrapper costs more than a small product does. Of each: its
# arguments, the way of torch, and the ways of processors.
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], dict[str, Any]]] = {
    "sparse_linear": (
        "Tensor x, Tensor mask, Tensor offsets, Tensor values, Tensor? scales, int columns, int group",
        _sparse,
        {"CPU": _on_cpu(_sparse, sparse_arguments, 2), "CUDA": _on_gpu(_sparse, "sparse_linear", 2)},
    ),
    "rounded_linear": (
        "Tensor x, Tensor values, Tensor scales, int group",
        _rounded,
        {"CPU": _on_cpu(_rounded, rounded_arguments, 0), "CUDA": _on_gpu(_rounded, "rounded_linear", 0)},
    ),
    "dense_linear": ("Tensor x, Tensor weight", functional.linear, {"CPU": _dense_linear_cpu}),
}
_library: Any = torch.library.Library("prunella", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    takes: str,
    by_torch: Callable[..., Tensor],
    ways: dict[str, Callable[..., Tensor]],
    like: Callable[..., Tensor] = _shape,
) -> None:
    """Define an operator.

    Args:
        takes:    its arguments, as torch's schemas write them
        by_torch: torch's way, for any device
        ways:     those of single devices
        like:     an empty tensor of the result's shape
    """
    _library.define(f"{name}({takes}) -> Tensor")
    _library.impl(name, by_torch, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # which sees what they are made of
    for device, way in ways.items():
        _library.impl(name, way, device)
    torch.library.register_fake(f"prunella::{name}", like, lib=_library)


for _name, _about in _OPERATORS.items():
    define(_name, *_about)

sparse_linear = torch.ops.prunella.sparse_linear
rounded_linear = torch.ops.prunella.rounded_linear
dense_linear = torch.ops.prunella.dense_linear
