"""What is measured of a model while it trains."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.data.pipeline import eval_batches
from quantizable_flax.data.task import Task
from quantizable_flax.evaluation.outliers import outlier_sites, telemetry
from quantizable_flax.evaluation.step import Metrics, evaluate, make_eval_step
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.quantization.sites import RANGES, STATS
from quantizable_flax.runtime.mesh import batch_share, put_batch, replicated
from quantizable_flax.training.step import Batch


class Measures:
    """The metric on the validation split, and the outlier statistics of a batch."""

    def __init__(self, config: ConfigDict, model: nn.Module, task: Task, mesh: Mesh):
        """Opens the validation split, where it is read at all.

        Raises:
          UserError: too few examples for a batch.
        """
        self._metric, self._limit = model.metric, config.train.eval_batches
        self._place = functools.partial(put_batch, mesh=mesh)
        self._validation: Any = None
        if config.train.eval_every:
            self._validation = eval_batches(
                task,
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
                share=batch_share(mesh),
            )
        sites = outlier_sites(model, config.eval.outliers)

        def stats(params, ranges, batch):
            with on_mesh(mesh):
                _, updated = model.apply(
                    {"params": params, RANGES: ranges}, batch, method="loss", mutable=[STATS]
                )
            return telemetry(updated[STATS], sites)

        self._telemetry_step = jax.jit(stats, out_shardings=replicated(mesh))
        self._eval_step = make_eval_step(model, mesh=mesh)

    def telemetry(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Statistics of the published sites, and the means of the gates, by name."""
        stats = jax.device_get(self._telemetry_step(state.params, state.ranges, batch))
        return {name: value.tolist() for name, value in stats.items()}

    def validation(self, state: TrainState) -> Metrics:
        """The metric on the first `config.train.eval_batches` batches, all where that is 0."""
        with jax.transfer_guard("allow"):
            return evaluate(
                self._eval_step,
                state.params,
                itertools.islice(self._validation, self._limit or None),
                state.ranges,
                metric=self._metric,
                label="validation",
                place=self._place,
            )
