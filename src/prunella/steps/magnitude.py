"""Magnitude pruning: the smallest weights go."""

from typing import Literal

from ..pattern import keep
from ..registry import register
from ..types import Layer


@register("magnitude")
def magnitude(layer: Layer, *, group: Literal["layer", "row"] = "layer") -> Layer:
    """Prune the smallest |w|; needs no data.

    score_ij = |W_ij|, compared over the whole layer (or within each output row).

    Args:
        group: what competes: the whole layer, or each output row.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    score_OI = layer.weight_OI.float().abs()
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern, group))
