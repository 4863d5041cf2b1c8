"""Global: all layers compete for what may stay."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..errors import InputError
from ..pattern import cut, ranked
from ..registry import make
from ..types import Block
from .budget import Budget
from .registry import register_allocation


@register_allocation("global")
def ranking(
    budget: Budget, *, step: str = "magnitude", most: Annotated[float, Field(gt=0, lt=1)] = 0.99
) -> dict[str, float]:
    """Rank the weights of all layers together by a step's scores: the lowest go, wherever they are.

    With S_l the scores of layer l, and t the k-th smallest score of all free layers together, k being the number of
    weights to prune, layer l loses

        k_l = |{ S_l <= t }|

    weights, equal scores in the order of the layers, so that the k_l add up to k. The step that prunes then takes k_l
    weights from layer l.

    Args:
        step: whose scores; it must choose its mask by one ranking (magnitude, wanda, ria, …).
        most: no layer loses more than this share; the others make up for it.

    Scores of different layers are compared as they are. Magnitude reads no text; a step that needs statistics costs a
    pass of the calibration text through the dense model.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, with one threshold for all.
    """
    judge = make(step)
    units = {slot.name: slot.pattern.units(slot.shape) for block in budget.slots for slot in block}
    units = {name: count for name, count in units.items() if name in budget.free}
    target = min(round(sum(units.values()) * budget.sparsity), sum(int(n * most) for n in units.values()))
    full: dict[str, int] = {}  # layers that lose as much as they may

    def layers(see: Callable[[str, Tensor], None]) -> None:
        def visit(block: Block) -> None:
            for layer in block.layers:
                if layer.name in full:
                    continue
                with ranked() as seen:
                    judge.apply(Block(block.index, block.name, (layer,)))
                if [score.numel() for score in seen] != [units[layer.name]]:
                    raise InputError(
                        f"step '{step}' does not rank the weights of a layer once, by one score, as 'global' needs it:"
                        " use magnitude, wanda or ria."
                    )
                see(layer.name, seen[0])

        budget.look(visit, judge.needs)

    while True:
        counts = full | cut(layers, target - sum(full.values()))
        over = {name: int(units[name] * most) for name, count in counts.items() if count > int(units[name] * most)}
        if not over:
            return {name: count / units[name] for name, count in counts.items()}
        full |= over
