"""What is done to a network while it trains, and undone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import InputError
from .parts import Change


@contextlib.contextmanager
def own_forward(network: nn.Module) -> Iterator[None]:
    """What accelerate puts around the forward pass, such as autocast, goes with it: what is measured afterwards is the
    network and nothing else."""
    keys = ("forward", "_original_forward")  # accelerate's names
    before = {key: vars(network)[key] for key in keys if key in vars(network)}
    try:
        yield
    finally:
        for key in keys:
            vars(network).pop(key, None)
        vars(network).update(before)


@contextlib.contextmanager
def no_dropout(network: nn.Module) -> Iterator[None]:
    """Nothing is dropped while it trains: the first step starts from the pruned model, and what was pruned has little
    to spare. Dropout is a module here and a number of an attention module there."""
    before = [
        (module, key, value)
        for module in network.modules()
        for key, value in vars(module).items()
        if isinstance(value, float) and (key == "p" if isinstance(module, nn.Dropout) else "drop" in key)
    ]
    try:
        for module, key, _ in before:
            setattr(module, key, 0.0)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


@contextlib.contextmanager
def remade(network: nn.Module, changes: Sequence[Change], recompute: bool) -> Iterator[None]:
    """What changes make is kept for a step; or, with `recompute`, made again in backward, as activations are. Raises
    InputError for a network that cannot recompute them."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # newer, older name
    switch = next((name for name in names if hasattr(network, f"{name}_enable")), None)
    if recompute and switch is None:
        raise InputError(f"a {type(network).__name__} cannot recompute activations: leave checkpointing out.")
    for change in changes:
        change.keep = not recompute
    if recompute:
        getattr(network, f"{switch}_enable")()
    try:
        yield
    finally:
        if recompute:
            getattr(network, f"{switch}_disable")()
        for change in changes:
            change.keep = False
            change.forget()
