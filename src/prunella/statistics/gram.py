"""Products of each two inputs."""

import torch
from torch import Tensor

from ..fast import add_gram
from .registry import register_statistic


@register_statistic("gram", implies={"norm"})
def gram(x_TI: Tensor) -> Tensor:
    """Sum over tokens of x x^T, (I, I)."""
    gram_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], dtype=torch.float32, device=x_TI.device)
    add_gram(gram_II, x_TI)
    return gram_II
