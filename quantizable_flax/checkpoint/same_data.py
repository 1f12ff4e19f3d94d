"""Whether a run that continues has the training data that it began with."""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from quantizable_flax.data.fingerprint import difference
from quantizable_flax.data.task import Task
from quantizable_flax.errors import UserError

KEY = "training_data"
# Where the data are.
PLACES = ("data.files", "data.source")


def check(info: Mapping[str, Any], task: Task, workdir: epath.Path) -> None:
    """Raises UserError if the data of `task` are others than those of a checkpoint's `info`.

    A checkpoint of an earlier version does not tell.
    """
    saved = info.get(KEY)
    if saved is None:
        return
    found = difference(saved, task.fingerprint, task.unit)
    if found is None:
        return
    told, advice = found
    raise UserError(f"{workdir} holds a run on {told}: {advice}, or give a new --workdir.")


def agree(key: str, old: Mapping[str, Any], new: Mapping[str, Any], *, data_known: bool) -> bool:
    """Whether a key of `data` says where the same data or the same tokenizer may lie.

    Args:
      key: of the configuration, with dots.
      old: keys and values of the run.
      new: those asked for.
      data_known: whether the checkpoint tells what the data hold, for `check`.
    """
    before, after = old.get(key), new.get(key)
    if key in PLACES:
        return data_known or _paths(before) == _paths(after)
    # A file that is named is compared with the tokenizer of the checkpoint itself.
    if key == "data.tokenizer.file":
        return True
    if key != "data.tokenizer.lowercase":
        return False
    if old.get("data.tokenizer.file") or new.get("data.tokenizer.file"):
        return None in (before, after)
    return (before is False) == (after is False)  # unset, a trained tokenizer lower-cases


def _paths(value: str | None) -> list[str]:
    parts = [part.strip() for part in (value or "").split(",")]
    return [os.path.realpath(os.path.expanduser(part)) for part in parts if part]
