"""The compiled kernels (sparse/csrc), loaded once."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library with the C kernels, or None where it was not built.

    It borrows the threads of the OpenMP runtime that torch has loaded: a second runtime in the process would
    keep a second set of threads spinning beside torch's.
    """
    built = sorted(Path(__file__).parent.glob("sparse/_kernels*.so"))
    if not built:
        return None
    try:
        found = ctypes.CDLL(str(built[0]))
    except OSError:  # built for another machine
        return None
    parallel = _openmp()
    if parallel is not None:
        found.prunella_threads(parallel)
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
