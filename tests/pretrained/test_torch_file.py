"""Files of torch.save are read as PyTorch reads them, and run nothing."""

import io
import pickle
import pickletools
import zipfile

import numpy as np
import pytest

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.torch_file import read_torch
from tests.pretrained.torch_files import (
    GOLDENS,
    MALICIOUS,
    STATE_DICTS,
    assert_same,
    expect_error,
    legacy,
    refusals,
    small,
    state_dict,
    tensor,
)


def rewritten(file, path, change=lambda name, content: content, **options):
    """Writes a zip anew, with each entry changed or, for None, left out."""
    with zipfile.ZipFile(GOLDENS / file) as old, zipfile.ZipFile(path, "w", **options) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


@pytest.mark.parametrize("file", STATE_DICTS)
def test_tensors_of_every_type_and_view_come_out(file):
    assert_same(read_torch(GOLDENS / file), state_dict(file))


@pytest.mark.parametrize("file", STATE_DICTS)
def test_tensors_of_one_storage_share_what_is_mapped(file):
    weights = read_torch(GOLDENS / file)
    assert np.shares_memory(weights["whole"], weights["tied"])
    assert np.shares_memory(weights["transposed"], weights["block"])
    assert not np.shares_memory(weights["half"], weights["whole"])
    assert not weights["whole"].flags.writeable  # nor can an owner of the array change that
    with pytest.raises(ValueError, match="WRITEABLE"):
        weights["whole"].flags.writeable = True


@pytest.mark.parametrize("file", ["torch_lightning.bin", "torch_deit.bin"])
def test_a_state_dict_inside_a_checkpoint_is_found(file):
    assert_same(read_torch(GOLDENS / file), small())


def test_numbers_of_big_endian_machines_are_swapped(tmp_path):
    widths = (4, 4, 4, 4, 2, 2, 8, 8, 4, 1, 1, 2)  # of the storages' numbers, in their order

    def swap(name, content):
        if name == "byteorder":
            return b"big"
        if not name.startswith("data/"):
            return content
        return np.frombuffer(content, f"u{widths[int(name[5:])]}").byteswap().tobytes()

    path = rewritten("torch_zip.bin", tmp_path / "big.bin", swap)
    assert_same(read_torch(path), state_dict())


def test_what_the_first_releases_and_python_2_wrote(tmp_path):
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x08(U\x01vK\x02K\x05ttQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x01K\x02\x85K\x02\x85tR"
    value = b"\x80\x02ccollections\nOrderedDict\n]]U\x01aa" + tensor + b"aa\x85R."
    path = tmp_path / "old.pth"
    path.write_bytes(legacy(value, _0=np.arange(8, dtype=np.float32)))
    assert_same(read_torch(path), {"a": np.array([3, 5], np.float32)})


@pytest.mark.parametrize("file", MALICIOUS)
def test_a_program_inside_is_named_and_not_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_error(
        read_torch, GOLDENS / file, r"asks to run posix\.system, so nothing of it was run; save"
    )
    assert not any(tmp_path.iterdir())


# As Python's own pickles ask for them, of several protocols, and by hand.
class _Reduces:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


PROGRAMS = {
    "eval": pickle.dumps(_Reduces(eval, ("open('was_run', 'w')",)), 2),
    "exec": pickle.dumps(_Reduces(exec, ("open('was_run', 'w')",)), 4),
    "getattr": pickle.dumps(_Reduces(getattr, ({}, "pop")), 3),
    "torch.load": b"\x80\x02ctorch\nload\nU\x01x\x85R.",
    "torch._utils._rebuild_qtensor": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.",
    "collections.OrderedDict.fromkeys": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R."
    ),
    "os.path.join": b"\x80\x02cos.path\njoin\nU\x01x\x85R.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_names_beyond_the_table_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.bin"
    path.write_bytes(legacy(PROGRAMS[name]))
    pickletools.dis(PROGRAMS[name], out=io.StringIO())  # it is a pickle
    expect_error(read_torch, path, rf"asks to run (\w+\.)*{name.replace('.', '[.]')}, so")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"\x80\x02}U\x01aK\x01s.", "a dict of 'a'"),
        (b"\x80\x02]K\x01a.", "a list"),
        (b"\x80\x02N.", "a NoneType"),
        (b"\x80\x02}.", "a dict"),
    ],
)
def test_files_without_tensors(value, found, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(legacy(value))
    expect_error(
        read_torch,
        path,
        f"expected a state dict with tensors in .*, found {found}; save model.state_dict",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (5,)},
        {"offset": 3},
        {"shape": (2, 2), "strides": (3, 1)},
        {"strides": (2**62,)},
        {"shape": (2**62, 2**62), "strides": (0, 0)},
        {"numel": 1},
        {"offset": -1},
        {"shape": (-2,)},
        {"strides": (-1,)},
        {"shape": (True,)},
        {"shape": (2.0,)},
        {"strides": (1, 1)},
        {"kind": b"Size"},
        {"rest": b"}U\x03neg\x88s"},
    ],
)
def test_a_tensor_cannot_leave_its_storage(wrong, tmp_path):
    path = tmp_path / "weights.bin"
    content = np.arange(4, dtype=np.float32)
    path.write_bytes(legacy(tensor(), _0=content))
    assert_same(read_torch(path), {"x": np.array([0, 1], np.float32)})
    path.write_bytes(legacy(tensor(**wrong), _0=content))
    expect_error(read_torch, path, "found it damaged or cut short")


