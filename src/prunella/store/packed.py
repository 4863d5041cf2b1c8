"""Weights without their zeros, in the packed format: a file for each block, and one for all that lies outside of the
blocks. What is written is read back block by block, as any other weights are."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import pattern
from ..compat import of_transformers
from ..errors import ModelError, say
from ..grid import fit
from ..layers import Slot, find_layers
from ..model.files import SINGLE, copy_companions, files_in, read_json
from ..model.network import Model
from ..outcome import BlockResult
from ..sparse.checkpoint import PackedCheckpoint, packed_config
from ..sparse.conv import has_only_a_weight, runs_packed, why_expanded
from ..sparse.format import (
    MARK,
    ORDER,
    SPAN,
    VERSION,
    Packed,
    layer_names,
    module_names,
    pack,
    parameter_name,
    round_weight,
    stored_bits,
)
from ..sparse.rounded import heads
from ..tensors import (
    DTYPES,
    FLOATS,
    GRIDS,
    MASKS,
    masks_in,
    save_tensors,
    write_grids,
    write_index,
    write_json,
    write_masks,
)
from ..waits import sent
from .registry import Store, register_store


@dataclass
class Contents:
    """What packed files hold.

    modules: of config.json's quantization_config: docs/format.md
    stayed:  pruned layers that are stored dense
    expanded: packed convolutions that are dense again once they are loaded
    dense, packed: bytes of the packed weights, before and after
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    stayed: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    dense: int = 0
    packed: int = 0

    def add(self, other: Contents) -> None:
        self.modules |= other.modules
        self.stayed += other.stayed
        self.expanded += other.expanded
        self.dense += other.dense
        self.packed += other.packed


