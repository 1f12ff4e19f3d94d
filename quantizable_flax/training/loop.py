"""The training loop: mesh, model, state, restore, data, step, loop."""

import json
import logging
import math
import signal
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax import config as configuration
from quantizable_flax.analysis.outliers import SITES, telemetry
from quantizable_flax.data import (
    Tokenizer,
    build_tokenizer,
    eval_batches,
    make_transform,
    train_iterator,
)
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation import evaluate, make_eval_step
from quantizable_flax.models.registry import build_model
from quantizable_flax.quantization.sites import STATS
from quantizable_flax.training import checkpoint, resume
from quantizable_flax.training.metrics import MetricWriter, Progress
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.sharding import check_batch, make_mesh, put_batch
from quantizable_flax.training.step import TrainState, init_state, make_train_step

logger = logging.getLogger(__name__)


class DivergedError(UserError):
    """The loss or the gradient norm is not finite."""


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains to `config.train.steps`, continuing what the workdir holds; returns the last state.

    Raises:
      UserError: a configuration that cannot work, a workdir of another model, no readable
        checkpoint among those there, or a run that diverged (its last checkpoint is kept).
    """
    path = epath.Path(workdir)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    model, optimizer = build_model(config), make_optimizer(config, config.train.steps)
    example = _example_batch(config)
    state = init_state(model, optimizer, example, config.seed, mesh)

    state, notes, damaged = _restore(config, path, state)
    tokenizer = _tokenizer(config, notes)
    transform = make_transform(config, tokenizer)
    data = train_iterator(config, tokenizer, transform, batch_size=config.train.batch_size)
    if notes is not None:
        data.set_state(notes.data)
    run = _Run(config, path, model, tokenizer, transform, notes)
    run.begin(damaged)
    step = make_train_step(model, optimizer, config, mesh, state)
    try:
        with jax.transfer_guard("disallow"), _StopSignal() as stop:
            return _loop(run, state, step, data, mesh, stop)
    finally:
        run.close()


def _loop(run: "_Run", state: TrainState, step, data, mesh, stop: "_StopSignal") -> TrainState:
    train, every = run.config.train, run.config.checkpoint.every
    done, pending = run.start, None  # metrics are fetched one step late, dispatch never waits
    while done < train.steps:
        batch = put_batch(next(data), mesh)
        if train.telemetry_every and done % train.telemetry_every == 0:
            run.telemetry(done, state.params, batch)
        state, metrics = step(state, batch)
        done += 1
        if pending is not None:
            run.record(done - 1, pending)
        pending = metrics
        ending = done == train.steps or stop.requested
        if ending or done % every == 0 or (train.eval_every and done % train.eval_every == 0):
            run.record(done, pending)
            pending = None
        if train.eval_every and (done % train.eval_every == 0 or done == train.steps):
            run.validate(done, state.params)
        if ending or done % every == 0:
            run.save(state, done, data.get_state())
        if stop.requested:
            run.progress.note(f"stopped by a signal: step {done} is saved, run again to go on.")
            break
    return state


class _Run:
    """What surrounds the steps: writers, progress, validation, checkpoints."""

    def __init__(self, config, path, model: nn.Module, tokenizer: Tokenizer, transform, notes):
        self.config, self._path, self._model = config, path, model
        self._tokenizer, self._transform = tokenizer, transform
        self.start = notes.info["step"] if notes is not None else 0
        self._seconds_before = notes.info["train_seconds"] if notes is not None else 0.0
        sites = SITES[config.model.name]

        def stats(params, batch):
            _, updated = model.apply({"params": params}, batch, method="loss", mutable=[STATS])
            return telemetry(updated[STATS], sites)

        self._telemetry_step = jax.jit(stats)
        self._eval_step = make_eval_step(model)
        self._validation: Any = None

    def begin(self, damaged: list[int]) -> None:
        """Touches the workdir: only now, when nothing about the configuration can fail any more."""
        self._path.mkdir(parents=True, exist_ok=True)
        if self.config.train.eval_every:
            self._validation = eval_batches(
                self.config,
                self._tokenizer,
                self._transform,
                batch_size=self.config.eval.batch_size,
            )
        self._checkpoints = checkpoint.Checkpoints(self._path, self.config.checkpoint.keep)
        for step in damaged:
            self._checkpoints.set_aside(step)
        (self._path / "config.json").write_text(configuration.to_json(self.config))
        (self._path / "tokenizer.json").write_text(self._tokenizer.to_json())
        self._writer = MetricWriter(self._path)
        label = self.config.name or self._path.name
        self.progress = Progress(self.start, self.config.train.steps, label)
        if self.start:
            self.progress.note(f"{label}: continuing {self._path} at step {self.start}")
        self._began = time.monotonic()

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetches one step's metrics, checks that they are finite, logs every `log_every` steps."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            kept = checkpoint.saved_steps(self._path)
            raise DivergedError(
                f"the loss at step {step} is {values['loss']} (gradient norm "
                f"{values['grad_norm']}): lower optimizer.learning_rate or raise "
                "optimizer.warmup_steps; "
                + (f"the checkpoint of step {kept[0]} is kept." if kept else "nothing was saved.")
            )
        self.progress.advance()
        every = self.config.train.log_every
        if step % every == 0 or step == self.config.train.steps:
            self._writer.write(step, "train", values)
            self.progress.report(step, {"loss": values["loss"]})

    def telemetry(self, step: int, params: Any, batch: dict[str, jax.Array]) -> None:
        """Logs the outlier statistics of the batch before the step that trains on it."""
        stats = jax.device_get(self._telemetry_step(params, batch))
        self._writer.write(step, "telemetry", {k: v.tolist() for k, v in stats.items()})

    def validate(self, step: int, params: Any) -> None:
        """Logs perplexity on (the first `eval_batches` batches of) the validation split."""
        limit = self.config.train.eval_batches
        batches = (b for i, b in enumerate(self._validation) if not limit or i < limit)
        with jax.transfer_guard("allow"):
            metrics = evaluate(self._eval_step, params, batches)
        values = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        self._writer.write(step, "validation", values)
        self.progress.note(f"step {step}: validation perplexity {metrics.perplexity:.2f}")

    def save(self, state: TrainState, step: int, data_state: dict[str, Any]) -> None:
        """Starts an asynchronous checkpoint of a step whose metrics were found finite."""
        seconds = self._seconds_before + time.monotonic() - self._began
        notes = checkpoint.Notes(
            data=data_state,
            config=self.config.to_dict(),
            tokenizer=json.loads(self._tokenizer.to_json()),
            info={
                "step": step,
                "train_seconds": seconds,
                "versions": checkpoint.library_versions(),
            },
        )
        with jax.transfer_guard("allow"):
            self._checkpoints.save(state, notes)

    def close(self) -> None:
        """Waits for the checkpoint in flight and closes files."""
        self._checkpoints.close()
        self._writer.close()
        self.progress.close()


def _restore(config: ConfigDict, path: epath.Path, like: TrainState):
    """Returns (state, notes or None, damaged steps) of a new or a continued run."""
    if not checkpoint.saved_steps(path):
        return like, None, []

    def read(step):
        notes = checkpoint.read_notes(path, step)
        resume.check_same(notes.config, config.to_dict(), path)
        return checkpoint.restore_state(path, step, like), notes

    _, (state, notes), damaged = resume.newest_readable(path, read)
    return state, notes, damaged


def _tokenizer(config: ConfigDict, notes) -> Tokenizer:
    if notes is not None:
        return Tokenizer.from_json(json.dumps(notes.tokenizer), origin="the checkpoint")
    return build_tokenizer(config.data)


def _example_batch(config: ConfigDict) -> dict[str, jax.Array]:
    """The smallest batch that a model can be initialised with."""
    ids = jnp.zeros((1, config.data.seq_len), jnp.int32)
    return {"input_ids": ids, "labels": ids}


class _StopSignal:
    """Turns SIGTERM into a request that the loop answers between two steps."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "_StopSignal":
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, *_: Any) -> None:
        self.requested = True
