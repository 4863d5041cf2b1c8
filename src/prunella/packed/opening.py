"""Packed networks of other libraries than transformers, and modules of one's own: opened from their directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, ModelError, PrunellaError, command, first_line, unknown
from ..machine import pick_device
from ..model.files import weight_files
from ..model.network import Model
from ..model.open import DTYPES, open_plain
from ..plan.network import speed_up
from ..sparse.block import settle
from ..sparse.checkpoint import PackedCheckpoint, packed_config
from ..sparse.conv import ExpandedConv, check_fits, packed_module

if TYPE_CHECKING:
    from ..model.task import Task


def open_network(
    build: Callable[[], nn.Module],
    directory: Path,
    task: Task,
    *,
    packed: bool = False,
    name: str = "",
    dtype: str = "auto",
    device: str = "auto",
    processor: Any = None,
) -> Model:
    """As `open_plain`; a packed network too, if `packed` says so: it is read into memory, its weights packed as they
    are, and cannot be pruned. Raises ModelError for files that are damaged, or packed from another network than `build`
    makes."""
    found = packed_config(directory)
    name = name or str(directory)
    if found is None:
        return open_plain(build, directory, task, name=name, dtype=dtype, device=device, processor=processor)
    if not packed:
        raise ModelError(f"'{name}' is packed: {command('unpack', name)} -o OUT makes a plain model of it.")
    if dtype not in DTYPES and dtype != "auto":
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    from .quantizer import PrunellaConfig  # which imports transformers

    config = PrunellaConfig(**found)
    checkpoint = PackedCheckpoint(directory, config.modules, config.bits, config.group, weight_files(directory))
    try:
        network = build()
    except PrunellaError:
        raise
    except Exception as error:
        raise ModelError(f"'{name}' cannot be built: {first_line(error)}") from error
    network.requires_grad_(False).eval()
    _fill(network, checkpoint, name)
    if dtype != "auto":
        network.to(DTYPES[dtype])
    network.to(pick_device(device))
    settle(network)
    speed_up(network)
    return task.wrap(network, processor, name)


def _fill(network: nn.Module, checkpoint: PackedCheckpoint, name: str) -> None:
    """Put packed modules in their places, and every other tensor into its own."""
    plain: dict[str, torch.Tensor] = {}
    parts = {f"{module}." for module in checkpoint.modules}
    with checkpoint.open(key for key in checkpoint.where if not _part(key, parts)) as slices:
        plain |= {key: slices[key][...] for key in slices}
    wanted = {f"{module}.weight" for module in checkpoint.modules}
    state = network.state_dict()
    if missing := sorted(state.keys() - plain.keys() - wanted):
        raise ModelError(f"tensor '{missing[0]}' is missing from the checkpoint in '{checkpoint.directory}'.")
    if strange := sorted((plain.keys() | wanted) - state.keys()):
        raise ModelError(f"'{strange[0]}' in '{checkpoint.directory}' is of another network than '{name}' is built as.")
    for key, tensor in plain.items():
        if tensor.shape != state[key].shape:
            raise ModelError(
                f"tensor '{key}' in '{checkpoint.directory}' has shape {tuple(tensor.shape)}, but '{name}' has"
                f" {tuple(state[key].shape)} there."
            )
    for module_name, about in checkpoint.modules.items():
        module = network.get_submodule(module_name)
        check_fits(module_name, about, module)
        (content,) = checkpoint.packed(module_name).values()
        packed = packed_module(content, module)
        if module_name:
            network.set_submodule(module_name, packed)
    network.load_state_dict(plain, strict=False, assign=True)
    for module_name, module in list(network.named_modules()):
        if isinstance(module, ExpandedConv):
            network.set_submodule(module_name, module.plain())


def _part(key: str, modules: set[str]) -> bool:
    """Is it a part of a packed weight?"""
    owner, _, last = key.rpartition(".")
    return f"{owner}." in modules and last.startswith("weight_")
