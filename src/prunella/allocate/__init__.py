"""Allocation: how sparse each layer becomes. One file a method.

An allocation is a function of the layers' names and sizes, {name: weights}, and the overall target; it
returns {name: sparsity}. Exceptions by name (`sparsity: {down_proj: 0.3}`) are applied after it.
"""

from collections.abc import Callable, Mapping

from ..errors import InputError, unknown
from .uniform import uniform

Allocation = Callable[[Mapping[str, int], float], dict[str, float]]

allocations: dict[str, Allocation] = {"uniform": uniform}


def find_allocation(name: str) -> Allocation:
    """The allocation called `name`. Raises InputError, with the nearest known one."""
    if name not in allocations:
        raise InputError(unknown("allocation", name, allocations))
    return allocations[name]


__all__ = ["Allocation", "allocations", "find_allocation"]
