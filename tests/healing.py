"""Pruned models, small enough to heal in a second, and recipes that do so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import prunella
from prunella.layers import find_layers
from prunella.model.network import Model
from prunella.tasks.text import wrap_model

SETTINGS: dict[str, Any] = {
    "calibration": {"samples": 4, "length": 32},
    "evaluate": {"source": None},
    "heal": {"tokens": 1024, "length": 32, "batch": 4, "micro": 2, "held_out": 4, "evaluations": 2},
}


def settings(**heal: Any) -> dict[str, Any]:
    """A recipe that heals in a few steps."""
    return {**SETTINGS, "heal": {**SETTINGS["heal"], **heal}}


def prune_in_memory(network: Any) -> tuple[Model, dict[str, Tensor]]:
    """Half of each layer's smallest weights set to zero, and the masks."""
    model, masks = wrap_model(network), {}
    for block in model.blocks:
        for slot in find_layers(model.module(block), block):
            weight_OI = slot.read()
            masks[slot.name] = prunella.keep(weight_OI.abs().float(), 0.5)
            weight_OI.masked_fill_(~masks[slot.name], 0)
    return model, masks


def zeros_of(directory: Path) -> dict[str, Tensor]:
    """{layer: where its stored weight is zero}."""
    model = prunella.load_model(str(directory))
    found = {}
    with model.whole():
        for block in model.blocks:
            for slot in find_layers(model.module(block), block):
                found[slot.name] = slot.read() == 0
    return found
