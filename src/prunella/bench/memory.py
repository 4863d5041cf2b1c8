"""How much memory a network takes, with all that it makes when it runs: `python -m prunella.bench.memory DIR BATCH`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import ModelError
from ..samples import in_dtype
from ..sparse.checkpoint import packed_config
from ..tasks import open_model
from .sides import random_batch


def resident_bytes(directory: Path, batch: int = 1, length: int | None = None, threads: int = 1) -> int:
    """By how much a process grows by a network in this directory, packed or not, that has run a batch.

    The process loads it twice, since the first one brings code with it. Raises ModelError where it fails.
    """
    words = [str(directory), str(batch), str(length or 0), str(threads)]
    done = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise ModelError(f"the memory of '{directory}' cannot be measured: {said[-1]}")
    return int(done.stdout.split()[-1])


def _running(stack: contextlib.ExitStack, directory: str, batch: int, length: int | None) -> Any:
    """A network that has run, and what it was run on."""
    packed = packed_config(Path(directory)) is not None
    model = open_model(directory, device="cpu", packed=packed)
    network = model.network if packed else stack.enter_context(model.whole())
    model.give_back()
    network.eval()
    samples: Mapping[str, torch.Tensor] = in_dtype(random_batch(model, batch, length), model.dtype)
    with torch.inference_mode():
        for _ in range(2):
            model.task.run(network, samples)
    return model


def _held() -> int:
    """Bytes that this process holds, what it freed being given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Print the bytes that a process grows by, for the arguments that `resident_bytes` gave it."""
    directory, batch, length, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        first = _running(stack, directory, batch, length or None)
        before = _held()
        second = _running(stack, directory, batch, length or None)
        print(_held() - before)
        del first, second


if __name__ == "__main__":
    main()
