"""Links in folders and tars: what they lead to is read, and a bad one is never just left out."""

import io
import logging
import os
import tarfile

import numpy as np
import pytest

from quantizable_flax.data.images.files import FileDataset
from tests.data.images.conftest import elements, expect_error, pngs, write_folder

PICTURES = pngs()
IMAGE = PICTURES["cat/0.png"]


def open_files(path):
    return FileDataset(str(path), "data.files")


def described(pool):
    """Returns class, file name and bytes of every image, in order."""
    return [
        (
            pool.classes[element["label"]],
            os.path.basename(element["name"].replace("!", "/")),
            element["image"],
        )
        for element in elements(pool.source)
    ]


def pack(folder, name="packed.tar"):
    path = folder.parent / name
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "")
    return path


def write_members(path, *members):
    """Writes a tar of (name, content), (name, "hard" or "soft", target) or (name, type)."""
    with tarfile.open(path, "w") as archive:
        for name, kind, *target in members:
            member = tarfile.TarInfo(name)
            if target:
                member.type = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}[kind]
                member.linkname = target[0]
                archive.addfile(member)
            elif isinstance(kind, str):
                member.type = kind.encode()
                archive.addfile(member)
            else:
                member.size = len(kind)
                archive.addfile(member, io.BytesIO(kind))
    return path


def hard(data):
    os.link(data / "cat/1.png", data / "dog/copy.png")


def soft(data):
    os.symlink("../cat/1.png", data / "dog/copy.png")


def chain(data):
    os.symlink("c.png", data / "cat/a.png")
    os.symlink("../dog/3.png", data / "cat/b.png")
    os.symlink("b.png", data / "cat/c.png")


def hard_to_soft(data):
    os.symlink("../cat/0.png", data / "dog/a.png")
    os.link(data / "dog/a.png", data / "cat/z.png", follow_symlinks=False)


def class_folder(data):
    os.symlink("dog", data / "hound")


def through_a_folder(data):
    os.symlink("dog", data / "hound")
    os.symlink("../hound/2.png", data / "cat/dog.png")


def folder_with_links(data):
    os.symlink("../cat/0.png", data / "dog/a.png")
    os.symlink("./dog/.", data / "hound")
    os.symlink("hound", data / "whelp")


def whole_split(data):
    for name in ("cat", "dog"):
        os.makedirs(data / "train", exist_ok=True)
        os.rename(data / name, data / "train" / name)
    os.symlink("train", data / "val")


def hidden_store(data):
    os.makedirs(data / ".store")
    os.rename(data / "cat/0.png", data / ".store/blob")
    os.symlink("../.store/blob", data / "cat/0.png")
    os.symlink("nothing", data / ".broken")


@pytest.mark.parametrize(
    "link",
    [
        hard,
        soft,
        chain,
        hard_to_soft,
        class_folder,
        through_a_folder,
        folder_with_links,
        whole_split,
        hidden_store,
    ],
)
def test_links_give_the_same_from_a_folder_and_its_tar(tmp_path, link):
    data = tmp_path / "data"
    write_folder(data, PICTURES)
    link(data)
    folder, tar = open_files(data), open_files(pack(data))
    visible = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(data, followlinks=True)
        for name in names
        if "/." not in os.path.join(parent, name)
    ]
    pools = {id(folder.train()): folder.train(), id(folder.validation()): folder.validation()}
    assert sum(len(pool.source) for pool in pools.values()) == len(visible)
    for mine, other in (
        (folder.train(), tar.train()),
        (folder.validation(), tar.validation()),
    ):
        assert described(mine) == described(other)
        assert mine.classes == other.classes
        np.testing.assert_array_equal(mine.positions_N, other.positions_N)


def test_a_folder_may_link_to_another_place(tmp_path):
    write_folder(tmp_path / "store", PICTURES)
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "store/cat", tmp_path / "data/cat")
    (tmp_path / "data/dog").mkdir()
    os.symlink(tmp_path / "store/dog/1.png", tmp_path / "data/dog/1.png")
    assert len(open_files(tmp_path / "data").train().source) == 7


