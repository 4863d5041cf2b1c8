"""Dense linear algebra on Hessians, shared by the methods that need it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericalError
from .types import Stats
from .waits import demand, holds


@dataclass(frozen=True)
class InverseFactor:
    """Upper-triangular U with U^T U = (H + damp I)^-1, and what it took to get it.

    U_jj^2 is the first diagonal entry of the inverse of H[j:, j:]: the denominator of Optimal Brain
    Surgeon once all columns before j are frozen.
    """

    upper_II: Tensor
    dead_I: Tensor
    damping: float

    def notes(self, damping: float) -> tuple[str, ...]:
        """What the report should say: nothing, if the damping that was asked for was enough."""
        return () if self.damping <= damping else (f"Hessian damped to {self.damping:g} of its mean diagonal",)


def inverse_factor(stats: Stats, damping: float, order_I: Tensor | None = None) -> InverseFactor:
    """Factor the inverse of the damped Hessian E[x x^T], once for all layers with this input.

    Args:
        damping: added to the diagonal, as a share of its mean. If the Cholesky fails, it grows tenfold
            until it succeeds. Inputs that are always zero (`dead_I`) get the mean diagonal of the others
            first, so that they neither spoil the mean nor the factor.
        order_I: columns in this order, or as they stand.
    Raises:
        NumericalError: no damping up to 1e4 helps, or the statistics are not finite.
    """
    # With J the reversal of the columns and A the damped Hessian, J A J = L L^T gives A = (J L J)(J L J)^T, and
    # J L J is upper triangular: its inverse is U. One Cholesky and one triangular inverse, where inverting and
    # factoring again takes three. Matrices of this size are let go as soon as they can be.

    def reversed_hessian(share: float) -> Tensor:
        hessian = stats.hessian_II if order_I is None else stats.hessian_II[order_I][:, order_I]
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal.masked_fill_(dead, _of_others(diagonal, dead))
        diagonal += share * diagonal.mean()
        return hessian.flip(0, 1)

    def make() -> InverseFactor:
        diagonal = stats.hessian_diagonal_I
        dead = (diagonal if order_I is None else diagonal[order_I]) == 0
        share = max(damping, 0.0)
        while True:
            lower, info = torch.linalg.cholesky_ex(reversed_hessian(share))
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            if holds((info == 0) & torch.isfinite(inverse.diagonal()).all()):
                del lower
                return InverseFactor(inverse.flip(0, 1), dead, share)
            share = share * 10 if share else 1e-6
            if not share <= 1e4:
                raise NumericalError("the Hessian cannot be factored at any damping: are the activations finite?")

    factor: InverseFactor
    factor, _ = stats.once(("inverse_factor", damping, id(order_I)), lambda: (make(), order_I))  # which so stays
    return factor


def _of_others(diagonal: Tensor, dead: Tensor) -> Tensor:
    """The mean of what is not dead, 1 where all is."""
    if diagonal.device.type == "cpu":
        return diagonal.new_ones(()) if dead.all() else diagonal[~dead].mean()
    return torch.where(dead.all(), 1, diagonal.masked_fill(dead, 0).sum() / (~dead).sum())


def cholesky(matrix_II: Tensor) -> Tensor:
    """The lower factor of a positive definite matrix. Raises NumericalError for any other."""
    lower_II: Tensor
    lower_II, info = torch.linalg.cholesky_ex(matrix_II)
    demand(info == 0, lambda: NumericalError("a Hessian cannot be factored: raise the damping."))
    return lower_II


def apart(one: Tensor, other: Tensor) -> Tensor:
    """How far two tensors are apart: the norm of their difference."""
    distance: Tensor = torch.linalg.vector_norm(one.float() - other.float())
    return distance
