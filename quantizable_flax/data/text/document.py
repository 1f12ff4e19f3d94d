"""A document with its class, and the keys of the records that it comes from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.errors import UserError


class Fields(NamedTuple):
    """Keys of JSON lines, features or columns.

    Attributes:
      text: of the text.
      label: of the class, None where text is read alone.
    """

    text: str
    label: str | None = None

    @property
    def description(self) -> dict[str, str]:
        """The keys, for cache keys; what was built of text alone keeps its own."""
        label = {} if self.label is None else {"label_key": self.label}
        return {"text_key": self.text, **label}


class Document(NamedTuple):
    """A text.

    Attributes:
      text: not blank.
      label: the number or the name of its class, None where text is read alone.
      place: what messages about the label call it.
    """

    text: str
    label: int | str | None = None
    place: str = ""


def labelled(
    text: str, value: Any, fields: Fields, place: str, names: Sequence[str] | None = None
) -> Document:
    """Returns a document with its class.

    Args:
      text: the document.
      value: what its record has under `fields.label`; None where it has nothing.
      fields: the keys.
      place: of the record.
      names: of the classes, where the values count them.

    Raises:
      UserError: neither a name nor a number, or one of no name.
    """
    if isinstance(value, str):
        return Document(text, value, place)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        found = "none" if value is None else type(value).__name__
    elif names is not None and not 0 <= value < len(names):
        found = f"{value}, which is none of its {len(names)} classes"
    else:
        return Document(text, int(value) if names is None else names[int(value)], place)
    raise UserError(
        f"expected the name or the number of a class under {fields.label!r} in {place}, found "
        f"{found}; correct it, or set data.label_key to the key that holds the class"
    )


def spoken(names: Sequence[str] | None) -> Sequence[str] | None:
    """Returns the names of classes, None where they are but numbers in other words."""
    return None if names is None or list(names) == [*map(str, range(len(names)))] else names
