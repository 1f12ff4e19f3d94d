"""What a model family asks of the data package: examples, transforms, and what to remember."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import grain
import numpy as np

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]
Transform: TypeAlias = grain.transforms.Map | grain.transforms.RandomMap | Callable[[Any], Example]
SPLITS = ("train", "validation")


class Source(Protocol):
    """Random access to the raw examples of a split."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Returns the example at 0 <= index < len(self)."""
        ...


class Task(abc.ABC):
    """The data side of a model family.

    Attributes:
      unit: what an example is called in messages, e.g. "sequences" or "images".
      filler: by key of an example, the value that fills up a short evaluation batch (default 0).
    """

    unit: str = "examples"
    filler: Mapping[str, int] = {}

    @abc.abstractmethod
    def source(self, split: str) -> Source:
        """Returns the raw examples of "train" or "validation", in a fixed order.

        Raises:
          UserError: another split, or data that cannot be read.
        """

    @abc.abstractmethod
    def transform(self, *, train: bool) -> Transform:
        """Returns what makes an example of a raw one: with augmentation, or as evaluated."""

    @property
    @abc.abstractmethod
    def assets(self) -> dict[str, Any]:
        """JSON values by name that a checkpoint keeps, so that it can be used without the data.

        `make_task(config, assets)` takes them back.
        """

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell the training data, in their order, from others.

        They follow from the content, not from where it lies: `examples`, their number, and what a
        family adds, see `data.fingerprint.difference`.
        """
        return {"examples": len(self.source("train"))}
