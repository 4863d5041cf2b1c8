"""Uniform allocation."""

from .budget import Budget
from .registry import register_allocation


@register_allocation("uniform", spreads=False)
def uniform(budget: Budget) -> dict[str, float]:
    """Every layer gets the same sparsity."""
    return dict.fromkeys(budget.sizes, budget.sparsity)
