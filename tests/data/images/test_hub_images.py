"""Images of datasets as `datasets` itself writes them, without a network."""

import io
import itertools
import pickle
import shutil

import datasets
import pytest

from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.images.task import ImageTask
from quantizable_flax.data.pipeline import train_iterator
from tests.data.batches import assert_continues, take
from tests.data.images.conftest import elements, expect_error, make_config, pngs, write_folder

NAMES = ["cat", "dog"]
TRAIN, TEST = pngs(count=15), pngs(count=4, first=50)
CLASSES = datasets.ClassLabel(names=NAMES)


def rows(files, keys=("image", "label"), label=CLASSES, wrong=None, more=None):
    """Returns a dataset of files `class/number.png`; `wrong` replaces labels by their place."""
    labels = [NAMES.index(name.split("/")[-2]) for name in files]
    for place, value in (wrong or {}).items():
        labels[place] = value
    columns = {keys[0]: [{"bytes": content, "path": None} for content in files.values()]}
    columns[keys[1]] = labels
    features = {keys[0]: datasets.Image(), keys[1]: label}
    for key, (feature, values) in (more or {}).items():
        columns[key], features[key] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def make_task(tmp_path):
    """Returns a function from splits, and keys of the configuration, to the task."""
    numbers = itertools.count()

    def make(splits, **options):
        folder = tmp_path / f"data{next(numbers)}"  # one that is mapped must not be overwritten
        datasets.DatasetDict(splits).save_to_disk(folder)
        return ImageTask(make_config(source=f"hf:{folder}", **options))

    return make


def decoded(task, split):
    """Returns the sorted (label, pixels) of a split as evaluation sees them."""
    transform = task.transform(train=False)
    examples = [transform.map(raw) for raw in elements(task.source(split))]
    return sorted((int(one["labels"]), one["images"].tobytes()) for one in examples)


def test_the_hub_and_a_folder_give_the_same_pixels_and_classes(make_task, tmp_path):
    packed = {f"train/{name}": content for name, content in TRAIN.items()}
    packed |= {f"test/{name}": content for name, content in TEST.items()}
    folder = write_folder(tmp_path / "images", packed)
    repository = tmp_path / "repository"
    repository.mkdir()
    for split, files in (("train", TRAIN), ("test", TEST)):
        rows(files).to_parquet(repository / f"{split}-00000-of-00001.parquet")
    tasks = [
        ImageTask(make_config(files=folder)),
        ImageTask(make_config(source=f"hf:{folder}")),
        ImageTask(make_config(source=f"hf:{repository}")),
        make_task({"train": rows(TRAIN), "test": rows(TEST)}),
    ]
    for task in tasks:
        assert task.assets == {"classes": NAMES}
        for split, count in (("train", 30), ("validation", 8)):
            assert len(task.source(split)) == count
            assert decoded(task, split) == decoded(tasks[0], split)


def test_a_source_keeps_images_encoded_and_pickles_as_its_files(make_task):
    source = make_task({"train": rows(TRAIN)}, validation_fraction=0.0).source("train")
    assert [raw["image"] for raw in elements(source)] == list(TRAIN.values())
    assert "example 4 of the train split of the dataset /" in source[4]["name"]
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    assert elements(pickle.loads(pickled)) == elements(source)


def test_a_run_continues_exactly_also_where_the_data_moved(make_task, tmp_path):
    task = make_task({"train": rows(TRAIN)}, crop_scale=0.3, flip=True)
    batches = train_iterator(task, batch_size=4, seed=3)
    take(batches, 5)
    state, expected = batches.get_state(), take(batches, 10)
    moved = shutil.move(tmp_path / "data0", tmp_path / "moved")
    config = make_config(source=f"hf:{moved}", crop_scale=0.3, flip=True)
    again = ImageTask(config)
    assert_continues(task, state, expected, again)
    other = make_task({"train": rows(pngs(count=15, first=300))})
    assert difference(task.fingerprint, other.fingerprint, task.unit)


def test_without_a_validation_split_a_share_of_train_is_one(make_task):
    task = make_task({"train": rows(TRAIN)}, validation_fraction=0.3)
    train, validation = decoded(task, "train"), decoded(task, "validation")
    assert validation
    assert not set(train) & set(validation)
    assert len(train + validation) == 30


