"""What training does about an image that cannot be decoded: it ends, or takes another instead."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from quantizable_flax.data.images.decode import UnreadableImageError
from quantizable_flax.data.task import Example, Source
from quantizable_flax.errors import UserError

CHOICES = ("error", "skip")
MOST_IN_A_ROW = 100  # more are no accident
# To remove an image would change the order of a run that has begun.
_REPLACE = "replace it by any other image"
_SKIP = "or set data.on_corrupt='skip' to train without it"
_KEY = "stand_in"
_log = logging.getLogger(__name__)
_named: set[str] = set()


class TrainingImages:
    """The elements of a source, each with what to do if its image cannot be decoded.

    Args:
      source: labelled images.
      skip: whether the next image of the source then takes its place.
    """

    def __init__(self, source: Source, *, skip: bool):
        self._source, self._skip = source, skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        following = (index + 1) % len(self)
        return {**self._source[index], _KEY: _StandIn(self, following, self._skip)}


@dataclasses.dataclass(frozen=True)
class _StandIn:
    # Hosts compare elements as text.
    source: TrainingImages = dataclasses.field(repr=False, compare=False)
    index: int
    allowed: bool


def readable(element: dict[str, Any], make: Callable[[dict[str, Any]], Example]) -> Example:
    """Returns `make(element)`, or of the first element after it whose image can be decoded.

    Which one that is depends on the source alone, so that a run continues exactly, and the other
    examples stay what they are.

    Raises:
      UnreadableImageError: an image for evaluation, or data.on_corrupt is "error".
      UserError: a source full of them.
    """
    for _ in range(MOST_IN_A_ROW):
        try:
            return make(element)
        except UnreadableImageError as error:
            stand_in = element.get(_KEY)
            if stand_in is None:
                raise UnreadableImageError(error.found, element.get("mend", error.advice)) from None
            if not stand_in.allowed:
                advice = f"{element.get('mend', _REPLACE)}, {_SKIP}"
                raise UnreadableImageError(error.found, advice) from None
            _name_once(element["name"], error.found)
            element = stand_in.source[stand_in.index]
    raise UserError(
        f"expected images that can be decoded, found {MOST_IN_A_ROW} in a row that cannot, the "
        f"last before {element['name']}; fetch the data again"
    )


def _name_once(name: str, found: str) -> None:
    if name not in _named:
        _named.add(name)
        _log.warning("%s: another image takes its place (%d so far)", found, len(_named))
