"""How much the loss changes with each weight."""

import torch
from torch import Tensor

from .registry import register_statistic


@register_statistic("fisher")
def fisher(gradient_NOI: Tensor) -> Tensor:
    """Sum over samples of the squared gradient of the sample's loss in the weight, (O, I): N times the diagonal of the
    empirical Fisher matrix. In float32, or in float64 where the weight is."""
    dtype = torch.promote_types(gradient_NOI.dtype, torch.float32)
    sum_OI = torch.zeros(gradient_NOI.shape[1:], dtype=dtype, device=gradient_NOI.device)
    for gradient_OI in gradient_NOI:
        sum_OI += gradient_OI.to(dtype).square()
    return sum_OI
