"""Encoded images to Pillow images with 1 or 3 channels of 8 bits."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from quantizable_flax.errors import UserError

CHANNELS = {1: "L", 3: "RGB"}
# The others that Pillow reads are not worth their risk with untrusted files.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_image(value: bytes | np.ndarray, name: str) -> Image.Image:
    """Returns an image, of which only the header need be read so far.

    Args:
      value: an encoded image or uint8 [H, W], [H, W, 1] or [H, W, 3].
      name: what messages call it.

    Raises:
      UserError: no image, with its name.
    """
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value)
    with _explained(name, empty=not value):
        return Image.open(io.BytesIO(value), formats=_FORMATS)


def load_image(
    image: Image.Image, channels: int, name: str, enough: tuple[float, float] | None = None
) -> Image.Image:
    """Returns the pixels of `image` in mode "L" (1 channel) or "RGB" (3).

    Transparency is dropped, 16 bits keep the upper 8, and no EXIF rotation is applied, as in the
    published pipelines. A JPEG may come out at a half, a quarter or an eighth of its size, though
    not below `enough`, a width and a height: it decodes that much faster.

    Raises:
      UserError: a truncated or corrupt image, with its name.
    """
    with _explained(name):
        if enough is not None and image.format == "JPEG":
            image.draft(None, (max(1, round(enough[0])), max(1, round(enough[1]))))
        image.load()
        return _convert(image, CHANNELS[channels])


def to_array(image: Image.Image) -> np.ndarray:
    """Returns image_HxWxC, uint8, of a Pillow image in mode "L" or "RGB"."""
    image_HxW_ = np.asarray(image)
    return image_HxW_ if image_HxW_.ndim == 3 else image_HxW_[..., None]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        # Straight to RGB, Pillow would warn about a palette with transparency.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


@contextlib.contextmanager
def _explained(name: str, *, empty: bool = False) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        found = "an empty file" if empty else "none of these, or a broken header"
        raise UserError(
            f"expected a JPEG, PNG, BMP, WebP or GIF image in {name}, found {found}; "
            "replace or remove it"
        ) from None
    except Exception as error:  # Broken files make Pillow raise a dozen different kinds.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"expected a whole image in {name}, found it truncated or corrupt ({reason}); "
            "replace or remove it"
        ) from None
