"""Batches taken, joined and compared."""

import itertools

import numpy as np


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
