"""Gradual ADMM: weights and mask found together, the mask growing sparser on the way."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..linalg import cholesky
from ..pattern import keep
from ..registry import register
from ..types import Layer, Pattern


@register("admm", needs={"gram"})
def admm(
    layer: Layer,
    *,
    iterations: PositiveInt = 20,
    gradual: NonNegativeInt = 15,
    damping: NonNegativeFloat = 0.1,
    rho: PositiveFloat = 1.0,
    group: Literal["layer", "row"] = "layer",
) -> Layer:
    """Alternate between a least-squares solution and its pruned copy until they agree.

    Columns are scaled by s_j = sqrt(H_jj), H = E[x x^T], so that the scaled H has a unit diagonal, to which
    `damping` is added. With W_0 the scaled dense weight, U = 0 and W = W_0, iterate

        M  <- the largest (W + U)^2 at sparsity s_t                s_t = s (1 - (1 - t / gradual)^3)
        Z  <- M * (W + U)
        U  <- U + W - Z
        W  <- (W_0 H + rho (Z - U)) (H + rho I)^-1

    M is chosen anew in the first `gradual` iterations and stays then. The result is M * (W + U), unscaled.
    One inverse serves all iterations, and all layers with the same inputs.

    Under an N:M pattern, s_t prunes the lowest scores among those that the pattern would prune, so that the
    groups fill up gradually as well. A mask that an earlier step chose is kept: the iterations then only fit
    the weights.

    Args:
        iterations: all of them.
        gradual: how many it takes to reach the target sparsity.
        damping: share of the mean diagonal added to the diagonal.
        rho: how strongly W is drawn to Z.
        group: what competes: the whole layer, or each output row.

    Boža, "Fast and Effective Weight Update for Pruned Large Language Models", 2024 (arXiv 2401.02938).
    """
    scale_I, hessian_II, inverse_II = layer.stats.once(
        ("admm", damping, rho), lambda: _factor(layer.stats.hessian_II, damping, rho)
    )
    dense_OI = layer.dense_OI.float() * scale_I
    fixed_OI = dense_OI @ hessian_II
    mask_OI = torch.ones_like(dense_OI, dtype=torch.bool) if layer.mask_OI is None else layer.mask_OI
    w_OI, u_OI = dense_OI, torch.zeros_like(dense_OI)
    gradual = min(gradual, iterations)
    for t in range(1, iterations + 1):
        sum_OI = w_OI + u_OI
        if layer.mask_OI is None and (t <= gradual or t == 1):
            share = layer.sparsity if t >= gradual else layer.sparsity * (1 - (1 - t / gradual) ** 3)
            mask_OI = _mask(sum_OI.square(), share, layer.sparsity, layer.pattern, group)
        z_OI = sum_OI * mask_OI
        u_OI = sum_OI - z_OI
        w_OI = torch.add(fixed_OI, z_OI - u_OI, alpha=rho) @ inverse_II
    return layer.pruned((w_OI + u_OI) / scale_I, mask_OI)


def _mask(score_OI: Tensor, share: float, sparsity: float, pattern: Pattern, group: str) -> Tensor:
    """The mask on the way to `sparsity`, when `share` of the weights are to be pruned."""
    if pattern.kind != "nm":
        return keep(score_OI, share, pattern, group)
    mask_OI = keep(score_OI, sparsity, pattern)
    if share >= sparsity:
        return mask_OI
    return keep(score_OI.masked_fill(mask_OI, torch.inf), share, group=group)


def _factor(hessian_II: Tensor, damping: float, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """Column scales, the scaled and damped Hessian, and the inverse of it plus rho I."""
    diagonal_I = hessian_II.diagonal()
    # An input that is always zero must not blow up its weights: it is scaled like the smallest live one.
    live = diagonal_I > 0
    least = diagonal_I.masked_fill(~live, torch.inf).min()
    scale_I = diagonal_I.where(live, least.where(live.any(), 1.0)).sqrt()
    hessian_II = hessian_II / scale_I / scale_I[:, None]
    diagonal_I = hessian_II.diagonal()
    diagonal_I += damping * diagonal_I.mean()
    shifted_II = hessian_II + rho * torch.eye(len(hessian_II), device=hessian_II.device)
    return scale_I, hessian_II, torch.cholesky_inverse(cholesky(shifted_II))
