"""What training batches look like, known without data, tokenizer or image libraries."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.data.kinds import IMAGES, kind_of


class ArraySpec(NamedTuple):
    """Shape and element type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


def batch_specs(config: ConfigDict) -> dict[str, ArraySpec]:
    """Returns the arrays of a global batch as `train_iterator` gives them: [batch_size, ...]."""
    batch, int32 = config.train.batch_size, np.dtype(np.int32)
    if kind_of(config) == IMAGES:
        size, channels = config.model.image_size, config.model.channels
        return {
            "images": ArraySpec((batch, size, size, channels), np.dtype(np.uint8)),
            "labels": ArraySpec((batch,), int32),
        }
    tokens = ArraySpec((batch, config.data.seq_len), int32)
    return {"input_ids": tokens, "labels": tokens}
