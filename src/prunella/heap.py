"""What is asked of the C library's allocator. A module of its own, for it imports nothing that is slow."""

import contextlib
import ctypes
import sys


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MB of freed memory for the next tensor of up to 64 MB, in this whole process.

    It would give them back to the system and take them anew, page by page: a sixth of the time of pruning. Larger ones,
    such as the weights of a large model, are given back as before. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
