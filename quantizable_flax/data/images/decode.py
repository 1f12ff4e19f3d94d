"""Encoded images to Pillow images with 1 or 3 channels of 8 bits."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from quantizable_flax.errors import UserError

CHANNELS = {1: "L", 3: "RGB"}
# Pillow holds 4 bytes a pixel: a thread or process that decodes needs about 1 GiB at most.
MAX_PIXELS = 2**28
_SMALLER = "scale it down or remove it"
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# By the first bytes, whatever the file is called. The others that Pillow reads are not worth their
# risk with untrusted files. Image.open, which would choose one too, has a limit of its own for the
# size, 179 million pixels, that belongs to the whole program.
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"BM", BmpImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
)


class UnreadableImageError(UserError):
    """An image that cannot be decoded.

    Attributes:
      found: the message up to the advice.
      advice: what to do where an image may also be removed.
    """

    def __init__(self, found: str, advice: str = "replace or remove it"):
        super().__init__(found, advice)
        self.found, self.advice = found, advice

    def __str__(self) -> str:
        return "; ".join(self.args)


def open_image(value: bytes | np.ndarray, name: str) -> Image.Image:
    """Returns an image, of which only the header need be read so far.

    Args:
      value: an encoded image or uint8 [H, W], [H, W, 1] or [H, W, 3].
      name: what messages call it.

    Raises:
      UnreadableImageError: no image, with its name.
    """
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value)
    reader = next((reader for start, reader in _READERS if value.startswith(start)), None)
    found = "none of these, or a broken header" if value else "an empty file"
    unknown = UnreadableImageError(
        f"expected a JPEG, PNG, BMP, WebP or GIF image in {name}, found {found}"
    )
    if reader is None:
        raise unknown
    with _explained(name):
        try:
            return reader(io.BytesIO(value))
        except SyntaxError:  # how Pillow refuses a header
            raise unknown from None


def load_image(
    image: Image.Image, channels: int, name: str, enough: tuple[float, float] | None = None
) -> Image.Image:
    """Returns the pixels of `image` in mode "L" (1 channel) or "RGB" (3).

    Transparency is dropped, 16 bits keep the upper 8, and no EXIF rotation is applied, as in the
    published pipelines. A JPEG may come out at a half, a quarter or an eighth of its size, though
    not below `enough`, a width and a height: it decodes that much faster.

    Raises:
      UnreadableImageError: an image that is truncated, corrupt or too large, with its name.
    """
    with _explained(name):
        _check_size(image, name, enough)
        image.load()
        return _convert(image, CHANNELS[channels])


def to_array(image: Image.Image) -> np.ndarray:
    """Returns image_HxWxC, uint8, of a Pillow image in mode "L" or "RGB"."""
    image_HxW_ = np.asarray(image)
    return image_HxW_ if image_HxW_.ndim == 3 else image_HxW_[..., None]


def _check_size(image: Image.Image, name: str, enough: tuple[float, float] | None) -> None:
    """Asks a JPEG for the size that is enough, and refuses what would not fit into memory."""
    width, height = image.size
    held = width * height
    if enough is not None and image.format == "JPEG":
        image.draft(None, (max(1, round(enough[0])), max(1, round(enough[1]))))
        if "progressive" not in image.info:  # those are decoded whole before they are reduced
            held = image.width * image.height
    if held > MAX_PIXELS:
        raise UnreadableImageError(
            f"expected an image of at most {MAX_PIXELS:,} pixels, about 1 GiB once decoded, in "
            f"{name}, found {width} x {height}",
            _SMALLER,
        )


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        # Straight to RGB, Pillow would warn about a palette with transparency.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # these two look at Pillow's limit by themselves
        raise UnreadableImageError(
            f"expected a WebP or GIF image within Pillow's limit in {name}, found '{error}'",
            _SMALLER,
        ) from None
    except MemoryError:
        raise UserError(
            f"expected enough memory to decode {name}, found too little; lower data.workers or "
            "scale the image down"
        ) from None
    except Exception as error:  # Broken files make Pillow raise a dozen different kinds.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnreadableImageError(
            f"expected a whole image in {name}, found it truncated or corrupt ({reason})"
        ) from None
