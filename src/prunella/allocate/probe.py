"""Probe: prune each block alone, and give density where that costs most."""

import math

from pydantic import PositiveFloat, PositiveInt

from ..evaluate.perplexity import losses
from ..registry import make
from ..stream import Stream
from ..unlabelled import compared
from .budget import Budget
from .registry import register_allocation


@register_allocation("probe")
def probe(
    budget: Budget, *, growth: PositiveFloat = 7.0, tokens: PositiveInt = 16_384, step: str = "wanda"
) -> dict[str, float]:
    """Measure what pruning each block alone adds to the loss on held-out text, and even that out.

    With a_b the rise of the loss when block b alone, of n_b weights, is pruned at the target sparsity s, and the rise
    at any other sparsity taken to be a_b exp(growth * (s_b - s)), the sum over all blocks is least, for so many weights
    in all, where

        s_b = s - (ln (a_b / n_b) - c) / growth

    with the c that meets the target: of blocks of one size the mean of the logarithms. Small blocks are cheap to keep.

    Args:
        growth: by how much the logarithm of the damage rises from sparsity 0 to 1; smaller spreads more.
        tokens: of calibration text, in whole windows: blocks are pruned on the first three quarters of them, the loss
            is measured on the others.
        step: prunes the block. A cheap one ranks the blocks as well as a dear one.

    A block that does no measurable damage counts like the least of the others. No test text is looked at. Samples with
    labels, of which there may be few, are compared with what the dense network answers, by numbers and not by right and
    wrong (`unlabelled.compared`). Costs half a forward pass of the held-out windows for each block.
    """
    model, steps = budget.model, [make(step)]
    to_learn, to_measure = budget.trial(tokens, "probe")
    to_measure = compared(model, to_measure, track=budget.track) or to_measure
    learn, held = Stream(model, to_learn), Stream(model, to_measure)
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
    sizes = {b: sum(budget.sizes[slot.name] for slot in budget.slots[b] if slot.name in budget.free) for b in found}
    most = max(sizes.values(), default=1)
    logs = {b: math.log(max(rise, least)) - math.log(sizes[b] / most) for b, rise in found.items()}
    return budget.spend(
        {slot.name: -logs[b] / growth for b in logs for slot in budget.slots[b] if slot.name in budget.free}
    )


def _mean_loss(stream: Stream) -> float:
    every = losses(stream)
    return sum(every) / len(every)
