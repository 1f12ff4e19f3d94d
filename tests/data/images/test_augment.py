"""The transforms of training and evaluation as a whole."""

import dataclasses
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizable_flax.data.images import augment
from quantizable_flax.data.images.augment import AugmentImage, PrepareImage, make_recipe
from tests.data.images.conftest import (
    AUGMENT,
    encode,
    expect_error,
    make_config,
    random_image,
    rng,
    smooth_image,
)


def element(image, label=1):
    return {"image": image, "label": label, "name": "x.png"}


def trained(image, seed=0, size=12, channels=3, **settings):
    transform = AugmentImage(make_recipe(make_config(size, channels=channels, **settings)))
    return transform.random_map(element(image), rng(seed))["images"]


def evaluated(image, size=12, channels=3, **settings):
    transform = PrepareImage(make_recipe(make_config(size, channels=channels, **settings)))
    return transform.map(element(image))["images"]


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_off_is_the_identity(channels):
    image = random_image(0, 12, 12, channels)
    for encoded in (encode(image), image.reshape(12, 12, channels)):
        for found in (
            trained(encoded, channels=channels),
            evaluated(encoded, channels=channels),
        ):
            np.testing.assert_array_equal(found, image.reshape(12, 12, channels))


def test_jpegs_of_the_right_size_are_not_touched():
    encoded = encode(smooth_image(64, 64), "JPEG")
    np.testing.assert_array_equal(trained(encoded, size=64), evaluated(encoded, size=64))


def test_what_is_off_draws_no_random_numbers():
    generator = rng(0)
    transform = AugmentImage(make_recipe(make_config()))
    transform.random_map(element(random_image()), generator)
    assert generator.random() == rng(0).random()


def test_examples_have_the_promised_types():
    recipe = make_recipe(make_config(10, **AUGMENT))
    examples = [
        AugmentImage(recipe).random_map(element(encode(random_image(0, 17, 30))), rng()),
        PrepareImage(recipe).map(element(encode(random_image(0, 17, 30)))),
    ]
    for example in examples:
        assert example.keys() == {"images", "labels"}
        assert (example["images"].dtype, example["images"].shape) == (np.uint8, (10, 10, 3))
        assert (example["labels"].dtype, example["labels"].shape) == (np.int32, ())
        assert example["labels"] == 1


def test_flips_are_mirror_images_half_of_the_time():
    image = random_image(1)
    found = [trained(image, seed, flip=True) for seed in range(400)]
    mirrored = sum(np.array_equal(one, image[:, ::-1]) for one in found)
    assert sum(np.array_equal(one, image) for one in found) == 400 - mirrored
    assert abs(mirrored - 200) < 50


def test_a_random_resized_crop_stays_inside_the_picture():
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (40, 1))
    widths = []
    for seed in range(200):
        found = trained(ramp, seed, channels=1, crop_scale=0.2)[..., 0].astype(int)
        assert np.ptp(found, axis=0).max() == 0
        widths.append((found[0, -1] - found[0, 0]) / 6 * 12 / 11)
    assert min(widths) > 0.9 * 40 * np.sqrt(0.2 * 0.75)
    assert max(widths) > 36


def test_a_training_image_of_another_size_is_centred_without_crops():
    image = random_image(2, 12, 20)
    np.testing.assert_array_equal(trained(image), image[:, 4:16])


def test_the_eval_crop_enlarges_before_it_crops():
    image = random_image(3, 16, 16)
    np.testing.assert_array_equal(evaluated(image, eval_crop=0.75), image[2:14, 2:14])


@given(seed=st.integers(0, 2**63), channels=st.sampled_from([1, 3]))
def test_a_generator_decides_everything(seed, channels):
    encoded = encode(random_image(4, 15, 18))
    first = trained(encoded, seed, channels=channels, **AUGMENT)
    random.seed(seed), np.random.seed(seed % 2**32)  # Global generators play no part.
    np.testing.assert_array_equal(trained(encoded, seed, channels=channels, **AUGMENT), first)


def test_different_generators_differ():
    found = {trained(random_image(4, 15, 18), seed, **AUGMENT).tobytes() for seed in range(50)}
    assert len(found) == 50


def test_steps_run_in_the_promised_order(monkeypatch):
    order = []

    def spy(name):
        return lambda image, *rest: order.append(name) or image

    monkeypatch.setattr(
        augment.crops, "resized_box", lambda image, *rest: order.append("box") or image
    )
    monkeypatch.setattr(augment.crops, "shifted", spy("shift"))
    monkeypatch.setattr(augment, "rand_augment", spy("rand"))
    monkeypatch.setattr(augment.color, "jitter", spy("jitter"))
    monkeypatch.setattr(augment, "erased", spy("erase"))
    image = random_image(0, 12, 12)
    for seed in range(8):
        order.clear()
        trained(image, seed, **AUGMENT | {"erase_probability": 1.0})
        assert order == ["box", "shift", "rand", "jitter", "erase"]


def test_transforms_pickle():
    recipe = make_recipe(make_config(**AUGMENT))
    image = element(encode(random_image(5, 20, 20)))
    for transform in (AugmentImage(recipe), PrepareImage(recipe)):
        again = pickle.loads(pickle.dumps(transform))
        if isinstance(transform, AugmentImage):
            pair = (transform.random_map(image, rng(1)), again.random_map(image, rng(1)))
        else:
            pair = (transform.map(image), again.map(image))
        np.testing.assert_array_equal(pair[0]["images"], pair[1]["images"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_scale", 0.0),
        ("crop_scale", 1.1),
        ("crop_scale", float("nan")),
        ("repeats", 0),
        ("pad_crop", -1),
        ("pad_crop", 12),
        ("rand_layers", -1),
        ("rand_magnitude", -0.1),
        ("rand_magnitude", 10.5),
        ("rand_magnitude_std", -1.0),
        ("color_jitter", -0.4),
        ("color_jitter", float("inf")),
        ("erase_probability", -0.1),
        ("erase_probability", 1.1),
        ("erase_min_area", 0.0),
        ("erase_min_area", 1.1),
        ("erase_max_area", 0.01),
        ("erase_max_area", 1.1),
    ],
)
def test_settings_out_of_range_are_named(key, value):
    expect_error(
        lambda: make_recipe(make_config(**{key: value})),
        rf"expected data.augment.{key} .*, found {value}; change it",
    )


def test_other_settings_out_of_range_are_named():
    for key, value in (("eval_crop", 0.0), ("eval_crop", 1.01)):
        expect_error(lambda k=key, v=value: make_recipe(make_config(**{k: v})), f"data.{key} in")
    expect_error(lambda: make_recipe(make_config(0)), "model.image_size at least 1, found 0")
    expect_error(lambda: make_recipe(make_config(channels=4)), "model.channels 1 or 3, found 4")
    config = make_config(erase_probability=0.5)
    config.model.pixel_std = (0.25,)
    expect_error(lambda: make_recipe(config), "model.pixel_std with a value for each of the 3")


def test_the_recipe_has_every_setting():
    recipe = make_recipe(make_config(24, channels=1, eval_crop=0.9, **AUGMENT))
    values = dataclasses.asdict(recipe)
    assert {key: values.pop(key) for key in AUGMENT} == AUGMENT
    assert values == {
        "image_size": 24,
        "channels": 1,
        "eval_crop": 0.9,
        "repeats": 1,
        "rand_magnitude": 9.0,
        "erase_min_area": 0.02,
        "erase_max_area": 1 / 3,
        "pixel_mean": (0.5,),
        "pixel_std": (0.25,),
        "labelled": True,
    }
