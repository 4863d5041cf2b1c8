"""How large each input is."""

from torch import Tensor

from .registry import register_statistic


@register_statistic("norm", chunks=True)
def norm(x_TI: Tensor) -> Tensor:
    """Sum over tokens of x^2, (I,)."""
    return (x_TI * x_TI).sum(0)
