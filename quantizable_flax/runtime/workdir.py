"""Small files of a workdir: whether they can be written at all, and how they are replaced."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.errors import UserError

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(workdir: epath.Path, flag: str = "--workdir") -> None:
    """Raises UserError unless files can be written below the workdir, which need not exist yet.

    Writes and deletes a small file in the nearest folder that exists; in a bucket that is the
    bucket itself at the latest.
    """
    try:
        folder = workdir
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        probe = folder / f".writable_{uuid.uuid4().hex}"
        try:
            probe.write_text("one byte at least, for a disk may be full")
        finally:
            probe.unlink(missing_ok=True)
    except Exception as error:  # every storage library has its own
        raise UserError(unwritable(workdir, error, flag)) from error


def unwritable(workdir: epath.Path, error: Exception, flag: str = "--workdir") -> str:
    """A sentence about a workdir that cannot be written."""
    advice = "give this account the right to read, write and delete there"
    if getattr(error, "errno", None) in FULL:
        advice = "make room there"
    return (
        f"{flag}={workdir} cannot be written ({reason_of(error)}): {advice}, or choose "
        f"another {flag}."
    )


def check_ours(workdir: epath.Path) -> None:
    """Raises UserError if the files that a new run writes are there and are not a run's."""
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        ours = {"model", "data", "optimizer", "train"} <= set(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{file} is there and is not of a training run, it would be overwritten: choose an "
            "empty --workdir."
        )


def describe(workdir: epath.Path, config: ConfigDict, assets: Mapping[str, Any]) -> None:
    """Writes what people may want to read: `config.json`, and a file for each asset.

    Checkpoints hold the same, so that it may fail with no more than a warning.
    """
    texts = {"config": configuration.to_json(config)}
    for name, value in assets.items():
        texts[name] = json.dumps(value, ensure_ascii=False)
    for name, text in texts.items():
        file = workdir / f"{name}.json"
        try:
            replace(file, text.encode("utf-8", "backslashreplace"))  # so JSON writes a surrogate
        except Exception as error:  # every storage library has its own
            logger.warning("%s could not be written (%s).", file, reason_of(error))


def reason_of(error: Exception) -> str:
    """What a storage has said, in one line."""
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return reason.splitlines()[0][:200]


def replace(path: epath.Path, content: bytes) -> None:
    """Writes a whole file; whoever reads it, now or after a crash, finds the old one or the new."""
    if "://" in str(path):
        path.write_bytes(content)  # an object appears when it is complete
        return
    path = path.resolve()
    # Nobody else writes here: a run has its workdir for itself.
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def content_of(path: epath.Path) -> bytes | None:
    """What a file holds; None if there is none, or a device or a pipe, which may never end."""
    if "://" in str(path):
        return path.read_bytes() if path.is_file() else None
    return path.read_bytes() if os.path.isfile(path) else None


def cut(path: epath.Path, content: bytes, kept: bytes) -> None:
    """Leaves the bytes `kept` of a file that holds `content`; in place where only its end goes."""
    if kept == content:
        return
    if content.startswith(kept) and "://" not in str(path):
        os.truncate(path, len(kept))  # needs no room on a full disk
    else:
        replace(path, kept)
