"""Whether training data are those that a run began with, wherever they lie now."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quantizable_flax.data.task import Source

SAMPLED_IMAGES = 64


def sample(source: Source, readable: Callable[[Any], bool]) -> list[int | None]:
    """Returns the checksums of some images spread over a source, with their labels.

    None stands for an image that is not readable: it may be replaced by any other, as is advised.
    """
    count = len(source)
    places = np.linspace(0, count - 1, min(count, SAMPLED_IMAGES)).astype(int)
    elements = (source[int(place)] for place in places)
    return [_checksum(element) if readable(element) else None for element in elements]


def _checksum(element: Mapping[str, Any]) -> int:
    image = element["image"]  # encoded bytes or an array
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return zlib.crc32(content, int(element["label"]))


RESTORE = "bring those back, under the same names and in the same order"


def difference(
    saved: Mapping[str, Any], found: Mapping[str, Any], unit: str
) -> tuple[str, str] | None:
    """Returns what tells the data of a run from those found, and what to do; None if they agree.

    Args:
      saved: `Task.fingerprint` when the run began, also from JSON.
      found: that of now.
      unit: what an example is called.
    """
    if saved["examples"] == found["examples"] and _same_content(saved, found):
        return None
    pythons = saved.get("python"), found.get("python")
    if None not in pythons and pythons[0] != pythons[1]:
        return (
            f"the embedded corpus of Python {pythons[0]}, which is another in this Python "
            f"{pythons[1]}",
            f"continue it under Python {pythons[0]}",
        )
    others = found["examples"]
    if saved["examples"] == others:
        others = "others, or another order of them"
    return f"{saved['examples']} {unit} where the data now have {others}", RESTORE


def _same_content(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    if saved.get("content") != found.get("content"):
        return False
    pairs = zip(saved.get("sample", ()), found.get("sample", ()), strict=False)
    # One that cannot be read is named when training comes to it.
    return all(None in pair or pair[0] == pair[1] for pair in pairs)
