"""The examples of a split by their numbers, a batch at a time."""

from typing import Any, cast

import grain
import numpy as np

from quantizable_flax.data.draws import Draws, Randomness
from quantizable_flax.data.task import (
    Batch,
    BatchSource,
    BatchTransform,
    Example,
    Source,
    Transform,
)


class Examples:
    """What a transform makes of a source.

    Args:
      source: the raw examples.
      transform: of one of them, or of all of a batch.
      seed: of a random transform.
    """

    def __init__(self, source: Source, transform: Transform, seed: int):
        self._source, self._transform = source, transform
        self._randomness = Randomness(seed)

    def batch(self, indices_B: np.ndarray, numbers_B: np.ndarray) -> Batch:
        """Returns the examples at `indices_B` of the source, with the draws of `numbers_B`."""
        draws, transform = self._randomness.of(numbers_B), self._transform
        if isinstance(transform, BatchTransform):
            return transform.batch(cast(BatchSource, self._source).take(indices_B), draws)
        examples = [
            _transformed(transform, self._source[index], draws, row)
            for row, index in enumerate(indices_B.tolist())
        ]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _transformed(transform: Any, raw: Any, draws: Draws, row: int) -> Example:
    if isinstance(transform, grain.transforms.RandomMap):
        return transform.random_map(raw, draws.generator(row))
    if isinstance(transform, grain.transforms.Map):
        return transform.map(raw)
    return transform(raw)
