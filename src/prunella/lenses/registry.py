"""The registry of lenses.

Third parties register their own: `@register_lens("mine")` in a file of theirs, then name it in the recipe,
`--set lenses=path/to/mine.py:mine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import InputError, StepError
from ..foreign import blamed
from ..registry import Method, lookup
from .lens import Lens

L = TypeVar("L", bound=type[Lens])

lenses: dict[str, Method] = {}
_always: list[type[Lens]] = []
_worn: WeakKeyDictionary[nn.Module, dict[str, Lens]] = WeakKeyDictionary()


def register_lens(name: str, *, always: bool = False) -> Callable[[L], L]:
    """Make a class a lens: a decorator.

    Args:
        name: what users call it.
        always: it is asked about every parameter, and not only where a recipe names it.
    """

    def add(lens: L) -> L:
        if not issubclass(lens, Lens):
            raise TypeError(f"lens '{name}' is no subclass of Lens")
        lenses[name] = Method(name, frozenset(), lens, per_layer=False)
        if always:
            _always.append(lens)
        return lens

    return add


def fitting(module: nn.Module, key: str) -> Lens | None:
    """Of the lenses that are always asked, what the first that fits a parameter makes of it."""
    return next((found for lens in _always if (found := lens.of(module, key)) is not None), None)


def worn_by(module: nn.Module, key: str) -> Lens | None:
    """The lens that `wear` gave a parameter."""
    return _worn.get(module, {}).get(key)


def wear(blocks: Iterable[nn.Module], names: Sequence[str]) -> None:
    """From here on, read the parameters of these modules through the lenses of these names, each through the first one
    that fits it, before any other; through those of an earlier call no more. Raises InputError for a name that is
    unknown and for a lens that fits nothing, StepError for one that does not give a parameter back as it was."""
    chosen: dict[str, Any] = {name: lookup("lens", lenses, name).function for name in names}
    idle = set(names)
    for module in dict.fromkeys(child for block in blocks for child in block.modules()):
        _worn.pop(module, None)
        for key, parameter in module.named_parameters(recurse=False):
            for name, lens in chosen.items() if parameter.ndim > 1 else ():
                with blamed(lens, f"lens '{name}'"):
                    found = lens.of(module, key)
                    if found is not None:
                        _check(name, found, parameter.shape)
                if found is not None:
                    _worn.setdefault(module, {})[key] = found
                    idle.discard(name)
                    break
    if idle:
        raise InputError(f"lens '{min(idle)}' fits no parameter of the model's blocks.")


def _check(name: str, lens: Lens, shape: torch.Size) -> None:
    numbers = torch.arange(shape.numel()).view(shape)
    matrices = lens.matrices(numbers)
    if matrices.ndim != 3 or not torch.equal(lens.tensor(matrices, shape), numbers):
        raise StepError(f"lens '{name}' does not give a parameter of shape {tuple(shape)} back as it was.")
