"""Pictures on every machine: two photographs that come with scikit-learn, cut in many ways, and drawn ones."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import numpy as np

from .errors import InputError

PHOTOS = "photos"
SIZE = 256  # pixels along each side
DRAWN = 4  # one of so many is drawn


def photo(number: int, seed: int = 0, test: bool = False) -> Any:
    """A picture, 256 × 256, the same for the same arguments: mostly a piece of a photograph, between an eighth and all
    of its area, maybe mirrored and with other light; one of four is drawn, shapes on a gradient.

    Args:
        number: from 0.
        test: of another row of pictures than those to calibrate on. The photographs are the same.
    """
    draw = random.Random(f"{seed} {test} {number}")
    return _drawn(draw) if number % DRAWN == DRAWN - 1 else _piece(draw, number)


@functools.cache
def _photographs() -> list[Any]:
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise InputError(
            f"the pictures '{PHOTOS}' need the packages pillow and scikit-learn: pip install 'prunella[vision]'."
        ) from None
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _piece(draw: random.Random, number: int) -> Any:
    from PIL import Image, ImageEnhance, ImageOps

    whole = _photographs()[number % len(_photographs())]
    area, ratio = draw.uniform(1 / 8, 1) * whole.width * whole.height, math.exp(draw.uniform(-0.3, 0.3))
    width, height = min(whole.width, int(math.sqrt(area * ratio))), min(whole.height, int(math.sqrt(area / ratio)))
    left, top = draw.randint(0, whole.width - width), draw.randint(0, whole.height - height)
    piece = whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if draw.random() < 0.5:
        piece = ImageOps.mirror(piece)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Color):
        piece = kind(piece).enhance(draw.uniform(0.7, 1.3))
    return piece


def _drawn(draw: random.Random) -> Any:
    from PIL import Image, ImageDraw

    def color() -> tuple[int, int, int]:
        return draw.randrange(256), draw.randrange(256), draw.randrange(256)

    slope = Image.linear_gradient("L").rotate(draw.uniform(0, 360), expand=False)
    image = Image.composite(Image.new("RGB", (SIZE, SIZE), color()), Image.new("RGB", (SIZE, SIZE), color()), slope)
    pen = ImageDraw.Draw(image)
    for _ in range(draw.randint(3, 8)):
        x, y, width, height = (draw.randint(0, SIZE) for _ in range(4))
        box = (x, y, x + width, y + height)
        (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(box, fill=color(), outline=color())
    noise = np.random.default_rng(draw.getrandbits(64)).normal(0, draw.uniform(2, 24), (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
