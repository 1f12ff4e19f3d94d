"""Images of datasets that TensorFlow Datasets has built."""

import operator
from typing import Any

from quantizable_flax.data.images.layout import VALIDATION_SPLITS
from quantizable_flax.data.images.pool import Pool, normalised, random_positions
from quantizable_flax.data.task import Source
from quantizable_flax.data.tfds_source import class_names, open_split, split_names
from quantizable_flax.errors import UserError


class TfdsImages:
    """Examples of a split as elements with encoded images and checked labels."""

    def __init__(
        self, examples: Source, title: str, image_key: str, label_key: str, num_classes: int
    ):
        self._examples, self._title = examples, title
        self._image_key, self._label_key = image_key, label_key
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        name = f"example {index} of {self._title}"
        return {
            "image": example[self._image_key],
            "label": self._label(example[self._label_key], name),
            "name": name,
            "mend": "build the dataset again",
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


class TfdsDataset:
    """The splits of a TFDS dataset.

    Attributes:
      has_validation: whether one of them is for validation.
    """

    def __init__(self, name: str, data_cfg: Any, num_classes: int):
        self._name, self._data_cfg, self._num_classes = name, data_cfg, num_classes
        names = split_names(name, data_cfg.tfds_dir)
        self._splits = names
        self._validation = next((split for split in VALIDATION_SPLITS if split in names), None)
        self.has_validation = self._validation is not None

    def train(self) -> Pool:
        """Returns the examples of the split "train"."""
        if "train" not in self._splits:
            raise UserError(
                f"expected the split 'train' in the TFDS dataset {self._name}, found "
                f"{', '.join(self._splits) or 'none'}; choose another dataset"
            )
        return self._pool("train")

    def validation(self) -> Pool:
        """Returns the examples of the split "validation", or of "test" where there is none."""
        assert self._validation is not None
        return self._pool(self._validation)

    def _pool(self, split: str) -> Pool:
        data_cfg = self._data_cfg
        keys = (data_cfg.image_key, data_cfg.label_key)
        names = class_names(self._name, data_cfg.tfds_dir, data_cfg.label_key)
        examples = open_split(self._name, split, data_cfg.tfds_dir, undecoded=keys[:1], only=keys)
        title = f"the {split} split of the TFDS dataset {self._name}"
        classes = tuple(map(normalised, names or map(str, range(self._num_classes))))
        source = TfdsImages(examples, title, *keys, len(classes))
        return Pool(source, classes, random_positions(len(examples)))
