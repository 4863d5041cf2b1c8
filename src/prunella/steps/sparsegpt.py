"""SparseGPT: prune from left to right and let the remaining weights make up for it."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt

from ..linalg import inverse_factor
from ..pattern import keep
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
    """Prune by w^2 / [H^-1]_jj in one sweep over the columns, updating the survivors.

    With H = E[x x^T] + damping * mean(diag) * I and U^T U = H^-1 (U upper triangular), sweep the columns j
    from left to right:

        e_i = (w_ij - q_ij) / U_jj            q_ij = w_ij if kept, else 0
        W_i,j: <- W_i,j: - e_i U_j,j:

    The mask of each tile of columns is chosen when the sweep reaches it, from weights that already carry
    the updates before it: the lowest w_ij^2 / U_jj^2 over all rows of the tile, or within each group of
    an N:M pattern as the sweep reaches the group. A mask that an earlier step chose is kept: the sweep then
    starts again from the dense weights (under the mask nothing is left to make up for) and only updates.

    Args:
        damping: share of the mean diagonal added to the diagonal; grown tenfold where the Cholesky fails.
        tile: columns in a tile, rounded up to whole groups of the pattern.
        order: `activation` sweeps the columns from the largest H_jj to the smallest.

    Exactly round(share of weights) are pruned in a tile, where the reference code's threshold takes one more.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """
    width = layer.weight_OI.shape[1]
    span = layer.pattern.columns
    order_I = None
    if order == "activation":
        # Groups of a pattern move together, the ones with the largest mean H_jj first.
        energy = layer.stats.norm_I.square().view(-1, span).mean(1)
        groups = energy.argsort(descending=True, stable=True)
        order_I = (groups[:, None] * span + torch.arange(span, device=groups.device)).flatten()
    factor = inverse_factor(layer.stats, damping, order_I)
    upper_II = factor.upper_II

    # Columns as rows: the sweep works on one column at a time, which should be contiguous.
    weight_IO = (layer.weight_OI if layer.mask_OI is None else layer.dense_OI).float().T
    weight_IO = (weight_IO if order_I is None else weight_IO[order_I]).clone(memory_format=torch.contiguous_format)
    weight_IO[factor.dead_I] = 0
    fixed_IO = None
    if layer.mask_OI is not None:
        fixed_IO = layer.mask_OI.T if order_I is None else layer.mask_OI.T[order_I]
    mask_IO = torch.ones_like(weight_IO, dtype=torch.bool)

    tile = -(-tile // span) * span
    for start in range(0, width, tile):
        stop = min(start + tile, width)
        upper = upper_II[start:stop, start:stop]
        w_IO = weight_IO[start:stop]
        mask = mask_IO[start:stop]
        diagonal = upper.diagonal()
        whole_tile = fixed_IO is not None or layer.pattern.kind != "nm"
        if fixed_IO is not None:
            mask.copy_(fixed_IO[start:stop])
        elif whole_tile:
            score_OI = (w_IO / diagonal[:, None]).square().T
            mask.copy_(keep(score_OI.contiguous(), layer.sparsity, layer.pattern).T)
        errors = torch.empty_like(w_IO)
        for j in range(stop - start):
            if not whole_tile and j % span == 0:
                score_OI = (w_IO[j : j + span] / diagonal[j : j + span, None]).square().T
                mask[j : j + span] = keep(score_OI.contiguous(), layer.sparsity, layer.pattern).T
            torch.mul(w_IO[j], ~mask[j], out=errors[j]).div_(diagonal[j])
            if j + 1 < stop - start:
                w_IO[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        weight_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors, alpha=-1)

    if order_I is not None:
        back = order_I.argsort()
        weight_IO, mask_IO = weight_IO[back], mask_IO[back]
    note = () if factor.damping <= damping else (f"Hessian damped to {factor.damping:g} of its mean diagonal",)
    return layer.pruned(weight_IO.T, mask_IO.T.contiguous(), *note)
