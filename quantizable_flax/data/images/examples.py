"""Images of datasets that have splits and columns of their own."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from quantizable_flax.data.images.layout import NO_CLASS
from quantizable_flax.data.images.pool import Pool, normalised, random_positions
from quantizable_flax.data.splits import VALIDATION_SPLITS
from quantizable_flax.data.task import Source
from quantizable_flax.errors import UserError


class LabelledImages:
    """Examples of a split as elements with encoded images and checked labels.

    Args:
      examples: dicts by key.
      title: what messages call the split.
      keys: of the image and of the label; None where the images have none, then all are 0.
      num_classes: how many labels there are.
      mend: what to do about a corrupt image.
    """

    def __init__(
        self,
        examples: Source,
        title: str,
        keys: tuple[str, str | None],
        num_classes: int,
        mend: str,
    ):
        self._examples, self._title, self._mend = examples, title, mend
        self._image_key, self._label_key = keys
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        name = f"example {index} of {self._title}"
        key = self._label_key
        return {
            "image": example[self._image_key],
            "label": 0 if key is None else self._label(example[key], name),
            "name": name,
            "mend": self._mend,
        }

    def _label(self, value: Any, name: str) -> int:
        try:
            label = operator.index(value)
        except TypeError:
            raise UserError(
                f"expected an integer under the key {self._label_key!r} in {name}, found "
                f"{type(value).__name__}; set data.label_key to the key of the class"
            ) from None
        if not 0 <= label < self._num_classes:
            raise UserError(
                f"expected a label in 0..{self._num_classes - 1} in {name}, found {label}; "
                "correct the dataset, model.num_classes or data.label_key"
            )
        return label


def labelled_pool(
    examples: Source,
    title: str,
    keys: tuple[str, str | None],
    names: Sequence[str] | None,
    num_classes: int | None,
    mend: str,
) -> Pool:
    """Returns the images of a split; where no class has a name, its number is one.

    Where `num_classes` is None, so is the key of the label, and all are of NO_CLASS.
    """
    numbers = [NO_CLASS] if num_classes is None else map(str, range(num_classes))
    classes = tuple(map(normalised, names or numbers))
    source = LabelledImages(examples, title, keys, len(classes), mend)
    return Pool(source, classes, random_positions(len(examples)))


class SplitDataset:
    """The splits of a dataset.

    Args:
      title: what messages call it.
      splits: their names.
      open_pool: from the name of a split to its images.

    Attributes:
      has_validation: whether one of them is for validation.
    """

    def __init__(self, title: str, splits: Sequence[str], open_pool: Callable[[str], Pool]):
        self._title, self._splits, self._open_pool = title, splits, open_pool
        self._validation = next((split for split in VALIDATION_SPLITS if split in splits), None)
        self.has_validation = self._validation is not None

    def train(self) -> Pool:
        """Returns the examples of the split "train"."""
        if "train" not in self._splits:
            raise UserError(
                f"expected the split 'train' in {self._title}, found "
                f"{', '.join(self._splits) or 'none'}; choose another dataset"
            )
        return self._open_pool("train")

    def validation(self) -> Pool:
        """Returns the examples of the first of VALIDATION_SPLITS that there is."""
        assert self._validation is not None
        return self._open_pool(self._validation)
