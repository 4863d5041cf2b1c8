"""Checkpoints of a training: what trains, its moments, the masks if they moved, and how far it is; nothing else."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import NumericalError
from ..pattern import pack, unpack
from ..tensors import write_text

WEIGHTS, MASKS, OPTIMIZER, STATE = "model.safetensors", "masks.safetensors", "optimizer.pt", "state.json"


@dataclass
class State:
    """How far a training is."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)  # {name of `Schedule.final`: step}
    waited: int = 0  # evaluations since the best one
    schedule: dict[str, Any] = field(default_factory=dict)


class Diverged(NumericalError):
    """The loss of a step is not finite; `best` is the best checkpoint, if there is one."""

    def __init__(self, step: int, loss: float, best: Path | None):
        super().__init__(f"the loss of step {step} is {loss}.")
        self.best = best


def at(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps."""
    return folder / f"checkpoint-{step}"


def write(
    folder: Path, state: State, values: Mapping[str, Tensor], moments: Mapping[str, Any], masks: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint; those that are neither the newest nor the best of a name go."""
    here = at(folder, state.step)
    here.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, here / WEIGHTS)
    torch.save(moments, here / OPTIMIZER)
    if masks:
        save_file({name: pack(mask).cpu() for name, mask in masks.items()}, here / MASKS)
    write_text(here / STATE, json.dumps(asdict(state)))  # last: with it the checkpoint is whole
    kept = {state.step, *state.best.values()}
    for step, path in _all(folder):
        if step not in kept:
            shutil.rmtree(path)


def masks(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The masks in a checkpoint, of tensors of these shapes; none where they never moved."""
    bits = load_file(folder / MASKS) if (folder / MASKS).is_file() else {}
    rows = {name: (shapes[name][:-1].numel(), shapes[name][-1]) for name in bits}
    return {name: unpack(packed, rows[name]).view(shapes[name]) for name, packed in bits.items()}


def newest(folder: Path) -> tuple[Path, State] | None:
    """The newest checkpoint that is whole."""
    for _, path in reversed(_all(folder)):
        with contextlib.suppress(OSError, ValueError, TypeError):
            said = json.loads((path / STATE).read_text(encoding="utf-8"))
            said["held_out"] = {int(step): loss for step, loss in said["held_out"].items()}
            return path, State(**said)
    return None


def _all(folder: Path) -> list[tuple[int, Path]]:
    """By step, the newest last."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)
