"""Random numbers that belong to an example, whatever the batch, host or process it is made in."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Draws:
    """A stream of random words for every example of a batch, each from its beginning.

    The stream of an example is Philox keyed by a seed, whose counter starts at the example's
    number. The words are the same in every version of NumPy, as those of bit generators are.
    """

    def __init__(self, key: np.ndarray, numbers_B: Sequence[int] | np.ndarray):
        self._key, self._numbers = key, [int(number) for number in numbers_B]

    def generator(self, row: int) -> np.random.Generator:
        """Returns a generator at the beginning of a row's stream."""
        counter = [0, 0, 0, self._numbers[row]]
        return np.random.Generator(np.random.Philox(counter=counter, key=self._key))

    def words(self, count: int) -> np.ndarray:
        """Returns the first `count` words of every row, uint64 [B, count]."""
        words_BxC = np.empty((len(self._numbers), count), np.uint64)
        bits: Any = np.random.Philox(key=self._key)
        # A state is set in a microsecond, a generator made in ten.
        place = {"counter": (0, 0, 0, 0), "key": tuple(map(int, self._key))}
        state = {
            "bit_generator": "Philox",
            "state": place,
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        for words_C, number in zip(words_BxC, self._numbers, strict=True):
            place["counter"] = (0, 0, 0, number)
            bits.state = state
            words_C[:] = bits.random_raw(count)
        return words_BxC


class Randomness:
    """The streams of all examples under one seed."""

    def __init__(self, seed: int):
        self._key = np.random.Philox(seed).state["state"]["key"]

    def of(self, numbers_B: Sequence[int] | np.ndarray) -> Draws:
        """Returns the streams of the examples with these numbers."""
        return Draws(self._key, numbers_B)
