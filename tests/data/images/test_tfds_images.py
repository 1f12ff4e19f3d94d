"""TFDS datasets, really built on disk."""

import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from quantizable_flax.data.images.task import ImageTask
from tests.data.images.conftest import (
    elements,
    encode,
    expect_error,
    make_config,
    pngs,
    random_image,
    rng,
    write_folder,
    write_tar,
)

NAMES = ["cat", "dog"]
CORRUPT = 3


def build(root, name, label, splits, image=None):
    """Builds a dataset on disk from (image bytes, label) pairs by split."""
    features = {"image": image or tfds.features.Image(shape=(None, None, 3)), "label": label}

    def generators(self, manager):
        return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

    def examples(self, pairs):
        # Encoded by us: TFDS would need TensorFlow for it.
        for number, (content, value) in enumerate(pairs):
            yield number, {"image": io.BytesIO(content), "label": value}

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "__module__": "builders",  # In a package, TFDS looks for files next to it.
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        ),
        "_split_generators": generators,
        "_generate_examples": examples,
    }
    with tfds.core.registered.skip_registration():
        builder = type(name.title().replace("_", ""), (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=root, file_format="array_record").download_and_prepare()


def pairs(files):
    return [(content, NAMES.index(name.split("/")[-2])) for name, content in files.items()]


TRAIN, TEST = pngs(count=15), pngs(count=4, first=50)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a folder with the datasets of these tests."""
    root = tmp_path_factory.mktemp("tfds")
    classes = tfds.features.ClassLabel(names=NAMES)
    build(root, "pets", classes, {"train": pairs(TRAIN), "test": pairs(TEST)})
    build(root, "one_split", classes, {"train": pairs(TRAIN)})
    build(root, "no_train", classes, {"test": pairs(TEST)})
    plain = tfds.features.Scalar(np.int64)
    for name, wrong in (("too_large", 7), ("negative", -1)):
        bad = [
            (content, label if n != 5 else wrong) for n, (content, label) in enumerate(pairs(TRAIN))
        ]
        build(root, name, plain, {"train": bad})
    broken = [
        (content if n != CORRUPT else content[:100], label)
        for n, (content, label) in enumerate(pairs(TEST))
    ]
    build(root, "broken", classes, {"train": pairs(TRAIN), "validation": broken})
    build(root, "floats", tfds.features.Scalar(np.float32), {"train": [(TEST["cat/0.png"], 0.5)]})
    return root


@pytest.fixture
def make_task(root):
    def make(name, **options):
        return ImageTask(make_config(source=f"tfds:{name}", tfds_dir=str(root), **options))

    return make


def decoded(task, split, train=False):
    """Returns the sorted (label, pixels) of a split as the transform gives them."""
    transform = task.transform(train=train)
    source = task.source(split)
    examples = [
        transform.random_map(raw, rng()) if train else transform.map(raw)
        for raw in elements(source)
    ]
    return sorted((int(one["labels"]), one["images"].tobytes()) for one in examples)


def test_splits_and_classes_are_those_of_the_dataset(make_task):
    task = make_task("pets")
    assert task.assets == {"classes": NAMES}
    assert len(task.source("train")) == 30
    assert len(task.source("validation")) == 8
    raw = task.source("train")[4]
    assert isinstance(raw["image"], bytes)
    assert "example 4 of the train split of the TFDS dataset pets" in raw["name"]


def test_tfds_folder_and_tar_give_the_same_pixels(make_task, tmp_path):
    packed = {f"train/{name}": content for name, content in TRAIN.items()}
    packed |= {f"test/{name}": content for name, content in TEST.items()}
    tasks = [
        make_task("pets"),
        ImageTask(make_config(files=write_folder(tmp_path / "data", packed))),
        ImageTask(make_config(files=write_tar(tmp_path / "a.tar", packed))),
    ]
    for split, files in (("train", TRAIN), ("validation", TEST)):
        originals = {
            name: random_image(1000 * (label + 1) + first + number).tobytes()
            for label, kind in enumerate(NAMES)
            for first, count in ((0 if split == "train" else 50, len(files) // 2),)
            for number in range(count)
            for name in (f"{kind}/{number}.png",)
        }
        expected = sorted(
            (NAMES.index(name.split("/")[0]), pixels) for name, pixels in originals.items()
        )
        for task in tasks:
            assert decoded(task, split) == expected
            assert decoded(task, split, train=True) == expected
            assert task.assets == {"classes": NAMES}


def test_without_a_validation_split_a_share_of_train_is_one(make_task):
    task = make_task("one_split", validation_fraction=0.3)
    train, validation = decoded(task, "train"), decoded(task, "validation")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == decoded(make_task("pets"), "train")


def test_sources_pickle(make_task):
    source = make_task("pets").source("train")
    again = pickle.loads(pickle.dumps(source))
    assert elements(again) == elements(source)


@pytest.mark.parametrize(("name", "wrong"), [("too_large", 7), ("negative", -1)])
def test_a_label_out_of_range_names_its_example(make_task, name, wrong):
    task = make_task(name, validation_fraction=0.0)
    expect_error(
        lambda: elements(task.source("train")),
        rf"a label in 0\.\.1 in example \d+ of the train split of .* {name}, found {wrong};",
    )


def test_a_label_that_is_no_integer_is_refused(make_task):
    task = make_task("floats", validation_fraction=0.0)
    expect_error(
        lambda: task.source("train")[0], "an integer under the key 'label'.*data.label_key"
    )


def test_a_corrupt_image_names_its_example(make_task):
    task = make_task("broken")
    source, transform = task.source("validation"), task.transform(train=False)
    error = expect_error(
        lambda: [transform.map(raw) for raw in elements(source)],
        r"example \d of the validation split of the TFDS dataset broken, found it truncated.*; "
        "build the dataset again$",
    )
    index = int(str(error).split("example ")[1].split()[0])
    assert source[index]["image"] == list(TEST.values())[CORRUPT][:100]


def test_keys_and_splits_that_are_not_there_are_named(make_task):
    for key, value in (("image_key", "picture"), ("label_key", "labels")):
        task = make_task("pets", **{key: value})
        expect_error(lambda t=task: t.source("train"), f"'{value}' in the TFDS dataset pets")
    task = make_task("no_train")
    expect_error(lambda: task.source("train"), "the split 'train' in .* no_train, found test")
    expect_error(lambda: make_task("absent").source("train"), "absent")


def test_the_number_of_classes_must_fit(make_task):
    task = make_task("pets", num_classes=10)
    expect_error(lambda: task.source("train"), "found 2 classes, model.num_classes is 10")


def test_data_of_a_folder_can_validate_a_tfds_training(make_task, tmp_path):
    files = write_folder(tmp_path / "data", pngs(("dog",), 3, first=70))
    task = make_task("pets", validation_files=files)
    assert [raw["label"] for raw in elements(task.source("validation"))] == [1, 1, 1]
    assert encode(random_image(1071)) in {
        raw["image"] for raw in elements(task.source("validation"))
    }
