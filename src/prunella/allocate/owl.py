"""OWL: blocks with many outlying weights keep more of them."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from ..machine import widest
from ..types import Block, Layer
from ..waits import fetch
from .budget import Budget
from .registry import register_allocation


@register_allocation("owl")
def owl(
    budget: Budget,
    *,
    outliers: PositiveFloat = 5.0,
    spread: NonNegativeFloat = 0.08,
    per: Literal["block", "layer"] = "block",
) -> dict[str, float]:
    """Give more density where more scores stand out of the mean.

    With A the Wanda scores |W_ij| ||X_j|| of all layers of a block, its outlier share is

        o = the share of A above outliers * mean(A)

    and its sparsity falls linearly in o, by 2 * spread from the block with the least o to the one with the most.

    Args:
        outliers: how many times the mean is far.
        spread: half the distance between the densest and the sparsest.
        per: one sparsity a `block`, or for each `layer` its own.

    Scores are made on the dense model. Those of a block's layers are pooled as they are, as the reference code
    does, so that large ones count most. Where all shares are equal, so are the sparsities.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2023.
    """

    def share(score: Tensor) -> Tensor:
        return (score > outliers * score.mean()).sum(dtype=widest(score.device)) / score.numel()

    return spread_by(budget, share, spread, per)


def spread_by(
    budget: Budget, measure: Callable[[Tensor], Tensor], spread: float, per: Literal["block", "layer"]
) -> dict[str, float]:
    """Sparsities that fall linearly, by 2 * spread in all, with a measure of the Wanda scores of each unit."""

    def visit(block: Block) -> list[tuple[list[str], Tensor | None]]:
        units = [[la] for la in block.layers] if per == "layer" else [list(block.layers)]
        return [([la.name for la in unit], _of_scores(unit, measure)) for unit in units]

    units = [unit for block in budget.look(visit, {"norm"}) for unit in block]
    values = [value.item() for value in fetch([value for _, value in units if value is not None])]
    low, high = min(values, default=0.0), max(values, default=0.0)
    wish: dict[str, float] = {}
    for names, measured in units:
        # An expert that no token reached is neither dense nor sparse.
        value = None if measured is None else values.pop(0)
        place = 0.5 if value is None or high == low else (value - low) / (high - low)
        wish |= dict.fromkeys(names, -2 * spread * place)
    return budget.spend(wish)


def _of_scores(layers: Sequence[Layer], measure: Callable[[Tensor], Tensor]) -> Tensor | None:
    scores = [(la.weight_OI.float().abs() * la.stats.norm_I).flatten() for la in layers if la.stats.tokens]
    return measure(torch.cat(scores)) if scores else None
