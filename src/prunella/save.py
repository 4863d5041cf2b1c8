"""The output directory: written block by block, whole or not there at all.

While a run lasts everything is in `OUT.partial` (`workshop`). The weights go into safetensors files laid out
like the source's own, tensor by tensor at their places, so that tensors which no step touched are copied byte
for byte. A line in the journal says that a block is on disk. At the end the model is renamed to `OUT`; what a
run that resumes needs lies beside it and goes after that.

Beside what transformers needs, the directory holds

    prunella.json    the report
    prunella.masks   of all pruned layers (`tensors.read_masks`)
    prunella.grids   of quantized layers (`tensors.read_grids`)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import InputError, disk_error
from .layers import Slot
from .model.checkpoint import Checkpoint
from .model.files import SINGLE, copy_companions, files_in, read_json
from .model.network import Model
from .outcome import BlockResult, LayerResult
from .pattern import unpack
from .sparse.files import PackedFiles, write_index
from .tensors import (
    CODES,
    FLOATS,
    GRIDS,
    INDEX,
    MASKS,
    TensorFile,
    grids_in,
    masks_in,
    write_grids,
    write_masks,
    write_text,
)
from .workshop import RUN, Workshop

REPORT = "prunella.json"
JOURNAL = "journal.jsonl"  # of a directory in the making: what is done


class _DenseFiles:
    """Weights of a run in safetensors files laid out like the source's own, the masks of all pruned layers, and the
    grids of the quantized ones."""

    def __init__(self, shop: Workshop, model: Model):
        self.folder, self.aside, self.model = shop.model, shop.directory, model

    def create(self, slots: Sequence[Slot]) -> None:
        """Lay out all files for a fresh run."""
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
        names = checkpoint.files if checkpoint else ()
        self.files = {name: TensorFile.reopen(self.folder / name) for name in names}
        self.masks = TensorFile.reopen(self.folder / MASKS)

    def close(self) -> None:
        for file in (*self.files.values(), self.masks):
            file.close()

    def write(self, result: BlockResult) -> dict[str, Any]:
        """Put a block on disk; what `restore` takes."""
        tensors: dict[str, list[str]] = {}
        if self.model.checkpoint is not None:
            where, plan = self.model.checkpoint.where, self.model.plan()
            changed = self.model.stored(result.name, result.changed)
            for name, tensor in changed.items():
                self.files[where[name]].write(name, tensor)
            inside = {name for name, (parameter, _) in plan.items() if parameter.startswith(result.name + ".")}
            for name in sorted(inside - changed.keys()):
                self._copy(name)
            for name in sorted(inside | changed.keys()):
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
        for name, tensor in self.model.stored("", dict(changed)).items():
            self.files[self.model.checkpoint.where[name]].write(name, tensor)

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        """Take a block as written, by an earlier run."""
        for file, names in entry["tensors"].items():
            self.files[file].written.update(names)
        self.masks.written.update(entry["masks"])

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder, files_in(self.folder))

    def complete(self) -> None:
        """Copy what no block holds."""
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
        """Bring what lies beside the weights into its last form."""
        checkpoint, index = self.model.checkpoint, self.folder / INDEX
        if checkpoint is not None and list(checkpoint.files) != [SINGLE]:
            content = read_json(checkpoint.directory / INDEX)
            same = set(content.get("weight_map", {}).values()) == checkpoint.files.keys()
            if checkpoint.altered or not same or "metadata" not in content:  # without which transformers reads none
                write_index(self.folder)
            elif self.model.dtype != checkpoint.dtype():
                content["metadata"]["total_size"] = self.checkpoint.nbytes
                write_text(index, json.dumps(content, indent=2) + "\n")
            else:
                shutil.copyfile(checkpoint.directory / INDEX, index)
        _merge_grids(self.aside, self.folder)


class _PackedFiles:
    """Weights of a run in the packed format, and the masks and grids of those pruned layers that stay dense."""

    def __init__(self, shop: Workshop, model: Model, bits: int | None, group: int, head: bool):
        self.folder, self.aside, self.model = shop.model, shop.directory, model
        self.files = PackedFiles(shop.model, model, bits, group, head)

    def create(self, slots: Sequence[Slot]) -> None:
        pass  # how large a block will be shows when it is packed

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def write(self, result: BlockResult) -> dict[str, Any]:
        shapes = {layer.name: layer.shape for layer in result.layers}
        masks = {name: unpack(bits, shapes[name]) for name, bits in result.masks.items()}
        entry = self.files.write(result.index, masks, result.grids)
        stayed = {name: result.masks[name] for name in entry["stayed"]}
        if stayed:
            write_masks(self.aside / f"{MASKS}-{result.index}", stayed, shapes)
            grids = {name: grid for name, grid in result.grids.items() if name in stayed}
            write_grids(self.aside / f"{GRIDS}-{result.index}", grids)
        return entry

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        self.files.restore(index, entry)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.files.checkpoint

    def complete(self) -> None:
        self.files.complete()

    def finish(self) -> None:
        network = self.model.network
        if self.model.checkpoint is None:
            network.config.save_pretrained(self.folder)
            if network.can_generate():
                network.generation_config.save_pretrained(self.folder)
        config = _read_config(self.folder)
        if self.model.checkpoint is None:
            config |= {"architectures": [type(network).__name__], "dtype": str(self.model.dtype)[6:]}
        self.files.finish(config)
        masks: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for part in sorted(self.aside.glob(f"{MASKS}-*")):
            shapes |= masks_in(part)
            masks |= load_file(part)
        if masks:
            write_masks(self.folder / MASKS, masks, shapes)
        _merge_grids(self.aside, self.folder)


def _merge_grids(aside: Path, folder: Path) -> None:
    parts = sorted(aside.glob(f"{GRIDS}-*"))
    write_grids(folder / GRIDS, {name: grid for part in parts for name, grid in grids_in(part).items()})


class Output:
    """A run's output directory in the making, in a workshop that closing or discarding it closes too.

    finished: results of blocks that an earlier, interrupted run left on disk (their masks and parameters are
              in the files)
    blocks:   how many blocks are on disk now
    packing:  None for plain weights; (bits, group, head) to pack them, see `sparse.files.PackedFiles`
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        slots: Sequence[Slot],
        identity: Mapping[str, Any],
        shop: Workshop,
        packing: tuple[int | None, int, bool] | None = None,
    ):
        self.path = path
        self.shop = shop
        self.partial = shop.directory
        self.folder = shop.model
        self.model = model
        self.weights: _DenseFiles | _PackedFiles
        self.weights = _PackedFiles(shop, model, *packing) if packing else _DenseFiles(shop, model)
        self.finished: list[tuple[LayerResult, ...]] = []
        self.notes: dict[str, Any] = {}
        identity = json.loads(json.dumps(identity))
        try:
            if (before := begun_as(shop)) is None:
                shop.clear()
                shop.model.mkdir()
                self.weights.create(slots)
                write_text(self.partial / RUN, json.dumps(identity, indent=1))
            else:
                compare(identity, before, self.partial)
            self.weights.open()
            self._read_journal()
            self.blocks = len(self.finished)
            # Not buffered: on a full disk what a buffer holds would be written again, in vain, when it is closed.
            self._journal = (self.partial / JOURNAL).open("ab", buffering=0)
        except OSError as error:
            raise disk_error(error, self.partial) from None

    def _read_journal(self) -> None:
        path = self.partial / JOURNAL
        good = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                good += len(line)
                if "note" in entry:
                    self.notes[entry["note"]] = entry["value"]
                else:
                    self.finished.append(tuple(_layer_result(item) for item in entry["layers"]))
                    self.weights.restore(entry["block"], entry["weights"])
            os.truncate(path, good)  # half a line, if the run was killed while it wrote one

    def _log(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(entry).encode() + b"\n")
        while line:
            line = line[self._journal.write(line) :]
        os.fsync(self._journal.fileno())

    def note(self, key: str, value: Any) -> None:
        """Keep a result of this run (the dense perplexity, say), so that a resumed run need not repeat it."""
        self.notes[key] = value
        try:
            self._log({"note": key, "value": value})
        except OSError as error:
            raise disk_error(error, self.partial) from None

    @property
    def checkpoint(self) -> Checkpoint:
        """The pruned weights written so far, readable like any checkpoint."""
        return self.weights.checkpoint

    def write(self, result: BlockResult) -> None:
        """Put one finished block on disk, whole: a run that resumes reads it from here. Raises InputError if the
        disk is full; the blocks before are safe."""
        try:
            entry = {"block": result.index, "layers": [asdict(layer) for layer in result.layers]}
            self._log({**entry, "weights": self.weights.write(result)})
            self.blocks += 1
        except OSError as error:
            raise disk_error(error, self.partial) from None

    def write_outside(self, changed: Mapping[str, Tensor]) -> None:
        """Put parameters that no block holds on disk: embeddings, the head, the last norm."""
        assert isinstance(self.weights, _DenseFiles)
        try:
            self.weights.write_outside(changed)
        except OSError as error:
            raise disk_error(error, self.partial) from None

    def complete(self) -> None:
        """Copy what no block holds: after this `checkpoint` is a whole model."""
        try:
            self.weights.complete()
        except OSError as error:
            raise disk_error(error, self.partial) from None

    def finish(self, report: Mapping[str, Any], card: str) -> None:
        """Add everything that is not weights and let the directory appear."""
        try:
            self._copy_companions()
            self.weights.finish()
            write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n")
            write_text(self.folder / "README.md", card)
        except OSError as error:
            raise disk_error(error, self.partial) from None
        self.weights.close()
        self._journal.close()
        self.shop.appear(self.path)

    def _copy_companions(self) -> None:
        checkpoint = self.model.checkpoint
        if checkpoint is None:
            if self.model.tokenizer is not None:
                self.model.tokenizer.save_pretrained(self.folder)
            return
        copy_companions(checkpoint.directory, self.folder, but=(REPORT, RUN))
        if self.model.tokenizer_given:
            self.model.tokenizer.save_pretrained(self.folder)
        config = _read_config(self.folder)
        if self.model.dtype != checkpoint.dtype() or {"quantization_config", "transformers_weights"} & config.keys():
            config.pop("quantization_config", None)
            config.pop("transformers_weights", None)  # the index says it
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.model.dtype).removeprefix("torch.")
            write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def close(self) -> None:
        """Let go of the files and of the workshop. What is on disk stays, for a run that resumes this one."""
        self.weights.close()
        self._journal.close()
        self.shop.close()

    def discard(self) -> None:
        """Remove all traces of the run."""
        self.shop.remove()


