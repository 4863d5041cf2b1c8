"""Dense linear algebra on Hessians, shared by the methods that need it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericalError
from .types import Stats


@dataclass(frozen=True)
class InverseFactor:
    """Upper-triangular U with U^T U = (H + damp I)^-1, and what it took to get it.

    U_jj^2 is the first diagonal entry of the inverse of H[j:, j:]: the denominator of Optimal Brain
    Surgeon once all columns before j are frozen.
    """

    upper_II: Tensor
    dead_I: Tensor
    damping: float


def inverse_factor(stats: Stats, damping: float, order_I: Tensor | None = None) -> InverseFactor:
    """Factor the inverse of the damped Hessian E[x x^T], once for all layers with this input.

    Args:
        damping: added to the diagonal, as a share of its mean. If the Cholesky fails, it grows tenfold
            until it succeeds. Inputs that are always zero (`dead_I`) get a diagonal of 1 first, so that
            they neither spoil the mean nor the factor.
        order_I: columns in this order, or as they stand.
    Raises:
        NumericalError: no damping up to 1e4 helps, or the statistics are not finite.
    """

    def make() -> InverseFactor:
        hessian = stats.hessian_II if order_I is None else stats.hessian_II[order_I][:, order_I]
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        mean = diagonal.mean().item()
        share, added = max(damping, 0.0), 0.0
        while True:
            diagonal += share * mean - added
            added = share * mean
            upper = _inverse_upper(hessian)
            if upper is not None:
                return InverseFactor(upper, dead, share)
            share = share * 10 if share else 1e-6
            if not share <= 1e4:
                raise NumericalError("the Hessian cannot be factored at any damping: are the activations finite?")

    key = ("inverse_factor", damping, None if order_I is None else tuple(order_I.tolist()))
    factor: InverseFactor = stats.once(key, make)
    return factor


def _inverse_upper(matrix: Tensor) -> Tensor | None:
    """Upper-triangular U with U^T U = matrix^-1, or None where the matrix is not positive definite.

    With J the reversal, J A J = L L^T gives A = (J L J)(J L J)^T, and J L J is upper triangular; its
    inverse is U. One Cholesky and one triangular inverse, where inverting and factoring again takes three.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if info.item():
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if torch.isfinite(upper).all() else None
