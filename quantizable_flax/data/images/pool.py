"""Labelled images with random access, and parts of them."""

import dataclasses
import unicodedata
from typing import Any

import numpy as np

from quantizable_flax.data.task import Source
from quantizable_flax.errors import UserError

_SPLIT_SEED = 20_230_622


@dataclasses.dataclass(frozen=True)
class Pool:
    """Images and what their labels mean.

    Attributes:
      source: elements {"image": encoded bytes or uint8 [H, W, C], "label": int, "name": str}; the
        name is for messages, and so is "mend", where a corrupt image cannot be replaced by itself.
      classes: the name of each label, `normalised`.
      positions_N: places in [0, 1), uniform, that decide which images are for validation.
    """

    source: Source
    classes: tuple[str, ...]
    positions_N: np.ndarray

    def share(self, fraction: float, split: str) -> Source:
        """Returns the images of "train" or "validation", of which `fraction` are the latter.

        Raises:
          UserError: a share without images.
        """
        indices = np.flatnonzero((self.positions_N < fraction) == (split == "validation"))
        if not len(indices):
            raise UserError(
                f"expected images for the {split} split, found none among "
                f"{len(self.positions_N)} with data.validation_fraction={fraction}; "
                "set data.validation_files, change the fraction or add images"
            )
        return Selected(self.source, indices)

    def relabelled(self, classes: tuple[str, ...]) -> "Pool":
        """Returns the images with labels that count `classes`, which hold all of this pool's."""
        if self.classes == classes[: len(self.classes)]:
            return dataclasses.replace(self, classes=classes)
        labels = tuple(classes.index(name) for name in self.classes)
        return dataclasses.replace(self, source=Relabelled(self.source, labels), classes=classes)


class Selected:
    """Some of the elements of a source."""

    def __init__(self, source: Source, indices_N: np.ndarray):
        self._source, self._indices_N = source, indices_N.astype(np.int32)

    def __len__(self) -> int:
        return len(self._indices_N)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices_N[index])]


class Relabelled:
    """A source whose labels are looked up in a table."""

    def __init__(self, source: Source, labels: tuple[int, ...]):
        self._source, self._labels = source, labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        element = self._source[index]
        return {**element, "label": self._labels[element["label"]]}


def normalised(name: str) -> str:
    """Returns a name with composed accents (NFC), whatever the system that it comes from.

    Apple's file systems take them apart (NFD): the same class in other bytes.
    """
    return unicodedata.normalize("NFC", name)


def random_positions(count: int) -> np.ndarray:
    """Returns `count` places in [0, 1); the first ones stay as they are when more are asked for."""
    return np.random.Generator(np.random.Philox(_SPLIT_SEED)).random(count)
