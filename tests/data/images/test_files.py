"""Folders and tars: layouts, order, and every message about files."""

import os
import pickle
import threading

import numpy as np
import pytest

from quantizable_flax.data.images.files import FileDataset
from tests.data.images.conftest import (
    elements,
    encode,
    expect_error,
    pngs,
    random_image,
    write_folder,
    write_tar,
)


def open_files(patterns):
    return FileDataset(str(patterns), "data.files")


def contents(pool):
    """Returns label and bytes of every image, in order."""
    return [(element["label"], element["image"]) for element in elements(pool.source)]


def by_name(files):
    return {tuple(name.split("/")[-2:]): content for name, content in files.items()}


def test_a_folder_gives_every_image_its_class(tmp_path):
    files = pngs(("dog", "cat", "Zebra"))
    pool = open_files(write_folder(tmp_path / "data", files)).train()
    assert pool.classes == ("Zebra", "cat", "dog")
    assert len(pool.source) == len(files) == len(pool.positions_N)
    for element in elements(pool.source):
        name = os.path.relpath(element["name"], tmp_path / "data")
        assert element["image"] == files[name]
        assert pool.classes[element["label"]] == name.split("/")[0]


def test_a_tar_is_read_as_the_folder_is_in_the_same_order(tmp_path):
    files = pngs()
    pool = open_files(write_folder(tmp_path / "data", files)).train()
    for number, prefix in enumerate(("", "./", "train/")):
        packed = {prefix + name: content for name, content in reversed(files.items())}
        folders = ("./",) if prefix else ("cat", "dog")
        tarred = open_files(write_tar(tmp_path / f"{number}.tar", packed, folders)).train()
        assert contents(tarred) == contents(pool)
        np.testing.assert_array_equal(tarred.positions_N, pool.positions_N)
        top = prefix.removeprefix("./")
        assert tarred.source[3]["name"].startswith(f"{tmp_path}/{number}.tar!{top}dog/")


@pytest.mark.parametrize("tar_format", ["gnu", "pax", "ustar"])
def test_tars_of_every_dialect(tmp_path, monkeypatch, tar_format):
    import tarfile

    monkeypatch.setattr(tarfile.TarFile, "format", getattr(tarfile, f"{tar_format.upper()}_FORMAT"))
    long = "l" * 90
    files = {f"train/{long}/{long}.png": encode(random_image(1)), "train/ü/b.png": b"content"}
    pool = open_files(write_tar(tmp_path / "a.tar", files)).train()
    assert pool.classes == (long, "ü")
    assert sorted(contents(pool)) == [(0, encode(random_image(1))), (1, b"content")]


def test_the_order_mixes_classes(tmp_path):
    pool = open_files(write_folder(tmp_path / "data", pngs(count=50))).train()
    labels = np.array([label for label, _ in contents(pool)])
    assert 5 < labels[:50].sum() < 45


def test_several_containers_are_one_dataset(tmp_path):
    first = pngs(("cat", "dog"), 4)
    second = pngs(("bird", "dog"), 3, first=10)
    second = {name.replace("/", "/second"): content for name, content in second.items()}
    write_tar(tmp_path / "part-0.tar", first)
    write_tar(tmp_path / "part-1.tar", second)
    write_folder(tmp_path / "more", {"ant/1.png": encode(random_image())})
    pool = open_files(f"{tmp_path}/part-*.tar, {tmp_path}/more,{tmp_path}/part-0.tar").train()
    assert pool.classes == ("ant", "bird", "cat", "dog")
    assert len(pool.source) == 8 + 6 + 1
    wanted = by_name(first | second | {"ant/1.png": encode(random_image())})
    for element in elements(pool.source):
        name = tuple(element["name"].replace("!", "/").split("/")[-2:])
        assert element["image"] == wanted[name]
        assert pool.classes[element["label"]] == name[0]


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test"])
def test_splits_of_the_layout(tmp_path, validation):
    train, held_out = pngs(prefix="train/"), pngs(("dog",), 2, f"{validation}/", first=50)
    for path in (
        write_folder(tmp_path / "data", train | held_out),
        write_tar(tmp_path / "data.tar", train | held_out),
    ):
        files = open_files(path)
        assert files.has_validation
        assert {image for _, image in contents(files.train())} == set(train.values())
        assert {image for _, image in contents(files.validation())} == set(held_out.values())