@register_store("packed")
class PackedStore(Store):
    """A packed model's files, and the masks and grids of those pruned layers that stay dense.

    A file appears when it is whole. Tensors that are not packed are written as they are in the model's own checkpoint,
    under the same names, in the model's dtype.

    bits, group: None, 8 or 4 bits for each value, and inputs to a scale, as `format.pack` takes them
    round_head:  round the embedding and the output head too, to 8 bits, nothing left out
    contents:    what the files hold so far
    """

    def __init__(
        self,
        folder: Path,
        aside: Path,
        model: Model,
        *,
        bits: int | None = None,
        group: int = SPAN,
        round_head: bool = False,
    ):
        super().__init__(folder, aside, model)
        self.bits, self.group = bits, group
        self.head = heads(model.network) if round_head else {}
        self.contents = Contents()
        self.done: set[int] = set()
        self.untied = False  # a head that is another than the embedding, though the config says they are one
        self.others: dict[str, Tensor] = {}  # what changed of all that no block's file holds
        self.norms = {  # estimated when all blocks are written
            f"{name}.{key}"
            for name, module in model.network.named_modules()
            if "running_mean" in module._buffers
            for key, _ in module.named_buffers(recurse=False)
        }
        self.plan: Mapping[str, tuple[str, bool]]
        if model.checkpoint is not None:
            self.plan = model.plan()
        else:
            get, tied = model.network.get_parameter, model.tied
            same = {target for target, source in tied.items() if get(target) is get(source)}
            self.plan = {name: (name, False) for name in model.network.state_dict() if name not in same}

    def write(self, result: BlockResult) -> dict[str, Any]:
        return self.begin(result)()

    def begin(self, result: BlockResult) -> Callable[[], dict[str, Any]]:
        """As any store; layers are packed on their grids where they have some."""
        block, grids = result.name, result.grids
        found = Contents()
        tensors: dict[str, Tensor] = {}
        gone: set[str] = set()
        changed = dict(result.changed)
        shapes: dict[str, tuple[int, int]] = {}
        layers = find_layers(self.model.module(block), block) if result.masks else []
        for parameter, those in itertools.groupby(layers, lambda slot: slot.key):
            slots = list(those)
            pruned = [slot for slot in slots if slot.name in result.masks]
            if not pruned:
                continue
            name = self._name(block, slots[0]) if len(pruned) == len(slots) else None
            packed = self._pack(slots, result) if name is not None else []
            kinds = {(one.bits, one.group) for one in packed}
            dense = getattr(slots[0].module, slots[0].parameter)
            size, nbytes = sum(p.nbytes for p in packed), dense.numel() * dense.element_size()
            if name is None or size >= nbytes or len(kinds) > 1:
                shapes |= {slot.name: slot.shape for slot in pruned}
                changed[parameter] = dense.data
                continue
            gone.add(parameter)
            about: dict[str, Any] = {"shape": [packed[0].rows, packed[0].columns]}
            if kinds != {self._kind(slots[0].shape[1])}:
                about["bits"], about["group"] = kinds.pop()
            if slots[0].lens.packed == "kernel":
                about["kernel"] = list(dense.shape[2:])
                about |= {"groups": len(slots)} if slots[0].part is not None else {}
            elif slots[0].part is not None:
                about["experts"] = len(slots)
            if slots[0].lens.transposed:
                about["transposed"] = True
            if [slot.name for slot in slots] != layer_names(name, about):
                about["layer"] = parameter if "experts" in about else parameter.removesuffix(".weight")
            for module, content in zip(module_names(name, about), packed, strict=True):
                tensors |= {f"{module}.{part}": tensor for part, tensor in content.parts().items()}
            tensors |= self._mark(name, about, found)
            expanded = [name] if "kernel" in about and not runs_packed(slots[0].module) else []
            found.add(Contents({name: about}, [], expanded, nbytes, size))
        found.stayed = list(shapes)
        inside = gone | self.norms
        keys = [k for k, (p, _) in self.plan.items() if self.model.block_of(p) == block and p not in inside]
        tensors |= self._plain(keys)
        changed = {parameter: tensor for parameter, tensor in changed.items() if parameter not in gone}
        if changed and self.model.checkpoint is not None:
            stored = self.model.stored(block, changed)
            tensors |= {key: stored[key].to(tensors[key].dtype) for key in keys if key in stored}
        self.restore(result.index, entry := asdict(found))
        names, arrived = list(tensors), sent(list(tensors.values()))

        def put() -> dict[str, Any]:
            self._save(result.index, dict(zip(names, arrived(), strict=True)))
            if shapes:
                masks = {layer: result.masks[layer] for layer in shapes}
                write_masks(self.aside / f"{MASKS}-{result.index}", masks, shapes)
                write_grids(self.aside / f"{GRIDS}-{result.index}", {la: grids[la] for la in shapes if la in grids})
            return entry

        return put

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        self.contents.add(Contents(**entry))
        self.done.add(index)

    def complete(self) -> None:
        for index, name in enumerate(self.model.blocks):
            if index not in self.done:
                self.write(BlockResult(index, name, (), {}, {}, {}, 0.0))
        if self.norms and self._file(len(self.model.blocks)).is_file():  # of an earlier run, which had them estimated
            stored = load_file(self._file(len(self.model.blocks)))
            self.others = {p: stored[key] for key, (p, _) in self.plan.items() if p in self.norms} | self.others
        self._write_others()

    def write_outside(self, changed: Mapping[str, Tensor]) -> None:
        self.others |= {name: tensor.detach().cpu().clone() for name, tensor in changed.items()}
        if self._file(len(self.model.blocks)).is_file():
            self._write_others()

    def _write_others(self) -> None:
        """The file of all that no block holds, and of batch norms' statistics."""
        block_of, norms = self.model.block_of, self.norms
        outside = {key: p for key, (p, _) in self.plan.items() if p in norms or block_of(p) is None}
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
        plain = self._plain(list(outside))
        if self.others and self.model.checkpoint is not None:
            changed = self.model.stored("", self.others)
            plain |= {key: changed[key].to(tensor.dtype) for key, tensor in plain.items() if key in changed}
        self._save(len(self.model.blocks), {**tensors, **plain}, self._order())

    def finish(self) -> None:
        network, path = self.model.network, self.folder / "config.json"
        own: dict[str, Any] = {}
        if self.model.checkpoint is None and of_transformers(network):
            network.config.save_pretrained(self.folder)
            if network.can_generate():
                network.generation_config.save_pretrained(self.folder)
            own = {"architectures": [type(network).__name__], "dtype": str(self.model.dtype)[6:]}
        elif self.model.checkpoint is None:  # its task knows what belongs to it beside the weights
            with tempfile.TemporaryDirectory(dir=self.aside) as plain:
                self.model.task.save(self.model, Path(plain))
                copy_companions(Path(plain), self.folder)
        config = read_json(path) | own
        if self.untied:
            config["tie_word_embeddings"] = False
            if "text_config" in config:
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        config["quantization_config"] = {
            "quant_method": "prunella",
            "format_version": VERSION,
            "bits": self.bits,
            "group": self.group,
            "modules": self.contents.modules,
        }
        write_json(path, config)
        if expanded := self.contents.expanded:
            first = f"the convolution '{expanded[0]}' is" if len(expanded) == 1 else f"{len(expanded)} convolutions are"
            say(f"{first} expanded when the model is loaded: {why_expanded()}")
        write_index(self.folder)
        masks: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for part in sorted(self.aside.glob(f"{MASKS}-*")):
            shapes |= masks_in(part)
            masks |= load_file(part)
        if masks:
            write_masks(self.folder / MASKS, masks, shapes)
        self.merge_grids()

    @property
    def source(self) -> PackedCheckpoint:
        written = files_in(self.folder)
        return PackedCheckpoint(self.folder, self.contents.modules, self.bits, self.group, written)

    @classmethod
    def read(cls, directory: Path) -> PackedCheckpoint:
        from ..packed.quantizer import PrunellaConfig  # which imports transformers

        found = packed_config(directory)
        if found is None:
            raise ModelError(
                f"'{directory}' is not a packed model: its config.json has no quantization_config of prunella."
            )
        config = PrunellaConfig(**found)
        return PackedCheckpoint(directory, config.modules, config.bits, config.group)

    def _mark(self, name: str, about: Mapping[str, Any], found: Contents) -> dict[str, Tensor]:
        """What stops loaders that do not know the format, if this is the first weight that is packed. They would find
        nothing under the names of packed weights, and go on with random ones after a warning; a tensor under such a
        name with another shape is an error to all of them."""
        if found.modules or self.contents.modules:
            return {}
        return {parameter_name(name, about): torch.empty(MARK, dtype=self.model.dtype)}

    def _name(self, block: str, slot: Slot) -> str | None:
        """The name under which a parameter is stored when it is packed: the network's, or that of the files where
        transformers only renames (a vision-language model's text, say). None if it cannot be: no module for packed
        weights can take its place, transformers makes it of tensors that other parameters are made of too, or it has a
        dtype of its own."""
        parameter = slot.key
        if slot.lens.packed is None or (slot.lens.packed == "kernel" and not has_only_a_weight(slot.module)):
            return None
        keys = {key: converted for key, (p, converted) in self.plan.items() if p == parameter}
        if not keys or any(self._code(key) not in (None, self.model.dtype) for key in keys):
            return None
        if slot.part is not None and slot.lens.packed == "list":
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
        prefix = getattr(self.model.network, "base_model_prefix", "") + "."
        return parameter if key.removeprefix(prefix) == parameter.removeprefix(prefix) else key

    def _code(self, key: str) -> torch.dtype | None:
        """The dtype of a stored tensor if it differs from that of most others, and is kept."""
        checkpoint = self.model.checkpoint
        if checkpoint is None or checkpoint.dtype() != self.model.dtype:
            return None
        code = checkpoint.files[checkpoint.where[key]][key][0]
        return DTYPES[code] if code in FLOATS else None

    def _pack(self, slots: Sequence[Slot], result: BlockResult) -> list[Packed]:
        """The weights of one parameter. Those without a grid are rounded as the others are."""
        bits, group, grids = self.bits, self.group, [result.grids.get(slot.name) for slot in slots]
        for grid in grids:
            if grid is not None:
                bits, group = stored_bits(grid), grid.group
        weights = [slot.read().contiguous() for slot in slots]  # which are packed where they lie
        device = weights[0].device
        masks = [pattern.unpack(result.masks[slot.name].to(device), slot.shape) for slot in slots]
        grids = [grid and replace(grid, scale_OG=grid.scale_OG.to(device)) for grid in grids]
        if slots[0].lens.packed == "kernel":  # the groups of a convolution, one below the other
            if any(grids) and bits is not None:
                each = zip(weights, masks, grids, strict=True)
                known = [grid or fit(weight_OI * mask_OI, bits, group) for weight_OI, mask_OI, grid in each]
                grids = [replace(known[0], scale_OG=torch.cat([grid.scale_OG for grid in known]))]
            weights, masks, grids = [torch.cat(weights)], [torch.cat(masks)], grids[:1]
        return [
            pack(weight_OI, mask_OI, bits, group, grid=grid)
            for weight_OI, mask_OI, grid in zip(weights, masks, grids, strict=True)
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

    def _order(self) -> dict[str, str] | None:
        """What the last file says to those who make a plain directory again: the order of tensors in the model's own
        file, the metadata there, its config.json; nothing where transformers reads the files, which takes several."""
        checkpoint = self.model.checkpoint
        if checkpoint is None or of_transformers(self.model.network) or list(checkpoint.files) != [SINGLE]:
            return None
        places = sorted(checkpoint.files[SINGLE].items(), key=lambda item: item[1][2])
        said = {**checkpoint.metadata[SINGLE], ORDER: json.dumps([name for name, _ in places])}
        path = checkpoint.directory / "config.json"
        return said | ({path.name: path.read_text(encoding="utf-8")} if path.is_file() else {})

    def _save(self, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        save_tensors(self._file(number), tensors, metadata)

    def _file(self, number: int) -> Path:
        """That of a block, or the last one."""
        return self.folder / f"model-{number + 1:05d}-of-{len(self.model.blocks) + 1:05d}.safetensors"
