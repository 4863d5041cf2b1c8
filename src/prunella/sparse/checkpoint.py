"""The files of a packed model, for a network that is not packed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..model.checkpoint import Checkpoint
from .format import (
    MARK,
    PARTS,
    Packed,
    as_parameter,
    module_names,
    of_parts,
    parameter_name,
    rounded_of_parts,
    unpack,
)


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
        self.own = {parameter_name(name, about): name for name, about in modules.items()}
        for key, file in list(self.where.items()):
            if self.files[file][key][1] == MARK:
                del self.where[key], self.files[file][key]

    def packed(self, name: str) -> dict[str, Packed]:
        """The packed weights that make up a parameter, by module. Raises ModelError, naming the tensor, if one is
        missing or damaged."""
        about = self.modules[name]
        bits, group = about.get("bits", self.bits), about.get("group", self.group)
        out = {}
        for module in module_names(name, about):
            out[module] = of_parts(module, self._parts(module), about["shape"][1], group)
            if [out[module].rows, out[module].columns, out[module].bits] != [*about["shape"], bits]:
                raise ModelError(f"packed weight '{module}' is not what config.json says of it. Pack the model again.")
        return out

    def _parts(self, module: str) -> dict[str, Tensor]:
        keys = {part: key for part in PARTS if (key := f"{module}.{part}") in self.where}
        with self.open(keys.values()) as slices:
            return {part: slices[key][...] for part, key in keys.items()}

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A packed parameter as the plain model has it; integer values times their scales in `dtype`."""
        name = self.own[name]
        about = self.modules[name]
        if about.get("dense"):
            group = about.get("group", self.group)
            return rounded_of_parts(name, self._parts(name), tuple(about["shape"]), group).dense(dtype)
        weights = [
            as_parameter(unpack(p, None if p.bits is None else dtype), about) for p in self.packed(name).values()
        ]
        return torch.stack(weights) if "experts" in about else weights[0].contiguous()


def packed_config(directory: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a packed model; None for a directory that holds none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}.") from None
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == "prunella" else None
