"""A batch in pieces: samples that do not see each other go through a plan a few at a time, so that what is between two
products stays in the caches, and one plan serves batches of every size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import pytree

POSITIONS = 256  # of the longest value at least: with fewer the products do not use their code well


def samples_of(values: Sequence[Any]) -> int:
    """How many samples a call has by its tensors, whose first dimensions are that or 1; 1 where they disagree."""
    sizes = {value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim} - {1}
    return sizes.pop() if len(sizes) == 1 else 1


def _has_rows(value: Any, samples: int) -> bool:
    """Is it a tensor with a row for each of so many samples?"""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == samples


def alike(values: Sequence[Any], samples: int) -> bool:
    """Is every sample the same as the first, as in a batch of zeros?"""
    return all(bool((value == value[:1]).all()) for value in values if _has_rows(value, samples))


def size_of(values: Sequence[Any], samples: int) -> int:
    """How many samples go through a plan together: as few as have POSITIONS positions, a power of two. A picture, with
    three dimensions, has more than that alone."""
    size = 1
    for value in values:
        if _has_rows(value, samples) and value.ndim == 2:
            size = max(size, -(-POSITIONS // max(1, value.shape[1])))
    return 1 << (size - 1).bit_length()


def pieces(
    args: Sequence[Any], kwargs: dict[str, Any], samples: int, size: int
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The call, `size` samples at a time, and in the last piece the rest."""
    for first in range(0, samples, size):

        def part(value: Any, first: int = first) -> Any:
            return value[first : first + size] if _has_rows(value, samples) else value

        yield [part(value) for value in args], {key: part(value) for key, value in kwargs.items()}


def joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The outputs of all pieces as that of the batch; None where one has no row for each sample."""
    leaves, specs = zip(*map(pytree.tree_flatten, outputs), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    made: list[Any] = []
    for column in zip(*leaves, strict=True):
        if all(_has_rows(one, size) for one, size in zip(column, sizes, strict=True)):
            made.append(torch.cat(column))
        elif any(isinstance(one, Tensor) for one in column) or any(one != column[0] for one in column):
            return None
        else:
            made.append(column[0])
    return pytree.tree_unflatten(made, specs[0])
