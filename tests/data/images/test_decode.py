"""Decoding of every kind of image, and the messages for what is none."""

import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from quantizable_flax.data.images.decode import load_image, open_image, to_array
from quantizable_flax.errors import UserError
from tests.data.images.conftest import encode, expect_error, random_image, rng, smooth_image

RGB = random_image(3, 9, 14)
GREY = random_image(4, 9, 14, channels=1)


def decode(value, channels, name):
    return to_array(load_image(open_image(value, name), channels, name))


def grey(image_HxWx3):
    """Returns the luma of ITU-R 601, as real numbers."""
    return image_HxWx3 @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_are_exact(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(RGB, kind, **options), 3, "x"), RGB)


def test_arrays_and_bytes_are_the_same():
    for image, channels in ((RGB, 3), (GREY[..., None], 1)):
        encoded = encode(image if channels == 3 else GREY)
        expected = decode(encoded, channels, "x")
        np.testing.assert_array_equal(decode(image, channels, "x"), expected)
        np.testing.assert_array_equal(expected, image)


def test_jpeg_is_close():
    smooth = smooth_image(40, 30)
    decoded = decode(encode(smooth, "JPEG", quality=95, subsampling=0), 3, "x")
    assert np.abs(decoded.astype(int) - np.asarray(smooth)).mean() < 4


def test_grey_to_colour_and_back():
    colour = decode(encode(GREY), 3, "x")
    np.testing.assert_array_equal(colour, np.repeat(GREY[..., None], 3, axis=2))
    luma = decode(encode(RGB), 1, "x")
    assert luma.shape == (9, 14, 1)
    assert np.abs(luma[..., 0] - grey(RGB)).max() <= 1


def test_alpha_is_dropped():
    alpha = random_image(5, 9, 14, channels=1)
    rgba = np.concatenate([RGB, alpha[..., None]], axis=2)
    np.testing.assert_array_equal(decode(encode(rgba), 3, "x"), RGB)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode(encode(grey_alpha), 1, "x")[..., 0], GREY)


