"""Coming back to a run: the newest checkpoint that can be read, and whether it may go on."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from etils import epath

from quantizable_flax import config as configuration
from quantizable_flax.checkpoint import same_data
from quantizable_flax.checkpoint.store import saved_steps, split_step
from quantizable_flax.errors import UserError
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.quiet import Quiet

logger = logging.getLogger(__name__)

T = TypeVar("T")


def steps_of_all(workdir: epath.Path) -> list[int]:
    """Returns the saved steps, newest first, as the first process sees them."""
    steps = saved_steps(workdir)
    seen = np.zeros(int(hosts.first_of_all(np.int32(len(steps)))), np.int32)
    seen[: len(steps)] = steps[: len(seen)]
    return hosts.first_of_all(seen).tolist()


_SOUND, _REFUSED, _DAMAGED = 0, 1, 2


def _read_by_all(read: Callable[[int], T], step: int) -> T:
    """Calls read(step) on every process; what one of them cannot read, none has read.

    Raises:
      UserError: as `read` does on any process.
      Exception: as `read`, or that another process found damage.
    """
    result: T | None = None
    failure: Exception | None = None
    state = _SOUND
    try:
        with Quiet():
            result = read(step)
    except UserError as error:
        failure, state = error, _REFUSED
    except Exception as error:  # damage shows as many exception types of several libraries
        failure, state = error, _DAMAGED
    states = hosts.gathered(np.int32(state))
    if failure is not None and state == states.max():
        raise failure
    if states.max() == _SOUND:
        return cast(T, result)
    which = ", ".join(map(str, np.flatnonzero(states == states.max())))
    if states.max() == _REFUSED:
        raise UserError(f"process {which} refused the checkpoint of step {step}, see its message.")
    raise OSError(f"process {which} could not read it")


def newest_readable(workdir: epath.Path, read: Callable[[int], T]) -> tuple[int, T, list[int]]:
    """Returns (step, `read(step)`, damaged newer steps) for the newest step that can be read.

    Args:
      workdir: the run.
      read: called with a step; any exception but UserError counts as damage.

    Raises:
      UserError: no checkpoint, or none that can be read.
    """
    steps = steps_of_all(workdir)
    if not steps:
        raise UserError(
            f"{workdir} holds no finished checkpoint: give the --workdir of a training run."
        )
    damaged: list[int] = []
    for step in steps:
        try:
            return step, _read_by_all(read, step), damaged
        except UserError:
            raise
        except Exception as error:
            damaged.append(step)
            older = [s for s in steps if s < step]
            then = f"falling back to step {older[0]}" if older else "no older one is left"
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            logger.warning(
                "the checkpoint of step %d in %s is damaged (%s: %s); %s.",
                step,
                workdir,
                type(error).__name__,
                reason,
                then,
            )
    raise UserError(
        f"none of the checkpoints in {workdir} can be read (steps "
        f"{', '.join(map(str, steps))} are damaged): restore them from a copy, or start in a new "
        "--workdir."
    )


def newest_if_sound(workdir: epath.Path, read: Callable[[int], T]) -> T | None:
    """Returns `read(step)` of the newest step; None where there is none or it is damaged.

    Raises UserError as `read` does.
    """
    steps = steps_of_all(workdir)
    try:
        return _read_by_all(read, steps[0]) if steps else None
    except UserError:
        raise
    except Exception:  # damage, which is told where the state is restored
        return None


def read_step(workdir: epath.Path, step: int, read: Callable[[int], T]) -> T:
    """Returns `read(step)` of one asked step, without falling back.

    Raises:
      UserError: no such step, or it is damaged.
    """
    steps = steps_of_all(workdir)
    if step not in steps:
        raise UserError(
            f"{workdir} has no checkpoint of step {step}, it has "
            f"{', '.join(map(str, sorted(steps))) or 'none'}."
        )
    try:
        return _read_by_all(read, step)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the checkpoint of step {step} in {workdir} is damaged ({type(error).__name__}): "
            "load another step, or the workdir for the newest readable one."
        ) from error


def read_path(path: epath.Path, read: Callable[[epath.Path, int], T]) -> T:
    """Returns `read(workdir, step)` of the folder of one step, or of a workdir's newest readable.

    Raises:
      UserError: as `read_step` and `newest_readable`.
    """
    workdir, wanted = split_step(path)
    if wanted is not None:
        return read_step(workdir, wanted, lambda step: read(workdir, step))
    return newest_readable(workdir, lambda step: read(workdir, step))[1]


# Keys of `data` that do not change what a training step sees.
FREE_DATA = ("workers", "cache_dir", "tfds_dir", "eval_crop", "on_corrupt")
# Keys of `optimizer` that decide what its state holds.
OF_STATE = ("name", "muon_parameters")
# Keys of `quant` that leave a run that trains quantized what it is.
FREE_QUANT = (
    "calibration_batches",
    "calibration_batch_size",
    "momentum",
    "percentile",
    "weight_percentile",
    "range_learning_rate",
)


def check_trainable(info: Mapping[str, Any], workdir: epath.Path) -> None:
    """Raises UserError for an exported INT8 model, which holds no weights to train."""
    if "quant" in info:
        raise UserError(
            f"{workdir} holds an exported INT8 model, which cannot be trained on: take the run "
            "that it was exported from, or give a new --workdir."
        )


def check_same(
    saved: Mapping[str, Any],
    asked: Mapping[str, Any],
    workdir: epath.Path,
    *,
    data_known: bool = False,
) -> None:
    """Raises UserError if a run cannot continue with the asked configuration.

    The model, what fixes the order of the data and the kind of optimizer must be those of the
    checkpoint, and so must quantization where it is trained. Keys that its version did not know
    have their defaults. With `data_known`, the checkpoint tells what its data hold and the caller
    compares that, so that they may lie elsewhere.
    """
    saved = configuration.from_dict(saved).to_dict()
    changes = []
    for group in ("model", "seed", "data", "train", "optimizer", "quant"):
        if group == "quant":
            old, new = _of_training(saved), _of_training(asked)
            if old["quant.train"] != new["quant.train"]:  # then no other key needs to be named
                old, new = ({"quant.train": keys["quant.train"]} for keys in (old, new))
        else:
            old, new = (_flatten({group: config[group]}) for config in (saved, asked))
        for key in sorted(old.keys() | new.keys()):
            if not _fixed(key) or same_data.agree(key, old, new, data_known=data_known):
                continue
            # A tuple comes back from JSON as a list.
            before, after = json.dumps(old.get(key)), json.dumps(new.get(key))
            if key == "data.validation_files" and "null" not in (before, after):
                continue  # which files is free; whether there are any decides what training sees
            if before != after:
                changes.append(f"{key}={before}, not {after}")
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        if not data_known and changes[0].startswith(same_data.PLACES):
            more += ", and is of a version that does not tell whether other data are the same"
        raise UserError(
            f"{workdir} holds a run with {'; '.join(changes[:3])}{more}: continue it with its own "
            "configuration or give a new --workdir."
        )


def _fixed(key: str) -> bool:
    group, _, name = key.partition(".")
    if group == "train":
        return name == "batch_size"
    if group == "optimizer":
        return name in OF_STATE
    if group == "quant":
        return name not in FREE_QUANT
    return group != "data" or name not in FREE_DATA


def _of_training(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of quantization that training depends on: all, or that it is off."""
    quant = config.get("quant", {})
    return _flatten({"quant": quant}) if quant.get("train") else {"quant.train": False}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
