"""What a healing leaves on disk and says: weights, and a report on the report of the pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluate.measure import digest
from ..layers import Slot, find_layers, survey
from ..model.cut import inside
from ..model.names import named
from ..model.network import Model
from ..outcome import BlockResult, LayerResult
from ..pattern import pack
from ..recipe import Recipe
from ..report import Report, peak_memory
from ..samples import Samples
from ..save import REPORT, Output
from .masks import slots_of


def said_of(directory: Path) -> Report | None:
    """The report of the pruning, if Prunella did it."""
    return Report.read(directory) if (directory / REPORT).is_file() else None


def calibrated(directory: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain recipe data; what it does not say of the calibration is that of the pruning."""
    report = said_of(Path(directory))
    said = report.recipe if report else {}
    own = values.get("calibration") or {}
    bos = {"bos": said["bos"]} if "bos" in said else {}
    return {**bos, **values, "calibration": {**said.get("calibration", {}), **own}}


def known(said: Report | None, directory: Path, model: Model, test: Samples | None) -> dict[str, Any] | None:
    """What the pruning measured on these samples, if nothing has touched the model since."""
    if said is None or said.healing or test is None or model.checkpoint is None:
        return None
    written = (directory / REPORT).stat().st_mtime
    touched = any((directory / file).stat().st_mtime > written for file in model.checkpoint.files)
    same = said.pruned.get("text") == digest(test) and said.model.get("dtype") == str(model.dtype)[6:]
    return said.pruned if same and not touched else None


def taught(dense: Model | None) -> dict[str, Any]:
    """How the dense model was trained before it taught, if it was."""
    report = said_of(dense.checkpoint.directory) if dense is not None and dense.checkpoint is not None else None
    did = report.healing if report else {}
    return {key: did[key] for key in ("tokens", "samples", "seconds", "held_out", "fingerprint") if key in did}


def write(model: Model, changed: Mapping[str, Tensor], masks: Mapping[str, Tensor], out: Output) -> None:
    """Put everything on disk: changed parameters, and the others as they were."""
    for index, name in enumerate(model.blocks):
        if index < out.blocks:
            continue  # written by a run that was interrupted then
        slots = find_layers(model.module(name), name)
        own = {key: value for key, value in changed.items() if inside(key, name)}
        bits = {slot.name: pack(masks[slot.name]) for slot in slots if slot.name in masks}
        out.write(BlockResult(index, name, _results(None, slots, masks), bits, {}, own, 0.0))
    outside = {key: value for key, value in changed.items() if model.block_of(key) is None}
    if model.checkpoint is None:
        return  # it is in memory, and written as a whole
    stored = {name for key, (name, _) in model.plan().items() if key in model.checkpoint.where}
    for pair in model.tied.items():  # both may be in the files
        for one, other in (pair, pair[::-1]):
            same = model.network.get_parameter(one) is model.network.get_parameter(other)
            if one in outside and other in stored and same:
                outside[other] = outside[one]
    if outside:
        out.write_outside(outside)


def report_of(
    said: Report | None,
    model: Model,
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    before: dict[str, Any],
    healing: dict[str, Any],
) -> Report:
    """The report of the pruning, with the healing; a new one for a model that was pruned elsewhere."""
    slots = slots_of(model)
    if said is None:
        about = {
            **named(healing["source"]),
            "class": type(model.network).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.parameters,
            "prunable": sum(math.prod(slot.shape) for slot in slots),
        }
        run = {"seconds": {}, "cpu_seconds": 0.0, "peak_memory": peak_memory()}
        unknown = {"perplexity": None, "sample": None}
        left = tuple(item for name in model.blocks for item in survey(model.module(name), name)[1])
        said = Report(recipe.plain(), about, unknown, before, _results(None, slots, masks), run, left_out=left)
    return replace(said, healing=healing)


def _results(said: Report | None, slots: Sequence[Slot], masks: Mapping[str, Tensor]) -> tuple[LayerResult, ...]:
    """What the report says of these layers, or what their masks say."""
    known = {layer.name: layer for layer in said.layers} if said else {}
    out = []
    for slot in slots:
        mask = masks.get(slot.name)
        share = 0.0 if mask is None else 1 - mask.count_nonzero().item() / mask.numel()
        out.append(known.get(slot.name) or LayerResult(slot.name, slot.shape, share, share, "unstructured", None, 0))
    return tuple(out)
