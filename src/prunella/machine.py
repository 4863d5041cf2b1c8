"""What this machine has: devices, their memory and random numbers, and a directory for what is made once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from .errors import InputError


def cache_directory() -> Path:
    """Where converted models and sampled texts are kept: $PRUNELLA_CACHE, or prunella/ in the user's cache."""
    if path := os.environ.get("PRUNELLA_CACHE"):
        return Path(path)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunella"
    except RuntimeError:
        raise InputError("this user has no home directory for the cache: set PRUNELLA_CACHE to a directory.") from None


@contextlib.contextmanager
def threaded(count: int | None) -> Iterator[None]:
    """torch and the kernels run on so many threads; None: on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        module = getattr(torch, device.type, None)  # of accelerators: those that torch has none for fail below
        count = getattr(module, "device_count", lambda: None)()
        if count is not None and device.type != "cpu" and (count == 0 or (device.index or 0) >= count):
            kind = device.type.upper()
            raise RuntimeError(
                f"this PyTorch sees no {kind} device" if count == 0 else f"this PyTorch sees {count}, numbered from 0"
            )
        torch.zeros(1, device=device).item()  # `meta` is one too, but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for it
        raise InputError(f"device '{name}' cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from None
    return device


def in_double(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the host where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; of main memory where the device has none of its own or does not report them."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(psutil.virtual_memory().available if ask is None else ask(device)[0])


def most_memory(device: torch.device) -> int:
    """Most bytes that were allocated on a device; 0 where it has no memory of its own or does not report it."""
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0 if ask is None else int(ask(device))


def pins(device: torch.device) -> bool:
    """Do copies between this device and main memory go by themselves where that is pinned?"""
    return device.type == "cuda"


def pinned(like: Tensor) -> Tensor:
    """Pinned main memory for a tensor of a device."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def queued(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given up to now, in any thread."""
    event: Any = torch.get_device_module(device).Event()
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


def ran_out(error: BaseException) -> bool:
    """Is an error that a device's memory ran out? MPS has no kind of its own for that, nor have NVIDIA's libraries."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and (
            "MPS backend out of memory" in said or "STATUS_ALLOC_FAILED" in said or "cudaErrorMemoryAllocation" in said
        )
    )


def forget(device: torch.device) -> None:
    """Give memory back that torch holds on a device for tensors that are gone."""
    if give := getattr(torch.get_device_module(device), "empty_cache", None):
        give()


def widest(device: torch.device) -> torch.dtype:
    """The most exact numbers that a device computes with."""
    return torch.float32 if device.type == "mps" else torch.float64


LARGER = 8  # times as much goes at a time on an accelerator


def at_a_time(size: int, device: torch.device) -> int:
    """How much goes at a time where `size` of it suits the caches of a CPU: on an accelerator, which small pieces leave
    idle, more."""
    return size if device.type == "cpu" else size * LARGER


@contextlib.contextmanager
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
    """What puts the generators of the CPU and of this device back to where they are now. Other devices are not
    touched."""
    host = torch.get_rng_state()
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    of = () if device.type == "mps" else (device,)  # there is but one of those, which is not named
    there = None if module is None else module.get_rng_state(*of)

    def restore() -> None:
        torch.set_rng_state(host)
        if module is not None:
            module.set_rng_state(there, *of)

    return restore


@contextlib.contextmanager
def fork_random(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn: afterwards the generators of the CPU and of this device are as before. Other
    devices are not touched."""
    restore = keep_random(device)
    try:
        yield
    finally:
        restore()