def test_a_size_of_the_moon_takes_no_memory(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(legacy(tensor(shape=(2**40,), strides=(0,)), _0=np.ones(4, np.float32)))
    assert read_torch(path)["x"].shape == (2**40,)


def test_a_reference_may_have_any_number(tmp_path):
    # Python's own unpickler would make a list of 32 GiB here.
    path = tmp_path / "weights.bin"
    value = tensor().replace(b"}", b"}r\xff\xff\xff\xff", 1)
    path.write_bytes(legacy(value, _0=np.ones(4, np.float32)))
    assert set(read_torch(path)) == {"x"}


def test_nests_of_any_depth_are_read_or_refused(tmp_path):
    path = tmp_path / "weights.bin"
    deep = b")" + b"\x85" * 1_000_000
    path.write_bytes(legacy(b"\x80\x02}" + deep + b"K\x01s."))  # as a key, to be hashed
    expect_error(read_torch, path, "damaged")
    path.write_bytes(legacy(b"\x80\x02}U\x01a" + deep + b"s."))
    expect_error(read_torch, path, "found a dict of 'a';")


def test_a_changed_storage_is_found_when_its_tensors_are_read(tmp_path):
    path = tmp_path / "weights.bin"
    content = (GOLDENS / "torch_zip.bin").read_bytes()
    base = state_dict()["whole"].tobytes()
    place = content.index(base)
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    weights = read_torch(path)
    assert weights["long"].tolist() == [-1, 0, 1]
    for name in ("whole", "row"):
        with pytest.raises(UserError, match=f"the tensor '{name}' in .*checksum"):
            weights[name]
    # PyTorch writes no checksums where it was told so.
    with zipfile.ZipFile(GOLDENS / "torch_zip.bin") as archive:
        sums = {entry.CRC for entry in archive.infolist() if entry.CRC}
    for crc in sums:
        content = content.replace(crc.to_bytes(4, "little"), bytes(4))
    path.write_bytes(content)
    assert_same(read_torch(path), state_dict())


def test_zips_of_another_kind(tmp_path):
    path = tmp_path / "weights.bin"
    rewritten("torch_zip.bin", path, compression=zipfile.ZIP_DEFLATED)
    expect_error(read_torch, path, "compressed, as torch.save does not do")
    rewritten("torch_zip.bin", path, lambda name, content: None if "pkl" in name else content)
    expect_error(read_torch, path, "without one data.pkl")
    rewritten("torch_zip.bin", path, lambda name, content: None if "data/0" in name else content)
    expect_error(read_torch, path, "tensor 'whole' in .*storage 0 is missing")
    with zipfile.ZipFile(rewritten("torch_zip.bin", path), "a") as archive:
        archive.writestr("torch_zip/constants.pkl", b"")
    expect_error(read_torch, path, "a program of TorchScript; save model.state_dict")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"<html>404</html>")
    expect_error(read_torch, path, "neither a zip nor a pickle")
    path.write_bytes(pickle.dumps({"a": 1}))
    expect_error(read_torch, path, "a pickle, but none of torch.save")


@pytest.mark.parametrize("file", [*STATE_DICTS, *MALICIOUS])
def test_damage_gives_one_sentence_or_other_numbers(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.bin"
    refused = refusals(read_torch, path, (GOLDENS / file).read_bytes())
    assert refused > 150  # all that were cut, at the least
    assert list(tmp_path.iterdir()) == [path]
