"""What is pruned: the masks that healing holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericalError
from ..layers import Slot, check_found, find_layers
from ..model.network import Model
from ..pattern import pack, unpack
from ..tensors import MASKS, mask_shapes, read_masks
from ..train.parts import DENSE
from ..waits import demand, together


def slots_of(model: Model) -> list[Slot]:
    """The layers of all blocks."""
    return [slot for name in model.blocks for slot in find_layers(model.module(name), name)]


class Masks(Mapping[str, Tensor]):
    """{layer: mask (O, I)}, one bit a weight in memory: a mask is unpacked each time it is asked for."""

    def __init__(self, masks: Iterable[tuple[str, Tensor]]):
        self._bits = {
            name: (pack(mask_OI).cpu(), (len(mask_OI), mask_OI.shape[1]))
            for name, mask_OI in masks
            if not mask_OI.all()
        }

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._bits[name]
        return unpack(bits, shape)

    def __contains__(self, name: object) -> bool:
        return name in self._bits  # without unpacking it

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def masks_of(model: Model, directory: Path) -> Masks:
    """{layer: mask (O, I)}: those saved with the model or, for a model pruned elsewhere, its zeros; none for a dense
    model. Raises ModelError for a mask of what is no layer."""
    if (directory / MASKS).is_file():
        names = mask_shapes(directory)
        check_found(names, slots_of(model))
        return Masks((name, read_masks(directory, [name])[name]) for name in names)
    return Masks(_zeros(model))


def full(model: Model) -> dict[str, Tensor]:
    """Masks that keep every weight, in no memory."""
    one = torch.ones((), dtype=torch.bool)
    return {slot.name: one.expand(slot.shape) for slot in slots_of(model)}


def _zeros(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Where the weights of pruned layers are not zero."""
    for _, block in model.walk():
        for slot in find_layers(block.module, block.name):
            mask_OI = slot.read() != 0
            if mask_OI.numel() - int(mask_OI.count_nonzero()) >= DENSE * mask_OI.numel():
                yield slot.name, mask_OI


def verify(model: Model, masks: Mapping[str, Tensor]) -> None:
    """Raises NumericalError, naming the layer, if a pruned weight is not zero."""
    with together():
        for slot in slots_of(model):
            if (mask_OI := masks.get(slot.name)) is not None:
                weight_OI = slot.read()
                demand(~((weight_OI != 0) & ~mask_OI.to(weight_OI.device)).any(), partial(_lost, slot.name))


def _lost(name: str) -> NumericalError:
    return NumericalError(f"layer '{name}' lost zeros while it was healed: this is a defect.")
