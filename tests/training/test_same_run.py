"""What may change when a run continues, and what may not, without training anything."""

import copy
import json

import pytest
from etils import epath

from quantizable_flax.config import default_config, to_json
from quantizable_flax.errors import UserError
from quantizable_flax.training import resume

WORKDIR = epath.Path("/runs/x")


@pytest.fixture(scope="module")
def stored():
    """The configuration of a BERT run, as JSON brings it back."""
    return json.loads(to_json(default_config("bert")))


def changed(stored, **keys):
    config = copy.deepcopy(stored)
    for path, value in keys.items():
        *groups, key = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


LOWER, FILE = "data__tokenizer__lowercase", "data__tokenizer__file"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({LOWER: True}, {}),  # as runs stored it before it could be unset
        ({LOWER: True, FILE: "vocab.txt"}, {FILE: "vocab.txt"}),
        ({FILE: "vocab.txt"}, {FILE: "/moved/vocab.txt", LOWER: False}),
        ({FILE: "vocab.txt"}, {}),
    ],
)
def test_a_tokenizer_that_the_checkpoint_holds(stored, before, after):
    for pair in ((before, after), (after, before)):
        old, new = (changed(stored, **keys) for keys in pair)
        resume.check_same(old, new, WORKDIR)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {LOWER: False}),
        ({LOWER: True}, {LOWER: False}),
        ({LOWER: True, FILE: "vocab.txt"}, {LOWER: False, FILE: "vocab.txt"}),
    ],
)
def test_another_case(stored, before, after):
    for pair in ((before, after), (after, before)):
        old, new = (changed(stored, **keys) for keys in pair)
        with pytest.raises(UserError, match=r"data\.tokenizer\.lowercase="):
            resume.check_same(old, new, WORKDIR)
