"""The weights of a packed model on disk: a file for each block, and one for all that lies outside of the blocks.

`prunella pack` and `prunella prune --format packed` both write through `PackedFiles`. What is written is read back
through `PackedCheckpoint`, block by block, as any other checkpoint is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..grid import Grid
from ..layers import Slot, find_layers
from ..model.checkpoint import Checkpoint
from ..model.files import SINGLE, files_in
from ..model.network import Model
from ..tensors import INDEX, save_tensors, write_text
from .format import (
    MARK,
    PARTS,
    SPAN,
    VERSION,
    Packed,
    Rounded,
    of_parts,
    pack,
    round_weight,
    rounded_of_parts,
    stored_bits,
    unpack,
)
from .rounded import heads


@dataclass
class Contents:
    """What packed files hold.

    modules: of config.json's quantization_config: docs/format.md
    stayed:  pruned layers that are stored dense
    dense, packed: bytes of the packed weights, before and after
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    stayed: list[str] = field(default_factory=list)
    dense: int = 0
    packed: int = 0

    def add(self, other: Contents) -> None:
        self.modules |= other.modules
        self.stayed += other.stayed
        self.dense += other.dense
        self.packed += other.packed


class PackedFiles:
    """A packed model's safetensors files in the making.

    A file appears when it is whole. Tensors that are not packed are written as they are in the model's own
    checkpoint, under the same names, in the model's dtype.

    bits, group: None, 8 or 4 bits for each value, and inputs to a scale, as `format.pack` takes them
    head:        round the embedding and the output head too, to 8 bits, nothing left out
    contents:    what the files hold so far
    """

    def __init__(self, directory: Path, model: Model, bits: int | None = None, group: int = SPAN, head: bool = False):
        self.directory, self.model, self.bits, self.group = directory, model, bits, group
        self.head = heads(model.network) if head else {}
        self.contents = Contents()
        self.done: set[int] = set()
        self.untied = False  # a head that is another than the embedding, though the config says they are one
        self.plan: Mapping[str, tuple[str, bool]]
        if model.checkpoint is not None:
            self.plan = model.plan()
        else:
            get, tied = model.network.get_parameter, model.network.all_tied_weights_keys
            same = {target for target, source in tied.items() if get(target) is get(source)}
            self.plan = {name: (name, False) for name in model.network.state_dict() if name not in same}

    def write(self, index: int, masks: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> dict[str, Any]:
        """Put block `index` on disk, those of its layers packed whose masks (bool, (O, I)) are given, on their grids
        where they have some. The block must be loaded, unless there are no masks. Returns what `restore` takes."""
        block = self.model.blocks[index]
        found = Contents()
        tensors: dict[str, Tensor] = {}
        gone: set[str] = set()
        changed: dict[str, Tensor] = {}
        for parameter, slots in _by_parameter(find_layers(self.model.module(block), block)).items():
            pruned = [slot for slot in slots if slot.name in masks]
            if not pruned:
                continue
            name = self._name(block, slots[0]) if len(pruned) == len(slots) else None
            packed = self._pack(slots, masks, grids) if name is not None else []
            kinds = {(one.bits, one.group) for one in packed}
            dense = getattr(slots[0].module, slots[0].parameter)
            size, nbytes = sum(p.nbytes for p in packed), dense.numel() * dense.element_size()
            if name is None or size >= nbytes or len(kinds) > 1:
                found.stayed += [slot.name for slot in pruned]
                changed[parameter] = dense.data
                continue
            gone.add(parameter)
            about: dict[str, Any] = {"shape": list(slots[0].shape)}
            if kinds != {self._kind(slots[0].shape[1])}:
                about["bits"], about["group"] = kinds.pop()
            if slots[0].part is not None:
                about["experts"] = len(slots)
            if slots[0].lens.transposed:
                about["transposed"] = True
            if [slot.name for slot in slots] != module_names(name, about):
                about["layer"] = parameter.removesuffix(".weight") if slots[0].part is None else parameter
            for module, content in zip(module_names(name, about), packed, strict=True):
                tensors |= {f"{module}.{part}": tensor for part, tensor in content.parts().items()}
            tensors |= self._mark(name, about, found)
            found.add(Contents({name: about}, [], nbytes, size))
        keys = [k for k, (p, _) in self.plan.items() if self.model.block_of(p) == block and p not in gone]
        tensors |= self._plain(keys)
        if changed and self.model.checkpoint is not None:
            stored = self.model.stored(block, changed)
            tensors |= {key: stored[key].to(tensors[key].dtype) for key in keys if key in stored}
        self._save(index, tensors)
        self.restore(index, entry := asdict(found))
        return entry

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        """Take block `index` as written, by an earlier run maybe."""
        self.contents.add(Contents(**entry))
        self.done.add(index)

    def complete(self) -> None:
        """Write the blocks that are not there yet as they are in the model, and all that lies outside of blocks."""
        for index in range(len(self.model.blocks)):
            if index not in self.done:
                self.write(index, {}, {})
        outside = {key: parameter for key, (parameter, _) in self.plan.items() if not self._inside(parameter)}
        tensors: dict[str, Tensor] = {}
        for source, names in self.head.items():
            # where it is tied, the files may have it under either name, or both
            keys = sorted((k for k, p in outside.items() if p in names), key=lambda key: outside[key] != source)
            weights = self._plain(keys)
            self.untied = any(not torch.equal(weights[key], weights[keys[0]]) for key in keys[1:])
            for key in keys if self.untied else keys[:1]:
                parameter = source if key == keys[0] else outside[key]
                name = self._plain_name(key, parameter) if outside[key] == parameter else parameter
                name = name.removesuffix(".weight")
                rounded = round_weight(weights[key], self.group)
                tensors |= {f"{name}.{part}": tensor for part, tensor in rounded.parts().items()}
                about = {"shape": list(weights[key].shape), "dense": True, "bits": 8, "group": rounded.group}
                tensors |= self._mark(name, about, self.contents)
                self.contents.add(Contents({name: about}))
            for key in keys:
                del outside[key]
        self._save(len(self.model.blocks), {**tensors, **self._plain(list(outside))})

    def finish(self, config: Mapping[str, Any]) -> None:
        """Add the index and the model's config.json, with what a reader must know."""
        write_index(self.directory)
        settings = {
            "quant_method": "prunella",
            "format_version": VERSION,
            "bits": self.bits,
            "group": self.group,
            "modules": self.contents.modules,
        }
        own: dict[str, Any] = {"tie_word_embeddings": False} if self.untied else {}
        if own and "text_config" in config:
            own["text_config"] = {**config["text_config"], **own}
        write_json(self.directory / "config.json", {**config, **own, "quantization_config": settings})

    @property
    def checkpoint(self) -> Checkpoint:
        """What is written so far."""
        written = files_in(self.directory)
        return PackedCheckpoint(self.directory, self.contents.modules, self.bits, self.group, written)

    def _mark(self, name: str, about: Mapping[str, Any], found: Contents) -> dict[str, Tensor]:
        """What stops loaders that do not know the format, if this is the first weight that is packed. They would find
        nothing under the names of packed weights, and go on with random ones after a warning; a tensor under such a
        name with another shape is an error to all of them."""
        if found.modules or self.contents.modules:
            return {}
        return {parameter_name(name, about): torch.empty(MARK, dtype=self.model.dtype)}

    def _inside(self, parameter: str) -> bool:
        return self.model.block_of(parameter) is not None

    def _name(self, block: str, slot: Slot) -> str | None:
        """The name under which a parameter is stored when it is packed: the network's, or that of the files where
        transformers only renames (a vision-language model's text, say). None if it cannot be: no module for packed
        weights can take its place, transformers makes it of tensors that other parameters are made of too, or it has a
        dtype of its own."""
        parameter = slot.key
        if slot.lens.packed is None:
            return None
        keys = {key: converted for key, (p, converted) in self.plan.items() if p == parameter}
        if not keys or any(self._code(key) not in (None, self.model.dtype) for key in keys):
            return None
        if slot.part is not None:
            names = {name for name, _ in self.plan.values()}
            whole = (f"{block}.{name}" for name, _ in self.model.module(block).named_parameters())
            if not any(keys.values()):
                return self._plain_name(next(iter(keys)), parameter)
            return self._spelled(block, parameter) if all(name in names for name in whole) else None
        key = next(iter(keys))
        return key.removesuffix(".weight") if key.endswith(".weight") and not keys[key] else None

    def _spelled(self, block: str, parameter: str) -> str:
        """The name of a parameter that is made of several tensors, its block spelled as in the files."""
        for key, (other, converted) in self.plan.items():
            inside = other.removeprefix(block)
            if other.startswith(f"{block}.") and not converted and key.endswith(inside):
                return self._plain_name(key.removesuffix(inside) + parameter.removeprefix(block), parameter)
        return parameter

    def _plain_name(self, key: str, parameter: str) -> str:
        """The parameter's name or, where it differs by more than the base model's prefix, that of the files."""
        prefix = f"{self.model.network.base_model_prefix}."
        return parameter if key.removeprefix(prefix) == parameter.removeprefix(prefix) else key

    def _code(self, key: str) -> torch.dtype | None:
        """The dtype of a stored tensor if it differs from that of most others, and is kept."""
        checkpoint = self.model.checkpoint
        if checkpoint is None or checkpoint.dtype() != self.model.dtype:
            return None
        code = checkpoint.files[checkpoint.where[key]][key][0]
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(code)

    def _pack(self, slots: Sequence[Slot], masks: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> list[Packed]:
        """The weights of one parameter. Those without a grid are rounded as the others are."""
        bits, group = self.bits, self.group
        for grid in (grids[slot.name] for slot in slots if slot.name in grids):
            bits, group = stored_bits(grid), grid.group
        return [
            pack(slot.read().cpu().contiguous(), masks[slot.name], bits, group, grid=grids.get(slot.name))
            for slot in slots
        ]

    def _kind(self, columns: int) -> tuple[int | None, int]:
        """Bits and group of a weight for which nothing else is said."""
        return self.bits, self.group if self.bits and self.group < columns else 0

    def _plain(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors as the model has them."""
        checkpoint = self.model.checkpoint
        if checkpoint is None:
            state = self.model.network.state_dict()
            return {key: state[key] for key in keys}
        cast = checkpoint.dtype() != self.model.dtype
        with checkpoint.open(keys) as slices:
            tensors: dict[str, Tensor] = {key: slices[key][...] for key in keys}
        return {k: t.to(self.model.dtype) if cast and t.is_floating_point() else t for k, t in tensors.items()}

    def _save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        total = len(self.model.blocks) + 1
        save_tensors(self.directory / f"model-{number + 1:05d}-of-{total:05d}.safetensors", tensors)


class PackedCheckpoint(Checkpoint):
    """A packed model's files, for a network that is not packed: its weights are unpacked as they are loaded."""

    def __init__(
        self,
        directory: Path,
        modules: Mapping[str, Mapping[str, Any]],
        bits: int | None,
        group: int,
        names: Sequence[str] | None = None,
    ):
        super().__init__(directory, names)
        self.modules, self.bits, self.group = modules, bits, group
        for key, file in list(self.where.items()):
            if self.files[file][key][1] == MARK:
                del self.where[key], self.files[file][key]

    def fill(self, model: Model, wanted: Callable[[str], bool]) -> None:
        for name, about in self.modules.items():
            parameter = model.parameter_of(parameter_name(name, about))
            if wanted(parameter):
                owner, _, key = parameter.rpartition(".")
                weight = self.weight(name, model.dtype).to(model.device)
                model.network.get_submodule(owner)._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def packed(self, name: str) -> dict[str, Packed]:
        """The packed weights that make up a parameter, by module. Raises ModelError, naming the tensor, if one is
        missing or damaged."""
        about = self.modules[name]
        bits, group = about.get("bits", self.bits), about.get("group", self.group)
        out = {}
        for module in module_names(name, about):
            parts = {part: f"{module}.{part}" for part in PARTS if f"{module}.{part}" in self.where}
            with self.open(parts.values()) as slices:
                tensors = {part: slices[key][...] for part, key in parts.items()}
            out[module] = of_parts(module, tensors, about["shape"][1], group)
            if [out[module].rows, out[module].columns, out[module].bits] != [*about["shape"], bits]:
                raise ModelError(f"packed weight '{module}' is not what config.json says of it. Pack the model again.")
        return out

    def rounded(self, name: str) -> Rounded:
        """A weight of 8 bits of which nothing is left out. Raises ModelError, naming the tensor, if it is missing or
        damaged."""
        about = self.modules[name]
        keys = {part: f"{name}.{part}" for part in ("weight_values", "weight_scales")}
        with self.open(key for key in keys.values() if key in self.where) as slices:
            tensors = {part: slices[key][...] for part, key in keys.items() if key in self.where}
        return rounded_of_parts(name, tensors, tuple(about["shape"]), about.get("group", self.group))

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A packed parameter as the plain model has it; integer values times their scales in `dtype`."""
        about = self.modules[name]
        if about.get("dense"):
            return self.rounded(name).dense(dtype)
        weights = [unpack(p, None if p.bits is None else dtype) for p in self.packed(name).values()]
        if about.get("transposed"):
            weights = [weight_OI.T for weight_OI in weights]
        return torch.stack(weights) if "experts" in about else weights[0].contiguous()


def module_names(name: str, about: Mapping[str, Any]) -> list[str]:
    """The modules that an entry of quantization_config.modules stands for: itself, or a mixture's experts."""
    return [f"{name}.{e}" for e in range(about["experts"])] if "experts" in about else [name]


def parameter_name(name: str, about: Mapping[str, Any]) -> str:
    """The tensor that a plain model has in place of such an entry."""
    return name if "experts" in about else f"{name}.weight"


def write_index(directory: Path) -> None:
    """Say which tensor is in which file, where there are several files."""
    checkpoint = Checkpoint(directory, files_in(directory))
    if list(checkpoint.files) != [SINGLE]:
        index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": dict(sorted(checkpoint.where.items()))}
        write_json(directory / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As the config files beside a model's weights are written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _by_parameter(slots: Sequence[Slot]) -> dict[str, list[Slot]]:
    out: dict[str, list[Slot]] = {}
    for slot in slots:
        out.setdefault(slot.key, []).append(slot)
    return out
