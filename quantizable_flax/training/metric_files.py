"""Metrics in files: `metrics.jsonl`, and event files of TensorBoard."""

import json
import logging
import math
import os
import platform
import time
from typing import Any, NamedTuple

from etils import epath

from quantizable_flax.runtime.workdir import content_of, cut, reason_of
from quantizable_flax.training import events
from quantizable_flax.training.appended import Appended

logger = logging.getLogger(__name__)


class Restart(NamedTuple):
    """Where a run begins again; what an earlier process logged beyond is going to be logged again.

    Attributes:
      step: of the checkpoint that it continues, 0 for none.
      telemetry: whether it takes telemetry there, before its first step.
    """

    step: int
    telemetry: bool

    def keeps(self, step: int, group: str) -> bool:
        """Whether metrics logged before stay."""
        again = step == self.step and group == "telemetry" and self.telemetry
        return step <= self.step and not again


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files under the workdir.

    Without a workdir it writes nothing, as on all hosts but the first. Storage that cannot be
    written is one warning: metrics wait for it, and no run ends for them.
    """

    def __init__(self, workdir: epath.Path | None, restart: Restart | None = None):
        """Touches nothing yet.

        Args:
          workdir: of the run.
          restart: what to drop of earlier metrics before the first are written; None for nothing.
        """
        self._off = workdir is None
        if workdir is None:
            return
        self._restart, self._path, self._step = restart, workdir, 0
        self._failing: set[str] = set()  # of the two files
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._jsonl = Appended(workdir / "metrics.jsonl", self._drop_lines, self._outcome)
        folder = workdir / "tensorboard"
        self._events = Appended(folder / name, self._drop_events, self._outcome)
        self._has_header = False

    def write(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Appends one line `{"step", "group", **values}`; floats and lists of floats."""
        if self._off:
            return
        self._step = step
        line = {"step": step, "group": group, **{k: _json_number(v) for k, v in values.items()}}
        self._jsonl.write(json.dumps(line).encode() + b"\n")
        if not self._has_header:
            self._events.write(events.header())
            self._has_header = True
        self._events.write(events.scalars(step, group, values))

    def close(self) -> None:
        """Closes both files; never fails."""
        if self._off:
            return
        lost, _ = self._jsonl.close(), self._events.close()
        if lost:
            logger.warning("%d lines of metrics could not be written to %s.", lost, self._path)

    def _outcome(self, path: epath.Path, error: Exception | None) -> None:
        if error is not None and not self._failing:
            logger.warning(
                "metrics are not written from step %d on (%s): they wait until %s can be written "
                "again, and the run goes on.",
                *(self._step, reason_of(error), self._path),
            )
        if error is not None:
            self._failing.add(path.name)
        else:
            self._failing.discard(path.name)

    def _drop_lines(self, path: epath.Path) -> None:
        content = content_of(path)
        if self._restart is None or content is None:
            return
        whole = content.split(b"\n")[:-1]  # behind the last end of a line is half of one
        cut(path, content, b"".join(line + b"\n" for line in whole if self._keeps_line(line)))

    def _keeps_line(self, line: bytes) -> bool:
        assert self._restart is not None
        try:
            values = json.loads(line)
        except ValueError:
            return False  # half of one, with another behind it
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            return True  # somebody else's
        return self._restart.keeps(values["step"], values.get("group", ""))

    def _drop_events(self, path: epath.Path) -> None:
        if self._restart is None:
            return
        # Files are named by the time they were begun at.
        earlier = (file for file in path.parent.iterdir() if ".tfevents." in file.name)
        for file in sorted(earlier, key=lambda file: file.name, reverse=True):
            content = content_of(file) or b""
            kept, some = events.without(content, self._restart.keeps)
            cut(file, content, kept)
            if some and kept == content:
                return  # what is older ended before this file was begun


def _json_number(value: Any) -> Any:
    """NaN and infinity are not JSON; they become strings so that every line can be read."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
