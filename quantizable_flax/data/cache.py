"""Files that can be built again: where they lie, what they are called, how they are written."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")
_log = logging.getLogger(__name__)


def cache_dir(data_cfg: ConfigDict) -> Path:
    """Returns data.cache_dir, or the user's cache folder where that is None."""
    if data_cfg.cache_dir:
        return Path(data_cfg.cache_dir).expanduser()
    return user_cache_dir()


def user_cache_dir() -> Path:
    """Returns our folder among the caches of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "quantizable_flax"


def cache_key(description: dict) -> str:
    """Returns 32 hexadecimal digits that change with anything in `description`."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process after the other build `path`, on all hosts where its folder is shared.

    Each looks again whether it is there when its turn has come. The lock ends with its process;
    where the file system has none, all build, which costs only their time.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a+")
    except OSError:  # a folder to read from
        yield
        return
    with stream:
        _lock(stream, path)
        try:
            yield
        finally:
            # Those who wait hold the same file; who comes later finds what was built, or builds.
            lock.unlink(missing_ok=True)


def _lock(stream: TextIO, path: Path) -> None:
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            who = stream.read() or "another process"
            _log.warning("waiting for %s, which is building %s", who, path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()


def write_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Calls `write` with a temporary file that takes the name `path` once it is complete.

    A build that is killed leaves no `path`; builds at the same time do not disturb each other.
    Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w+b") as stream:
            result = write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # else a crash of the system could leave holes under the name
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return result
