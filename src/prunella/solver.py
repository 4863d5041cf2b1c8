"""From a layer and its statistics to a pruned one: the steps of a recipe, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from .errors import NumericalError, StepError
from .grid import Grid, fit
from .histogram import counted, histograms
from .layers import Slot
from .machine import exact_products
from .model.walk import LoadedBlock
from .outcome import LayerResult
from .pattern import hold_zeros, pack
from .registry import Step
from .steps.magnitude import magnitude
from .types import Block, Layer, Stats, quotient
from .waits import demand, fetch


@dataclass(frozen=True)
class Settled:
    """A layer that is written into its block: what the host knows of it, and what the device still has to say.

    result: without what is to be said
    found:  how many of its weights are zero, and how many were; what was `counted`; the mask as bits
    lost:   what the error is the quotient of, if there is any
    grid:   if a step quantized it
    holds:  zeros that it came with stay
    """

    result: LayerResult
    found: tuple[Tensor, ...]
    lost: Tensor | None
    grid: Grid | None
    holds: bool

    @property
    def tensors(self) -> list[Tensor]:
        """What `told` takes, from the host."""
        return [
            *self.found,
            *([] if self.lost is None else [self.lost]),
            *([] if self.grid is None else [self.grid.scale_OG]),
        ]

    def told(self, here: Sequence[Tensor]) -> tuple[LayerResult, Tensor, Grid | None]:
        """The result, the mask as bits, and the grid, all on the host."""
        gone, before, *counts, bits = here[: len(self.found)]
        rest = list(here[len(self.found) :])
        size, target, notes = self.result.size, self.result.target, self.result.notes
        zeros = before.item() / size
        if self.holds and zeros > target:
            notes = (f"came with {zeros:.1%} zeros, more than the {target:.1%} asked for: all stay", *notes)
        result = replace(
            self.result,
            sparsity=gone.item() / size,
            before=zeros,
            notes=notes,
            error=None if self.lost is None else quotient(rest.pop(0)),
            weights=histograms(counts),
        )
        return result, bits, None if self.grid is None else replace(self.grid, scale_OG=rest.pop())


class Solver:
    """Applies steps to the layers of one block, and writes what they give into its weights.

    Args:
        begin, masks: of a model that is pruned already, the weights that the steps begin with, {parameter: tensor}, and
            their masks, {layer: (O, I)}. The block's own weights are the dense ones.
        min_tokens: a layer that fewer tokens reached is pruned by magnitude, and says so.
        rounding: bits and group of the grid for layers that no step quantizes; None: they are not rounded.
        keep_zeros: zeros that the weights come with stay zero, and count towards the sparsity (`hold_zeros`).
    """

    def __init__(
        self,
        block: LoadedBlock,
        steps: Sequence[Step],
        *,
        begin: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        min_tokens: int,
        rounding: tuple[int, int] | None,
        keep_zeros: bool,
    ):
        self.block = block
        self.steps = steps
        self.begin = begin
        self.masks = masks
        self.min_tokens = min_tokens
        self.rounding = rounding
        self.keep_zeros = keep_zeros
        self.needs = frozenset().union(*(step.needs for step in steps))

    def alone(self, slot: Slot, stats: Stats, reached: bool = True) -> Settled:
        """One layer by itself. One that no token `reached` is always pruned by magnitude."""
        one = Block(self.block.index, self.block.name, (self.layer(slot, stats),))
        least = self.min_tokens if reached else max(1, self.min_tokens)
        return self.settle(self.apply(one, least).layers[0], slot)

    def layer(self, slot: Slot, stats: Stats) -> Layer:
        """A layer as the steps begin with it. Raises NumericalError for statistics that are not finite."""
        for value in stats.values.values():
            if value.ndim < 2:  # matrices would take long, and come with a norm
                demand(
                    torch.isfinite(value).all(),
                    lambda: NumericalError(
                        f"the inputs of layer '{slot.name}' hold NaN or infinity: the model overflows on the"
                        " calibration text; use --dtype float32 or bfloat16."
                    ),
                )
        weight_OI = slot.read().contiguous()
        layer = Layer(
            slot.name,
            weight_OI,
            weight_OI,
            stats,
            slot.sparsity,
            slot.pattern,
            bias_O=slot.bias(),
        )
        if slot.name in self.masks:
            mask_OI = self.masks[slot.name].to(weight_OI.device)
            return layer.pruned(slot.read(self.begin[slot.key]), mask_OI)
        return layer

    def apply(self, block: Block, least: int | None = None) -> Block:
        """The steps, one after the other; magnitude for layers that saw too few tokens."""
        least = (self.min_tokens if least is None else least) if self.needs else 0
        starved = {la.name: la for la in block.layers if la.stats.tokens < least}
        fed = replace(block, layers=tuple(la for la in block.layers if la.name not in starved))
        if fed.layers:
            for step in self.steps:
                allowed = {la.name: la.stats.only(step.needs) for la in fed.layers}
                kept = {la.name: la.stats for la in fed.layers}
                lent = tuple(replace(la, stats=allowed[la.name]) for la in fed.layers)
                with exact_products(lent[0].weight_OI.device):
                    fed = step.apply(replace(fed, layers=lent))
                fed = replace(fed, layers=tuple(replace(self._held(la), stats=kept[la.name]) for la in fed.layers))
        done = {la.name: la for la in fed.layers}
        for name, layer in starved.items():
            note = f"saw {layer.stats.tokens} tokens: pruned by magnitude"
            done[name] = replace(self._held(magnitude(layer)), notes=(*layer.notes, note))
        return replace(fed, layers=tuple(self._rounded(done[la.name]) for la in block.layers))

    def _held(self, layer: Layer) -> Layer:
        return hold_zeros(layer) if self.keep_zeros else layer

    def _rounded(self, layer: Layer) -> Layer:
        if self.rounding is None or layer.grid is not None or layer.mask_OI is None:
            return layer
        grid = fit(layer.weight_OI, *self.rounding)
        return layer.pruned(grid.round(layer.weight_OI), layer.mask_OI, grid=grid)

    def settle(self, layer: Layer, slot: Slot) -> Settled:
        """Write the weight into the block; keep what the report needs, the mask as bits and the grid: nothing large."""
        if layer.mask_OI is None:
            raise StepError(
                f"the steps chose no mask for layer '{layer.name}': the last one must end with layer.pruned(…)."
            )
        zero_OI = layer.dense_OI == 0
        result = LayerResult(
            layer.name,
            slot.shape,
            0.0,
            slot.sparsity,
            str(slot.pattern),
            None,
            layer.stats.tokens,
            layer.notes,
            None if layer.grid is None else layer.grid.bits,
        )
        gone_OI = ~layer.mask_OI | (zero_OI & (layer.weight_OI == 0))
        found = (
            gone_OI.count_nonzero(),
            zero_OI.count_nonzero(),
            *counted(layer.dense_OI, layer.weight_OI, layer.mask_OI),
            pack(layer.mask_OI),
        )
        lost = layer.lost()  # before the dense weight is overwritten: the two share their memory
        slot.write(layer.weight_OI)
        return Settled(result, found, lost, layer.grid, self.keep_zeros)


def tell(
    slots: Sequence[Slot], layers: Mapping[str, Settled]
) -> dict[str, tuple[LayerResult, Tensor | None, Grid | None]]:
    """What became of all layers of a block, those too that stayed dense: results, masks as bits and grids, all on the
    host by one copy."""
    asked = [
        layers[slot.name].tensors if slot.name in layers else [(slot.read() == 0).count_nonzero()] for slot in slots
    ]
    found = iter(fetch([tensor for tensors in asked for tensor in tensors]))
    told: dict[str, tuple[LayerResult, Tensor | None, Grid | None]] = {}
    for slot, tensors in zip(slots, asked, strict=True):
        here = list(islice(found, len(tensors)))
        told[slot.name] = (
            layers[slot.name].told(here) if slot.name in layers else (LayerResult.dense_one(slot, here[0]), None, None)
        )
    return told
