"""What this machine has: devices, their memory and random numbers, and a directory for what is made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from .errors import InputError


def cache_directory() -> Path:
    """Where converted models and sampled texts are kept: $PRUNELLA_CACHE, or prunella/ in the user's cache."""
    if path := os.environ.get("PRUNELLA_CACHE"):
        return Path(path)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunella"
    except RuntimeError:
        raise InputError("this user has no home directory for the cache: set PRUNELLA_CACHE to a directory.") from None


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        torch.zeros(1, device=device).item()  # `meta` is one too, but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for it
        raise InputError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}.") from None
    return device


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; of main memory where the device has none of its own or does not report them."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(psutil.virtual_memory().available if ask is None else ask(device)[0])


def most_memory(device: torch.device) -> int:
    """Most bytes that were allocated on a device; 0 where it has no memory of its own or does not report it."""
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0 if ask is None else int(ask(device))


LARGER = 8  # times as much goes at a time on an accelerator


def at_a_time(size: int, device: torch.device) -> int:
    """How much goes at a time where `size` of it suits the caches of a CPU: on an accelerator, which small pieces leave
    idle, more."""
    return size if device.type == "cpu" else size * LARGER


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 are made in float32 inside, whatever is set: a GPU would make them of 10 bits (TF32), which
    is too little for what is summed to be factored."""
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    if device.type == "cpu":
        yield
        return
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def keep_random(device: torch.device) -> Callable[[], None]:
    """What puts the generators of the CPU and of this device back to where they are now."""
    host, there = torch.get_rng_state(), None
    if device.type not in ("cpu", "meta"):
        there = torch.get_device_module(device).get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(host)
        if there is not None:
            torch.get_device_module(device).set_rng_state(there, device)

    return restore


def fork_random(device: torch.device) -> AbstractContextManager[None]:
    """Inside, random numbers may be drawn: afterwards the generators of the CPU and of this device are as before. Other
    devices are not touched."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
