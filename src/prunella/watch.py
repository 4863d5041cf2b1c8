"""Watching the products of a network with its layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .compat import version_of
from .errors import DefectError
from .layers import Slot, products
from .types import Stats

SAMPLE = 512  # calibration tokens on which the error of each layer is measured


class Stop(Exception):
    """The forward pass has shown all that was wanted."""


class Watch(TorchFunctionMode):
    """Sees every product of a block's inputs with one of its layers' weights, before it is made.

    `see(layer name, input (T, I), is it the same tensor as at the layer before)`. Watching the products and
    not the modules makes linear layers, transposed ones and the experts of a mixture one case. A product that meets
    a layer's weight in another shape, or along its other side, is a defect.
    """

    def __init__(self, slots: Mapping[str, Slot], see: Callable[[str, Tensor, bool], None]):
        super().__init__()
        views = {name: slot.view() for name, slot in slots.items()}
        self.by_address = {view.data_ptr(): (name, view) for name, view in views.items()}
        self.storages = {view.untyped_storage().data_ptr() for view in views.values()}
        self.see = see
        self.last: tuple[Tensor, int] | None = None

    def _known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for found in products(function, args, kwargs, self._known):
            weight_OI = found.weight_OI
            name, layer_OI = self.by_address.get(weight_OI.data_ptr(), ("", weight_OI))
            if not name:
                continue
            if (weight_OI.shape, weight_OI.stride()) != (layer_OI.shape, layer_OI.stride()):
                raise DefectError(
                    f"layer '{name}' was taken for a matrix {tuple(layer_OI.shape)} (outputs, inputs), but the model"
                    f" multiplies by {tuple(weight_OI.shape)} of its weights: leave it out with --skip '{name}'"
                )
            source, x_TI = found.source, found.x().detach()
            if found.batched:  # the tokens of other experts come as zeros
                x_TI = x_TI[x_TI.any(1)]
            if x_TI.numel():
                same = not found.batched and self.last is not None and source is self.last[0]
                same = same and self.last is not None and version_of(source) == self.last[1]
                self.last = (source, version_of(source))
                self.see(name, x_TI, same)
        return function(*args, **kwargs)


class Gather:
    """Makes statistics of what is seen, batch by batch: `Watch(slots, gather.see)`.

    stats:  of layers, {name: its statistics}; of those fed by the same tensor, of the first of them
    leader: which one that is, {layer: layer}, of all that were seen
    dense:  what the dense model has in place of the inputs of this batch, {layer: (T, I)}; used up
    first:  is it the first batch? The sample of tokens comes from there
    """

    def __init__(self, needs: Collection[str]):
        self.needs = needs
        self.stats: dict[str, Stats] = {}
        self.leader: dict[str, str] = {}
        self.dense: dict[str, Tensor] = {}
        self.first = True
        self._previous = ""

    def see(self, name: str, x_TI: Tensor, same: bool) -> None:
        if not same:
            self._previous = name
            sample = SAMPLE if self.first or name not in self.stats else 0
            new = Stats.of(x_TI, self.needs, sample, self.dense.pop(name, None))
            self.stats[name] = self.stats[name] + new if name in self.stats else new
        self.leader[name] = self._previous
