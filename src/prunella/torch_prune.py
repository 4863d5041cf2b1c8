"""torch.nn.utils.prune, in and out: a network that it pruned is plain while Prunella works on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .errors import InputError
from .layers import Slot, find_layers
from .report import Report
from .tensors import read_masks

N = TypeVar("N", bound=nn.Module)


def places(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules under torch.nn.utils.prune, each with the name of a parameter that is."""
    return [
        (module, hook._tensor_name)
        for module in network.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    ]


@contextlib.contextmanager
def plain(network: nn.Module, remove: bool = False) -> Iterator[None]:
    """Inside, a network that is under torch.nn.utils.prune has plain parameters, what its masks prune being zero. After
    it, it is under it again, unless it is to be removed: a mask is where the weights are not zero then. The parameters
    stay the same objects, so that an optimizer goes on with them."""
    found = places(network)
    for module, name in found:
        torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, name in () if remove else found:
            torch_prune.custom_from_mask(module, name, getattr(module, name).detach() != 0)  # type: ignore[no-untyped-call]


def to_torch_prune(network: N, masks: str | Path | Report | Mapping[str, Tensor]) -> N:
    """Put a network's masks under torch.nn.utils.prune (`custom_from_mask`): its weights are `weight_orig` times
    `weight_mask` from then on, until `torch.nn.utils.prune.remove`. Whatever trains it, what is pruned stays zero.

    Args:
        network: with the pruned weights; it is returned.
        masks: the directory that it was pruned into, {layer: mask (O, I)} or {parameter: mask of its shape}, True where
            a weight is kept; or the report of a run in memory: the zeros of the layers that it pruned.

    Raises:
        InputError: a mask fits no parameter of the network, or prunes weights that are not zero.
    """
    if found := places(network):
        raise InputError(f"'{found[0][1]}' of a {type(found[0][0]).__name__} is under torch.nn.utils.prune already.")
    slots = {slot.name: slot for slot in find_layers(network, "")}
    whole: dict[tuple[nn.Module, str], Tensor] = {}
    if isinstance(masks, Report):
        masks = {
            la.name: _slot(slots, la.name).read() != 0 for la in masks.layers if la.pattern != "dense" and la.sparsity
        }
    elif not isinstance(masks, Mapping):
        masks = read_masks(masks)
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if name in parameters and parameters[name].shape == mask.shape:
            owner, _, key = name.rpartition(".")
            whole[network.get_submodule(owner), key] = mask
            continue
        slot = _slot(slots, name)
        if mask.shape != slot.shape:
            raise InputError(f"the mask of '{name}' is {tuple(mask.shape)}, not {slot.shape}.")
        place = slot.module, slot.parameter
        slot.write(mask, whole.setdefault(place, torch.ones(slot.tensor.shape, dtype=torch.bool)))
    for (module, key), mask in whole.items():
        parameter = getattr(module, key)
        if (parameter.detach()[~mask.to(parameter.device)] != 0).any():
            raise InputError(
                f"a mask prunes weights of a {type(module).__name__} that are not zero: load the pruned weights first"
                " (prunella.load_state)."
            )
    for (module, key), mask in whole.items():
        torch_prune.custom_from_mask(module, key, mask.to(getattr(module, key).device))  # type: ignore[no-untyped-call]
    return network


def _slot(slots: Mapping[str, Slot], name: str) -> Slot:
    if name not in slots:
        raise InputError(f"'{name}' is no layer of this network, but has a mask.")
    return slots[name]
