"""What the files of tests/make_torch_files.py hold, and files of the old format piece by piece."""

import pickle
import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantizable_flax.errors import UserError

GOLDENS = Path(__file__).parents[1] / "goldens"
STATE_DICTS = ("torch_zip.bin", "torch_legacy.bin", "torch_protocol4.bin")
MALICIOUS = ("torch_malicious_zip.bin", "torch_malicious_legacy.bin")
MAGIC = 0x1950A86A20F9469CFC6C


def state_dict(file: str = "torch_zip.bin") -> dict[str, np.ndarray]:
    """The tensors of one of STATE_DICTS."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
    newer = {} if "legacy" in file else {"unsigned": np.array([0, 65535], np.uint16)}
    return newer | {
        "whole": base,
        "transposed": base.T,
        "row": base[2],
        "column": base[:, 1],
        "block": base[1:3, 2:5],
        "tied": base,
        "parameter": np.array([0.25, 0.25], np.float32),
        "expanded": np.full((2, 3), 7, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.array([0, 0.5, 1, 1.5, 2], np.float16),
        "bfloat16": np.array([-2.5, -1.5, -0.5, 0.5, 1.5], ml_dtypes.bfloat16),
        "double": np.array(-3.5),
        "long": np.array([-1, 0, 1]),
        "int": np.array([-2, -1, 0], np.int32),
        "byte": np.array([0, 255], np.uint8),
        "bool": np.array([True, False, True]),
    }


def small() -> dict[str, np.ndarray]:
    """The tensors of the checkpoints."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {"weight": weight, "bias": np.ones(2, np.float32)}


def assert_same(given, expected) -> None:
    """Asserts equal names, types, shapes and numbers."""
    assert set(given) == set(expected)
    assert len(given) == len(expected)
    for name, array in expected.items():
        assert given[name].dtype == array.dtype, name
        assert given[name].shape == array.shape, name
        np.testing.assert_array_equal(given[name], array, err_msg=name)


def touch(weights) -> None:
    """Reads every tensor, of which a file may claim any size."""
    for tensor in weights.values():
        tensor.ravel()[:100].copy()


def expect_error(read, path, pattern) -> None:
    """Asserts that reading a file and its tensors gives one sentence that names it."""
    with pytest.raises(UserError, match=pattern) as caught:
        touch(read(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def refusals(read, path, content: bytes) -> int:
    """The number of damaged files that are refused: cut at many places, changed at others."""
    draw = random.Random(7)
    files = [content[:end] for end in range(0, len(content), max(1, len(content) // 150))]
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            changed[draw.randrange(len(content))] = draw.randrange(256)
        files.append(bytes(changed))
    refused = 0
    for damaged in files:
        path.write_bytes(damaged)
        try:
            touch(read(path))
        except UserError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
    return refused


def legacy(value: bytes, **storages: np.ndarray) -> bytes:
    """A file from before PyTorch 1.6: the value as a pickle, and its storages."""
    head = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
    keys = pickle.dumps([name.strip("_") for name in storages], 2)
    tail = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return b"".join([*head, value, keys, *tail])


def tensor(*, numel=4, offset=0, shape=(2,), strides=(1,), kind=b"FloatStorage", rest=b""):
    """A state dict of one tensor, as a pickle."""

    def numbers(values):
        return b"(" + b"".join(pickle.dumps(x, 2)[2:-1] for x in values) + b"t"

    storage = b"(U\x07storagectorch\n" + kind + b"\nU\x010U\x03cpuJ" + numel.to_bytes(4, "little")
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ"
    return (
        b"\x80\x02}U\x01x" + call + pickle.dumps(offset, 2)[2:-1] + numbers(shape)
        + numbers(strides) + b"\x89}" + rest + b"tRs."
    )  # fmt: skip
