"""The order of examples: a permutation for every epoch, looked up a batch at a time."""

import functools
import math

import numpy as np

_ROUNDS = 4
_MIN_BITS = 16


class Shuffle:
    """Endless epochs of `count` examples, each in an order of its own that `seed` decides.

    The permutation is Grain's `index_shuffle`, which takes one index a call: a block cipher on
    numbers of an even count of bits, repeated until it hits one below `count`. An epoch can be
    entered anywhere. Nothing is stored but the order of a small one: of 16 bits and more a number
    below a small count is hit once in thousands of times.
    """

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        bits = max(_MIN_BITS, math.ceil(math.log2(count - 1)) if count > 1 else 0)
        self._encrypt = _Cipher(bits)

    def __call__(self, positions_B: np.ndarray) -> np.ndarray:
        """Returns the example at each position of the endless stream, int64 [B]."""
        epochs_B, places_B = np.divmod(np.asarray(positions_B, np.int64), self._count)
        indices_B = np.zeros_like(places_B)
        for epoch in np.unique(epochs_B):
            of_epoch_B, seed = epochs_B == epoch, (self._seed + int(epoch)) % 2**32
            places = places_B[of_epoch_B]
            if self._count <= 1 << _MIN_BITS:
                indices_B[of_epoch_B] = _small_epoch(self._count, seed)[places]
            else:
                indices_B[of_epoch_B] = self._permuted(places.astype(np.uint64), seed)
        return indices_B

    def _permuted(self, indices_B: np.ndarray, seed: int) -> np.ndarray:
        indices_B = self._encrypt(indices_B, seed)
        while len(outside := np.flatnonzero(indices_B >= np.uint64(self._count))):
            indices_B[outside] = self._encrypt(indices_B[outside], seed)
        return indices_B


class _Cipher:
    """The Simon cipher on numbers of an even count of bits, uint64 [B]."""

    def __init__(self, bits: int):
        half = (bits + 1) // 2
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._turns = tuple(np.uint64(half - places) for places in (1, 8, 2))

    def __call__(self, numbers_B: np.ndarray, seed: int) -> np.ndarray:
        """Two rounds at a time, on the halves of each number."""
        left_B, right_B = (numbers_B >> self._half) & self._mask, numbers_B & self._mask
        keys = _round_keys(seed)
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left_B = (left_B ^ self._mixed(right_B) ^ first) & self._mask
            right_B = (right_B ^ self._mixed(left_B) ^ second) & self._mask
        return (left_B << self._half) | right_B

    def _mixed(self, word_B: np.ndarray) -> np.ndarray:
        """The cipher's function of half a number: of it, rotated by 1, 8 and 2 places."""
        twice_B = word_B | (word_B << self._half)
        by_1, by_8, by_2 = self._turns
        return ((twice_B >> by_1) & (twice_B >> by_8)) ^ (twice_B >> by_2)


@functools.lru_cache(maxsize=4)
def _small_epoch(count: int, seed: int) -> np.ndarray:
    """Returns the order of at most 2^_MIN_BITS examples, int64 [count]."""
    following = _Cipher(_MIN_BITS)(np.arange(1 << _MIN_BITS, dtype=np.uint64), seed).tolist()
    order = []
    for place in range(count):
        index = following[place]
        while index >= count:
            index = following[index]
        order.append(index)
    return np.array(order)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int) -> tuple[np.uint64, ...]:
    """Returns the _ROUNDS words that C++'s `std::seed_seq` makes of one number."""
    words, count = [0x8B8B8B8B] * _ROUNDS, _ROUNDS
    near = (count - (count - 1) // 2) // 2
    far = near + (count - 1) // 2

    def stir(factor: int, word: int) -> int:
        return factor * (word ^ (word >> 27)) % 2**32

    for k in range(count):
        here, by_near, by_far = k % count, (k + near) % count, (k + far) % count
        first = stir(1664525, words[here] ^ words[by_near] ^ words[k - 1])
        added = 1 if k == 0 else here + (seed if k == 1 else 0)
        second = (first + added) % 2**32
        words[by_near] = (words[by_near] + first) % 2**32
        words[by_far] = (words[by_far] + second) % 2**32
        words[here] = second
    for k in range(count):
        by_near, by_far = (k + near) % count, (k + far) % count
        first = stir(1566083941, (words[k] + words[by_near] + words[k - 1]) % 2**32)
        second = (first - k) % 2**32
        words[by_near] ^= first
        words[by_far] ^= second
        words[k] = second
    return tuple(map(np.uint64, words))
