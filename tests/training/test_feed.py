"""Batches placed ahead: how many, where, and which position a checkpoint takes."""

import jax
import numpy as np
import pytest

from quantizable_flax import UserError, default_config
from quantizable_flax.runtime.mesh import batch_sharding, make_mesh
from quantizable_flax.runtime.progress import Clock
from quantizable_flax.training.feed import Feed


class Numbered:
    """Batch n holds n."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        return {"x": np.full((jax.device_count(), 3), self.taken - 1)}

    def get_state(self):
        return {"next_index": self.taken}


def feed_of(data, ahead: int):
    mesh = make_mesh(default_config().mesh)
    return Feed(data, mesh, ahead, Clock()), batch_sharding(mesh)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_position_is_behind_the_batch_handed_out_last(ahead):
    data = Numbered()
    feed, sharding = feed_of(data, ahead)
    assert feed.get_state() == {"next_index": 0}
    for number in range(5):
        batch = next(feed)
        assert (batch["x"] == number).all()
        assert batch["x"].sharding == sharding
        assert feed.get_state() == {"next_index": number + 1}
        assert data.taken == number + 1 + ahead  # not one more waits on the devices


def test_less_than_no_batch_ahead_is_an_error():
    with pytest.raises(UserError, match=r"train\.prefetch must not be negative, found -1"):
        feed_of(Numbered(), -1)
