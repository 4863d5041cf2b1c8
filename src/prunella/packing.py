"""A pruned model packed, and a packed one plain again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pattern
from .compat import quiet_transformers, revert
from .errors import InputError, ModelError, disk_error, say
from .grid import Grid
from .layers import Slot, check_found, find_layers
from .model.files import SINGLE, copy_companions, read_json
from .model.names import find_directory
from .outcome import BlockResult
from .save import REPORT
from .sparse.checkpoint import packed_config
from .sparse.format import (
    ORDER,
    PARTS,
    SPAN,
    Packed,
    check_options,
    groups,
    layer_names,
    mask_of,
    module_names,
    parameter_name,
    stored_bits,
)
from .store.packed import PackedStore
from .tasks import open_model
from .tensors import (
    GRIDS,
    MASKS,
    mask_shapes,
    read_grids,
    read_masks,
    save_tensors,
    write_grids,
    write_index,
    write_json,
    write_masks,
    write_text,
)
from .workshop import Workshop, finished, workshop


@dataclass(frozen=True)
class PackResult:
    """What packing did, in bytes of the packed weights: `dense` before, `packed` after; `kept` are the names of
    layers that stayed dense, `expanded` those of convolutions that are packed on disk only: a model that is loaded has
    them dense."""

    layers: int
    dense: int
    packed: int
    kept: tuple[str, ...]
    expanded: tuple[str, ...] = ()


@contextlib.contextmanager
def _making(out: Path) -> Iterator[Workshop]:
    """A directory while the context lasts, OUT once it has ended well. What a command that was killed left goes:
    nothing in it took long."""
    finished(out)
    shop = workshop(out, resume=False)
    try:
        shop.model.mkdir()
        yield shop
        shop.appear(out)
    except OSError as error:
        raise disk_error(error, shop.directory) from None
    finally:
        shop.close()


def _copy_companions(source: Path, out: Path) -> None:
    copy_companions(source, out)
    for path in source.glob("*.md"):
        shutil.copyfile(path, out / path.name)


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
        bits: None keeps the values (and `unpack_model` gives the same numbers back); 8 or 4 rounds them. Layers that
            a step quantized already (prunella.grids) are packed on their own grid, without a second rounding,
            unless `bits` says another width.
        group: inputs that share a scale, a multiple of 128; 0: all of a row.
        head: round the embedding and the output head too, to 8 bits: in a small model they are most of what is left.
        remote_code: run Python that comes with the model.
    Raises:
        PrunellaError: anything about the input that the user can mend.
    """
    check_options(bits, group)
    directory, out = _directory(model), Path(out)
    if packed_config(directory) is not None:
        raise InputError(f"'{model}' is packed already.")
    if (directory / "adapter").is_dir():
        say(f"the adapter in '{directory / 'adapter'}' stays behind: it fits the model as it is now, not packed")
    opened = open_model(str(directory), device="cpu", remote_code=remote_code)
    if opened.checkpoint is None or opened.checkpoint.directory != directory:
        raise InputError(f"'{model}' is opened by task '{opened.task.name}' in a way of its own, and cannot be packed.")
    grids = {name: grid for name, grid in read_grids(directory).items() if bits in (None, stored_bits(grid))}
    known = mask_shapes(directory) if (directory / MASKS).is_file() else None
    check_found(known or (), (slot for name in opened.blocks for slot in find_layers(opened.module(name), name)))
    with _making(out) as shop:
        store = PackedStore(shop.model, shop.directory, opened, bits=bits, group=group, round_head=head)
        for index, block in opened.walk():
            slots = {slot.name: slot for slot in find_layers(block.module, block.name)}
            given = None if known is None else read_masks(directory, slots.keys() & known.keys())
            masks = {n: m for n, s in slots.items() if (m := _mask(s, given)) is not None}
            for layer in masks.keys() & grids.keys():
                _check_grid(slots[layer], grids[layer])
            bits_of = {layer: pattern.pack(mask_OI) for layer, mask_OI in masks.items()}
            store.write(BlockResult(index, block.name, (), bits_of, grids, {}, 0.0))
        store.complete()
        found = store.contents
        if not found.modules:
            raise InputError(f"nothing in '{model}' can be packed: no layer is sparse enough. Prune it first.")
        _copy_companions(directory, shop.model)
        store.finish()
        if known is None:  # no masks went in: none come out
            (shop.model / MASKS).unlink(missing_ok=True)
    layers = sum(len(layer_names(name, about)) for name, about in found.modules.items() if not about.get("dense"))
    return PackResult(layers, found.dense, found.packed, tuple(found.stayed), tuple(found.expanded))


def _directory(model: str | Path) -> Path:
    """Where a model lies. One that Prunella wrote needs no config.json: its task knows how it is built."""
    return Path(model) if (Path(model) / REPORT).is_file() else find_directory(str(model))


def _mask(slot: Slot, known: dict[str, Tensor] | None) -> Tensor | None:
    """Where the weight is kept, by its mask if masks are `known`, else by its zeros; None for a weight that is not
    pruned. A negative zero, as `weight * mask` leaves them, is a zero, and becomes a plain one."""
    weight_OI = slot.read()
    if known is None:
        nonzero_OI = weight_OI != 0
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


