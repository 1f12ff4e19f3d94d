"""Random erasing (Zhong et al., arXiv 1708.04896) in the form that timm and DeiT use.

A box becomes noise. Its share of the area is uniform in a range, its aspect log-uniform in [0.3,
1/0.3]. The noise is normal, of each pixel and channel, and standard normal once the model has
normalised it; pixels being whole numbers here, it is rounded and stays within black and white.
"""

import math

import numpy as np

from quantizable_flax.data.images.crops import ATTEMPTS, Box

ASPECT = (0.3, 1 / 0.3)


def erased(
    image_HxWxC: np.ndarray,
    areas: tuple[float, float],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns a uint8 image with a random box of noise; the image itself if ten tries do not fit.

    Args:
      image_HxWxC: uint8.
      areas: the smallest and the largest share of the area.
      mean: of the noise, per channel, for pixels in [0, 1]; what the model subtracts.
      std: likewise; what the model divides by.
      rng: decides everything.
    """
    height, width, channels = image_HxWxC.shape
    box = random_box(width, height, areas, rng)
    if box is None:
        return image_HxWxC
    noise_HxWxC = rng.standard_normal((box.height, box.width, channels), dtype=np.float32)
    mean_C, std_C = (np.asarray(values, np.float32) for values in (mean, std))
    pixels_HxWxC = np.rint(255 * (mean_C + std_C * noise_HxWxC))
    image_HxWxC = image_HxWxC.copy()
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    image_HxWxC[rows, columns] = pixels_HxWxC.clip(0, 255).astype(np.uint8)
    return image_HxWxC


def random_box(
    width: int, height: int, areas: tuple[float, float], rng: np.random.Generator
) -> Box | None:
    """Returns a box that is smaller than the image in both directions, None after ten tries."""
    low, high = map(math.log, ASPECT)
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*areas)
        aspect = math.exp(rng.uniform(low, high))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            return Box(int(left), int(top), wide, tall)
    return None
