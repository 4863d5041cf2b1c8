"""DLP: blocks whose median score is low keep more."""

from typing import Literal

from pydantic import NonNegativeFloat

from .budget import Budget
from .owl import spread_by
from .registry import register_allocation


@register_allocation("dlp")
def dlp(
    budget: Budget, *, spread: NonNegativeFloat = 0.15, per: Literal["block", "layer"] = "block"
) -> dict[str, float]:
    """Give more density where the median score is lower.

    With A the Wanda scores |W_ij| ||X_j|| of all layers of a block and m = median(A), the block's sparsity rises
    linearly in m, by 2 * spread from the lowest to the highest: OWL with -m in place of the outlier share. It
    has no threshold to choose.

    Args:
        spread: half the distance between the densest and the sparsest.
        per: one sparsity a `block`, or for each `layer` its own.

    Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", 2025 (arXiv 2505.23807).
    """
    return spread_by(budget, lambda score: -score.median(), spread, per)
