"""The weights of folders, whole or in shards, and a sentence for whatever else is there."""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.files import read_weights
from quantizable_flax.pretrained.safetensors_file import write_safetensors
from tests.pretrained.torch_files import (
    GOLDENS,
    assert_same,
    expect_error,
    small,
    state_dict,
)

ONE = {"a": np.ones((2, 3), np.float32), "b": np.array(2, np.float16)}
TWO = {"c": np.arange(3), "d": np.array([1.5, -2], ml_dtypes.bfloat16)}


def sharded(folder, kind="safetensors"):
    """Writes two shards with their index, and returns what they hold."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = [f"{stem}-0000{part}-of-00002.{kind}" for part in (1, 2)]
    if kind == "bin":
        tensors = [small(), state_dict("torch_legacy.bin")]
        shutil.copy(GOLDENS / "torch_deit.bin", folder / names[0])
        shutil.copy(GOLDENS / "torch_legacy.bin", folder / names[1])
    else:
        tensors = [ONE, TWO]
        for name, shard in zip(names, tensors, strict=True):
            save_file(shard, folder / name)
    places = {name: home for home, shard in zip(names, tensors, strict=True) for name in shard}
    write_index(folder, places, f"{stem}.{kind}")
    return tensors[0] | tensors[1]


def write_index(folder, places, name="model.safetensors"):
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{name}.index.json").write_text(json.dumps(content))


@pytest.fixture
def shards(tmp_path):
    sharded(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(kind, tmp_path):
    expected = sharded(tmp_path, kind)
    weights = read_weights(tmp_path)
    assert_same(weights, expected)
    assert "a.b" not in weights
    with pytest.raises(KeyError):
        weights["a.b"]
    assert_same(read_weights(next(tmp_path.glob("*.index.json"))), expected)


def test_the_better_format_and_the_whole_file_are_preferred(tmp_path):
    expected = [sharded(tmp_path, "bin")]
    shutil.copy(GOLDENS / "torch_zip.bin", tmp_path / "pytorch_model.bin")
    expected.append(state_dict())
    expected.append(sharded(tmp_path))
    save_file(ONE, tmp_path / "model.safetensors")
    expected.append(ONE)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        assert_same(read_weights(tmp_path), expected.pop())
        (tmp_path / name).unlink()
    assert_same(read_weights(tmp_path), expected.pop())


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_one_file_by_its_path(suffix, tmp_path):
    path = tmp_path / f"anything.{suffix}"
    shutil.copy(GOLDENS / "torch_lightning.bin", path)
    assert_same(read_weights(path), small())
    expect_error(
        read_weights,
        Path(shutil.move(path, tmp_path / "model.gguf")),
        r"\(.safetensors, .bin, .*gguf;",
    )
    expect_error(read_weights, tmp_path / "nothing", "found nothing there")
    expect_error(read_weights, tmp_path / "nothing.pth", "found nothing there")


def test_shards_that_do_not_fit_their_index(shards):
    first, second = sorted(shards.glob("*.safetensors"))
    places = dict.fromkeys(ONE, first.name) | dict.fromkeys(TWO, second.name)
    write_index(shards, places | {"d": first.name})
    expect_error(read_weights, shards, f"tensor 'd' in .*{first.name} .*none of that name")
    write_index(shards, places)
    save_file(TWO | {"a": ONE["a"]}, second)
    expect_error(
        read_weights, shards, f"'a' in one shard of .*, found it in {first.name} and {second.name}"
    )
    second.unlink()
    expect_error(
        read_weights, shards, f"the shard .*{second.name}, which .* names, found no such file"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "an empty table"),
        ('{"weight_map": []}', "an empty table"),
        ('{"weight_map": ["a"]}', "no attribute 'items'"),
        ('{"weight_map": {"a": 1}}', "'a' lies in 1"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no name of a file here"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no name of a file here"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_an_index_of_another_form(content, reason, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    expect_error(read_weights, tmp_path, f"weight_map .*damaged or cut short .*{reason}")


def test_pointers_of_git_lfs_are_told(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440473133\n"
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"):
        (tmp_path / name).write_text(pointer)
        expect_error(read_weights, tmp_path, f"{name}, found the pointer of Git LFS .*git lfs pull")
    (tmp_path / "model.safetensors").write_text("")
    expect_error(read_weights, tmp_path, "an empty file; fetch")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "found no files; name the folder"),
        (["README.md", "config.json"], "found README.md, config.json; name the folder"),
        ([f"{number}.txt" for number in range(9)], "found 0.txt, .*, 4.txt and others; name"),
        (["tf_model.h5"], r"found those of TensorFlow alone \(tf_model.h5\); fetch or save"),
        (["flax_model.msgpack"], r"of Flax alone \(flax_model"),
        (["model-q4.gguf", "config.json"], r"of GGUF alone \(model-q4.gguf\)"),
        (["onnx/model.onnx", "tf_model.h5"], r"TensorFlow and ONNX alone \(tf_model.h5, onnx/m"),
        (["model.ckpt.index"], "of TensorFlow alone"),
        (["openvino_model.xml", "openvino_model.bin"], "of OpenVINO alone"),
    ],
)
def test_folders_without_weights(files, found, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expect_error(read_weights, tmp_path, found)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.symlink_to(tmp_path / "gone")  # as in a cache of the hub that was cleaned
    expect_error(read_weights, tmp_path, "model.safetensors, found a link that leads nowhere")
    path.unlink()
    path.mkdir()
    expect_error(read_weights, tmp_path, "model.safetensors, found no file")
    path.rmdir()
    save_file(ONE, path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    expect_error(read_weights, tmp_path, "to read .*, found 'Permission denied'; correct")
    monkeypatch.setattr(Path, "iterdir", refuse)
    expect_error(read_weights, tmp_path, "to look into the folder .*, found 'Permission denied'")


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    save_file(ONE, tmp_path / "model.safetensors")
    shutil.copy(GOLDENS / "torch_deit.bin", tmp_path / "other.bin")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    install = r"pip install 'quantizable_flax\[interop\]'$"
    with pytest.raises(UserError, match=install):
        read_weights(tmp_path)
    with pytest.raises(UserError, match=install):
        write_safetensors(tmp_path / "new.safetensors", ONE)
    assert_same(read_weights(tmp_path / "other.bin"), small())
