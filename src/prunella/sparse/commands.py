"""Whole models: pack, unpack, and measure."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import pattern
from ..errors import InputError, ModelError
from ..grid import Grid
from ..load import Checkpoint, find_directory, load_model, say
from ..save import GRIDS, MASKS, check_output, companions, read_grids, read_masks, write_grids
from ..stream import Slot, find_layers
from .bench import bench
from .format import PARTS, SPAN, VERSION, check_options, groups, mask_of, of_parts, pack, stored_bits, unpack

SHARD = 2 << 30  # bytes in a file of weights: what packing holds in memory at a time


@dataclass(frozen=True)
class PackResult:
    """What packing did, in bytes of the packed weights: `dense` before, `packed` after; `kept` are the names of
    layers that stayed dense."""

    layers: int
    dense: int
    packed: int
    kept: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------
# A directory in the making


class _Shards:
    """Tensors on their way into safetensors files of bounded size."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.where: dict[str, int] = {}
        self.files = self.pending_bytes = self.total = 0
        self.pending: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total += size

    def _flush(self) -> None:
        save_file(self.pending, self.directory / f"shard-{self.files}", metadata={"format": "pt"})
        self.where.update(dict.fromkeys(self.pending, self.files))
        self.files += 1
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the files the names that transformers looks for."""
        self._flush()
        names = ["model.safetensors"]
        if self.files > 1:
            names = [f"model-{i + 1:05d}-of-{self.files:05d}.safetensors" for i in range(self.files)]
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: names[file] for name, file in sorted(self.where.items())},
            }
            path = self.directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file, name in enumerate(names):
            (self.directory / f"shard-{file}").rename(self.directory / name)


@contextlib.contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """OUT.partial while the context lasts, OUT once it has ended well."""
    check_output(out)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise InputError(f"'{partial}' exists: another command is writing it, or was interrupted. Delete it first.")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise InputError(f"'{error.filename or partial}' cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(source: Path, out: Path) -> None:
    for path in (*companions(source), *source.glob("*.md")):
        if path.name not in ("model.safetensors.index.json", "config.json"):
            shutil.copyfile(path, out / path.name)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{directory / 'config.json'}' cannot be read: {error}.") from None
    return config


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_masks(directory: Path, masks: dict[str, Tensor]) -> None:
    """As save.py writes them."""
    bits = {name: pattern.pack(mask_OI) for name, mask_OI in masks.items()}
    shapes = {name: list(mask_OI.shape) for name, mask_OI in masks.items()}
    save_file(bits, directory / MASKS, metadata={"shapes": json.dumps(shapes)})


def packed_config(directory: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a packed model; None for a directory that holds none."""
    if not (Path(directory) / "config.json").is_file():
        return None
    config = _read_config(Path(directory)).get("quantization_config")
    return config if isinstance(config, dict) and config.get("quant_method") == "prunella" else None


# ---------------------------------------------------------------------------------------------------------
# Pack and unpack


def pack_model(model: str, out: str | Path, bits: int | None = None, group: int = SPAN) -> PackResult:
    """Write a pruned model with its pruned weights packed (docs/format.md).

    Args:
        model: directory (or any other name) of a pruned model; which weights were pruned says its prunella.masks,
            or where there is none, their zeros.
        out: directory for the packed model; appears when it is whole.
        bits: None keeps the values (and `unpack_model` gives the same bytes back); 8 or 4 rounds them. Layers that
            a step quantized already (prunella.grids) are packed on their own grid, without a second rounding,
            unless `bits` says another width.
        group: inputs that share a scale, a multiple of 128; 0: all of a row.
    Raises:
        PrunellaError: anything about the input that the user can mend.
    """
    check_options(bits, group)
    directory, out = find_directory(model), Path(out)
    if packed_config(directory) is not None:
        raise InputError(f"'{model}' is packed already.")
    opened = load_model(str(directory), device="cpu")
    masks = read_masks(directory) if (directory / MASKS).is_file() else None
    grids = {name: grid for name, grid in read_grids(directory).items() if bits in (None, stored_bits(grid))}
    checkpoint = opened.checkpoint
    assert checkpoint is not None
    slots = {s.name: s for block in opened.blocks for s in find_layers(opened.module(block), block)}
    keys = {parameter: key for key, (parameter, convert) in opened.plan().items() if not convert}
    by_key: dict[str, Slot] = {}
    kept: list[str] = []
    for slot in slots.values():
        key = keys.get(f"{slot.name}.{slot.parameter}") if slot.expert is None else None
        if masks is not None and slot.name not in masks:
            continue
        prefix = f"{opened.network.base_model_prefix}."
        if key is None or slot.name.removeprefix(prefix) != key.removesuffix(".weight").removeprefix(prefix):
            kept.append(slot.name)  # experts are parts of one parameter, not modules that could be replaced
        else:
            by_key[key] = slot
    modules: dict[str, dict[str, Any]] = {}
    dense = packed = 0
    with _directory(out) as partial:
        shards = _Shards(partial)
        for file in checkpoint.files:
            for key in checkpoint.files[file]:
                with checkpoint.open([key]) as slices:
                    tensor: Tensor = slices[key][:]
                slot_ = by_key.get(key)
                result = None
                if slot_ is not None:
                    weight_OI = tensor.T if slot_.transposed else tensor
                    mask_OI = _mask(slot_.name, weight_OI, None if masks is None else masks[slot_.name])
                    if mask_OI is not None:
                        grid = grids.get(slot_.name)
                        if grid is not None:
                            _check_grid(slot_.name, weight_OI, grid)
                        result = pack(weight_OI.contiguous(), mask_OI, bits, group, grid=grid)
                        if result.nbytes >= tensor.numel() * tensor.element_size():
                            result = None
                if result is None:
                    shards.add(key, tensor)
                    continue
                assert slot_ is not None
                for part, content in result.parts().items():
                    shards.add(f"{key.removesuffix('.weight')}.{part}", content)
                about: dict[str, Any] = {"shape": list(slot_.shape)}
                if grid is not None:
                    about |= {"bits": result.bits, "group": result.group}
                modules[key.removesuffix(".weight")] = {**about, "transposed": True} if slot_.transposed else about
                dense += tensor.numel() * tensor.element_size()
                packed += result.nbytes
        if not modules:
            raise InputError(f"nothing in '{model}' can be packed: no layer is sparse enough. Prune it first.")
        shards.finish()
        _copy_companions(directory, partial)
        config = _read_config(directory)
        config["quantization_config"] = {
            "quant_method": "prunella",
            "format_version": VERSION,
            "bits": bits,
            "group": group,
            "modules": modules,
        }
        _write_config(partial, config)
        if masks is not None and kept:
            _write_masks(partial, {name: masks[name] for name in kept})
        write_grids(partial / GRIDS, {name: grids[name] for name in kept if name in grids})
    if kept:
        say(f"{len(kept)} layers stay dense ({kept[0]} …): the experts of a mixture are not packed yet")
    return PackResult(len(modules), dense, packed, tuple(kept))