def load_packed(model: str | Path, **opening: Any) -> nn.Module:
    """The network of a packed directory, whatever it is for and whatever library it is of, ready to run: its weights
    stay packed in memory.

    Args:
        model: the directory, or a hub id.
        opening: as for `open_model`: device, dtype, remote_code.

    Raises:
        InputError: it is not packed.
        ModelError: its files are damaged, or packed from another network.

    >>> import prunella
    >>> network = prunella.load_packed("packed")  # doctest: +SKIP
    """
    if packed_config(_directory(model)) is None:
        raise InputError(f"'{model}' is not packed: prunella.open_model opens it, or the library that it is of.")
    network: nn.Module = open_model(str(model), packed=True, **opening).network
    return network


def unpack_model(model: str, out: str | Path) -> int:
    """Write a packed model as a plain one, masks included; returns the number of unpacked layers. Without --bits
    its weights are the very bytes that were packed. Raises PrunellaError."""
    directory, out = Path(model), Path(out)
    checkpoint = PackedStore.read(directory)
    modules = checkpoint.modules
    config = read_json(directory / "config.json")
    del config["quantization_config"]
    said = config.get("dtype") or config.get("torch_dtype")
    sharded = "model_type" in config  # other libraries than transformers read one file
    dtype = getattr(torch, said or "bfloat16") if said or sharded else checkpoint.dtype()
    owner = {module: name for name, about in modules.items() for module in module_names(name, about)}
    network = _empty(directory) if len(owner) > len(modules) else None
    layers = sum(len(layer_names(name, about)) for name, about in modules.items() if not about.get("dense"))
    masks: dict[str, Tensor] = {}  # as bits
    shapes: dict[str, tuple[int, int]] = {}
    if (directory / MASKS).is_file():  # of layers that stayed dense
        shapes = mask_shapes(directory)
        masks = {layer: pattern.pack(mask_OI) for layer, mask_OI in read_masks(directory).items()}
    grids = read_grids(directory)
    done: set[str] = set()
    every: dict[str, Tensor] = {}  # of a model that is one file
    with _making(out) as shop:
        for file, stored in checkpoint.files.items():
            parts = {key: owner.get(key.rpartition(".")[0]) for key in stored if key.endswith(PARTS)}
            plain = [key for key in stored if parts.get(key) is None]
            with checkpoint.open(plain) as slices:
                tensors: dict[str, Tensor] = {key: slices[key][...] for key in plain}
            for name in dict.fromkeys(name for name in parts.values() if name is not None and name not in done):
                done.add(name)
                about = modules[name]
                for layer, mask_OI, grid in () if about.get("dense") else _layers(name, about, checkpoint.packed(name)):
                    masks[layer], shapes[layer] = pattern.pack(mask_OI), (mask_OI.shape[0], mask_OI.shape[1])
                    if grid is not None:
                        grids[layer] = grid
                weight = {(key := parameter_name(name, about)): checkpoint.parameter(key, dtype)}
                # a mixture's under the names that the architecture's files have
                tensors |= revert(network, weight) if "experts" in about else weight
            every |= {} if sharded else tensors
            if sharded:
                save_tensors(shop.model / file, tensors)
        missing = modules.keys() - done
        if missing:
            raise ModelError(f"packed tensor '{min(missing)}.weight_values' is missing.")
        if sharded:
            write_index(shop.model)
        else:
            metadata = {key: value for about in checkpoint.metadata.values() for key, value in about.items()}
            text = metadata.pop("config.json", "")
            known = json.loads(metadata.pop(ORDER, "[]"))
            order = [*(name for name in known if name in every), *sorted(every.keys() - set(known))]
            save_tensors(shop.model / SINGLE, {name: every[name] for name in order}, metadata)
        write_masks(shop.model / MASKS, masks, shapes)
        write_grids(shop.model / GRIDS, grids)
        _copy_companions(directory, shop.model)
        if not sharded and text and json.loads(text) == config:  # its own spelling
            write_text(shop.model / "config.json", text)
        elif config:
            write_json(shop.model / "config.json", config)
        else:  # it had none before it was packed
            (shop.model / "config.json").unlink()
    return layers


def _layers(
    name: str, about: Mapping[str, Any], packed: Mapping[str, Packed]
) -> Iterator[tuple[str, Tensor, Grid | None]]:
    """The layers that an entry holds, as the network calls them: their masks, and grids if they have some."""
    names = layer_names(name, about)
    count = len(names) // len(packed)
    for number, one in enumerate(packed.values()):
        own = names[number * count : (number + 1) * count]
        masks = mask_of(one.mask, one.columns).chunk(len(own))
        scales = [None] * len(own) if one.scales is None else one.scales.chunk(len(own))
        for layer, mask_OI, scale_OG in zip(own, masks, scales, strict=True):
            yield layer, mask_OI, None if scale_OG is None else Grid(one.bits or 0, one.group, scale_OG)


def _empty(directory: Path) -> Any:
    """The network of a packed model without weights, not packed."""
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    with accelerate.init_empty_weights(), quiet_transformers():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
