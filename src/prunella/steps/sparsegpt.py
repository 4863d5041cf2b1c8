"""SparseGPT: prune from left to right and let the remaining weights make up for it."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from ..columns import column_pass
from ..linalg import inverse_factor
from ..registry import register
from ..types import Layer


@register("sparsegpt", needs={"gram"})
def sparsegpt(
    layer: Layer,
    *,
    damping: NonNegativeFloat = 0.01,
    tile: PositiveInt = 128,
    order: Literal["natural", "activation"] = "natural",
) -> Layer:
    """Prune by w^2 / [H^-1]_jj in one pass over the columns, updating the survivors.

    With H = E[x x^T] + damping * mean(diag) * I and U^T U = H^-1 (U upper triangular), go over the columns j
    from left to right:

        e_i = (w_ij - q_ij) / U_jj            q_ij = w_ij if kept, else 0
        W_i,j: <- W_i,j: - e_i U_j,j:

    The mask of each tile of columns is chosen when the pass reaches it, from weights that already carry
    the updates before it: the lowest w_ij^2 / U_jj^2 over all rows of the tile, or within each group of
    an N:M pattern as the pass reaches the group. A mask that an earlier step chose is kept: the pass then
    starts again from the dense weights (under the mask nothing is left to make up for) and only updates.

    Args:
        damping: share of the mean diagonal added to the diagonal; grown tenfold where the Cholesky fails.
        tile: columns in a tile, rounded up to whole groups of the pattern.
        order: `activation` goes through the columns from the largest H_jj to the smallest.

    Exactly round(share of weights) are pruned in a tile, where the reference code's threshold takes one more.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """
    span = layer.pattern.columns
    order_I = None
    if order == "activation":
        order_I = layer.stats.once(("by activation", span), lambda: _by_activation(layer.stats.norm_I, span))
    factor = inverse_factor(layer.stats, damping, order_I)
    weight_OI, mask_OI = layer.weight_OI if layer.mask_OI is None else layer.dense_OI, layer.mask_OI
    if order_I is not None:
        weight_OI, mask_OI = weight_OI[:, order_I], None if mask_OI is None else mask_OI[:, order_I]
    weight_OI, mask_OI, _ = column_pass(weight_OI, factor, mask_OI, layer.sparsity, layer.pattern, tile=tile)
    if order_I is not None:
        back_I = order_I.argsort()
        weight_OI, mask_OI = weight_OI[:, back_I], mask_OI[:, back_I]
    return layer.pruned(weight_OI, mask_OI, *factor.notes(damping))


def _by_activation(norm_I: Tensor, span: int) -> Tensor:
    """The columns in order: groups of a pattern move together, the ones with the largest mean H_jj first."""
    groups = norm_I.square().view(-1, span).mean(1).argsort(descending=True, stable=True)
    return (groups[:, None] * span + torch.arange(span, device=groups.device)).flatten()
