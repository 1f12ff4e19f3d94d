"""Files of `torch.save` without PyTorch: its zip format, and the one before PyTorch 1.6."""

import functools
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.opening import Tensors, check_file, reading
from quantizable_flax.pretrained.torch_names import Tensor
from quantizable_flax.pretrained.torch_pickle import load

_MAGIC = 0x1950A86A20F9469CFC6C
_WHAT = "a whole file of torch.save"
# Where checkpoints of Lightning, timm and DeiT have the weights, beside other things.
_INSIDE = ("state_dict", "model")


class _Stored(NamedTuple):
    """A storage in the file: its bytes, mapped, and their CRC-32, 0 where there is none."""

    content: np.ndarray
    crc: int = 0


class _File(NamedTuple):
    """What a file holds, its storages by key, and whether their numbers are big-endian."""

    value: Any
    storages: Mapping[str, _Stored]
    swapped: bool = False


def read_torch(path: Path) -> Tensors:
    """Returns the tensors of a file of `torch.save`, and runs nothing that stands in it.

    The file is a state dict, or a dict with one under "state_dict" or "model". What else than
    tensors a state dict holds, and what stands beside it, is left out. Storages are mapped: a
    tensor is a view, which is read when it is used and cannot be written to.

    Raises:
      UserError: no such file, one that is damaged, cut short, a pointer of Git LFS, or a program of
        TorchScript; one that asks to run anything but the building of tensors; one without tensors.
        On access, a storage that is not as it was written.
    """
    check_file(path)
    with reading(path, _WHAT), path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if data[:4] == b"PK\x03\x04":
            file = _of_zip(data, path)
        elif data[:1] == b"\x80":  # every pickle of protocol 2 or later
            file = _before_zip(data, path)
        else:
            raise ValueError("neither a zip nor a pickle")
        tensors = _tensors(file.value, path)
        for name, tensor in tensors.items():
            with reading(path, f"the whole tensor {name!r}"):
                _view(tensor, _stored(file, tensor))
    checked = set[str]()
    return Tensors(
        {
            name: functools.partial(_read, path, name, tensor, file, checked)
            for name, tensor in tensors.items()
        }
    )


def _tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a state dict, wherever in the value it is."""
    outer = value if isinstance(value, dict) else {}
    for table in (*(outer.get(name) for name in _INSIDE), outer):
        items = table.items() if isinstance(table, dict) else ()
        if tensors := _only_tensors(items):
            return tensors
    keys = ", ".join(repr(key)[:40] for key in list(outer)[:4])
    found = f"a dict of {keys}" if outer else f"a {type(value).__name__}"
    raise UserError(
        f"expected a state dict with tensors in {path}, alone or under {' or '.join(_INSIDE)}, "
        f"found {found}; save model.state_dict()"
    )


def _only_tensors(items: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    return {
        name: item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)
    }


def _of_zip(data: mmap.mmap, path: Path) -> _File:
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    # The outer folder is named as the file was when it was saved.
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"a zip of {len(entries)} files without one data.pkl")
    (root,) = roots
    if f"{root}/constants.pkl" in entries:
        raise UserError(
            f"expected a state dict in {path}, found a program of TorchScript; save "
            "model.state_dict() with torch.save"
        )
    stored = {name.removeprefix(f"{root}/"): _entry(data, entry) for name, entry in entries.items()}
    whole = {name: stored[name] for name in ("data.pkl", "byteorder") if name in stored}
    for name, entry in whole.items():
        _check_crc(entry, name)
    order = whole["byteorder"].content.tobytes() if "byteorder" in whole else b"little"
    value = load(whole["data.pkl"].content.tobytes(), 0, path).value
    storages = {name[5:]: entry for name, entry in stored.items() if name.startswith("data/")}
    return _File(value, storages, order == b"big")


def _entry(data: mmap.mmap, entry: zipfile.ZipInfo) -> _Stored:
    """Returns an entry of a zip; the lengths in front of its bytes differ from the directory's."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed, as torch.save does not do")
    lengths = data[entry.header_offset + 26 : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
    return _Stored(_slice(data, start, entry.file_size), entry.CRC)


def _slice(data: mmap.mmap, start: int, count: int) -> np.ndarray:
    if not 0 <= count <= len(data) - start:
        raise ValueError("a storage ends early")
    return np.frombuffer(data, np.uint8, count, start) if count else np.empty(0, np.uint8)


def _before_zip(data: mmap.mmap, path: Path) -> _File:
    """Pickles (a number, the version, the machine, the value, the keys), then the storages."""
    magic = load(data, 0, path)
    if magic.value != _MAGIC:
        raise ValueError("a pickle, but none of torch.save")
    version = load(data, magic.end, path)
    machine = load(data, version.end, path)
    whole = load(data, machine.end, path)
    keys = load(data, whole.end, path)
    storages, position = {}, keys.end
    for key in map(str, keys.value):
        (numel,) = struct.unpack("<q", data[position : position + 8])  # of elements
        count = numel * whole.storages[key].itemsize
        storages[key] = _Stored(_slice(data, position + 8, count))
        position += 8 + count
    return _File(whole.value, storages)


def _stored(file: _File, tensor: Tensor) -> _Stored:
    key = tensor.storage.key
    if key not in file.storages:
        raise ValueError(f"its storage {key} is missing")
    return file.storages[key]


def _check_crc(stored: _Stored, name: str) -> None:
    # PyTorch writes 0 where it was told to save the time.
    if stored.crc and zlib.crc32(stored.content.data) != stored.crc:
        raise ValueError(f"{name} does not match its checksum")


def _read(path: Path, name: str, tensor: Tensor, file: _File, checked: set[str]) -> np.ndarray:
    key = tensor.storage.key
    with reading(path, f"the tensor {name!r}"):
        stored = _stored(file, tensor)
        if key not in checked:
            _check_crc(stored, f"storage {key}")
            checked.add(key)
        view = _view(tensor, stored)
        if not file.swapped:
            return view
        # numpy swaps its own types; of others there are one of two bytes and some of one.
        own = view.dtype if view.dtype.kind in "biufc" else np.dtype(f"u{view.dtype.itemsize}")
        return view.view(own.newbyteorder(">")).astype(own).view(tensor.dtype)


def _view(tensor: Tensor, stored: _Stored) -> np.ndarray:
    """Returns a tensor as a view of its storage; raises ValueError where it leaves that."""
    storage, width = tensor.storage, tensor.dtype.itemsize
    start = storage.start * storage.dtype.itemsize
    content = stored.content[start:][: storage.numel * storage.dtype.itemsize]
    if not all(tensor.shape):
        return np.empty(tensor.shape, tensor.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    end = tensor.offset + 1 + sum((size - 1) * stride for size, stride in steps)
    if end * width > len(content):
        raise ValueError(f"its {end} numbers should fit into {len(content)} bytes")
    values = content[tensor.offset * width : end * width].view(tensor.dtype)
    strides = [stride * width for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
