"""A workdir that cannot be written is said so before anything is compiled."""

import sys

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.errors import UserError
from quantizable_flax.runtime.workdir import check_writable
from quantizable_flax.training.loop import train
from tests import compiled
from tests.tiny import tiny_config


class ReadOnlyBucket(MemoryFileSystem):
    """A storage that lists and refuses to write, with an error of its own."""

    protocol = "gcs"
    cachable = False

    def __init__(self, **_):
        super().__init__()

    def exists(self, path, **_):
        return path.rstrip("/") == "gs://bucket"

    isdir = exists

    def open(self, path, mode="rb", **_):
        raise RuntimeError("403: storage.objects.create access is denied.\nRequest ID: 1")


@pytest.fixture
def bucket():
    fsspec.register_implementation("gcs", ReadOnlyBucket, clobber=True)
    filesystem = backend.fsspec_backend._get_filesystem
    filesystem.cache_clear()
    yield epath.Path("gs://bucket/folder/run")
    sys.modules["fsspec.registry"]._registry.pop("gcs", None)
    filesystem.cache_clear()


def test_bucket_without_permission(bucket, tmp_path):
    message = r"gs://bucket/folder/run cannot be written \(403: .* denied\.\): give this account"
    with compiled.counted() as programs, pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path), str(bucket))
    assert programs == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file is no folder\): give this account"):
        check_writable(epath.Path(tmp_path / "file" / "run"))


def test_nothing_is_left_behind(tmp_path):
    check_writable(epath.Path(tmp_path / "not" / "there" / "yet"))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_the_locale_cannot_spell_is_said_to_be_that():
    """Its checkpoints are sound, but no library would find them."""
    path = "runs/m\u00fcde".encode().decode("ascii", "surrogateescape")
    with pytest.raises(
        UserError, match=r"the path runs/m\u00fcde cannot be spelled .* PYTHONUTF8=1"
    ):
        load_run(path)


def test_a_kernel_of_other_hardware_leaves_no_workdir(tmp_path):
    config = tiny_config(tmp_path, "bert", train__attention_kernel="cudnn")
    with pytest.raises(UserError, match="attention_kernel=cudnn: needs a GPU, found cpu"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
