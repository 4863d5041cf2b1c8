"""A task of tiny convolutional networks with batch norms, and directories of them: pictures of two textures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nets import shaken
from safetensors.torch import save_file
from torch import Tensor, nn

import prunella
from prunella import InputError, Model, ModelError, Task, register_task
from prunella.model.divergence import kl
from prunella.model.open import open_plain
from prunella.samples import TARGET, Batch, Samples


class Unit(nn.Module):
    """Two convolutions, the second one grouped, and their norms."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        out: Tensor = (self.norm2(self.second(hidden)) + hidden).relu()
        return out


class ConvNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.units = nn.ModuleList([Unit(width, width) for _ in range(3)])
        self.drop = nn.Dropout2d(0.5)
        self.head = nn.Linear(width, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for unit in self.units:
            x = unit(x)
        out: Tensor = self.head(self.drop(x).mean((2, 3)))
        return out


def pictures(count: int, seed: int, size: int = 8) -> dict[str, Tensor]:
    """Noise that is smoothed along one side or the other, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % 2
    for label, side in ((0, 2), (1, 3)):
        chosen = labels == label
        pixels[chosen] += pixels[chosen].roll(1, side)
    return {"pixels": pixels, "labels": labels}


@register_task("textures")
class Textures(Task):
    """Tell two textures apart."""

    source = "drawn"
    argument = "pixels"
    figure = "loss"

    def open(self, name: str, *, dtype: str = "auto", device: str = "auto", **options: Any) -> Model:
        if not (Path(name) / "model.safetensors").is_file():
            raise ModelError(f"'{name}' holds no network.")
        return open_plain(ConvNet, Path(name), self, name=name, dtype=dtype, device=device)

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        kind, _, seeded = source.partition(":")
        if kind not in ("drawn", "bare", "sizes"):
            raise InputError(f"there are no pictures '{source}'.")
        count = 64 if count is None else count
        found = pictures(used + count, int(seeded or (1 if test else 0)))
        found = {key: tensor[used:] for key, tensor in found.items()}
        if kind == "bare":
            del found["labels"]
        if kind == "sizes":
            return Samples.of([{k: t[: count // 3] for k, t in found.items()}, pictures(count - count // 3, 7, 6)])
        return Samples.of(found)

    def example(self, network: nn.Module) -> Batch:
        return {"pixels": pictures(1, 0)["pixels"]}

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Tensor:
        return network(batch["pixels"])  # type: ignore[no-any-return]

    def lacks(self, group: Batch) -> bool:
        return "labels" not in group and TARGET not in group

    def target(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.argmax(1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        right = batch["labels"] if "labels" in batch else batch[TARGET]
        return nn.functional.cross_entropy(outputs.float(), right, reduction="none")

    def divergence(self, outputs: Tensor, teacher: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        return kl(outputs, teacher, temperature)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        flip = torch.rand(len(batch["pixels"]), generator=generator) < 0.5
        pixels = batch["pixels"].clone()
        pixels[flip] = pixels[flip].flip(3)
        return {**batch, "pixels": pixels}


def trained() -> ConvNet:
    """A network that knows its task."""
    torch.manual_seed(0)
    network, data = ConvNet(), pictures(256, 3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        some = torch.randint(256, (32,))
        nn.functional.cross_entropy(network(data["pixels"][some]), data["labels"][some]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def write(directory: Path, network: nn.Module | None = None) -> Path:
    """A directory with a random network, the same every time, or this one."""
    directory.mkdir()
    torch.manual_seed(0)
    network = shaken(ConvNet()) if network is None else network
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps({"architecture": "textures"}))
    return directory


def heal(directory: Path, recipe: dict[str, Any], output: Path) -> None:
    """In a process that knows this task by having this function."""
    prunella.heal(directory, recipe, output=output)
