"""Random erasing: where the boxes lie, what is in them, and that nothing else changes."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from quantizable_flax.data.images.augment import AugmentImage, make_recipe
from quantizable_flax.data.images.erase import ASPECT, erased, random_box
from tests.data.images.conftest import make_config, random_image, rng

AREAS = (0.02, 1 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_boxes_have_the_published_areas_and_aspects():
    boxes = [random_box(200, 200, AREAS, rng(seed)) for seed in range(2_000)]
    assert None not in boxes
    for box in boxes:
        assert 0 <= box.left <= 200 - box.width
        assert 0 <= box.top <= 200 - box.height
        assert ASPECT[0] * 0.95 < box.height / box.width < ASPECT[1] * 1.05  # rounded sides
    areas = np.array([box.width * box.height / 200**2 for box in boxes])
    assert areas.min() > AREAS[0] * 0.95
    assert areas.max() < AREAS[1] * 1.02
    # Uniform but for the few large and long ones that do not fit; five standard deviations.
    assert abs(areas.mean() - sum(AREAS) / 2) < 5 * (AREAS[1] - AREAS[0]) / math.sqrt(12 * 2_000)
    places = np.array([box.left / (200 - box.width) for box in boxes])
    assert abs(places.mean() - 0.5) < 5 / math.sqrt(12 * 2_000)


def test_a_box_that_never_fits_leaves_the_image():
    """Ten tries, none of which may reach from border to border."""
    assert random_box(1, 1_000, AREAS, rng()) is None
    image = random_image(0, 1, 1)
    np.testing.assert_array_equal(erased(image, (1.0, 1.0), MEAN, STD, rng()), image)


def test_the_noise_is_standard_normal_once_it_is_normalised():
    black = np.zeros((400, 400, 3), np.uint8)
    found = erased(black, (0.3, 1 / 3), MEAN, STD, rng(1))
    assert found.dtype == np.uint8
    box = found.any(axis=2)
    rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
    noise = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert noise.size > 0.29 * 400**2 * 3
    normal = (noise / 255 - MEAN) / STD
    for channel in range(3):
        low, high = (-MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel])
        count = noise[..., channel].size
        # What black and white cut off is the only difference from a standard normal distribution.
        expected = rng(2).standard_normal(count).clip(low, high)
        tolerance = 5 * math.sqrt(2 / count) + 1 / 255
        assert abs(normal[..., channel].mean() - expected.mean()) < tolerance
        assert abs(normal[..., channel].std() - expected.std()) < tolerance
    neighbours = np.corrcoef(normal[:, :-1].ravel(), normal[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(noise.size)  # each pixel by itself


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_drawn_last_and_changes_a_box_alone(channels):
    settings = {"crop_scale": 0.3, "flip": True, "rand_layers": 2}
    image = random_image(3, 30, 30, channels)
    whole, erasing = (
        AugmentImage(
            make_recipe(make_config(24, channels=channels, erase_probability=p, **settings))
        )
        for p in (0.0, 0.5)
    )
    changed = 0
    for seed in range(200):
        element = {"image": image, "label": 0, "name": "x"}
        one, two = (each.random_map(element, rng(seed))["images"] for each in (whole, erasing))
        different = (one != two).any(axis=2)
        changed += bool(different.any())
        rows, columns = different.any(axis=1).nonzero()[0], different.any(axis=0).nonzero()[0]
        if len(rows):
            assert np.ptp(rows) < 23
            assert np.ptp(columns) < 23
    assert abs(changed - 100) < 5 * math.sqrt(200 / 4)


@pytest.mark.parametrize("name", ["vit_s16", "vit_cifar10", "vit_digits"])
def test_recipes_have_rand_augment_or_colour_jitter(name):
    path = Path(__file__).parents[3] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    augment = module.get_config().data.augment
    assert not (augment.rand_layers and augment.color_jitter)
