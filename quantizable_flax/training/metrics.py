"""Metrics out: JSONL and TensorBoard files, a bar on a terminal, plain lines in a log."""

import json
import math
import sys
import time
from typing import Any

import tqdm
from etils import epath
from tensorboardX import SummaryWriter

INPUT_BOUND = " (waiting for data: raise data.workers)"


class Clock:
    """Adds up the seconds spent inside `with clock:`."""

    def __init__(self):
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self._seconds += time.monotonic() - self._began

    def take(self) -> float:
        """Returns the sum and starts again from 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files under the workdir."""

    def __init__(self, workdir: epath.Path):
        self._jsonl = (workdir / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Appends one line `{"step", "group", **values}`; floats and lists of floats."""
        line = {"step": step, "group": group, **{k: _json_number(v) for k, v in values.items()}}
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for i, item in enumerate(value):
                    self._tensorboard.add_scalar(f"{group}/{name}/{i}", item, step)
            else:
                self._tensorboard.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._jsonl.close()
        self._tensorboard.close()


class Progress:
    """A tqdm bar with ETA where stderr is a terminal, else a line every so often.

    Attributes:
      total: steps of the whole run.
    """

    def __init__(self, start: int, total: int, label: str):
        self.total, self._start, self._label = total, start, label
        self._began = time.monotonic()
        self._bar = (
            tqdm.tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update(1)

    def report(self, step: int, values: dict[str, float], throughput: dict[str, float]) -> None:
        """Shows the values beside the step, the rates, and the time left."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        for name, value in throughput.items():
            if name == "input_share":
                text += f"  input {100 * value:.0f} %" + (INPUT_BOUND if value > 0.2 else "")
            elif name != "steps_per_second":
                text += f"  {value:.4g} {name.replace('_per_second', '/s')}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        elapsed = time.monotonic() - self._began
        rate = (step - self._start) / max(elapsed, 1e-9)
        left = (self.total - step) / rate if rate > 0 else math.inf
        eta = f"{left:.0f} s left" if math.isfinite(left) else ""
        self.note(f"{self._label}: step {step}/{self.total}  {text}  {rate:.2f} steps/s  {eta}")

    def note(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _json_number(value: Any) -> Any:
    """NaN and infinity are not JSON; they become strings so that every line can be read."""
    if isinstance(value, list):
        return [_json_number(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
