"""Packed blocks as a source: of one corpus, or of several by weight."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


class Blocks:
    """Rows of tokens_NxT; pickles as the name of the file where it is mapped from one."""

    def __init__(self, tokens_NxT: np.ndarray):
        self._tokens_NxT = tokens_NxT

    def __len__(self) -> int:
        return len(self._tokens_NxT)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self._tokens_NxT[index])

    def take(self, indices_B: np.ndarray) -> np.ndarray:
        """Returns some rows, tokens_BxT."""
        return np.asarray(self._tokens_NxT[indices_B])

    def __reduce__(self) -> tuple[Any, ...]:
        tokens_NxT = self._tokens_NxT
        if isinstance(tokens_NxT, np.memmap):  # pickling one would copy what it maps
            place = (tokens_NxT.filename, tokens_NxT.dtype, tokens_NxT.offset, tokens_NxT.shape)
            return _mapped, place
        return Blocks, (tokens_NxT,)


def _mapped(filename: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> Blocks:
    return Blocks(np.memmap(filename, dtype, mode="r", offset=offset, shape=shape))


class Mixture:
    """Blocks of several corpora in shares that are their weights.

    An epoch is as short as it can be with every block of every corpus in it at least once: the
    corpus that is largest for its weight comes once, the others again from their start as often
    as needed. The blocks of a corpus lie together; the shuffle of an epoch mixes them.
    """

    def __init__(self, corpora: Sequence[Blocks], weights: Sequence[Fraction]):
        per_weight = max(
            len(blocks) / weight for blocks, weight in zip(corpora, weights, strict=True)
        )
        counts = [math.ceil(per_weight * weight) for weight in weights]
        self._corpora = list(corpora)
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.take(np.array([index]))[0]

    def take(self, indices_B: np.ndarray) -> np.ndarray:
        """Returns some blocks, tokens_BxT."""
        places_B = np.searchsorted(self._ends, indices_B, side="right")
        parts = []
        for place in np.unique(places_B):
            blocks = self._corpora[place]
            first = self._ends[place - 1] if place else 0
            parts.append(blocks.take((indices_B[places_B == place] - first) % len(blocks)))
        # Rows by corpus, back into their order.
        back_B = np.argsort(np.argsort(places_B, kind="stable"), kind="stable")
        return np.concatenate(parts)[back_B]
