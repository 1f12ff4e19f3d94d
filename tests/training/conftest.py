"""A bucket in memory that has no appending, and published models to start from."""

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tests.training.tunable import model_folder


class Bucket(MemoryFileSystem):
    """A bucket in memory that can write an object, but not append to it."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs:").removeprefix("gcs:"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), mode
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    epath.backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    Bucket.store.clear()
    yield epath.Path("gs://bucket/run")
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    epath.backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Published folders and their data, made when they are asked for."""
    known: dict = {}

    def get(name: str) -> tuple[str, str]:
        if name not in known:
            known[name] = model_folder(tmp_path_factory.mktemp(name) / "model", name)
        return known[name]

    return get
