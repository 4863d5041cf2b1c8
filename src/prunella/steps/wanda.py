"""Wanda: weights times the norm of what they multiply."""

from typing import Literal

import torch
from torch import Tensor

from ..pattern import keep
from ..registry import register
from ..types import Layer


@register("wanda", needs={"norm"})
def wanda(layer: Layer, *, group: Literal["row", "layer"] = "row", variant: bool = False) -> Layer:
    """Prune the smallest |w| times input norm, row by row; weights are not changed.

    score_ij = |W_ij| ||X_j||_2, compared within each output row (or, `group="layer"`, over the layer).

    With `variant`, rows may differ in sparsity: each row is pruned until the pruned scores reach a share
    alpha of the row's total, one alpha for the layer. Sorting all weights of the layer by the share that
    is lost once they go gives that same mask for every alpha, so the target is met exactly and no search
    is needed. It applies to unstructured pruning; other patterns use the plain score.

    Args:
        group: what competes: each output row, or the whole layer.
        variant: rows may differ in sparsity; goes before `group`.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023.
    """
    score_OI = layer.weight_OI.float().abs() * layer.stats.norm_I
    if variant and layer.pattern.kind == "unstructured":
        score_OI, group = _share_lost(score_OI), "layer"
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern, group))


def _share_lost(score_OI: Tensor) -> Tensor:
    """For each weight, the share of its row's total score that is gone once it and all below it go."""
    ascending_OI, order_OI = score_OI.sort(dim=1, stable=True)
    share_OI = ascending_OI.cumsum(1) / ascending_OI.sum(1, keepdim=True).clamp_min(1e-30)
    return torch.empty_like(share_OI).scatter_(1, order_OI, share_OI)
