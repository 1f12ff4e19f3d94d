"""The order of an epoch is Grain's permutation, whatever is asked at once."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from quantizable_flax.data.shuffle import Shuffle


@pytest.mark.parametrize(
    "count", [1, 2, 3, 257, 65_536, 65_537, 70_000, 2**20, 2**31 + 5, 2**32 - 1]
)
@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_every_epoch_is_grains_permutation(count, seed):
    some = np.random.Generator(np.random.Philox(seed)).integers(0, count, 20)
    places = np.unique([0, count - 1, *some])
    positions = np.concatenate([places + epoch * count for epoch in (0, 1, 3)])
    expected = [
        index_shuffle(int(place), max_index=count - 1, seed=(seed + epoch) % 2**32, rounds=4)
        for epoch in (0, 1, 3)
        for place in places
    ]
    assert Shuffle(count, seed)(positions).tolist() == expected


def test_an_epoch_has_each_example_once():
    epochs = Shuffle(1000, 7)(np.arange(3000)).reshape(3, 1000)
    assert (np.sort(epochs) == np.arange(1000)).all()
    assert len(np.unique(epochs, axis=0)) == 3
