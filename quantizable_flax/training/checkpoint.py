"""Checkpoints that explain themselves; the only file that imports orbax.

A step's folder holds the items `params`, `opt_state`, `data` (position of the input), `config`,
`assets` (the tokenizer, or the names of the classes) and `info` (step, seconds, versions): Orbax
alone can read each of them.
"""

from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from quantizable_flax.errors import UserError
from quantizable_flax.training.step import TrainState

FOLDER = "checkpoints"
JSON_ITEMS = ("data", "config", "assets", "info")
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "aqtp", "grain", "tokenizers")


class Notes(NamedTuple):
    """The JSON items of a checkpoint.

    Attributes:
      data: position of the data iterator.
      config: the configuration as nested dicts.
      assets: what the data side needs again, see `data.task.Task.assets`.
      info: `step`, `train_seconds`, `versions`.
    """

    data: dict[str, Any]
    config: dict[str, Any]
    assets: dict[str, Any]
    info: dict[str, Any]


def absolute(path: str) -> epath.Path:
    """Returns a local path made absolute, as Orbax needs it, or a bucket's (gs://...) as it is.

    Raises:
      UserError: a bucket, and the package that reaches it is not installed.
    """
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


class Checkpoints:
    """Asynchronous checkpoints of one workdir, the last `keep` of them."""

    def __init__(self, workdir: epath.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = workdir / FOLDER
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: TrainState, notes: Notes) -> None:
        """Starts to write the state of `state.step`; a failure surfaces at the next call."""
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            **{name: ocp.args.JsonSave(getattr(notes, name)) for name in JSON_ITEMS},
        }
        self._manager.save(notes.info["step"], args=ocp.args.Composite(**items))

    def set_aside(self, step: int) -> None:
        """Moves a damaged step's folder out of the way, to `damaged/`, and forgets it."""
        target = self._folder.parent / "damaged" / str(step)
        number = 0
        while target.exists():
            number += 1
            target = self._folder.parent / "damaged" / f"{step}-{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        (self._folder / str(step)).rename(target)
        self._manager.reload()

    def wait(self) -> None:
        """Waits for the write in flight."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the write in flight and releases the workdir."""
        self.wait()
        self._manager.close()


def save_params(workdir: epath.Path, params: Any, notes: Notes) -> None:
    """Writes a checkpoint to be loaded, not trained on: parameters and notes alone."""
    items = {
        "params": ocp.args.StandardSave(params),
        **{name: ocp.args.JsonSave(getattr(notes, name)) for name in JSON_ITEMS},
    }
    with ocp.CheckpointManager(workdir / FOLDER) as manager:
        manager.save(notes.info["step"], args=ocp.args.Composite(**items))


def saved_steps(workdir: epath.Path) -> list[int]:
    """Steps with a finished checkpoint, newest first."""
    folder = workdir / FOLDER
    if not folder.exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder), reverse=True)


def read_notes(workdir: epath.Path, step: int) -> Notes:
    """Reads the JSON items of one step; raises whatever the damage makes Orbax raise."""
    folder = workdir / FOLDER / str(step)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        if (folder / "tokenizer").exists():  # of a version that had no other assets
            items = {name: reader.restore(folder / name) for name in ("data", "config", "info")}
            return Notes(assets={"tokenizer": reader.restore(folder / "tokenizer")}, **items)
        return Notes(**{name: reader.restore(folder / name) for name in JSON_ITEMS})


def restore_state(workdir: epath.Path, step: int, like: TrainState) -> TrainState:
    """Reads one step into the shapes, dtypes and shardings of `like`."""
    folder = workdir / FOLDER / str(step)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    with ocp.StandardCheckpointer() as reader:
        params, opt_state = (
            reader.restore(folder / name, jax.tree.map(abstract, getattr(like, name)))
            for name in ("params", "opt_state")
        )
    count = jax.device_put(np.int32(step), like.step.sharding)
    return TrainState(count, params, opt_state)


def restore_params(workdir: epath.Path, step: int) -> Any:
    """Reads the parameters of one step alone, on this process's first device."""
    folder = workdir / FOLDER / str(step) / "params"
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # The handler, not the checkpointer: that one looks for step metadata in an item's folder.
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, like)