def test_columns_of_other_names(make_task):
    coarse = {"coarse": (datasets.ClassLabel(names=["pet"]), [0] * 30)}
    thumb = {"thumb": (datasets.Image(), [None] * 30)}
    splits = {"train": rows(TRAIN, ("img", "fine"), more=coarse | thumb)}
    expected = decoded(make_task({"train": rows(TRAIN)}), "train")
    assert decoded(make_task(splits), "train") == expected
    task = make_task(splits, image_key="img", label_key="coarse", num_classes=1)
    assert {raw["label"] for raw in elements(task.source("train"))} == {0}


def test_labels_without_names(make_task):
    task = make_task({"train": rows(TRAIN, label=datasets.Value("int64"))})
    assert task.classes == ("0", "1")
    for value, found in ((7, 7), (-1, -1)):
        wrong = rows(TRAIN, label=datasets.Value("int64"), wrong={5: value})
        task = make_task({"train": wrong}, validation_fraction=0.0)
        expect_error(
            lambda t=task: elements(t.source("train")),
            rf"a label in 0\.\.1 in example 5 of the train split of the dataset .*, found {found};",
        )


def test_an_example_without_a_label(make_task):
    task = make_task({"train": rows(TRAIN, wrong={5: -1})}, validation_fraction=0.0)
    expect_error(lambda: task.source("train")[5], r"a label in 0\.\.1 in example 5 .*found -1")
    task = make_task({"train": rows(TRAIN, wrong={5: None})}, validation_fraction=0.0)
    expect_error(lambda: task.source("train")[5], "an integer under the key 'label' in example 5")


@pytest.mark.parametrize("broken", ["cut", "missing"])
def test_a_corrupt_or_missing_image_names_its_example(make_task, broken):
    files = dict(TEST)
    files["cat/3.png"] = files["cat/3.png"][:100]
    validation = rows(files)
    if broken == "missing":
        images = [{"bytes": content, "path": None} for content in TEST.values()]
        images[3] = None
        columns = {"image": images, "label": validation["label"][:]}
        validation = datasets.Dataset.from_dict(columns, features=validation.features)
    task = make_task({"train": rows(TRAIN), "validation": validation})
    expect_error(
        lambda: decoded(task, "validation"),
        "example 3 of the validation split of the dataset .*; take the dataset anew$",
    )
    skipping = make_task({"train": validation}, on_corrupt="skip", validation_fraction=0.0)
    batches = take(train_iterator(skipping, batch_size=8, seed=0), 2)
    assert all(len(batch["labels"]) == 8 for batch in batches)


def test_columns_and_splits_that_are_not_there_are_named(make_task):
    splits = {"train": rows(TRAIN, more={"id": (datasets.Value("string"), ["x"] * 30)})}
    for options, pattern in (
        (
            {"image_key": "imag"},
            r"column 'imag' in .* label, id \(did you mean 'image'\?\); set",
        ),
        ({"label_key": "labels"}, r"'labels' .*\(did you mean 'label'\?\); set data.label_key to"),
        ({"image_key": "label"}, "expected image in the column 'label' of .*, found classes; set"),
        ({"label_key": "id"}, "expected classes or integers in the column 'id' of .*, found text"),
        ({"num_classes": 10}, "found 2 classes, model.num_classes is 10"),
    ):
        task = make_task(splits, **options)
        expect_error(lambda t=task: t.source("train"), pattern)
    text = datasets.Dataset.from_dict({"text": ["one"]})
    task = make_task({"train": text})
    expect_error(lambda: task.source("train"), "the column 'image' in the dataset .*, found text")
    task = make_task({"test": rows(TEST)})
    expect_error(lambda: task.source("train"), "the split 'train' in the dataset .*, found test;")


def test_images_that_datasets_decoded_itself_are_the_same(make_task):
    """What a dataset stores are the bytes of the file, however it was built."""
    loaded = datasets.Dataset.from_dict(
        {"image": [io.BytesIO(content).getvalue() for content in TEST.values()]}
    ).cast_column("image", datasets.Image())
    loaded = loaded.add_column("label", [0] * 4 + [1] * 4).cast_column("label", CLASSES)
    task = make_task({"train": loaded}, validation_fraction=0.0)
    assert [raw["image"] for raw in elements(task.source("train"))] == list(TEST.values())
