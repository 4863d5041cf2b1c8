"""Masks that move while a network trains: the recipe's allocation and steps choose them, on the weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .layers import find_layers
from .model.network import Model
from .outcome import BlockResult
from .pattern import unpack
from .pruning import prune_once
from .recipe import Recipe
from .samples import Samples
from .train.loop import Update
from .train.parts import Chosen, attach, detach, parts_of


def updates(network: Any, chosen: Sequence[Chosen], recipe: Recipe, calibration: Tensor | Samples) -> Update:
    """What chooses new masks for a `Training`: `update(share) -> {part: mask of its shape}`.

    The network is pruned as `prunella.prune` does it, to that share of the recipe's sparsities, by its steps and its
    allocation; what remains of it are the masks: all weights are as they were afterwards.

    Args:
        network: a network, or the `Model` of one; its weights are loaded, what trains is attached.
        chosen: what trains; layers that are not among it keep their masks.
        recipe: `sparsity` is what is wanted in the end, `task` what the network is for, if its class does not say it.
        calibration: what statistics are made from, windows of token ids (N, L) or other samples.
    """
    whole = network.network if isinstance(network, Model) else network
    recipe = recipe.resolved(network)
    task = recipe.make_task()
    recipe = recipe.resolved(network)
    wanted = {"*": recipe.default_sparsity, **recipe.sparsity}
    evaluate = recipe.evaluate.model_copy(update={"source": None})
    heal = recipe.heal.model_copy(update={"train": ()})
    now = recipe.model_copy(update={"evaluate": evaluate, "heal": heal})

    def update(share: float) -> dict[str, Tensor]:
        bits: dict[str, Tensor] = {}

        def keep(result: BlockResult) -> None:
            bits.update(result.masks)

        with _plain(whole, chosen), torch.random.fork_rng([]):
            if share:
                part = now.model_copy(update={"sparsity": {glob: whole * share for glob, whole in wanted.items()}})
                prune_once(network, part, calibration=calibration, on_block=keep)
            model = network if isinstance(network, Model) else task.wrap(network)
            masks = {
                slot.name: unpack(bits[slot.name], slot.shape)
                if slot.name in bits
                else torch.ones(slot.shape, dtype=torch.bool)
                for name in model.blocks
                for slot in find_layers(model.module(name), name)
            }
            found = {part.name: part.mask for part in parts_of(model, masks) if part.mask is not None}
            if model is not network:
                model.give_back()
        return {item.part.name: found[item.part.name] for item in chosen if item.part.name in found}

    return update


@contextmanager
def _plain(network: Any, chosen: Sequence[Chosen]) -> Iterator[None]:
    """The modules hold what their changes make, as plain weights; what is done to any weight meanwhile is undone."""
    before = [(parameter, parameter.detach().clone()) for parameter in network.parameters()]
    detach(chosen)
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.data.copy_(value)
        attach(chosen)
