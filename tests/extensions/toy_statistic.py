"""Statistics of one's own, and steps that need them: all that is here runs by `path/to/toy_statistic.py:name`."""

import torch
from torch import Tensor

from prunella import Layer, keep, register, register_statistic


@register_statistic("toy-peak", merge=torch.maximum)
def peak(x_TI: Tensor) -> Tensor:
    """The largest |x| of each input."""
    return x_TI.abs().amax(0).float()


@register("toy-peak", needs={"toy-peak"})
def by_peak(layer: Layer) -> Layer:
    """Prune the smallest |w| times the largest |x|, in each row."""
    score_OI = layer.weight_OI.float().abs() * layer.stats["toy-peak"]
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern, group="row"))


@register_statistic("toy-slope")
def slope(gradient_NOI: Tensor) -> Tensor:
    """Sum over samples of the gradient, which is N times that of the mean loss."""
    return gradient_NOI.float().sum(0)


@register("toy-fisher", needs={"fisher"})
def by_fisher(layer: Layer) -> Layer:
    """Prune what the loss is expected to mind least: the smallest w^2 times the sum of squared gradients."""
    score_OI = layer.weight_OI.float().square() * layer.stats["fisher"]
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern))


@register("toy-taylor", needs={"toy-slope", "norm"})
def by_slope(layer: Layer, *, norms: float = 0.0) -> Layer:
    """Prune the smallest |w g|, times norms of inputs to some power."""
    score_OI = (layer.weight_OI.float() * layer.stats["toy-slope"]).abs() * layer.stats.norm_I**norms
    return layer.pruned(layer.weight_OI, keep(score_OI, layer.sparsity, layer.pattern))
