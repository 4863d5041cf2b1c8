"""Weights in safetensors files, zeros and all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..layers import Slot
from ..model.checkpoint import Checkpoint
from ..model.cut import inside
from ..model.files import SINGLE, files_in, read_json
from ..outcome import BlockResult
from ..tensors import CODES, FLOATS, GRIDS, INDEX, MASKS, TensorFile, write_grids, write_index, write_json
from ..waits import sent
from .registry import Store, register_store


@register_store("dense")
class DenseStore(Store):
    """Files laid out like the source's own, so that tensors which no step touched are copied byte for byte; the masks
    of all pruned layers, and the grids of the quantized ones."""

    def create(self, slots: Sequence[Slot]) -> None:
        checkpoint = self.model.checkpoint
        if checkpoint is not None:
            keep = self.model.dtype == checkpoint.dtype()
            code = CODES[self.model.dtype]
            for name, tensors in checkpoint.files.items():
                if keep and name not in checkpoint.altered:
                    TensorFile.like(self.folder / name, checkpoint.directory / name).close()
                else:
                    ordered = sorted(tensors.items(), key=lambda item: item[1][2])
                    layout = {key: (t[0] if keep or t[0] not in FLOATS else code, t[1]) for key, t in ordered}
                    TensorFile.create(self.folder / name, layout, checkpoint.metadata[name]).close()
        sizes = {slot.name: ("U8", [-(-slot.shape[0] * slot.shape[1] // 8)]) for slot in slots}
        shapes = json.dumps({slot.name: list(slot.shape) for slot in slots})
        TensorFile.create(self.folder / MASKS, sizes, {"shapes": shapes}).close()

    def open(self) -> None:
        checkpoint = self.model.checkpoint
        self.files = {name: TensorFile.reopen(self.folder / name) for name in (checkpoint.files if checkpoint else ())}
        self.masks = TensorFile.reopen(self.folder / MASKS)

    def close(self) -> None:
        for file in (*self.files.values(), self.masks):
            file.close()

    def write(self, result: BlockResult) -> dict[str, Any]:
        return self.begin(result)()

    def begin(self, result: BlockResult) -> Callable[[], dict[str, Any]]:
        if self.model.checkpoint is None:
            return partial(self._put, result, frozenset(), [], list)
        changed = self._stored(result.name, result.changed)
        plan = self.model.plan().items()
        held = frozenset(name for name, (parameter, _) in plan if inside(parameter, result.name))
        return partial(self._put, result, held, list(changed), sent(list(changed.values())))

    def _put(
        self, result: BlockResult, held: frozenset[str], names: list[str], arrived: Callable[[], list[Tensor]]
    ) -> dict[str, Any]:
        """Write a block: what changed, under these names, and what else is `held` in its files."""
        tensors: dict[str, list[str]] = {}
        where = self.model.checkpoint.where if self.model.checkpoint is not None else {}
        for name, tensor in zip(names, arrived(), strict=True):
            self.files[where[name]].write(name, tensor)
        for name in sorted(held.difference(names)):
            self._copy(name)
        for name in sorted(held.union(names)):
            tensors.setdefault(where[name], []).append(name)
        for name, mask in result.masks.items():
            self.masks.write(name, mask)
        write_grids(self.aside / f"{GRIDS}-{result.index}", result.grids)
        for file in tensors:
            self.files[file].sync()
        self.masks.sync()
        return {"tensors": tensors, "masks": list(result.masks)}

    def write_outside(self, changed: Mapping[str, Tensor]) -> None:
        assert self.model.checkpoint is not None
        for name, tensor in self._stored("", changed).items():
            self.files[self.model.checkpoint.where[name]].write(name, tensor)

    def _stored(self, block: str, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of a block as the tensors that they are in the files."""
        assert self.model.checkpoint is not None
        where = self.model.checkpoint.where
        found = self.model.stored(block, dict(changed))
        return {name: self.files[where[name]].cast(name, tensor) for name, tensor in found.items()}

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        for file, names in entry["tensors"].items():
            self.files[file].written.update(names)
        self.masks.written.update(entry["masks"])

    def complete(self) -> None:
        checkpoint = self.model.checkpoint
        if checkpoint is None:
            self.model.task.save(self.model, self.folder)
            return
        for name, file in checkpoint.where.items():
            if name not in self.files[file].written:
                self._copy(name)
        for target in self.files.values():
            target.sync()

    def _copy(self, name: str) -> None:
        """Take a tensor that no step touched from the source: its bytes, unless its dtype changes."""
        checkpoint = self.model.checkpoint
        assert checkpoint is not None
        file = checkpoint.where[name]
        code, _, start, end = checkpoint.files[file][name]
        if self.files[file].tensors[name][0] == code and name not in checkpoint.scales:
            self.files[file].copy(name, checkpoint.directory / file, start, end)
        else:
            with checkpoint.open([name]) as slices:
                self.files[file].write(name, slices[name][...])

    def finish(self) -> None:
        checkpoint, index = self.model.checkpoint, self.folder / INDEX
        if checkpoint is not None and list(checkpoint.files) != [SINGLE]:
            content = read_json(checkpoint.directory / INDEX)
            same = set(content.get("weight_map", {}).values()) == checkpoint.files.keys()
            if checkpoint.altered or not same or "metadata" not in content:  # without which transformers reads none
                write_index(self.folder)
            elif self.model.dtype != checkpoint.dtype():
                content["metadata"]["total_size"] = self.source.nbytes
                write_json(index, content)
            else:
                shutil.copyfile(checkpoint.directory / INDEX, index)
        self.merge_grids()

    @property
    def source(self) -> Checkpoint:
        return Checkpoint(self.folder, files_in(self.folder))  # an index comes last

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        return Checkpoint(directory)
