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
from torch import Tensor

from .. import pattern
from ..compat import quiet_transformers, revert
from ..errors import InputError, ModelError, disk_error, say
from ..grid import Grid
from ..layers import Slot, find_layers
from ..model.files import copy_companions
from ..model.names import find_directory
from ..model.open import load_model
from ..tensors import (
    GRIDS,
    MASKS,
    mask_shapes,
    read_grids,
    read_masks,
    save_tensors,
    write_grids,
    write_masks,
)
from ..workshop import finished, workshop
from .bench import bench
from .files import PackedCheckpoint, PackedFiles, module_names, write_index, write_json
from .format import PARTS, SPAN, check_options, groups, mask_of, stored_bits


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


@contextlib.contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory while the context lasts, OUT once it has ended well. What a command that was killed left goes:
    nothing in it took long."""
    finished(out)
    shop = workshop(out, resume=False)
    try:
        shop.model.mkdir()
        yield shop.model
        shop.appear(out)
    except OSError as error:
        raise disk_error(error, shop.directory) from None
    finally:
        shop.close()


def _copy_companions(source: Path, out: Path) -> None:
    copy_companions(source, out, but=["config.json"])
    for path in source.glob("*.md"):
        shutil.copyfile(path, out / path.name)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{directory / 'config.json'}' cannot be read: {error}.") from None
    return config


def packed_config(directory: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a packed model; None for a directory that holds none."""
    if not (Path(directory) / "config.json").is_file():
        return None
    config = _read_config(Path(directory)).get("quantization_config")
    return config if isinstance(config, dict) and config.get("quant_method") == "prunella" else None


# ---------------------------------------------------------------------------------------------------------
# Pack and unpack


def pack_model(
    model: str,
    out: str | Path,
    bits: int | None = None,
    group: int = SPAN,
    *,
    head: bool = False,
    remote_code: bool = False,
) -> PackResult:
    """Write a pruned model with its pruned weights packed (docs/format.md).

    Args:
        model: directory (or any other name) of a pruned model; which weights were pruned says its prunella.masks,
            or where there is none, their zeros.
        out: directory for the packed model; appears when it is whole.
        bits: None keeps the values (and `unpack_model` gives the same bytes back); 8 or 4 rounds them. Layers that
            a step quantized already (prunella.grids) are packed on their own grid, without a second rounding,
            unless `bits` says another width.
        group: inputs that share a scale, a multiple of 128; 0: all of a row.
        head: round the embedding and the output head too, to 8 bits: in a small model they are most of what is left.
        remote_code: run Python that comes with the model.
    Raises:
        PrunellaError: anything about the input that the user can mend.
    """
    check_options(bits, group)
    directory, out = find_directory(model), Path(out)
    if packed_config(directory) is not None:
        raise InputError(f"'{model}' is packed already.")
    if (directory / "adapter").is_dir():
        say(f"the adapter in '{directory / 'adapter'}' stays behind: it fits the model as it is now, not packed")
    opened = load_model(str(directory), device="cpu", remote_code=remote_code)
    grids = {name: grid for name, grid in read_grids(directory).items() if bits in (None, stored_bits(grid))}
    known = mask_shapes(directory) if (directory / MASKS).is_file() else None
    with _directory(out) as partial:
        files = PackedFiles(partial, opened, bits, group, head)
        stayed: dict[str, Tensor] = {}  # masks of layers that stay dense
        for index, name in enumerate(opened.blocks):
            with opened.block(index) as block:
                slots = {slot.name: slot for slot in find_layers(block, name)}
                given = None if known is None else read_masks(directory, slots.keys() & known.keys())
                masks = {n: m for n, s in slots.items() if (m := _mask(s, given)) is not None}
                for layer in masks.keys() & grids.keys():
                    _check_grid(slots[layer], grids[layer])
                written = files.write(index, masks, grids)
                stayed |= {layer: pattern.pack(masks[layer]) for layer in written["stayed"]}
        files.complete()
        found = files.contents
        if not found.modules:
            raise InputError(f"nothing in '{model}' can be packed: no layer is sparse enough. Prune it first.")
        _copy_companions(directory, partial)
        files.finish(_read_config(directory))
        if known is not None and stayed:
            write_masks(partial / MASKS, stayed, known)
        write_grids(partial / GRIDS, {name: grids[name] for name in found.stayed if name in grids})
    layers = sum(len(module_names(name, about)) for name, about in found.modules.items() if not about.get("dense"))
    return PackResult(layers, found.dense, found.packed, tuple(found.stayed))


