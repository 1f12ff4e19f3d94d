"""Images without classes: of a model that has none, or where the configuration asks for none."""

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from quantizable_flax.config import default_config
from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.images.files import FileDataset
from quantizable_flax.data.images.task import ImageTask
from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.data.tasks import make_task
from tests.data.batches import joined, take
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
from tests.data.images.test_tfds_images import build

FLAT = {f"{number}.png": encode(random_image(number)) for number in range(20)}
PIXELS = sorted(random_image(number).tobytes() for number in range(20))
# Neither of them asks for classes.
WITHOUT = [{"num_classes": 0}, {"num_classes": 2, "label_key": None}]


def pixels(task, splits=("train", "validation")):
    """Returns the sorted images of splits, as evaluation has them."""
    found = []
    for split in splits:
        examples = joined(list(eval_batches(task, split=split, batch_size=3)))
        assert examples.keys() == {"images", "example_weight"}
        real = examples["example_weight"] == 1
        found += [image.tobytes() for image in examples["images"][real]]
    return sorted(found)


@pytest.mark.parametrize("options", WITHOUT)
@pytest.mark.parametrize("prefix", ["", "below/one/another/"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_flat_folder_or_tar_is_enough(tmp_path, options, prefix, kind):
    files = {prefix + name: content for name, content in FLAT.items()}
    place = tmp_path / f"data.{kind}"
    path = (write_folder if kind == "folder" else write_tar)(place, files)
    task = ImageTask(make_config(files=path, validation_fraction=0.3, **options))
    assert pixels(task) == PIXELS
    assert (task.assets, task.classes) == ({}, ())


@pytest.mark.parametrize("options", WITHOUT)
def test_batches_of_training_are_as_they_are_foretold(tmp_path, options):
    path = write_folder(tmp_path / "data", FLAT)
    config = make_config(files=path, **AUGMENT, **options)
    config.train = default_config("vit").train
    config.train.batch_size = 8
    (batch,) = take(train_iterator(make_task(config, {}), batch_size=8, seed=0), 1)
    specs = batch_specs(config)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == specs
    assert batch.keys() == {"images"}


def test_folders_of_classes_make_no_difference_to_images_and_splits(tmp_path):
    path = write_folder(tmp_path / "data", pngs(count=20))
    alone = ImageTask(make_config(files=path, num_classes=0))
    labelled = ImageTask(make_config(files=path))
    for split in ("train", "validation"):
        names = [
            [task.source(split)[index]["name"] for index in range(len(task.source(split)))]
            for task in (alone, labelled)
        ]
        assert names[0] == names[1]
    assert difference(labelled.fingerprint, labelled.fingerprint, "images") is None


@pytest.mark.parametrize("prefix", ["", "dataset/"])
def test_the_splits_of_a_folder_are_taken(tmp_path, prefix):
    files = {
        f"{prefix}{'val' if number < 5 else 'train'}/{number}.png": FLAT[f"{number}.png"]
        for number in range(20)
    }
    task = ImageTask(make_config(files=write_folder(tmp_path / "data", files), num_classes=0))
    assert len(task.source("validation")) == 5
    expected = sorted(random_image(number).tobytes() for number in range(5))
    assert pixels(task, ["validation"]) == expected
    assert pixels(task) == PIXELS


def test_validation_files_need_no_classes_either(tmp_path):
    train = write_folder(tmp_path / "train", FLAT)
    other = write_folder(tmp_path / "other", {"a.png": encode(random_image(99))})
    task = ImageTask(make_config(files=train, validation_files=other, num_classes=0))
    assert len(task.source("train")) == 20
    assert pixels(task, ["validation"]) == [random_image(99).tobytes()]


def test_datasets_are_read_without_their_labels(tmp_path):
    names = tfds.features.ClassLabel(names=["cat", "dog"])
    pairs = [(content, 0) for content in FLAT.values()]
    build(tmp_path / "tfds", "pets", names, {"train": pairs})
    columns = {"picture": [{"bytes": content, "path": None} for content in FLAT.values()]}
    features = datasets.Features({"picture": datasets.Image()})  # and no label at all
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "hub")
    for options in WITHOUT:
        for place in (
            {"source": "tfds:pets", "tfds_dir": str(tmp_path / "tfds")},
            {"source": f"hf:{tmp_path / 'hub'}"},
        ):
            task = ImageTask(make_config(validation_fraction=0.3, **place, **options))
            assert pixels(task) == PIXELS
            assert task.assets == {}


def test_the_embedded_digits_without_their_labels():
    task = ImageTask(make_config(8, channels=1, num_classes=0))
    (batch,) = take(train_iterator(task, batch_size=4, seed=0), 1)
    assert batch.keys() == {"images"}
    assert batch["images"].shape == (4, 8, 8, 1)


def test_a_model_with_classes_still_asks_for_their_folders(tmp_path):
    path = write_folder(tmp_path / "data", FLAT)
    task = ImageTask(make_config(files=path))
    expect_error(lambda: task.source("train"), "directly in it; make a folder for each class")


def test_folders_without_images(tmp_path):
    for name, files, pattern in (
        ("empty", {}, "found none; add some or name another folder"),
        ("notes", {"a/notes.txt": b"no image"}, "found only files such as notes.txt; add some"),
        (
            "mixed",
            {"train/0.png": FLAT["0.png"], "1.png": FLAT["1.png"]},
            "one layout in all files, found images in train or .* and others beside them in",
        ),
    ):
        (tmp_path / name).mkdir()
        path = write_folder(tmp_path / name, files)
        expect_error(lambda p=path: FileDataset(p, "data.files", labelled=False), pattern)


def test_all_labels_are_the_same_where_nobody_asks(tmp_path):
    pool = FileDataset(write_folder(tmp_path / "a", FLAT), "data.files", labelled=False).train()
    assert pool.classes == ("",)
    assert np.unique([pool.source[index]["label"] for index in range(20)]).tolist() == [0]
