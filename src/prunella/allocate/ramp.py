"""Ramp: sparsity rises from block to block, as steeply as held-out text likes it."""

import math
from dataclasses import replace

from pydantic import PositiveFloat, PositiveInt

from ..errors import InputError
from ..evaluate.perplexity import losses
from ..registry import make
from ..samples import Samples
from ..stream import Stream, pick_order
from .budget import Budget
from .registry import register_allocation


@register_allocation("ramp")
def ramp(
    budget: Budget,
    *,
    rise: float | None = None,
    stride: PositiveFloat = 0.08,
    trials: PositiveInt = 8,
    tokens: PositiveInt = 32_768,
    step: str = "wanda",
) -> dict[str, float]:
    """Let sparsity rise by the same amount from each block to the next.

    Block b of L gets s_b = s + rise (b / (L - 1) - 1/2), as far as the budget and the bounds of 1% and 99% allow.
    The rise is searched: starting from 0 it goes by `stride` in the direction in which the loss on held-out
    calibration windows falls, until it stops falling; the lowest point of the parabola through the last three
    is tried as well, and the best of all is taken.

    Args:
        rise: from the first block to the last; None: searched.
        stride: how far apart the trials are.
        trials: at most so many.
        tokens: of calibration text for each trial, in whole windows: the model is pruned on the first three quarters
            of them and its loss measured on the others.
        step: prunes in a trial. A cheap one ranks the slopes as well as a dear one.

    The first block's inputs carry its errors through all others. No test text is looked at.

    Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
    2025 (ATP), with its one parameter searched by loss.
    """
    blocks = budget.blocks

    def shares(rise: float) -> dict[str, float]:
        last = max(1, len(blocks) - 1)
        return budget.spend({name: rise * b / last for b, names in enumerate(blocks) for name in names})

    if rise is not None or len(blocks) < 2:
        return shares(rise or 0.0)
    learn_on, held_out = budget.trial(tokens, "ramp", ", or set its rise")
    tried: dict[int, float] = {}  # strides from 0 -> loss

    def loss(strides: float) -> float:
        return held_out_loss(budget, shares(strides * stride), step, learn_on, held_out)

    tried[0] = loss(0)
    for direction in (1, -1):
        at = 0
        while len(tried) < trials:
            at += direction
            tried[at] = loss(at)
            if tried[at] >= tried[at - direction]:
                break
        if len(tried) > 2 or len(tried) >= trials:
            break  # the first direction went down, or there is no trial left
    best = min(tried, key=lambda strides: tried[strides])
    if best - 1 in tried and best + 1 in tried and len(tried) < trials:
        left, middle, right = (tried[best + k] for k in (-1, 0, 1))
        vertex = best + 0.5 * (left - right) / (left - 2 * middle + right) if left + right > 2 * middle else best
        if abs(vertex - best) > 0.05 and loss(vertex) < middle:
            return shares(vertex * stride)
    return shares(best * stride)


def held_out_loss(budget: Budget, shares: dict[str, float], step: str, learn_on: Samples, held_out: Samples) -> float:
    """Mean loss on `held_out` of the model pruned by `step` on `learn_on`; the model is left as it was.

    Both texts go through the blocks side by side, so that each block is pruned once and in memory once.
    """
    model, steps = budget.model, [make(step)]
    order = pick_order("auto", steps, learn_on, model)
    if order == "back":
        raise InputError(
            f"step '{step}' works on the way back, on which allocation 'ramp' tries none: use another step."
        )
    learn, held = Stream(model, learn_on, order=order), Stream(model, held_out)
    last = len(model.blocks) - 1
    for index, block in model.walk(track=budget.track, what="allocating"):
        slots = [replace(slot, sparsity=shares.get(slot.name, slot.sparsity)) for slot in budget.slots[index]]
        result = learn.prune(block, slots, steps, last=index == last)
        with block.use(result.changed):
            held.advance(block)
    every = losses(held)
    mean = sum(every) / len(every)
    return mean if math.isfinite(mean) else math.inf
