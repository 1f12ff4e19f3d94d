"""What training batches look like, known without data, tokenizer or image libraries."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.data.kinds import (
    IMAGES,
    LABELLED_TEXT,
    TEXT_ROWS,
    images_have_labels,
    kind_of,
)


class ArraySpec(NamedTuple):
    """Shape and element type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


def batch_specs(config: ConfigDict) -> dict[str, ArraySpec]:
    """Returns the arrays of a global batch as `train_iterator` gives them: [batch_size, ...]."""
    batch, int32 = config.train.batch_size, np.dtype(np.int32)
    kind, labels = kind_of(config), {"labels": ArraySpec((batch,), int32)}
    if kind == IMAGES:
        size, channels = config.model.image_size, config.model.channels
        images = {"images": ArraySpec((batch, size, size, channels), np.dtype(np.uint8))}
        return images | labels if images_have_labels(config) else images
    tokens = ArraySpec((batch, config.data.seq_len), int32)
    if kind in (TEXT_ROWS, LABELLED_TEXT):
        rows = {"input_ids": tokens, "attention_mask": tokens}
        return rows | labels if kind == LABELLED_TEXT else rows
    return {"input_ids": tokens, "labels": tokens}