def _mask(name: str, weight_OI: Tensor, mask_OI: Tensor | None) -> Tensor | None:
    """Where the weight is kept; None for a weight without zeros. Without a mask a negative zero counts as kept, so
    that the same bytes come back; where a mask prunes, it becomes a plain zero."""
    integers = {2: torch.int16, 4: torch.int32}[weight_OI.element_size()]
    nonzero_OI = weight_OI.contiguous().view(integers) != 0
    if mask_OI is None:
        return None if bool(nonzero_OI.all()) else nonzero_OI
    if mask_OI.shape != weight_OI.shape:
        raise ModelError(f"the mask of '{name}' has shape {tuple(mask_OI.shape)}, its weight {tuple(weight_OI.shape)}.")
    if bool(((weight_OI != 0) & ~mask_OI).any()):
        raise ModelError(
            f"weights of '{name}' that its mask prunes are not zero: the model was changed after it was pruned. Delete"
            f" {MASKS} to pack it by its zeros."
        )
    return mask_OI


def _check_grid(name: str, weight_OI: Tensor, grid: Grid) -> None:
    rows, columns = weight_OI.shape
    if grid.scale_OG.shape != (rows, groups(columns, grid.group)) or not torch.equal(grid.round(weight_OI), weight_OI):
        raise ModelError(
            f"'{name}' does not lie on the grid that it was quantized to: the model was changed after it was pruned."
            f" Delete {GRIDS} to pack it as it is, or round it again with --bits."
        )


def unpack_model(model: str, out: str | Path) -> int:
    """Write a packed model as a plain one, masks included; returns the number of unpacked layers. Without --bits
    its weights are the very bytes that were packed. Raises PrunellaError."""
    directory, out = Path(model), Path(out)
    config = packed_config(directory)
    if config is None:
        raise ModelError(f"'{model}' is not a packed model: its config.json has no quantization_config of prunella.")
    from .quantizer import PrunellaConfig

    settings = PrunellaConfig(**config)
    checkpoint = Checkpoint(directory)
    whole = _read_config(directory)
    dtype = getattr(torch, str(whole.get("dtype") or whole.get("torch_dtype") or "bfloat16"))
    masks = read_masks(directory) if (directory / MASKS).is_file() else {}  # of layers that stayed dense
    grids = read_grids(directory)
    with _directory(out) as partial:
        shards = _Shards(partial)
        for key in checkpoint.where:
            name, _, part = key.rpartition(".")
            if name not in settings.modules or part not in PARTS:
                with checkpoint.open([key]) as slices:
                    shards.add(key, slices[key][:])
        for name, about in settings.modules.items():
            parts = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in checkpoint.where}
            with checkpoint.open(parts.values()) as slices:
                tensors = {part: slices[key][:] for part, key in parts.items()}
            bits, group = settings.of(name)
            packed = of_parts(name, tensors, about["shape"][1], group)
            if packed.bits != bits or [packed.rows, packed.columns] != list(about["shape"]):
                raise ModelError(f"packed weight '{name}' is not what config.json says of it. Pack the model again.")
            weight_OI = unpack(packed, None if packed.bits is None else dtype)
            shards.add(f"{name}.weight", weight_OI.T if about.get("transposed") else weight_OI)
            masks[name] = mask_of(packed.mask, packed.columns)
            if packed.bits is not None and packed.scales is not None:
                grids[name] = Grid(packed.bits, packed.group, packed.scales)
        shards.finish()
        _write_masks(partial, masks)
        write_grids(partial / GRIDS, grids)
        _copy_companions(directory, partial)
        del whole["quantization_config"]
        _write_config(partial, whole)
    return len(settings.modules)


__all__ = ["PackResult", "bench", "pack_model", "packed_config", "unpack_model"]
