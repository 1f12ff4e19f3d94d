"""Small images on disk, as folders, tars and TFDS datasets, and configurations that name them."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from quantizable_flax.config.defaults import data_defaults, model_defaults
from quantizable_flax.errors import UserError

AUGMENT = {
    "crop_scale": 0.3,
    "pad_crop": 2,
    "flip": True,
    "rand_layers": 2,
    "rand_magnitude_std": 0.5,
    "color_jitter": 0.4,
    "erase_probability": 0.5,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_image(seed: int = 0, height: int = 12, width: int = 12, channels: int = 3) -> np.ndarray:
    """Returns noise: any shift, flip or loss shows."""
    image_HxWxC = rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return image_HxWxC[..., 0] if channels == 1 else image_HxWxC


def smooth_image(height: int, width: int) -> Image.Image:
    """Returns a photo-like image, which survives resizing and JPEG."""
    small = Image.fromarray(random_image(1, 5, 7))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def write_tar(path: Path, files: dict[str, bytes], folders=(), mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return os.fspath(path)


def pngs(classes=("cat", "dog"), count: int = 6, prefix: str = "", first: int = 0):
    """Returns files `prefix/class/number.png`, every image a different one."""
    return {
        f"{prefix}{name}/{number}.png": encode(random_image(1000 * (label + 1) + first + number))
        for label, name in enumerate(classes)
        for number in range(count)
    }


def elements(source) -> list[dict]:
    return [source[index] for index in range(len(source))]


def expect_error(call, pattern: str) -> UserError:
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def make_config(
    image_size: int = 12, num_classes: int = 2, channels: int = 3, **data
) -> ConfigDict:
    """Returns a configuration; keywords are keys of data or data.augment."""
    config = ConfigDict({"seed": 0})
    config.model = model_defaults("vit")
    config.model.image_size, config.model.channels = image_size, channels
    config.model.num_classes = num_classes
    config.model.pixel_mean, config.model.pixel_std = (0.5,) * channels, (0.25,) * channels
    config.data = data_defaults("vit")
    for key, value in data.items():
        part = config.data.augment if key in config.data.augment else config.data
        part[key] = value
    return config