def _mask(slot: Slot, known: dict[str, Tensor] | None) -> Tensor | None:
    """Where the weight is kept, by its mask if masks are `known`, else by its zeros; None for a weight that is not
    pruned. Without a mask a negative zero counts as kept, so that the same bytes come back; where a mask prunes, it
    becomes a plain zero."""
    weight_OI = slot.read()
    if known is None:
        integers = {2: torch.int16, 4: torch.int32}[weight_OI.element_size()]
        nonzero_OI = weight_OI.contiguous().view(integers) != 0
        return None if bool(nonzero_OI.all()) else nonzero_OI
    mask_OI = known.get(slot.name)
    if mask_OI is None:
        return None
    if mask_OI.shape != weight_OI.shape:
        raise ModelError(
            f"the mask of '{slot.name}' has shape {tuple(mask_OI.shape)}, its weight {tuple(weight_OI.shape)}."
        )
    if bool(((weight_OI != 0) & ~mask_OI).any()):
        raise ModelError(
            f"weights of '{slot.name}' that its mask prunes are not zero: the model was changed after it was pruned."
            f" Delete {MASKS} to pack it by its zeros."
        )
    return mask_OI


def _check_grid(slot: Slot, grid: Grid) -> None:
    weight_OI = slot.read()
    rows, columns = slot.shape
    if grid.scale_OG.shape != (rows, groups(columns, grid.group)) or not torch.equal(grid.round(weight_OI), weight_OI):
        raise ModelError(
            f"'{slot.name}' does not lie on the grid that it was quantized to: the model was changed after it was"
            f" pruned. Delete {GRIDS} to pack it as it is, or round it again with --bits."
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
    checkpoint = PackedCheckpoint(directory, settings.modules, settings.bits, settings.group)
    whole = _read_config(directory)
    del whole["quantization_config"]
    dtype = getattr(torch, str(whole.get("dtype") or whole.get("torch_dtype") or "bfloat16"))
    owner = {module: name for name, about in settings.modules.items() for module in module_names(name, about)}
    network = _empty(directory) if len(owner) > len(settings.modules) else None
    layers = sum(not settings.modules[name].get("dense") for name in owner.values())
    masks: dict[str, Tensor] = {}  # as bits
    shapes: dict[str, tuple[int, int]] = {}
    if (directory / MASKS).is_file():  # of layers that stayed dense
        shapes = mask_shapes(directory)
        masks = {layer: pattern.pack(mask_OI) for layer, mask_OI in read_masks(directory).items()}
    grids = read_grids(directory)
    done: set[str] = set()
    with _directory(out) as partial:
        for file, stored in checkpoint.files.items():
            parts = {key: owner.get(key.rpartition(".")[0]) for key in stored if key.endswith(PARTS)}
            plain = [key for key in stored if parts.get(key) is None]
            with checkpoint.open(plain) as slices:
                tensors: dict[str, Tensor] = {key: slices[key][...] for key in plain}
            for name in dict.fromkeys(name for name in parts.values() if name is not None and name not in done):
                done.add(name)
                about = settings.modules[name]
                for module, one in ({} if about.get("dense") else checkpoint.packed(name)).items():
                    layer = about.get("layer", name) + module.removeprefix(name)  # as the network calls it
                    masks[layer] = pattern.pack(mask_of(one.mask, one.columns))
                    shapes[layer] = one.rows, one.columns
                    if one.bits is not None and one.scales is not None:
                        grids[layer] = Grid(one.bits, one.group, one.scales)
                weight = checkpoint.weight(name, dtype)
                if "experts" in about:  # under the names that the architecture's files have
                    tensors |= revert(network, {name: weight})
                else:
                    tensors[f"{name}.weight"] = weight
            save_tensors(partial / file, tensors)
        missing = settings.modules.keys() - done
        if missing:
            raise ModelError(f"packed tensor '{min(missing)}.weight_values' is missing.")
        write_index(partial)
        write_masks(partial / MASKS, masks, shapes)
        write_grids(partial / GRIDS, grids)
        _copy_companions(directory, partial)
        write_json(partial / "config.json", whole)
    return layers


def _empty(directory: Path) -> Any:
    """The network of a packed model without weights, not packed."""
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    with accelerate.init_empty_weights(), quiet_transformers():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


__all__ = ["PackResult", "bench", "pack_model", "packed_config", "unpack_model"]
