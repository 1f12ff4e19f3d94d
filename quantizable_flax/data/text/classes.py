"""The classes of labelled text: what they are called, and the number of each."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.data.text.document import Document
from quantizable_flax.data.text.documents import declared_classes, iter_labelled
from quantizable_flax.errors import UserError, nearest


class Classes:
    """From what documents say to the numbers of their classes.

    Args:
      names: in the order of the numbers, where documents name their class; None where they number
        it.
      count: model.num_classes.

    Attributes:
      count: how many classes there are.
    """

    def __init__(self, names: Sequence[str] | None, count: int):
        self.count, self._names = count, None if names is None else list(names)
        self._numbers = {name: number for number, name in enumerate(names or ())}
        folded = [name.casefold() for name in names or ()]
        # Published models and datasets write the same names in other cases.
        if len(set(folded)) == len(folded):
            self._numbers = {**dict(zip(folded, range(count), strict=False)), **self._numbers}

    @property
    def description(self) -> dict[str, Any]:
        """What decides the numbers, for cache keys."""
        return {"classes": self._names, "num_classes": self.count}

    def number(self, document: Document) -> int:
        """Returns the number of a document's class.

        Raises:
          UserError: a number out of range, an unknown name, or a name among numbers.
        """
        label, place = document.label, document.place
        if isinstance(label, int):
            return self._checked(label, place)
        if self._names is None:
            raise UserError(
                f"expected the number of a class as in the first document, found the name "
                f"{label!r} in {place}; name all classes or number all"
            )
        name = str(label)
        number = self._numbers.get(name, self._numbers.get(name.casefold()))
        if number is None:
            raise UserError(
                f"expected one of the {len(self._names)} classes, found {name!r} in {place}"
                f"{nearest(name, self._names)}; correct it, or number the classes"
            )
        return number

    def _checked(self, label: int, place: str) -> int:
        if self._names is not None:
            raise UserError(
                f"expected the name of a class as in the first document, found the number {label} "
                f"in {place}; name all classes or number all"
            )
        if not 0 <= label < self.count:
            raise UserError(
                f"expected the number of a class in 0..{self.count - 1} in {place}, found {label}; "
                "correct it, model.num_classes or data.label_key"
            )
        return label


def are_named(data_cfg: ConfigDict, split: str) -> bool:
    """Whether the documents of a split name their classes, as the first of them tells."""
    first = next(iter_labelled(data_cfg, split), None)
    return first is not None and isinstance(first.label, str)


def training_names(data_cfg: ConfigDict) -> list[str]:
    """Returns the names that the training data declare, else those that they have, sorted.

    The latter takes a pass over the text.

    Raises:
      UserError: documents that number their class.
    """
    declared = declared_classes(data_cfg, "train")
    if declared is not None:
        return declared
    found: set[str] = set()
    for document in iter_labelled(data_cfg, "train"):
        if not isinstance(document.label, str):
            raise UserError(
                f"expected the name of a class in {document.place}, as other documents have one, "
                f"found the number {document.label}; name all classes or number all"
            )
        found.add(document.label)
    return sorted(found)
