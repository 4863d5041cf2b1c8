"""Uniform allocation."""

from collections.abc import Mapping


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Every layer gets the same sparsity."""
    return dict.fromkeys(sizes, sparsity)
