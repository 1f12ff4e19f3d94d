"""Classification of images, as a task of the data package."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.data.fingerprint import sample
from quantizable_flax.data.images.augment import AugmentImage, PrepareImage, make_recipe
from quantizable_flax.data.images.decode import UnreadableImageError, load_image, open_image
from quantizable_flax.data.images.pool import Pool, normalised
from quantizable_flax.data.images.sources import Dataset, open_validation_files, opener
from quantizable_flax.data.images.stand_ins import CHOICES, TrainingImages
from quantizable_flax.data.kinds import images_have_labels
from quantizable_flax.data.splits import validation_fraction
from quantizable_flax.data.task import SPLITS, Source, Task, Transform
from quantizable_flax.errors import UserError, check_choice, nearest


class ImageTask(Task):
    """Examples {"images": uint8 [S, S, C], "labels": int32}; fillers are black and of class 0.

    Without labels, as of a model without classes, images need no folders of classes.

    Args:
      config: a whole configuration; its `data` and `model` are used.
      assets: those of a checkpoint, {"classes": names}; without them the training data decide.

    Raises:
      UserError: a setting out of range; the data are opened at first use.
    """

    unit = "images"

    def __init__(self, config: ConfigDict, assets: Mapping[str, Any] | None = None):
        self._data, self._num_classes = config.data, config.model.num_classes
        self._labelled = images_have_labels(config)
        self._recipe = make_recipe(config)
        self.repeats = self._recipe.repeats
        self._open = opener(config)
        self._fraction = validation_fraction(config.data)
        check_choice("data.on_corrupt", config.data.on_corrupt, CHOICES)
        self._known: tuple[str, ...] | None = None
        if assets is not None and self._labelled:
            self._known = _classes_of(assets)
        if self._known is not None:
            self._check_count(self._known)

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label, none where images have no labels."""
        if not self._labelled:
            return ()
        return self._train.classes if self._known is None else self._known

    @property
    def assets(self) -> dict[str, Any]:
        """The names of the classes, in the order of the labels, where images have some."""
        return {"classes": list(self.classes)} if self._labelled else {}

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Checksums of the names of the images, in their order, and of the content of some."""
        source = self.source("train")
        names = zlib.crc32(self._train.positions_N.tobytes())
        checksums = sample(source, self._is_readable)
        return {"examples": len(source), "content": names, "sample": checksums}

    def _is_readable(self, element: dict[str, Any]) -> bool:
        size = self._recipe.image_size
        try:
            image = open_image(element["image"], element["name"])
            load_image(image, self._recipe.channels, element["name"], (size, size))
        except UnreadableImageError:
            return False
        return True

    def source(self, split: str) -> Source:
        """Returns the labelled, still encoded images of "train" or "validation".

        Raises:
          UserError: another split, data that cannot be read, or classes that do not fit.
        """
        if split == "train":
            shares = not (self._data.validation_files or self._dataset.has_validation)
            source = self._train.share(self._fraction, split) if shares else self._train.source
            return TrainingImages(source, skip=self._data.on_corrupt == "skip")
        if split != "validation":
            raise UserError(
                f"expected a split among {', '.join(SPLITS)}, found {split!r}"
                f"{nearest(split, SPLITS)}"
            )
        if self._data.validation_files or self._dataset.has_validation:
            return self._validation.source
        return self._train.share(self._fraction, split)

    def transform(self, *, train: bool) -> Transform:
        """Returns the augmentation of training, or the resize and centre crop of evaluation."""
        return AugmentImage(self._recipe) if train else PrepareImage(self._recipe)

    @functools.cached_property
    def _dataset(self) -> Dataset:
        return self._open()

    @functools.cached_property
    def _train(self) -> Pool:
        pool = self._dataset.train()
        if not self._labelled:
            return pool
        self._check_count(pool.classes)
        if self._known is None:
            return pool
        if set(pool.classes) != set(self._known):
            raise UserError(
                "expected the classes of the checkpoint in the data, found "
                f"{_difference(self._known, pool.classes)}; use the data that it was trained on"
            )
        return pool.relabelled(self._known)

    @functools.cached_property
    def _validation(self) -> Pool:
        if self._data.validation_files:
            pool = open_validation_files(self._data, labelled=self._labelled)
        else:
            pool = self._dataset.validation()
        if not self._labelled:
            return pool
        known = set(self.classes)
        unknown = [name for name in pool.classes if name not in known]
        if unknown:
            raise UserError(
                f"expected only classes of the training data for validation, found {unknown[0]!r}"
                f"{nearest(unknown[0], self.classes)}; rename its folder or remove it"
            )
        return pool.relabelled(self.classes)

    def _check_count(self, classes: Sequence[str]) -> None:
        if len(classes) != self._num_classes:
            raise UserError(
                f"expected as many classes as model.num_classes, found {len(classes)} classes, "
                f"model.num_classes is {self._num_classes}; set model.num_classes={len(classes)} "
                "for a new model, or name data.files of a finished one's classes"
            )


def _difference(wanted: Sequence[str], found: Sequence[str]) -> str:
    if len(wanted) != len(found):
        return f"{len(found)} instead of {len(wanted)}"
    label = next(i for i, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1])
    return f"label {label} is {found[label]!r} instead of {wanted[label]!r}"


def _classes_of(assets: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names in a checkpoint; None as those of a published model say that nobody named them."""
    classes = assets.get("classes", ())
    if classes is None:
        return None
    if (
        not classes
        or not isinstance(classes, (list, tuple))
        or not all(isinstance(name, str) for name in classes)
    ):
        raise UserError(
            "expected the names of the classes in the assets of an image checkpoint, found "
            f"{', '.join(sorted(assets)) or 'nothing'}; use a checkpoint of an image model"
        )
    return tuple(map(normalised, classes))
