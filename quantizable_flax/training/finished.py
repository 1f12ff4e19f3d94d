"""Finished models to begin with: a run of ours, or a published model's folder."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.checkpoint import resume, store
from quantizable_flax.checkpoint.load import existing
from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.folder import HUB, is_published, read_folder, read_folder_config
from quantizable_flax.ptq.trained import learns_ranges

# From the configuration there and the tree of shapes to shardings; what it raises is raised.
Place = Callable[[ConfigDict, Any], Any]


class Finished(NamedTuple):
    """A finished model.

    Attributes:
      config: its configuration.
      params: its parameters where `Place` wants them, float32.
      assets: its tokenizer, or the names of its classes.
    """

    config: ConfigDict
    params: Any
    assets: dict[str, Any]


def read_finished(path: str, place: Place) -> Finished:
    """Reads the newest readable checkpoint of a run, or one step of it, or a published model.

    Raises:
      UserError: nothing readable there, or an INT8 model.
    """
    if is_published(path):
        found = read_folder(path)
        shardings = place(found.config, found.params)
        return Finished(found.config, jax.tree.map(_put, found.params, shardings), found.assets)

    def read(workdir: epath.Path, step: int) -> Finished:
        notes = store.read_notes(workdir, step)
        resume.check_trainable(notes.info, workdir)
        config = configuration.from_dict(notes.config)
        params = store.restore_params(workdir, step, lambda shapes: place(config, shapes))
        return Finished(config, params, notes.assets)

    return resume.read_path(existing(path), read)


def read_finished_config(path: str) -> ConfigDict:
    """Reads its configuration alone and touches no device: recipes are read before hosts meet.

    Raises:
      UserError: as `read_finished`, or a run with learned grids, which hold for its weights alone.
    """
    if is_published(path):
        return read_folder_config(path)
    workdir, step = store.split_step(existing(path))
    known = store.saved_steps(workdir)
    if not known:
        raise UserError(
            f"{workdir} holds no finished checkpoint: give the workdir of a run, or the folder of "
            "a published model."
        )
    folder = workdir / store.FOLDER / str(known[0] if step is None else step)
    try:
        # As Orbax writes an item of JSON; its readers ask for devices.
        values, info = (
            json.loads((folder / name / "metadata").read_text()) for name in ("config", "info")
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint in {folder} cannot be read ({type(error).__name__}): give the folder "
            "of another step."
        ) from error
    resume.check_trainable(info, workdir)
    config = configuration.from_dict(values)
    if learns_ranges(config):
        raise UserError(
            f"{workdir} holds a run with learned grids, which fit its own weights alone: start "
            "from a run in floating point."
        )
    return config


def absolute_name(path: str) -> str:
    """The path made absolute; a name on the hub stays one."""
    return path if path.startswith(HUB) else str(store.absolute(path))


def _put(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, as one of all processes."""
    whole = np.array(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
