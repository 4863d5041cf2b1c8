"""RIA: a weight counts relative to its row and its column."""

from typing import Literal

from pydantic import NonNegativeFloat

from ..pattern import keep
from ..registry import register
from ..types import Layer


@register("ria", needs={"norm"})
def ria(layer: Layer, *, group: Literal["layer", "row"] = "layer", power: NonNegativeFloat = 0.5) -> Layer:
    """Prune the smallest share of its row and column, times input norm; weights are not changed.

        score_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||_2^power

    compared over the whole layer (or, `group="row"`, within each output row). A row or column of small
    weights is not emptied as a whole, which is what plain magnitude does to it.

    Args:
        group: what competes.
        power: of the input norm; 0 leaves the inputs out, 1 is Wanda's weighting.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", 2024.
    """
    size_OI = layer.weight_OI.float().abs()
    row_O1 = size_OI.sum(1, keepdim=True).clamp_min(1e-30)
    column_I = size_OI.sum(0).clamp_min(1e-30)
    score_OI = (size_OI / row_O1 + size_OI / column_I) * layer.stats.norm_I**power
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern, group))
