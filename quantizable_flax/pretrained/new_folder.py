"""Folders that are written whole: new or empty before, or one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.opening import first_line


def check_new(folder: Path | epath.Path, name: str) -> None:
    """Raises UserError unless nothing is lost by writing to a folder.

    Args:
      folder: a path.
      name: what says it, for the message: `--out=runs/int8`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{name} must be a new or an empty folder, found "
            f"{'files in it' if folder.is_dir() else 'a file'}: name another one."
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the file system refuses while a folder is written into one UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"expected to be able to write the folder {folder}, found '{first_line(error)}': "
            "correct the path, or make room there."
        ) from error
