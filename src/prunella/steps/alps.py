"""ALPS: ADMM whose penalty grows until the support stands still, then conjugate gradients."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..machine import in_double, widest
from ..pattern import keep
from ..registry import register
from ..types import Layer
from ..waits import either, seldom
from .update import least_squares

LOOK = 30  # iterations between two looks at a device: what is over before that stands still


@register("alps", needs={"gram"})
def alps(
    layer: Layer,
    *,
    iterations: PositiveInt = 300,
    damping: NonNegativeFloat = 0.01,
    rho: PositiveFloat = 0.1,
    solve: NonNegativeInt = 10,
    group: Literal["layer", "row"] = "layer",
) -> Layer:
    """Choose the support by ADMM, then fit the weights on it by conjugate gradients.

    With H = E[x x^T] + damping * mean(diag) * I, columns scaled by E_j = sqrt(H_jj), the scaled H = Q L Q^T,
    W the scaled dense weight, B = D = W and V = 0, iterate

        B <- (W H - V + rho D) Q (L + rho)^-1 Q^T
        D <- the entries of B + V / rho with the largest squares, others 0
        V <- V + rho (B - D)

    Every third iteration looks at how many entries entered or left the support since, as a share of the k
    kept ones: above 0.1, rho grows by 1.3; above 0.005, by 1.2; above 0, by 1.1. While the support has
    not moved since the beginning, rho is too large: it shrinks by 5 (from a fresh start if it moved by less
    than 0.005). Once it moved and stands still, or after 30 iterations moves by less than 3e-4, the support of
    the largest B^2 is final and `solve` conjugate gradients fit the weights on it.

    Args:
        iterations: at most so many.
        damping: share of the mean diagonal added to the diagonal.
        rho: the first penalty.
        solve: conjugate-gradient iterations.
        group: what competes: the whole layer, or each output row.

    A mask that an earlier step chose is kept: only the conjugate gradients run. Distances are averaged over
    tokens where the reference code sums them, which changes nothing: the scaled H has a unit diagonal.

    Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    2024.
    """
    if layer.mask_OI is not None:
        mask_OI, weight_OI = layer.mask_OI, layer.weight_OI
    else:
        scale_I, hessian_II, values_I, vectors_II = layer.stats.once(
            ("alps", damping), lambda: _decompose(layer.stats.hessian_II, damping)
        )
        b_OI = _support(
            layer.dense_OI.float() * scale_I,
            hessian_II,
            values_I,
            vectors_II,
            lambda score_OI: keep(score_OI, layer.sparsity, layer.pattern, group),
            iterations,
            rho,
        )
        mask_OI = keep(b_OI.square(), layer.sparsity, layer.pattern, group)
        weight_OI = (b_OI / scale_I).to(layer.weight_OI.dtype)
    weight_OI = least_squares(
        layer.stats.hessian_II,
        layer.dense_OI,
        weight_OI,
        mask_OI,
        iterations=solve,
        damping=damping,
        tolerance=1e-4,
    )
    return layer.pruned(weight_OI, mask_OI)


def _support(
    w_OI: Tensor,
    hessian_II: Tensor,
    values_I: Tensor,
    vectors_II: Tensor,
    choose: Callable[[Tensor], Tensor],
    iterations: int,
    rho: float,
) -> Tensor:
    """B at the end of the iterations."""
    goal_OI = w_OI @ hessian_II
    b_OI = d_OI = w_OI
    v_OI = torch.zeros_like(w_OI)
    before_OI = choose(w_OI.square())
    wide = widest(w_OI.device)
    kept, penalty = before_OI.count_nonzero().to(wide), torch.full((), rho, dtype=wide, device=w_OI.device)
    moved = over = torch.zeros((), dtype=torch.bool, device=w_OI.device)
    inverse_II = _inverse(values_I, vectors_II, penalty)
    for t in range(1, iterations + 1):
        b_OI = either(over, b_OI, _plus(goal_OI - v_OI, d_OI, penalty) @ inverse_II)
        sum_OI = _plus(b_OI, v_OI, 1 / penalty)
        mask_OI = choose(sum_OI.square())
        d_OI = sum_OI * mask_OI
        v_OI = _plus(v_OI, b_OI - d_OI, penalty)
        if t % 3:
            continue
        changed = (mask_OI != before_OI).count_nonzero().to(wide)
        before_OI = mask_OI
        much, some = changed > 0.1 * kept, changed > 0.005 * kept
        over = over | ((t > 30) & (changed < 3e-4 * kept)) | (moved & (changed == 0))
        if seldom(over, t - 1, LOOK) and over:
            break
        afresh = ~(over | some | moved) & (changed > 0)
        moved = moved | some
        slowly = torch.where(some, penalty * 1.2, torch.where(moved, penalty * 1.1, penalty / 5))
        penalty = torch.where(much, penalty * 1.3, slowly).clamp(1e-6, 1e6)
        inverse_II = _inverse(values_I, vectors_II, penalty)
        b_OI, d_OI = either(afresh, w_OI, b_OI), either(afresh, w_OI, d_OI)
        v_OI = either(afresh, torch.zeros_like(v_OI), v_OI)
    return b_OI


def _plus(a_OI: Tensor, b_OI: Tensor, times: Tensor) -> Tensor:
    """a + times b, where times is a single number."""
    if a_OI.device.type == "cpu":
        return torch.add(a_OI, b_OI, alpha=times.item())
    return torch.addcmul(a_OI, b_OI, times.to(b_OI.dtype))


def _inverse(values_I: Tensor, vectors_II: Tensor, rho: Tensor) -> Tensor:
    return (vectors_II / (values_I + rho)) @ vectors_II.T


def _decompose(hessian_II: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Column scales, the scaled and damped Hessian, its eigenvalues and eigenvectors."""
    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I += damping * diagonal_I.mean()
    scale_I = diagonal_I.clamp_min(1e-30).sqrt()
    hessian_II = hessian_II / scale_I / scale_I[:, None]
    values_I, vectors_II = (found.float().to(scale_I.device) for found in torch.linalg.eigh(in_double(hessian_II)))
    return scale_I, hessian_II, values_I.clamp_min(0), vectors_II
