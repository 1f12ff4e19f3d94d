"""The handwritten digits that scikit-learn carries: real images that need no network."""

from typing import Any

import numpy as np

from quantizable_flax.data.images.pool import Pool, random_positions
from quantizable_flax.errors import UserError

SIZE, CLASSES = 8, tuple("0123456789")
_DARKEST = 16  # the original counts ink in 4x4 blocks


class Digits:
    """The 1,797 digits as elements with uint8 images [8, 8, 1]."""

    def __init__(self, images_NxHxWx1: np.ndarray, labels_N: np.ndarray):
        self._images_NxHxWx1, self._labels_N = images_NxHxWx1, labels_N

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._images_NxHxWx1[index],
            "label": int(self._labels_N[index]),
            "name": f"digit {index}",
        }


def open_digits() -> Pool:
    """Returns the digits of scikit-learn, 0..16 spread over 0..255."""
    try:
        from sklearn.datasets import load_digits  # Slow, and only this source needs it.
    except ImportError as error:
        raise UserError(
            f"expected scikit-learn for data.source='embedded', found that it cannot be imported "
            f"({error}); install it or set data.files"
        ) from None
    data_NxP, labels_N = load_digits(return_X_y=True)
    images_NxP = np.rint(data_NxP * (255 / _DARKEST)).astype(np.uint8)
    digits = Digits(images_NxP.reshape(-1, SIZE, SIZE, 1), labels_N.astype(np.int32))
    return Pool(digits, CLASSES, random_positions(len(digits)))
