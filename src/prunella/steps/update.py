"""Update: the best weights under a mask, by conjugate gradients."""

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from ..registry import register
from ..types import Layer
from ..waits import number
from .wanda import wanda


@register("update", needs={"gram"})
def update(
    layer: Layer,
    *,
    iterations: NonNegativeInt = 20,
    damping: NonNegativeFloat = 0.01,
    tolerance: NonNegativeFloat = 0.0,
) -> Layer:
    """Fit the kept weights to the dense outputs by conjugate-gradient least squares; the mask stays.

    With H = E[x x^T] + damping * mean(diag) * I, every row w of the layer (dense: v, mask: m) minimizes

        f(w) = (v - w)^T H (v - w)        over w with w = m * w

    All rows go together: with R = M * ((V - W) H) and the preconditioner 1 / H_jj, one iteration is one
    product P H and an exact line search along P,

        Q = M * (P H)        a = <P, R> / <P, Q>        W += a P        R -= a Q
        Z = R / diag(H)      P <- Z + P <Z, R>_new / <Z, R>_old

    so f falls in every iteration. What is left at the end is compared with the start, row by row, in the
    layer's own dtype, and the better one stays: a row is never worse than before.

    Args:
        iterations: products with H; 20 come close to the exact solution.
        damping: share of the mean diagonal added to H; it draws the weights towards the dense ones.
        tolerance: stop once every row's residual has shrunk by this factor.

    Works on the mask that an earlier step chose; on Wanda's if there is none.

    Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    2024 (its second half).
    """
    if layer.mask_OI is None:
        layer = wanda(layer)
    assert layer.mask_OI is not None
    weight_OI = least_squares(
        layer.stats.hessian_II,
        layer.dense_OI,
        layer.weight_OI,
        layer.mask_OI,
        iterations=iterations,
        damping=damping,
        tolerance=tolerance,
    )
    return layer.pruned(weight_OI, layer.mask_OI)


def least_squares(
    hessian_II: Tensor,
    dense_OI: Tensor,
    weight_OI: Tensor,
    mask_OI: Tensor,
    *,
    iterations: int,
    damping: float,
    tolerance: float = 0.0,
) -> Tensor:
    """Weights under `mask_OI`, in the dtype of `weight_OI` and starting from it, whose outputs come close to
    those of `dense_OI`: see `update`."""
    diagonal_I = hessian_II.diagonal()
    shift = damping * number(diagonal_I.mean())
    inverse_I = 1 / (diagonal_I + shift).clamp_min(1e-30)
    v_OI = dense_OI.float()
    start_OI = weight_OI.masked_fill(~mask_OI, 0)
    m_OI = mask_OI.float()

    w_OI = start_OI.float().clone()
    r_OI = v_OI - w_OI
    gradient_OI = _product(r_OI, hessian_II, shift)
    before_O1 = _dots(r_OI, gradient_OI)
    r_OI = gradient_OI.mul_(m_OI)
    z_OI = r_OI * inverse_I
    p_OI = z_OI.clone()
    rz_O1 = first_O1 = _dots(r_OI, z_OI)
    for _ in range(iterations):
        going = ~(rz_O1 <= tolerance**2 * first_O1).all()
        if going.device.type == "cpu" and not going:
            break
        q_OI = _product(p_OI, hessian_II, shift).mul_(m_OI)
        # Small steps where a row has nothing left to gain: 0 / 0 is 0.
        a_O1 = _dots(p_OI, r_OI) / _dots(p_OI, q_OI).clamp_min(1e-30) * going  # a device is not asked: it stands still
        w_OI.addcmul_(a_O1, p_OI)
        r_OI.addcmul_(a_O1, q_OI, value=-1)
        torch.mul(r_OI, inverse_I, out=z_OI)
        new_O1 = _dots(r_OI, z_OI)
        p_OI.mul_(new_O1 / rz_O1.clamp_min(1e-30)).add_(z_OI)
        rz_O1 = new_O1

    end_OI = w_OI.to(weight_OI.dtype)
    d_OI = v_OI - end_OI.float()
    after_O1 = _dots(d_OI, _product(d_OI, hessian_II, shift))
    return torch.where(after_O1 < before_O1, end_OI, start_OI)


def _product(p_OI: Tensor, hessian_II: Tensor, shift: Tensor | float) -> Tensor:
    """P (H + shift I), without making a copy of H."""
    if isinstance(shift, Tensor):
        return torch.addmm(p_OI * shift, p_OI, hessian_II)
    return torch.addmm(p_OI, p_OI, hessian_II, beta=shift)


def _dots(a_OI: Tensor, b_OI: Tensor) -> Tensor:
    return torch.einsum("oi,oi->o", a_OI, b_OI)[:, None]
