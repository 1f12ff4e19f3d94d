"""What is measured of a model while it trains."""

import collections
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.checkpoint.state import TrainState
from quantizable_flax.data.pipeline import eval_batches
from quantizable_flax.data.task import Task
from quantizable_flax.evaluation.outliers import outlier_sites, telemetry
from quantizable_flax.evaluation.step import evaluate, make_eval_step, stream
from quantizable_flax.models.metric import FIDELITY, Metric
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.quantization.sites import RANGES, STATS
from quantizable_flax.runtime.mesh import batch_share, put_batch, replicated
from quantizable_flax.training.distillation import Distillation
from quantizable_flax.training.objective import Batch, Objective


class Measures:
    """The metric on the validation split, and the outlier statistics of a batch.

    Attributes:
      metric: the model's, or fidelity to the teacher.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        task: Task,
        mesh: Mesh,
        objective: Objective,
    ):
        """Opens the validation split, where it is read at all.

        Raises:
          UserError: too few examples for a batch.
        """
        self._objective, self._limit = objective, config.train.eval_batches
        family: Any = model
        self.metric: Metric = family.metric
        if isinstance(objective, Distillation):
            self.metric = FIDELITY
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
        if isinstance(objective, Distillation):
            self._eval_step = objective.eval_step(mesh)
        else:
            self._eval_step = make_eval_step(model, mesh=mesh)

    def telemetry(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Statistics of the published sites, and the means of the gates, by name."""
        stats = jax.device_get(self._telemetry_step(state.params, state.ranges, batch))
        return {name: value.tolist() for name, value in stats.items()}

    def validation(self, state: TrainState) -> dict[str, float]:
        """Loss and metric on the first `config.train.eval_batches` batches, all where that is 0."""
        batches = itertools.islice(self._validation, self._limit or None)
        with jax.transfer_guard("allow"):
            if isinstance(self._objective, Distillation):
                return self._distances(self._objective, state, batches)
            metrics = evaluate(
                self._eval_step,
                state.params,
                batches,
                state.ranges,
                metric=self.metric,
                label="validation",
                place=self._place,
            )
        return {
            "loss": metrics.loss,
            "accuracy": metrics.accuracy,
            self.metric.name: metrics.value,
        }

    def _distances(
        self, objective: Distillation, state: TrainState, batches: Iterable[Any]
    ) -> dict[str, float]:
        """The parts of the distillation, and the mean cosine of the embeddings to the teacher's.

        The cosine is what evaluation calls fidelity; its step may take this one's place.
        """

        def step(params, ranges, batch):
            return self._eval_step(params, ranges, batch, *objective.given)

        sums: dict[str, float] = collections.defaultdict(float)
        for found in stream(step, state.params, batches, state.ranges, "validation", self._place):
            for name, value in found.items():
                sums[name] += float(value)
        means = objective.of_sums(sums)
        return means | {self.metric.name: 1.0 - means["pooled"]}
