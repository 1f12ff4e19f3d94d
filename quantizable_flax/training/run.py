"""What surrounds the steps of a run: writers, progress, validation, checkpoints."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from quantizable_flax.checkpoint import same_data, store
from quantizable_flax.checkpoint.lock import Lock
from quantizable_flax.checkpoint.lock_file import FILE
from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.data.task import Task
from quantizable_flax.errors import UserError
from quantizable_flax.models.metric import FIDELITY
from quantizable_flax.runtime import hosts, workdir
from quantizable_flax.runtime.profiling import Profile
from quantizable_flax.runtime.progress import Progress, duration
from quantizable_flax.runtime.throughput import Throughput
from quantizable_flax.training.measures import Measures
from quantizable_flax.training.metric_files import MetricWriter, Restart
from quantizable_flax.training.optimizer import make_schedule
from quantizable_flax.training.step import Batch, Metrics


class DivergedError(UserError):
    """The loss or the gradient norm is not finite."""


class Run:
    """What surrounds the steps: writers, progress, validation, checkpoints."""

    def __init__(
        self,
        config,
        path,
        measures: Measures,
        task: Task,
        assets: dict[str, Any],
        notes,
        mesh: Mesh,
        lock: Lock,
        origin: dict[str, Any],
    ):
        self._lock, self._measures, self._origin = lock, measures, origin
        self.config, self._path, self._task = config, path, task
        self._assets = assets | task.assets  # what the model came with, and data do not know
        self._schedule = make_schedule(config.optimizer, config.train.steps)
        self.start = self._recorded = notes.info["step"] if notes is not None else 0
        self._throughput = Throughput(config, mesh, task.unit, self.start)
        self.input_clock = self._throughput.lost["input"]
        self._profile: Profile | None = None
        self._seconds_before = notes.info["train_seconds"] if notes is not None else 0.0

    def begin(self, damaged: list[int]) -> None:
        """Touches the workdir: only now, when configuration and data have been checked."""
        if not self.start:
            workdir.check_ours(self._path)
        first = hosts.is_first()  # it alone writes, but for its part of a checkpoint
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--workdir={self._path} is no folder ({error.strerror}): choose another."
            ) from error
        if first and self.start < self.config.train.steps:
            workdir.describe(self._path, self.config, self._assets)
        self._check_shared()
        saving = self.config.checkpoint
        self._checkpoints = store.Checkpoints(self._path, saving.keep, saving.keep_every)
        for step in damaged:
            self._checkpoints.set_aside(step)
        self._writer = MetricWriter(self._path if first else None, self._restart())
        label = self.config.name or self._path.name
        self.progress = Progress(self.start, self.config.train.steps, label, quiet=not first)
        if self.start >= self.config.train.steps:
            self.progress.note(f"{label}: {self._path} is already at step {self.start}")
        elif self.start:
            self.progress.note(f"{label}: continuing {self._path} at step {self.start}")
        self._began = time.monotonic()

    def _restart(self) -> Restart | None:
        """What is logged again by the steps to come; None if there are none."""
        if self.start >= self.config.train.steps:
            return None
        every = self.config.train.telemetry_every
        return Restart(self.start, telemetry=bool(every) and self.start % every == 0)

    def observed(
        self, step: Callable, state: TrainState, span: tuple[int, int] | None
    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Says what will run, and returns the step with its compilation timed and `span` traced."""
        if self.start < self.config.train.steps:
            label = self.config.name or self._path.name
            self.progress.note(f"{label}: {self._throughput.description(state.params)}")
        clock = self._throughput.lost["profile"]
        self._profile = Profile(self._path, span, clock, self.progress.note)
        self._throughput.restart()
        return self._profile.around(self._throughput.timing_first(step, self._compiled), self.start)

    def _compiled(self, seconds: float) -> None:
        self._writer.write(self.start + 1, "compile", {"seconds": seconds})
        self.progress.note(f"the step was compiled in {duration(seconds)}")

    def _check_shared(self) -> None:
        """Raises UserError on all processes unless each sees what the first has written."""
        hosts.wait_for_all("the workdir is there")
        sees = hosts.gathered(np.int32((self._path / FILE).exists()))
        if not sees.all():
            raise UserError(
                f"--workdir={self._path} must be storage that all hosts share, process "
                f"{', '.join(map(str, np.flatnonzero(sees == 0)))} does not see what process 0 "
                "wrote there: give a bucket or a network file system."
            )

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetches one step's metrics, checks that they are finite, logs every `log_every` steps."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            with self._throughput.lost["checkpoint"]:
                self._checkpoints.wait()
            kept = store.saved_steps(self._path)
            raise DivergedError(
                f"the loss at step {step} is {values['loss']} (gradient norm "
                f"{values['grad_norm']}): lower optimizer.learning_rate or raise "
                "optimizer.warmup_steps; "
                + (f"the checkpoint of step {kept[0]} is kept." if kept else "nothing was saved.")
            )
        self.progress.advance()
        self._recorded = step
        every = self.config.train.log_every
        if step % every == 0 or step == self.config.train.steps:
            throughput = self._throughput.measure(step)
            values["learning_rate"] = self._rate(step - 1)
            self._writer.write(step, "train", values | throughput)
            left = self._throughput.seconds_left()
            self.progress.report(step, {"loss": values["loss"]}, throughput, left)

    def _rate(self, step: int) -> float:
        with jax.transfer_guard("allow"):
            return float(self._schedule(step))

    def telemetry(self, step: int, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Logs the outlier statistics of the batch before the step that trains on it."""
        with self._throughput.lost["evaluation"]:
            stats = self._measures.telemetry(state, batch)
        self._writer.write(step, "telemetry", stats)

    def validate(self, step: int, state: TrainState) -> None:
        """Logs the metric on the validation split."""
        with self._throughput.lost["evaluation"]:
            values = self._measures.validation(state)
        self._writer.write(step, "validation", values)
        metric = self._measures.metric
        figure = f"{values[metric.name]:.{4 if metric is FIDELITY else 2}f}"
        self.progress.note(f"step {step}: validation {metric.label} {figure}")

    def save(self, state: TrainState, step: int, data_state: dict[str, Any]) -> None:
        """Starts an asynchronous checkpoint of a step whose metrics were found finite."""
        seconds = self._seconds_before + time.monotonic() - self._began
        notes = store.Notes(
            data=data_state,
            config=self.config.to_dict(),
            assets=self._assets,
            info={
                "step": step,
                "train_seconds": seconds,
                "versions": store.library_versions(),
                same_data.KEY: self._task.fingerprint,
                **self._origin,
            },
        )
        with self._throughput.lost["checkpoint"], jax.transfer_guard("allow"):
            self._checkpoints.save(state, notes)

    def check_saves(self) -> None:
        """Raises UserError if the checkpoint in flight has failed, or the workdir was taken."""
        self._lock.check()
        self._checkpoints.check()

    def stopped(self, step: int) -> None:
        """Says that a run was stopped, once its last step is saved indeed."""
        self._checkpoints.wait()
        self.progress.note(f"stopped by a signal: step {step} is saved, run again to go on.")

    def close(self) -> None:
        """Ends a trace, waits for the checkpoint in flight, sums up and closes files."""
        if self._profile is not None:
            self._profile.close()
        try:
            with self._throughput.lost["checkpoint"]:
                self._checkpoints.close()
        finally:
            summary = self._throughput.summary(self._recorded)
            if summary is not None:
                self.progress.note(summary)
            self._writer.close()
            self.progress.close()
