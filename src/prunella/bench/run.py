"""Latency and throughput of a network of any task but text: dense, packed, and in other engines, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, say, unknown
from ..machine import threaded
from ..samples import size_of
from ..sparse.bench import held_bytes
from ..sparse.format import SPAN
from ..sparse.kernels import instructions
from .engines import Case, check_engines, open_engines
from .memory import resident_bytes
from .shapes import SHAPES
from .sides import Sides, open_sides, random_batch
from .turns import in_turns


def bench_network(
    model: str | None = None,
    *,
    random: str | None = None,
    sparsity: float = 0.5,
    bits: int | None = None,
    group: int = SPAN,
    head: bool = False,
    batch: Sequence[int] = (1,),
    length: int | None = None,
    threads: Sequence[int] | None = None,
    rounds: int = 5,
    seconds: float = 0.3,
    beside: Sequence[str] = (),
    memory: bool = False,
    remote_code: bool = False,
) -> dict[str, Any]:
    """How long a network takes for a batch, dense beside packed, and how far their outputs are apart.

    Args:
        model: directory of a pruned or packed network of any task but `text`.
        random: in place of a model, random weights of this shape (a name in `SHAPES`), pruned by magnitude.
        sparsity: of random weights, in each layer.
        bits, group, head: as for `pack_model`; a packed directory is measured as it is.
        batch: numbers of samples that go together.
        length: tokens of a text; None: 128, or as many as the network takes. Of other networks None.
        threads: numbers of threads; None: as torch is set.
        rounds: turns of all sides; seconds: how long a turn takes, at least.
        beside: other engines, names in `engines.ENGINES`.
        memory: measure it too, in a process for each side, which takes a while.
    Returns:
        Plain data: {"model", "task", "dtype", "sparsity", "instructions", "bytes", "memory", "rows", "refused"}:
        bytes:   {"dense", "packed"}, of the tensors that the networks are stored as
        memory:  the same, of all that a network holds when it has run the largest batch; only if it was asked for
        rows:    one for each batch, number of threads and side, {"batch", "threads", "side", "min", "low", "median",
                 "high" (seconds; low and high are quartiles), "calls", "throughput" (samples a second, by the median),
                 "speedup" (the dense median over its own), "difference" (`difference` from the dense outputs)}
        refused: {engine: why it cannot run the network}
    Raises:
        PrunellaError: anything about the input that the user can mend.
    """
    if (model is None) == (random is None):
        raise InputError("give a model or a shape for random weights (--random), one of the two.")
    if random is not None and random not in SHAPES:
        raise InputError(unknown("shape", random, SHAPES))
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity:g} is out of range: 0 up to, not including, 1.")
    numbers = {"batch": batch, "threads": threads or [1], "rounds": [rounds]}
    numbers |= {} if length is None else {"length": [length]}
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise InputError(f"{name} is at least 1.")
    check_engines(beside)
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with (
        open_sides(model, random, sparsity, bits=bits, group=group, head=head, remote_code=remote_code) as sides,
        tempfile.TemporaryDirectory(prefix="prunella-bench-") as scratch,
    ):
        batches = [random_batch(sides.model, size, length) for size in batch]  # all, before the first is measured
        for number, samples in enumerate(batches):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            case = Case(sides.model, samples, folder)
            for count in threads or [before]:
                with threaded(count):
                    names = [name for name in beside if name not in refused]
                    found, failed = measured(sides, case, count, names, rounds, seconds)
                rows, refused = rows + found, refused | failed
        held = {
            side: resident_bytes(directory, max(batch), length, (threads or [before])[0])
            for side, directory in sides.directories.items()
            if memory
        }
        return {
            "model": model or random,
            "task": sides.model.task.name,
            "dtype": str(sides.model.dtype)[6:],
            "sparsity": sides.sparsity,
            "instructions": (instructions() or ["none"])[0],
            "bytes": {"dense": held_bytes(sides.model.network), "packed": held_bytes(sides.packed)},
            **({"memory": held} if memory else {}),
            "rows": rows,
            "refused": refused,
        }


def measured(
    sides: Sides, case: Case, threads: int, beside: Sequence[str], rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each side, and why some engines cannot run the network, which is said."""
    runs = {"dense": case.call(sides.model.network), "packed": case.call(sides.packed)}
    more, failed = open_engines(beside, case, threads)
    for name, why in failed.items():
        say(f"{name} cannot run this network, and is left out: {why}")
    runs |= more
    wanted = fractions(runs["dense"]())
    apart = {name: difference(fractions(call()), wanted) for name, call in runs.items()}
    times = in_turns(runs, rounds, seconds)
    base, size = times["dense"].quantile(0.5), size_of(case.batch)
    rows = [
        {
            "batch": size,
            "threads": threads,
            "side": name,
            **found.plain(),
            "throughput": size / found.quantile(0.5),
            "speedup": base / found.quantile(0.5),
            "difference": apart[name],
        }
        for name, found in times.items()
    ]
    return rows, failed


def fractions(found: Sequence[Any]) -> list[Tensor]:
    """The tensors of fractions among what a call puts out, in float32."""
    every = [torch.as_tensor(one) for one in found]
    return [tensor.float() for tensor in every if tensor.is_floating_point()]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest |y - y'| over the largest |y'| of a tensor, of all tensors the largest; NaN where either has NaN."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("nan")
    found = [
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in zip(ours, theirs, strict=True)
    ]
    return max(found, default=0.0) if all(value == value for value in found) else float("nan")
