"""Where hidden states wait between two blocks: on the device, in main memory, on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Key
from .errors import disk_error
from .machine import free_memory, pinned, pins
from .samples import rows_of
from .tensors import claim
from .trees import map_tensors


class Shelf:
    """A place for tensors, of `nbytes` in all, that wait to be used on a device: the device itself while they fit; else
    main memory; else files of a folder, which disappear with the process. The space of a file is claimed before it is
    written. Raises InputError where the disk is too small."""

    def __init__(self, nbytes: int, device: torch.device, folder: Path):
        main = torch.device("cpu")
        self.place = main if device.type != "cpu" and nbytes >= free_memory(device) // 4 else device
        self.on_disk = self.place.type == "cpu" and nbytes > free_memory(main) // 2
        self.folder = folder

    def put(self, value: Tensor, old: Tensor | None = None) -> Tensor:
        """Put a tensor there, in the room of an old one if that has the same shape and dtype.

        What comes from a device into main memory is pinned, if that helps the device: then it may still be on its way,
        and is to be read on that device alone, whose work is done in order."""
        if not self.on_disk and (value.device.type == self.place.type or not pins(value.device)):
            return value.to(self.place)
        fits = old is not None and old.shape == value.shape and old.dtype == value.dtype
        if not self.on_disk:
            room = old if fits and old is not None and old.is_pinned() else pinned(value)
            return room.copy_(value, non_blocking=True)
        if old is None or not fits:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with NamedTemporaryFile(prefix=".hidden-", dir=self.folder) as file:
                    claim(file.fileno(), value.numel() * value.element_size())
                    flat = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
            except OSError as error:
                raise disk_error(error, self.folder) from None
            old = flat.view(value.shape)
        return old.copy_(value)


class Hidden:
    """The hidden states of all samples between two blocks: one tensor (B, …) a batch, on a shelf. If the network is a
    single block, its whole output.

    calls:  for each batch, how the blocks are called, of the stacks that it has entered
    beside: what travels with each batch, see calls.py
    left:   the states that left each stack which has been passed
    """

    def __init__(self, batches: int, device: torch.device, shelf: Shelf):
        self._items: list[Any] = [None] * batches
        self.calls: list[list[Call]] = [[] for _ in range(batches)]
        self.beside: list[dict[Key, Any]] = [{} for _ in range(batches)]
        self.left: list[list[Any]] = []
        self.device = device
        self.shelf = shelf

    def __len__(self) -> int:
        return len(self._items)

    def copy(self, shelf: Shelf | None = None) -> Hidden:
        """Another one with the same states, which then move by themselves, and may wait on another shelf."""
        other = copy.copy(self)
        other.shelf = shelf or self.shelf
        other._items = [None] * len(self)
        other.calls = [list(calls) for calls in self.calls]
        other.beside = list(self.beside)
        other.left = list(self.left)
        for index in range(len(self)):
            other[index] = self[index]  # by way of the device, see `Shelf.put`
        return other

    def holds(self, index: int) -> bool:
        """Has this batch entered?"""
        return self._items[index] is not None

    def split(self, index: int, sizes: Sequence[int], dimension: int) -> None:
        """Batches of so many samples in the place of one, beside which nothing travels; their calls are not known."""

        def part(value: Any, number: int) -> Any:
            start, every = sum(sizes[:number]), sum(sizes)
            return map_tensors(value, lambda tensor: rows_of(tensor, dimension, every, start, sizes[number]))

        for items in (self._items, *self.left):
            items[index : index + 1] = [part(items[index], number) for number in range(len(sizes))]
        self.calls[index : index + 1] = [[] for _ in sizes]
        self.beside[index : index + 1] = [{} for _ in sizes]

    def leave(self) -> None:
        """Keep the states, which have left a stack, and make room for those that enter the next one."""
        self.left.append(self._items)
        self._items = [None] * len(self)
        self.beside = [{} for _ in self._items]

    def shelf_for(self, copies: int) -> Shelf:
        """Where so many copies of these states can wait."""
        return Shelf(self[0].nbytes * len(self) * copies, self.device, self.shelf.folder)

    def states(self, index: int) -> list[Any]:
        """Of one batch, the states that left each stack that has been passed."""
        return [map_tensors(items[index], self._here) for items in self.left]

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def __getitem__(self, index: int) -> Any:
        return map_tensors(self._items[index], self._here)

    def move(self, index: int, state: Any, beside: Mapping[Key, Any]) -> None:
        """One batch has passed a block, with what travels beside it."""
        self[index] = state
        self.beside[index] = {key: map_tensors(value, self.shelf.put) for key, value in beside.items()}

    def __setitem__(self, index: int, value: Any) -> None:
        old = self._items[index]
        if isinstance(value, Tensor):
            self._items[index] = self.shelf.put(value, old if isinstance(old, Tensor) else None)
        else:
            self._items[index] = map_tensors(value, self.shelf.put)
