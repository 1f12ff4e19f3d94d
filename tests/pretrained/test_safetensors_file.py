"""Files of safetensors: damage is told, and what is written is there whole or not at all."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.files import read_weights
from quantizable_flax.pretrained.safetensors_file import write_safetensors
from tests.pretrained.torch_files import assert_same, refusals, state_dict

ONE = {"a": np.ones((2, 3), np.float32), "b": np.array(2, np.float16)}
TWO = {"c": np.arange(3), "d": np.array([1.5, -2], ml_dtypes.bfloat16)}


def test_damage_of_safetensors_gives_one_sentence_or_other_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, ONE | TWO)
    assert refusals(read_weights, path, path.read_bytes()) > 150  # all that were cut


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = state_dict() | {"big_endian": np.arange(3, dtype=">f4")}
    write_safetensors(path, tensors, {"by": "us"})
    del tensors["tied"]  # one array with `whole`
    assert_same(read_weights(tmp_path), tensors | {"big_endian": np.arange(3, dtype=np.float32)})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # as the umask says


def test_a_file_may_be_written_over_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, ONE)
    before = read_weights(path)
    write_safetensors(path, {"a": -ONE["a"]})
    assert_same(before, ONE)
    write_safetensors(path, read_weights(path))
    assert_same(read_weights(path), {"a": -ONE["a"]})


def test_arrays_that_are_equal_but_not_one_are_both_written(tmp_path):
    base = np.arange(6, dtype=np.float32)
    tensors = {
        "first": base,
        "same": base[:],
        "equal": base.copy(),
        "start": base[:3],
        "shaped": base.reshape(2, 3),
        "bits": base.view(np.int32),
        "empty": base[:0],
        "also_empty": base[:0],
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    del tensors["same"]
    assert_same(read_weights(tmp_path), tensors)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, ONE)
    for wrong in (np.array(["a"]), np.array([None]), np.ones(2, np.longdouble)):
        with pytest.raises(UserError, match=f"tensor 'x', to be written to {path}, found "):
            write_safetensors(path, TWO | {"x": wrong})
    with pytest.raises(UserError, match=r"to write .*, found 'No such file or directory'"):
        write_safetensors(tmp_path / "nowhere" / "model.safetensors", TWO)

    def full(_, path, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="found 'No space left on device'"):
        write_safetensors(path, TWO)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert_same(read_weights(tmp_path), ONE)
