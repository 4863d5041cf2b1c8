"""State dicts: of a directory, a file of safetensors, or one of torch, into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError, first_line
from .checkpoint import Checkpoint

N = TypeVar("N", bound=nn.Module)

PREFIXES = ("module.", "_orig_mod.", "model_ema.module.", "ema_model.")  # of DDP, torch.compile, averages
NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "weights")  # where training scripts keep it
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")


def load_state(network: N, source: str | Path, *, ema: bool = False) -> N:
    """Read a network's weights and buffers, from a directory that Prunella wrote or from a file of its state dict. What
    is read has all of its tensors and no others; of tensors that are one, one is enough.

    Args:
        network: built as it was; its own weights give way. It is returned.
        source: a directory with safetensors, or a .safetensors, .pt, .pth or .bin file. Those of torch are read as
            tensors only, and run no code. What they have under `state_dict`, `model` and such is found, names with
            `module.` or `_orig_mod.` before them lose it, and what torch.nn.utils.prune split is put together.
        ema: of a file that holds an average of the weights beside them, take that.

    Raises:
        ModelError: there is no such file, it holds other things than tensors, or tensors that are not this network's.

    >>> import prunella
    >>> network = prunella.load_state(Net(), "pruned")  # doctest: +SKIP
    """
    state = read_state(source, ema=ema)
    wanted = network.state_dict(keep_vars=True)
    names = dict(wanted)
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state) and not names.keys() & state.keys():
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    aliases: dict[int, list[str]] = {}
    for name, tensor in names.items():
        aliases.setdefault(id(tensor), []).append(name)
    for same in aliases.values():
        if held := next((name for name in same if name in state), None):
            state |= {name: state[held] for name in same if name not in state}
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    strange = [name for name in state if name not in names]
    if missing or strange:
        why = f"lacks '{missing[0]}'" if missing else f"holds '{strange[0]}', which this network has not"
        more = len(missing) + len(strange) - 1
        raise ModelError(
            f"'{source}' is of another network than this {type(network).__name__}: it {why}"
            + (f" (and {more} more names differ)." if more else ".")
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"tensor '{name}' in '{source}' has shape {tuple(tensor.shape)}, but in this {type(network).__name__}"
                f" {tuple(wanted[name].shape)}."
            )
    network.load_state_dict(state, strict=False)
    return network


def read_state(source: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors in a directory or file, as `load_state` takes them. Raises ModelError."""
    path = Path(source)
    if path.is_dir():
        checkpoint = Checkpoint(path)
        with checkpoint.open(checkpoint.where) as slices:
            return joined({name: slices[name][...] for name in checkpoint.where})
    if not path.is_file():
        raise ModelError(f"'{source}' does not exist.")
    try:
        if path.suffix == ".safetensors":
            return joined(load_file(path))
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = first_line(error)
        reason = "it holds more than tensors, which can run code" if "Unsupported" in str(error) else said
        raise ModelError(f"'{source}' cannot be read as a state dict: {reason}. Save network.state_dict().") from None
    if ema:
        where = next((key for key in AVERAGES if isinstance(found, Mapping) and key in found), None)
        if where is None:
            raise ModelError(f"'{source}' holds no average of the weights ({', '.join(AVERAGES)}).")
        found = found[where]
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        where = next((key for key in NESTED if isinstance(found.get(key), Mapping)), None)
        if where is None:
            raise ModelError(f"'{source}' holds no state dict: {', '.join(map(str, found)) or 'nothing'}.")
        found = found[where]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"'{source}' holds no state dict, {{name: tensor}}.")
    return joined({str(name): tensor for name, tensor in found.items()})


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which what torch.nn.utils.prune split, `weight_orig` and `weight_mask`, is one tensor again."""
    out = dict(state)
    for name in state:
        whole = name.removesuffix("_mask")
        if name.endswith("_mask") and f"{whole}_orig" in state and whole not in state:
            out[whole] = out.pop(f"{whole}_orig") * out.pop(name)
    return out
