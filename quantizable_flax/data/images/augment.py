"""The transforms of training and of evaluation, which run in Grain's threads or processes."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from quantizable_flax.data.images import color, crops
from quantizable_flax.data.images.decode import CHANNELS, open_image, to_array
from quantizable_flax.data.images.erase import erased
from quantizable_flax.data.images.rand_augment import MAX_MAGNITUDE, rand_augment
from quantizable_flax.data.images.stand_ins import readable
from quantizable_flax.data.kinds import images_have_labels
from quantizable_flax.data.task import Example
from quantizable_flax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The checked settings of data.augment, with the size that images end up at."""

    image_size: int
    channels: int
    eval_crop: float
    repeats: int
    crop_scale: float
    pad_crop: int
    flip: bool
    rand_layers: int
    rand_magnitude: float
    rand_magnitude_std: float
    color_jitter: float
    erase_probability: float
    erase_min_area: float
    erase_max_area: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    labelled: bool


class AugmentImage(grain.transforms.RandomMap):
    """Maps an element of an image source to an example for training.

    In this order: random resized crop (or the whole image, centred), padding and random crop,
    horizontal flip, RandAugment, colour jitter, random erasing. What is switched off draws no
    random numbers, and with all of it off an image of the right size stays as it is.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> Example:
        """Returns `images`, uint8 [S, S, C], and `labels`, int32, where images have some.

        Raises:
          UserError: a corrupt image, with its name, unless another takes its place.
        """
        return readable(element, lambda one: self._augmented(one, rng))

    def _augmented(self, element: dict[str, Any], rng: np.random.Generator) -> Example:
        recipe, name = self._recipe, element["name"]
        opened = open_image(element["image"], name)
        if recipe.crop_scale < 1:
            box = crops.random_box(opened.width, opened.height, recipe.crop_scale, rng)
            image = crops.resized_box(opened, box, recipe.image_size, recipe.channels, name)
        else:
            image = crops.centred(opened, recipe.image_size, 1.0, recipe.channels, name)
        image_HxWxC = to_array(_augmented(image, recipe, rng))
        if recipe.erase_probability and rng.random() < recipe.erase_probability:
            areas = (recipe.erase_min_area, recipe.erase_max_area)
            image_HxWxC = erased(image_HxWxC, areas, recipe.pixel_mean, recipe.pixel_std, rng)
        return _example(image_HxWxC, element, recipe)


class PrepareImage(grain.transforms.Map):
    """Maps an element of an image source to an example for evaluation: resized, centre crop."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def map(self, element: dict[str, Any]) -> Example:
        """Returns `images`, uint8 [S, S, C], and `labels`, int32, where images have some.

        Raises:
          UserError: a corrupt image, with its name, unless another takes its place.
        """
        return readable(element, self._prepared)

    def _prepared(self, element: dict[str, Any]) -> Example:
        recipe, name = self._recipe, element["name"]
        opened = open_image(element["image"], name)
        size, crop = recipe.image_size, recipe.eval_crop
        image = crops.centred(opened, size, crop, recipe.channels, name)
        return _example(to_array(image), element, recipe)


def _augmented(image: Image.Image, recipe: Recipe, rng: np.random.Generator) -> Image.Image:
    if recipe.pad_crop:
        image = crops.shifted(image, recipe.pad_crop, rng)
    if recipe.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.rand_layers:
        strength = (recipe.rand_magnitude, recipe.rand_magnitude_std)
        image = rand_augment(image, recipe.rand_layers, *strength, rng)
    if recipe.color_jitter:
        image = color.jitter(image, recipe.color_jitter, rng)
    return image


def _example(image_HxWxC: np.ndarray, element: dict[str, Any], recipe: Recipe) -> Example:
    if not recipe.labelled:
        return {"images": image_HxWxC}
    return {"images": image_HxWxC, "labels": np.asarray(element["label"], dtype=np.int32)}


def make_recipe(config: ConfigDict) -> Recipe:
    """Returns the settings of a configuration.

    Raises:
      UserError: a value that is out of range, with its key.
    """
    model, data, augment = config.model, config.data, config.data.augment
    size = model.image_size
    _check("model.image_size", size, size >= 1, "at least 1")
    _check("model.channels", model.channels, model.channels in CHANNELS, "1 or 3")
    _check("data.eval_crop", data.eval_crop, 0 < data.eval_crop <= 1, "in (0, 1]")
    for key, fits, wanted in (
        ("repeats", augment.repeats >= 1, "at least 1"),
        ("crop_scale", 0 < augment.crop_scale <= 1, "in (0, 1]"),
        ("pad_crop", 0 <= augment.pad_crop < size, f"in 0..{size - 1}, below model.image_size"),
        ("rand_layers", augment.rand_layers >= 0, "at least 0"),
        (
            "rand_magnitude",
            0 <= augment.rand_magnitude <= MAX_MAGNITUDE,
            f"in [0, {MAX_MAGNITUDE:g}]",
        ),
        ("rand_magnitude_std", 0 <= augment.rand_magnitude_std < math.inf, "of at least 0"),
        ("color_jitter", 0 <= augment.color_jitter < math.inf, "of at least 0"),
        ("erase_probability", 0 <= augment.erase_probability <= 1, "in [0, 1]"),
        ("erase_min_area", 0 < augment.erase_min_area <= 1, "in (0, 1]"),
        (
            "erase_max_area",
            augment.erase_min_area <= augment.erase_max_area <= 1,
            "in [data.augment.erase_min_area, 1]",
        ),
    ):
        _check(f"data.augment.{key}", augment[key], fits, wanted)
    mean, std = (tuple(map(float, values)) for values in (model.pixel_mean, model.pixel_std))
    if augment.erase_probability:
        for key, values in (("pixel_mean", mean), ("pixel_std", std)):
            each = f"with a value for each of the {model.channels} channels"
            _check(f"model.{key}", values, len(values) == model.channels, each)
    return Recipe(
        image_size=size,
        channels=model.channels,
        eval_crop=data.eval_crop,
        pixel_mean=mean,
        pixel_std=std,
        labelled=images_have_labels(config),
        **augment.to_dict(),
    )


def _check(key: str, value: Any, fits: bool, wanted: str) -> None:
    if not fits:
        raise UserError(f"expected {key} {wanted}, found {value}; change it")
