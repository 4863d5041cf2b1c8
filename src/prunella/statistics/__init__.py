"""Statistics: what steps are told of a layer's inputs, and of the gradients of its weight. One file a statistic.

A statistic is a plain function of one batch, and says how those of several batches merge if not by a sum:

    @register_statistic("peak", merge=torch.maximum)
    def peak(x_TI: Tensor) -> Tensor: ...
"""

from . import (  # noqa: F401  (registers them)
    drift,
    fisher,
    gradients,
    gram,
    moments,
    norm,
)
from .registry import Statistic, register_statistic, statistics

__all__ = ["Statistic", "register_statistic", "statistics"]
