"""ResNet-20 on CIFAR-10: one shot, by every method, with batch norm as it was and estimated anew; and healed.

    python benchmarks/cifar.py --weights resnet20-cifar10.safetensors --pictures cifar10.zip

The weights are a state dict under the names below; the zip has pictures of 32 by 32 in `train/CLASS` and `test/CLASS`.
Calibrated on 1,000 of the training pictures, 100 of each class, measured on all test pictures. Cells that are done are
in a file of JSON lines (--json) and are not made again. `--heal 0.8` prunes so many of the weights and trains what is
left on all training pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import prunella
from prunella import Task, register_task
from prunella.samples import Batch, Samples

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions and a shortcut without weights: every second pixel, channels of zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        beside = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(out + beside)


class ResNet20(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2, shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, outputs, 1 if number == 1 else 2)
            setattr(
                self, f"layer{number}", nn.Sequential(first, Block(outputs, outputs, 1), Block(outputs, outputs, 1))
            )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def load(weights: Path) -> ResNet20:
    network = ResNet20()
    network.load_state_dict(load_file(weights))
    return network.eval()


def pictures(path: Path, split: str, each: int | None = None) -> Samples:
    """The first so many pictures of each class, class after class in turn, normalized; `y` is the class."""
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        mine = [[name for name in names if name.split("/")[1] == label][:each] for label in classes]
        found = [(name, label) for row in zip(*mine, strict=True) for label, name in enumerate(row)]
        raw = [torch.frombuffer(bytearray(_pixels(file.read(name))), dtype=torch.uint8) for name, _ in found]
    x = torch.stack(raw).view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return Samples.of({"x": x.contiguous(), "y": torch.tensor([label for _, label in found])})


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def accuracy(network: nn.Module, samples: Samples) -> float:
    """In percent."""
    right = count = 0
    with torch.no_grad():
        for batch in samples.batches(500):
            right += int((network.eval()(batch["x"]).argmax(1) == batch["y"]).sum())
            count += len(batch["y"])
    return 100 * right / count
