"""Align: aim each layer at what it puts out in the dense model, not at what it makes of pruned inputs."""

from dataclasses import replace

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from ..linalg import cholesky
from ..registry import register
from ..types import Layer, Stats


@register("align", needs={"gram", "drift"}, prunes=False)
def align(layer: Layer, *, strength: NonNegativeFloat = 1.0, damping: NonNegativeFloat = 1.0) -> Layer:
    """Replace the dense weight by the one that best undoes the errors of the pruned layers before it.

    A layer of the pruned model gets x where the dense model's gets x'. With W its dense weight, steps imitate
    W x; what the model needs is W x'. Among all dense weights

        W + strength * W E[(x' - x) x^T] (H + damping * mean(diag H) * I)^-1        H = E[x x^T]

    comes closest to that at strength 1, and since the loss of any other weight V beside it is
    (V - W) H (V - W)^T, every step that follows works on it as on a dense weight: masks and weights are then
    chosen for the dense model's activations. Goes before them.

    Args:
        strength: 0 changes nothing; below 1 trusts the calibration text less.
        damping: share of the mean diagonal added to H; it draws the weight towards the dense one. What the pruned
            layers add to x is noise to a large part, and with little damping the solution fits the noise of the
            calibration text: on text it has not seen the outputs are then worse than without.

    Costs a second pass of the calibration text through the dense blocks. Experts of a mixture stay as they are:
    what is routed to them differs between the two models.

    Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025
    (arXiv 2504.02692), has this aim inside GPTQ's column pass.
    """
    solution_II = layer.stats.once(("align", damping), lambda: _solve(layer.stats, damping))
    dense_OI = layer.dense_OI.float()
    aimed_OI = torch.addmm(dense_OI, dense_OI, solution_II, alpha=strength).to(layer.dense_OI.dtype)
    mask_OI = layer.mask_OI
    weight_OI = aimed_OI if mask_OI is None else layer.weight_OI
    return replace(layer, weight_OI=weight_OI, dense_OI=aimed_OI)


def _solve(stats: Stats, damping: float) -> Tensor:
    """E[(x' - x) x^T] (H + damping)^-1."""
    hessian_II = stats.hessian_II
    diagonal_I = hessian_II.diagonal()
    diagonal_I += max(damping, 1e-6) * diagonal_I.mean() + 1e-30
    lower_II = cholesky(hessian_II)
    return torch.cholesky_solve(stats.mean_drift_II.T, lower_II).T
