"""The registry of allocations.

Third parties register their own: `@register_allocation("mine")` in a file of theirs, then
`--allocate path/to/mine.py:mine`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..foreign import call
from ..registry import Method, checked, lookup
from .budget import Budget

Allocation = Callable[[Budget], dict[str, float]]


@dataclass(frozen=True)
class AllocationMethod(Method):
    """A registered allocation. `spreads`: does it look at the model, and give layers sparsities of their own?"""

    spreads: bool = True


allocations: dict[str, AllocationMethod] = {}


def register_allocation(name: str, *, spreads: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an allocation: a decorator.

    The function is given a `Budget` and returns {layer: sparsity}, a value for each name in `budget.sizes`. Its keyword
    arguments are the allocation's options, with their types and defaults.

    Args:
        name: what users call it.
        spreads: does it look at the model, and give layers sparsities of their own?
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is None or first.kind is first.KEYWORD_ONLY:
            raise TypeError(f"allocation '{name}' takes no budget")
        allocations[name] = AllocationMethod(name, frozenset(), function, per_layer=False, spreads=spreads)
        return function

    return add


def find_allocation(name: str) -> AllocationMethod:
    """The registered allocation `name`, or the one that `path/to/file.py:name` registers. Raises InputError."""
    return lookup("allocation", allocations, name)


def make_allocation(name: str, options: Mapping[str, Any] | None = None) -> Allocation:
    """An allocation ready to use. Raises InputError for an unknown name, an unknown option or a wrong value."""
    method = find_allocation(name)
    chosen = checked("allocation", method, options or {})

    def allocate(budget: Budget) -> dict[str, float]:
        shares: dict[str, float] = call(method, f"allocation '{name}'", Mapping, budget, chosen)
        return shares

    return allocate
