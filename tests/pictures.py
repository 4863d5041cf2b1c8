"""Pictures that tests draw, and tiny classifiers that tell them apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy

SIZE = 32
CLASSES = ("blue disc", "green square", "red stripe")
_COLORS = {"blue": (40, 40, 220), "green": (30, 200, 40), "red": (220, 40, 30)}


def draw(name: str, number: int) -> Image.Image:
    """A picture of a class: its shape in its color, somewhere on gray."""
    chance = random.Random(f"{name} {number}")
    image = Image.new("RGB", (SIZE + 8, SIZE), (chance.randint(90, 150),) * 3)
    pen, color = ImageDraw.Draw(image), _COLORS[name.split()[0]]
    x, y, side = chance.randint(6, 18), chance.randint(2, 14), chance.randint(10, 16)
    box = (x, y, x + side, y + side)
    shape = name.split()[1]
    if shape == "disc":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.rectangle((0, y, SIZE + 8, y + side // 3), fill=color)
    return image


def folder(path: Path, count: int = 8, classes: Any = CLASSES, start: int = 0) -> Path:
    """A folder of pictures by class."""
    for name in classes:
        (path / name.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            draw(name, number).save(path / name.replace(" ", "_") / f"{number}.png")
    return path


def tiny_timm(classes: int = len(CLASSES), **said: Any) -> Any:
    """A small EfficientNet of timm for 32 × 32 pictures, its weights random."""
    import timm

    torch.manual_seed(0)
    sees = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.25,) * 3, **said}
    overlay = {**sees, "num_classes": classes}
    return timm.create_model("test_efficientnet", num_classes=classes, pretrained_cfg_overlay=overlay)


def prepared(network: Any) -> Any:
    """What timm makes of a picture for a network."""
    from timm.data import create_transform, resolve_data_config

    return create_transform(**resolve_data_config({}, pretrained_cfg=network.pretrained_cfg), is_training=False)


def tiny_vit(names: Any = CLASSES) -> Any:
    """A small vision transformer of transformers for 32 × 32 pictures, its weights random."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)},
    )
    return transformers.ViTForImageClassification(config)


def processor() -> Any:
    return transformers.ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )


def train(network: Any, prepare: Any, steps: int = 30) -> float:
    """Train a classifier on drawn pictures for a few steps; the share of new ones that it gets right."""
    torch.manual_seed(0)
    pictures = {n: torch.stack([prepare(draw(c, i)) for i in range(16)]) for n, c in enumerate(CLASSES)}
    x = torch.cat(list(pictures.values()))
    y = torch.arange(len(CLASSES)).repeat_interleave(16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        some = torch.randperm(len(x))[:24]
        out = network(x[some])
        loss = cross_entropy(out if isinstance(out, torch.Tensor) else out.logits, y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        new = torch.stack([prepare(draw(c, i)) for c in CLASSES for i in range(100, 108)])
        out = network(new)
        out = out if isinstance(out, torch.Tensor) else out.logits
    return float((out.argmax(1) == torch.arange(len(CLASSES)).repeat_interleave(8)).float().mean())
