"""Class names with accents: composed (NFC) and taken apart (NFD, as on a Mac) they are the same."""

import unicodedata

import numpy as np
import pytest

from quantizable_flax.data.images.files import FileDataset
from quantizable_flax.data.images.task import ImageTask
from tests.data.images.conftest import elements, expect_error, make_config, pngs, write_folder

NAMES = ("zèbre", "épagneul", "chat", "ウグイス", "ガ")  # apart, é and ガ sort before z and ウグ


def apart(name):
    return unicodedata.normalize("NFD", name)


def files_of(names, count=6):
    return pngs(names, count)


def taken_apart(files):
    return {apart(name): content for name, content in files.items()}


def labelled(source):
    return [(element["label"], element["image"]) for element in elements(source)]


@pytest.fixture
def folders(tmp_path):
    """The same images in folders with composed names and with names taken apart."""
    files = files_of(NAMES)
    whole = write_folder(tmp_path / "whole", files)
    return whole, write_folder(tmp_path / "apart", taken_apart(files))


def test_both_forms_give_the_same_classes_labels_and_order(folders):
    one, other = (FileDataset(path, "data.files").train() for path in folders)
    assert one.classes == other.classes == tuple(sorted(NAMES))
    assert labelled(one.source) == labelled(other.source)
    np.testing.assert_array_equal(one.positions_N, other.positions_N)
    # The files themselves are opened by the names that they have.
    assert apart("épagneul") in "".join(element["name"] for element in elements(other.source))


def test_validation_in_the_other_form_has_the_labels_of_training(folders, tmp_path):
    held_out = {f"{name}/9.png": name.encode() for name in NAMES}
    for train, files in zip(folders, (taken_apart(held_out), held_out), strict=True):
        validation = write_folder(tmp_path / f"of_{train[-5:]}", files)
        task = ImageTask(make_config(num_classes=5, files=train, validation_files=validation))
        for raw in elements(task.source("validation")):
            assert task.classes[raw["label"]] == raw["image"].decode()


def test_a_checkpoint_in_the_other_form_keeps_its_labels(folders):
    stored = sorted(apart(name) for name in NAMES)  # as written by a run on names taken apart
    assert [unicodedata.normalize("NFC", name) for name in stored] != sorted(NAMES)
    expected = {image: name for name, image in _by_class(folders[0])}
    for path in folders:
        config = make_config(num_classes=5, files=path, validation_fraction=0.3)
        task = ImageTask(config, {"classes": stored})
        for split in ("train", "validation"):
            for raw in elements(task.source(split)):
                assert apart(expected[raw["image"]]) == stored[raw["label"]]
    wrong = ImageTask(config, {"classes": [*stored[:4], apart("zèbres")]})
    expect_error(lambda: wrong.source("train"), "classes of the checkpoint in the data, found")


def _by_class(path):
    pool = FileDataset(path, "data.files").train()
    return [(pool.classes[label], image) for label, image in labelled(pool.source)]


def test_two_forms_in_one_folder_are_one_class(tmp_path):
    half = files_of(("épagneul",), 4)
    other = {name.replace("/", "/other"): image for name, image in files_of(("épagneul",)).items()}
    pool = FileDataset(
        write_folder(tmp_path / "data", half | taken_apart(other)), "data.files"
    ).train()
    assert pool.classes == ("épagneul",)
    assert len(pool.source) == 10
