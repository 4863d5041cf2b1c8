"""Allocation: how sparse each layer becomes. One file a method.

An allocation is a plain function of a `Budget`, with its options as keyword arguments; it returns a sparsity
for each of the budget's layers:

    @register_allocation("mine")
    def mine(budget: Budget, *, bend: float = 0.1) -> dict[str, float]:
        return budget.spend({name: ... for name in budget.sizes})

`budget.spend` makes the sum come out right, `budget.look` shows each block with the statistics of its inputs.
Layers with a sparsity of their own in the recipe (`sparsity: {down_proj: 0.3}`) or that it skips are not part
of the budget: allocation by hand needs no method.
"""

from . import dlp, global_, owl, probe, ramp, uniform  # noqa: F401  (importing a method registers it)
from .budget import Budget
from .registry import Allocation, allocations, find_allocation, make_allocation, register_allocation

__all__ = ["Allocation", "Budget", "allocations", "find_allocation", "make_allocation", "register_allocation"]
