"""An allocation of a third party: layers whose inputs vary much keep more."""

from prunella import Block
from prunella.allocate import Budget, register_allocation


@register_allocation("toy")
def toy(budget: Budget, *, bend: float = 0.1) -> dict[str, float]:
    """Prune those layers less whose inputs are large."""
    size: dict[str, float] = {}

    def visit(block: Block) -> None:
        size.update({layer.name: layer.stats.norm_I.mean().item() for layer in block.layers})

    budget.look(visit, {"norm"})
    order = sorted(budget.sizes, key=lambda name: size[name])
    return budget.spend({name: -bend * place / len(order) for place, name in enumerate(order)})
