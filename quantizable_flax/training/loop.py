"""The training loop: mesh, model, state, restore, data, step, loop."""

import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax.checkpoint import resume, same_data, store
from quantizable_flax.checkpoint.lock import Lock, held
from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.config import check_positive
from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.task import Task
from quantizable_flax.data.tasks import make_task
from quantizable_flax.ptq.trained import learns_ranges
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.mesh import batch_share
from quantizable_flax.runtime.profiling import parse_steps
from quantizable_flax.runtime.workdir import check_writable
from quantizable_flax.training import initial, qat
from quantizable_flax.training import teacher as teachers
from quantizable_flax.training.distillation import make_objective
from quantizable_flax.training.feed import Feed
from quantizable_flax.training.measures import Measures
from quantizable_flax.training.run import Run
from quantizable_flax.training.setup import set_up
from quantizable_flax.training.step import init_state, make_train_step
from quantizable_flax.training.stopping import StopSignal


def train(config: ConfigDict, workdir: str, *, profile: str | None = None) -> TrainState:
    """Trains to `config.train.steps`, continuing what the workdir holds; returns the last state.

    Args:
      config: of a recipe.
      workdir: local folder or bucket of the run.
      profile: `START:STOP`, steps to trace into `profile/` of the workdir.

    Raises:
      UserError: a configuration that cannot work, a workdir of another model or that another run
        is using, no readable checkpoint among those there, or a run that diverged (its last
        checkpoint is kept).
    """
    path = store.absolute(workdir)
    check_positive(config)
    check_writable(path)
    traced = parse_steps(profile, config.train.steps)
    with held(path) as lock:
        return _train(config, path, traced, lock)


def _train(
    config: ConfigDict, path: epath.Path, traced: tuple[int, int] | None, lock: Lock
) -> TrainState:
    teachers.check_apart(config, path)
    mesh, model, optimizer = set_up(config)
    task = _task_of_newest(config, path)  # before anything is compiled
    teacher = teachers.load_teacher(config, model, mesh)
    objective = make_objective(config, model, teacher)
    state = init_state(
        model,
        optimizer,
        model.example_batch(),
        config.seed,
        mesh,
        learned_ranges=learns_ranges(config),
    )

    state, notes, damaged = _restore(config, path, state)
    assets = notes.assets if notes is not None else {}
    known = assets or None
    if notes is None and config.init_from:
        state, assets = initial.start_from(config, state)
        known = initial.for_data(config, assets)
    task = task or make_task(config, known)
    origin = teachers.origin(config, teacher, task, mesh)
    data = train_iterator(
        task,
        batch_size=config.train.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        share=batch_share(mesh),
    )
    _check_same_data(task)
    if notes is not None:
        same_data.check(notes.info, task, path)
        teachers.check_same(config, notes.info, origin, path)
        data.set_state(notes.data)
    elif config.quant.train:
        state = qat.calibrated(config, model, task, state)
    measures = Measures(config, model, task, mesh, objective)
    run = Run(config, path, measures, task, assets, notes, mesh, lock, origin)
    run.begin(damaged)
    step = make_train_step(model, optimizer, config, mesh, state, objective)
    step = run.observed(step, state, traced)
    feed = Feed(data, mesh, config.train.prefetch, run.input_clock)
    try:
        with jax.transfer_guard("disallow"), StopSignal() as stop:
            return _loop(run, state, step, feed, stop, objective.given)
    finally:
        data.close()
        run.close()


def _loop(
    run: Run, state: TrainState, step, feed: Feed, stop: StopSignal, given: tuple[Any, ...]
) -> TrainState:
    train, every = run.config.train, run.config.checkpoint.every
    done, pending = run.start, None  # metrics are fetched one step late, dispatch never waits
    while done < train.steps:
        batch = next(feed)
        if train.telemetry_every and done % train.telemetry_every == 0:
            run.telemetry(done, state, batch)
        state, metrics = step(state, batch, *given)
        done += 1
        if pending is not None:
            run.record(done - 1, pending)
        pending = metrics
        ending = done == train.steps
        if train.eval_every and (ending or done % train.eval_every == 0):
            run.record(done, pending)
            pending = None
            run.validate(done, state)
        run.check_saves()
        # Asked once: a signal that comes later waits for the next step, so that what is reported
        # as saved is saved.
        stopping = stop.reached(done - run.start)
        if ending or stopping or done % every == 0:
            if pending is not None:  # never save a step whose metrics were not found finite
                run.record(done, pending)
                pending = None
            run.save(state, done, feed.get_state())
        if stopping:
            run.stopped(done)
            break
    return state


def _check_same_data(task: Task) -> None:
    """Raises UserError unless all hosts read the same examples: each takes its own part of them."""
    if jax.process_count() == 1:
        return
    source = task.source("train")
    places = (0, len(source) // 2, len(source) - 1)
    seen = json.dumps([task.assets, len(source), [str(source[i]) for i in places]])
    advice = "give every host the same data.files, or one data.cache_dir that all share"
    hosts.check_same("the training data", seen.encode(), advice)


def _task_of_newest(config: ConfigDict, path: epath.Path) -> Task | None:
    """Returns the data side of a run that continues, once they are known to be what it began with.

    None for a new run, and where the newest checkpoint is damaged: restoring finds an older one.
    """

    def read(step: int) -> Task:
        notes = store.read_notes(path, step)
        _check_continues(notes, config, path)
        task = make_task(config, notes.assets)
        same_data.check(notes.info, task, path)
        return task

    return resume.newest_if_sound(path, read)


def _check_continues(notes: store.Notes, config: ConfigDict, path: epath.Path) -> None:
    resume.check_trainable(notes.info, path)
    known = same_data.KEY in notes.info
    resume.check_same(notes.config, config.to_dict(), path, data_known=known)


def _restore(config: ConfigDict, path: epath.Path, like: TrainState):
    """Returns (state, notes or None, damaged steps) of a new or a continued run."""
    if not resume.steps_of_all(path):
        return like, None, []

    def read(step):
        notes = store.read_notes(path, step)
        _check_continues(notes, config, path)
        return store.restore_state(path, step, like), notes

    _, (state, notes), damaged = resume.newest_readable(path, read)
    return state, notes, damaged
