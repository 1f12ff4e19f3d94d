"""RandAugment (Cubuk et al., arXiv 1909.13719) in the form that timm and DeiT use.

Each layer draws one of 15 operations, with replacement, and applies it with probability 0.5. Its
magnitude m is drawn from a normal distribution around the configured one and clipped to [0, 10];
every operation grows stronger with it:

  AutoContrast, Equalize, Invert      no magnitude
  Rotate                              +- 30 m/10 degrees
  Posterize                           keeps 4 - floor(4 m/10) bits
  Solarize                            inverts values from 256 - floor(256 m/10) on
  SolarizeAdd                         adds floor(110 m/10) to values below 128
  Color, Contrast, Brightness, Sharpness   factor 1 +- 0.9 m/10
  ShearX, ShearY                      +- 0.3 m/10
  TranslateX, TranslateY              +- 0.45 m/10 of the width or height

The sign is random. Areas from outside the image are grey. With one channel, Color changes nothing.
"""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from quantizable_flax.data.images import color

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5
FILL = 128

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def rand_augment(
    image: Image.Image,
    layers: int,
    magnitude: float,
    std: float,
    rng: np.random.Generator,
    operations: Mapping[str, Operation] | None = None,
) -> Image.Image:
    """Returns a uint8 image in mode "L" or "RGB" after `layers` random ones of OPERATIONS.

    `operations` are others in their place.
    """
    known = tuple((OPERATIONS if operations is None else operations).values())
    for choice in rng.integers(len(known), size=layers):
        if rng.random() < PROBABILITY:
            drawn = rng.normal(magnitude, std) if std else magnitude
            level = min(max(drawn, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
            image = known[choice](image, level, rng)
    return image


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        resample=Image.Resampling.BICUBIC,
        fillcolor=(FILL,) * len(image.getbands()),
    )


def _auto_contrast(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return color.invert(image)


def _rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    fill = (FILL,) * len(image.getbands())
    degrees = _signed(30 * level, rng)
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    kept = 4 - int(4 * level)
    mask = 0xFF & ~(0xFF >> kept)
    return _mapped(image, [value & mask for value in range(256)])


def _solarize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    threshold = 256 - int(256 * level)
    return _mapped(image, [value if value < threshold else 255 - value for value in range(256)])


def _solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    added = int(110 * level)
    return _mapped(
        image, [min(255, value + added) if value < 128 else value for value in range(256)]
    )


def _mapped(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _enhanced(change: Callable[[Image.Image, float], Image.Image]) -> Operation:
    def apply(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        return change(image, 1 + _signed(0.9 * level, rng))

    return apply


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def _shear_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, _signed(0.3 * level, rng), 0, 0, 1, 0)


def _shear_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, _signed(0.3 * level, rng), 1, 0)


def _translate_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, _signed(0.45 * level, rng) * image.width, 0, 1, 0)


def _translate_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(0.45 * level, rng) * image.height)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhanced(color.saturation),
    "Contrast": _enhanced(color.contrast),
    "Brightness": _enhanced(color.brightness),
    "Sharpness": _enhanced(_sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}
