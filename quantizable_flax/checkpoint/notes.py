"""What stands beside the arrays of a checkpoint, and where a workdir is."""

import os
from importlib import metadata
from typing import Any, NamedTuple

from etils import epath

from quantizable_flax.errors import UserError

FOLDER = "checkpoints"
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "aqtp", "grain", "tokenizers")


class Notes(NamedTuple):
    """The JSON items of a checkpoint.

    Attributes:
      data: position of the data iterator.
      config: the configuration as nested dicts.
      assets: what the data side needs again, see `data.task.Task.assets`.
      info: `step`, `train_seconds`, `versions`, and `training_data`, their `Task.fingerprint`.
    """

    data: dict[str, Any]
    config: dict[str, Any]
    assets: dict[str, Any]
    info: dict[str, Any]


def absolute(path: str) -> epath.Path:
    """Returns a local path made absolute, as Orbax needs it, or a bucket's (gs://...) as it is.

    Raises:
      UserError: a bucket, and the package that reaches it is not installed; or a path that is not
        Unicode in the locale of this process, which no library would find.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:  # bytes that the locale of this process does not know
        raise UserError(
            f"the path {os.fsencode(path).decode('utf-8', 'replace')} cannot be spelled in the "
            "locale of this process: set PYTHONUTF8=1, or choose a path of ASCII letters."
        ) from error
    try:
        epath.Path(path).exists()
    except (ImportError, KeyError) as error:
        raise UserError(
            f"{path} cannot be reached ({error}): install gcsfs and google-cloud-storage for "
            "gs://, and write a local path without a scheme."
        ) from error
    return epath.Path(path) if "://" in str(path) else epath.Path(path).expanduser().resolve()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    return {name: metadata.version(name) for name in VERSIONED}


def split_step(path: epath.Path) -> tuple[epath.Path, int | None]:
    """Returns (workdir, step) of the folder of one step, or (path, None) for a workdir."""
    if path.name.isdigit() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    return path, None
