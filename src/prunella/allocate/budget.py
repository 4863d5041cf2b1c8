"""What an allocation is given to spend, and how the sum comes out right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..layers import Slot
from ..model.network import Model
from ..progress import Track, no_track
from ..registry import Step
from ..samples import Samples
from ..stream import Stream, tokens_of
from ..types import Block, Layer, Stats

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """What an allocation is given: layers, and the share of all their weights together that is to be pruned.

    model, samples: for allocations that look at how the model behaves on what it is calibrated on
    slots:    the layers of each block, in order; those with sparsity 0 stay dense
    free:     names of the layers to decide on: not those that the recipe skips or names a sparsity for
    sparsity: share to prune of all free weights together
    shared:   statistics that `look` made and other budgets on the same dense model and samples may use
    track:    wraps loops over blocks, `track(range, what, total)`, to show progress
    """

    model: Model
    samples: Samples
    slots: Sequence[Sequence[Slot]]
    free: frozenset[str]
    sparsity: float
    shared: dict[Any, dict[str, Stats]] = field(default_factory=dict)
    track: Track = no_track

    @property
    def blocks(self) -> list[list[str]]:
        """The names of the free layers, block by block; blocks without any are left out."""
        found = [[slot.name for slot in block if slot.name in self.free] for block in self.slots]
        return [names for names in found if names]

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights each free layer has, {layer: number}."""
        return {s.name: s.shape[0] * s.shape[1] for block in self.slots for s in block if s.name in self.free}

    def look(self, visit: Callable[[Block], T], needs: Iterable[str]) -> list[T]:
        """Call `visit(block)` on each dense block that has free layers, with these and the statistics of their inputs;
        what the calls return.

        No more than one block is in memory at a time. Where only small statistics are wanted, and another budget on the
        same samples has made them, nothing is run through the model.

        Args:
            visit: is called with each block, in order.
            needs: statistics that it reads, as those of a step.
        """
        seen: list[T] = []
        key = (frozenset(needs), self.free)
        known = self.shared.get(key, {} if key[0] else dict.fromkeys(self.free, Stats()))
        if known:
            for index, block in self.model.walk():
                layers = [_dense(slot, known[slot.name]) for slot in self.slots[index] if slot.name in known]
                if layers:
                    seen.append(visit(Block(index, block.name, tuple(layers))))
            return seen
        made: dict[str, Stats] = {}

        def apply(block: Block) -> Block:
            seen.append(visit(block))
            made.update({la.name: replace(la.stats, sample_TI=None, cache={}) for la in block.layers})
            whole = [replace(la, mask_OI=torch.ones_like(la.weight_OI, dtype=torch.bool)) for la in block.layers]
            return replace(block, layers=tuple(whole))

        step = Step("look", key[0], apply, per_layer=False, prunes=False, options={})
        stream = Stream(self.model, self.samples)
        last = len(self.model.blocks) - 1
        for index, block in self.model.walk(track=self.track, what="allocating"):
            wanted = [replace(slot, sparsity=0.5) for slot in self.slots[index] if slot.name in self.free]
            if wanted:
                stream.prune(block, wanted, [step], min_tokens=0, last=index == last)
            else:
                stream.advance(block)
        if key[0] <= {"norm", "moments"}:
            self.shared[key] = made
        return seen

    def trial(self, tokens: int, allocation: str, otherwise: str = "") -> tuple[Samples, Samples]:
        """The samples that hold the first `tokens` tokens: three quarters to prune on, and the others, to measure on.

        Raises InputError, naming the allocation and what else helps, where there is none to hold out.
        """
        some = self.samples.first(max(2, math.ceil(tokens / tokens_of(self.samples.groups[0]))))
        if len(some) < 2:
            raise InputError(
                f"allocation '{allocation}' holds out calibration windows to measure on: use two or more windows"
                f" (--samples){otherwise}."
            )
        learn = len(some) - max(1, len(some) // 4)
        return some.first(learn), some.after(learn)

    def spend(self, wish: Mapping[str, float]) -> dict[str, float]:
        """Sparsities that are as near to a wish, {layer: sparsity}, as the budget allows.

        One number is added to all wishes, so that their mean, weighted by the layers' sizes, is the target
        after each has been clipped to 1% ... 99% (water filling). No layer is left dense or emptied, unless
        the target itself is beyond these bounds.
        """
        sizes = self.sizes
        names = list(sizes)
        size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
        want = torch.tensor([wish[name] for name in names], dtype=torch.float64)
        least, most = min(0.01, self.sparsity), max(0.99, self.sparsity)
        total = self.sparsity * size.sum()

        def given(shift: float) -> Tensor:
            return (want + shift).clamp(least, most)

        low, high = least - want.max().item(), most - want.min().item()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if (given(middle) * size).sum() < total else (low, middle)
        share = given(high)
        inside = (share > least) & (share < most)
        if inside.any():  # what bisection leaves over
            share[inside] += (total - (share * size).sum()) / size[inside].sum()
        return dict(zip(names, share.clamp(least, most).tolist(), strict=True))


def _dense(slot: Slot, stats: Stats) -> Layer:
    weight_OI = slot.read()
    return Layer(slot.name, weight_OI, weight_OI, stats, slot.sparsity, slot.pattern, bias_O=slot.bias())
