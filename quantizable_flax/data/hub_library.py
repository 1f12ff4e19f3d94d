"""The library of the Hugging Face hub: how a dataset is opened, and what may go wrong then."""

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from quantizable_flax.data.cache import cache_key
from quantizable_flax.errors import UserError, nearest

HUB = "hf:"


class Opened(NamedTuple):
    """A dataset.

    Attributes:
      splits: by name, each a `datasets.Dataset` that is mapped from disk.
      stamp: what its files are, where the fingerprints of the splits do not tell it.
    """

    splits: Mapping[str, Any]
    stamp: str


def library() -> Any:
    """Returns the package `datasets`; raises UserError where it is not installed."""
    try:
        import datasets  # Slow, and only some runs need it.
    except ImportError:
        raise UserError(
            "expected the package datasets for data.source='hf:NAME' and for parquet files, found "
            "it not installed; run: pip install 'quantizable_flax[hub]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


@functools.cache
def opened(name: str) -> Opened:
    """Returns a dataset, which is fetched and built first where it is not in the library's cache.

    Args:
      name: `NAME` or `NAME,CONFIG`; NAME is one of the hub, a folder that holds a dataset as the
        hub does, or one that `save_to_disk` wrote.

    Raises:
      UserError: a dataset or configuration that is not there, cannot be reached or cannot be read.
    """
    path, config = (part.strip() for part in (*name.split(",", 1), "")[:2])
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        return _of_folder(os.path.abspath(folder), path, config)
    if os.path.exists(folder):
        raise UserError(
            f"expected a folder or a name behind {HUB} in data.source, found the file {path}; "
            "name it in data.files, or the folder that it lies in"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"expected a dataset in the folder {path} of data.source, found nothing there; "
            "correct the path"
        )
    return _prepared(path, path, config)


def _of_folder(folder: str, path: str, config: str) -> Opened:
    hf = library()
    if not _has(folder, "dataset_dict.json", "state.json"):  # what save_to_disk leaves
        return _prepared(folder, path, config, _stamp(folder))
    if config:
        raise UserError(
            f"expected no configuration of {path}, which save_to_disk wrote, found {config!r}; "
            f"write {HUB}{path}"
        )
    try:
        saved = hf.load_from_disk(folder)
    except Exception as error:  # whatever its readers of JSON and Arrow raise
        raise _unreadable(path, error) from None
    return Opened({"train": saved} if isinstance(saved, hf.Dataset) else saved, "")


def _has(folder: str, *names: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


def _stamp(folder: str) -> str:
    """Returns what changes with every file of a folder that lists its files by configuration.

    Of those the library's cache does not look at times, and would give what they once held.
    """
    if not _has(folder, "README.md", ".huggingface.yaml"):
        return ""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # git writes there
        for path in (os.path.join(parent, name) for name in names):
            if os.path.exists(path):  # a link may lead nowhere
                stat = os.stat(path)
                files[os.path.relpath(path, folder)] = [stat.st_size, stat.st_mtime_ns]
    return cache_key(files)


def _prepared(place: str, path: str, config: str, stamp: str = "") -> Opened:
    """Returns what is in the library's cache, fetched and built first where it is not."""
    hf = library()
    cache = os.path.join(hf.config.HF_DATASETS_CACHE, stamp) if stamp else None
    try:
        builder = hf.load_dataset_builder(place, config or None, cache_dir=cache)
        if builder.repo_id is None and not os.path.isdir(place):  # it would read any files here
            raise hf.exceptions.DatasetNotFoundError(f"{path} is the name of a format")
        builder.download_and_prepare()
        return Opened(builder.as_dataset(), stamp)
    except hf.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"expected a dataset in the folder {path} or of this name on the Hugging Face hub, "
            f"found neither ({_first_line(error)}); correct the name, or, where it is gated, run: "
            "hf auth login"
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"expected the dataset {path} in a folder, in the cache of the Hugging Face hub or on "
            f"it, found none ({_first_line(error)}); correct the name, or fetch it where there is "
            "a network and set HF_HOME to that cache"
        ) from None
    except Exception as error:  # A hundred formats, each with exceptions of its own.
        if isinstance(error, ValueError):
            _check_config(place, path, config)
        raise _unreadable(path, error) from None


def _check_config(place: str, path: str, config: str) -> None:
    """Raises UserError unless a dataset has the configuration, or just one."""
    try:
        names = library().get_dataset_config_names(place)
    except Exception:  # then the first error tells it
        return
    if config not in names and (config or len(names) > 1):
        found = repr(config) if config else "none"
        raise UserError(
            f"expected a configuration of the dataset {path}, found {found}"
            f"{nearest(config, names)}; write {HUB}{path},CONFIG with one of {', '.join(names)}"
        )


def _unreadable(path: str, error: Exception) -> UserError:
    cause = error.__cause__ or error  # the library says only that something happened
    return UserError(
        f"expected to be able to read the dataset {path}, found {type(cause).__name__} "
        f"({_first_line(cause)}); correct its files or its configuration ({HUB}NAME,CONFIG), or "
        "fetch it again"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
