"""Files that can be built again: where they lie, what they are called, how they are written."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


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
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return result
