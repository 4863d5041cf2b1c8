"""A step of a third party: |w| times the spread of its input."""

from prunella import Layer, keep, register


@register("mine", needs={"moments"})
def mine(layer: Layer, *, power: float = 1.0, flip: bool = False) -> Layer:
    """Prune by |w| times the spread of its input."""
    score_OI = layer.weight_OI.float().abs() * layer.stats.variance_I.sqrt() ** power
    return layer.pruned(layer.weight_OI, keep(-score_OI if flip else score_OI, layer.sparsity, layer.pattern))
