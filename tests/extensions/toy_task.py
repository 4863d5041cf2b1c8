"""A task of a third party: a network of two layers, with samples, a loss and files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from prunella import InputError, Model, ModelError, Task, register_task
from prunella.errors import EndlessError
from prunella.samples import Batch, Samples


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.second = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


@register_task("toy")
class Toy(Task):
    """Turn eight numbers around."""

    source = "random"
    argument = "x"

    def __init__(self, *, width: int = 16, noise: float = 0.0) -> None:
        self.width, self.noise = width, noise

    def open(self, name: str, **options: Any) -> Model:
        network = Net(self.width)
        if not (file := Path(name) / "model.safetensors").is_file():
            raise ModelError(f"'{name}' holds no toy.")
        load_model(network, file)
        return self.wrap(network, name=name)

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        if source != "random":
            raise InputError(f"toys are run on 'random' numbers, not on '{source}'.")
        if count is None:
            raise EndlessError("random numbers have no end: say how many, --set heal.samples=100.")
        x = torch.randn(used + count, 8, generator=torch.Generator().manual_seed(seed))[used:]
        return Samples.of({"x": x, "y": x.flip(1) + self.noise})

    def example(self, network: nn.Module) -> Batch:
        return {"x": torch.zeros(1, 8)}

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Tensor:
        return network(batch["x"])  # type: ignore[no-any-return]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["y"]).square().mean(1)
