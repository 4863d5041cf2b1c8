"""Where hidden states wait between two blocks: on the device, in main memory, on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Key
from .errors import disk_error
from .machine import free_memory
from .tensors import claim
from .trees import map_tensors


class Shelf:
    """Where tensors of so many bytes in all wait until they are used on a device: there while they fit; otherwise in
    main memory, and if they do not fit there in files of a folder, that disappear with the process. A file's space is
    claimed before it is written: where the disk is too small it is said, as InputError."""

    def __init__(self, nbytes: int, device: torch.device, folder: Path):
        main = torch.device("cpu")
        self.place = main if device.type != "cpu" and nbytes >= free_memory(device) // 4 else device
        self.on_disk = self.place.type == "cpu" and nbytes > free_memory(main) // 2
        self.folder = folder

    def put(self, value: Tensor, old: Tensor | None = None) -> Tensor:
        """The tensor where it can wait; one that waited before gives its room if it is of the same shape."""
        if not self.on_disk:
            return value.to(self.place)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
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
    """The hidden states of all samples between two blocks, one tensor (B, …) a batch, on a shelf; behind a network that
    is one block, all that it put out.

    calls:  of each batch, how the blocks are called, as far as the stacks have been entered
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
        """Another with the same states, which may go other ways, or wait on another shelf."""
        other = copy.copy(self)
        other.shelf = shelf or self.shelf
        other._items = [None] * len(self)
        other.calls = [list(calls) for calls in self.calls]
        other.beside = list(self.beside)
        other.left = list(self.left)
        for index, item in enumerate(self._items):
            other[index] = item
        return other

    def leave(self) -> None:
        """The states have passed a stack, and stay as they are; those that enter the next one take their place."""
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

    def __setitem__(self, index: int, value: Any) -> None:
        old = self._items[index]
        if isinstance(value, Tensor):
            self._items[index] = self.shelf.put(value, old if isinstance(old, Tensor) else None)
        else:
            self._items[index] = map_tensors(value, self.shelf.put)
