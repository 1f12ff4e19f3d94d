"""Progress of a run: a bar on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from typing import Any

import tqdm

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


class Progress:
    """A tqdm bar with ETA where stderr is a terminal, else a line every so often.

    Attributes:
      total: steps of the whole run.

    It says nothing where it is `quiet`, as on all hosts but the first. A terminal that is gone, a
    pipe that nobody reads or a log on a full disk do not stop a run.
    """

    def __init__(self, start: int, total: int, label: str, *, quiet: bool = False):
        self._quiet = quiet
        self.total, self._label = total, label
        self._bar = (
            tqdm.tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty() and not quiet
            else None
        )

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(1)

    def report(
        self,
        step: int,
        values: dict[str, float],
        throughput: dict[str, float],
        seconds_left: float | None = None,
    ) -> None:
        """Shows the values beside the step, what `Throughput.measure` says, and the time left."""
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        if self._bar is not None:  # it has a rate and an ETA of its own
            rest = {key: v for key, v in throughput.items() if key != "steps_per_second"}
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str("  ".join(shown + _shown(rest)))
            return
        shown += _shown(throughput)
        if seconds_left:
            shown.append(f"{duration(seconds_left)} left")
        self.note(f"{self._label}: step {step}/{self.total}  " + "  ".join(shown))

    def note(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            elif not self._quiet:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


def _shown(throughput: dict[str, float]) -> list[str]:
    """What a line has room for: rates, utilisation, memory, and losses of one percent or more."""
    parts, lost = [], []
    for name, value in throughput.items():
        if name == "device_flops_per_second":
            if "mfu" not in throughput:
                parts.append(readable(value, "FLOP/s/device"))
        elif name == "mfu":
            parts.append(f"MFU {100 * value:.1f} %")
        elif name == "memory_peak":
            parts.append(f"peak {value / 2**30:.1f} GiB")
        elif name.endswith("_share"):
            bound = INPUT_BOUND if name == "input_share" and value > 0.2 else ""
            if value >= 0.01:
                lost.append(f"{name.removesuffix('_share')} {100 * value:.0f} %{bound}")
        elif name.endswith("_per_second"):
            parts.append(f"{readable(value)} {name.removesuffix('_per_second')}/s")
    return [*parts, "lost: " + ", ".join(lost)] if lost else parts


def readable(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: `45.6k`, or with a unit `1.23 GFLOP`."""
    space = " " if unit else ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{space}{prefix}{unit}"
        value /= 1000.0
    return f"{value:.3g}{space}P{unit}"


def duration(seconds: float) -> str:
    """Seconds in two units at most: `42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
