"""What a model family asks of the data package: examples, transforms, and what to remember."""

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from quantizable_flax.data.draws import Draws

if TYPE_CHECKING:
    import grain

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]
SPLITS = ("train", "validation")


class BatchTransform(abc.ABC):
    """Makes all examples of a batch at once, of what a BatchSource took.

    Of an example, nothing may depend on the others of its batch.
    """

    @abc.abstractmethod
    def batch(self, elements: Any, draws: Draws) -> Batch:
        """Returns arrays [B, ...]; the randomness of row b is row b of `draws`."""


Transform: TypeAlias = (
    "grain.transforms.Map | grain.transforms.RandomMap | BatchTransform | Callable[[Any], Example]"
)


class Source(Protocol):
    """Random access to the raw examples of a split."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Returns the example at 0 <= index < len(self)."""
        ...


class BatchSource(Source, Protocol):
    """A source for transforms of whole batches."""

    def take(self, indices_B: np.ndarray) -> Any:
        """Returns the examples at some indices, put together."""
        ...


class Task(abc.ABC):
    """The data side of a model family.

    Attributes:
      unit: what an example is called in messages, e.g. "sequences" or "images".
      filler: by key of an example, the value that fills up a short evaluation batch (default 0).
      repeats: how often in a row training takes a raw example, each time with other draws.
    """

    unit: str = "examples"
    filler: Mapping[str, int] = {}
    repeats: int = 1

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
