"""Where the time of a run goes: rates of training, utilisation, and what interrupts it."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.models.flops import FORWARD_AND_BACKWARD, example_flops
from quantizable_flax.runtime.chips import chip_of
from quantizable_flax.runtime.progress import Clock, duration, readable

LOSSES = ("input", "compile", "checkpoint", "evaluation", "profile")
SMOOTHING = 0.3  # weight of the last interval in the time that is left


class Throughput:
    """Rates between two reports, and the shares of that time which the steps did not get.

    The rates are those of training alone: steps over the interval without compilation, validation,
    telemetry, saving and tracing. Waiting for data belongs to training. A share is of the whole
    interval, measured where the loop stands still: the device works meanwhile, so a small share of
    input means that the data keep up.

    Attributes:
      lost: a clock for each of `LOSSES`, to be used as `with throughput.lost["input"]:`.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, unit: str, start: int):
        self.lost = {name: Clock() for name in LOSSES}
        self._batch, self._unit, self._mesh = config.train.batch_size, unit, mesh
        self._flops = example_flops(config)
        device = mesh.devices.flat[0]
        self._kind, self._chip = device.device_kind, chip_of(device.device_kind)
        self._total, self._reported_step = config.train.steps, start
        self._step_seconds: float | None = None
        self._totals = dict.fromkeys(LOSSES, 0.0)
        self._began = self._reported = time.monotonic()
        self._start = start

    @property
    def step_flops(self) -> float:
        """Model FLOPs of a step on all devices together."""
        return self._batch * self._flops.train

    def restart(self) -> None:
        """Begins to measure now."""
        self._began = self._reported = time.monotonic()

    def timing_first(self, step: Callable, note: Callable[[float], None]) -> Callable:
        """Returns the jitted step; its first call, which traces and compiles, goes to `note`.

        A call returns when the work is dispatched, so the first one is compilation alone.
        """
        compiled = False

        @functools.wraps(step)
        def timed(*arguments: Any) -> Any:
            nonlocal compiled
            if compiled:
                return step(*arguments)
            compiled, began = True, time.monotonic()
            with self.lost["compile"]:
                results = step(*arguments)
            note(time.monotonic() - began)
            return results

        return timed

    def measure(self, step: int) -> dict[str, float]:
        """Returns rates (per second), shares (of 1) and memory (bytes) since the last call."""
        now = time.monotonic()
        seconds, steps = max(now - self._reported, 1e-9), step - self._reported_step
        lost = self._take()
        self._reported, self._reported_step = now, step
        interruptions = sum(value for name, value in lost.items() if name != "input")
        rate = steps / max(seconds - interruptions, 1e-9)
        self._smooth(seconds - lost["compile"], steps)
        per_device = rate * self.step_flops / self._mesh.devices.size
        values = {"steps_per_second": rate, f"{self._unit}_per_second": rate * self._batch}
        if self._unit == "sequences":
            values["tokens_per_second"] = rate * self._batch * self._flops.tokens
        values["device_flops_per_second"] = per_device
        if self._chip is not None:
            values["mfu"] = per_device / self._chip.bf16_flops
        return (
            values | {f"{name}_share": value / seconds for name, value in lost.items()} | memory()
        )

    def _take(self) -> dict[str, float]:
        lost = {name: clock.take() for name, clock in self.lost.items()}
        for name, value in lost.items():
            self._totals[name] += value
        return lost

    def seconds_left(self) -> float | None:
        """Returns the time to the last step, by smoothed intervals; None before the first."""
        if self._step_seconds is None:
            return None
        return (self._total - self._reported_step) * self._step_seconds

    def _smooth(self, seconds: float, steps: int) -> None:
        if steps < 1:
            return
        new, old = seconds / steps, self._step_seconds
        self._step_seconds = new if old is None else SMOOTHING * new + (1 - SMOOTHING) * old

    def description(self, params: Any) -> str:
        """Returns one line: mesh, devices, parameters, and the model FLOPs of a step."""
        axes = " ".join(f"{axis}={size}" for axis, size in self._mesh.shape.items())
        processes = jax.process_count()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        parts = " + ".join(f"{name} {readable(v)}" for name, v in self._flops.parts.items())
        return (
            f"mesh {axes} ({self._mesh.devices.size} x {self._kind}, {processes} "
            f"process{'es' if processes > 1 else ''}), {readable(parameters)} parameters, "
            f"{readable(self.step_flops, 'FLOP')} a step = {FORWARD_AND_BACKWARD} x {self._batch} "
            f"{self._unit} x ({parts})"
        )

    def summary(self, step: int) -> str | None:
        """Returns one line about the run until this step, None if that is where it started."""
        steps, seconds = step - self._start, time.monotonic() - self._began
        if steps < 1:
            return None
        self._take()
        shares = [
            f"{name} {100 * value / seconds:.0f} %"
            for name, value in self._totals.items()
            if value >= 0.01 * seconds
        ]
        return f"{steps} steps in {duration(seconds)}" + "".join(f", {share}" for share in shares)


def memory() -> dict[str, float]:
    """Bytes in use and their peak on the fullest of this process's devices; {} where not known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"bytes_in_use": "memory_in_use", "peak_bytes_in_use": "memory_peak"}
    return {
        ours: float(max(of_device[theirs] for of_device in stats))
        for theirs, ours in names.items()
        if all(theirs in of_device for of_device in stats)
    }
