"""Batches taken, joined and compared."""

import itertools

import numpy as np

from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.pipeline import train_iterator


def take(batches, count):
    """Returns the next `count` batches."""
    return list(itertools.islice(batches, count))


def joined(batches):
    """Returns the examples of all batches as one dict of arrays."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(left, right):
    """Two batches are equal in every bit."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


def originals(batch):
    """Returns the tokens before masking."""
    return np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def assert_continues(task, state, expected, again):
    """Moved data are the same, and batches of 4 go on from a state with these, in every bit."""
    assert difference(task.fingerprint, again.fingerprint, task.unit) is None
    continued = train_iterator(again, batch_size=4, seed=3, workers=1)
    continued.set_state(state)
    for left, right in zip(expected, take(continued, len(expected)), strict=True):
        assert_same(left, right)
    continued.close()
