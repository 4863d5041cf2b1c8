"""Trees of tensors: what modules are called with and what they give, tuples, lists and dictionaries of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


def first(out: Any) -> Any:
    """The hidden state among a block's outputs: the first of them."""
    if isinstance(out, Mapping):
        out = tuple(out.values())
    return (out[0] if out else None) if isinstance(out, tuple | list) else out


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a tree, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple | list) else []


def map_tuples(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A tree of tuples with `leaf` applied to what is no tuple."""
    if not isinstance(value, tuple):
        return leaf(value)
    return rebuilt(value, [map_tuples(item, leaf) for item in value])


def map_tree(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A tree of tuples and containers with `leaf` applied to all else."""
    if not is_container(value):
        return map_tuples(value, lambda item: map_tree(item, leaf) if is_container(item) else leaf(item))
    return rebuilt(value, [map_tree(item, leaf) for _, item in items(value)])


def map_tensors(value: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """A tree with `leaf` applied to its tensors."""
    return map_tree(value, lambda item: leaf(item) if isinstance(item, Tensor) else item)


def stacked(values: Sequence[Any], dimension: int) -> Any:
    """Trees of one form as one tree: each of its tensors is theirs behind one another."""
    first_one = values[0]
    if isinstance(first_one, Tensor):
        return torch.cat(list(values), dimension)
    if isinstance(first_one, tuple) or is_container(first_one):
        each = [[item for _, item in items(value)] for value in values]
        return rebuilt(first_one, [stacked(column, dimension) for column in zip(*each, strict=True)])
    return first_one


def rebuilt(old: Any, new: Sequence[Any]) -> Any:
    """A tuple or a container of the same type with these items, in order; the old one where they are its own."""
    before = items(old)
    if all(one is item for one, (_, item) in zip(new, before, strict=True)):
        return old
    if isinstance(old, tuple):
        return type(old)(*new) if hasattr(old, "_fields") else tuple(new)
    found = copy.copy(old)
    for (key, _), one in zip(before, new, strict=True):
        found[key] = one
    return found


def is_container(value: Any) -> bool:
    """Is this a list or a mapping, which may be written into?"""
    return isinstance(value, MutableMapping | list)


def items(container: Any) -> list[tuple[Any, Any]]:
    """Keys and values, or places and items of a list or tuple."""
    return list(container.items() if isinstance(container, MutableMapping) else enumerate(container))


def same_items(one: Any, other: Any) -> bool:
    """Do two containers hold the same objects under the same keys?"""
    a, b = items(one), items(other)
    return len(a) == len(b) and all(k == j and v is w for (k, v), (j, w) in zip(a, b, strict=True))


class Shared:
    """Trees of arguments in which tensors that are equal to those of another tree are the same objects."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Any, Any, Any]] = {}  # with the objects, so that no id is used twice
        self.apart: dict[int, Tensor] = {}  # the tensors that had no equal

    def __call__(self, new: Any, old: Any) -> Any:
        if new is old:
            return old
        key = id(new), id(old)
        if key not in self._known:
            self._known[key] = new, old, self._share(new, old)
        return self._known[key][2]

    def _share(self, new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            alike = isinstance(old, Tensor) and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            if alike and torch.equal(new, old):
                return old
            self.apart[id(new)] = new
            return new
        if type(new) is not type(old):
            return new
        if isinstance(new, tuple) or is_container(new):
            ours, theirs = items(new), items(old)
            if [key for key, _ in ours] != [key for key, _ in theirs]:
                return new
            return rebuilt(old, [self(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)])
        if isinstance(new, int | float | str | torch.dtype | torch.device) and new == old:
            return old
        return new
