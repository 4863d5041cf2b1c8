"""Probe: prune each block alone, and give density where that costs most."""

import copy
import math

import torch
from pydantic import PositiveFloat, PositiveInt

from ..evaluate.perplexity import losses
from ..registry import make
from ..stream import Stream
from .budget import Budget
from .registry import register_allocation


@register_allocation("probe")
def probe(
    budget: Budget, *, growth: PositiveFloat = 7.0, tokens: PositiveInt = 16_384, step: str = "wanda"
) -> dict[str, float]:
    """Measure what pruning each block alone adds to the loss on held-out text, and even that out.

    With a_b the rise of the loss when block b alone is pruned at the target sparsity s, and the rise at any other
    sparsity taken to be a_b exp(growth * (s_b - s)), the sum over all blocks is least where

        s_b = s - (ln a_b - mean of ln a) / growth

    Args:
        growth: by how much the logarithm of the damage rises from sparsity 0 to 1; smaller spreads more.
        tokens: of calibration text, in whole windows: blocks are pruned on the first three quarters of them, the loss
            is measured on the others.
        step: prunes the block. A cheap one ranks the blocks as well as a dear one.

    A block that does no measurable damage counts like the least of the others. No test text is looked at. Costs half
    a forward pass of the held-out windows for each block.
    """
    model, steps = budget.model, [make(step)]
    learn, held = (Stream(model, ids_NL) for ids_NL in budget.trial(tokens, "probe"))
    count = len(model.blocks)
    rises: dict[int, float] = {}

    def mean_loss(stream: Stream) -> float:
        every = losses(stream)
        return sum(every) / len(every)

    for index in budget.track(range(count), "allocating", count):
        slots = [slot for slot in budget.slots[index] if slot.name in budget.free]
        with model.block(index) as block:
            if slots:
                dense = {name: tensor.clone() for name, tensor in block.state_dict().items()}
                learn.prune(index, slots, steps, last=True)
                damaged = copy.copy(held)
                damaged.hidden = held.hidden.copy()
                damaged.advance(index, block)
                with torch.no_grad():
                    for name, tensor in block.state_dict().items():
                        tensor.copy_(dense[name])
            learn.advance(index, block)
            held.advance(index, block)
        if slots:
            for later in range(index + 1, count):
                with model.block(later) as block:
                    damaged.advance(later, block)
            rises[index] = mean_loss(damaged)
    base = mean_loss(held)
    worst = 10.0  # a model that is broken altogether, or overflows, is as bad as this
    found = {b: min(rise - base, worst) if math.isfinite(rise) else worst for b, rise in rises.items()}
    least = min((rise for rise in found.values() if rise > 0), default=1.0)
    logs = {b: math.log(max(rise, least)) for b, rise in found.items()}
    return budget.spend({s.name: -logs[b] / growth for b in logs for s in budget.slots[b] if s.name in budget.free})
