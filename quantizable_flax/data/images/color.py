"""Changes of brightness, contrast and saturation: blends of an image with a plainer one."""

import numpy as np
from PIL import Image, ImageChops


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Returns a blend with black: 0 is black, 1 the image, above 1 brighter."""
    return Image.blend(Image.new(image.mode, image.size), image, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Returns a blend with the mean grey: 0 is grey, 1 the image, above 1 more contrast."""
    mean = int(np.asarray(_grey(image)).mean() + 0.5)
    plain = Image.new(image.mode, image.size, (mean,) * len(image.getbands()))
    return Image.blend(plain, image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Returns a blend with the grey version, which is the image itself where it has one channel."""
    if image.mode == "L":
        return image
    return Image.blend(_grey(image).convert(image.mode), image, factor)


def invert(image: Image.Image) -> Image.Image:
    """Returns 255 minus each value."""
    return ImageChops.invert(image)


def jitter(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Returns the image after all three changes, in random order.

    Each factor is uniform in [max(0, 1 - amount), 1 + amount], as in torchvision.
    """
    changes = (brightness, contrast, saturation)
    factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, size=len(changes))
    for place in rng.permutation(len(changes)):
        image = changes[place](image, float(factors[place]))
    return image


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else image.convert("L")
