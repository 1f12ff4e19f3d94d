"""Which examples are for validation: a split of that name, or a share where there is none."""

import hashlib

from ml_collections import ConfigDict

from quantizable_flax.errors import UserError

# In the order in which one of them is taken for validation.
VALIDATION_SPLITS = ("validation", "val", "valid", "test")
_HASHED_CHARS = 1 << 20


def validation_fraction(data_cfg: ConfigDict) -> float:
    """Returns data.validation_fraction; raises UserError outside [0, 1)."""
    fraction = data_cfg.validation_fraction
    if not 0 <= fraction < 1:
        raise UserError(
            f"expected data.validation_fraction in [0, 1), found {fraction}; the default is 0.05"
        )
    return float(fraction)


def position(text: str) -> float:
    """Returns the place of a text or name in [0, 1), uniform, that it alone decides."""
    digest = hashlib.blake2b(digest_size=6)
    for start in range(0, len(text), _HASHED_CHARS):  # A long text is not held a second time.
        part = text[start : start + _HASHED_CHARS]
        digest.update(part.encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest(), "big") / 2**48
