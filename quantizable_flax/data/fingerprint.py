"""Whether training data are those that a run began with, wherever they lie now."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantizable_flax.data.task import Source

SAMPLED_IMAGES = 32


def sample(source: Source) -> list[int]:
    """Returns the checksums of some images spread over a source, with their labels."""
    count = len(source)
    places = np.linspace(0, count - 1, min(count, SAMPLED_IMAGES)).astype(int)
    return [_checksum(source[int(place)]) for place in places]


def _checksum(element: Mapping[str, Any]) -> int:
    image = element["image"]  # encoded bytes or an array
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return zlib.crc32(content, int(element["label"]))


def difference(saved: Mapping[str, Any], found: Mapping[str, Any], unit: str) -> str | None:
    """Returns what tells the data of a run from those found, for a message; None if they agree.

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
            f"{pythons[1]}"
        )
    if saved["examples"] != found["examples"]:
        return f"{saved['examples']} {unit} where the data now have {found['examples']}"
    return f"{saved['examples']} {unit} where the data now have others, or another order of them"


def _same_content(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    if saved.get("content") != found.get("content"):
        return False
    # A few images may have been replaced, as is advised for corrupt ones.
    pairs = list(zip(saved.get("sample", ()), found.get("sample", ()), strict=False))
    return 2 * sum(before == after for before, after in pairs) >= len(pairs)
