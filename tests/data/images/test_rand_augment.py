"""Colour changes and RandAugment against formulas written anew."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from quantizable_flax.data.images import color
from quantizable_flax.data.images.rand_augment import OPERATIONS, rand_augment
from tests.data.images.conftest import random_image, rng, smooth_image

IMAGES = {1: random_image(8, 20, 20, channels=1), 3: random_image(9, 20, 20)}
GREY = 128
both = pytest.mark.parametrize("channels", [1, 3])


class Coin:
    """Draws that make every sign positive (or negative)."""

    def __init__(self, positive: bool = True):
        self._draw = 0.9 if positive else 0.1

    def random(self):
        return self._draw


def apply(name, image_HxW_, level, positive=True):
    return np.asarray(OPERATIONS[name](Image.fromarray(image_HxW_), level, Coin(positive)))


@both
def test_blends_follow_their_formulas(channels):
    image = IMAGES[channels]
    pillow = Image.fromarray(image)
    real = image.astype(float)
    grey = np.asarray(pillow.convert("L")).astype(float)
    plain = {
        color.brightness: np.zeros_like(real),
        color.contrast: np.full_like(real, int(grey.mean() + 0.5)),
        color.saturation: real if channels == 1 else np.repeat(grey[..., None], 3, 2),
    }
    for change, plain_HxW_ in plain.items():
        for factor in (0.0, 0.3, 1.0, 1.7):
            expected = np.clip(plain_HxW_ + factor * (real - plain_HxW_), 0, 255)
            assert np.abs(np.asarray(change(pillow, factor)) - expected).max() <= 1
        np.testing.assert_array_equal(np.asarray(change(pillow, 1.0)), image)


def test_blends_are_those_of_pillow():
    image = Image.fromarray(IMAGES[3])
    for change, reference in (
        (color.brightness, ImageEnhance.Brightness),
        (color.contrast, ImageEnhance.Contrast),
        (color.saturation, ImageEnhance.Color),
    ):
        assert change(image, 1.3) == reference(image).enhance(1.3)


def test_jitter_factors_are_uniform_and_orders_vary(monkeypatch):
    calls = []

    def spy(name):
        return lambda image, factor: calls.append((name, factor)) or image

    names = ("brightness", "contrast", "saturation")
    for name in names:
        monkeypatch.setattr(color, name, spy(name))
    generator = rng(0)
    for _ in range(600):
        color.jitter(Image.fromarray(IMAGES[3]), 0.4, generator)
    for name in names:
        factors = np.array([factor for found, factor in calls if found == name])
        assert len(factors) == 600
        assert factors.min() >= 0.6
        assert factors.max() <= 1.4
        assert abs(factors.mean() - 1) < 5 * 0.8 / math.sqrt(12 * 600)
    orders = {tuple(name for name, _ in calls[i : i + 3]) for i in range(0, len(calls), 3)}
    assert len(orders) == 6
    calls.clear()
    for _ in range(300):
        color.jitter(Image.fromarray(IMAGES[3]), 1.5, generator)
    assert min(factor for _, factor in calls) >= 0


@both
def test_tables_follow_their_formulas(channels):
    image = IMAGES[channels]
    wide = image.astype(int)
    np.testing.assert_array_equal(apply("Invert", image, 0.9), 255 - image)
    for level, bits in ((0, 4), (0.2, 4), (0.3, 3), (0.9, 1), (1.0, 0)):
        expected = wide // 2 ** (8 - bits) * 2 ** (8 - bits)
        np.testing.assert_array_equal(apply("Posterize", image, level), expected)
    for level, threshold in ((0, 256), (0.5, 128), (0.9, 26), (1.0, 0)):
        expected = np.where(wide < threshold, wide, 255 - wide)
        np.testing.assert_array_equal(apply("Solarize", image, level), expected)
    for level, added in ((0, 0), (0.5, 55), (1.0, 110)):
        expected = np.where(wide < 128, np.minimum(wide + added, 255), wide)
        np.testing.assert_array_equal(apply("SolarizeAdd", image, level), expected)


def test_auto_contrast_stretches_every_channel():
    image = (IMAGES[3] // 3 + 40).astype(np.uint8)
    found = apply("AutoContrast", image, 0.9)
    low, high = image.min((0, 1)), image.max((0, 1))
    expected = (image - low.astype(float)) * 255 / (high.astype(float) - low)
    assert np.abs(found - expected).max() <= 1


def test_equalize_flattens_the_histogram():
    ramp = np.repeat(np.arange(64, dtype=np.uint8), 64).reshape(64, 64) // 2 + 100
    found = apply("Equalize", ramp, 0.9)
    # A uniform histogram of 32 values is spread evenly over 0..255; the last two may coincide.
    values = np.unique(found)
    assert (values[0], values[-1]) == (0, 255)
    assert np.abs(np.diff(values.astype(int)) - 255 / 31).max() <= 1
    assert (np.diff(found.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("positive", [True, False])
@both
def test_translations_move_by_their_share(channels, positive):
    image = IMAGES[channels]
    shift = 9 if positive else -9  # 0.45 of 20 pixels
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        found = np.moveaxis(apply(name, image, 1.0, positive), axis, 0)
        source = np.moveaxis(image, axis, 0)
        expected = np.full_like(source, GREY)
        if positive:
            expected[:-shift] = source[shift:]
        else:
            expected[-shift:] = source[:shift]
        np.testing.assert_array_equal(found, expected)


def test_shears_and_rotation_move_the_expected_points():
    dot = np.zeros((41, 41), np.uint8)
    dot[30, 20] = 255  # 10 below the centre

    def centroid(name, level, positive=True):
        found = apply(name, dot, level, positive).astype(float)
        found[found == GREY] = 0
        rows, columns = np.indices(dot.shape)
        return (rows * found).sum() / found.sum(), (columns * found).sum() / found.sum()

    # A positive shear takes from 0.3 * row further right, so things move left.
    np.testing.assert_allclose(centroid("ShearX", 1.0), (30, 20 - 0.3 * 30.5), atol=0.3)
    np.testing.assert_allclose(centroid("ShearX", 0.5, False), (30, 20 + 0.15 * 30.5), atol=0.3)
    np.testing.assert_allclose(centroid("ShearY", 1.0), (30 - 0.3 * 20.5, 20), atol=0.3)
    turned = (20 + 10 * math.cos(math.pi / 6), 20 + 10 * math.sin(math.pi / 6))
    np.testing.assert_allclose(centroid("Rotate", 1.0), turned, atol=0.3)


@both
def test_areas_from_outside_are_grey(channels):
    white = np.full_like(IMAGES[channels], 255)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        found = apply(name, white, 1.0)
        assert (found == GREY).any()
        assert (found == 255).any()


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_factors_never_pass_a_tenth(name):
    image = np.asarray(smooth_image(20, 20))
    changed = {positive: apply(name, image, 1.0, positive) for positive in (True, False)}
    kind = getattr(ImageEnhance, name)(Image.fromarray(image))
    np.testing.assert_array_equal(changed[True], np.asarray(kind.enhance(1.9)))
    np.testing.assert_array_equal(changed[False], np.asarray(kind.enhance(0.1)))


def test_magnitude_zero_leaves_geometry_and_colour_alone():
    unchanged = set(OPERATIONS) - {"AutoContrast", "Equalize", "Invert", "Posterize"}
    for name in unchanged:
        np.testing.assert_array_equal(apply(name, IMAGES[3], 0.0), IMAGES[3], err_msg=name)


def test_colour_is_the_identity_with_one_channel():
    np.testing.assert_array_equal(apply("Color", IMAGES[1], 1.0), IMAGES[1])


@both
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_keeps_size_and_mode(name, channels):
    for level in (0.0, 0.37, 1.0):
        found = apply(name, IMAGES[channels], level)
        assert found.shape == IMAGES[channels].shape
        assert found.dtype == np.uint8


def test_layers_draw_every_operation_half_of_the_time():
    calls = []

    def spy(name):
        return lambda image, level, rng: calls.append((name, level)) or image

    spies = {name: spy(name) for name in OPERATIONS}
    image, generator, count = Image.fromarray(IMAGES[3]), rng(5), 3000
    for _ in range(count):
        rand_augment(image, 2, 9.0, 0.5, generator, spies)
    assert abs(len(calls) - count) < 5 * math.sqrt(count / 2)
    counts = [sum(found == name for found, _ in calls) for name in OPERATIONS]
    assert abs(max(counts) - count / 15) < 5 * math.sqrt(count / 15)
    assert abs(min(counts) - count / 15) < 5 * math.sqrt(count / 15)
    levels = np.array([level for _, level in calls])
    assert levels.max() == 1.0  # clipped, as 2.3 % of the draws are
    inner = levels[levels < 1]
    assert abs((levels == 1).mean() - 0.0228) < 0.015
    assert abs(np.median(levels) - 0.9) < 0.01
    assert inner.std() > 0.03


def test_without_deviation_the_magnitude_is_constant():
    levels = []
    spy = {"spy": lambda image, level, rng: levels.append(level) or image}
    rand_augment(Image.fromarray(IMAGES[3]), 50, 7.0, 0.0, rng(0), spy)
    assert set(levels) == {0.7}