def test_the_last_member_of_a_name_counts(tmp_path):
    path = write_members(
        tmp_path / "a.tar",
        ("cat/0.png", b"old"),
        ("cat/linked.png", "hard", "./cat/0.png"),
        ("cat/late.png", "hard", "cat/9.png"),
        ("./cat/0.png", b"new"),
        ("cat/soft.png", "soft", "0.png"),
        ("cat/9.png", b"nine"),
    )
    found = {name: image for _, name, image in described(open_files(path).train())}
    # A hard link keeps what it was made of, a symbolic one sees what was written over it.
    assert found == {
        "0.png": b"new",
        "linked.png": b"old",
        "late.png": b"nine",
        "soft.png": b"new",
        "9.png": b"nine",
    }


def test_names_of_members_lose_what_leads_out_of_the_archive(tmp_path):
    path = write_members(
        tmp_path / "a.tar",
        ("/top/cat/0.png", IMAGE),
        ("../top/dog/0.png", IMAGE),
        ("../top/dog/1.png", "hard", "/top/cat/0.png"),
    )
    assert [name for name, _, _ in described(open_files(path).train())].count("dog") == 2


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_with_long_and_foreign_names(tmp_path, dialect):
    long = "l" * 120
    with tarfile.open(tmp_path / "A.TAR", "w", format=dialect) as archive:
        member = tarfile.TarInfo(f"{long}/ü/{long}.png")
        member.size = len(IMAGE)
        archive.addfile(member, io.BytesIO(IMAGE))
        for name, kind, target in (
            (f"{long}/b/{long}1.png", tarfile.LNKTYPE, member.name),
            (f"{long}/b/{long}2.png", tarfile.SYMTYPE, f"../ü/{long}.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    pool = open_files(tmp_path / "A.TAR").train()
    assert pool.classes == ("b", "ü")
    assert [image for _, _, image in described(pool)] == [IMAGE] * 3


@pytest.mark.parametrize(
    ("name", "kind", "target", "pattern"),
    [
        ("dog/1.png", "soft", "gone.png", "dog/1.png .*to dog/gone.png, which is not in the arch"),
        ("dog/1.png", "hard", "dog/gone.png", "dog/1.png .*to dog/gone.png, which is not in"),
        ("dog/1.png", "soft", "0.png/x", "dog/1.png .*to dog/0.png, which is not in the arch"),
        ("emu", "soft", "gone", "emu .*to gone, which is not in the archive"),
        ("dog/1.png", "soft", "/data/1.png", "dog/1.png .*to /data/1.png, out of the archive"),
        ("dog/1.png", "soft", "../../1.png", "dog/1.png .*leads out of the archive"),
        ("dog/1.png", "soft", "1.png", "dog/1.png .*in a circle"),
        ("dog/1.png", "hard", "dog/1.png", "dog/1.png .*in a circle"),
        ("emu", "soft", ".", "emu .*back to the whole archive"),
        ("dog/all", "soft", "../dog", "dog/all .*back to dog, which holds it"),
    ],
)
def test_bad_links_in_a_tar_are_refused(tmp_path, name, kind, target, pattern):
    path = write_members(tmp_path / "a.tar", ("dog/0.png", IMAGE), (name, kind, target))
    expect_error(lambda: open_files(path), f"expected the link {path}!{pattern}")


def test_folders_that_hold_each_other_are_a_circle(tmp_path):
    links = (("a/b", "soft", "../b"), ("b/a", "soft", "../a"))
    path = write_members(tmp_path / "a.tar", ("a/0.png", IMAGE), ("b/0.png", IMAGE), *links)
    expect_error(lambda: open_files(path), "the link .*back to a, which holds it")
    write_folder(tmp_path / "data", {"a/0.png": IMAGE, "b/0.png": IMAGE})
    for name, _, target in links:
        os.symlink(target, tmp_path / "data" / name)
    expect_error(lambda: open_files(tmp_path / "data"), "the link .*back to .*, which holds it")


@pytest.mark.parametrize(
    ("name", "target", "pattern"),
    [
        ("dog/9.png", "gone.png", "dog/9.png .*to gone.png, which is not there"),
        ("emu", "/nowhere/emu", "emu .*to /nowhere/emu, which is not there"),
        ("dog/9.png", "9.png", "dog/9.png .*in a circle"),
        ("dog/all", "../dog", "dog/all .*back to .*dog, which holds it"),
        ("self", ".", "self .*back to .*data, which holds it"),
    ],
)
def test_bad_links_in_a_folder_are_refused(tmp_path, name, target, pattern):
    data = tmp_path / "data"
    write_folder(data, PICTURES)
    os.symlink(target, data / name)
    expect_error(lambda: open_files(data), f"expected the link {data}/{pattern}")


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"M"])
def test_what_is_no_file_in_a_tar_is_refused(tmp_path, kind):
    path = write_members(tmp_path / "a.tar", ("dog/0.png", IMAGE), ("dog/1.png", kind.decode()))
    expect_error(lambda: open_files(path), "a.tar!dog/1.png, found a pipe, device")


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path):
    write_folder(tmp_path / "data", PICTURES)
    os.mkfifo(tmp_path / "data/dog/9.png")
    expect_error(lambda: open_files(tmp_path / "data"), "dog/9.png, found a pipe")


