"""Probe: prune each block alone, and give density where that costs most."""

import math

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
    learn, held = (Stream(model, samples) for samples in budget.trial(tokens, "probe"))
    damaged: dict[int, Stream] = {}  # the held-out text where that block alone is pruned: all of them ride along
    shelf = held.hidden.shelf_for(len(model.blocks))
    for index, block in model.walk(track=budget.track, what="allocating"):
        slots = [slot for slot in budget.slots[index] if slot.name in budget.free]
        for stream in damaged.values():
            stream.advance(block)
        if slots:
            result = learn.prune(block, slots, steps, last=True)
            damaged[index] = held.fork(shelf)
            with block.use(result.changed):
                damaged[index].advance(block)
        learn.advance(block)
        held.advance(block)
    rises = {index: _mean_loss(stream) for index, stream in damaged.items()}
    base = _mean_loss(held)
    worst = 10.0  # a model that is broken altogether, or overflows, is as bad as this
    found = {b: min(rise - base, worst) if math.isfinite(rise) else worst for b, rise in rises.items()}
    least = min((rise for rise in found.values() if rise > 0), default=1.0)
    logs = {b: math.log(max(rise, least)) for b, rise in found.items()}
    return budget.spend(
        {slot.name: -logs[b] / growth for b in logs for slot in budget.slots[b] if slot.name in budget.free}
    )


def _mean_loss(stream: Stream) -> float:
    every = losses(stream)
    return sum(every) / len(every)
