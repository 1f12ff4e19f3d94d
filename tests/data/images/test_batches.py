"""Batches of images: exact restarts with augmentation, worker processes, and errors from them."""

import ast
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import quantizable_flax.data.images
from quantizable_flax.data.images.task import ImageTask
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.share import Share
from tests.data.images.conftest import (
    AUGMENT,
    encode,
    expect_error,
    make_config,
    pngs,
    random_image,
    write_folder,
    write_tar,
)

COUNT = 7  # batches of 5 from 24 images: over the border of an epoch


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


@pytest.fixture
def task(tmp_path):
    path = write_tar(tmp_path / "a.tar", pngs(count=12))
    return ImageTask(make_config(10, files=path, validation_fraction=0.0, **AUGMENT))


def batches(task, workers=0, seed=3, **hosts):
    return train_iterator(task, batch_size=5, seed=seed, workers=workers, **hosts)


@pytest.fixture
def expected(task):
    return list(islice(batches(task), COUNT))


def test_batches_have_the_promised_shapes(expected):
    for batch in expected:
        assert batch["images"].shape == (5, 10, 10, 3)
        assert batch["images"].dtype == np.uint8
        assert (batch["labels"].shape, batch["labels"].dtype) == ((5,), np.int32)


def test_every_epoch_augments_anew(task, expected):
    images = np.concatenate([batch["images"] for batch in expected])
    assert len({image.tobytes() for image in images}) == len(images)
    other = list(islice(batches(task, seed=4), COUNT))
    assert not np.array_equal(other[0]["images"], expected[0]["images"])


@pytest.mark.parametrize("workers", [0, 2])
def test_restarts_are_bitwise_exact(task, expected, workers):
    first = batches(task, workers)
    assert_same(list(islice(first, 3)), expected[:3])
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = batches(task, workers)
    second.set_state(state)
    assert_same(list(islice(second, COUNT - 3)), expected[3:])
    second.set_state(state)
    assert_same([next(second)], expected[3:4])
    second.close()


def test_a_state_moves_between_threads_and_processes(task, expected):
    first = batches(task, workers=1)
    next(first)
    second = batches(task)
    second.set_state(first.get_state())
    first.close()
    assert_same(list(islice(second, COUNT - 1)), expected[1:])


def test_hosts_have_their_shares_of_the_same_batches(task):
    whole = train_iterator(task, batch_size=4, seed=3)
    hosts = [
        train_iterator(task, batch_size=4, seed=3, share=Share((index,), 2)) for index in range(2)
    ]
    for _ in range(COUNT):
        shares = [next(host) for host in hosts]
        joined = {name: np.concatenate([s[name] for s in shares]) for name in shares[0]}
        assert_same([joined], [next(whole)])


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_show_an_image_again_with_other_draws(tmp_path, repeats):
    path = write_tar(tmp_path / "a.tar", pngs(count=12))
    settings = {"files": path, "validation_fraction": 0.0}

    def stream(count, **augment):
        task = ImageTask(make_config(12, **settings, **augment))
        iterator = train_iterator(task, batch_size=4, seed=3)
        batches = list(islice(iterator, count))
        iterator.close()
        return np.concatenate([batch["images"] for batch in batches])

    # Without any change, an image is the one that a run without repeats has in its place.
    plain, repeated = stream(9), stream(9 * repeats, repeats=repeats)
    assert len(plain) == 36 > len(pngs(count=12))
    np.testing.assert_array_equal(repeated, plain.repeat(repeats, axis=0))
    augmented = stream(9 * repeats, repeats=repeats, **AUGMENT)
    assert len(np.unique(augmented.reshape(len(augmented), -1), axis=0)) == len(augmented)


def test_repeats_go_on_exactly_and_over_hosts(tmp_path):
    path = write_tar(tmp_path / "a.tar", pngs(count=12))
    settings = {**AUGMENT, "repeats": 3}
    task = ImageTask(make_config(10, files=path, validation_fraction=0.0, **settings))
    whole = list(islice(train_iterator(task, batch_size=4, seed=3), COUNT))
    hosts = [train_iterator(task, batch_size=4, seed=3, share=Share((i,), 2)) for i in range(2)]
    for host in hosts:
        host.set_state({"next_index": 3, "examples": len(task.source("train"))})
    for expected in whole[3:]:
        shares = [next(host) for host in hosts]
        joined = {name: np.concatenate([s[name] for s in shares]) for name in shares[0]}
        assert_same([joined], [expected])


def test_evaluation_is_plain_and_fills_up_the_last_batch(tmp_path):
    path = write_folder(tmp_path / "data", pngs(count=12))
    task = ImageTask(make_config(12, files=path, validation_fraction=0.5, **AUGMENT))
    source = task.source("validation")
    found = list(eval_batches(task, batch_size=len(source) - 1))
    assert len(found) == 2
    images = np.concatenate([batch["images"] for batch in found])
    labels = np.concatenate([batch["labels"] for batch in found])
    weights = np.concatenate([batch["example_weight"] for batch in found])
    assert weights.sum() == len(source)
    for index in range(len(source)):
        raw = source[index]
        assert encode(images[index]) == raw["image"]
        assert labels[index] == raw["label"]
    assert not images[len(source) :].any()
    assert not labels[len(source) :].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_training_with_its_name(tmp_path, workers):
    files = pngs(count=3) | {"dog/2.png": encode(random_image())[:60]}
    path = write_tar(tmp_path / "a.tar", files)
    task = ImageTask(make_config(files=path, validation_fraction=0.0, flip=True))
    iterator = train_iterator(task, batch_size=5, seed=0, workers=workers)
    expect_error(lambda: list(islice(iterator, 3)), "whole image in .*a.tar!dog/2.png, found it")
    iterator.close()


def test_the_package_needs_no_accelerator_library():
    folder = Path(quantizable_flax.data.images.__file__).parent
    imported = {
        name.split(".")[0]
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert "quantizable_flax" in imported
    assert not imported & {"jax", "flax", "tensorflow", "tensorflow_datasets"}
