"""What may change when a run continues, and what may not, without training anything."""

import copy
import json

import pytest
from etils import epath

from quantizable_flax.checkpoint import resume, same_data
from quantizable_flax.config import default_config, to_json
from quantizable_flax.data.task import Task
from quantizable_flax.errors import UserError

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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data/a.txt", "./data/a.txt"),
        ("data/a.txt,b.txt", "data/../data/a.txt , b.txt"),
        ("folder", "folder/"),
        ("data/*.txt", "data//*.txt"),
    ],
)
def test_another_spelling_of_the_same_paths(stored, before, after):
    old, new = (changed(stored, data__files=value) for value in (before, after))
    resume.check_same(old, new, WORKDIR)


@pytest.mark.parametrize(
    ("before", "after"),
    [("a.txt", "b.txt"), ("a.txt,b.txt", "b.txt,a.txt"), ("a.txt", None), ("*.txt", "a.txt")],
)
def test_other_paths_need_a_checkpoint_that_tells_the_content(stored, before, after):
    old, new = (changed(stored, data__files=value) for value in (before, after))
    with pytest.raises(UserError, match=r"data\.files=.*of a version that does not tell"):
        resume.check_same(old, new, WORKDIR)
    resume.check_same(old, new, WORKDIR, data_known=True)
    new["seed"] = 7
    with pytest.raises(UserError, match="with seed=0, not 7: continue"):
        resume.check_same(old, new, WORKDIR, data_known=True)


class _Data(Task):
    source = transform = assets = fingerprint = None
    unit = "sequences"

    def __init__(self, **fingerprint):
        self.fingerprint = fingerprint


BLOCKS = {"examples": 7, "content": [["1", 7, 99]]}


@pytest.mark.parametrize(
    ("began", "now"),
    [
        (BLOCKS, BLOCKS),
        # Another Python with the same texts.
        ({**BLOCKS, "python": "3.11.1"}, {**BLOCKS, "python": "3.12.3"}),
        # An image that could not be read was replaced.
        ({**BLOCKS, "sample": [1, None, 3]}, {**BLOCKS, "sample": [1, 5, 3]}),
    ],
)
def test_the_same_data(began, now):
    same_data.check({same_data.KEY: began}, _Data(**now), WORKDIR)
    same_data.check({}, _Data(**now), WORKDIR)


@pytest.mark.parametrize(
    ("began", "now", "pattern"),
    [
        (BLOCKS, {**BLOCKS, "examples": 6}, "on 7 sequences where the data now have 6: bring"),
        (BLOCKS, {**BLOCKS, "content": [["1", 7, 98]]}, "7 sequences where .* have others, or"),
        (
            {**BLOCKS, "python": "3.11.1"},
            {"examples": 6, "content": [["1", 6, 9]], "python": "3.12.3"},
            r"Python 3\.11\.1, .* this Python 3\.12\.3: continue it under Python 3\.11\.1, or",
        ),
        (
            {**BLOCKS, "python": "3.11.1"},
            {**BLOCKS, "examples": 6, "python": "3.11.1"},
            "on 7 sequences where the data now have 6: bring",
        ),
        ({**BLOCKS, "sample": [1, 2, 3]}, {**BLOCKS, "sample": [1, 5, 3]}, "have others, or"),
    ],
)
def test_other_data(began, now, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        same_data.check({same_data.KEY: began}, _Data(**now), WORKDIR)
    assert "\n" not in str(caught.value)
