"""The dense model as a teacher: which it is, and how it teaches, in memory or streamed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model.network import Model
from ..progress import Track, no_track
from ..report import Report
from ..samples import Batch, Samples
from ..train.retrain import Teacher
from ..train.shard import shard
from ..unlabelled import through


@contextlib.contextmanager
def teacher_in_memory(model: Model, sharded: bool = False) -> Iterator[Teacher]:
    """The whole dense model stays in memory, or each process's share of it, and runs beside the one that is trained."""
    with contextlib.ExitStack() as stack:
        if sharded:
            shard(model)
        else:
            stack.enter_context(model.whole())

        def outputs(numbers_B: Tensor, batch: Batch) -> Any:
            with torch.no_grad():
                return model.run(batch)

        yield outputs


@contextlib.contextmanager
def teacher_streamed(model: Model, samples: Samples, track: Track = no_track) -> Iterator[Teacher]:
    """The dense model is streamed once, block by block, over all samples; what stays is the last hidden states of each
    stack (in memory, or on disk where they do not fit) and its head."""
    stream = through(model, samples, track=track, what="teacher")
    with model.outside():

        def outputs(numbers_B: Tensor, batch: Batch) -> Any:
            return stream.outputs_of(numbers_B.tolist(), batch)

        yield outputs


def dense_name(directory: Path, said: Report | None, dense: str | None) -> str:
    """The dense model of a pruned one: what the recipe says (`dense`), or the report of the pruning. Raises
    InputError where neither does."""
    if dense is not None:
        return dense
    model = said.model if said else {}
    name, path = model.get("name"), model.get("path")
    elsewhere = said is not None and said.healing.get("source") == name  # pruned, and healed first, there
    if name is None or name == "in memory" or elsewhere:
        raise InputError(f"'{directory}' does not say which model it was pruned from: give it with --dense MODEL.")
    if path is not None and not Path(path).exists():
        raise InputError(
            f"'{directory}' was pruned from '{path}', which is not there any more: say where it is now, with"
            " --dense MODEL."
        )
    return str(path or name)


def check_dense(dense: Model, name: str, pruned: Model, directory: Path) -> None:
    """Raises InputError if a model is not the dense one of a pruned model: other parameters, or other shapes."""
    theirs = {key: value.shape for key, value in dense.network.named_parameters()}
    for key, value in pruned.network.named_parameters():
        if key not in theirs and key.endswith(".bias"):
            continue  # one that healing added
        if theirs.get(key) != value.shape:
            raise InputError(
                f"'{name}' is not the dense model of '{directory}': its '{key}' has another shape, or it has none."
                " Give the right one with --dense MODEL."
            )
