"""How far pruning the layers before has moved the inputs."""

import torch
from torch import Tensor

from ..fast import add_drift
from .registry import register_statistic


@register_statistic("drift")
def drift(x_TI: Tensor, dense_TI: Tensor | None) -> Tensor:
    """Sum over tokens of (x' - x) x^T, (I, I), with x' what the dense model has in place of x."""
    drift_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], dtype=torch.float32, device=x_TI.device)
    if dense_TI is not None:
        add_drift(drift_II, dense_TI, x_TI)
    return drift_II
