"""Where crops lie, and what becomes of the pixels.

The tolerances on statistics are five standard deviations or more.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quantizable_flax.data.images import crops
from quantizable_flax.data.images.decode import load_image, open_image, to_array
from tests.data.images.conftest import encode, random_image, rng, smooth_image

SIDES = st.integers(1, 600)
PHOTO = encode(smooth_image(400, 400), "JPEG")


@given(width=SIDES, height=SIDES, scale=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
def test_boxes_lie_inside_with_the_right_area_and_aspect(width, height, scale, seed):
    box = crops.random_box(width, height, scale, rng(seed))
    assert box.left >= 0
    assert box.top >= 0
    assert 0 < box.width <= width - box.left
    assert 0 < box.height <= height - box.top
    if min(box.width, box.height) > 20:  # Rounding moves small ones further.
        assert 0.7 < box.width / box.height < 1.42
        fallback = box.width == width or box.height == height
        assert fallback or box.width * box.height > 0.9 * scale * width * height


def test_the_distribution_is_that_of_the_recipe():
    generator, count, side = rng(1), 4000, 1000
    boxes = np.array([crops.random_box(side, side, 0.1, generator) for _ in range(count)])
    left, top, width, height = boxes.T
    # Small boxes always fit: among themselves, areas are uniform and aspects log-uniform.
    area = width * height / side**2
    small = area < 0.5
    area_quarters = np.histogram(area[small], bins=4, range=(0.1, 0.5))[0]
    expected = small.sum() / 4
    assert np.abs(area_quarters - expected).max() < 5 * math.sqrt(expected)
    aspects = np.log(width / height)[small]
    aspect_quarters = np.histogram(aspects, bins=4, range=(math.log(3 / 4), math.log(4 / 3)))[0]
    assert np.abs(aspect_quarters - expected).max() < 5 * math.sqrt(expected)
    for start, length in ((left, width), (top, height)):
        assert start.min() == 0
        assert (start + length)[length < side].max() == side
        place = (start + 0.5) / (side - length + 1)
        assert abs(place.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
        assert abs(place.std() - math.sqrt(1 / 12)) < 0.02


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13))],
)
def test_long_images_get_the_largest_centred_box_of_a_fair_aspect(width, height, expected):
    assert crops.random_box(width, height, 0.9, rng(0)) == expected


def test_a_box_of_the_target_size_is_copied():
    image = random_image(0, 30, 40)
    opened = open_image(encode(image), "x")
    found = crops.resized_box(opened, crops.Box(5, 7, 12, 12), 12, 3, "x")
    np.testing.assert_array_equal(to_array(found), image[7:19, 5:17])


@given(
    size=st.integers(8, 60),
    corner=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    sides=st.tuples(st.integers(8, 100), st.integers(8, 100)),
)
def test_reduced_decoding_leaves_two_pixels_for_one(size, corner, sides):
    loaded = []

    def spy(*args):
        loaded.append(load_image(*args))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "load_image", spy)
        crops.resized_box(open_image(PHOTO, "x"), crops.Box(*corner, *sides), size, 3, "x")
        crops.centred(open_image(PHOTO, "x"), size, 0.9, 3, "x")
    for image, shorter in ((loaded[0], min(sides)), (loaded[1], 400)):
        kept = image.height / 400
        assert kept == 1 or kept * shorter >= 1.9 * size
        # No larger than needed, either.
        assert kept == 1 / 8 or kept * shorter <= 5 * size or kept == 1


@pytest.mark.parametrize("size", [32, 50])
def test_reduced_decoding_keeps_the_picture(size):
    smooth = smooth_image(800, 1000)
    encoded = encode(smooth, "JPEG", quality=95)
    box = crops.Box(101, 53, 640, 512)
    found = crops.resized_box(open_image(encoded, "x"), box, size, 3, "x")
    corner = (box.left, box.top, box.left + box.width, box.top + box.height)
    expected = smooth.resize((size, size), Image.Resampling.BICUBIC, box=corner)
    difference = np.abs(to_array(found).astype(int) - to_array(expected))
    assert difference.mean() < 2
    assert difference.max() < 12


def test_centre_is_exact_where_nothing_is_scaled():
    image = random_image(0, 12, 20)
    found = crops.centred(open_image(encode(image), "x"), 12, 1.0, 3, "x")
    np.testing.assert_array_equal(to_array(found), image[:, 4:16])
    tall = crops.centred(open_image(encode(image), "x"), 9, 0.75, 3, "x")
    np.testing.assert_array_equal(to_array(tall), image[2:11, 6:15])


@pytest.mark.parametrize(("crop", "shorter"), [(0.875, 256), (0.9, 248), (0.7, 320), (1.0, 224)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (90, 31)])
def test_centre_follows_the_published_rounding(width, height, crop, shorter):
    smooth = smooth_image(height, width)
    found = crops.centred(open_image(encode(smooth), "x"), 224, crop, 3, "x")
    longer = int(shorter * max(width, height) / min(width, height))
    scaled = (longer, shorter) if width > height else (shorter, longer)
    left, top = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
    expected = smooth.resize(scaled, Image.Resampling.BICUBIC)
    expected_HxWx3 = np.asarray(expected)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(to_array(found), expected_HxWx3)


def test_scaling_down_averages_instead_of_skipping():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    found = crops.centred(open_image(encode(stripes), "x"), 16, 1.0, 1, "x")
    assert np.abs(to_array(found).astype(int) - 127).max() <= 16


@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_are_uniform_and_padded_with_black(channels):
    image = np.maximum(random_image(2, 10, 10, channels), 1)
    padded = np.pad(image, [(2, 2), (2, 2)] + [(0, 0)] * (image.ndim - 2))
    windows = {
        padded[top : top + 10, left : left + 10].tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    generator, counts = rng(3), {}
    for _ in range(2500):
        found = windows[np.asarray(crops.shifted(Image.fromarray(image), 2, generator)).tobytes()]
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 25
    assert all(abs(count - 100) < 50 for count in counts.values())


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (3, 600)])
def test_the_middle_of_a_long_line_takes_no_more_memory_than_any_image(shape):
    line = np.zeros(shape, np.uint8)
    place = [slice(side // 2 - 4, side // 2 + 4) if side > 9 else slice(None) for side in shape]
    line[tuple(place)] = 200
    found = crops.centred(Image.fromarray(line), 64, 1.0, 1, "x")
    assert found.size == (64, 64)
    middle = np.asarray(found)[24:40, 24:40]
    np.testing.assert_allclose(middle, 200, atol=40)  # bicubic rings beside an edge
