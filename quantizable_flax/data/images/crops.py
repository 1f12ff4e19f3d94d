"""Where to crop, and how: random resized, centred, and shifted in a border."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from quantizable_flax.data.images.decode import load_image

ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
# JPEGs are decoded at a reduced size only where this many pixels still make one of the result.
_OVERSAMPLING = 2
# Longer ones are cut before they are scaled: a line of one pixel would grow beyond all memory.
_MAX_ASPECT = 100


class Box(NamedTuple):
    """A part of an image, in pixels of its full size."""

    left: int
    top: int
    width: int
    height: int


def random_box(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Box:
    """Returns a box whose share of the area is uniform in [min_scale, 1].

    Its aspect is log-uniform in [3/4, 4/3]. After ten tries that do not fit, it is the largest
    centred box of an aspect in this range, as in torchvision and timm.
    """
    low, high = map(math.log, ASPECT)
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = rng.integers(width - wide + 1), rng.integers(height - tall + 1)
            return Box(int(left), int(top), wide, tall)
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    wide = min(width, max(1, round(height * aspect)))
    tall = min(height, max(1, round(width / aspect)))
    return Box((width - wide) // 2, (height - tall) // 2, wide, tall)


def resized_box(image: Image.Image, box: Box, size: int, channels: int, name: str) -> Image.Image:
    """Returns the part of an opened image, scaled to `size` squared (bicubic, antialiased)."""
    full_width, full_height = image.size
    enough = (
        _OVERSAMPLING * size * full_width / box.width,
        _OVERSAMPLING * size * full_height / box.height,
    )
    image = load_image(image, channels, name, enough)
    x, y = image.width / full_width, image.height / full_height
    left, top, right, bottom = box.left, box.top, box.left + box.width, box.top + box.height
    edges = (left * x, top * y, right * x, bottom * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=edges)


def centred(image: Image.Image, size: int, crop: float, channels: int, name: str) -> Image.Image:
    """Returns the centre of an opened image, `size` squared.

    The shorter side is scaled to size / crop first (bicubic, antialiased), rounded as in timm and
    torchvision; an image that has this size already stays as it is.
    """
    shorter = int(size / crop + 1e-6)
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        side = max(1, round(min(width, height) * size / shorter))
        box = Box((width - side) // 2, (height - side) // 2, side, side)
        return resized_box(image, box, size, channels, name)
    if width <= height:
        scaled = (shorter, max(shorter, int(shorter * height / width)))
    else:
        scaled = (max(shorter, int(shorter * width / height)), shorter)
    enough = (_OVERSAMPLING * scaled[0], _OVERSAMPLING * scaled[1])
    image = load_image(image, channels, name, enough)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def shifted(image: Image.Image, padding: int, rng: np.random.Generator) -> Image.Image:
    """Returns a random crop of the same size from the image in a border of black pixels."""
    left, top = (int(offset) - padding for offset in rng.integers(2 * padding + 1, size=2))
    return image.crop((left, top, left + image.width, top + image.height))
