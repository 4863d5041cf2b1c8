"""Layers with correlated inputs, small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from prunella import Block, Layer, Pattern, Stats, make

EVERYTHING = frozenset({"norm", "moments", "gram"})


@dataclass(frozen=True)
class Case:
    """A layer, and the tokens that its statistics were made from."""

    layer: Layer
    x_TI: Tensor

    def apply(self, name: str, **options: Any) -> Case:
        """The case after a step."""
        block = make(name, options).apply(Block(0, "block", (self.layer,)))
        return Case(block.layers[0], self.x_TI)

    @property
    def zeros_O(self) -> Tensor:
        assert self.layer.mask_OI is not None
        return (~self.layer.mask_OI).sum(1)

    @property
    def loss_O(self) -> Tensor:
        """Squared output error of each row, mean over tokens, in float64."""
        change_OI = self.layer.weight_OI.double() - self.layer.dense_OI.double()
        return (self.x_TI.double() @ change_OI.T).square().mean(0)

    @property
    def loss(self) -> float:
        return self.loss_O.sum().item()


@pytest.fixture
def case() -> Callable[..., Case]:
    def build(
        rows: int = 16,
        columns: int = 32,
        *,
        tokens: int = 400,
        pattern: str = "unstructured",
        sparsity: float = 0.5,
        dtype: torch.dtype = torch.float32,
        name: str = "block.mlp.up_proj",
        changes: Mapping[int, float] | None = None,
    ) -> Case:
        """`changes` sets inputs to constants, {column: value}."""
        generator = torch.Generator().manual_seed(0)
        mix_II = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
        x_TI = torch.randn(tokens, columns, generator=generator) @ mix_II
        x_TI = x_TI * (0.2 + torch.rand(columns, generator=generator)) + 0.3 * torch.randn(columns, generator=generator)
        for column, value in (changes or {}).items():
            x_TI[:, column] = value
        weight_OI = torch.randn(rows, columns, generator=generator).to(dtype)
        stats = Stats.of(x_TI, EVERYTHING, 64)
        return Case(Layer(name, weight_OI, weight_OI, stats, sparsity, Pattern.parse(pattern)), x_TI)

    return build
