"""The compiled kernels (sparse/csrc), loaded once."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import say

VERSION = 8  # of the functions that the library exports; the same number stands in sparse/csrc/api.c


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library with the C kernels, or None where it was not built.

    It borrows the threads of the OpenMP runtime that torch has loaded: a second runtime in the process would
    keep a second set of threads spinning beside torch's.
    """
    built = Path(__file__).parent / f"sparse/_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.is_file():
        return None
    try:
        found = ctypes.CDLL(str(built))
        version = found.prunella_version()
    except (OSError, AttributeError):  # built for another machine, or long ago
        version = None
    if version != VERSION:
        say("the C kernels were built for another version of Prunella: install it again (pip install -e .)")
        return None
    parallel = _openmp()
    if parallel is not None:
        found.prunella_threads(parallel)
    found.prunella_use(None)  # the best instructions of this processor
    return found


def _openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel of torch's OpenMP runtime (LLVM's and Intel's have it too)."""
    candidates: list[str | None] = [None]
    candidates += [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))]
    for name in candidates:
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def call(function: Any, *arguments: Tensor | ctypes.Array[Any] | int | float | bool | None) -> None:
    """Call a C function with tensors and arrays as pointers, floats as float and integers as int64_t, and with the
    number of threads (int) as its last argument. Raises MemoryError."""

    def convert(value: Tensor | ctypes.Array[Any] | int | float | bool | None) -> Any:
        if isinstance(value, Tensor):
            assert value.device.type == "cpu", value.device
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, float):
            return ctypes.c_float(value)
        return ctypes.c_int64(value) if isinstance(value, int) else value

    code = function(*map(convert, arguments), torch.get_num_threads())
    if code == -2:
        raise MemoryError("no memory for a kernel's scratch space")
    assert code == 0, code