def test_palettes_give_their_colours():
    flat = Image.fromarray(RGB // 128 * 255)
    palette = flat.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    for options in ({}, {"transparency": b"\x80" * 8}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow is loud about a palette with transparency.
            found = decode(encode(palette, **options), 3, "x")
        np.testing.assert_array_equal(found, np.asarray(flat))


def test_sixteen_bits_keep_the_upper_eight():
    wide = (GREY.astype(np.uint16) << 8) | 0x7F
    np.testing.assert_array_equal(decode(encode(wide), 1, "x")[..., 0], GREY)


def test_one_bit_is_black_and_white():
    bits = Image.fromarray(GREY).point(lambda value: 255 * (value > 99), mode="1")
    np.testing.assert_array_equal(decode(encode(bits), 1, "x")[..., 0], 255 * (GREY > 99))


def test_cmyk_jpeg_has_the_right_colours():
    red = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    decoded = decode(encode(red, "JPEG", quality=95), 3, "x").reshape(-1, 3).mean(0)
    np.testing.assert_allclose(decoded, (200, 30, 60), atol=4)


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(smooth_image(20, 10), "JPEG", exif=exif), 3, "x").shape == (20, 10, 3)


def test_a_jpeg_is_reduced_only_as_far_as_asked():
    encoded = encode(smooth_image(400, 600), "JPEG", quality=95)
    for enough, size in (
        ((600, 400), (600, 400)),
        ((301, 200), (600, 400)),
        ((300, 200), (300, 200)),
        ((100, 150), (300, 200)),  # the height would become too small
        ((3, 2), (75, 50)),
        ((0.1, 0.1), (75, 50)),
    ):
        assert load_image(open_image(encoded, "x"), 3, "x", enough).size == size
    png = encode(smooth_image(40, 60))
    assert load_image(open_image(png, "x"), 3, "x", (6, 4)).size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF"])
def test_a_truncated_image_names_its_file(kind):
    encoded = encode(random_image(0, 64, 64), kind)
    error = expect_error(
        lambda: decode(encoded[: len(encoded) // 2], 3, "photos/a.img"),
        "whole image in photos/a.img, found it truncated or corrupt",
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert type(pickle.loads(pickle.dumps(error))) is type(error)


@pytest.mark.parametrize("content", [b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"])
def test_a_broken_header_names_its_file(content):
    expect_error(lambda: decode(content, 3, "photos/a.jpg"), "image in photos/a.jpg, found")


def test_an_empty_file_is_called_so():
    expect_error(lambda: decode(b"", 3, "a.jpg"), "image in a.jpg, found an empty file")


def test_other_formats_are_refused():
    expect_error(lambda: decode(encode(RGB, "TIFF"), 3, "a.jpg"), "found none of these")


def test_a_flipped_byte_never_escapes_as_another_error():
    encoded = encode(random_image(0, 16, 16))
    refused = 0
    for place in range(len(encoded)):
        broken = bytearray(encoded)
        broken[place] ^= 0x41
        try:
            decode(bytes(broken), 3, "x")
        except UserError:
            refused += 1
    assert refused > len(encoded) / 2


def png_header(width, height, bits=8, rows=b""):
    """Returns a PNG in colour whose rows may be missing."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows) if rows else b"", b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


def jpeg_header(width, height, **options):
    """Returns a small JPEG that claims another size."""
    encoded = bytearray(encode(smooth_image(16, 16), "JPEG", **options))
    frame = encoded.index(b"\xff\xc2" if options else b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(encoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_196_megapixels_are_an_image(kind):
    """More than Pillow opens by itself, whose limit is the program's and stays as it is."""
    halves = Image.new("L" if kind == "JPEG" else "1", (14_000, 14_000))
    halves.paste(255, (7_000, 0, 14_000, 14_000))
    encoded = encode(halves, kind)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_image(open_image(encoded, "x"), 1, "x", (100, 100))
    assert found.size == ((1_750, 1_750) if kind == "JPEG" else (14_000, 14_000))
    middle = found.width // 2
    assert [found.getpixel((middle + step, middle)) for step in (-99, 99)] == [0, 255]
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_limit_that_other_code_sets_is_not_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(decode(encode(RGB), 3, "x"), RGB)


@pytest.mark.parametrize(
    ("encoded", "size"),
    [
        (png_header(16_385, 16_384), "16385 x 16384"),
        (png_header(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647"),
        (jpeg_header(20_000, 20_000, progressive=True), "20000 x 20000"),
    ],
)
def test_what_would_not_fit_into_memory_is_called_so(encoded, size):
    expect_error(
        lambda: load_image(open_image(encoded, "a.png"), 3, "a.png", (100, 100)),
        f"at most 268,435,456 pixels, about 1 GiB once decoded, in a.png, found {size}; scale it",
    )
    with pytest.raises(UserError, match="truncated"):  # this size would have been taken
        decode(png_header(64, 64), 3, "a.png")


def test_a_jpeg_counts_by_the_size_that_is_decoded():
    encoded = jpeg_header(30_000, 20_000)
    assert load_image(open_image(encoded, "x"), 1, "x", (100, 100)).size == (3_750, 2_500)
    expect_error(lambda: decode(encoded, 1, "x"), "pixels, .* found 30000 x 20000")


def test_the_first_picture_of_several_is_read():
    """As phones store a photograph with its preview, in one file that is called .jpg."""
    first, second = smooth_image(30, 40), Image.new("RGB", (40, 30))
    encoded = encode(first, "MPO", save_all=True, append_images=[second], quality=95)
    np.testing.assert_array_equal(
        decode(encoded, 3, "x"), decode(encode(first, "JPEG", quality=95), 3, "x")
    )


@pytest.mark.parametrize("bits", [b"\xff" * 6, b"MM\0*\0\0"])
def test_broken_exif_is_no_broken_image(bits):
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = bytearray(encode(smooth_image(20, 10), "JPEG", exif=exif))
    place = encoded.index(b"Exif\0\0") + 6
    encoded[place : place + 6] = bits
    plain = decode(encode(smooth_image(20, 10), "JPEG"), 3, "x")
    np.testing.assert_array_equal(decode(bytes(encoded), 3, "x"), plain)


def test_sixteen_bits_a_colour_keep_the_upper_eight():
    wide_HxWx3 = rng(6).integers(0, 2**16, (3, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide_HxWx3)
    encoded = png_header(4, 3, 16, rows)
    np.testing.assert_array_equal(decode(encoded, 3, "x"), wide_HxWx3 >> 8)
