"""The gradient of the loss of each sample."""

from torch import Tensor

from .registry import concatenate, register_statistic


@register_statistic("gradients", merge=concatenate)
def gradients(gradient_NOI: Tensor) -> Tensor:
    """The gradient of each sample's loss in the weight, (N, O, I), in the weight's dtype."""
    return gradient_NOI