def _read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def identity(
    checkpoint: Checkpoint | None,
    recipe: Mapping[str, Any],
    windows: Sequence[Tensor],
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """What must be the same for one run to continue another. Models and texts count by what is in them and not by their
    names, which may be spelled in many ways; what is measured in the end changes nothing before."""
    calibration = {key: value for key, value in recipe["calibration"].items() if key != "source"}
    heal = {key: value for key, value in recipe["heal"].items() if key not in ("text", "dense")}
    tokens = hashlib.sha256()
    for windows_NL in windows:
        tokens.update(windows_NL.cpu().numpy().tobytes())
    said = {key: value for key, value in recipe.items() if key not in ("model", "evaluate")}
    found = {"model files": model_files(checkpoint), "dense model files": model_files(teacher)}
    said |= {"calibration": calibration, "heal": heal, "calibration tokens": tokens.hexdigest()}
    return {**said, **found, "torch": torch.__version__}


def model_files(checkpoint: Checkpoint | None) -> dict[str, list[int]] | None:
    """Sizes and times of a model's files."""
    if checkpoint is None:
        return None
    stats = {name: (checkpoint.directory / name).stat() for name in checkpoint.files}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def begun_as(shop: Workshop) -> dict[str, Any] | None:
    """What the unfinished run in a workshop is, if it has begun."""
    path = shop.directory / RUN
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' is damaged ({error}): delete '{shop.directory}' and begin anew.") from None
    return said


def compare(identity: Mapping[str, Any], before: Mapping[str, Any], where: Path) -> None:
    """Raises InputError, saying in what they differ, if a run is not the one that is unfinished there."""
    different = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
    if different:
        raise InputError(
            f"the unfinished run in '{where}' was another one: {', '.join(different)} differ. Repeat its"
            " command with --resume, or delete that directory."
        )


def _layer_result(item: Mapping[str, Any]) -> LayerResult:
    return LayerResult(**{**item, "shape": tuple(item["shape"]), "notes": tuple(item["notes"])})
