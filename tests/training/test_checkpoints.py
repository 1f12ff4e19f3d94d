"""Which checkpoints stay, and what happens when one cannot be written."""

import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from quantizable_flax.checkpoint import store
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.errors import UserError
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("keep_every", "expected"),
    [(0, [70, 60]), pytest.param(20, [70, 60, 40, 20], marks=pytest.mark.slow), (30, [70, 60, 30])],
)
def test_last_and_every_so_many_are_kept(tmp_path, keep_every, expected):
    config = tiny_config(
        tmp_path,
        train__steps=70,
        checkpoint__every=10,
        checkpoint__keep=2,
        checkpoint__keep_every=keep_every,
    )
    train(config, str(tmp_path / "run"))
    assert store.saved_steps(epath.Path(tmp_path / "run")) == expected


@pytest.mark.parametrize("keep_every", [-10, 15])
def test_only_saved_steps_can_be_kept(tmp_path, keep_every):
    config = tiny_config(tmp_path, checkpoint__every=10, checkpoint__keep_every=keep_every)
    with pytest.raises(UserError, match=f"a multiple of checkpoint.every=10, found {keep_every}"):
        train(config, str(tmp_path / "run"))


@pytest.fixture
def no_room():
    """Returns what makes every file end after so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("steps", [40, 1_000_000])
def test_failed_save_stops_the_run_and_is_no_checkpoint(tmp_path, no_room, steps):
    # The last save of a run and one in its midst: neither is reported as saved.
    # With the same schedule, so that no half program ends in the cache that all tests share.
    changes = {
        "train__log_every": 1_000_000,
        "checkpoint__every": 20,
        "optimizer__decay_steps": 80,
    }
    train(tiny_config(tmp_path, train__steps=20, **changes), str(tmp_path / "run"))
    no_room(10_000)  # enough for all but the arrays
    with pytest.raises(UserError, match=r"step 40 could not be written .* step 20 is kept"):
        train(tiny_config(tmp_path, train__steps=steps, **changes), str(tmp_path / "run"))
    assert store.saved_steps(epath.Path(tmp_path / "run")) == [20]
    assert load_run(str(tmp_path / "run")).info["step"] == 20


def test_failed_save_surfaces_without_another_one(tmp_path, no_room):
    values = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)))}
    state = TrainState(jnp.int32(5), values, values)
    notes = store.Notes({}, {}, {}, {"step": 5})
    checkpoints = store.Checkpoints(epath.Path(tmp_path), keep=1)
    checkpoints.check()  # nothing has been saved, nothing has failed
    no_room(2000)
    checkpoints.save(state, notes)

    def next_steps():
        for _ in range(6000):
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(UserError, match=r"step 5 could not be written .* there is none before it"):
        next_steps()
    checkpoints.close()
