"""Checkpoints that explain themselves; the only file that imports orbax.

A step's folder holds the items `params`, `opt_state`, `data` (position of the input), `config`,
`assets` (the tokenizer, or the names of the classes) and `info` (step, seconds, versions), after
quantization-aware training with running ranges also `ranges`: Orbax alone can read each of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from quantizable_flax.checkpoint.notes import FOLDER as FOLDER
from quantizable_flax.checkpoint.notes import Notes as Notes
from quantizable_flax.checkpoint.notes import absolute as absolute
from quantizable_flax.checkpoint.notes import library_versions as library_versions
from quantizable_flax.checkpoint.notes import split_step as split_step
from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.errors import UserError
from quantizable_flax.quantization.ranges import Range
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.quiet import Quiet

JSON_ITEMS = ("data", "config", "assets", "info")
Place = Callable[[Any], Any]


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to `stopping`: Orbax's own threads would upset its count of steps."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Asynchronous checkpoints of one workdir: the last `keep`, and each `keep_every`-th step.

    A write that fails surfaces as UserError, at the latest at the next call of `check`.
    """

    def __init__(self, workdir: epath.Path, keep: int, keep_every: int = 0):
        kept: list[ocp.checkpoint_managers.PreservationPolicy]
        kept = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every:
            kept.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._folder = workdir / FOLDER
        self._manager = _Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
            ),
        )
        self._writing: int | None = None  # the step of the last save
        self._quiet = contextlib.ExitStack()  # until it is closed, for good if a write fails
        self._quiet.enter_context(Quiet())

    def save(self, state: TrainState, notes: Notes) -> None:
        """Starts to write the state of `state.step`, once the write before has ended."""
        self.wait()
        items = _items(state.params, notes)
        items["opt_state"] = ocp.args.StandardSave(state.opt_state)
        if state.ranges:
            items["ranges"] = ocp.args.StandardSave(_as_dicts(state.ranges))
        self._writing = notes.info["step"]
        with self._surfacing():
            self._manager.save(self._writing, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises UserError if the last write has failed; does not wait for one in flight."""
        # Orbax's own check_for_errors knows nothing of a failure that its finalizing thread met.
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the write in flight; only then is it a checkpoint.

        Raises:
          UserError: it failed.
        """
        if self._writing is None:
            return
        with self._surfacing():
            self._manager.wait_until_finished()
            if self._writing not in saved_steps(self._folder.parent):
                raise OSError("it was never finished")
        self._writing = None

    @contextlib.contextmanager
    def _surfacing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a file system, reached through several libraries
            step, self._writing = self._writing, None
            self._quiet.pop_all()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            kept = [older for older in saved_steps(self._folder.parent) if older != step]
            rest = f"that of step {kept[0]} is kept" if kept else "there is none before it"
            raise UserError(
                f"the checkpoint of step {step} could not be written ({reason}), {rest}: make room "
                f"for {self._folder.parent} and run the same command again."
            ) from error

    def set_aside(self, step: int) -> None:
        """Moves a damaged step's folder out of the way, to `damaged/`, and forgets it."""
        if hosts.is_first():
            target = self._folder.parent / "damaged" / str(step)
            number = 0
            while target.exists():
                number += 1
                target = self._folder.parent / "damaged" / f"{step}-{number}"
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._folder / str(step)).rename(target)
        hosts.wait_for_all(f"step {step} is set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the write in flight and releases the workdir.

        Raises:
          UserError: the write failed.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # that which `wait` has raised
                self._manager.close()
            self._quiet.close()


def save_params(workdir: epath.Path, params: Any, notes: Notes) -> None:
    """Writes a checkpoint to be loaded, not trained on: parameters and notes alone."""
    with ocp.CheckpointManager(workdir / FOLDER) as manager:
        manager.save(notes.info["step"], args=ocp.args.Composite(**_items(params, notes)))


def _items(params: Any, notes: Notes) -> dict[str, Any]:
    """What every checkpoint holds."""
    return {
        "params": ocp.args.StandardSave(params),
        **{name: ocp.args.JsonSave(getattr(notes, name)) for name in JSON_ITEMS},
    }


def saved_steps(workdir: epath.Path) -> list[int]:
    """Steps with a finished checkpoint, newest first."""
    folder = workdir / FOLDER
    if not folder.exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder), reverse=True)


def read_notes(workdir: epath.Path, step: int) -> Notes:
    """Reads the JSON items of one step; raises whatever the damage makes Orbax raise."""
    folder = workdir / FOLDER / str(step)
    own = _on_its_own()
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=own)
    with ocp.Checkpointer(handler, multiprocessing_options=own) as reader:
        if (folder / "tokenizer").exists():  # of a version that had no other assets
            items = {name: reader.restore(folder / name) for name in ("data", "config", "info")}
            return Notes(assets={"tokenizer": reader.restore(folder / "tokenizer")}, **items)
        return Notes(**{name: reader.restore(folder / name) for name in JSON_ITEMS})


def _on_its_own() -> ocp.options.MultiprocessingOptions:
    """For reading without waiting for other processes: one that finds damage stops early.

    `resume` then lets all agree.
    """
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def restore_state(workdir: epath.Path, step: int, like: TrainState) -> TrainState:
    """Reads one step into the shapes, dtypes and shardings of `like`, waiting for nobody."""
    folder = workdir / FOLDER / str(step)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    with ocp.StandardCheckpointer(multiprocessing_options=_on_its_own()) as reader:

        def restore(name, tree):
            return reader.restore(folder / name, jax.tree.map(abstract, tree))

        params, opt_state = (restore(name, getattr(like, name)) for name in ("params", "opt_state"))
        ranges = like.ranges and _from_dicts(restore("ranges", _as_dicts(like.ranges)))
    # Not by device_put, which waits for other processes to compare the value with theirs.
    count = jax.make_array_from_callback((), like.step.sharding, lambda _: np.int32(step))
    return TrainState(count, params, opt_state, ranges)


def restore_params(workdir: epath.Path, step: int, place: Place | None = None) -> Any:
    """Reads the parameters of one step alone.

    Args:
      workdir: the run.
      step: one of its saved steps.
      place: from the tree of shapes to the tree of shardings; by default all on this process's
        first device. What it raises, this raises.
    """
    return _restore_alone(workdir / FOLDER / str(step) / "params", place)


def restore_ranges(workdir: epath.Path, step: int) -> Any:
    """Reads the running ranges of one step, on the first device too; None if it has none."""
    folder = workdir / FOLDER / str(step) / "ranges"
    return _from_dicts(_restore_alone(folder)) if folder.exists() else None


def _restore_alone(folder: epath.Path, place: Place | None = None) -> Any:
    # The handler, not the checkpointer: that one looks for step metadata in an item's folder.
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = place(tree) if place else jax.tree.map(lambda _: first, tree)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
    with ocp.StandardCheckpointer(multiprocessing_options=_on_its_own()) as reader:
        return reader.restore(folder, like)


def _as_dicts(ranges: Any) -> Any:
    """The ranges as plain dicts, which Orbax reads without knowing their class."""
    return jax.tree.map(
        lambda known: known._asdict(), ranges, is_leaf=lambda x: isinstance(x, Range)
    )


def _from_dicts(ranges: Any) -> Any:
    if ranges.keys() == set(Range._fields):
        return Range(**ranges)
    return {name: _from_dicts(value) for name, value in ranges.items()}
