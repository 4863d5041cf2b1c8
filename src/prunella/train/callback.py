"""The masks of a pruned network, held in a training that is not ours: a user's own loop, or transformers' Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from ..errors import InputError, PrunellaError
from ..layers import Slot, find_layers
from ..tasks import make_task, task_of
from .parts import DENSE
from .shard import share


@contextlib.contextmanager
def hold(network: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Zeros stay zeros while a network trains inside, in any loop and with any of torch's optimizers.

    Gradients of pruned weights are zero as soon as they are made, so that clipping does not see them; after each step
    the weights are zero again, and so are the optimizer's moments of them.

    Args:
        network: its parameters as the optimizer gets them: wrap it for several processes before.
        masks: {layer: mask (O, I)}, as `prunella.read_masks` returns them, or {parameter: mask of its shape}; True
            where a weight is kept. None: the zeros of each
            matrix that has some, embeddings apart.

    Raises:
        InputError: a mask fits no parameter, or there is none to hold.

    >>> from prunella.train.callback import hold
    >>> network = torch.nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = network.weight[:, :2].zero_()
    >>> with hold(network):
    ...     optimizer = torch.optim.AdamW(network.parameters())
    ...     network(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> int((network.weight == 0).sum())
    4
    """
    held = {parameter: share(mask, parameter) for parameter, mask in _found(network, masks)}
    if not held:
        raise InputError("there are no zeros to hold: the network is dense, and no masks are given.")

    def masked(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~held[parameter], 0)  # type: ignore[index]

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter in held:
                for value in (parameter.data, *optimizer.state.get(parameter, {}).values()):
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.masked_fill_(~held[parameter], 0)

    with contextlib.ExitStack() as stack:
        for parameter, mask in held.items():
            parameter.data.masked_fill_(~mask, 0)
            hook = parameter.register_post_accumulate_grad_hook(masked)  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        stack.callback(register_optimizer_step_post_hook(stepped).remove)
        yield


class HoldMasks(TrainerCallback):  # type: ignore[misc]
    """`hold`, for transformers' Trainer: `Trainer(…, callbacks=[HoldMasks(masks)])`.

    Args:
        masks: as `hold` takes them.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None):
        self.masks = masks
        self._stack = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin to hold, now that the Trainer has wrapped the network."""
        self._stack.close()  # of a training that failed
        self._stack.enter_context(hold(model, self.masks))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The training is over."""
        self._stack.close()


def _slots(network: nn.Module, wanted: Collection[str]) -> list[Slot]:
    """The layers of a network, those of these names among them as far as there are any; of some networks they are known
    only when it was seen how they run."""
    slots = find_layers(network, "")
    if {slot.name for slot in slots} >= set(wanted):
        return slots
    task = next(make_task(name, options) for name, options in task_of(network).items())
    try:
        model = task.wrap(network)
    except PrunellaError:  # nothing is known of how it runs
        return slots
    try:
        return [slot for block in model.blocks for slot in find_layers(model.module(block), block)]
    finally:
        model.give_back()


def _found(network: nn.Module, masks: Mapping[str, Tensor] | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters with their masks."""
    parameters = dict(network.named_parameters())
    if masks is None:
        rows = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}  # of padding, say
        for parameter in parameters.values():
            mask = parameter.detach() != 0
            if (
                mask.ndim > 1
                and parameter not in rows
                and int(mask.numel() - mask.count_nonzero()) >= DENSE * mask.numel()
            ):
                yield parameter, mask
        return
    if not parameters.keys() >= masks.keys():
        layers = {name: mask for name, mask in masks.items() if name not in parameters}
        names = {id(parameter): name for name, parameter in parameters.items()}
        found: dict[str, Tensor] = {}
        for slot in _slots(network, layers):
            if slot.name in layers:
                parameter = getattr(slot.module, slot.parameter)
                name = names[id(parameter)]
                slot.write(layers.pop(slot.name), found.setdefault(name, torch.ones(parameter.shape, dtype=torch.bool)))
        if layers:
            raise InputError(f"'{min(layers)}' is neither a layer nor a parameter of this network, but has a mask.")
        masks = {**found, **{name: mask for name, mask in masks.items() if name in parameters}}
    for name, mask in masks.items():
        if mask.shape != parameters[name].shape:
            raise InputError(f"the mask of '{name}' is {tuple(mask.shape)}, not {tuple(parameters[name].shape)}.")
        yield parameters[name], mask.to(parameters[name].device)