def test_validation_comes_before_test(tmp_path):
    held_out = pngs(prefix="validation/", first=50)
    files = pngs(prefix="train/") | held_out | pngs(prefix="test/", first=80)
    pool = open_files(write_folder(tmp_path / "data", files)).validation()
    assert {image for _, image in contents(pool)} == set(held_out.values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_single_split_is_all_there_is(tmp_path, split):
    files = open_files(write_tar(tmp_path / "a.tar", pngs(prefix=f"{split}/")))
    assert not files.has_validation
    for pool in (files.train(), files.validation()):
        assert {image for _, image in contents(pool)} == set(pngs().values())


@pytest.mark.parametrize("split", ["", "train/", "val/"])
def test_a_folder_above_everything_makes_no_difference(tmp_path, split):
    files = open_files(write_tar(tmp_path / "a.tar", pngs(prefix=f"my/data/{split}")))
    assert contents(files.train()) == contents(
        open_files(write_folder(tmp_path / "data", pngs())).train()
    )


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    pool = open_files(write_folder(tmp_path / "data", pngs(("plane", "train")))).train()
    assert pool.classes == ("plane", "train")


def test_hidden_and_other_files_are_left_out(tmp_path):
    junk = {".cache/a.png": b"", "cat/.hidden.png": b"", "__MACOSX/cat/._0.png": b""}
    other = {"cat/Thumbs.db": b"", "README.md": b"", "cover.jpg": b""}
    pool = open_files(write_folder(tmp_path / "data", pngs() | junk | other)).train()
    assert {image for _, image in contents(pool)} == set(pngs().values())


def test_every_extension_counts(tmp_path):
    names = [f"cat/{i}{end}" for i, end in enumerate((".jpg", ".JPEG", ".PNG", ".bmp", ".webp"))]
    pool = open_files(write_folder(tmp_path / "data", dict.fromkeys(names, b"x"))).train()
    assert len(pool.source) == 5


def test_sources_pickle_without_their_open_files(tmp_path):
    folder = write_folder(tmp_path / "data", pngs())
    for path in (folder, write_tar(tmp_path / "a.tar", pngs())):
        source = open_files(path).train().source
        expected = elements(source)
        again = pickle.loads(pickle.dumps(source))
        assert elements(again) == expected
    opened = len(os.listdir("/dev/fd"))
    del source, again
    assert len(os.listdir("/dev/fd")) == opened - 2  # each had a descriptor of its own


def test_a_tar_serves_many_threads(tmp_path):
    source = open_files(write_tar(tmp_path / "a.tar", pngs(count=40))).train().source
    expected = [(element["label"], element["image"]) for element in elements(source)]
    found = [None] * 8
    source = pickle.loads(pickle.dumps(source))  # not opened yet

    def read(place):
        found[place] = [(element["label"], element["image"]) for element in elements(source)]

    threads = [threading.Thread(target=read, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_a_pickled_index_is_small(tmp_path):
    files = {f"class{i % 10}/{i:05}.png": b"x" for i in range(2000)}
    source = open_files(write_tar(tmp_path / "a.tar", files)).train().source
    assert len(pickle.dumps(source)) < 2000 * 64


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({}, "found no image; make a folder for each class"),
        ({"README": b""}, "found no image; make a folder for each class"),
        ({"a.jpg": b""}, "found a.jpg directly in it; make a folder for each class"),
        ({"cat/a.jpg": b"", "dog/": b""}, "in the class folder .*dog, found none; add images"),
        ({"cat/a.jpg": b"", "dog/b.tif": b""}, "folder .*dog, found only files such as b.tif"),
        ({"dog/b.tif": b""}, "folder .*dog, found only files such as b.tif"),
        ({"train/cat/a.jpg": b"", "test/dog/": b""}, "class folder .*test/dog, found none"),
        ({"train/cat/a.jpg": b"", "test/": b""}, "class folder .*test, found none"),
        ({"train/cat/a.jpg": b"", "train/dog/x": b""}, "class folder .*train/dog, found only"),
        ({"x/train/cat/a.jpg": b"", "x/val/dog/x": b""}, "class folder .*x/val/dog, found only"),
        ({"cat/a.jpg": b"", "dog/1/b.jpg": b""}, "found cat/a.jpg and dog/1/b.jpg; move or"),
        ({"a/cat/1.jpg": b"", "b/dog/1.jpg": b""}, "found a/cat/1.jpg and b/dog/1.jpg; move or"),
        ({"a/cat/1.jpg": b"", "train/dog/1.jpg": b""}, "found a/cat/1.jpg and train/dog/1.jpg"),
        ({"a/val/cat/1.jpg": b"", "b/train/dog/1.jpg": b""}, "found a/val/cat/1.jpg and b/train"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_that_do_not_work_say_why(tmp_path, packed, files, pattern):
    regular = {name: content for name, content in files.items() if not name.endswith("/")}
    folders = [name for name in files if name.endswith("/")]
    path = tmp_path / ("data.tar" if packed else "data")
    if packed:
        write_tar(path, regular, folders)
    else:
        path.mkdir()
        write_folder(path, regular)
        for name in folders:
            (path / name).mkdir(parents=True)
    error = expect_error(lambda: open_files(path), pattern)
    assert str(path) in str(error)


def test_a_class_that_another_container_fills_is_not_empty(tmp_path):
    first = write_tar(tmp_path / "a.tar", pngs(("cat",)), folders=("cat", "dog"))
    second = write_tar(tmp_path / "b.tar", pngs(("dog",)))
    assert open_files(f"{first},{second}").train().classes == ("cat", "dog")


def test_layouts_are_not_mixed(tmp_path):
    write_tar(tmp_path / "a.tar", pngs())
    write_tar(tmp_path / "b.tar", pngs(prefix="train/"))
    expect_error(lambda: open_files(tmp_path / "*.tar"), "expected one layout in all files")


def test_splits_without_train_are_named(tmp_path):
    files = pngs(prefix="test/") | pngs(prefix="val/")
    dataset = open_files(write_folder(tmp_path / "data", files))
    expect_error(dataset.train, "split named train in data.files, found test, val")


def test_paths_that_do_not_work_are_named(tmp_path):
    expect_error(lambda: open_files(tmp_path / "none"), "match '.*none' in data.files, found none")
    expect_error(lambda: open_files(tmp_path / "*.tar"), r"match '.*\*.tar' in data.files")
    expect_error(lambda: open_files(" , "), "separated by commas in data.files")
    (tmp_path / "a.jpg").write_bytes(b"")
    expect_error(lambda: open_files(tmp_path / "a.jpg"), "name the folder above the class folders")
    for name in ("a.tar.gz", "a.tgz"):
        write_tar(tmp_path / name, pngs(), mode="w:gz")
        expect_error(lambda n=name: open_files(tmp_path / n), f"compressed .*{name}.*unpack")


def test_compressed_or_other_content_in_a_tar_is_called_corrupt(tmp_path):
    write_tar(tmp_path / "a.tar", pngs(), mode="w:gz")
    expect_error(lambda: open_files(tmp_path / "a.tar"), "whole tar in .*a.tar, found it")
    (tmp_path / "b.tar").write_bytes(b"")
    expect_error(lambda: open_files(tmp_path / "b.tar"), "whole tar in .*b.tar, found it")


def test_a_truncated_tar_is_found_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", pngs())
    whole = (tmp_path / "a.tar").read_bytes()
    used = len(whole.rstrip(b"\0"))
    for length in (used - 100, used // 2 // 512 * 512 + 100, 700, 300):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        expect_error(lambda: open_files(path), "whole tar in .*a.tar, found it truncated")


def test_a_broken_header_in_the_middle_is_found_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", pngs())
    content = bytearray((tmp_path / "a.tar").read_bytes())
    place = content.index(b"dog/3.png")
    content[place] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    expect_error(lambda: open_files(path), f"no valid header at byte {place}")


def test_a_tar_that_shrinks_later_is_found_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", pngs())
    source = open_files(path).train().source
    os.truncate(path, 600)
    expect_error(lambda: elements(source), "a.tar, found it truncated .*png is cut off")


def test_an_image_that_is_gone_is_named(tmp_path):
    path = write_folder(tmp_path / "data", pngs())
    source = open_files(path).train().source
    os.remove(tmp_path / "data/dog/2.png")
    expect_error(lambda: elements(source), "read .*data/dog/2.png, found 'No such file")
