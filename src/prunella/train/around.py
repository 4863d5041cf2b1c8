"""What is done to a network while it trains, and undone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError, say
from ..samples import Batch
from ..team import Team
from .parts import Change, Chosen


def asleep(network: nn.Module, *, follow: bool, recompute: bool) -> list[nn.Module]:
    """The modules that compute in training as they do afterwards: all but what trains, norms whose running statistics
    `follow`, and those that recompute activations. So nothing is dropped or masked at random, and no module puts out
    something else than what is measured later."""
    return [
        module
        for module in network.modules()
        if not isinstance(module, Change | parametrize.ParametrizationList)
        and not (follow and keeps_statistics(module))
        and not (recompute and hasattr(module, "gradient_checkpointing"))
    ]


def keeps_statistics(module: nn.Module) -> bool:
    """Does it keep means and deviations of what it has seen, as batch norms do?"""
    return bool(getattr(module, "track_running_stats", False))


def statistics_of(network: nn.Module) -> dict[str, Tensor]:
    """What norms keep of what they have seen, {name of the buffer: its values}, to read and to write."""
    return {
        f"{name}.{key}": buffer
        for name, module in network.named_modules()
        if keeps_statistics(module)
        for key, buffer in module.named_buffers(recurse=False)
    }


def share_statistics(network: nn.Module, crew: Team) -> None:
    """After a step in which each process has seen samples of its own: the mean over all of them, in each."""
    for name, buffer in statistics_of(network).items() if crew.size > 1 else ():
        if buffer.is_floating_point() and network.get_submodule(name.rpartition(".")[0]).training:
            buffer.copy_(crew.reduce(buffer) / crew.size)


def check_reached(chosen: Sequence[Chosen]) -> None:
    """After the first gradients: says what trains and does not enter the loss. Raises InputError if nothing does."""
    idle = [item.part.name for item in chosen if all(p.grad is None for p in item.change.parameters())]
    if idle and len(idle) == len(chosen):
        raise InputError(f"nothing that trains enters the loss, '{idle[0]}' neither: train something else.")
    if idle:
        names = ", ".join(idle[:3]) + (" …" if len(idle) > 3 else "")
        say(f"{len(idle)} tensors that train do not enter the loss, and stay as they are: {names}")


class Called(nn.Module):
    """A network as a module that is called with a batch: DDP and autocast go around this and not around the network,
    which stays as it is, whatever `run` calls of it."""

    def __init__(self, network: nn.Module, run: Callable[[nn.Module, Batch], Any]):
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, batch: Batch) -> Any:
        return self.run(self.network, batch)


@contextlib.contextmanager
def no_dropout(network: nn.Module) -> Iterator[None]:
    """Nothing is dropped while it trains: the first step starts from the pruned model, and what was pruned has little
    to spare. Dropout is a module here and a number of an attention module there."""
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    before = [
        (module, key, value)
        for module in network.modules()
        for key, value in vars(module).items()
        if isinstance(value, float) and (key == "p" if isinstance(module, dropouts) else "drop" in key)
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
