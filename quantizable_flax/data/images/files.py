"""Images of local folders and tars, as one dataset."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantizable_flax.data.images.containers import open_container
from quantizable_flax.data.images.entries import Container, Entry
from quantizable_flax.data.images.layout import (
    TRAIN_SPLITS,
    Classes,
    ImageFile,
    read_layout,
    read_unlabelled,
)
from quantizable_flax.data.images.pool import Pool
from quantizable_flax.data.paths import matched
from quantizable_flax.data.splits import VALIDATION_SPLITS, position
from quantizable_flax.errors import UserError


class ImageFiles:
    """Images in containers; a million of them take tens of megabytes, also when pickled."""

    def __init__(
        self, containers: Sequence[Container], files: Sequence[ImageFile], labels: Sequence[int]
    ):
        self._containers = tuple(containers)
        names = [os.fsencode(file.entry.name) for file in files]
        self._names = b"".join(names)
        self._ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)
        places = [(file.container, file.entry.offset, file.entry.size) for file in files]
        self._places_Nx3 = np.array(places, dtype=np.int64)
        self._labels_N = np.array(labels, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitem__(self, index: int) -> dict[str, Any]:
        container, offset, size = self._places_Nx3[index].tolist()
        start = int(self._ends_N[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : self._ends_N[index]])
        holder = self._containers[container]
        return {
            "image": holder.read(Entry(name, offset, size)),
            "label": int(self._labels_N[index]),
            "name": holder.describe(name),
        }


class FileDataset:
    """What comma-separated folders, tars and globs hold; reads their listings once.

    Args:
      patterns: of their paths.
      option: what messages call that.
      labelled: whether the folders of images are classes; else all are of one, NO_CLASS.

    Attributes:
      has_validation: whether the files have a validation split of their own.
    """

    def __init__(self, patterns: str, option: str, *, labelled: bool = True):
        self._option = option
        self.paths = expand(patterns, option)
        containers = [open_container(path, option) for path in self.paths]
        listing = (read_layout if labelled else read_unlabelled)(containers)
        self._pools = {split: _make_pool(containers, images) for split, images in listing.items()}
        self.has_validation = "train" in self._pools and len(self._pools) > 1

    def train(self) -> Pool:
        """Returns the training images: all where there is just one split, or none."""
        return self._pool(TRAIN_SPLITS)

    def validation(self) -> Pool:
        """Returns the images of the validation split, or all where there is just one split."""
        return self._pool(VALIDATION_SPLITS)

    def _pool(self, preferred: Sequence[str]) -> Pool:
        found = [split for split in preferred if split in self._pools] or list(self._pools)
        if found[0] not in preferred and len(found) > 1:
            raise UserError(
                f"expected a split named {preferred[0]} in {self._option}, found "
                f"{', '.join(sorted(found))}; rename one or name its folder"
            )
        return self._pools[found[0]]


def _make_pool(containers: Sequence[Container], images: Classes) -> Pool:
    """Returns the images in an order that their names alone decide.

    The order mixes the classes, so that the first few batches of an evaluation have all of them,
    and is the same from a folder and from a tar.
    """
    classes = sorted(images)
    ranked = [
        (position(file.key), file.key, file.container, file.entry.name, label, file)
        for label, name in enumerate(classes)
        for file in images[name]
    ]
    ranked.sort(key=lambda item: item[:4])
    source = ImageFiles(containers, [item[5] for item in ranked], [item[4] for item in ranked])
    return Pool(source, tuple(classes), np.array([item[0] for item in ranked]))


def expand(patterns: str, option: str) -> list[str]:
    """Returns the paths that comma-separated paths or globs name, in order, each once.

    Raises:
      UserError: a path or glob that matches nothing, or no path at all.
    """
    paths: dict[str, str] = {}
    for pattern, matches in matched(patterns):
        if not matches:
            raise UserError(
                f"expected folders or tars that match {pattern!r} in {option}, found none; "
                "correct the path"
            )
        for match in matches:
            paths.setdefault(os.path.realpath(match), match)
    if not paths:
        raise UserError(
            f"expected folders or tars separated by commas in {option}, found {patterns!r}; "
            "name at least one"
        )
    return list(paths.values())
