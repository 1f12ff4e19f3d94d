"""The task as a whole: sources, splits, classes and messages."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from quantizable_flax.data.images.task import ImageTask
from quantizable_flax.data.task import Task
from tests.data.images.conftest import (
    elements,
    encode,
    expect_error,
    make_config,
    pngs,
    random_image,
    write_folder,
    write_tar,
)


def images_of(source):
    return {element["image"] for element in elements(source)}


@pytest.fixture
def digits():
    return ImageTask(make_config(8, num_classes=10, channels=1))


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    expected = load_digits()
    task = ImageTask(make_config(8, num_classes=10, channels=1, validation_fraction=0.0))
    transform = task.transform(train=False)
    examples = [transform.map(raw) for raw in elements(task.source("train"))]
    images_NxHxW = np.stack([example["images"] for example in examples])[..., 0]
    assert images_NxHxW.dtype == np.uint8
    assert (images_NxHxW.min(), images_NxHxW.max()) == (0, 255)
    assert np.abs(images_NxHxW / 255 - expected.images / 16).max() <= 0.5 / 255 + 1e-9
    np.testing.assert_array_equal([example["labels"] for example in examples], expected.target)
    assert digits.assets == {"classes": list("0123456789")}


def test_digits_are_split_at_random_but_always_alike(digits):
    train, validation = digits.source("train"), digits.source("validation")
    names = [[raw["name"] for raw in elements(source)] for source in (train, validation)]
    assert len({*names[0], *names[1]}) == len(names[0]) + len(names[1]) == 1797
    assert abs(len(validation) - 0.05 * 1797) < 5 * np.sqrt(0.05 * 1797)
    labels = np.bincount([raw["label"] for raw in elements(validation)], minlength=10)
    assert labels.min() > 0
    again = ImageTask(make_config(8, num_classes=10, channels=1))
    assert [raw["name"] for raw in elements(again.source("validation"))] == names[1]
    larger = ImageTask(make_config(8, num_classes=10, channels=1, validation_fraction=0.2))
    assert set(names[1]) < {raw["name"] for raw in elements(larger.source("validation"))}


def test_digits_in_colour_and_at_another_size():
    task = ImageTask(make_config(16, num_classes=10))
    example = task.transform(train=False).map(task.source("train")[0])
    assert example["images"].shape == (16, 16, 3)
    assert np.ptp(example["images"], axis=2).max() == 0


def test_it_is_a_task(digits):
    assert isinstance(digits, Task)
    assert digits.unit == "images"
    for split in ("train", "validation"):
        source = digits.source(split)
        assert elements(pickle.loads(pickle.dumps(source)))[1]["name"] == source[1]["name"]


def test_a_share_of_the_files_is_for_validation(tmp_path):
    files = pngs(count=40)
    paths = [write_folder(tmp_path / "data", files), write_tar(tmp_path / "a.tar", files)]
    tasks = [ImageTask(make_config(files=path, validation_fraction=0.25)) for path in paths]
    shares = [images_of(task.source("validation")) for task in tasks]
    assert shares[0] == shares[1]
    assert 0 < len(shares[0]) < 40
    for task, share in zip(tasks, shares, strict=True):
        assert images_of(task.source("train")) == set(files.values()) - share
    # More images leave the others where they are.
    more = files | pngs(("cat", "dog"), count=60)
    grown = ImageTask(
        make_config(files=write_tar(tmp_path / "b.tar", more), validation_fraction=0.25)
    )
    assert images_of(grown.source("validation")) & set(files.values()) == shares[0]


def test_validation_files_are_labelled_by_name(tmp_path):
    train = write_tar(tmp_path / "train.tar", pngs(("cat", "dog", "emu"), prefix="train/"))
    held_out = pngs(("dog", "emu"), 2, "test/", first=90)
    test = write_tar(tmp_path / "test.tar", held_out)
    task = ImageTask(make_config(num_classes=3, files=train, validation_files=test))
    assert len(task.source("train")) == 18
    found = {raw["image"]: raw["label"] for raw in elements(task.source("validation"))}
    labels = {"dog": 1, "emu": 2}
    assert found == {image: labels[name.split("/")[1]] for name, image in held_out.items()}


def test_a_checkpoint_evaluates_files_of_its_own_classes_without_training_data(tmp_path):
    config = make_config(validation_files=write_folder(tmp_path / "data", pngs(("dog",))))
    config.data.source = "folder"
    task = ImageTask(config, {"classes": ["cat", "dog"]})
    assert {raw["label"] for raw in elements(task.source("validation"))} == {1}
    assert task.assets == {"classes": ["cat", "dog"]}
    expect_error(lambda: task.source("train"), "expected data.files for data.source='folder'")


def test_other_classes_than_the_checkpoint_are_refused(tmp_path):
    config = make_config(files=write_folder(tmp_path / "data", pngs(("cat", "emu"))))
    task = ImageTask(config, {"classes": ["cat", "dog"]})
    for split in ("train", "validation"):
        expect_error(
            lambda s=split: task.source(s),
            "classes of the checkpoint in the data, found label 1 is 'emu' instead of 'dog'",
        )
    same = ImageTask(config, {"classes": ["cat", "emu"]})
    assert same.assets == ImageTask(config).assets
    for assets in ({"tokenizer": "..."}, {}, {"classes": [1, 2]}):
        expect_error(lambda a=assets: ImageTask(config, a), "assets of an image checkpoint")
    expect_error(lambda: ImageTask(config, {"classes": ["cat"]}), "found 1 classes, model.num")


def test_unknown_classes_in_validation_are_refused(tmp_path):
    train = write_folder(tmp_path / "train_data", pngs())
    test = write_folder(tmp_path / "test_data", pngs(("cat", "dogs")))
    task = ImageTask(make_config(files=train, validation_files=test))
    expect_error(lambda: task.source("validation"), r"found 'dogs' \(did you mean 'dog'\?\)")


@pytest.mark.parametrize("count", [1, 12])
def test_the_number_of_classes_is_checked_before_training(tmp_path, count):
    names = [f"class{number:02}" for number in range(count)]
    files = write_tar(tmp_path / "a.tar", pngs(names, 1))
    task = ImageTask(make_config(num_classes=10, files=files))
    expect_error(lambda: task.source("train"), f"found {count} classes, model.num_classes is 10")


def test_a_corrupt_file_is_named_when_it_is_decoded(tmp_path):
    cut = pngs()["cat/2.png"][:50]
    files = {"cat/2.png": cut, "dog/1.png": encode(random_image())}
    for path, joint in (
        (write_folder(tmp_path / "data", files), "/"),
        (write_tar(tmp_path / "a.tar", files), "!"),
    ):
        task = ImageTask(make_config(files=path, validation_fraction=0.0))
        transform = task.transform(train=False)
        expect_error(
            lambda t=task, f=transform: [f.map(raw) for raw in elements(t.source("train"))],
            f"expected a whole image in {path}{joint}cat/2.png, found it truncated",
        )


def test_settings_of_the_source_are_checked_early(tmp_path):
    for options, pattern in (
        ({"source": "foldr"}, r"data.source among .*'foldr' \(did you mean 'folder'\?\)"),
        ({"source": "tfds:"}, "data.source among .*tfds:NAME .* found 'tfds:'"),
        ({"source": "hf:"}, r"data.source among .*hf:NAME\[,CONFIG\], found 'hf:'"),
        ({"source": "embedded", "files": "x"}, "data.files to be empty .*'embedded', found 'x'"),
        ({"source": "tfds:mnist", "files": "x"}, "data.files to be empty .*'tfds:mnist'"),
        ({"validation_fraction": 1.0}, "data.validation_fraction in"),
        ({"validation_fraction": -0.1}, "data.validation_fraction in"),
        ({"pad_crop": -1}, "data.augment.pad_crop"),
    ):
        expect_error(lambda o=options: ImageTask(make_config(**o)), pattern)
    path = write_folder(tmp_path / "data", pngs())
    expect_error(lambda: ImageTask(make_config(files=path)).source("test"), "a split among train")
    spelled = str(tmp_path / "data" / ".." / "data")
    both = ImageTask(make_config(files=path, validation_files=spelled))
    expect_error(lambda: both.source("validation"), "different files for training and validation")
    for fraction, split in ((0.0, "validation"), (0.999999, "train")):
        task = ImageTask(make_config(files=path, validation_fraction=fraction))
        expect_error(
            lambda t=task, s=split: t.source(s), f"images for the {split} split, found none"
        )


def test_missing_scikit_learn_is_explained(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    expect_error(lambda: digits.source("train"), "expected scikit-learn .*install it or set data.f")


def test_libraries_that_few_runs_need_are_not_imported():
    code = (
        "import sys, quantizable_flax.data.images.task;"
        "print(sorted({'tensorflow_datasets', 'tensorflow', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
