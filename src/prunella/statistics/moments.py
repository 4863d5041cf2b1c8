"""The mean of each input and, with its norm, its variance."""

from torch import Tensor

from .registry import register_statistic


@register_statistic("moments", implies={"norm"}, chunks=True)
def moments(x_TI: Tensor) -> Tensor:
    """Sum over tokens of x, (I,)."""
    return x_TI.sum(0)
