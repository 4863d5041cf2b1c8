"""The registry of allocations.

Third parties register their own: `@register_allocation("mine")` in a file of theirs, then
`--allocate path/to/mine.py:mine`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..foreign import call
from ..registry import Method, checked, lookup
from .budget import Budget

Allocation = Callable[[Budget], dict[str, float]]

allocations: dict[str, Method] = {}


def register_allocation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an allocation: a decorator.

    The function is given a `Budget` and returns {layer: sparsity}, a value for each name in `budget.sizes`. Its keyword
    arguments are the allocation's options, with their types and defaults.

    Args:
        name: what users call it.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is None or first.kind is first.KEYWORD_ONLY:
            raise TypeError(f"allocation '{name}' takes no budget")
        allocations[name] = Method(name, frozenset(), function, per_layer=False)
        return function

    return add


def make_allocation(name: str, options: Mapping[str, Any] | None = None) -> Allocation:
    """An allocation ready to use. Raises InputError for an unknown name, an unknown option or a wrong value."""
    method = lookup("allocation", allocations, name)
    chosen = checked("allocation", method, options or {})

    def allocate(budget: Budget) -> dict[str, float]:
        shares: dict[str, float] = call(method, f"allocation '{name}'", Mapping, budget, chosen)
        return shares

    return allocate