def test_files_stored_with_holes_are_refused(tmp_path):
    """Their bytes do not stand together, so that what is read in place would be wrong."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("dog/0.png", {}), ("dog/1.png", {"GNU.sparse.map": "0,4"})):
            member = tarfile.TarInfo(name)
            member.size = 4
            member.pax_headers = headers | ({"GNU.sparse.size": "8"} if headers else {})
            archive.addfile(member, io.BytesIO(b"data"))
    expect_error(lambda: open_files(path), "dog/1.png, found one stored with holes.*--sparse")


def test_a_file_cannot_also_be_a_folder(tmp_path):
    for target in ((b"x",), ("soft", "dog")):
        path = write_members(tmp_path / "a.tar", ("dog/0.png", IMAGE), ("emu", *target),
                             ("emu/1.png", IMAGE))  # fmt: skip
        expect_error(lambda p=path: open_files(p), "emu is a (file|link) and has emu/1.png in it")


def test_tars_that_are_joined_are_found_out(tmp_path):
    first = write_members(tmp_path / "a.tar", ("dog/0.png", IMAGE))
    second = write_members(tmp_path / "b.tar", ("dog/1.png", IMAGE))
    joined = tmp_path / "c.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    expect_error(lambda: open_files(joined), "expected one tar in .*c.tar, found another behind")
    joined.write_bytes(first.read_bytes() + b"\0" * 2**21 + b"remains of an older file")
    assert len(open_files(joined).train().source) == 1


def test_images_of_types_that_are_not_read_are_counted_once(tmp_path, caplog):
    others = ["cat/a.gif", "cat/b.GIF", "dog/c.tif", "dog/notes.txt", ".cache/d.gif"]
    data = tmp_path / "data"
    write_folder(data, PICTURES | dict.fromkeys(others, b"x"))
    for path in (data, pack(data)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = open_files(path)
            for pool in (dataset.train(), dataset.validation()):
                assert len(pool.source) == len(PICTURES)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "3 image files" in message
        assert ".gif 2, .tif 1" in message
        assert "cat/a.gif" in message


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    write_folder(tmp_path / "data", PICTURES | {"README.md": b"", "cat/Thumbs.db": b""})
    with caplog.at_level(logging.WARNING):
        open_files(tmp_path / "data")
    assert not caplog.records
